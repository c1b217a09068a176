//! Trains a GPT on a text with flash-attention-candle and, from the same seed and on the same data, with plain attention, and compares
//! losses, tokens a second and memory.
//!
//! `cargo xtask fetch shakespeare`, in the repository's root, fetches the text; then `cargo run --release --example train_gpt`. Each
//! step trains both models, so both times come from one run. Ctrl-C, and the end, leave checkpoints, from which the next run goes on.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor, Var};
use clap::{Parser, ValueEnum};
use flash_attention_candle::flash_attn;
use flash_attention_candle_models::adam::AdamW;
use flash_attention_candle_models::gpt::{Attention, Config, Gpt, plain};
use flash_attention_candle_models::memory::{self, Counting};
use flash_attention_candle_models::text::Text;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Trains a GPT with both attentions and compares.
#[derive(Debug, Parser)]
struct Options {
    /// Text to learn: a file, or a folder of .txt files
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/shakespeare"))]
    text: PathBuf,
    /// Which models are trained
    #[arg(long, default_value = "both")]
    attention: Trained,
    /// Steps in all, those of the checkpoint included
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Sequences a step
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens a sequence
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Layers
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Heads; width is 64 for each
    #[arg(long, default_value_t = 6)]
    heads: usize,
    /// Learning rate after its first 20 steps, from which it falls to a tenth along a cosine
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Where weights and data come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder of checkpoints, losses.csv, losses.svg and training.md
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/train_gpt"))]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Trained {
    Ours,
    Plain,
    Both,
}

/// One of the two models in training.
struct Contestant {
    name: &'static str,
    attention: Attention,
    model: Gpt,
    optimizer: AdamW,
    losses: Vec<f32>,
    /// Time of each of this run's steps.
    times: Vec<Duration>,
    peak: usize,
}

/// Steps over which the learning rate rises.
const WARMUP: usize = 20;
/// A line is printed at every step that is a multiple of this.
const LINE_EVERY: usize = 10;
/// Held-out sequences that the last loss is the mean of.
const HELD_OUT: usize = 8;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let text = Text::read(&options.text, options.context).map_err(|error| {
        candle_core::Error::Msg(format!(
            "{}: {error}; `cargo xtask fetch shakespeare` fetches a text",
            options.text.display()
        ))
    })?;
    std::fs::create_dir_all(&options.output)?;
    let stopped = Arc::new(AtomicBool::new(false));
    let stop = stopped.clone();
    ctrlc::set_handler(move || stop.store(true, Ordering::Relaxed)).map_err(candle_core::Error::wrap)?;

    let mut contestants = Vec::new();
    for (name, attention) in [("ours", Attention::Ours), ("plain", Attention::Plain)] {
        let skipped = if attention == Attention::Ours {
            Trained::Plain
        } else {
            Trained::Ours
        };
        if options.attention != skipped {
            contestants.push(Contestant::new(name, attention, options)?);
        }
    }
    let first = contestants
        .iter()
        .map(|contestant| contestant.losses.len())
        .min()
        .unwrap_or_default();
    let progress = ProgressBar::new(options.steps as u64).with_position(first as u64);
    progress.set_style(
        ProgressStyle::with_template("{bar:30} step {pos} of {len}, {eta} to go; {msg}")
            .map_err(candle_core::Error::wrap)?,
    );
    for step in first..options.steps {
        if stopped.load(Ordering::Relaxed) {
            break;
        }
        // A step's windows depend on seed and step alone, so a run that resumes sees the data it would have seen.
        let mut rng = StdRng::seed_from_u64(options.seed << 32 | step as u64);
        let tokens = text.draw(&mut rng, options.batch.into(), options.context)?;
        let behind = contestants
            .iter_mut()
            .filter(|contestant| contestant.losses.len() == step);
        behind
            .into_iter()
            .try_for_each(|contestant| contestant.step(&tokens, options))?;
        let line = line(step, &contestants, options)?;
        progress.set_message(line.clone());
        progress.inc(1);
        if step % LINE_EVERY == 0 {
            progress.suspend(|| println!("{line}"));
        }
    }
    progress.finish_and_clear();
    for contestant in &contestants {
        contestant.save(options)?;
    }
    report(&contestants, &text, options)
}

