//! Pipelines of streamed tiles.
//!
//! While tiles are multiplied, `cp.async` loads the next ones. A slot is refilled once every warp has finished with
//! its content. Forward needs one tile at a time and has a pipeline of single tiles; backward needs two together.

pub mod bulk;

use crate::block::split;
use crate::ptx::{copy, sreg, sync};
use crate::scores::OfColumns;
use crate::shape::TileShape;
use crate::tile::{
    global::{GlobalTile, Walk},
    shared::SharedTile,
};
use core::marker::PhantomData;

/// Pipeline of the tiles K0 V0 K1 V1 … with `STAGES` slots.
pub struct KeyValueRing<S> {
    base: u32,
    k: Walk,
    v: Walk,
    shape: PhantomData<S>,
}

impl<S: TileShape> KeyValueRing<S> {
    /// Starts to load the first tiles of `k` and `v` into the slots at shared address `base`. The wait for the first
    /// key tile also covers copies that the caller started before (the query tile).
    ///
    /// # Safety
    /// Only this pipeline uses the slots; `k` and `v` are readable. Every thread of the block calls this, and each
    /// `acquire`.
    #[inline(always)]
    pub unsafe fn start(base: u32, k: GlobalTile, v: GlobalTile) -> Self {
        let walk = |window| Walk::new(window, split::<S>());
        let mut ring = Self {
            base,
            k: walk(k),
            v: walk(v),
            shape: PhantomData,
        };
        for tile in 0..S::STAGES - 1 {
            // SAFETY: the slots are fresh.
            unsafe { ring.fetch(tile, tile % 2 == 0) }
        }
        ring
    }

    /// Waits for key tile `n`. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// Called in the order K0 V0 K1 V1 … by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire_key(&mut self, n: u32) -> SharedTile {
        // SAFETY: the caller's contract.
        unsafe { self.acquire(n * 2, false) }
    }

    /// Waits for value tile `n`. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// The contract of [`KeyValueRing::acquire_key`].
    #[inline(always)]
    pub unsafe fn acquire_value(&mut self, n: u32) -> SharedTile {
        // SAFETY: the caller's contract.
        unsafe { self.acquire(n * 2 + 1, true) }
    }

    /// Waits until no copy is in flight and every warp has finished: shared memory is then free for other uses.
    #[inline(always)]
    pub fn drain(&self) {
        drain();
    }

    /// Acquires a tile. STAGES is even, so a key tile is replaced by a value tile, and a value tile by a key tile.
    #[inline(always)]
    unsafe fn acquire(&mut self, tile: u32, fetch_key: bool) -> SharedTile {
        // This thread's part of `tile` has landed once at most STAGES - 2 newer groups are in flight.
        if S::STAGES == 4 {
            copy::cp_async_wait::<2>();
        } else {
            copy::cp_async_wait::<0>();
        }
        // This barrier closes two hazards: the other threads' parts of `tile` have landed, and they no longer read
        // `tile - 1`, whose slot `tile + STAGES - 1` will fill.
        sync::sync_threads();
        // SAFETY: the barrier above.
        unsafe { self.fetch(tile + S::STAGES - 1, fetch_key) }
        self.slot(tile)
    }

    /// Starts to load `tile` and commits its group. Past the end of the windows nothing is read, and the slot is
    /// filled with zeros that are never used.
    #[inline(always)]
    unsafe fn fetch(&mut self, tile: u32, key: bool) {
        let slot = self.slot(tile);
        let source = if key { &mut self.k } else { &mut self.v };
        // SAFETY: the contracts of `start` and `acquire`.
        unsafe { slot.load_async(source, S::COLUMNS) }
        copy::cp_async_commit();
    }

    #[inline(always)]
    fn slot(&self, tile: u32) -> SharedTile {
        SharedTile::new(self.base + tile % S::STAGES * S::STREAMED_BYTES, S::ROW_BYTES)
    }
}

/// Two tiles of the same rows, and three f32 per row, which backward streams.
#[derive(Clone, Copy)]
pub struct Stage {
    /// K or Q.
    pub first: SharedTile,
    /// V or dO.
    pub second: SharedTile,
    /// Statistics of the rows, if queries are streamed.
    pub queries: OfColumns,
}

