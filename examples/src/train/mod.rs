//! A small GPT and its training, written by hand, so that attention can be exchanged while all other code stays the
//! same.
//!
//! Activations are matrices with one row per token, `[batch * seqlen, width]`. The `forward` of a layer returns its
//! result and, if needed, values saved for backward. Its `backward` turns the gradient of the result into the
//! gradient of the input and the gradient of the parameters. The latter is a value of the layer's own type: the
//! gradient of a [`Gpt`] is a `Gpt`.
//!
//! The trait [`Attend`] has two implementations: [`PlainAttention`] is standard attention and stores every score,
//! [`FlashAttention`] is this library and stores none.

mod adam;
mod attend;
mod block;
mod gpt;
mod layers;
mod linalg;
mod text;
mod trainer;

#[cfg(test)]
mod finite_differences;

pub use adam::Adam;
pub use attend::{Attend, FlashAttention, Heads, PlainAttention};
pub use block::{Block, BlockSaved};
pub use gpt::{Config, Gpt};
pub use layers::{Embedding, LayerNorm, Linear, Normalized, gelu, gelu_backward};
pub use text::{Batch, Text, TextError};
pub use trainer::{Settings, Trainer};
