//! Exact attention in memory that grows with the sequence, not with its square: on an NVIDIA GPU, on the CPU, and on an
//! emulator that runs the very PTX a GPU would load. Nothing has to be installed but, for a GPU, its driver.
//!
//! ```
//! use flash_attention::{Attention, Device, Tensor};
//!
//! let device = Device::best()?; // a GPU if there is one, else the CPU
//! let shape = [1, 2, 128, 64]; // batch, heads, seqlen, head_dim
//! let data: Vec<f32> = (0..2 * 128 * 64).map(|i| (i as f32).sin()).collect();
//! let q = Tensor::from_slice(&device, shape, &data)?;
//! let (k, v) = (q.clone(), q.clone());
//!
//! let attention = Attention::new().causal();
//! let output = attention.forward(&q, &k, &v)?;
//! let out: Vec<f32> = output.out.to_vec()?; // [1, 2, 128, 64]
//! let lse: Vec<f32> = output.lse.to_vec()?; // [1, 2, 128]
//! println!("{}", attention.plan(&q, &k, &v)?);
//!
//! // The first query sees the first key only, so its output is the first value.
//! assert_eq!(out[..64], data[..64]);
//! # assert_eq!(lse.len(), 2 * 128);
//! # Ok::<(), flash_attention::Error>(())
//! ```
//!
//! # What the numbers mean
//!
//! - q is `[batch, heads_q, seqlen_q, head_dim]`; k and v are `[batch, heads_kv, seqlen_k, head_dim]`, where `heads_kv`
//!   divides `heads_q` (grouped and multi-query attention). head_dim is a multiple of 8 up to 256.
//! - The last axis is contiguous, the other strides are free: `[batch, seqlen, heads, head_dim]` memory and packed QKV
//!   are used in place ([`Tensor::transpose`], [`Tensor::select`]).
//! - Elements are `f32`, computed in f32 or as exactly; [`half::f16`] and [`half::bf16`], summed in f32.
//! - Causal masks are aligned at the last query and the last key. A query that sees no key has `out = 0` and
//!   `lse = -inf`.
//!
//! # The way of a call
//!
//! Tensors become a [`Problem`], which proves them sane; that becomes a [`Plan`], which chooses the kernel and knows what
//! it costs; a [`Device`] carries it out. Each is a value that can be looked at, and made without the next. What is wrong
//! with an argument is an [`Error`] before anything is allocated or launched.

mod attention;
mod call;
mod device;
mod element;
mod error;
mod layout;
mod plan;
mod problem;
mod progress;
pub mod reference;
mod tensor;

pub use attention::{Attention, Gradients, Output, Statistics};
pub use call::Reporting;
pub use device::{Device, DeviceInfo, DeviceKind, EmulatorOptions, MemoryUse};
pub use element::Element;
pub use error::{CudaUnavailable, Error};
pub use flash_attention_kernels::entries::{Arch, Dtype, Entry};
pub use flash_attention_kernels::mask::MAX_SEQLEN;
pub use half;
pub use layout::TensorInfo;
pub use plan::{Cost, Launch, MAX_BLOCKS, Parameters, Plan, Results, TileMap, Tiles};
pub use problem::{
    BackwardInputs, BackwardProblem, GradientOutputs, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, Outputs, Problem,
};
pub use progress::Progress;
pub use ptx_emulator;
pub use tensor::Tensor;

/// Compiles and runs the example that the package's page shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
