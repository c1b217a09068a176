//! Text by SmolLM2-135M-Instruct on candle: several prompts at once over a paged cache, through flash-attention-candle.
//!
//! `cargo xtask fetch smollm2`, in the repository's root, fetches the weights; then
//! `cargo run --release --example generate -- "Why is the sky blue?" "Name three rivers."` answers both at once, a token each a step.
//! `--check` compares logits, tokens and time with candle-transformers' `quantized_llama`. `--random` runs a small model on random
//! weights, which needs no weights and writes no sense.

use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use candle_core::{Error, Result, Tensor};
use candle_transformers::generation::LogitsProcessor;
use clap::Parser;
use flash_attention_candle_models::llama::{Agreement, Batch, Chat, Llama, Reference, dequantized, random};
use flash_attention_candle_models::program;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Answers prompts
#[derive(Parser)]
struct Options {
    /// Messages to the model
    #[arg(default_values = ["What is gravity?", "Write a sentence about the sea.", "Name three rivers of Europe."])]
    prompts: Vec<String>,
    /// GGUF file of a Llama with a tokenizer
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target/fetched/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    model: PathBuf,
    /// A small model on random weights
    #[arg(long)]
    random: bool,
    /// Multiply by the 4-bit weights as the file has them, in a fifth of the memory, instead of f32
    #[arg(long)]
    quantized: bool,
    /// Prompts are texts to be continued, not messages
    #[arg(long)]
    raw: bool,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Randomness of the choice of tokens; 0 takes the likeliest
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of a page of the cache, a multiple of 8
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    page_size: u32,
    /// Tokens of the prompts that are read at once
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Compare with candle-transformers; the temperature must be 0
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    program::exit(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    if options.check && options.temperature != 0.0 {
        candle_core::bail!("--temperature is {}; with --check it must be 0", options.temperature)
    }
    let file = match options.random {
        true => random(GgmlDType::Q4_1, options.seed)?,
        false => {
            std::fs::read(&options.model).map_err(|error| program::not_fetched(&options.model, "smollm2", error))?
        }
    };
    let mut file = Cursor::new(file);
    let mut content = Content::read(&mut file)?;
    if !options.quantized {
        file = Cursor::new(dequantized(&content, &mut file)?);
        content = Content::read(&mut file)?;
    }
    let (model, chat) = (Llama::load(&content, &mut file)?, Chat::of(&content)?);
    let tokens = |text: &String| {
        if options.raw {
            chat.tokens(text)
        } else {
            chat.message(text)
        }
    };
    let prompts = options.prompts.iter().map(tokens).collect::<Result<Vec<_>>>()?;
    let written = write(options, &model, &chat, &prompts)?;
    if options.check {
        compare(Reference::load(content, &mut file)?, &prompts, &written)?;
    }
    Ok(())
}

/// Answers as they were written, and the time that they took.
struct Written {
    tokens: Vec<Vec<u32>>,
    /// Logits that each token was chosen by, with `--check`.
    logits: Vec<Vec<Tensor>>,
    reading: Duration,
    writing: Duration,
}

fn write(options: &Options, model: &Llama, chat: &Chat, prompts: &[Vec<u32>]) -> Result<Written> {
    let most = options.tokens as usize;
    let mut batch = Batch::new(model, prompts, most, options.page_size as usize)?;
    let start = Instant::now();
    let mut ready = read(options, &mut batch)?;
    let reading = start.elapsed();

    let temperature = Some(options.temperature).filter(|&temperature| temperature > 0.0);
    let mut choice = LogitsProcessor::new(options.seed, temperature, None);
    let mut screen = Screen::new(&options.prompts, chat);
    let mut tokens = vec![Vec::new(); prompts.len()];
    let mut logits = vec![Vec::new(); prompts.len()];
    let start = Instant::now();
    while !ready.is_empty() {
        for (sequence, its_logits) in ready {
            let token = choice.sample(&its_logits)?;
            tokens[sequence].push(token);
            if options.check {
                logits[sequence].push(its_logits);
            }
            if token == chat.end() || tokens[sequence].len() == most {
                batch.end(sequence);
                screen.end(sequence, &tokens[sequence])?;
            } else {
                batch.push(sequence, token);
                screen.show(sequence, &tokens[sequence])?;
            }
        }
        ready = batch.read(usize::MAX)?;
    }
    let writing = start.elapsed();
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64();
    let (read, written) = (prompts.iter().map(Vec::len).sum(), tokens.iter().map(Vec::len).sum());
    println!("read    {read:5} tokens, {:7.1} a second", rate(read, reading));
    println!("written {written:5} tokens, {:7.1} a second", rate(written, writing));
    Ok(Written {
        tokens,
        logits,
        reading,
        writing,
    })
}

/// Reads the prompts in chunks, with a line of progress, and returns the logits after each.
fn read(options: &Options, batch: &mut Batch<'_>) -> Result<Vec<(usize, Tensor)>> {
    let style = "reading {bar:30} {pos} of {len} tokens, {per_sec}";
    let style = ProgressStyle::with_template(style).map_err(Error::wrap)?;
    let bar = ProgressBar::new(batch.unread() as u64).with_style(style);
    let mut ready = Vec::new();
    while batch.unread() > 0 {
        let before = batch.unread();
        ready.extend(batch.read(options.chunk as usize)?);
        bar.inc((before - batch.unread()) as u64);
    }
    bar.finish_and_clear();
    Ok(ready)
}

/// The answers on the terminal while they grow: the end of each on a line of its own, and the whole of it once it has ended. A single
/// answer is printed token by token instead.
struct Screen<'a> {
    prompts: &'a [String],
    chat: &'a Chat,
    lines: MultiProgress,
    growing: Vec<ProgressBar>,
    /// Bytes of a single answer that are printed.
    printed: usize,
}

