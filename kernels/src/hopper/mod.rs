//! Attention by Hopper's own instructions: tiles copied by the tensor memory accelerator, products of warpgroups.
//!
//! Every kernel here that multiplies has the same cast. The first warpgroup loads, through rings of slots guarded by barriers; it keeps few
//! registers. The others each own 64 rows of the result and compute. Blocks stay for the whole launch and take one tile of
//! work after the other, so that the loads of the next overlap the end of the last.

pub mod backward;
pub mod forward;
mod work;

use crate::ptx::{sreg, sync};
use crate::shape::MAX_CONSUMERS;
use core::marker::PhantomData;

/// Threads of a warpgroup.
const WARPGROUP: u32 = 128;

/// Named barriers of a block. Barrier 0 is that of all threads, and the hardware has 16.
#[derive(Clone, Copy)]
enum Barrier {
    /// The whole of consumer `group`.
    Group(u32),
    /// Consumer `group`, whose turn it is, and the one before it, which says so.
    Turn(u32),
    /// All consumers.
    Consumers,
}

impl Barrier {
    /// The number that the hardware knows it by.
    const fn id(self) -> u32 {
        match self {
            Self::Consumers => 1,
            Self::Group(group) => 2 + group,
            Self::Turn(group) => 2 + MAX_CONSUMERS + group,
        }
    }

    /// Waits for `threads` threads, this one among them.
    ///
    /// # Safety
    /// The contract of [`sync::named_barrier_sync`].
    #[inline(always)]
    unsafe fn sync(self, threads: u32) {
        // SAFETY: the caller's contract; ids are distinct, asserted below.
        unsafe { sync::named_barrier_sync(self.id(), threads) }
    }

    /// Like [`sync`](Self::sync), and tells if `predicate` holds for any of them.
    ///
    /// # Safety
    /// The contract of [`sync::named_barrier_sync`].
    #[inline(always)]
    unsafe fn sync_or(self, threads: u32, predicate: bool) -> bool {
        // SAFETY: the caller's contract; ids are distinct, asserted below.
        unsafe { sync::named_barrier_or(self.id(), threads, predicate) }
    }

    /// Arrives as one of `threads` threads, and does not wait.
    ///
    /// # Safety
    /// The contract of [`sync::named_barrier_sync`].
    #[inline(always)]
    unsafe fn arrive(self, threads: u32) {
        // SAFETY: the caller's contract; ids are distinct, asserted below.
        unsafe { sync::named_barrier_arrive(self.id(), threads) }
    }
}

// Ids are distinct, none is 0, and all are below 16.
const _: () = {
    let mut used = 1_u32;
    let mut group = 0;
    while group <= MAX_CONSUMERS {
        let barriers = if group == MAX_CONSUMERS {
            [Barrier::Consumers, Barrier::Consumers]
        } else {
            [Barrier::Group(group), Barrier::Turn(group)]
        };
        let kinds = if group == MAX_CONSUMERS { 1 } else { 2 };
        let mut kind = 0;
        while kind < kinds {
            let id = barriers[kind].id();
            assert!(id < 16 && used >> id & 1 == 0);
            used |= 1 << id;
            kind += 1;
        }
        group += 1;
    }
};

/// Index of the warp in its warpgroup.
#[inline(always)]
fn warp_of_group() -> u32 {
    sreg::warp_id() % 4
}

/// This block's dynamic shared memory; each pass says what lies where in it, for the shape `S`.
struct Shared<S> {
    base: u32,
    shape: PhantomData<S>,
}

impl<S> Clone for Shared<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Shared<S> {}

impl<S> Shared<S> {
    #[inline(always)]
    fn of_this_block() -> Self {
        Self {
            base: sreg::dynamic_shared_mem(),
            shape: PhantomData,
        }
    }
}
