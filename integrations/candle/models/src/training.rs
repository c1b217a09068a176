//! Training of one task by two attentions side by side, with checkpoints from which it goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor, Var};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::adam::AdamW;
use crate::attention::{Attention, By, Pattern};
use crate::memory;
use crate::tasks::{Batch, Task};
use crate::transformer::{Config, Transformer};

/// Steps over which the learning rate rises.
const WARMUP: usize = 20;
/// Steps from one measurement of attention alone to the next.
const ATTENTION_EVERY: usize = 8;

/// Settings of a training that do not depend on who computes attention.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Steps in all, those of a checkpoint included.
    pub steps: usize,
    /// Sequences a step.
    pub batch: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Heads of each layer.
    pub heads: usize,
    /// Elements of a head for each token.
    pub head_dim: usize,
    /// Highest learning rate: it rises over 20 steps, then falls to a tenth along a cosine.
    pub learning_rate: f64,
    /// Where weights and data come from.
    pub seed: u64,
    /// Device of the model.
    pub device: Device,
}

/// One of the models in training.
#[derive(Debug)]
pub struct Contestant {
    /// Who computes attention.
    pub by: By,
    model: Transformer,
    optimizer: AdamW,
    /// Loss of each step, those before a checkpoint included.
    pub losses: Vec<f32>,
    /// Time of each of this run's steps.
    times: Vec<Duration>,
    /// Tokens of each of this run's steps.
    tokens: usize,
    /// Bytes of the heap that a step needed beside weights and moments, at most.
    pub peak: usize,
    /// Share of attention in some of the steps.
    attention_shares: Vec<f64>,
    /// The attention of the last step, with its pattern and length.
    attention: Option<(Pattern, usize, Attention)>,
}

/// Loss and accuracy on held-out batches.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// Mean loss, in nats.
    pub loss: f64,
    /// Share of the targets that are the most likely class.
    pub accuracy: f64,
}

impl Settings {
    fn learning_rate(&self, step: usize) -> f64 {
        if step < WARMUP {
            return self.learning_rate * (step + 1) as f64 / WARMUP as f64;
        }
        let done = (step - WARMUP) as f64 / (self.steps.saturating_sub(WARMUP)).max(1) as f64;
        self.learning_rate * (0.55 + 0.45 * (std::f64::consts::PI * done.min(1.0)).cos())
    }
}

/// Trains the contestants, each step one after the other on the same batch, until `steps` or until `stop` says so. A contestant that is
/// ahead of the others waits for them. `after` is called after each step with its number.
///
/// # Errors
/// candle's errors, and those of `after`.
pub fn train(
    contestants: &mut [Contestant],
    task: &dyn Task,
    settings: &Settings,
    stop: impl Fn() -> bool,
    mut after: impl FnMut(usize, &[Contestant]) -> Result<()>,
) -> Result<()> {
    let first = contestants.iter().map(|contestant| contestant.losses.len()).min();
    for step in first.unwrap_or_default()..settings.steps {
        if stop() {
            break;
        }
        // A step's data depend on seed and step alone, so a run that resumes sees the data it would have seen.
        let mut rng = StdRng::seed_from_u64(settings.seed << 32 | step as u64);
        let batch = task.draw(&mut rng, step, settings.batch)?;
        for contestant in contestants
            .iter_mut()
            .filter(|contestant| contestant.losses.len() == step)
        {
            contestant.step(&batch, settings)?;
        }
        after(step, contestants)?;
    }
    Ok(())
}

impl Contestant {
    /// A model before its first step.
    ///
    /// # Errors
    /// candle's errors.
    pub fn new(by: By, task: &dyn Task, settings: &Settings) -> Result<Self> {
        let config = Config {
            vocabulary: task.vocabulary(),
            classes: task.classes(),
            layers: settings.layers,
            heads: settings.heads,
            width: settings.heads * settings.head_dim,
            positions: task.positions(),
        };
        let (model, variables) = Transformer::new(&config, settings.seed, &settings.device)?;
        Ok(Self {
            by,
            model,
            optimizer: AdamW::new(variables)?,
            losses: Vec::new(),
            times: Vec::new(),
            tokens: 0,
            peak: 0,
            attention_shares: Vec::new(),
            attention: None,
        })
    }