/// Statistics of streamed queries.
#[derive(Clone, Copy)]
pub struct StreamedRows {
    /// Device addresses of lse_log2, delta and shift of row 0.
    pub lines: [u64; 3],
    /// Number of rows that exist.
    pub rows: u32,
}

/// Pipeline of pairs of tiles with two alternating stages.
pub struct PairRing<S> {
    base: u32,
    first: Walk,
    second: Walk,
    statistics: Option<StreamedRows>,
    shape: PhantomData<S>,
}

impl<S: TileShape> PairRing<S> {
    /// Bytes of one stage: two tiles and three f32 per row.
    const STAGE_BYTES: u32 = 2 * S::STREAMED_BYTES + 3 * 4 * S::COLUMNS;

    /// Starts to load pair `n` into the stages at shared address `base`; `first` and `second` start at the rows of
    /// that pair. The wait for it also covers copies that the caller started before (the owned tiles).
    ///
    /// # Safety
    /// Only this pipeline uses the stages; the windows are readable. Every thread of the block calls this, and each
    /// `acquire`.
    #[inline(always)]
    pub unsafe fn start(
        base: u32,
        n: u32,
        first: GlobalTile,
        second: GlobalTile,
        statistics: Option<StreamedRows>,
    ) -> Self {
        let walk = |window| Walk::new(window, split::<S>());
        let mut ring = Self {
            base,
            first: walk(first),
            second: walk(second),
            statistics,
            shape: PhantomData,
        };
        // SAFETY: the stages are fresh.
        unsafe { ring.fetch(n) }
        ring
    }

    /// Waits for pair `n` and starts to load the next. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// Called in order, from `start`'s `n` on, by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire(&mut self, n: u32) -> Stage {
        copy::cp_async_wait::<0>();
        // This barrier closes two hazards: the other threads' parts of pair `n` have landed, and they no longer read
        // pair `n - 1`, whose stage pair `n + 1` will fill.
        sync::sync_threads();
        // SAFETY: the barrier above.
        unsafe { self.fetch(n + 1) }
        self.stage(n)
    }

    /// Waits until no copy is in flight and every warp has finished: shared memory is then free for other uses.
    #[inline(always)]
    pub fn drain(&self) {
        drain();
    }

    /// Starts to load pair `n` and commits its group. Past the end nothing is read, and the stage is filled with
    /// zeros.
    #[inline(always)]
    unsafe fn fetch(&mut self, n: u32) {
        let stage = self.stage(n);
        // SAFETY: the contracts of `start` and `acquire`; statistics are read only of rows that exist.
        unsafe {
            stage.first.load_async(&mut self.first, S::COLUMNS);
            stage.second.load_async(&mut self.second, S::COLUMNS);
            if let Some(statistics) = self.statistics {
                let thread = sreg::thread_idx_x();
                if thread < S::COLUMNS {
                    let row = n * S::COLUMNS + thread;
                    let bytes = if row < statistics.rows { 4 } else { 0 };
                    let OfColumns { lse_log2, delta, shift } = stage.queries;
                    let targets = [lse_log2, delta, shift];
                    for i in 0..3 {
                        copy::cp_async_4(targets[i] + thread * 4, statistics.lines[i] + row as u64 * 4, bytes);
                    }
                }
            }
        }
        copy::cp_async_commit();
    }

    #[inline(always)]
    fn stage(&self, n: u32) -> Stage {
        let base = self.base + n % 2 * Self::STAGE_BYTES;
        let lse = base + 2 * S::STREAMED_BYTES;
        Stage {
            first: SharedTile::new(base, S::ROW_BYTES),
            second: SharedTile::new(base + S::STREAMED_BYTES, S::ROW_BYTES),
            queries: OfColumns {
                lse_log2: lse,
                delta: lse + 4 * S::COLUMNS,
                shift: lse + 8 * S::COLUMNS,
            },
        }
    }
}

#[inline(always)]
fn drain() {
    copy::cp_async_wait::<0>();
    sync::sync_threads();
}
