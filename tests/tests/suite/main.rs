//! The suite: the library on every device of this machine against the CPU reference in f64, and the compiled kernels
//! against the host's description of them. It is one binary, because each binary links the library, the emulator and
//! all kernels.

mod append;
mod backward;
mod backward_errors;
mod backward_runs;
mod blocks;
mod cached;
mod clusters;
mod combinations;
mod decoding;
mod drawn;
mod empty;
mod emulator;
mod errors;
mod few_queries;
mod forward;
mod fp8;
mod fp8_accuracy;
mod fp8_errors;
mod fp8_kernels;
mod gpus;
mod house;
mod into;
mod latent;
mod latent_sequences;
mod making_errors;
mod metadata;
mod micro;
mod minilm;
mod nonfinite;
mod numbers;
mod plan;
mod programs;
mod properties;
mod ptx_contract;
mod ragged;
mod random_programs;
mod reports;
mod rotary;
mod sequence_programs;
mod strided_rows;
