//! Layout of a block's shared memory: queries by warpgroup, slots of keys, slots of loaded values, transposed values, notes; then
//! the barriers, as those of [`forward`](crate::hopper::forward).

use crate::hopper::Shared;
use crate::pipeline::bulk::Slots;
use crate::shape::{CodeShape, FP8_NOTES_BYTES, HOPPER_ROWS, HOPPER_SLOTS, HopperShape as _};
use crate::tile::panels::Panels;

impl<S: CodeShape> Shared<S> {
    /// Returns the queries of warpgroup `group`.
    #[inline(always)]
    pub fn query_codes(self, group: u32) -> Panels {
        Panels::new(self.base + group * S::QUERY_BYTES, HOPPER_ROWS, S::HEAD_DIM / 2)
    }

    /// Returns a slot of keys.
    #[inline(always)]
    pub fn key_codes(self, slot: u32) -> Panels {
        let base = self.base + S::CONSUMERS * S::QUERY_BYTES + slot * S::TILE_BYTES;
        Panels::new(base, S::BLOCK_N, S::HEAD_DIM / 2)
    }

    /// Returns a slot of values as they are loaded.
    #[inline(always)]
    pub fn loaded_codes(self, slot: u32) -> Panels {
        self.key_codes(HOPPER_SLOTS + slot)
    }

    /// Returns the rows of 128 keys that hold the transposed values of a slot, from [`first_place`](Self::first_place) on.
    #[inline(always)]
    pub fn value_rows(self, slot: u32) -> Panels {
        let first = if S::BLOCK_N == 128 { slot * S::HEAD_DIM * 128 } else { 0 };
        Panels::new(self.values() + first, S::HEAD_DIM, 64)
    }

    /// Returns the first place of a slot in its rows: of 64 keys a row, two slots share rows.
    #[inline(always)]
    pub fn first_place(self, slot: u32) -> u32 {
        if S::BLOCK_N == 128 { 0 } else { slot * S::BLOCK_N }
    }

    /// Returns the transposed values of a slot as a product takes them: along the rows.
    #[inline(always)]
    pub fn value_codes(self, slot: u32) -> Panels {
        let bytes = if S::BLOCK_N == 128 {
            S::HEAD_DIM * 128
        } else {
            S::BLOCK_N
        };
        Panels::new(self.values() + slot * bytes, S::HEAD_DIM, S::BLOCK_N / 2)
    }

    #[inline(always)]
    fn values(self) -> u32 {
        self.base + S::CONSUMERS * S::QUERY_BYTES + 2 * HOPPER_SLOTS * S::TILE_BYTES
    }

    #[inline(always)]
    fn notes(self) -> u32 {
        self.base + S::TILES_BYTES - FP8_NOTES_BYTES
    }

    /// Returns the pipeline of the loaded values, between the copies and the warps that transpose them.
    #[inline(always)]
    pub fn loaded_slots(self) -> Slots {
        Slots::new(self.notes())
    }

    /// Returns the address of the scales of a slot of keys: four f32.
    #[inline(always)]
    pub fn scales(self, slot: u32) -> u32 {
        self.notes() + HOPPER_SLOTS * 16 + slot * 16
    }

    /// Returns the address of four words of a slot of transposed values, one of each warp of the producer: not 0 if it found NaN in a
    /// tile with hidden pairs.
    #[inline(always)]
    pub fn found_nan(self, slot: u32) -> u32 {
        self.notes() + HOPPER_SLOTS * 32 + slot * 16
    }
}
