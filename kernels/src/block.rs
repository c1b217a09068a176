//! Part of the problem that a block of threads owns, and the division of its loads among threads.

use crate::abi::{Layout, StridedTensor};
use crate::ptx::sreg;
use crate::shape::TileSizes;
use crate::tile::{
    global::GlobalTile,
    shared::{SharedTile, Split},
};
use core::marker::PhantomData;
use core::num::NonZeroU32;

/// `ROWS` rows of one head of one batch entry.
pub struct RowBlock<S> {
    /// Batch entry.
    pub batch: u32,
    /// Head.
    pub head: u32,
    /// First row of the sequence.
    pub first_row: u32,
    shape: PhantomData<S>,
}

impl<S: TileSizes> RowBlock<S> {
    /// Returns the rows of this thread block. Block x is tile, head, batch, fastest first: neighbours read the same
    /// streamed tiles from L2. `last_first` reverses the tiles: where later tiles have more work, starting them first
    /// keeps the last wave short.
    #[inline(always)]
    pub fn of_this_thread_block(tiles: NonZeroU32, heads: NonZeroU32, last_first: bool) -> Self {
        Self::of_block(sreg::renewed_block_idx_x(), tiles, heads, last_first)
    }

    /// Returns the rows of block number `block`.
    #[inline(always)]
    pub fn of_block(block: u32, tiles: NonZeroU32, heads: NonZeroU32, last_first: bool) -> Self {
        let (rest, tile) = (block / tiles, block % tiles);
        let (batch, head) = (rest / heads, rest % heads);
        let tile = if last_first { tiles.get() - 1 - tile } else { tile };
        Self {
            batch,
            head,
            first_row: tile * S::ROWS,
            shape: PhantomData,
        }
    }

    /// Returns the number of rows of the block that exist in a sequence of `seqlen`.
    #[inline(always)]
    pub fn rows(&self, seqlen: u32) -> u32 {
        (seqlen - self.first_row).min(S::ROWS)
    }

    /// Returns the first `rows` rows of head `head` of this block's batch entry.
    #[inline(always)]
    pub fn window(&self, tensor: &StridedTensor, head: u32, rows: u32, layout: &Layout) -> GlobalTile {
        GlobalTile::new(tensor, self.batch, head, rows, layout, S::ELEMENT_BYTES)
    }

    /// Returns the index of this head's first row in a contiguous `[batch, heads, seqlen]` tensor.
    #[inline(always)]
    pub fn row_of_head(&self, heads: NonZeroU32, seqlen: u32) -> u64 {
        (self.batch as u64 * heads.get() as u64 + self.head as u64) * seqlen as u64
    }
}

/// Returns owned tile `index`. Owned tiles start at the bottom of shared memory; the streamed tiles follow.
#[inline(always)]
pub fn owned_tile<S: TileSizes>(index: u32) -> SharedTile {
    SharedTile::new(sreg::dynamic_shared_mem() + index * S::OWNED_BYTES, S::ROW_BYTES)
}

/// Returns the division of a tile's chunks among this block's threads, worked out anew: nothing that depends on it is kept in registers
/// since the last time.
#[inline(always)]
pub fn renewed_split<S: TileSizes>() -> Split {
    Split::new(S::ROW_BYTES, sreg::renewed_thread_idx_x(), S::THREADS)
}

/// Returns the division of a tile's chunks among this block's threads.
#[inline(always)]
pub fn split<S: TileSizes>() -> Split {
    Split::new(S::ROW_BYTES, sreg::thread_idx_x(), S::THREADS)
}
