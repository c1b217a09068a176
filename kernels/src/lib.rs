//! FlashAttention's kernels in Rust: `no_std`, compiled to PTX by rustc's own `nvptx64-nvidia-cuda` target.
//!
//! The crate compiles twice. For `nvptx64` it is the code that a GPU runs. For the host it is the contract: the
//! parameter structs ([`abi`]), the tile shapes ([`shape`]), the mask ([`mask`]) and the table of what was compiled
//! ([`entries`]), so that nothing is declared on both sides. The feature `embedded` adds the compiled PTX, 1.9 MB, of
//! which `Entry::ptx` inflates a kernel at a time.
//!
//! # The algorithm
//!
//! `out = softmax(scale * Q K^T) V` without ever holding the N x N scores. A block owns `block_m` queries of one head.
//! It walks the keys in tiles of `block_n`, keeping for every query the largest score so far (`row_max`) and the sum of
//! exponentials relative to it (`row_sum`). A tile that raises the maximum rescales what was summed before by
//! `exp(old - new)`, which is exact: at the end the output has only to be divided by `row_sum`, and
//! `lse = row_max + ln(row_sum)` is all that the backward pass needs to recompute any score.
//!
//! # Who owns what
//!
//! | level | owns | lives in |
//! | --- | --- | --- |
//! | block | `block_m` queries of one (batch, head); a ring of K and V tiles | shared memory |
//! | warp | `block_m / warps` of those queries, from load to store: softmax never crosses a warp | registers |
//! | lane | some columns of some rows: two rows of each 16 with `mma.sync`, four rows of 8 with plain FMA | registers |
//!
//! Scores are accumulators; probabilities become the next product's operand in the same registers. K and V are read
//! once per query block, Q once, the output is written once: N^2 d / block_m elements of traffic instead of N^2.
//!
//! On Hopper a warpgroup of four warps owns 64 queries, multiplies out of shared memory while it does other work, and a
//! thread that does nothing else loads; `hopper` says how.
//!
//! # The rooms
//!
//! `asm!` lives in `ptx`, a lane's coordinates in `tile::fragment`, bank conflicts in `tile::swizzle`, minus infinity in
//! `softmax`, sequence lengths in [`mask`], who works on what in [`deal`] and [`work`], waiting in `pipeline`; `forward` and
//! `backward` read like the paper, `listed` is forward for whatever is no rectangle, `latent` forward for keys too wide for
//! warps with rows of their own, and [`rotary`] moves rows to a cache.

#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]
// Compiled once for each architecture, with the kernels of that architecture only.
#![cfg_attr(target_arch = "nvptx64", allow(dead_code, unused_imports, unused_macros))]

#[cfg(feature = "archive")]
extern crate std;

pub mod abi;
#[cfg(feature = "archive")]
pub mod archive;
pub mod deal;
pub mod element;
pub mod entries;
pub mod mask;
pub mod program;
pub mod rotary;
pub mod shape;
#[cfg(feature = "study")]
pub mod study;
pub mod tile;
pub mod work;

#[cfg(target_arch = "nvptx64")]
mod backward;
#[cfg(target_arch = "nvptx64")]
mod block;
#[cfg(target_arch = "nvptx64")]
mod delta;
#[cfg(target_arch = "nvptx64")]
mod forward;
#[cfg(target_arch = "nvptx64")]
mod hopper;
#[cfg(target_arch = "nvptx64")]
mod latent;
#[cfg(target_arch = "nvptx64")]
mod listed;
#[cfg(target_arch = "nvptx64")]
mod lists;
#[cfg(target_arch = "nvptx64")]
mod nonfinite;
#[cfg(target_arch = "nvptx64")]
mod pipeline;
#[cfg(target_arch = "nvptx64")]
mod ptx;
#[cfg(target_arch = "nvptx64")]
mod scores;
#[cfg(target_arch = "nvptx64")]
mod softmax;

/// Never reached: a test proves that no kernel's PTX calls a function or traps.
#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
