//! Exact attention in memory that grows with the sequence, not with its square: on an NVIDIA GPU, on the CPU, and on
//! an emulator that executes the PTX that a GPU would load. A GPU needs its driver, and nothing else has to be
//! installed.
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
//! # Shapes, dtypes and masks
//!
//! - q is `[batch, heads_q, seqlen_q, head_dim]`, k is `[batch, heads_kv, seqlen_k, head_dim]`, and v is `[batch, heads_kv,
//!   seqlen_k, head_dim_v]`, where `heads_kv` divides `heads_q` (grouped and multi-query attention). out is `[batch, heads_q,
//!   seqlen_q, head_dim_v]`. head_dim and head_dim_v are multiples of 8 up to 256, and may differ.
//!   Latent attention has a head_dim up to 576, with a smaller head_dim_v up to 512: on the CPU, and on GPUs in forward
//!   of f16 and bf16.
//! - The last axis is contiguous; the other strides are free. Tensors in `[batch, seqlen, heads, head_dim]` order and
//!   packed QKV are used in place ([`Tensor::transpose`], [`Tensor::select`]).
//! - Elements are `f32`, [`half::f16`] or [`half::bf16`], accumulated in f32. f32 is multiplied by FMA, or on AMX by
//!   three-way bf16 splits with the same error bound.
//! - Causal masks are aligned at the last query and the last key. A query that sees no key has `out = 0` and
//!   `lse = -inf`.
//!
//! # Features
//!
//! `cuda`, `cuda-12080` and `emulator` are on by default; `default-features = false` builds the CPU device alone.
//!
//! - `cuda`: [`Device::cuda`], through cudarc, which loads the driver when the program runs. A build needs no CUDA.
//! - `cuda-12080`: fixes cudarc's bindings at CUDA 12.8, which every driver from 12.0 on can run. Leave it out
//!   (`features = ["cuda"]`) if another crate of the build, such as candle, chooses the version. cudarc then asks
//!   `nvcc --version`, and takes its newest bindings where there is no nvcc.
//! - `emulator`: the emulated GPUs (`Device::emulator`).
//! - `tracing`, off by default: a span for each call, with device, kernels, shape, bytes and FLOPs from its plan.
//!
//! # Concepts
//!
//! Each step of a call is a value that can be made, printed and tested without the next one. A wrong argument is an
//! [`Error`] before anything is allocated or launched.
//!
//! | concept | type | on the CPU | on a GPU, or emulated |
//! | --- | --- | --- | --- |
//! | device: memory and processors | [`Device`] | native code, threads of a rayon pool | a context with one stream and one memory pool |
//! | tensor: a device's memory seen through a shape and strides | [`Tensor`] | host memory; an address is a pointer | device memory; an address is a `CUdeviceptr` |
//! | attention: the options of a call, and the calls | [`Attention`] | returns when the results are there | returns when the work is launched; [`Tensor::to_vec`] waits |
//! | score program: changes scores, hides pairs | [`program::Program`] | vector code over strips of scores | PTX in a compiled kernel; [`Error::Unsupported`] for deterministic gradients of tables that several pairs read at one element |
//! | problem: sizes and layouts, proven valid | [`problem::Problem`] | the same | the same |
//! | plan: what is chosen, and its cost; its pass is in its type | [`Plan`], `Plan<Backward>` | tiles, instruction set, products, splits | kernels, grids, shared memory |
//! | progress of a call | [`Progress`] | a unit is a tile of queries against a tile of keys | emulated: a block; a GPU does not report |
//!
//! A problem takes [`problem::TensorInfo`]s, which describe tensors without memory. A plan takes a
//! [`device::DeviceInfo`], which describes a device in plain numbers. Both can be made for tensors and devices that
//! do not exist.

mod batch;
mod call;
pub mod device;
mod element;
pub mod error;
mod features;
mod layout;
mod options;
mod output;
pub mod plan;
pub mod problem;
pub mod program;
mod progress;
mod quantized;
pub mod reference;
mod rotary;
mod sequences;
mod target;
mod tensor;
mod trace;

pub use batch::NewKeys;
pub use call::Reporting;
#[cfg(feature = "cuda")]
pub use cudarc;
pub use device::Device;
pub use element::{Element, F8E4M3, Half, Scalar};
pub use error::Error;
pub use flash_attention_kernels::entries::{Arch, Dtype};
pub use half;
pub use options::Attention;
pub use output::{Gradients, Output, Statistics};
pub use plan::Plan;
pub use progress::Progress;
#[cfg(feature = "emulator")]
pub use ptx_emulator;
pub use quantized::{Hadamard, Quantized};
pub use rotary::Rotary;
pub use sequences::{KvCache, Sequences};
pub use tensor::Tensor;

/// Compiles and runs the example of the package's README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
