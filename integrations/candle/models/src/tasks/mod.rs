//! Tasks that a transformer learns: batches to train on, and batches that are held out.

mod genres;
mod language;
mod listops;
mod paths;

use candle_core::{Device, Result, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::attention::Pattern;

pub use genres::Genres;
pub use language::Language;
pub use listops::ListOps;
pub use paths::{Paths, Picture};

/// Sequences of one length, and what a model should say of them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// u32 `[batch, seqlen]`.
    pub tokens: Tensor,
    /// Tokens at which the model is read, u32 `[read]`, counted through the whole batch; none means all tokens.
    pub read: Option<Tensor>,
    /// The class at each token that is read, u32 `[read]`.
    pub targets: Tensor,
    /// Pairs that see each other.
    pub pattern: Pattern,
}

/// A source of batches.
pub trait Task {
    /// Tokens of the vocabulary.
    fn vocabulary(&self) -> usize;

    /// Classes of the targets; none means that targets are tokens.
    fn classes(&self) -> Option<usize>;

    /// Longest sequence whose tokens have learned positions; 0 for none.
    fn positions(&self) -> usize;

    /// The batch of a step: the same for the same step and the same random numbers.
    ///
    /// # Errors
    /// candle's errors.
    fn draw(&self, rng: &mut StdRng, step: usize, batch: usize) -> Result<Batch>;

    /// Sets of `count` batches of one sequence that training does not see.
    ///
    /// # Errors
    /// candle's errors.
    fn held_out(&self, count: usize) -> Result<Vec<HeldOut>>;
}

/// Batches that training does not see.
#[derive(Clone, Debug)]
pub struct HeldOut {
    /// Name of the set; empty where a task has one.
    pub name: String,
    /// Batches of one sequence.
    pub batches: Vec<Batch>,
}

impl HeldOut {
    /// A set of `count` batches, each from its number and from random numbers that no step of training has.
    fn draw(name: String, count: usize, batch: impl Fn(usize, &mut StdRng) -> Result<Batch>) -> Result<Self> {
        let batches = (0..count).map(|index| batch(index, &mut StdRng::seed_from_u64(u64::MAX - index as u64)));
        Ok(Self {
            name,
            batches: batches.collect::<Result<_>>()?,
        })
    }

    /// [`draw`](Self::draw) for the only set of a task.
    fn only(count: usize, batch: impl Fn(usize, &mut StdRng) -> Result<Batch>) -> Result<Vec<Self>> {
        Ok(vec![Self::draw(String::new(), count, batch)?])
    }
}

/// One class for each sequence, read at its first token.
fn classified(sequences: &[(Vec<u32>, u32)], device: &Device) -> Result<Batch> {
    let len = sequences.first().map_or(0, |(tokens, _)| tokens.len());
    let tokens: Vec<u32> = sequences
        .iter()
        .flat_map(|(tokens, _)| tokens.iter().copied())
        .collect();
    let firsts: Vec<u32> = (0..sequences.len()).map(|sequence| (sequence * len) as u32).collect();
    let classes: Vec<u32> = sequences.iter().map(|&(_, class)| class).collect();
    Ok(Batch {
        tokens: Tensor::from_vec(tokens, (sequences.len(), len), device)?,
        read: Some(Tensor::new(firsts, device)?),
        targets: Tensor::new(classes, device)?,
        pattern: Pattern::Full,
    })
}