    /// Name in checkpoints, tables and plots.
    pub fn name(&self) -> &'static str {
        match self.by {
            By::Ours => "ours",
            By::Plain => "plain",
        }
    }

    /// The file of this contestant's checkpoint in a folder.
    pub fn checkpoint(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.safetensors", self.name()))
    }

    /// Goes on from the checkpoint in a folder: weights, moments and losses are those of its last step.
    ///
    /// # Errors
    /// There is none, or it is of another model.
    pub fn resume(&mut self, folder: &Path) -> Result<()> {
        let path = self.checkpoint(folder);
        if !path.exists() {
            candle_core::bail!("{} is not there, so nothing can be resumed", path.display())
        }
        let state = candle_core::safetensors::load(&path, self.optimizer.device())?;
        self.optimizer.restore(&state).map_err(|error| error.with_path(&path))?;
        self.losses = match state.get("losses") {
            Some(losses) => losses.to_vec1()?,
            None => candle_core::bail!("{} has no losses", path.display()),
        };
        Ok(())
    }

    /// Writes the checkpoint; a run that is interrupted meanwhile leaves the one before it.
    ///
    /// # Errors
    /// candle's and the system's errors.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut state = self.optimizer.state()?;
        state.insert("losses".to_owned(), Tensor::new(self.losses.as_slice(), &Device::Cpu)?);
        let partial = folder.join(format!("{}.partial", self.name()));
        candle_core::safetensors::save(&state, &partial)?;
        Ok(std::fs::rename(partial, self.checkpoint(folder))?)
    }

    fn step(&mut self, batch: &Batch, settings: &Settings) -> Result<()> {
        let attention = self.attention(batch)?;
        let before = memory::in_use();
        memory::reset_peak();
        let start = Instant::now();
        let logits = self.model.logits(batch, &attention)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &batch.targets)?;
        let gradients = loss.backward()?;
        let learning_rate = settings.learning_rate(self.losses.len());
        self.optimizer.step(&gradients, learning_rate)?;
        self.losses.push(loss.to_scalar()?);
        settings.device.synchronize()?;
        let time = start.elapsed();
        self.tokens = batch.tokens.elem_count();
        self.peak = self.peak.max(memory::peak().saturating_sub(before));
        if self.times.len().is_multiple_of(ATTENTION_EVERY) {
            self.measure_attention(time, settings)?;
        }
        self.times.push(time);
        Ok(())
    }

    /// The attention of a batch, made anew where pattern or length are others than before.
    fn attention(&mut self, batch: &Batch) -> Result<Attention> {
        let (pattern, len) = (batch.pattern, batch.tokens.dim(1)?);
        match &self.attention {
            Some((of, longest, attention)) if (*of, *longest) == (pattern, len) => Ok(attention.clone()),
            _ => {
                let attention = Attention::new(self.by, pattern, len, batch.tokens.device())?;
                self.attention = Some((pattern, len, attention.clone()));
                Ok(attention)
            }
        }
    }

    /// Seconds of the median step of this run; none if it made no step.
    fn step_seconds(&self) -> Option<f64> {
        let mut times = self.times.clone();
        times.sort();
        times.get(times.len() / 2).map(Duration::as_secs_f64)
    }

    /// Tokens a second, by the median step of this run; none if it made no step.
    pub fn tokens_per_second(&self) -> Option<f64> {
        Some(self.tokens as f64 / self.step_seconds()?)
    }

    /// Share of a step that attention takes, forward and backward of all layers: the median of those measured. None if this run made
    /// no step.
    pub fn attention_share(&self) -> Option<f64> {
        let mut shares = self.attention_shares.clone();
        shares.sort_by(f64::total_cmp);
        shares.get(shares.len() / 2).copied()
    }

    /// Measures the share of a step that attention takes: attention alone, right after the step, so that other work on the machine
    /// slows both.
    fn measure_attention(&mut self, step: Duration, settings: &Settings) -> Result<()> {
        let Some((_, len, attention)) = &self.attention else {
            return Ok(());
        };
        let shape = (self.tokens / len, *len, settings.heads, settings.head_dim);
        let variable = || Var::randn(0f32, 1.0, shape, &settings.device);
        let (q, k, v) = (variable()?, variable()?, variable()?);
        let start = Instant::now();
        attention.forward(&q, &k, &v)?.sum_all()?.backward()?;
        settings.device.synchronize()?;
        let of_layers = start.elapsed() * settings.layers as u32;
        self.attention_shares.push(of_layers.as_secs_f64() / step.as_secs_f64());
        Ok(())
    }

    /// Loss and accuracy on batches.
    ///
    /// # Errors
    /// candle's errors.
    pub fn score(&mut self, batches: &[Batch]) -> Result<Score> {
        let (mut loss, mut right, mut asked) = (0.0, 0.0, 0);
        for batch in batches {
            let attention = self.attention(batch)?;
            let logits = self.model.logits(batch, &attention)?.detach();
            let count = batch.targets.elem_count();
            loss +=
                f64::from(candle_nn::loss::cross_entropy(&logits, &batch.targets)?.to_scalar::<f32>()?) * count as f64;
            let hits = logits.argmax(1)?.eq(&batch.targets)?;
            right += f64::from(hits.to_dtype(candle_core::DType::F32)?.sum_all()?.to_scalar::<f32>()?);
            asked += count;
        }
        let asked = asked.max(1) as f64;
        Ok(Score {
            loss: loss / asked,
            accuracy: right / asked,
        })
    }
}
