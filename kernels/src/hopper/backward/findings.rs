//! Facts about a block's inputs that its consumers find together. They are kept in shared memory, because in registers
//! each would take one of every thread.

use crate::abi::QuerySums;
use crate::delta::any_far_of_share;
use crate::hopper::{Barrier, WARPGROUP};
use crate::mask::Blocks;
use crate::ptx::{memory, sreg, sync, tma};
use crate::shape::DELTA_ROWS;
use crate::tile::{element::Element, panels::Panels};

/// The findings: a query is far, and a tile was cleaned.
#[derive(Clone, Copy)]
pub struct Findings {
    /// Shared address of the two words.
    base: u32,
    /// Number of threads of the consumers.
    threads: u32,
}

impl Findings {
    /// Returns the findings of `consumers` warpgroups, two words at a shared address.
    #[inline(always)]
    pub fn new(base: u32, consumers: u32) -> Self {
        Self {
            base,
            threads: consumers * WARPGROUP,
        }
    }

    /// Returns the index of this thread among the consumers.
    #[inline(always)]
    fn thread(self) -> u32 {
        sreg::thread_idx_x() - WARPGROUP
    }

    /// Tells if a query of the loop is far, or a key tainted.
    ///
    /// # Safety
    /// [`find_far`](Self::find_far) was called. The whole warp calls it together.
    #[inline(always)]
    pub unsafe fn is_far(self) -> bool {
        // SAFETY: the caller's contract.
        sync::any(unsafe { memory::ld_shared_u32(self.base) } != 0)
    }

    /// Tells if a tile was cleaned.
    ///
    /// # Safety
    /// [`find_far`](Self::find_far) was called.
    #[inline(always)]
    pub unsafe fn has_cleaned(self) -> bool {
        // SAFETY: the caller's contract.
        unsafe { memory::ld_shared_u32(self.base + 4) != 0 }
    }

    /// Determines if any query in the `blocks` of `block` queries of a head is far. The loop of the `first` head starts with no
    /// tile cleaned.
    ///
    /// # Safety
    /// There is a flag for each [`DELTA_ROWS`] queries. All consumers call it together, with the same blocks.
    #[inline(always)]
    pub unsafe fn find_far(
        self,
        sums: &QuerySums,
        head: u32,
        blocks: Blocks,
        block: u32,
        first: bool,
        is_tainted: bool,
    ) {
        let flags_per_tile = (block / DELTA_ROWS) as u64;
        let start = head as u64 * (sums.padded_q.get() / DELTA_ROWS) as u64;
        let flags = start + blocks.begin as u64 * flags_per_tile..start + blocks.end as u64 * flags_per_tile;
        // SAFETY (whole body): the caller's contract; the barrier is used for nothing else.
        unsafe {
            let any = any_far_of_share(&sums.exponents, flags, self.thread(), self.threads);
            let any = Barrier::Consumers.sync_or(self.threads, any || is_tainted);
            if self.thread() == 0 {
                memory::st_shared_word(self.base, any as u32);
                if first {
                    memory::st_shared_word(self.base + 4, 0);
                }
            }
            Barrier::Consumers.sync(self.threads);
        }
    }

    /// Zeroes NaN and infinity in streamed tiles, and records if there were any. Products with the original tiles were
    /// awaited; later products use the cleaned ones.
    ///
    /// # Safety
    /// The tiles are initialised and visible. All consumers call it together.
    #[inline(always)]
    pub unsafe fn clean<E: Element, const TILES: usize>(self, tiles: [Panels; TILES]) {
        // SAFETY (whole body): each chunk belongs to one thread; the first barrier comes after every read of the
        // original tile, the second before the reads of the cleaned one.
        unsafe {
            let mut any = false;
            for tile in tiles {
                any |= tile.has_nonfinite::<E>(self.thread(), self.threads);
            }
            let any = Barrier::Consumers.sync_or(self.threads, any);
            if sync::any(any) {
                for tile in tiles {
                    tile.zero_nonfinite::<E>(self.thread(), self.threads);
                }
                if self.thread() == 0 {
                    memory::st_shared_word(self.base + 4, 1);
                }
                tma::fence_async();
                Barrier::Consumers.sync(self.threads);
            }
        }
    }
}
