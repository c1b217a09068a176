//! Which tiles of work fall to a block, and in what order.

use crate::abi::WorkList;
use crate::ptx::{sreg, sync, tma::Corner};
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
    /// What falls to this block of the tiles of `block` rows. `last_first` says of a causal mask that a head's last tile is the
    /// longest, not its first.
    ///
    /// Heads are worked on in sections whose streamed tensors the L2 cache holds. Under a causal mask the longest tile of a
    /// head and its shortest are one share of work, then the second and the last but one, so that all shares are equal, and the
    /// blocks take turns at them. Shares that are left over for the last round are halved if every half finds a block.
    #[inline(always)]
    pub fn of_this_block<const CAUSAL: bool>(
        list: &WorkList,
        block: u32,
        last_first: bool,
    ) -> impl Iterator<Item = Self> {
        let mut turn = 0;
        core::iter::from_fn(move || {
            if !CAUSAL {
                let index = turn * sreg::grid_dim_x() + sreg::block_idx_x();
                turn += 1;
                return (index < list.tiles).then(|| Self::new(list, index, list.tiles_per_head, block));
            }
            loop {
                let (share, second) = share_of_turn(list, turn)?;
                turn += 1;
                let mut work = Self::new(list, share, shares_per_head(list), block);
                let last = (list.tiles_per_head.get() - 1) * block;
                // The middle tile of a head is a share of its own.
                if second && 2 * work.first_row == last {
                    continue;
                }
                if second != last_first {
                    work.first_row = last - work.first_row;
                }
                return Some(work);
            }
        })
    }

    /// Tile `index` of the list, if a head has `per_head`: of a section all heads' first, then their second.
    #[inline(always)]
    fn new(list: &WorkList, index: u32, per_head: NonZeroU32, block: u32) -> Self {
        let heads_per_section = NonZeroU32::MIN.saturating_add(sync::renew(list.heads_per_section.get()) - 1);
        let section = index / per_head / heads_per_section;
        let first_head = section * heads_per_section.get();
        let heads = heads_per_section.get().min(list.heads - first_head).max(1);
        let rest = index - first_head * per_head.get();
        Self {
            head: first_head + rest % heads,
            first_row: rest / heads * block,
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

/// Pairs of tiles that a head has, a middle one counted as a pair.
#[inline(always)]
fn shares_per_head(list: &WorkList) -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add((sync::renew(list.tiles_per_head.get()) - 1) / 2)
}

/// The share of work that this block's `turn`-th tile belongs to, and whether it is the second of the two; `None` after the
/// last.
#[inline(always)]
fn share_of_turn(list: &WorkList, turn: u32) -> Option<(u32, bool)> {
    // Worked out anew each time: a thread that loads has few registers to keep anything in.
    let (block, blocks) = (sreg::block_idx_x(), sync::renew(sreg::grid_dim_x()));
    let shares = list.heads * shares_per_head(list).get();
    let (round, second) = (turn / 2, turn % 2 == 1);
    let left = shares.saturating_sub(round * blocks);
    if left >= blocks {
        Some((round * blocks + block, second))
    } else if 2 * left > blocks {
        (block < left).then_some((round * blocks + block, second))
    } else {
        (block < 2 * left && !second).then_some((round * blocks + block / 2, block % 2 == 1))
    }
}
