//! Models that attend through flash-attention-candle, each beside the same model with plain attention. The examples run them; tests
//! run them small, on random weights.

pub mod adam;
pub mod attention;
pub mod bert;
pub mod llama;
pub mod memory;
pub mod program;
pub mod report;
pub mod tasks;
pub mod text;
pub mod training;
pub mod transformer;
