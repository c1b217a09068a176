//! PTX arithmetic on scalars.
//!
//! Every function is a pure function of register contents, without lanes, memory or state. An `f16` or `bf16` is its
//! 16 bits in a `u16`, a packed pair is a `u32` with element 0 in the low half, `f32` and `f64` are Rust's own.
//!
//! Floating-point operations follow one idea, in [`round`]. An operation is first computed with enough precision: in
//! f64 with its error term folded into the last bit, or with a 128-bit significand. It is then rounded once, in the
//! instruction's mode, to the instruction's format. No result is rounded twice.
//!
//! | module | instructions |
//! | --- | --- |
//! | [`round`] | rounding modes, round to odd, the 128-bit exact value |
//! | [`format`](mod@format) | f16, bf16, tf32, e4m3, e5m2: decode, encode |
//! | [`float32`] | add, sub, mul, fma, div, rcp, sqrt, min, max, … `.f32`, and the mixed-precision forms |
//! | [`float64`] | these operations on `.f64` |
//! | [`float16`] | these operations on `.f16`, `.bf16` and their packed forms |
//! | [`approx`] | ex2, lg2, sin, cos, tanh, rcp, rsqrt, sqrt, div `.approx` |
//! | [`cvt`] | every `cvt`, and `cvt.pack` |
//! | [`integer`] | integer arithmetic, carries, dot products |
//! | [`bits`] | bit counting, bit fields, prmt, shifts, lop3 |
//! | [`video`] | scalar video instructions (`vadd`, `vset`, `vmad`, …) |

pub mod approx;
pub mod bits;
pub mod cvt;
pub mod float16;
pub mod float32;
pub mod float64;
pub mod format;
pub mod integer;
pub mod minmax;
pub mod round;
pub mod video;

pub use round::{IntegerRounding, Rounding};