impl Contestant {
    /// A model at the state of its checkpoint, if there is one.
    fn new(name: &'static str, attention: Attention, options: &Options) -> Result<Self> {
        let config = Config {
            layers: options.layers,
            heads: options.heads,
            width: 64 * options.heads,
            context: options.context,
        };
        let (model, variables) = Gpt::new(&config, attention, options.seed)?;
        let mut optimizer = AdamW::new(variables)?;
        let mut losses = Vec::new();
        let checkpoint = checkpoint(name, options);
        if checkpoint.exists() {
            let state = candle_core::safetensors::load(&checkpoint, &Device::Cpu)?;
            optimizer.restore(&state)?;
            losses = state.get("losses").map_or(Ok(Vec::new()), Tensor::to_vec1)?;
            println!(
                "{name}: goes on from {} after {} steps",
                checkpoint.display(),
                losses.len()
            );
        }
        Ok(Self {
            name,
            attention,
            model,
            optimizer,
            losses,
            times: Vec::new(),
            peak: 0,
        })
    }

    fn step(&mut self, tokens: &Tensor, options: &Options) -> Result<()> {
        let before = memory::in_use();
        memory::reset_peak();
        let start = Instant::now();
        let loss = self.model.loss(tokens)?;
        let gradients = loss.backward()?;
        self.optimizer
            .step(&gradients, learning_rate(self.losses.len(), options))?;
        self.times.push(start.elapsed());
        self.peak = self.peak.max(memory::peak() - before);
        self.losses.push(loss.to_scalar()?);
        Ok(())
    }

    fn save(&self, options: &Options) -> Result<()> {
        let mut state = self.optimizer.state()?;
        state.insert("losses".to_owned(), Tensor::new(self.losses.as_slice(), &Device::Cpu)?);
        let (path, partial) = (checkpoint(self.name, options), checkpoint("partial", options));
        candle_core::safetensors::save(&state, &partial)?;
        Ok(std::fs::rename(partial, path)?)
    }

    /// Tokens a second, by the median step.
    fn speed(&self, options: &Options) -> f64 {
        let mut times = self.times.clone();
        times.sort();
        let median = times.get(times.len() / 2).map_or(f64::NAN, Duration::as_secs_f64);
        (usize::from(options.batch) * options.context) as f64 / median
    }

    /// Seconds that attention takes of a step, forward and backward of all layers, measured alone: the fastest of three.
    fn attention_seconds(&self, options: &Options) -> Result<f64> {
        let shape = (usize::from(options.batch), options.context, options.heads, 64);
        let variable = || Var::randn(0f32, 1.0, shape, &Device::Cpu);
        let (q, k, v) = (variable()?, variable()?, variable()?);
        let mut fastest = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            let out = match self.attention {
                Attention::Ours => flash_attn(&q, &k, &v, 0.125, true)?,
                Attention::Plain => plain(&q, &k, &v)?,
            };
            out.sum_all()?.backward()?;
            fastest = start.elapsed().as_secs_f64().min(fastest);
        }
        Ok(fastest * options.layers as f64)
    }
}

fn checkpoint(name: &str, options: &Options) -> PathBuf {
    options.output.join(format!("{name}.safetensors"))
}

fn learning_rate(step: usize, options: &Options) -> f64 {
    if step < WARMUP {
        return options.learning_rate * (step + 1) as f64 / WARMUP as f64;
    }
    let done = (step - WARMUP) as f64 / (options.steps - WARMUP).max(1) as f64;
    options.learning_rate * (0.55 + 0.45 * (std::f64::consts::PI * done).cos())
}

