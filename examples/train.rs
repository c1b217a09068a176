//! Trains a small GPT with this library's attention, and compares it with standard attention.
//!
//! `cargo run --release --example train` reads the Gettysburg Address, one token per character. In the first steps it
//! trains two models from the same weights on the same data, one with this library's attention and one with standard
//! attention, which stores every score, and compares their losses. Then it continues with the first model until that
//! has learned the text by heart, and prints its recitation. `--help` lists the options.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use flash_attention::Device;
use flash_attention_examples::Failure;
use flash_attention_examples::command_line::{first_paragraph, refuse};
use flash_attention_examples::train::{Config, FlashAttention, PlainAttention, Settings, Text, Trainer};
use indicatif::{ProgressBar, ProgressStyle};

/// Trains a character-level transformer with 4 layers, 4 heads, width 128 and context 128.
#[derive(Debug, Parser)]
#[command(name = "train")]
struct Options {
    /// Number of training steps
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Device of the attention: cpu, cuda, cuda:N, emulator, emulator:sm_80 (slow: give it few steps), or best: a GPU
    /// if there is one, else the CPU
    #[arg(long, default_value = "best")]
    device: String,
    /// Seed of the initial weights, the order of the data and the sample
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Text to learn, in UTF-8, of 129 characters or more [default: the Gettysburg Address]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
}

/// Number of steps in which the losses of both attentions are compared.
///
/// Both attentions round differently, and training amplifies such differences: after enough steps the two models
/// differ, as they would after any change in the order of a sum. Therefore not all steps are compared.
const COMPARED: usize = 40;

/// Largest difference of the two losses of a step, in nats per character.
const TOLERANCE: f64 = 1e-3;

/// Number of steps between printed lines.
const LINE_EVERY: usize = 10;

/// Number of characters of the text that the sample starts with.
const GIVEN: usize = 10;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => error.exit(), // --help
        Err(error) => return refuse(&first_paragraph(&error.to_string())),
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => refuse(&format!("error: {failure}")),
    }
}

/// Runs the program; returns true if both attentions agree.
fn run(options: &Options) -> Result<bool, Failure> {
    const CONTEXT: usize = 128;
    let text = read_text(options, CONTEXT)?;
    let device: Device = options.device.parse()?;
    let config = Config {
        vocabulary: text.vocabulary(),
        context: CONTEXT,
        layers: 4,
        heads: 4,
        head_dim: 32,
    };
    let settings = Settings {
        seed: options.seed,
        steps: options.steps as usize,
        batch: 8,
        learning_rate: 2e-3,
    };
    let mut flash = Trainer::new(settings, config, &text, FlashAttention::new(device.clone()));
    let mut log = Log::new(settings.steps);
    log.line(&format!(
        "text      {} characters, {} different\nmodel     {} parameters, 4 layers, 4 heads, width 128, context 128\nattention on {device} ({})",
        text.tokens().len(),
        text.vocabulary(),
        flash.parameter_count(),
        device.name()
    ))?;

    let compared = COMPARED.min(settings.steps);
    let plain = Trainer::new(settings, config, &text, PlainAttention);
    if !compare(&mut flash, plain, compared, &mut log)? {
        return Ok(false);
    }
    for step in compared + 1..=settings.steps {
        let loss = flash.step()?;
        log.step(step, loss, || format!("step {step:4}   loss {loss:.4}"))?;
    }
    log.finish()?;

    // Short sequences one at a time are work for a CPU, whatever device the training used.
    let reciting = FlashAttention::new(Device::cpu());
    let sample = flash.sample(&reciting, GIVEN, 300, 0.5)?;
    log.line(&format!("\nThe model, given the first {GIVEN} characters:\n\n{sample}"))?;
    Ok(true)
}

/// Trains with both attentions for some steps; returns true if their losses agree in each.
fn compare(
    flash: &mut Trainer<FlashAttention>,
    mut plain: Trainer<PlainAttention>,
    compared: usize,
    log: &mut Log,
) -> Result<bool, Failure> {
    let (mut largest, mut at) = (0.0_f64, 1);
    for step in 1..=compared {
        let [ours, theirs] = [flash.step()?, plain.step()?];
        let difference = (ours - theirs).abs();
        if difference > largest || difference.is_nan() {
            (largest, at) = (difference, step);
        }
        log.step(step, ours, || {
            format!("step {step:4}   loss {ours:.4}   with plain attention {theirs:.4}   difference {difference:.1e}")
        })?;
        if difference.is_nan() {
            break;
        }
    }
    let agree = largest <= TOLERANCE;
    log.line(&format!(
        "check     {}: over {compared} steps the losses are at most {largest:.1e} apart (step {at}), {TOLERANCE:.0e} allowed",
        if agree { "passed" } else { "FAILED" },
    ))?;
    Ok(agree)
}

/// Reads the text that was asked for.
fn read_text(options: &Options, context: usize) -> Result<Text, Failure> {
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/data/gettysburg.txt");
    let path = options.text.clone().unwrap_or_else(|| bundled.into());
    let failure = |error: &dyn std::fmt::Display| Failure(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|error| failure(&error))?;
    Text::new(&text, context).map_err(|error| failure(&error))
}

/// Lines on standard output, and a progress bar below them if standard error is a terminal.
struct Log {
    bar: ProgressBar,
    start: Instant,
}

impl Log {
    fn new(steps: usize) -> Self {
        let style = ProgressStyle::with_template("{bar:40} step {pos} of {len}, {msg}, {eta} left");
        Self {
            bar: ProgressBar::new(steps as u64).with_style(style.expect("the template is well formed")),
            start: Instant::now(),
        }
    }

    fn line(&self, line: &str) -> std::io::Result<()> {
        self.bar.suspend(|| writeln!(std::io::stdout(), "{line}"))
    }

    /// Advances the bar, and prints the lines of some steps.
    fn step(&self, step: usize, loss: f64, line: impl FnOnce() -> String) -> std::io::Result<()> {
        self.bar.set_message(format!("loss {loss:.4}"));
        self.bar.set_position(step as u64);
        if step == 1 || step.is_multiple_of(LINE_EVERY) {
            self.line(&line())?;
        }
        Ok(())
    }

    fn finish(&self) -> std::io::Result<()> {
        self.bar.finish_and_clear();
        self.line(&format!("time      {:.1} s", self.start.elapsed().as_secs_f64()))
    }
}
