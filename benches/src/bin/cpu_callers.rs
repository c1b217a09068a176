//! Measures how much work the CPU device does for several callers at once, as a server has them, and prints a table.
//!
//!     cargo run --release -p benches --bin cpu_callers -- [SECONDS]
//!
//! Each caller is a thread with tensors of its own, which calls the forward pass again and again. All callers share the device's
//! threads. For each shape one caller and several take turns, five times, for SECONDS each (default 0.5); the table has the
//! medians of their calls in a second.

use std::panic::resume_unwind;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use benches::{Failure, Problem, Shape};
use flash_attention::{Device, Dtype, Error};

/// Numbers of callers to measure.
const CALLERS: [usize; 3] = [1, 2, 4];

/// How often each number of callers is measured.
const TURNS: usize = 5;

/// Head counts, sequence lengths of queries and keys, and head_dim: short calls, a prompt, and one query of each head against a long
/// sequence.
const SHAPES: [[usize; 4]; 5] = [
    [12, 16, 16, 64],
    [12, 64, 64, 64],
    [12, 256, 256, 64],
    [12, 1024, 1024, 64],
    [32, 1, 4096, 128],
];

fn main() -> Result<(), Failure> {
    let seconds = std::env::args().nth(1).map_or(Ok(0.5), |text| text.parse())?;
    let turn = Duration::try_from_secs_f64(seconds)?;
    let device = Device::cpu();
    println!("{}", device.name());
    println!("| dtype | B, H, Nq, Nk, D | one caller, calls/s | two, of one's | four, of one's |");
    println!("| --- | --- | --- | --- | --- |");
    for [heads, seqlen_q, seqlen_k, head_dim] in SHAPES {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let shape = Shape {
                dtype,
                causal: false,
                batch: 1,
                heads,
                seqlen_q,
                seqlen_k,
                head_dim,
            };
            let [one, two, four] = rates(&shape, &device, turn)?;
            println!(
                "| {} | 1, {heads}, {seqlen_q}, {seqlen_k}, {head_dim} | {one:.0} | {:.2} | {:.2} |",
                dtype.name(),
                two / one,
                four / one
            );
        }
    }
    Ok(())
}

/// Returns the median rate of calls of each number of callers.
fn rates(shape: &Shape, device: &Device, turn: Duration) -> Result<[f64; CALLERS.len()], Failure> {
    let mut measured = [[0.0; TURNS]; CALLERS.len()];
    for index in 0..TURNS {
        for (rates, callers) in measured.iter_mut().zip(CALLERS) {
            rates[index] = rate(shape, device, callers, turn)?;
        }
    }
    Ok(measured.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[TURNS / 2]
    }))
}

/// Returns the calls in a second of all callers together.
fn rate(shape: &Shape, device: &Device, callers: usize, turn: Duration) -> Result<f64, Failure> {
    let mut problems = Vec::new();
    for _ in 0..callers {
        let mut problem = shape.problem(device)?;
        problem.forward()?; // the first call of a problem also touches new memory
        problems.push(problem);
    }
    let start = Barrier::new(callers);
    let call = |mut problem: Box<dyn Problem>| {
        start.wait();
        let began = Instant::now();
        let mut calls = 0;
        while began.elapsed() < turn {
            problem.forward()?;
            calls += 1;
        }
        Ok(f64::from(calls) / began.elapsed().as_secs_f64())
    };
    let call = &call;
    let rates: Vec<Result<f64, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = problems
            .into_iter()
            .map(|problem| scope.spawn(move || call(problem)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|rate| rate.unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    Ok(rates.into_iter().sum::<Result<f64, _>>()?)
}
