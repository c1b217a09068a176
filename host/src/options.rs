//! [`Attention`]: the options of a call. The calls are in `call`.

use std::sync::Arc;

use flash_attention_kernels::entries::Arch;

use crate::error::ProgramError;
use crate::program::{At, Fragment, Parts, Program, Score, Truth, named};

/// Options of `softmax(softmax_scale * q k^T) v`. Cheap to make and to clone.
///
/// Features of scores and masks combine freely. Whatever the order of the calls, a score passes by softmax_scale,
/// [`softcap`](Self::softcap), [`bias`](Self::bias), [`alibi`](Self::alibi), then the closures of
/// [`score`](Self::score) in the order given; a pair is visible if [`causal`](Self::causal) and every mask say so.
/// Positions in formulas: `p = query + seqlen_k - seqlen_q`, the query's place among the keys if the last query
/// stands at the last key.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    causal: bool,
    softmax_scale: Option<f32>,
    deterministic: bool,
    batch_invariant: bool,
    arch: Option<Arch>,
    table_gradients: bool,
    parts: Arc<Parts>,
    /// Program that the parts make, or the reason why they make none.
    program: Result<Option<Arc<Program>>, ProgramError>,
}

impl Default for Attention {
    fn default() -> Self {
        Self {
            causal: false,
            softmax_scale: None,
            deterministic: false,
            batch_invariant: false,
            arch: None,
            table_gradients: false,
            parts: Arc::default(),
            program: Ok(None),
        }
    }
}

impl Attention {
    /// Makes the options of full attention with softmax_scale `1 / sqrt(head_dim)`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Masks causally: query i sees key j only if `j <= i + seqlen_k - seqlen_q`, so the last query sees every key.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// Changes each score by `f`, which gets the score after all earlier steps and the coordinates of its pair.
    ///
    /// The closure runs once, in this call, and its operations are recorded. They become code of the CPU device and,
    /// printed as PTX, part of a GPU kernel. Numbers in it are parameters. Backward differentiates it automatically.
    ///
    /// ```
    /// use flash_attention::Attention;
    ///
    /// // The score falls by 0.1 for each key of distance, never below -20.
    /// let attention = Attention::new().score(|s, at| (s - 0.1 * at.distance().abs()).max(-20.0));
    /// ```
    #[must_use]
    pub fn score(self, f: impl for<'g> FnOnce(Score<'g>, At<'g>) -> Score<'g>) -> Self {
        self.with(|parts| parts.scores.push(Fragment::score(f)))
    }

