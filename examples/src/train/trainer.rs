//! Training: draw a batch, compute the gradient, take a step.

use flash_attention::Error;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::adam::Adam;
use super::attend::Attend;
use super::gpt::{Config, Gpt};
use super::text::Text;

/// How a model is trained.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Where the model's first weights and the order of the data come from.
    pub seed: u64,
    /// Steps of the whole training, which the learning rate depends on.
    pub steps: usize,
    /// Pieces of text a step.
    pub batch: usize,
    /// The learning rate at its highest.
    pub learning_rate: f32,
}

/// A model in training, with attention of one kind.
///
/// Two trainers with the same settings and texts but different attention begin with the same weights and see the same
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
    /// Steps in which the learning rate rises to its highest.
    const WARMUP: usize = 20;
    /// The part of the highest learning rate that is left at the end.
    const LAST_RATE: f32 = 0.1;

    /// A trainer before its first step. The text is longer than the model's context.
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

    /// One step. The loss before it, in nats a character.
    ///
    /// # Errors
    /// Those of [`Attend`].
    pub fn step(&mut self) -> Result<f64, Error> {
        let batch = self.text.batch(&mut self.rng, self.settings.batch, self.context);
        let (loss, mut gradient) = self.model.loss_and_gradient(&self.attend, &batch)?;
        let learning_rate = self.learning_rate();
        self.adam
            .step(learning_rate, self.model.parameters(), gradient.parameters());
        self.step += 1;
        Ok(loss)
    }

    /// Rises evenly, then falls along half a cosine.
    fn learning_rate(&self) -> f32 {
        let warmup = (self.step + 1) as f32 / Self::WARMUP as f32;
        let progress = (self.step as f32 / self.settings.steps as f32).min(1.0);
        let fall = 0.5 + 0.5 * (std::f32::consts::PI * progress).cos();
        self.settings.learning_rate * warmup.min(1.0) * (Self::LAST_RATE + (1.0 - Self::LAST_RATE) * fall)
    }

    /// Continues the first `given` characters of the text by `count` of the model's own.
    ///
    /// Attention may be another here than in training, for the problems are: one sequence at a time, and many of them.
    ///
    /// # Errors
    /// Those of [`Attend`].
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

    /// How many numbers the model learns.
    pub fn parameter_count(&mut self) -> usize {
        self.model.parameter_count()
    }
}
