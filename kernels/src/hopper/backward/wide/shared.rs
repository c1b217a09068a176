//! Layout of a backward block's shared memory above head_dim 128.

use crate::abi::QuerySums;
use crate::pipeline::bulk::{Cursor, Slots};
use crate::ptx::{mbarrier, optimizer, sreg, sync, tma, tma::Corner};
use crate::scores::OfColumns;
use crate::shape::{HOPPER_SLOTS, WideBackwardShape};
use crate::tile::panels::Panels;
use core::marker::PhantomData;

/// Dynamic shared memory of this block. Order in memory: K, V, the slots of Q, dO, P, dS; lse and shift by slot, delta; the
/// barriers of K with V, of the slots of Q, of dO, and of the warpgroups' turns; the findings, and one word for each key.
pub struct Tiles<S> {
    base: u32,
    shape: PhantomData<S>,
}

impl<S> Clone for Tiles<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Tiles<S> {}

impl<S: WideBackwardShape> Tiles<S> {
    #[inline(always)]
    pub fn of_this_block() -> Self {
        Self {
            base: sreg::dynamic_shared_mem(),
            shape: PhantomData,
        }
    }

    /// Returns this layout such that the compiler recomputes addresses that follow from it. Kept, the descriptors would
    /// occupy registers.
    #[inline(always)]
    pub fn renewed(self) -> Self {
        Self {
            base: optimizer::renew(self.base),
            ..self
        }
    }

    /// Initialises the barriers, by one thread, before the others continue.
    #[inline(always)]
    pub unsafe fn init(self) {
        if sreg::thread_idx_x() == 0 {
            // SAFETY: one thread runs this, and no other uses the barriers before the block's barrier.
            unsafe {
                self.owned_slots().init(1, 1, S::CONSUMERS);
                self.query_slots().init(HOPPER_SLOTS, 1, S::CONSUMERS * 4);
                self.dout_slots().init(1, 1, S::CONSUMERS * 4);
                for group in 0..S::CONSUMERS {
                    self.turn_slots(group).init(1, 1, 4);
                }
            }
            mbarrier::fence_init();
        }
        sync::sync_threads();
    }

    /// Starts to load K and V.
    #[inline(always)]
    pub unsafe fn load_keys(self, cursor: &mut Cursor<1>, maps: [u64; 2], corner: Corner) {
        // SAFETY: the barrier counts the bytes of both tiles.
        unsafe {
            let full = self.owned_slots().refill(*cursor, 2 * S::OWNED_BYTES);
            self.keys().load(maps[0], corner, full);
            self.values().load(maps[1], corner, full);
        }
        cursor.advance();
    }

    /// Starts to load the next tile of Q from its corner, with lse and shift, which start at index `row` of the workspace.
    #[inline(always)]
    pub unsafe fn load_queries(
        self,
        cursor: Cursor<HOPPER_SLOTS>,
        map: u64,
        (corner, row): (Corner, u64),
        sums: &QuerySums,
    ) {
        let (bytes, lines) = (S::COLUMNS * 4, self.statistics(cursor.slot));
        // SAFETY: the barrier counts the bytes of the tile and both runs.
        unsafe {
            let full = self.query_slots().refill(cursor, S::STREAMED_BYTES + 2 * bytes);
            self.queries(cursor.slot).load(map, corner, full);
            tma::load_run(lines.lse_log2, sums.exponents.lse_log2 + row * 4, bytes, full);
            tma::load_run(lines.shift, sums.exponents.shift + row * 4, bytes, full);
        }
    }

    /// Starts to load the next tile of dO from its corner, with delta, which starts at index `row` of the workspace.
    #[inline(always)]
    pub unsafe fn load_douts(self, cursor: Cursor<1>, map: u64, (corner, row): (Corner, u64), sums: &QuerySums) {
        let bytes = S::COLUMNS * 4;
        // SAFETY: the barrier counts the bytes of the tile and the run.
        unsafe {
            let full = self.dout_slots().refill(cursor, S::STREAMED_BYTES + bytes);
            self.douts().load(map, corner, full);
            tma::load_run(self.statistics(0).delta, sums.exponents.delta + row * 4, bytes, full);
        }
    }