impl<'a> Screen<'a> {
    fn new(prompts: &'a [String], chat: &'a Chat) -> Self {
        let lines = MultiProgress::new();
        let line = |prompt: &String| {
            let line = ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner());
            lines.add(line).with_message(prompt.clone())
        };
        let growing = match prompts {
            [prompt] => {
                println!("> {prompt}");
                Vec::new()
            }
            _ => prompts.iter().map(line).collect(),
        };
        Self {
            prompts,
            chat,
            lines,
            growing,
            printed: 0,
        }
    }

    fn text(&self, tokens: &[u32]) -> Result<String> {
        self.chat.tokenizer().decode(tokens, true).map_err(Error::msg)
    }

    /// Shows an answer that goes on.
    fn show(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        let text = self.text(tokens)?;
        match self.growing.get(sequence) {
            Some(line) => {
                let shown: Vec<char> = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                let end = shown[shown.len().saturating_sub(70)..].iter().collect::<String>();
                line.set_message(end);
                line.tick();
                Ok(())
            }
            // A character may consist of several tokens.
            None if text.ends_with('\u{fffd}') => Ok(()),
            None => self.print(&text),
        }
    }

    /// Prints an answer that has ended.
    fn end(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        let text = self.text(tokens)?;
        match self.growing.get(sequence) {
            Some(line) => {
                line.finish_and_clear();
                let prompt = &self.prompts[sequence];
                self.lines.suspend(|| println!("> {prompt}\n{}\n", text.trim()));
            }
            None => {
                self.print(&text)?;
                println!("\n");
            }
        }
        Ok(())
    }

    fn print(&mut self, text: &str) -> Result<()> {
        print!("{}", &text[self.printed..]);
        self.printed = text.len();
        Ok(std::io::stdout().flush()?)
    }
}

/// Runs candle-transformers over the same tokens, and fails unless it chooses the same ones.
fn compare(mut reference: Reference, prompts: &[Vec<u32>], written: &Written) -> Result<()> {
    let mut agreement = Agreement::default();
    let (mut reading, mut writing) = (Duration::ZERO, Duration::ZERO);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = &written.tokens[index];
        let start = Instant::now();
        let first = reference.read(prompt)?;
        reading += start.elapsed();
        let start = Instant::now();
        let expected = [vec![first], reference.follow(prompt.len(), tokens)?].concat();
        writing += start.elapsed();
        agreement.add(tokens, &written.logits[index], &expected)?;
    }
    let Agreement {
        tokens,
        same,
        difference,
        largest,
    } = agreement;
    println!(
        "candle-transformers: {same} of {tokens} tokens are the same; logits of up to {largest:.1} differ by {difference:.1e} at most"
    );
    let ratio = |theirs: Duration, ours: Duration| theirs.as_secs_f64() / ours.as_secs_f64();
    println!(
        "its time is {:.2} times ours for reading and {:.2} times ours for writing",
        ratio(reading, written.reading),
        ratio(writing, written.writing)
    );
    if same < tokens {
        candle_core::bail!("{} tokens differ", tokens - same)
    }
    Ok(())
}