    /// Hides the pairs for which `f` is false.
    ///
    /// ```
    /// use flash_attention::Attention;
    ///
    /// // A query sees the keys of its own chunk of 256, and the first key.
    /// let attention = Attention::new().mask(|at| (at.position() / 256).equals(at.key / 256) | at.key.equals(0));
    /// ```
    #[must_use]
    pub fn mask(self, f: impl for<'g> FnOnce(At<'g>) -> Truth<'g>) -> Self {
        self.with(|parts| parts.masks.push(Fragment::mask(f)))
    }

    /// Sliding window: `p - left <= key <= p + right`. `None` is no limit. From Longformer (2020) and Mistral (2023).
    #[must_use]
    pub fn window(self, left: impl Into<Option<usize>>, right: impl Into<Option<usize>>) -> Self {
        match (left.into(), right.into()) {
            (None, None) => self,
            (left, right) => self.with(|parts| parts.masks.push(named::window(left, right))),
        }
    }

    /// Softcap: scores become `cap * tanh(score / cap)`, which stays within `-cap ..= cap`; from Gemma 2 (2024). The
    /// last call counts.
    #[must_use]
    pub fn softcap(self, cap: f32) -> Self {
        self.with(|parts| parts.softcap = Some(named::softcap(cap)))
    }

    /// Prefix mask: `key < n or key <= p`. All queries see the first n keys, and the others causally. The prefix
    /// language model of T5 (2019).
    #[must_use]
    pub fn prefix(self, n: usize) -> Self {
        self.with(|parts| parts.masks.push(named::prefix(n)))
    }

    /// Chunked mask: `key <= p and key / n == p / n`, causal within chunks of n positions; from Llama 4 (2025).
    #[must_use]
    pub fn chunked(self, n: usize) -> Self {
        self.with(|parts| parts.masks.push(named::chunked(n)))
    }

    /// Dilated mask: `(p - key) % step == 0`, every step-th key counted from the query's position; from the Sparse
    /// Transformer (2019).
    #[must_use]
    pub fn dilated(self, step: usize) -> Self {
        self.with(|parts| parts.masks.push(named::dilated(step)))
    }

    /// Top-left causal mask: `key <= query`, as PyTorch's `is_causal` aligns it. If `seqlen_q` and `seqlen_k` are
    /// equal, it is [`causal`](Self::causal).
    #[must_use]
    pub fn top_left(self) -> Self {
        self.with(|parts| parts.masks.push(named::top_left()))
    }

    /// Drops weights: each is 0 with probability p, else divided by 1 - p, after normalisation. `p` is at least 0 and below 1.
    ///
    /// The choice of dropped weights is a pure function of the seed, batch, head, query and key, the same on every device:
    /// [`program::dropout`](crate::program::dropout) has it. Backward takes the same attention. A training step wants another
    /// seed each time, which is a parameter.
    #[must_use]
    pub fn dropout(self, p: f32, seed: u64) -> Self {
        self.with(|parts| match named::dropout(p, seed) {
            Ok(dropout) => parts.dropout = dropout,
            Err(error) => parts.masks.push(Fragment::refused(error)),
        })
    }

    /// Asks backward for the gradients of bias, ALiBi's slopes, sinks and every [`Table`](crate::program::Table) of
    /// floats, which [`Gradients`](crate::Gradients) then has.
    #[must_use]
    pub fn table_gradients(self) -> Self {
        Self {
            table_gradients: true,
            ..self
        }
    }

    /// True if backward gives the gradients of tables.
    pub fn has_table_gradients(&self) -> bool {
        self.table_gradients
    }

    /// Changes features of this attention.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Parts)) -> Self {
        change(Arc::make_mut(&mut self.parts));
        self.program = self.parts.compose();
        self
    }

    /// The options of a call with one sequence of a ragged batch.
    pub(crate) fn of_sequence(&self, sequence: usize) -> Self {
        let mut attention = self.clone();
        if let Ok(Some(program)) = &self.program {
            attention.program = Ok(Some(Arc::new(program.of_sequence(sequence))));
        }
        attention
    }

    /// Program that the features of scores and masks make together; `None` without any.
    ///
    /// # Errors
    /// [`ProgramError`] for an invalid feature.
    pub fn program(&self) -> Result<Option<&Arc<Program>>, ProgramError> {
        match &self.program {
            Ok(program) => Ok(program.as_ref()),
            Err(error) => Err(error.clone()),
        }
    }

    /// Uses only the kernels compiled for `arch`, instead of the fastest ones of the device: `Arch::Sm80` chooses the
    /// portable ones. If the device can run none of them, a call fails with
    /// [`Error::NoKernel`](crate::Error::NoKernel). The CPU runs native code and ignores this.
    #[must_use]
    pub fn arch(self, arch: Arch) -> Self {
        Self {
            arch: Some(arch),
            ..self
        }
    }

    /// Multiplies scores by `scale` before the softmax, instead of by `1 / sqrt(head_dim)` of q and k. Any finite number is
    /// allowed, negative numbers and 0 included.
    #[must_use]
    pub fn softmax_scale(self, scale: f32) -> Self {
        Self {
            softmax_scale: Some(scale),
            ..self
        }
    }

    /// Makes gradients bitwise reproducible on a device. [`Plan::backward`](crate::Plan::backward) tells where they
    /// are not by default, and what this costs there. Forward is always reproducible.
    #[must_use]
    pub fn deterministic(self) -> Self {
        Self {
            deterministic: true,
            ..self
        }
    }

    /// Makes the results of a batch entry, or of a sequence of a ragged batch or a cache, independent of what else is in the batch, to
    /// the bit.
    ///
    /// By default a GPU splits long sequences over blocks such that the whole batch fills the card, and the number of splits moves the
    /// last bits. With this a split has a fixed number of keys. Backward, and the CPU, are batch invariant anyway.
    #[must_use]
    pub fn batch_invariant(self) -> Self {
        Self {
            batch_invariant: true,
            ..self
        }
    }

    /// Returns true if results of a sequence must not depend on the rest of the batch.
    pub fn is_batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// Returns the architecture whose kernels are forced, or `None`.
    pub fn forced_arch(&self) -> Option<Arch> {
        self.arch
    }

    /// Returns true if the mask is causal.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// Returns true if gradients must be bitwise reproducible.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// Returns the factor of the scores at this head_dim of q and k.
    pub fn scale_for(&self, head_dim: usize) -> f32 {
        self.softmax_scale
            .unwrap_or_else(|| (1.0 / (head_dim as f64).sqrt()) as f32)
    }
}
