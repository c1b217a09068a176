//! flash-attention-candle against candle's own plain attention, on the CPU.

mod append;
mod dense;
mod plain;
mod readme;
mod varlen;
