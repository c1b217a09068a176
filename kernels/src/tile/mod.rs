//! Tiles: rectangles of a matrix, and where their elements live.
//!
//! [`fragment`] knows which lane holds which element, [`swizzle`] where a 16-byte chunk lies in shared memory; both are
//! arithmetic, compiled and tested on the host. `global` and `shared` are tiles in memory; `register` says what a tile in
//! registers can do, `fragments` does it on the tensor cores, `lanes` by plain FMA. `panels` and `warpgroup` are both for
//! Hopper, whose warpgroups multiply out of shared memory.

pub mod fragment;
pub mod swizzle;

#[cfg(target_arch = "nvptx64")]
pub mod element;
#[cfg(target_arch = "nvptx64")]
pub mod fragments;
#[cfg(target_arch = "nvptx64")]
pub mod global;
#[cfg(target_arch = "nvptx64")]
pub mod lanes;
#[cfg(target_arch = "nvptx64")]
pub mod panels;
#[cfg(target_arch = "nvptx64")]
pub mod register;
#[cfg(target_arch = "nvptx64")]
pub mod shared;
#[cfg(target_arch = "nvptx64")]
pub mod warpgroup;
