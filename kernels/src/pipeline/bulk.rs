//! Pipeline of tiles that one thread fills by asynchronous copies and several warpgroups empty.
//!
//! Each slot has two mbarriers: `full` ends a phase when the bytes of the tile have arrived, `empty` when every
//! consumer has finished with them. Producer and consumers go through the slots in the same order, each with its own
//! [`Cursor`], the pipeline state.
//!
//! Blocks of a cluster may fill their slots together: each loads a part of a tile into the same slot of all of them. Then a
//! slot is empty once the consumers of all blocks have finished with it, and each block's `empty` counts the arrivals of all.
//! Parts that another block loads may come before this one announces the bytes of the tile: only its arrival ends the phase.

use crate::ptx::mbarrier;

/// The barriers `full` and `empty` of each slot, in shared memory.
#[derive(Clone, Copy)]
pub struct Slots {
    barriers: u32,
}

/// Pipeline state: the next slot, and the parity of its phase.
#[derive(Clone, Copy)]
pub struct Cursor<const SLOTS: u32> {
    /// Index of the slot.
    pub slot: u32,
    parity: u32,
}

impl Slots {
    /// Bytes of the barriers of one slot.
    pub const BYTES: u32 = 2 * mbarrier::BYTES;

    /// Returns the slots whose barriers start at shared-window address `barriers`.
    #[inline(always)]
    pub fn new(barriers: u32) -> Self {
        Self { barriers }
    }

    /// Initialises the barriers of `slots` slots. A slot is filled by `producers` arrivals and emptied by `consumers`
    /// arrivals.
    ///
    /// # Safety
    /// One thread calls it, once, before any thread uses the slots.
    #[inline(always)]
    pub unsafe fn init(self, slots: u32, producers: u32, consumers: u32) {
        for slot in 0..slots {
            // SAFETY: the caller's contract.
            unsafe {
                mbarrier::init(self.full(slot), producers);
                mbarrier::init(self.empty(slot), consumers);
            }
        }
    }

    #[inline(always)]
    fn full(self, slot: u32) -> u32 {
        self.barriers + slot * Self::BYTES
    }

    #[inline(always)]
    fn empty(self, slot: u32) -> u32 {
        self.full(slot) + mbarrier::BYTES
    }

    /// Producer: waits until the slot is empty and announces `bytes`; returns the barrier that counts them.
    ///
    /// # Safety
    /// The slots are initialised, and copies of exactly `bytes` bytes follow.
    #[inline(always)]
    pub unsafe fn refill<const SLOTS: u32>(self, cursor: Cursor<SLOTS>, bytes: u32) -> u32 {
        let full = self.full(cursor.slot);
        // SAFETY: the caller's contract.
        unsafe {
            self.wait_empty(cursor);
            mbarrier::arrive_expecting(full, bytes);
        }
        full
    }

    /// Producer: waits until the slot is empty.
    ///
    /// # Safety
    /// The slots are initialised.
    #[inline(always)]
    pub unsafe fn wait_empty<const SLOTS: u32>(self, cursor: Cursor<SLOTS>) {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::wait(self.empty(cursor.slot), cursor.parity ^ 1) }
    }

    /// Producer: one of the arrivals that fill the slot, for data that was written without a copy.
    ///
    /// # Safety
    /// The slot was empty, and the threads for which this one arrives have written their data.
    #[inline(always)]
    pub unsafe fn fill<const SLOTS: u32>(self, cursor: Cursor<SLOTS>) {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::arrive(self.full(cursor.slot)) }
    }

    /// Consumer: waits until the slot is full.
    ///
    /// # Safety
    /// The slots are initialised.
    #[inline(always)]
    pub unsafe fn acquire<const SLOTS: u32>(self, cursor: Cursor<SLOTS>) {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::wait(self.full(cursor.slot), cursor.parity) }
    }

    /// Consumer: whether the slot is full, which then is as good as [`acquire`](Self::acquire).
    ///
    /// # Safety
    /// The slots are initialised.
    #[inline(always)]
    pub unsafe fn is_full<const SLOTS: u32>(self, cursor: Cursor<SLOTS>) -> bool {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::has_ended(self.full(cursor.slot), cursor.parity) }
    }

    /// Consumer: one of the arrivals that empty slot `slot`.
    ///
    /// # Safety
    /// The slot was acquired, and the threads for which this one arrives have finished with it.
    #[inline(always)]
    pub unsafe fn release(self, slot: u32) {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::arrive(self.empty(slot)) }
    }

    /// Consumer: one of the arrivals that empty slot `slot` of block `rank` of the cluster.
    ///
    /// # Safety
    /// The contract of [`release`](Self::release); the threads for which this one arrives only read; and that block has started
    /// and does not end before.
    #[inline(always)]
    pub unsafe fn release_in(self, slot: u32, rank: u32) {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::arrive_in(self.empty(slot), rank) }
    }
}

impl<const SLOTS: u32> Cursor<SLOTS> {
    /// Returns the state at the first use of the first slot.
    #[inline(always)]
    pub fn start() -> Self {
        Self { slot: 0, parity: 0 }
    }

    /// Advances to the next slot.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.slot += 1;
        if self.slot == SLOTS {
            self.slot = 0;
            self.parity ^= 1;
        }
    }

    /// Returns the previous slot, for its release. It is not a whole state: past the end of the slots the parity
    /// differs.
    #[inline(always)]
    pub fn previous_slot(self) -> u32 {
        if self.slot == 0 { SLOTS - 1 } else { self.slot - 1 }
    }
}

impl Cursor<2> {
    /// Returns the state after this many advances.
    #[inline(always)]
    pub fn after(advances: u32) -> Self {
        Self {
            slot: advances & 1,
            parity: advances >> 1 & 1,
        }
    }

    /// Returns the state of a one-slot pipeline that advances in step with this one.
    #[inline(always)]
    pub fn of_single(self) -> Cursor<1> {
        Cursor {
            slot: 0,
            parity: self.slot,
        }
    }
}