fn line(step: usize, contestants: &[Contestant], options: &Options) -> Result<String> {
    let mut line = format!("step {step:4}");
    for contestant in contestants {
        let loss = contestant.losses.get(step).copied().unwrap_or(f32::NAN);
        write!(
            line,
            "  {} {loss:.4} at {:.0} tokens/s",
            contestant.name,
            contestant.speed(options)
        )
        .map_err(candle_core::Error::wrap)?;
    }
    Ok(line)
}

/// Prints and writes what was measured: a table in Markdown, losses as numbers and as a plot.
fn report(contestants: &[Contestant], text: &Text, options: &Options) -> Result<()> {
    let mut table = format!(
        "{} layers, width {}, context {}, batch {}, {} bytes of text, seed {}\n\n\
         | attention | steps | last loss | held-out loss | tokens a second | attention's share of a step | peak memory of a step, MiB |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
        options.layers,
        64 * options.heads,
        options.context,
        options.batch,
        text.len(),
        options.seed
    );
    let held_out = text.held_out(HELD_OUT, options.context)?;
    for contestant in contestants {
        let mut loss = 0.0;
        for at in 0..HELD_OUT {
            loss += contestant.model.loss(&held_out.narrow(0, at, 1)?)?.to_scalar::<f32>()? / HELD_OUT as f32;
        }
        let speed = contestant.speed(options);
        let step = (usize::from(options.batch) * options.context) as f64 / speed;
        let row = format!(
            "| {} | {} | {:.4} | {loss:.4} | {speed:.0} | {:.0} % | {:.0} |\n",
            contestant.name,
            contestant.losses.len(),
            contestant.losses.last().copied().unwrap_or(f32::NAN),
            100.0 * contestant.attention_seconds(options)? / step,
            contestant.peak as f64 / f64::from(1 << 20),
        );
        table.push_str(&row);
    }
    if let [ours, plain] = contestants {
        let apart = ours
            .losses
            .iter()
            .zip(&plain.losses)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        let faster = ours.speed(options) / plain.speed(options);
        let smaller = plain.peak as f64 / ours.peak.max(1) as f64;
        let ratios = format!(
            "\nOurs trains {faster:.2} times as fast in a {smaller:.1}th of the memory; losses of a step are {apart:.4} apart at most.\n"
        );
        table.push_str(&ratios);
    }
    print!("{table}");
    std::fs::write(options.output.join("training.md"), &table)?;
    let steps = contestants
        .iter()
        .map(|contestant| contestant.losses.len())
        .max()
        .unwrap_or_default();
    let mut csv = String::from("step");
    contestants
        .iter()
        .for_each(|contestant| csv.extend([",", contestant.name]));
    for step in 0..steps {
        csv.push_str(&format!("\n{step}"));
        for contestant in contestants {
            csv.push_str(
                &contestant
                    .losses
                    .get(step)
                    .map_or(",".to_owned(), |loss| format!(",{loss}")),
            );
        }
    }
    std::fs::write(options.output.join("losses.csv"), csv + "\n")?;
    plot(contestants, options).map_err(|error| candle_core::Error::Msg(error.to_string()))
}

fn plot(contestants: &[Contestant], options: &Options) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let path = options.output.join("losses.svg");
    let root = SVGBackend::new(&path, (720, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let losses = || contestants.iter().flat_map(|contestant| &contestant.losses);
    let most = losses().fold(0.0_f32, |most, &loss| most.max(loss));
    let least = losses().fold(f32::INFINITY, |least, &loss| least.min(loss)).min(most);
    let steps = contestants
        .iter()
        .map(|contestant| contestant.losses.len())
        .max()
        .unwrap_or_default();
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(0..steps.max(1), 0.9 * least..most)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss, nats a byte")
        .disable_mesh()
        .draw()?;
    for (contestant, (colour, width)) in contestants.iter().zip([(&BLUE, 3), (&RED, 1)]) {
        let points = contestant.losses.iter().copied().enumerate();
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(width)))?
            .label(contestant.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(width)));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    root.present()?;
    Ok(())
}
