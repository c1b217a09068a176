//! Measures the CPU device for another program, which may alternate these runs with others.
//!
//! Reads lines `DTYPE MASK BATCH HEADS SEQLEN_Q SEQLEN_K HEAD_DIM PASS RUNS` (`f32 full 1 12 512 512 64 forward 5`),
//! and answers each with a line of JSON: the seconds of every run, and the instructions used. A pass is `forward`, or
//! `both` for forward and backward. The optional argument is the device.
//!
//! A line `peak ISA RUNS` (see [`multiply_adds`]) is answered with the seconds that one thread takes for 10^9
//! operations. A line `read THREADS RUNS` is answered with the seconds for reading 10^9 bytes of memory.

use std::io::{BufRead as _, Write as _, stdin, stdout};

use benches::peak::{multiply_adds, reading};
use benches::{Problem, Shape};
use flash_attention::{Device, Dtype};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let device: Device = std::env::args().nth(1).as_deref().unwrap_or("cpu").parse()?;
    let mut current: Option<(Shape, Box<dyn Problem>)> = None;
    for line in stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["peak" | "read", of, runs] = words[..] {
            limit(words[0], of, runs.parse()?)?;
            continue;
        }
        let [dtype, mask, batch, heads, seqlen_q, seqlen_k, head_dim, pass, runs] = words[..] else {
            return Err(format!("nine words are needed: {line}").into());
        };
        let shape = Shape {
            dtype: match dtype {
                "f32" => Dtype::F32,
                "f16" => Dtype::F16,
                "bf16" => Dtype::Bf16,
                _ => return Err(format!("f32, f16 or bf16: {dtype}").into()),
            },
            causal: mask == "causal",
            batch: batch.parse()?,
            heads: heads.parse()?,
            seqlen_q: seqlen_q.parse()?,
            seqlen_k: seqlen_k.parse()?,
            head_dim: head_dim.parse()?,
        };
        if current.as_ref().is_none_or(|(measured, _)| *measured != shape) {
            drop(current.take()); // before there are two problems
            current = Some((shape, shape.problem(&device)?));
        }
        let Some((_, problem)) = &mut current else { continue };
        let mut seconds = Vec::new();
        for _ in 0..runs.parse()? {
            let mut time = problem.forward()?;
            if pass == "both" {
                time += problem.backward()?;
            }
            seconds.push(format!("{:.9}", time.as_secs_f64()));
        }
        let (name, flops) = (
            device.name(),
            shape.forward_flops() * if pass == "both" { 3.5 } else { 1.0 },
        );
        println!(
            r#"{{"device": "{name}", "flops": {flops}, "seconds": [{}]}}"#,
            seconds.join(", ")
        );
        stdout().flush()?;
    }
    Ok(())
}

/// Answers with a limit of the processor.
fn limit(what: &str, of: &str, runs: usize) -> Result<(), Failure> {
    let rate: Box<dyn Fn() -> Option<f64>> = if what == "peak" {
        Box::new(|| multiply_adds(of))
    } else {
        // Larger than any cache.
        let data: Vec<u64> = (0..32 << 20).collect();
        let threads = of.parse()?;
        Box::new(move || Some(reading(&data, threads)))
    };
    let seconds: Option<Vec<String>> = (0..runs).map(|_| Some(format!("{:.9}", 1e9 / rate()?))).collect();
    match seconds {
        Some(seconds) => println!(r#"{{"seconds": [{}]}}"#, seconds.join(", ")),
        None => println!(r#"{{"error": "no {of}"}}"#),
    }
    stdout().flush()?;
    Ok(())
}
