//! The pipeline of latent attention: keys and values that may be the same rows.

use super::{InRuns, Order as _, drain};
use crate::block::split;
use crate::lists::Runs;
use crate::ptx::{copy, sync};
use crate::shape::TileSizes;
use crate::tile::{
    global::{GlobalTile, Paged, Walk},
    shared::SharedTile,
};

/// Pipeline of tiles with two slots. Values that are the first columns of their keys are loaded with them, so that the tiles are
/// K0 K1 …, and two are in flight or in use. Other values have tiles of their own, K0 V0 K1 V1 …, each in a slot for its kind.
pub struct LatentRing<S> {
    base: u32,
    k: Walk<Paged>,
    v: Walk<Paged>,
    order: InRuns<S>,
    values_are_keys: bool,
}

impl<S: TileSizes> LatentRing<S> {
    /// Starts to load the first tile of `runs` into the first of the two slots at shared address `base`; tile `n` is the n-th of all runs.
    ///
    /// # Safety
    /// Only this pipeline uses the slots, the second from [`acquire_key`](Self::acquire_key) on; `k` and `v` are readable, and the same
    /// rows if `values_are_keys`. The runs are readable, and lie in the windows, past which only their last tile may reach. Every thread of
    /// the block calls this, and each `acquire`.
    #[inline(always)]
    pub unsafe fn start(
        base: u32,
        k: GlobalTile<Paged>,
        v: GlobalTile<Paged>,
        values_are_keys: bool,
        runs: Runs,
    ) -> Self {
        let (mut k, mut v) = (Walk::new(k, split::<S>()), Walk::new(v, split::<S>()));
        // SAFETY: the caller's contract.
        unsafe {
            let order = InRuns::start(runs, &mut k, &mut v);
            let mut ring = Self {
                base,
                k,
                v,
                order,
                values_are_keys,
            };
            ring.fetch_key(0);
            if values_are_keys {
                ring.order.next(&mut ring.k, &mut ring.v);
            }
            ring
        }
    }

    /// Waits for key tile `n`. It is valid until value tile `n` is acquired.
    ///
    /// # Safety
    /// Called in the order K0 V0 K1 V1 … by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire_key(&mut self, n: u32) -> SharedTile {
        Self::wait();
        // SAFETY: the caller's contract. No thread reads the other slot: before the barrier all have finished with tile `n - 1`.
        unsafe {
            if self.values_are_keys {
                self.fetch_key((n + 1) % 2);
            } else {
                self.slot(1).load_async(&mut self.v, S::COLUMNS);
                copy::cp_async_commit();
            }
            self.order.next(&mut self.k, &mut self.v);
        }
        self.slot(self.slot_of_key(n))
    }

    /// Waits for value tile `n`, and until every warp has finished with key tile `n`. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// The contract of [`acquire_key`](Self::acquire_key).
    #[inline(always)]
    pub unsafe fn acquire_value(&mut self, n: u32) -> SharedTile {
        if self.values_are_keys {
            sync::sync_threads();
            return self.slot(self.slot_of_key(n));
        }
        Self::wait();
        // SAFETY: the caller's contract, and the barrier.
        unsafe { self.fetch_key(0) }
        self.slot(1)
    }

    /// Waits until no copy is in flight and every warp has finished: shared memory is then free for other uses.
    #[inline(always)]
    pub fn drain(&self) {
        drain();
    }

    /// Waits for the tile that is in flight, and for all threads.
    #[inline(always)]
    fn wait() {
        copy::cp_async_wait::<0>();
        sync::sync_threads();
    }

    /// Starts to load the next tile of keys and commits its group. Past the end of the window nothing is read, and the slot is filled
    /// with zeros that are never used.
    #[inline(always)]
    unsafe fn fetch_key(&mut self, slot: u32) {
        // SAFETY: the contracts of `start` and `acquire_key`.
        unsafe { self.slot(slot).load_async(&mut self.k, S::COLUMNS) }
        copy::cp_async_commit();
    }

    #[inline(always)]
    fn slot_of_key(&self, n: u32) -> u32 {
        if self.values_are_keys { n % 2 } else { 0 }
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> SharedTile {
        SharedTile::new(self.base + slot * S::STREAMED_BYTES, S::ROW_BYTES)
    }
}
