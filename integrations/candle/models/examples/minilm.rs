//! Sentence embeddings by all-MiniLM-L6-v2 on candle: real sentences as a ragged batch through flash-attention-candle, beside the same
//! sentences padded, through plain attention.
//!
//! `cargo xtask fetch minilm`, in the repository's root, fetches the weights; then
//! `cargo run --release --example minilm` compares the embeddings of both and the time they take. `--random` runs a small model on
//! random weights instead, which needs no weights.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use flash_attention_candle_models::bert::{Bert, Config};
use flash_attention_candle_models::program;
use tokenizers::Tokenizer;

/// Embeds the sentences of a text, ragged and padded, and compares.
#[derive(Debug, Parser)]
struct Options {
    /// Folder with config.json, model.safetensors and tokenizer.json
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/minilm"))]
    model: PathBuf,
    /// A small model on random weights, over words that are drawn
    #[arg(long)]
    random: bool,
    /// Text whose sentences are embedded
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../examples/data/gettysburg.txt"))]
    text: PathBuf,
    /// Sentences of a batch
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Times that each way is run; the fastest counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

fn main() -> ExitCode {
    program::exit(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let (model, sentences) = if options.random {
        random()?
    } else {
        pretrained(options)?
    };
    let tokens: usize = sentences.iter().map(Vec::len).sum();
    let batches: Vec<&[Vec<u32>]> = sentences.chunks(options.batch.into()).collect();
    let padded_len = |batch: &&[Vec<u32>]| batch.len() * batch.iter().map(Vec::len).max().unwrap_or_default();
    let with_padding: usize = batches.iter().map(padded_len).sum();
    println!(
        "{} sentences, {tokens} tokens, {with_padding} with padding",
        sentences.len()
    );
    let each = |embed: &dyn Fn(&[Vec<u32>]) -> Result<Tensor>| {
        Tensor::cat(
            &batches.iter().map(|batch| embed(batch)).collect::<Result<Vec<_>>>()?,
            0,
        )
    };

    let (mut ragged_time, mut padded_time) = (Duration::MAX, Duration::MAX);
    let (mut ragged, mut padded) = (None, None);
    for _ in 0..options.repeats {
        ragged = Some(timed(&mut ragged_time, || each(&|batch| model.embed_ragged(batch)))?);
        padded = Some(timed(&mut padded_time, || each(&|batch| model.embed_padded(batch)))?);
    }
    let (Some(ragged), Some(padded)) = (ragged, padded) else {
        unreachable!("--repeats is 1 at least")
    };
    let cosines = (&ragged * &padded)?.sum(1)?.to_vec1::<f32>()?;
    let least = cosines.into_iter().fold(1.0_f32, f32::min);
    let rate = |time: Duration| sentences.len() as f64 / time.as_secs_f64();
    println!(
        "ragged, flash-attention-candle: {:8.1} sentences a second",
        rate(ragged_time)
    );
    println!(
        "padded, plain attention:        {:8.1} sentences a second",
        rate(padded_time)
    );
    println!(
        "ratio {:.2}; cosine of the embeddings {least:.7} at least",
        rate(ragged_time) / rate(padded_time)
    );
    if !options.random {
        nearest(&ragged, options)?;
    }
    if least < 0.99999 {
        candle_core::bail!("the embeddings differ: cosine {least}")
    }
    Ok(())
}

fn timed(least: &mut Duration, run: impl Fn() -> Result<Tensor>) -> Result<Tensor> {
    let start = Instant::now();
    let result = run();
    *least = start.elapsed().min(*least);
    result
}

/// The sentences of a text, each up to its full stop.
fn split(text: &str) -> Vec<&str> {
    text.split_inclusive(['.', '?', '!'])
        .map(str::trim)
        .filter(|sentence| sentence.contains(char::is_alphabetic))
        .collect()
}

fn pretrained(options: &Options) -> Result<(Bert, Vec<Vec<u32>>)> {
    let file = |name: &str| options.model.join(name);
    let config =
        std::fs::read(file("config.json")).map_err(|error| program::not_fetched(&options.model, "minilm", error))?;
    let config: Config = serde_json::from_slice(&config).map_err(Error::wrap)?;
    let mut tokenizer = Tokenizer::from_file(file("tokenizer.json")).map_err(Error::msg)?;
    tokenizer.with_padding(None);
    let weights = candle_core::safetensors::load(file("model.safetensors"), &Device::Cpu)?;
    let model = Bert::load(&config, &VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))?;
    let text = std::fs::read_to_string(&options.text)?;
    let sentences = split(&text)
        .into_iter()
        .map(|sentence| Ok(tokenizer.encode(sentence, true).map_err(Error::msg)?.get_ids().to_vec()))
        .collect::<Result<_>>()?;
    Ok((model, sentences))
}

fn random() -> Result<(Bert, Vec<Vec<u32>>)> {
    let config = Config {
        vocab_size: 50,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 128,
        max_position_embeddings: 64,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
    };
    let weights = VarMap::new();
    let model = Bert::load(&config, &VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu))?;
    let sentences = [7, 1, 33, 64, 12].map(|len: u32| (0..len).map(|at| (at * 17 + len) % 50).collect());
    Ok((model, sentences.to_vec()))
}

/// Prints the two sentences that are most alike.
fn nearest(embeddings: &Tensor, options: &Options) -> Result<()> {
    let text = std::fs::read_to_string(&options.text)?;
    let sentences = split(&text);
    let alike = embeddings.matmul(&embeddings.t()?)?.to_vec2::<f32>()?;
    let pairs = (0..sentences.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
    if let Some((a, b)) = pairs.max_by(|&(a, b), &(c, d)| alike[a][b].total_cmp(&alike[c][d])) {
        println!(
            "most alike ({:.2}):\n  {}\n  {}",
            alike[a][b], sentences[b], sentences[a]
        );
    }
    Ok(())
}
