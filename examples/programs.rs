//! A gallery of score programs: what each hides, what it costs beside full attention, and how far it is from the oracle.
//!
//! `cargo run --release --example programs` prints, for each, its formula, a picture of its mask, its time, and its error in
//! f32 against attention in f64. Each is one expression over the score and its coordinates; none has a kernel of its own.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use flash_attention::program::{BlockMask, Table};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Error, Tensor};
use flash_attention_examples::{Accuracy, Failure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const HEADS: usize = 4;
const HEAD_DIM: usize = 64;

/// Length of the problem that is compared with the oracle.
const SMALL: usize = 128;

/// Run a gallery of score programs.
#[derive(Parser)]
struct Options {
    /// cpu, cuda, cuda:N, emulator, emulator:sm_80, emulator:sm_90a, or best: a GPU if there is one, else the CPU
    #[arg(long, default_value = "best")]
    device: String,
    /// Length of the sequences that are timed
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(64..))]
    seqlen: u32,
}

/// One program of the gallery.
struct Piece {
    name: &'static str,
    formula: &'static str,
    /// The attention for sequences of a length, its tables on a device.
    make: fn(&Device, usize) -> Result<Attention, Error>,
}

const GALLERY: [Piece; 12] = [
    Piece {
        name: "causal",
        formula: "key <= query",
        make: |_, _| Ok(Attention::new().causal()),
    },
    Piece {
        name: "sliding window",
        formula: "query - 64 <= key <= query",
        make: |_, _| Ok(Attention::new().window(64, 0)),
    },
    Piece {
        name: "ALiBi",
        formula: "score - slope[head] * |query - key|, causal",
        make: |device, _| {
            let slopes: Vec<f32> = (1..=HEADS)
                .map(|head| (-8.0 * head as f32 / HEADS as f32).exp2())
                .collect();
            Ok(Attention::new()
                .causal()
                .alibi(&Tensor::from_slice(device, [HEADS], &slopes)?))
        },
    },
    Piece {
        name: "softcap",
        formula: "30 * tanh(score / 30)",
        make: |_, _| Ok(Attention::new().softcap(30.0)),
    },
    Piece {
        name: "T5's relative bias",
        formula: "score + bias[head, distance within -32 ..= 32]",
        make: |device, _| {
            let bias = normal(HEADS * 65, 7);
            let bias = Table::<f32, 2>::new(&Tensor::from_slice(device, [HEADS, 65], &bias)?)?;
            Ok(Attention::new().score(|s, at| s + bias.at(at.head, at.distance().max(-32).min(32) + 32)))
        },
    },
    Piece {
        name: "documents",
        formula: "document[query] == document[key], causal",
        make: |device, seqlen| {
            let ids: Vec<i32> = (0..seqlen).map(|i| (i * 5 / seqlen) as i32).collect();
            let ids = Tensor::from_slice(device, [1, seqlen], &ids)?;
            Ok(Attention::new().causal().documents(&ids, &ids))
        },
    },
    Piece {
        name: "prefix",
        formula: "key < 48 or key <= query",
        make: |_, _| Ok(Attention::new().prefix(48)),
    },
    Piece {
        name: "chunks",
        formula: "key <= query and key / 96 == query / 96",
        make: |_, _| Ok(Attention::new().chunked(96)),
    },
    Piece {
        name: "dilated window",
        formula: "(query - key) % 4 == 0 and query - 128 <= key <= query",
        make: |_, _| Ok(Attention::new().dilated(4).window(128, 0)),
    },
    Piece {
        name: "neighbourhood of 7 x 7 in an image",
        formula: "|x(query) - x(key)| <= 3 and |y(query) - y(key)| <= 3, rows of 32",
        make: |_, _| {
            Ok(Attention::new().mask(|at| {
                let columns = at.query % 32 - at.key % 32;
                let rows = at.query / 32 - at.key / 32;
                columns.abs().at_most(3) & rows.abs().at_most(3)
            }))
        },
    },
    Piece {
        name: "block-sparse",
        formula: "tiles of 64 x 64 from a list, one in eight and the diagonal",
        make: |device, seqlen| {
            let tiles = seqlen.div_ceil(64);
            let visible: Vec<bool> = (0..tiles * tiles)
                .map(|i| i % tiles == i / tiles || i * 11 % 8 == 0)
                .collect();
            let blocks = BlockMask::from_dense([1, 1], [seqlen, seqlen], [64, 64], &visible)?;
            Attention::new().block_mask(&blocks, device)
        },
    },
    Piece {
        name: "gated by distance",
        formula: "score * (1 + tanh(gate[head] * (query - key) / 64)), causal",
        make: |device, _| {
            let gate = Table::<f32, 1>::new(&Tensor::from_slice(device, [HEADS], &normal(HEADS, 9))?)?;
            Ok(Attention::new()
                .causal()
                .score(|s, at| s * (1.0 + (gate.at(at.head) * (at.distance() / 64.0)).tanh())))
        },
    },
];

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(2)
        }
    }
}

