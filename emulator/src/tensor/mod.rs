//! Meaning of the tensor instructions: which lane holds which element, where a tile lies in shared memory, and what the
//! product is.
//!
//! Lane maps and swizzles are `const fn` over plain integers; the products are pure functions of registers (and, for
//! wgmma, of a closure that reads shared memory). Nothing here knows a warp, a block or a memory.
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
//! | [`tile_copy`] | what a tensor copy moves, byte range by byte range |

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
