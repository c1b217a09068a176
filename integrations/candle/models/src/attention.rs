//! Attention of a model in training, computed by this library or by candle's own operations over stored scores.

use candle_core::{D, Device, Result, Tensor};
use flash_attention_candle::FlashAttention;

/// Pairs of a query and a key that see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All pairs.
    Full,
    /// Keys up to the query's own.
    Causal,
    /// Pixels of a picture, row by row: keys at most `radius` rows and `radius` columns away.
    Neighbours {
        /// Pixels of a row.
        side: usize,
        /// Rows, and columns, to each side.
        radius: usize,
    },
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// flash-attention-candle.
    Ours,
    /// candle's matrix products and softmax over stored scores.
    Plain,
}

/// Attention over `[batch, seqlen, heads, head_dim]` tensors, scaled by `1 / sqrt(head_dim)`, with gradients.
#[derive(Clone, Debug)]
pub enum Attention {
    /// This library's layer.
    Ours(FlashAttention),
    /// A mask of 0 and -inf, `[longest, longest]`, that is added to all scores; none hides nothing.
    Plain(Option<Tensor>),
}

impl Pattern {
    /// True if a query sees a key.
    pub fn sees(self, query: usize, key: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Causal => key <= query,
            Self::Neighbours { side, radius } => {
                (query / side).abs_diff(key / side) <= radius && (query % side).abs_diff(key % side) <= radius
            }
        }
    }
}

impl Attention {
    /// Attention of sequences of at most `longest` tokens.
    ///
    /// # Errors
    /// candle's errors for the memory of the mask, which plain attention holds.
    pub fn new(by: By, pattern: Pattern, longest: usize, device: &Device) -> Result<Self> {
        match by {
            By::Ours => Ok(Self::Ours(FlashAttention::new(ours(pattern)))),
            By::Plain if pattern == Pattern::Full => Ok(Self::Plain(None)),
            By::Plain => {
                let pairs = (0..longest).flat_map(|query| (0..longest).map(move |key| (query, key)));
                let hidden: Vec<f32> = pairs
                    .map(|(query, key)| {
                        if pattern.sees(query, key) {
                            0.0
                        } else {
                            f32::NEG_INFINITY
                        }
                    })
                    .collect();
                Ok(Self::Plain(Some(Tensor::from_vec(hidden, (longest, longest), device)?)))
            }
        }
    }

    /// Attention of q over k and v, shaped as q.
    ///
    /// # Errors
    /// candle's errors, and those of the library.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let mask = match self {
            Self::Ours(layer) => return layer.forward_seqlen_heads(q, k, v),
            Self::Plain(mask) => mask,
        };
        let (_, len, _, head_dim) = q.dims4()?;
        let heads_first = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
        let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
        let mut scores = (q.matmul(&k.t()?)? * (head_dim as f64).sqrt().recip())?;
        if let Some(mask) = mask {
            let mask = mask.narrow(0, 0, len)?.narrow(1, 0, len)?;
            scores = scores.broadcast_add(&mask)?;
        }
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        weights.matmul(&v)?.transpose(1, 2)
    }
}

/// Bytes of scores that candle's graph of plain attention keeps for a backward pass: six f32 tensors `[batch, heads, seqlen, seqlen]`, of
/// products, scaled products, masked ones, and three of the softmax.
pub fn plain_scores(batch: usize, heads: usize, seqlen: usize) -> usize {
    6 * size_of::<f32>() * batch * heads * seqlen * seqlen
}

/// A pattern as the library has it. The neighbourhood is a mask of the library's programs; the CPU computes no tile of it that holds
/// no pair.
fn ours(pattern: Pattern) -> flash_attention_candle::Attention {
    let attention = flash_attention_candle::Attention::new();
    match pattern {
        Pattern::Full => attention,
        Pattern::Causal => attention.causal(),
        Pattern::Neighbours { side, radius } => {
            let (side, radius) = (side as i32, radius as i32);
            attention.mask(move |at| {
                let rows = at.query / side - at.key / side;
                let columns = at.query % side - at.key % side;
                rows.abs().at_most(radius) & columns.abs().at_most(radius)
            })
        }
    }
}
