//! Tensor instructions: the elements that each lane holds, the location of a tile in shared memory, and the product.
//!
//! Lane maps and swizzles are `const fn` over plain integers. Products are pure functions of registers and, for
//! wgmma, of a closure that reads shared memory. Nothing here depends on a warp, a block or a memory.
//!
//! | module | idea |
//! | --- | --- |
//! | [`fragment`] | (lane, register, part) to (row, column), for mma.sync |
//! | [`mma`] | the warp-level product |
//! | [`matrix`] | ldmatrix, stmatrix, movmatrix |
//! | [`wmma`] | the older, opaque fragments |
//! | [`swizzle`] | the 32, 64 and 128 byte permutations of shared memory |
//! | [`descriptor`] | wgmma's 64-bit matrix descriptor: the address of every element |
//! | [`wgmma`] | the warpgroup-level product |
//! | [`tensor_map`] | encoding and checking a tensor map |
//! | [`tile_copy`] | the byte ranges that a tensor copy moves |

pub mod descriptor;
pub mod fragment;
pub mod matrix;
pub mod mma;
pub mod swizzle;
pub mod tensor_map;
mod tensor_map_types;
pub mod tile_copy;
pub mod wgmma;
pub mod wmma;
