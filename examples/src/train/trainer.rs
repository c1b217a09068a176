//! Training: draws a batch, computes the gradient, takes a step.

use flash_attention::Error;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::adam::Adam;
use super::attend::Attend;
use super::gpt::{Config, Gpt};
use super::text::Text;

/// Settings of the training.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Seed of the initial weights and of the order of the data.
    pub seed: u64,
    /// Number of steps of the whole training, which determines the learning rate.
    pub steps: usize,
    /// Pieces of text per step.
    pub batch: usize,
    /// Highest learning rate.
    pub learning_rate: f32,
}

/// A model in training, with one kind of attention.
///
/// Two trainers with the same settings and text but different attention start from the same weights and see the same
/// pieces in the same order.
#[derive(Debug)]
pub struct Trainer<'a, A> {
    settings: Settings,
    text: &'a Text,
    context: usize,
    attend: A,
    model: Gpt,
    adam: Adam,
    rng: StdRng,
    step: usize,
}

impl<'a, A: Attend> Trainer<'a, A> {
    /// Number of steps in which the learning rate rises to its highest value.
    const WARMUP: usize = 20;
    /// Learning rate at the end, as a fraction of the highest.
    const LAST_RATE: f32 = 0.1;

    /// Makes a trainer before its first step. The text must be longer than the model's context.
    pub fn new(settings: Settings, config: Config, text: &'a Text, attend: A) -> Self {
        let mut rng = StdRng::seed_from_u64(settings.seed);
        Self {
            settings,
            text,
            context: config.context,
            attend,
            model: Gpt::new(&mut rng, config),
            adam: Adam::default(),
            rng,
            step: 0,
        }
    }

    /// Takes one step; returns the loss before it, in nats per character.
    ///
    /// # Errors
    /// The errors of [`Attend`].
    pub fn step(&mut self) -> Result<f64, Error> {
        let batch = self.text.batch(&mut self.rng, self.settings.batch, self.context);
        let (loss, mut gradient) = self.model.loss_and_gradient(&self.attend, &batch)?;
        let learning_rate = self.learning_rate();
        self.adam
            .step(learning_rate, self.model.parameters(), gradient.parameters());
        self.step += 1;
        Ok(loss)
    }

    /// Rises linearly, then falls along half a cosine.
    fn learning_rate(&self) -> f32 {
        let warmup = (self.step + 1) as f32 / Self::WARMUP as f32;
        let progress = (self.step as f32 / self.settings.steps as f32).min(1.0);
        let fall = 0.5 + 0.5 * (std::f32::consts::PI * progress).cos();
        self.settings.learning_rate * warmup.min(1.0) * (Self::LAST_RATE + (1.0 - Self::LAST_RATE) * fall)
    }

    /// Continues the first `given` characters of the text by `count` characters of the model.
    ///
    /// Generation may use another attention than training: it has one sequence at a time, and many of them.
    ///
    /// # Errors
    /// The errors of [`Attend`].
    pub fn sample(
        &mut self,
        attend: &impl Attend,
        given: usize,
        count: usize,
        temperature: f32,
    ) -> Result<String, Error> {
        let mut tokens = self.text.tokens()[..given.min(self.text.tokens().len())].to_vec();
        self.model
            .generate(attend, &mut tokens, count, temperature, &mut self.rng)?;
        Ok(self.text.decode(&tokens))
    }

    /// Returns the number of parameters.
    pub fn parameter_count(&mut self) -> usize {
        self.model.parameter_count()
    }
}
