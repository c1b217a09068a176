//! The model: the loss of tokens, all gradients of the loss, and generation of text.

use flash_attention::Error;
use ndarray::{Array2, Axis, Zip, s};
use rand::RngExt;
use rand::rngs::StdRng;

use super::attend::{Attend, Heads};
use super::block::{Block, BlockSaved};
use super::layers::{Embedding, LayerNorm, Linear, Normalized};
use super::text::Batch;

/// Sizes of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of different tokens.
    pub vocabulary: usize,
    /// Largest number of tokens of a sequence.
    pub context: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of attention heads of a block.
    pub heads: usize,
    /// Elements of a head per token; a multiple of 8.
    pub head_dim: usize,
}

impl Config {
    /// Returns the elements of a token between blocks.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn cut(&self, tokens: usize, seqlen: usize) -> Heads {
        Heads {
            batch: tokens / seqlen,
            seqlen,
            heads: self.heads,
            head_dim: self.head_dim,
        }
    }
}

/// A decoder-only transformer.
#[derive(Clone, Debug)]
pub struct Gpt {
    config: Config,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

/// Values that a [`Gpt`] saves for backward.
struct Saved<S> {
    blocks: Vec<BlockSaved<S>>,
    norm: Normalized,
    head_input: Array2<f32>,
}

impl Gpt {
    /// Makes a model with random weights.
    pub fn new(rng: &mut StdRng, config: Config) -> Self {
        Self {
            config,
            embedding: Embedding::new(rng, config.vocabulary, config.context, config.width()),
            blocks: (0..config.layers).map(|_| Block::new(rng, &config)).collect(),
            norm: LayerNorm::new(config.width()),
            head: Linear::new(rng, config.width(), config.vocabulary, 0.02),
        }
    }

    /// Computes, for each token of each sequence, a logit for every possible next token.
    fn forward<A: Attend>(
        &self,
        attend: &A,
        tokens: &[usize],
        seqlen: usize,
    ) -> Result<(Array2<f32>, Saved<A::Saved>), Error> {
        let heads = self.config.cut(tokens.len(), seqlen);
        let mut x = self.embedding.forward(tokens, seqlen);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (next, saved) = block.forward(attend, heads, x)?;
            x = next;
            blocks.push(saved);
        }
        let (head_input, norm) = self.norm.forward(&x);
        let logits = self.head.forward(&head_input);
        let saved = Saved {
            blocks,
            norm,
            head_input,
        };
        Ok((logits, saved))
    }

    /// Returns the mean cross entropy, in nats per token, and its gradient.
    ///
    /// # Errors
    /// The errors of [`Attend`].
    pub fn loss_and_gradient<A: Attend>(&self, attend: &A, batch: &Batch) -> Result<(f64, Self), Error> {
        let heads = self.config.cut(batch.inputs.len(), batch.seqlen);
        let (logits, saved) = self.forward(attend, &batch.inputs, batch.seqlen)?;
        let (loss, dlogits) = cross_entropy(logits, &batch.targets);
        let (dx, head) = self.head.backward(&saved.head_input, &dlogits);
        let (mut dx, norm) = self.norm.backward(&saved.norm, &dx);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, saved) in self.blocks.iter().zip(&saved.blocks).rev() {
            let (before, gradient) = block.backward(attend, heads, saved, dx)?;
            dx = before;
            blocks.push(gradient);
        }
        blocks.reverse();
        let gradient = Self {
            config: self.config,
            embedding: self.embedding.backward(&batch.inputs, batch.seqlen, &dx),
            blocks,
            norm,
            head,
        };
        Ok((loss, gradient))
    }

    /// Continues `tokens` by `count` tokens, each drawn from the model's distribution. A `temperature` below 1
    /// favours likely tokens.
    ///
    /// # Errors
    /// The errors of [`Attend::forward`].
    pub fn generate<A: Attend>(
        &self,
        attend: &A,
        tokens: &mut Vec<usize>,
        count: usize,
        temperature: f32,
        rng: &mut StdRng,
    ) -> Result<(), Error> {
        for _ in 0..count {
            let seen = &tokens[tokens.len().saturating_sub(self.config.context)..];
            let (mut logits, _) = self.forward(attend, seen, seen.len())?;
            logits /= temperature;
            let last = log_softmax(logits.slice_move(s![-1.., ..]));
            let mut left: f32 = rng.random();
            let drawn = last.iter().position(|&log| {
                left -= log.exp();
                left < 0.0
            });
            // Rounding may leave a small probability after the last token.
            tokens.push(drawn.unwrap_or(self.config.vocabulary - 1));
        }
        Ok(())
    }

    /// Returns the number of parameters.
    pub fn parameter_count(&mut self) -> usize {
        self.parameters().iter().map(|tensor| tensor.len()).sum()
    }

    /// Returns all parameters, always in the same order.
    pub fn parameters(&mut self) -> Vec<&mut [f32]> {
        let mut all = self.embedding.parameters();
        all.extend(self.blocks.iter_mut().flat_map(Block::parameters));
        all.extend(self.norm.parameters());
        all.extend(self.head.parameters());
        all
    }
}

