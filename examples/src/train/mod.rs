//! A small GPT and its training, written by hand, so that attention can be exchanged and nothing else changes.
//!
//! Activations are matrices with one row a token, `[batch * seqlen, width]`. Every layer has a `forward`, which gives the
//! result and, where needed, what the way back needs; and a `backward`, which turns the gradient of its result into the
//! gradient of its input and the gradient of its parameters. The latter is a value of the layer's own type: the
//! gradient of a [`Gpt`] is a `Gpt`.
//!
//! Attention is behind the trait [`Attend`]: [`PlainAttention`] is the textbook's and stores every score,
//! [`FlashAttention`] is this library's on both passes and stores none.

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
