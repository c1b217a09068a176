//! Peak memory and time of forward and backward of one transformer layer as sequences grow, by this library and by plain attention.
//!
//! `cargo run --release --example train_memory` measures 4096, 16384 and 65536 tokens; plain attention only while its scores stay below
//! 4 GiB.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Result, Var};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use flash_attention_candle_models::attention::{Attention, By, Pattern, plain_scores};
use flash_attention_candle_models::memory::{self, Counting};
use flash_attention_candle_models::program;
use flash_attention_candle_models::transformer::Block;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Measures one layer at growing lengths.
#[derive(Debug, Parser)]
struct Options {
    /// Tokens of the sequences
    #[arg(long, default_values_t = [4096, 16384, 65536], value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Heads of 64 elements a token
    #[arg(long, default_value_t = 1)]
    heads: usize,
    /// File of the table
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/train_memory.md"))]
    output: PathBuf,
}

/// Most bytes of scores that plain attention may keep for the backward pass.
const MOST_SCORES: usize = 4 << 30;

fn main() -> ExitCode {
    program::exit(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let width = 64 * options.heads;
    let mut table = format!(
        "One causal layer of width {width}, {} heads of 64, f32, forward and backward.\n\n\
         | tokens | ours, MiB | ours, bytes a token | ours, s | plain, MiB | plain, s |\n| --- | --- | --- | --- | --- | --- |\n",
        options.heads
    );
    print!("{table}");
    for &tokens in &options.tokens {
        let (bytes, seconds) = measure(By::Ours, tokens, options.heads)?;
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let scores = plain_scores(1, options.heads, tokens);
        let plain = if scores > MOST_SCORES {
            format!("not run: scores alone have {:.0} | -", mib(scores))
        } else {
            let (bytes, seconds) = measure(By::Plain, tokens, options.heads)?;
            format!("{:.0} | {seconds:.2}", mib(bytes))
        };
        let row = format!(
            "| {tokens} | {:.0} | {:.0} | {seconds:.2} | {plain} |\n",
            mib(bytes),
            bytes as f64 / tokens as f64
        );
        print!("{row}");
        table.push_str(&row);
    }
    Ok(std::fs::write(&options.output, table)?)
}

/// Bytes that both passes need beside input and weights, at most, and the seconds that they take.
fn measure(by: By, tokens: usize, heads: usize) -> Result<(usize, f64)> {
    let (width, device) = (64 * heads, Device::Cpu);
    let weights = VarMap::new();
    let block = Block::new(width, &VarBuilder::from_varmap(&weights, DType::F32, &device))?;
    let attention = Attention::new(by, Pattern::Causal, tokens, &device)?;
    let x = Var::randn(0f32, 1.0, (1, tokens, width), &device)?;
    let before = memory::in_use();
    memory::reset_peak();
    let start = Instant::now();
    let gradients = block.forward(&x, heads, &attention)?.sqr()?.mean_all()?.backward()?;
    let seconds = start.elapsed().as_secs_f64();
    match gradients.get(&x) {
        Some(_) => Ok((memory::peak().saturating_sub(before), seconds)),
        None => candle_core::bail!("the layer has no gradient of its input"),
    }
}
