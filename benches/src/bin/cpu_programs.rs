//! Cost of score programs on the CPU: each feature compared with plain attention, per visible pair.
//!
//! ```sh
//! cargo run --release -p benches --bin cpu_programs -- [--device cpu] [--rounds 7] [--only NAME] [--pass forward|both]
//! ```
//!
//! Plain attention and the features are measured in turn, round after round, so that other load on the machine affects
//! all alike. With `--serve` it answers lines `DTYPE SEQLEN PASS RUNS FEATURE` of standard input instead
//! (`f32 2048 forward 5 window of 512`), each with a line of JSON that holds the seconds of every run, for
//! `cpu_program_peers.py`. Times are the best of all rounds. A cost of 1 means that a visible pair takes as long as in plain full
//! attention. Ratios are of CPU time, the sum over all threads, which leaves out what other processes take.

use std::io::{BufRead as _, Write as _, stdin, stdout};
use std::time::Instant;

use benches::{Problem as _, Shape, Tensors};
use flash_attention::half::bf16;
use flash_attention::program::Table;
use flash_attention::{Attention, Device, Dtype, Element, Error, Tensor};

type Failure = Box<dyn std::error::Error>;

/// Batch, heads, seqlen and head_dim of the measurements.
const SHAPES: [[usize; 4]; 2] = [[1, 12, 2048, 64], [1, 2, 16384, 64]];

/// A feature, and the number of visible (query, key) pairs of one head.
struct Feature {
    name: &'static str,
    attention: Attention,
    pairs: u64,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.next_if_eq("--serve").is_some() {
        return serve(&Device::cpu());
    }
    let (mut device, mut rounds, mut only, mut both) = ("cpu".to_owned(), 7, String::new(), true);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--device" => device = value,
            "--rounds" => rounds = value.parse()?,
            "--only" => only = value,
            "--pass" if ["forward", "both"].contains(&value.as_str()) => both = value == "both",
            _ => return Err(format!("{argument} {value} is no option").into()),
        }
    }
    let device: Device = device.parse()?;
    println!("{}; best of {rounds} rounds\n", device.name());
    println!(
        "| dtype | B, H, N, D | feature | pass | ms | CPU ms | cost of a visible pair | times faster than full | than causal |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for shape in SHAPES {
        let features: Vec<Feature> = features(&device, shape)?
            .into_iter()
            .enumerate()
            .filter(|(place, feature)| *place < 2 || feature.name.contains(&only))
            .map(|(_, feature)| feature)
            .collect();
        measure::<f32>(&device, shape, &features, (rounds, both))?;
        measure::<bf16>(&device, shape, &features, (rounds, both))?;
    }
    Ok(())
}

/// Features to measure, starting with full and causal attention.
fn features(device: &Device, [_, heads, seqlen, _]: [usize; 4]) -> Result<Vec<Feature>, Error> {
    let n = seqlen as u64;
    let new = Attention::new;
    let feature = |name, attention, pairs| Feature { name, attention, pairs };
    let causal = n * (n + 1) / 2;
    // Each query sees its own key and 511 before it, as far as there are any.
    let window = (0..n).map(|query| query.min(511) + 1).sum();
    // One tile of 128 x 128 in eight, as many in each row.
    let tiles = seqlen / 128;
    let shown = |tile: usize| (tile % tiles + 5 * (tile / tiles)).is_multiple_of(8);
    let mask: Vec<i32> = (0..tiles * tiles).map(|tile| i32::from(shown(tile))).collect();
    let mask = Table::<i32, 2>::new(&Tensor::from_slice(device, [tiles, tiles], &mask)?)?;
    let mut all = vec![
        feature("full", new(), n * n),
        feature("causal", new().causal(), causal),
        feature("window of 512", new().window(511, 0), window),
        feature(
            "one tile in eight",
            new().mask(|at| mask.at(at.query / 128, at.key / 128).equals(1)),
            n * n / 8,
        ),
    ];
    if seqlen <= 4096 {
        let slopes: Vec<f32> = (0..heads)
            .map(|head| 0.5_f32.powi(1 + (head * 8 / heads) as i32))
            .collect();
        let slopes = Tensor::from_slice(device, [heads], &slopes)?;
        let documents: Vec<i32> = (0..seqlen).map(|token| (token / 512) as i32).collect();
        let documents = Tensor::from_slice(device, [1, seqlen], &documents)?;
        let bias: Vec<f32> = (0..seqlen * seqlen).map(|i| (i % 97) as f32 * 0.01).collect();
        let bias = Tensor::from_slice(device, [1, 1, seqlen, seqlen], &bias)?;
        all.extend([
            feature("ALiBi", new().alibi(&slopes), n * n),
            feature("softcap of 20", new().softcap(20.0), n * n),
            feature("documents of 512", new().documents(&documents, &documents), n * 512),
            feature("causal by a program", new().prefix(0), causal),
            feature("bias", new().bias(&bias), n * n),
            feature("dropout", new().dropout(0.1, 1), n * n),
        ]);
    }
    Ok(all)
}

