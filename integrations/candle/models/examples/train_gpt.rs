//! Trains a transformer on a task with flash-attention-candle and, from the same seed and on the same data, with plain attention, and
//! compares losses, tokens a second and memory.
//!
//! `cargo xtask fetch shakespeare`, in the repository's root, fetches the text of three tasks; then, in this folder,
//! `cargo run --release --example train_gpt -- --task gpt`. Each step trains both models, so both times come from one run. Ctrl-C,
//! each minute and the end leave checkpoints, from which `--resume` goes on.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Error, Result};
use clap::{Parser, ValueEnum};
use flash_attention_candle_models::attention::{By, plain_scores};
use flash_attention_candle_models::memory::Counting;
use flash_attention_candle_models::program;
use flash_attention_candle_models::report::{self, Run, Trained};
use flash_attention_candle_models::tasks::{Genres, HeldOut, Language, ListOps, Paths, Task};
use flash_attention_candle_models::text::Text;
use flash_attention_candle_models::training::{Contestant, Settings, train};
use indicatif::{ProgressBar, ProgressStyle};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Trains a transformer with both attentions and compares.
#[derive(Debug, Parser)]
struct Options {
    /// Tasks to learn, one after the other
    #[arg(long, default_value = "gpt", value_delimiter = ',')]
    task: Vec<TaskName>,
    /// Models that are trained [default: both, and ours alone for path]
    #[arg(long)]
    attention: Option<Attentions>,
    /// Folder of the fetched texts; gpt and bert take a file of your own too
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/shakespeare"))]
    text: PathBuf,
    /// Steps in all, those of the checkpoint included [default: 200, path 600]
    #[arg(long)]
    steps: Option<usize>,
    /// Minutes after which a task stops as Ctrl-C stops it
    #[arg(long)]
    minutes: Option<f64>,
    /// Goes on from the checkpoints of a run with the same options
    #[arg(long)]
    resume: bool,
    /// Sequences a step; path has more where pictures are small [default: gpt and path 1, the others 2]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    batch: Option<u16>,
    /// Tokens a sequence [default: gpt 1024, bert 512, listops 2000, text 4000]
    #[arg(long)]
    context: Option<usize>,
    /// Sides of path's pictures in pixels: half of the steps for the first, half of the others for the second, and so on
    #[arg(long, default_values_t = [8, 16, 32, 64, 128], value_delimiter = ',')]
    sides: Vec<usize>,
    /// Layers [default: gpt and bert 6, listops and text 2, path 3]
    #[arg(long)]
    layers: Option<usize>,
    /// Heads [default: gpt and bert 6, the others 2]
    #[arg(long)]
    heads: Option<usize>,
    /// Elements of a head for each token [default: gpt and bert 64, the others 32]
    #[arg(long)]
    head_dim: Option<usize>,
    /// Learning rate after its first 20 steps, from which it falls to a tenth along a cosine [default: 0.001, path 0.002]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Where weights and data come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// cpu, or cuda with the feature `cuda`
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Held-out sequences that the last loss is the mean of
    #[arg(long, default_value_t = 8)]
    held_out: usize,
    /// Folder of training.md, training.svg and, in a folder for each task, checkpoints and results
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/train_gpt"))]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum TaskName {
    /// Next byte of a text
    Gpt,
    /// Hidden bytes of a text
    Bert,
    /// Value of a nested expression, as in Long Range Arena
    Listops,
    /// Comedy or tragedy, from bytes, as Long Range Arena's text classification
    Text,
    /// A path between two marks of a picture, fed pixel by pixel, as Long Range Arena's Path-X
    Path,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Attentions {
    Ours,
    Plain,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
}

const TASKS: [TaskName; 5] = [
    TaskName::Gpt,
    TaskName::Bert,
    TaskName::Listops,
    TaskName::Text,
    TaskName::Path,
];
/// Lines are at least as long apart.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Checkpoints are at least as long apart.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);
/// Most bytes of scores that plain attention may keep for a backward pass.
const MOST_SCORES: usize = 8 << 30;

fn main() -> ExitCode {
    program::exit(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let interrupt = interrupted.clone();
    ctrlc::set_handler(move || interrupt.store(true, Ordering::Relaxed)).map_err(Error::wrap)?;
    for &task in &options.task {
        if !interrupted.load(Ordering::Relaxed) {
            learn(task, options, &interrupted)?;
        }
    }
    let read = |task: TaskName| std::fs::read(folder(task, options).join("results.json")).ok();
    let trained: Vec<Trained> = TASKS
        .into_iter()
        .filter_map(read)
        .map(|json| serde_json::from_slice(&json))
        .collect::<std::result::Result<_, _>>()
        .map_err(Error::wrap)?;
    let tables = report::tables(&trained);
    print!("{tables}");
    std::fs::write(options.output.join("training.md"), tables)?;
    report::plot(&trained, &options.output.join("training.svg")).map_err(Error::msg)
}

/// Trains on one task and writes its checkpoints and results.
fn learn(name: TaskName, options: &Options, interrupted: &AtomicBool) -> Result<()> {
    let settings = settings(name, options)?;
    let task = task(name, options, &settings)?;
    let folder = folder(name, options);
    std::fs::create_dir_all(&folder)?;
    let mut contestants = contestants(name, task.as_ref(), options, &settings)?;
    let first = contestants.iter().map(|contestant| contestant.losses.len()).min();
    let progress = ProgressBar::new(settings.steps as u64).with_position(first.unwrap_or_default() as u64);
    progress.set_style(
        ProgressStyle::with_template("{bar:30} step {pos} of {len}, {eta} to go; {msg}").map_err(Error::wrap)?,
    );
    let start = Instant::now();
    let limit = options.minutes.map(|minutes| 60.0 * minutes);
    let stop =
        || interrupted.load(Ordering::Relaxed) || limit.is_some_and(|limit| start.elapsed().as_secs_f64() >= limit);
    let (mut printed, mut saved): (Option<Instant>, _) = (None, start);
    train(&mut contestants, task.as_ref(), &settings, stop, |step, contestants| {
        let line = line(name, step, contestants)?;
        progress.set_message(line.clone());
        progress.inc(1);
        if printed.is_none_or(|printed| printed.elapsed() >= LINE_EVERY) {
            progress.suspend(|| println!("{line}"));
            printed = Some(Instant::now());
        }
        if saved.elapsed() >= CHECKPOINT_EVERY {
            contestants.iter().try_for_each(|contestant| contestant.save(&folder))?;
            saved = Instant::now();
        }
        Ok(())
    })?;
    progress.finish_and_clear();
    contestants.iter().try_for_each(|contestant| contestant.save(&folder))?;
    let held_out = task.held_out(options.held_out)?;
    let runs = contestants.iter_mut().map(|contestant| {
        let score = |set: &HeldOut| {
            let score = contestant.score(&set.batches)?;
            Ok((set.name.clone(), score.loss, score.accuracy))
        };
        Ok(Run {
            held_out: held_out.iter().map(score).collect::<Result<_>>()?,
            name: contestant.name().to_owned(),
            losses: contestant.losses.clone(),
            tokens_per_second: contestant.tokens_per_second(),
            attention_share: contestant.attention_share(),
            peak: contestant.peak,
        })
    });
    let trained = Trained {
        task: label(name),
        model: describe(name, options, &settings),
        runs: runs.collect::<Result<_>>()?,
    };
    let json = serde_json::to_vec(&trained).map_err(Error::wrap)?;
    Ok(std::fs::write(folder.join("results.json"), json)?)
}

/// The models, each at the state of its checkpoint where that is asked for.
fn contestants(name: TaskName, task: &dyn Task, options: &Options, settings: &Settings) -> Result<Vec<Contestant>> {
    let chosen = match (options.attention, name) {
        (Some(chosen), _) => chosen,
        (None, TaskName::Path) => Attentions::Ours,
        (None, _) => Attentions::Both,
    };
    let mut contestants = Vec::new();
    for (by, other) in [(By::Ours, Attentions::Plain), (By::Plain, Attentions::Ours)] {
        if chosen == other {
            continue;
        }
        let scores = settings.layers * plain_scores(settings.batch, settings.heads, longest(name, options));
        if by == By::Plain && scores > MOST_SCORES {
            candle_core::bail!(
                "plain attention would keep {:.1} GiB of scores, {} GiB at most are allowed; --attention ours keeps none",
                scores as f64 / f64::from(1 << 30),
                MOST_SCORES >> 30
            )
        }
        let mut contestant = Contestant::new(by, task, settings)?;
        if options.resume {
            contestant.resume(&folder(name, options))?;
            println!("{}: goes on after {} steps", contestant.name(), contestant.losses.len());
        }
        contestants.push(contestant);
    }
    Ok(contestants)
}

fn settings(name: TaskName, options: &Options) -> Result<Settings> {
    let (layers, heads, head_dim, batch) = match name {
        TaskName::Gpt => (6, 6, 64, 1),
        TaskName::Bert => (6, 6, 64, 2),
        TaskName::Listops | TaskName::Text => (2, 2, 32, 2),
        TaskName::Path => (3, 2, 32, 1),
    };
    let (steps, learning_rate) = if name == TaskName::Path {
        (600, 2e-3)
    } else {
        (200, 1e-3)
    };
    Ok(Settings {
        steps: options.steps.unwrap_or(steps),
        batch: options.batch.unwrap_or(batch).into(),
        layers: options.layers.unwrap_or(layers),
        heads: options.heads.unwrap_or(heads),
        head_dim: options.head_dim.unwrap_or(head_dim),
        learning_rate: options.learning_rate.unwrap_or(learning_rate),
        seed: options.seed,
        device: match options.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => Device::new_cuda(0)?,
        },
    })
}

/// Tokens of the longest sequence.
fn longest(name: TaskName, options: &Options) -> usize {
    let context = match name {
        TaskName::Path => return options.sides.iter().map(|side| side * side).max().unwrap_or_default(),
        TaskName::Bert => 512,
        TaskName::Listops => 2000,
        TaskName::Text => 4000,
        TaskName::Gpt => 1024,
    };
    options.context.unwrap_or(context)
}

fn task(name: TaskName, options: &Options, settings: &Settings) -> Result<Box<dyn Task>> {
    let (context, device) = (longest(name, options), &settings.device);
    let not_fetched = |error| program::not_fetched(&options.text, "shakespeare", error);
    let text = || Text::read(&options.text, context).map_err(not_fetched);
    Ok(match name {
        TaskName::Bert => Box::new(Language::masked(text()?, context, device)),
        TaskName::Listops => Box::new(ListOps::new(context, device)?),
        TaskName::Text => Box::new(Genres::read(&options.text, context, device).map_err(not_fetched)?),
        TaskName::Path => {
            let mut first = 0;
            let stages = options.sides.iter().map(|&side| {
                let stage = (first, side);
                first += (settings.steps - first).div_ceil(2);
                stage
            });
            Box::new(Paths::new(stages.collect(), device)?)
        }
        TaskName::Gpt => Box::new(Language::next(text()?, context, device)),
    })
}

fn folder(name: TaskName, options: &Options) -> PathBuf {
    Path::new(&options.output).join(label(name))
}

fn label(name: TaskName) -> String {
    name.to_possible_value()
        .map_or(String::new(), |value| value.get_name().to_owned())
}

fn describe(name: TaskName, options: &Options, settings: &Settings) -> String {
    format!(
        "{} layers, {} heads, width {}, {} tokens, batch {}",
        settings.layers,
        settings.heads,
        settings.heads * settings.head_dim,
        longest(name, options),
        settings.batch
    )
}

fn line(name: TaskName, step: usize, contestants: &[Contestant]) -> Result<String> {
    let mut line = format!("{} step {step:4}", label(name));
    for contestant in contestants {
        let loss = contestant.losses.get(step).copied().unwrap_or(f32::NAN);
        let speed = contestant.tokens_per_second().unwrap_or(f64::NAN);
        write!(line, "  {} {loss:.4} at {speed:.0} tokens/s", contestant.name()).map_err(Error::wrap)?;
    }
    Ok(line)
}
