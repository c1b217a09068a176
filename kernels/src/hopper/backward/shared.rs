//! Layout of a backward block's shared memory.

use crate::abi::QuerySums;
use crate::hopper::Shared;
use crate::pipeline::bulk::{Cursor, Slots};
use crate::ptx::{mbarrier, optimizer, sreg, sync, tma, tma::Corner};
use crate::scores::OfColumns;
use crate::shape::{HOPPER_ROWS, HOPPER_SLOTS, HopperBackwardShape};
use crate::tile::panels::Panels;

/// Order in memory: owned tiles by tensor and warpgroup, streamed tiles by tensor and slot, dS^T by slot and
/// warpgroup, dQ by warpgroup, lse and delta by slot; then the barriers of the owned tiles, of the slots, and of the
/// warpgroups.
impl<S: HopperBackwardShape> Shared<S> {
    /// Returns this layout such that the compiler recomputes addresses that follow from it. Kept, the descriptors of
    /// the owned tiles alone would occupy up to 64 registers.
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
                self.streamed_slots().init(HOPPER_SLOTS, 1, S::CONSUMERS * 4);
                for group in 0..S::CONSUMERS {
                    self.dq_slots(group).init(1, 4, 1);
                }
            }
            mbarrier::fence_init();
        }
        sync::sync_threads();
    }

    /// Starts to load the owned tiles, each warpgroup's from its own corner.
    #[inline(always)]
    pub unsafe fn load_owned(self, cursor: &mut Cursor<1>, maps: [u64; 2], corner: impl Fn(u32) -> Corner) {
        // SAFETY: the barrier counts the bytes of all boxes.
        unsafe {
            let full = self.owned_slots().refill(*cursor, 2 * S::CONSUMERS * S::OWNED_BYTES);
            for group in 0..S::CONSUMERS {
                let corner = corner(group);
                self.owned(0, group).load(maps[0], corner, full);
                self.owned(1, group).load(maps[1], corner, full);
            }
        }
        cursor.advance();
    }

    /// Starts to load the next streamed tiles of Q and dO, with the queries' statistics, which start at index `row`
    /// of the workspace.
    #[inline(always)]
    pub unsafe fn load_queries(
        self,
        cursor: &mut Cursor<HOPPER_SLOTS>,
        maps: [u64; 2],
        corner: Corner,
        sums: &QuerySums,
        row: u64,
    ) {
        let bytes = S::COLUMNS * 4;
        // SAFETY: the barrier counts the bytes of both tiles and both runs.
        unsafe {
            let full = self.streamed_slots().refill(*cursor, 2 * S::STREAMED_BYTES + 3 * bytes);
            self.streamed(0, cursor.slot).load(maps[0], corner, full);
            let OfColumns { lse_log2, delta, shift } = self.queries(cursor.slot);
            tma::load_run(lse_log2, sums.exponents.lse_log2 + row * 4, bytes, full);
            self.streamed(1, cursor.slot).load(maps[1], corner, full);
            tma::load_run(delta, sums.exponents.delta + row * 4, bytes, full);
            tma::load_run(shift, sums.exponents.shift + row * 4, bytes, full);
        }
        cursor.advance();
    }

    /// Returns owned tile `which` (K, V) of warpgroup `group`.
    #[inline(always)]
    pub fn owned(self, which: u32, group: u32) -> Panels {
        let base = self.base + (which * S::CONSUMERS + group) * S::OWNED_BYTES;
        Panels::new(base, HOPPER_ROWS, S::HEAD_DIM)
    }

    /// Returns streamed tile `which` (Q, dO) of a slot.
    #[inline(always)]
    pub fn streamed(self, which: u32, slot: u32) -> Panels {
        let owned = 2 * S::CONSUMERS * S::OWNED_BYTES;
        let base = self.base + owned + (which * HOPPER_SLOTS + slot) * S::STREAMED_BYTES;
        Panels::new(base, S::COLUMNS, S::HEAD_DIM)
    }

    /// Returns dS^T of warpgroup `group` with the queries of a slot.
    #[inline(always)]
    pub fn ds(self, slot: u32, group: u32) -> Panels {
        let base = self.streamed_end() + (slot * S::CONSUMERS + group) * S::DS_BYTES;
        Panels::new(base, HOPPER_ROWS, S::COLUMNS)
    }

    /// Returns the address of the dQ square of warpgroup `group`, on its way to device memory.
    #[inline(always)]
    pub fn dq(self, group: u32) -> u32 {
        self.streamed_end() + HOPPER_SLOTS * S::CONSUMERS * S::DS_BYTES + group * S::DQ_BYTES
    }

    #[inline(always)]
    fn streamed_end(self) -> u32 {
        self.base + 2 * (S::CONSUMERS * S::OWNED_BYTES + HOPPER_SLOTS * S::STREAMED_BYTES)
    }

    /// Returns the statistics of the queries of a slot.
    #[inline(always)]
    pub fn queries(self, slot: u32) -> OfColumns {
        let lse_log2 = self.base + S::TILES_BYTES + slot * 3 * S::COLUMNS * 4;
        OfColumns {
            lse_log2,
            delta: lse_log2 + S::COLUMNS * 4,
            shift: lse_log2 + 2 * S::COLUMNS * 4,
        }
    }

    /// Returns the address of the consumers' findings.
    #[inline(always)]
    pub fn findings(self) -> u32 {
        self.barriers() + (1 + HOPPER_SLOTS + S::CONSUMERS) * Slots::BYTES
    }

    /// Returns the address of one word for each key: the addend of its weights, 0, or NaN if the key was cleaned.
    #[inline(always)]
    pub fn row_words(self, group: u32) -> u32 {
        self.findings() + 16 + group * HOPPER_ROWS * 4
    }

    /// Returns the address of the first barrier.
    #[inline(always)]
    fn barriers(self) -> u32 {
        self.queries(HOPPER_SLOTS).lse_log2
    }

    /// Returns the pipeline of the owned tiles.
    #[inline(always)]
    pub fn owned_slots(self) -> Slots {
        Slots::new(self.barriers())
    }

    /// Returns the pipeline of the streamed tiles.
    #[inline(always)]
    pub fn streamed_slots(self) -> Slots {
        Slots::new(self.barriers() + Slots::BYTES)
    }

    /// Returns the pipeline of warpgroup `group`'s dQ.
    #[inline(always)]
    pub fn dq_slots(self, group: u32) -> Slots {
        Slots::new(self.barriers() + (1 + HOPPER_SLOTS + group) * Slots::BYTES)
    }
}
