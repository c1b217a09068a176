//! Tile of work of a persistent block.

use crate::abi::WorkList;
use crate::deal::Deal;
use crate::mask::Blocks;
use crate::ptx::{sreg, tma::Corner};
use crate::shape::HOPPER_ROWS;
use core::num::NonZeroU32;

/// Rows of one head that a block owns at a time.
pub struct Work {
    /// Index of the head, counted over all batch entries.
    pub head: u32,
    /// First row of the tile in its sequence.
    pub first_row: u32,
    /// Rows per tile, including those that do not exist.
    block: u32,
    deal: Deal,
}

impl Work {
    /// Iterates over this block's tiles of `block` rows.
    #[inline(always)]
    pub fn of_this_block<const CAUSAL: bool, const OWNS_KEYS: bool>(
        list: &WorkList,
        block: u32,
    ) -> impl Iterator<Item = Self> {
        Self::of::<CAUSAL, OWNS_KEYS>(list, sreg::block_idx_x(), block)
    }

    /// Iterates over the tiles of `block` rows of block number `place`.
    #[inline(always)]
    pub fn of<const CAUSAL: bool, const OWNS_KEYS: bool>(
        list: &WorkList,
        place: u32,
        block: u32,
    ) -> impl Iterator<Item = Self> {
        let deals = list.deal::<CAUSAL, OWNS_KEYS>(place);
        deals.map(move |deal| Self {
            head: deal.head,
            first_row: deal.tile * block,
            block,
            deal,
        })
    }

    /// Returns part number `index` of this tile, `rows` rows.
    #[inline(always)]
    pub fn part(self, index: u32, rows: u32) -> Self {
        Self {
            first_row: self.first_row + index * rows,
            block: rows,
            ..self
        }
    }

    /// Returns the number of rows of the tile that exist in a sequence of `seqlen`. A tile past the end counts as whole.
    #[inline(always)]
    pub fn rows(&self, seqlen: u32) -> u32 {
        seqlen.wrapping_sub(self.first_row).min(self.block)
    }

    /// Returns the corner of the rows of warpgroup `group` in a tensor of `heads` heads.
    #[inline(always)]
    pub fn corner(&self, heads: NonZeroU32, group: u32) -> Corner {
        Corner {
            batch: self.head / heads,
            head: self.head % heads,
            row: self.first_row + group * HOPPER_ROWS,
            column: 0,
        }
    }

    /// Returns the number of key tiles of the head that add to dQ of some queries before this one, if the queries see
    /// the tiles `keys`.
    #[inline(always)]
    pub fn place(&self, keys: Blocks) -> u32 {
        self.deal.place(keys.begin, keys.end - 1)
    }
}
