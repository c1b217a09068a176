//! The shape of latent attention, whose warps share the rows of a block.

use super::{PORTABLE_SHARED_BYTES, TileSizes, loads_evenly};
use crate::element::F16;
use crate::tile::fragment;
use core::marker::PhantomData;

/// 32 x 32, head_dim 576 and 512 of v, f16 or bf16, mma.sync: forward for latent attention, whose warps share rows (`latent`).
///
/// 32 rows of 512 outputs are 64 registers a lane of 8 warps, and the block's queries 36 more; they would not fit in shared memory beside
/// two tiles of keys. 32 keys a tile: the exchange of scores then takes less time than the products.
pub struct LatentD576<T>(PhantomData<T>);

impl<T> TileSizes for LatentD576<T> {
    const HEAD_DIM: u32 = 576;
    const ROWS: u32 = 32;
    const COLUMNS: u32 = 32;
    const WARPS: u32 = 8;
    const STAGES: u32 = 2;
    const ELEMENT_BYTES: u32 = 2;
    const TWO_WALKS: bool = false;
}

impl<T> LatentD576<T> {
    /// Largest head_dim of v and out.
    pub const HEAD_DIM_V: u32 = 512;
    /// Rows of the scores that a warp multiplies.
    pub const SCORE_ROWS: u32 = 16;
    /// Parts of head_dim whose products different warps sum up.
    pub const PARTS: u32 = Self::WARPS * Self::SCORE_ROWS / Self::ROWS;
    /// Columns of q and k of a part.
    pub const PART_COLUMNS: u32 = Self::HEAD_DIM / Self::PARTS;
    /// Columns of v and out that a warp multiplies.
    pub const WARP_COLUMNS: u32 = Self::HEAD_DIM_V / Self::WARPS;
    /// Warps that have the softmax of [`SOFTMAX_ROWS`](Self::SOFTMAX_ROWS) rows each.
    pub const SOFTMAX_WARPS: u32 = Self::ROWS / Self::SOFTMAX_ROWS;
    /// Rows of the softmax of a warp.
    pub const SOFTMAX_ROWS: u32 = fragment::SIMT_ROWS.0;
    /// Size of a part of the scores in f32, in bytes.
    pub const PART_BYTES: u32 = Self::ROWS * Self::COLUMNS * 4;
    /// Size of the weights, in bytes.
    pub const WEIGHT_BYTES: u32 = Self::ROWS * Self::COLUMNS * Self::ELEMENT_BYTES;
    /// Dynamic shared memory of a block, in bytes: the pipeline, and what warps exchange: parts of the scores, weights and a
    /// factor for each row.
    pub const SHARED_BYTES: u32 =
        Self::STAGES * Self::STREAMED_BYTES + Self::PARTS * Self::PART_BYTES + Self::WEIGHT_BYTES + Self::ROWS * 4;
}

const _: () = {
    type Latent = LatentD576<F16>;
    assert!(Latent::PART_COLUMNS.is_multiple_of(16) && Latent::HEAD_DIM == Latent::PARTS * Latent::PART_COLUMNS);
    // A warp's columns begin with a run of the swizzle, and its outputs are staged in the pipeline.
    assert!((Latent::WARP_COLUMNS * 2).is_multiple_of(128) && Latent::ROW_BYTES.is_multiple_of(128));
    assert!(Latent::ROWS * Latent::HEAD_DIM_V <= Latent::STAGES * Latent::STREAMED_BYTES / 2);
    // The queries are staged in a slot of the pipeline.
    assert!(Latent::OWNED_BYTES <= Latent::STREAMED_BYTES);
    assert!(loads_evenly::<Latent>() && Latent::SHARED_BYTES <= PORTABLE_SHARED_BYTES);
};
