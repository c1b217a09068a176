//! The shared memory of a block of the forward kernel.

use crate::hopper::Shared;
use crate::pipeline::bulk::Slots;
use crate::shape::{HOPPER_ROWS, HOPPER_SLOTS, HopperShape};
use crate::tile::panels::Panels;

/// Order in memory: queries by warpgroup, slots of keys, slots of values, barriers.
impl<S: HopperShape> Shared<S> {
    /// Returns the queries of warpgroup `group`, which its output replaces later.
    #[inline(always)]
    pub(in crate::hopper) fn query(self, group: u32) -> Panels {
        Panels::new(self.base + group * S::QUERY_BYTES, HOPPER_ROWS, S::HEAD_DIM)
    }

    /// Returns a slot of keys.
    #[inline(always)]
    pub(super) fn key(self, slot: u32) -> Panels {
        self.tile(slot)
    }

    /// Returns a slot of values.
    #[inline(always)]
    pub(super) fn value(self, slot: u32) -> Panels {
        self.tile(HOPPER_SLOTS + slot)
    }

    #[inline(always)]
    fn tile(self, slot: u32) -> Panels {
        let base = self.base + S::CONSUMERS * S::QUERY_BYTES + slot * S::TILE_BYTES;
        Panels::new(base, S::BLOCK_N, S::HEAD_DIM)
    }

    /// Returns the pipeline of the queries.
    #[inline(always)]
    pub(in crate::hopper) fn query_slots(self) -> Slots {
        Slots::new(self.base + S::TILES_BYTES)
    }

    /// Returns the pipeline of the keys.
    #[inline(always)]
    pub(in crate::hopper) fn key_slots(self) -> Slots {
        Slots::new(self.base + S::TILES_BYTES + Slots::BYTES)
    }

    /// Returns the address of a flag: values that consumer `group` uses were cleaned.
    #[inline(always)]
    pub(super) fn cleaned(self, group: u32) -> u32 {
        self.base + S::TILES_BYTES + (1 + 2 * HOPPER_SLOTS) * Slots::BYTES + group * 4
    }

    /// Returns the pipeline of the values.
    #[inline(always)]
    pub(in crate::hopper) fn value_slots(self) -> Slots {
        Slots::new(self.base + S::TILES_BYTES + (1 + HOPPER_SLOTS) * Slots::BYTES)
    }
}
