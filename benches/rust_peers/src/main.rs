//! Measures the attention of another Rust library on the CPU, for a program that alternates its runs with others.
//!
//! `rust_peers candle | candle-flash | burn` reads and answers the lines of `cpu_times` in the package `benches`. If
//! the library has no such pass, or it would need too much memory, the answer is `{"error": …}`.

mod burn_peer;
mod candle_peer;

use std::io::{BufRead as _, Write as _, stdin, stdout};
use std::time::Duration;

type Failure = Box<dyn std::error::Error>;

/// A shape to measure, like that of `benches`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Element type: f32, f16 or bf16.
    pub dtype: String,
    pub causal: bool,
    pub batch: usize,
    pub heads: usize,
    pub seqlen_q: usize,
    pub seqlen_k: usize,
    pub head_dim: usize,
    /// True for forward and backward, false for forward alone.
    pub backward: bool,
}

impl Shape {
    /// Returns the FLOPs as the field counts them.
    fn flops(&self) -> f64 {
        let pairs = self.batch as f64 * self.heads as f64 * self.seqlen_q as f64 * self.seqlen_k as f64;
        let forward = 4.0 * pairs * self.head_dim as f64 / if self.causal { 2.0 } else { 1.0 };
        forward * if self.backward { 3.5 } else { 1.0 }
    }

    /// Returns the bytes of an f32 matrix of all scores.
    pub fn score_bytes(&self) -> usize {
        4 * self.batch * self.heads * self.seqlen_q * self.seqlen_k
    }

    /// Draws `count` pseudo-random numbers in -1 .. 1.
    pub fn draw(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f32 / (1_u64 << 52) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }
}

/// A problem of one shape that can be solved repeatedly.
pub trait Peer {
    /// Solves the problem once and returns the time.
    fn run(&mut self) -> Result<Duration, Failure>;
}

/// Largest matrix of scores that is tried, in bytes.
const MOST_SCORES: usize = 1 << 30;

fn main() -> Result<(), Failure> {
    let library = std::env::args().nth(1).unwrap_or_default();
    let mut current: Option<(Shape, Box<dyn Peer>)> = None;
    for line in stdin().lock().lines() {
        let line = line?;
        let (shape, runs) = parse(&line)?;
        if current.as_ref().is_none_or(|(measured, _)| *measured != shape) {
            drop(current.take()); // before there are two problems
            match peer(&library, &shape) {
                Ok(peer) => current = Some((shape.clone(), peer)),
                Err(error) => {
                    println!(r#"{{"error": "{error}"}}"#);
                    stdout().flush()?;
                    continue;
                }
            }
        }
        let Some((_, peer)) = &mut current else { continue };
        let mut seconds = Vec::new();
        for _ in 0..runs {
            seconds.push(format!("{:.9}", peer.run()?.as_secs_f64()));
        }
        let (flops, seconds) = (shape.flops(), seconds.join(", "));
        println!(r#"{{"device": "{library}", "flops": {flops}, "seconds": [{seconds}]}}"#);
        stdout().flush()?;
    }
    Ok(())
}

/// Parses a line such as `f32 full 1 12 512 512 64 forward 5`.
fn parse(line: &str) -> Result<(Shape, usize), Failure> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [dtype, mask, batch, heads, seqlen_q, seqlen_k, head_dim, pass, runs] = words[..] else {
        return Err(format!("nine words are needed: {line}").into());
    };
    let shape = Shape {
        dtype: dtype.to_owned(),
        causal: mask == "causal",
        batch: batch.parse()?,
        heads: heads.parse()?,
        seqlen_q: seqlen_q.parse()?,
        seqlen_k: seqlen_k.parse()?,
        head_dim: head_dim.parse()?,
        backward: pass == "both",
    };
    Ok((shape, runs.parse()?))
}

fn peer(library: &str, shape: &Shape) -> Result<Box<dyn Peer>, Failure> {
    let whole_matrix = library == "candle" || shape.backward;
    if whole_matrix && shape.score_bytes() > MOST_SCORES {
        return Err("the scores would take more than 1 GiB".into());
    }
    Ok(match library {
        "candle" => Box::new(candle_peer::Standard::new(shape)?),
        "candle-flash" => Box::new(candle_peer::Flash::new(shape)?),
        "burn" => Box::new(burn_peer::Burn::new(shape)?),
        _ => return Err("candle, candle-flash or burn".into()),
    })
}
