//! Cost of score programs on the CPU: each feature compared with plain attention, per visible pair.
//!
//! ```sh
//! cargo run --release -p benches --bin cpu_programs -- [--device cpu] [--rounds 7] [--only NAME]
//! ```
//!
//! Plain attention and the features are measured in turn, round after round, so that other load on the machine affects
//! all alike. Times are the best of all rounds. A cost of 1 means that a visible pair takes as long as in plain full
//! attention.

use std::time::Instant;

use flash_attention::half::bf16;
use flash_attention::{Attention, Device, Element, Error, Gradients, Output, Tensor};

type Failure = Box<dyn std::error::Error>;

/// A feature, and the number of visible (query, key) pairs of one head.
struct Feature {
    name: &'static str,
    attention: Attention,
    pairs: u64,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (mut device, mut rounds, mut only) = ("cpu".to_owned(), 7, String::new());
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--device" => device = value,
            "--rounds" => rounds = value.parse()?,
            "--only" => only = value,
            _ => return Err(format!("{argument} is no option").into()),
        }
    }
    let device: Device = device.parse()?;
    println!("{}; best of {rounds} rounds\n", device.name());
    println!(
        "| dtype | B, H, N, D | feature | pass | ms | cost of a visible pair | times faster than full | than causal |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for shape in [[1, 12, 2048, 64], [1, 2, 16384, 64]] {
        let features: Vec<Feature> = features(&device, shape)?
            .into_iter()
            .enumerate()
            .filter(|(place, feature)| *place < 2 || feature.name.contains(&only))
            .map(|(_, feature)| feature)
            .collect();
        measure::<f32>(&device, shape, &features, rounds)?;
        measure::<bf16>(&device, shape, &features, rounds)?;
    }
    Ok(())
}

/// Features to measure, starting with full and causal attention.
fn features(_device: &Device, [_, _, seqlen, _]: [usize; 4]) -> Result<Vec<Feature>, Error> {
    let n = seqlen as u64;
    let new = Attention::new;
    let feature = |name, attention, pairs| Feature { name, attention, pairs };
    let causal = n * (n + 1) / 2;
    // Each query sees `left` keys before its own and its own, as far as there are any.
    let window = |left: u64| (0..n).map(|query| query.min(left) + 1).sum();
    let mut all = vec![
        feature("full", new(), n * n),
        feature("causal", new().causal(), causal),
        feature("window of 512", new().window(511, 0), window(511)),
    ];
    if seqlen <= 4096 {
        all.extend([
            feature("identity", new().score(|s, _| s + 0.0), n * n),
            feature(
                "ALiBi",
                new().score(|s, at| s - (at.head + 1).to_score() * 0.01 * at.distance().abs()),
                n * n,
            ),
            feature("softcap", new().softcap(20.0), n * n),
            feature("causal by a program", new().prefix(0), causal),
        ]);
    }
    Ok(all)
}

fn measure<T: Element>(device: &Device, shape: [usize; 4], features: &[Feature], rounds: usize) -> Result<(), Failure> {
    let mut state = 1_u64;
    let mut draw = || {
        let data: Vec<T> = (0..shape.iter().product())
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                T::from_f64((state >> 11) as f64 / (1_u64 << 51) as f64 - 2.0)
            })
            .collect();
        Tensor::from_slice(device, shape, &data)
    };
    let (q, k, v, dout) = (draw()?, draw()?, draw()?, draw()?);
    let mut output = Output::new(Tensor::zeros(device, shape)?, Tensor::zeros(device, &shape[..3])?);
    let zeros = || Tensor::zeros(device, shape);
    let mut gradients = Gradients::new(zeros()?, zeros()?, zeros()?);
    let mut best = vec![[f64::INFINITY; 2]; features.len()];
    for round in 0..=rounds {
        for (feature, best) in features.iter().zip(&mut best) {
            let start = Instant::now();
            let Output { out, lse, .. } = &mut output;
            feature.attention.forward_into(&q, &k, &v, out, lse)?;
            let forward = start.elapsed().as_secs_f64();
            if std::env::var("FORWARD_ONLY").is_err() {
                feature
                    .attention
                    .backward_into(&q, &k, &v, &output, &dout, &mut gradients)?;
            }
            let both = start.elapsed().as_secs_f64();
            if round > 0 {
                *best = [best[0].min(forward), best[1].min(both)];
            }
        }
    }
    let full = best[0].map(|seconds| seconds / features[0].pairs as f64);
    for (index, pass) in ["forward", "forward and backward"].into_iter().enumerate() {
        for (feature, best_of_feature) in features.iter().zip(&best) {
            let seconds = best_of_feature[index];
            println!(
                "| {} | {shape:?} | {} | {pass} | {:.2} | {:.2} | {:.2} | {:.2} |",
                T::DTYPE.name(),
                feature.name,
                1e3 * seconds,
                seconds / feature.pairs as f64 / full[index],
                best[0][index] / seconds,
                best[1][index] / seconds,
            );
        }
    }
    Ok(())
}