/// Returns the mean of `-log softmax(logits)[target]`, summed in f64, and its gradient.
fn cross_entropy(logits: Array2<f32>, targets: &[usize]) -> (f64, Array2<f32>) {
    let mut rows = log_softmax(logits);
    let mut loss = 0.0;
    let count = targets.len() as f32;
    for (mut row, &target) in rows.rows_mut().into_iter().zip(targets) {
        loss -= f64::from(row[target]);
        row.mapv_inplace(|log| log.exp() / count);
        row[target] -= count.recip();
    }
    (loss / f64::from(count), rows)
}

/// Computes the logarithm of each row's softmax.
fn log_softmax(mut rows: Array2<f32>) -> Array2<f32> {
    Zip::from(rows.lanes_mut(Axis(1))).par_for_each(|mut row| {
        let max = row.fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
        row -= max + sum.ln();
    });
    rows
}

#[cfg(test)]
mod tests {
    use super::super::attend::PlainAttention;
    use super::super::finite_differences::check;
    use super::*;
    use rand::SeedableRng;

    const CONFIG: Config = Config {
        vocabulary: 5,
        context: 6,
        layers: 2,
        heads: 2,
        head_dim: 4,
    };

    fn batch() -> Batch {
        Batch {
            inputs: vec![0, 1, 2, 3, 4, 0, 2, 2, 1, 0, 4, 3],
            targets: vec![1, 2, 3, 4, 0, 1, 2, 1, 0, 4, 3, 3],
            seqlen: 6,
        }
    }

    /// Makes weights like those of a trained model, in which every parameter affects the loss.
    fn model() -> Gpt {
        let mut rng = StdRng::seed_from_u64(1);
        let mut model = Gpt::new(&mut rng, CONFIG);
        for parameter in model.parameters().into_iter().flatten() {
            *parameter += rng.random_range(-0.4..0.4);
        }
        model
    }

    #[test]
    fn gradient_of_every_parameter() {
        let (model, batch) = (model(), batch());
        let (_, mut gradient) = model
            .loss_and_gradient(&PlainAttention, &batch)
            .expect("plain attention does not fail");
        let loss = |model: &Gpt| {
            let forward = model.forward(&PlainAttention, &batch.inputs, batch.seqlen);
            cross_entropy(forward.expect("plain attention does not fail").0, &batch.targets).0
        };
        check(model, Gpt::parameters, &mut gradient, loss);
    }

    #[test]
    fn an_untrained_model_expects_nothing() {
        let model = Gpt::new(&mut StdRng::seed_from_u64(2), CONFIG);
        let (loss, _) = model
            .loss_and_gradient(&PlainAttention, &batch())
            .expect("plain attention does not fail");
        assert!((loss - 5.0_f64.ln()).abs() < 0.05, "{loss}");
    }

    #[test]
    fn generated_tokens_follow_the_beginning_and_depend_on_the_seed_only() {
        let model = model();
        let generate = |seed| {
            let mut tokens = vec![1, 2];
            model
                .generate(&PlainAttention, &mut tokens, 30, 1.0, &mut StdRng::seed_from_u64(seed))
                .expect("plain attention does not fail");
            tokens
        };
        let tokens = generate(1);
        assert_eq!((tokens.len(), &tokens[..2]), (32, &[1, 2][..]));
        assert!(tokens.iter().all(|&token| token < CONFIG.vocabulary));
        assert_eq!(tokens, generate(1));
        assert_ne!(tokens, generate(2));
    }
}