/// Shows all pieces; returns true if each is as near to the oracle as it has to be.
fn run(options: &Options) -> Result<bool, Failure> {
    let device: Device = options.device.parse()?;
    let seqlen = options.seqlen as usize;
    let inputs = tensors(&device, seqlen)?;
    let full = time(&device, &Attention::new(), &inputs)?;
    println!(
        "[1, {HEADS}, {seqlen}, {HEAD_DIM}] f32 on {} ({})",
        device,
        device.name()
    );
    println!("full attention: {:.2} ms", milliseconds(full));
    let mut pass = true;
    for Piece { name, formula, make } in GALLERY {
        println!("\n{name}: {formula}");
        let attention = make(&device, seqlen)?;
        println!("{}", attention.blocks(&inputs[0], &inputs[1])?);
        let own = time(&device, &attention, &inputs)?;
        let ratio = own.as_secs_f64() / full.as_secs_f64();
        println!("time {:.2} ms, {ratio:.2} of full attention", milliseconds(own));
        let accuracy = accuracy(&device, &make(&device, SMALL)?)?;
        println!("out {accuracy}");
        pass &= accuracy.passes();
    }
    Ok(pass)
}

/// Draws q, k and v of normal numbers.
fn tensors(device: &Device, seqlen: usize) -> Result<[Tensor<f32>; 3], Error> {
    let shape = [1, HEADS, seqlen, HEAD_DIM];
    let tensor = |seed| Tensor::from_slice(device, shape, &normal(shape.iter().product(), seed));
    Ok([tensor(1)?, tensor(2)?, tensor(3)?])
}

fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.sample(rand_distr::StandardNormal)).collect()
}

/// Returns the time of the shortest of five calls.
fn time(device: &Device, attention: &Attention, [q, k, v]: &[Tensor<f32>; 3]) -> Result<Duration, Error> {
    let mut shortest = Duration::MAX;
    for _ in 0..5 {
        let begin = Instant::now();
        attention.forward(q, k, v)?;
        device.synchronize()?;
        shortest = shortest.min(begin.elapsed());
    }
    Ok(shortest)
}

fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// Returns the error of a small problem against attention in f64.
fn accuracy(device: &Device, attention: &Attention) -> Result<Accuracy, Error> {
    let inputs = tensors(device, SMALL)?;
    let out = attention.forward(&inputs[0], &inputs[1], &inputs[2])?.out.to_vec()?;
    let [q, k, v] = [inputs[0].to_vec()?, inputs[1].to_vec()?, inputs[2].to_vec()?];
    let shape = [1, HEADS, SMALL, HEAD_DIM];
    let dims = Dims::with_program(attention, shape, shape, attention.evaluator()?);
    let (standard, _) = reference::standard(&dims, &q, &k, &v);
    let [q, k, v] = [q, k, v].map(|tensor| tensor.into_iter().map(f64::from).collect::<Vec<_>>());
    let (exact, _) = reference::forward(&dims, &q, &k, &v);
    let stored: Vec<f32> = exact.iter().map(|&x| x as f32).collect();
    Ok(Accuracy::of(&out, &stored, &standard, &exact))
}