    /// Returns the tile of K, and later of dK.
    #[inline(always)]
    pub fn keys(self) -> Panels {
        Panels::new(self.base, S::ROWS, S::HEAD_DIM)
    }

    /// Returns the tile of V, and later of dV.
    #[inline(always)]
    pub fn values(self) -> Panels {
        Panels::new(self.base + S::OWNED_BYTES, S::ROWS, S::HEAD_DIM)
    }

    /// Returns the tile of Q of a slot.
    #[inline(always)]
    pub fn queries(self, slot: u32) -> Panels {
        let base = self.base + 2 * S::OWNED_BYTES + slot * S::STREAMED_BYTES;
        Panels::new(base, S::COLUMNS, S::HEAD_DIM)
    }

    /// Returns the tile of dO.
    #[inline(always)]
    pub fn douts(self) -> Panels {
        self.queries(HOPPER_SLOTS)
    }

    /// Returns the tile of P, of all warpgroups.
    #[inline(always)]
    pub fn weights(self) -> Panels {
        let base = self.base + 2 * S::OWNED_BYTES + (HOPPER_SLOTS + 1) * S::STREAMED_BYTES;
        Panels::new(base, S::COLUMNS, S::ROWS)
    }

    /// Returns the tile of dS, of all warpgroups.
    #[inline(always)]
    pub fn score_gradients(self) -> Panels {
        let base = self.base + 2 * S::OWNED_BYTES + (HOPPER_SLOTS + 1) * S::STREAMED_BYTES + S::SCORES_BYTES;
        Panels::new(base, S::COLUMNS, S::ROWS)
    }

    /// Returns the statistics of the queries of a slot.
    #[inline(always)]
    pub fn statistics(self, slot: u32) -> OfColumns {
        let line = |index| self.base + S::TILES_BYTES + index * S::COLUMNS * 4;
        OfColumns {
            lse_log2: line(2 * slot),
            shift: line(2 * slot + 1),
            delta: line(2 * HOPPER_SLOTS),
        }
    }

    /// Returns the address of the first barrier.
    #[inline(always)]
    fn barriers(self) -> u32 {
        self.base + S::TILES_BYTES + (2 * HOPPER_SLOTS + 1) * S::COLUMNS * 4
    }

    /// Returns the pipeline of K and V.
    #[inline(always)]
    pub fn owned_slots(self) -> Slots {
        Slots::new(self.barriers())
    }

    /// Returns the pipeline of Q.
    #[inline(always)]
    pub fn query_slots(self) -> Slots {
        Slots::new(self.barriers() + Slots::BYTES)
    }

    /// Returns the pipeline of dO.
    #[inline(always)]
    pub fn dout_slots(self) -> Slots {
        Slots::new(self.barriers() + (1 + HOPPER_SLOTS) * Slots::BYTES)
    }

    /// Returns the pipeline of warpgroup `group`'s turns: filled when the warpgroup may add to dQ, emptied when it has.
    #[inline(always)]
    pub fn turn_slots(self, group: u32) -> Slots {
        Slots::new(self.barriers() + (2 + HOPPER_SLOTS + group) * Slots::BYTES)
    }

    /// Returns the address of the consumers' findings.
    #[inline(always)]
    pub fn findings(self) -> u32 {
        self.barriers() + (2 + HOPPER_SLOTS + S::CONSUMERS) * Slots::BYTES
    }

    /// Returns the address of one word for each key: the addend of its weights, 0, or NaN if the key was cleaned.
    #[inline(always)]
    pub fn taints(self) -> u32 {
        self.findings() + 16
    }
}
