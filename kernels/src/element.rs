//! Element types of q, k, v and out as Rust types, without any instructions.

/// IEEE binary32.
#[derive(Clone, Copy)]
pub struct F32;

/// IEEE binary16.
#[derive(Clone, Copy)]
pub struct F16;

/// bfloat16.
#[derive(Clone, Copy)]
pub struct Bf16;
