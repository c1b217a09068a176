//! Element types of q, k, v and out, as types; what is known of each without an instruction.

/// IEEE binary32.
#[derive(Clone, Copy)]
pub struct F32;

/// IEEE binary16.
#[derive(Clone, Copy)]
pub struct F16;

/// bfloat16.
#[derive(Clone, Copy)]
pub struct Bf16;
