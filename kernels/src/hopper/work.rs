//! Which tiles of work fall to a block, and in what order.

use crate::abi::WorkList;
use crate::ptx::{sreg, tma::Corner};
use crate::shape::HOPPER_ROWS;
use core::num::NonZeroU32;

/// The rows of one head that a block owns at a time.
pub struct Work {
    /// Head, all batch entries counted.
    pub head: u32,
    /// First row of the sequence.
    pub first_row: u32,
    /// Rows of a tile, whether they exist or not.
    block: u32,
}

impl Work {
    /// What falls to this block: one of every `gridDim.x` tiles of `block` rows, dealt to and fro, so that who got the longest
    /// of one round gets the shortest of the next. `last_first` turns the tiles of a head around.
    #[inline(always)]
    pub fn of_this_block(list: &WorkList, block: u32, last_first: bool) -> impl Iterator<Item = Self> {
        let (mut round, mut place) = (0, sreg::block_idx_x());
        core::iter::from_fn(move || {
            let index = round + place;
            round += sreg::grid_dim_x();
            place = sreg::grid_dim_x() - 1 - place;
            (index < list.tiles).then(|| Self::new(list, index, block, last_first))
        })
    }

    /// Heads are worked on in sections whose streamed tensors the L2 cache holds; in a section the first tiles of all heads
    /// come first, then the second. Where those are the longest, the last wave is short.
    #[inline(always)]
    fn new(list: &WorkList, index: u32, block: u32, last_first: bool) -> Self {
        let section = index / list.tiles_per_head / list.heads_per_section;
        let first_head = section * list.heads_per_section.get();
        let heads = list.heads_per_section.get().min(list.heads - first_head).max(1);
        let rest = index - first_head * list.tiles_per_head.get();
        let tile = rest / heads;
        let tile = if last_first {
            list.tiles_per_head.get() - 1 - tile
        } else {
            tile
        };
        Self {
            head: first_head + rest % heads,
            first_row: tile * block,
            block,
        }
    }

    /// Rows of the tile that exist in a sequence of `seqlen`.
    #[inline(always)]
    pub fn rows(&self, seqlen: u32) -> u32 {
        (seqlen - self.first_row).min(self.block)
    }

    /// Where the rows of warpgroup `group` start in a tensor of `heads` heads.
    #[inline(always)]
    pub fn corner(&self, heads: NonZeroU32, group: u32) -> Corner {
        Corner {
            batch: self.head / heads,
            head: self.head % heads,
            row: self.first_row + group * HOPPER_ROWS,
            column: 0,
        }
    }
}
