//! Tiles: rectangles of a matrix in memory or registers.
//!
//! [`fragment`] maps lanes to elements, and [`swizzle`] maps chunks to their place in shared memory; both are plain
//! arithmetic, compiled and tested on the host. `global` and `shared` are tiles in memory. `register` defines the
//! operations on a tile in registers, `fragments` implements them on the tensor cores, `lanes` by plain FMA. `panels`,
//! `warpgroup` and `codes` are for Hopper, whose warpgroups multiply from shared memory.

pub mod fragment;
pub mod swizzle;

#[cfg(target_arch = "nvptx64")]
pub mod codes;
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
