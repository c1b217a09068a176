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

/// The only set of a task.
fn only(batches: Vec<Batch>) -> Vec<HeldOut> {
    let name = String::new();
    vec![HeldOut { name, batches }]
}

/// Random numbers of a held-out example of a task that makes its examples; no step of training has them.
fn held_out_rng(index: usize) -> StdRng {
    StdRng::seed_from_u64(u64::MAX - index as u64)
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
