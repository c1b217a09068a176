//! The name of candle-flash-attn for flash-attention-candle, so that `[patch.crates-io]` puts it under packages that depend on
//! the former, such as candle-transformers.

pub use flash_attention_candle::*;