/// Answers requests of another program, which alternates these runs with others.
fn serve(device: &Device) -> Result<(), Failure> {
    for line in stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.splitn(5, ' ').collect();
        let [dtype, seqlen, pass, runs, name] = words[..] else {
            return Err(format!("five words are needed: {line}").into());
        };
        let seqlen: usize = seqlen.parse()?;
        let shape = SHAPES.into_iter().find(|shape| shape[2] == seqlen);
        let shape = shape.ok_or(format!("no shape has {seqlen} tokens"))?;
        let features = features(device, shape)?;
        let feature = features.iter().find(|feature| feature.name == name);
        let attention = &feature.ok_or(format!("no feature is called {name}"))?.attention;
        let (both, runs) = (pass == "both", runs.parse()?);
        let seconds = match dtype {
            "f32" => timed::<f32>(device, shape, attention, both, runs)?,
            "bf16" => timed::<bf16>(device, shape, attention, both, runs)?,
            _ => return Err(format!("f32 or bf16: {dtype}").into()),
        };
        println!(
            r#"{{"device": "{}", "seconds": [{}]}}"#,
            device.name(),
            seconds.join(", ")
        );
        stdout().flush()?;
    }
    Ok(())
}

/// Seconds of each of several runs.
fn timed<T: Element>(
    device: &Device,
    shape: [usize; 4],
    attention: &Attention,
    both: bool,
    runs: usize,
) -> Result<Vec<String>, Error> {
    let mut problem = Tensors::<T>::new(&full(T::DTYPE, shape), device)?;
    problem.attention = attention.clone();
    let mut run = || {
        let mut time = problem.forward()?;
        if both {
            time += problem.backward()?;
        }
        Ok(format!("{:.9}", time.as_secs_f64()))
    };
    (0..runs).map(|_| run()).collect()
}

/// Plain attention of a shape.
fn full(dtype: Dtype, [batch, heads, seqlen, head_dim]: [usize; 4]) -> Shape {
    Shape {
        dtype,
        causal: false,
        batch,
        heads,
        seqlen_q: seqlen,
        seqlen_k: seqlen,
        head_dim,
    }
}

fn measure<T: Element>(
    device: &Device,
    shape: [usize; 4],
    features: &[Feature],
    (rounds, both): (usize, bool),
) -> Result<(), Failure> {
    let mut problem = Tensors::<T>::new(&full(T::DTYPE, shape), device)?;
    // Seconds of each pass, as the clock on the wall has them and in all threads.
    let mut best = vec![[[f64::INFINITY; 2]; 2]; features.len()];
    for round in 0..=rounds {
        for (feature, best) in features.iter().zip(&mut best) {
            problem.attention = feature.attention.clone();
            let start = Clocks::now();
            problem.forward()?;
            let forward = start.elapsed();
            if both {
                problem.backward()?;
            }
            let in_all = start.elapsed();
            if round > 0 {
                for (best, seconds) in best.iter_mut().zip([forward, in_all]) {
                    *best = [best[0].min(seconds[0]), best[1].min(seconds[1])];
                }
            }
        }
    }
    let passes = ["forward", "forward and backward"]
        .into_iter()
        .take(if both { 2 } else { 1 });
    for (index, pass) in passes.enumerate() {
        let of = |feature: usize, clock: usize| best[feature][index][clock];
        for (place, feature) in features.iter().enumerate() {
            println!(
                "| {} | {shape:?} | {} | {pass} | {:.1} | {:.1} | {:.2} | {:.1} | {:.1} |",
                T::DTYPE.name(),
                feature.name,
                1e3 * of(place, 0),
                1e3 * of(place, 1),
                of(place, 1) / of(0, 1) * (features[0].pairs as f64 / feature.pairs as f64),
                of(0, 1) / of(place, 1),
                of(1, 1) / of(place, 1),
            );
        }
    }
    Ok(())
}

/// The clock on the wall, and the time that all threads of the process have worked: the second leaves out what other
/// processes take.
struct Clocks {
    wall: Instant,
    process: f64,
}

impl Clocks {
    fn now() -> Self {
        Self {
            wall: Instant::now(),
            process: process_seconds(),
        }
    }

    fn elapsed(&self) -> [f64; 2] {
        [self.wall.elapsed().as_secs_f64(), process_seconds() - self.process]
    }
}

/// Seconds that all threads of the process have worked.
fn process_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one time.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) } != 0;
    if failed {
        return f64::NAN;
    }
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}
