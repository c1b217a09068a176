#![doc = include_str!("../README.md")]

mod attention;
mod backend;
mod flex;
mod module;

pub use attention::{Error, attention};
pub use backend::{FlashBackend, Forward, QkvGradients};
pub use flash_attention::{self, Attention};
pub use module::{FlashAttention, FlashMultiHeadAttention, FlashMultiHeadAttentionConfig};
