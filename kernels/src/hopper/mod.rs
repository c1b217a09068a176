//! Attention with Hopper's own instructions: tiles copied by the tensor memory accelerator (TMA), products of
//! warpgroups (wgmma).
//!
//! All kernels here that multiply have the same structure. The first warpgroup is the producer: it loads tiles
//! through pipelines guarded by mbarriers, and keeps few registers. The others are consumers: each owns 64 rows of
//! the result and computes. Blocks are persistent, so the loads of the next tile of work overlap with the end of the
//! last one.

pub mod backward;
mod cluster;
pub mod forward;
pub mod fp8;
mod work;

use crate::ptx::{sreg, sync};
use crate::shape::MAX_CONSUMERS;
use core::marker::PhantomData;

/// Threads per warpgroup.
const WARPGROUP: u32 = 128;

/// Named barriers of a block. Barrier 0 is that of all threads; the hardware has 16.
#[derive(Clone, Copy)]
enum Barrier {
    /// All warps of consumer `group`.
    Group(u32),
    /// Consumer `group`, which waits for its turn, and the one before it, which passes the turn.
    Turn(u32),
    /// All consumers.
    Consumers,
}

impl Barrier {
    /// Returns the barrier's number in hardware.
    const fn id(self) -> u32 {
        match self {
            Self::Consumers => 1,
            Self::Group(group) => 2 + group,
            Self::Turn(group) => 2 + MAX_CONSUMERS + group,
        }
    }

    /// Waits for `threads` threads, including this one.
    ///
    /// # Safety
    /// The contract of [`sync::named_barrier_sync`].
    #[inline(always)]
    unsafe fn sync(self, threads: u32) {
        // SAFETY: the caller's contract; ids are distinct, asserted below.
        unsafe { sync::named_barrier_sync(self.id(), threads) }
    }

    /// Waits like [`sync`](Self::sync), and returns true if `predicate` holds for any of the threads.
    ///
    /// # Safety
    /// The contract of [`sync::named_barrier_sync`].
    #[inline(always)]
    unsafe fn sync_or(self, threads: u32, predicate: bool) -> bool {
        // SAFETY: the caller's contract; ids are distinct, asserted below.
        unsafe { sync::named_barrier_or(self.id(), threads, predicate) }
    }

    /// Arrives as one of `threads` threads, without waiting.
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

/// Returns the index of the warp in its warpgroup.
#[inline(always)]
fn warp_of_group() -> u32 {
    sreg::warp_id() % 4
}

/// Dynamic shared memory of this block. Each pass defines its layout for the shape `S`.
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
