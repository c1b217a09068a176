//! Models that attend through flash-attention-candle, each beside the same model with plain attention. The examples run them; tests
//! run them small, on random weights.

pub mod adam;
pub mod bert;
pub mod gpt;
pub mod memory;
pub mod text;
