//! Pipelines of streamed tiles.
//!
//! While tiles are multiplied, `cp.async` loads the next ones. A slot is refilled once every warp has finished with
//! its content. Forward needs one tile at a time and has a pipeline of single tiles; backward needs two together.

pub mod bulk;
pub mod latent;

use crate::block::split;
use crate::lists::Runs;
use crate::ptx::{copy, optimizer, program, sreg, sync};
use crate::scores::OfColumns;
use crate::shape::{TileShape, TileSizes};
use crate::tile::{
    global::{Even, GlobalTile, Paged, Places, Walk},
    shared::{SharedTile, Split},
};
use core::marker::PhantomData;

/// Order of the tiles of a window.
pub trait Order {
    /// Places of the window's rows.
    type Places: Places;

    /// Moves both walks, at the end of a tile, to the next tile.
    ///
    /// # Safety
    /// The memory that the order reads, such as lists of runs, is readable.
    unsafe fn next(&mut self, k: &mut Walk<Self::Places>, v: &mut Walk<Self::Places>);
}

/// First to last.
pub struct InOrder;

impl Order for InOrder {
    type Places = Even;

    #[inline(always)]
    unsafe fn next(&mut self, _: &mut Walk, _: &mut Walk) {}
}

/// The tiles of listed runs.
pub struct InRuns<S> {
    runs: Runs,
    /// Next run.
    run: u32,
    /// Tiles that are left of this one.
    left: u32,
    shape: PhantomData<S>,
}

impl<S: TileSizes> InRuns<S> {
    /// Moves the walks to the first tile.
    ///
    /// # Safety
    /// The runs are readable.
    #[inline(always)]
    unsafe fn start(runs: Runs, k: &mut Walk<Paged>, v: &mut Walk<Paged>) -> Self {
        let mut order = Self {
            runs,
            run: 0,
            left: 1,
            shape: PhantomData,
        };
        // SAFETY: the caller's contract.
        unsafe { order.next(k, v) }
        order
    }
}

impl<S: TileSizes> Order for InRuns<S> {
    type Places = Paged;

    /// Past the last run, moves to the end of the windows, where nothing is read.
    #[inline(always)]
    unsafe fn next(&mut self, k: &mut Walk<Paged>, v: &mut Walk<Paged>) {
        self.left -= 1;
        if self.left > 0 {
            return;
        }
        let mut row = k.rows();
        self.left = u32::MAX;
        while self.run < self.runs.count {
            // SAFETY: the caller's contract.
            let run = unsafe { self.runs.get(self.run) };
            self.run += 1;
            if run.begin < run.end {
                (row, self.left) = (run.begin * S::COLUMNS, run.end - run.begin);
                break;
            }
        }
        k.seek(row);
        v.seek(row);
    }
}

/// Pipeline of the tiles K0 V0 K1 V1 … with `STAGES` slots. If a step has several tiles, all of keys come before all of values: K0 K1 V0
/// V1 K2 K3 V2 V3 …
pub struct KeyValueRing<S, O: Order = InOrder> {
    base: u32,
    k: Walk<O::Places>,
    v: Walk<O::Places>,
    order: O,
    shape: PhantomData<S>,
}

impl<S: TileShape> KeyValueRing<S> {
    /// Starts to load the first tiles of `k` and `v` into the slots at shared address `base`, divided among threads as in `split`. The
    /// wait for the first key tile also covers copies that the caller started before (the query tile).
    ///
    /// # Safety
    /// Only this pipeline uses the slots; `k` and `v` are readable. Every thread of the block calls this, and each
    /// `acquire`.
    #[inline(always)]
    pub unsafe fn start(base: u32, k: GlobalTile, v: GlobalTile, split: Split) -> Self {
        let walk = |window| Walk::new(window, split);
        let mut ring = Self {
            base,
            k: walk(k),
            v: walk(v),
            order: InOrder,
            shape: PhantomData,
        };
        // SAFETY: the slots are fresh.
        unsafe { ring.fetch_first() }
        ring
    }
}

impl<S: TileShape> KeyValueRing<S, InRuns<S>> {
    /// Starts to load the first tiles of `runs` like [`KeyValueRing::start`]; tile `n` is the n-th of all runs.
    ///
    /// # Safety
    /// The contract of [`KeyValueRing::start`]; the runs are readable, and lie in the windows, past which only their last tile may reach.
    #[inline(always)]
    pub unsafe fn start_runs(base: u32, k: GlobalTile<Paged>, v: GlobalTile<Paged>, split: Split, runs: Runs) -> Self {
        let (mut k, mut v) = (Walk::new(k, split), Walk::new(v, split));
        // SAFETY: the caller's contract.
        unsafe {
            let order = InRuns::start(runs, &mut k, &mut v);
            let mut ring = Self {
                base,
                k,
                v,
                order,
                shape: PhantomData,
            };
            ring.fetch_first();
            ring
        }
    }
}

impl<S: TileShape, O: Order> KeyValueRing<S, O> {
    /// Number of tiles of a step, keys before values.
    const CYCLE: u32 = 2 * S::STEP_TILES;

    /// Starts to load the first tiles.
    ///
    /// # Safety
    /// The slots are fresh.
    #[inline(always)]
    unsafe fn fetch_first(&mut self) {
        for tile in 0..S::STAGES - 1 {
            // SAFETY: the caller's contract.
            unsafe { self.fetch(tile, tile % Self::CYCLE) }
        }
    }

    /// Waits for key tile `part` of step `n`. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// Called in the order of the tiles by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire_key(&mut self, n: u32, part: u32) -> SharedTile {
        // SAFETY: the caller's contract.
        unsafe { self.acquire(n, part) }
    }

    /// Waits for value tile `part` of step `n`. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// The contract of [`KeyValueRing::acquire_key`].
    #[inline(always)]
    pub unsafe fn acquire_value(&mut self, n: u32, part: u32) -> SharedTile {
        // SAFETY: the caller's contract.
        unsafe { self.acquire(n, S::STEP_TILES + part) }
    }

    /// Waits until no copy is in flight and every warp has finished: shared memory is then free for other uses.
    #[inline(always)]
    pub fn drain(&self) {
        drain();
    }

    /// Acquires tile `at` of step `n`.
    #[inline(always)]
    unsafe fn acquire(&mut self, n: u32, at: u32) -> SharedTile {
        let tile = n * Self::CYCLE + at;
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
        unsafe { self.fetch(tile + S::STAGES - 1, (at + S::STAGES - 1) % Self::CYCLE) }
        self.slot(tile)
    }

    /// Starts to load `tile`, which is tile `at` of its step, and commits its group. Past the end of the windows nothing is read, and the
    /// slot is filled with zeros that are never used.
    #[inline(always)]
    unsafe fn fetch(&mut self, tile: u32, at: u32) {
        let slot = self.slot(tile);
        let source = if at < S::STEP_TILES {
            &mut self.k
        } else {
            // All keys of the step were loaded before. A count of their own would occupy a register during the whole loop.
            if O::Places::ARE_EVEN && !program::SAVES_REGISTERS {
                let behind = (Self::CYCLE - at) * S::TILE_COLUMNS;
                self.v.set_left(self.k.left() + behind as i32);
            }
            &mut self.v
        };
        // SAFETY: the contracts of `start` and `acquire`.
        unsafe { slot.load_async(source, S::TILE_COLUMNS) }
        copy::cp_async_commit();
        if at == Self::CYCLE - 1 {
            // SAFETY: the runs are readable.
            unsafe { self.order.next(&mut self.k, &mut self.v) }
        }
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
    /// Device addresses of lse_log2, delta and shift of row 0, or of all heads for `acquire_listed`.
    pub lines: [u64; 3],
    /// Number of rows that exist.
    pub rows: u32,
    /// Number of heads before the rows, for [`PairRing::acquire_listed`]. It computes addresses from the number for each pair: kept, they
    /// would occupy registers during the whole loop.
    pub head: u32,
    /// Number of rows of a head.
    pub rows_of_head: u32,
    /// Number of rows of the head before row 0.
    pub begin: u32,
}

impl StreamedRows {
    /// Returns the addresses of row 0.
    #[inline(always)]
    fn renewed_lines(&self) -> [u64; 3] {
        let first = optimizer::renew(self.head) as u64 * self.rows_of_head as u64 + self.begin as u64;
        self.lines.map(|line| line + first * 4)
    }
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
    const STAGE_BYTES: u32 = 2 * S::STREAMED_BYTES + S::STATISTICS_BYTES;

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
        let mut ring = Self::new(base, first, second, statistics);
        // SAFETY: the stages are fresh.
        unsafe { ring.fetch(n, n * S::COLUMNS, ring.lines()) }
        ring
    }

    /// Starts to load pair 0 from row `row` of the windows, for [`acquire_listed`](Self::acquire_listed).
    ///
    /// # Safety
    /// The contract of [`start`](Self::start).
    #[inline(always)]
    pub unsafe fn start_at(
        base: u32,
        row: u32,
        first: GlobalTile,
        second: GlobalTile,
        statistics: Option<StreamedRows>,
    ) -> Self {
        let mut ring = Self::new(base, first, second, statistics);
        // SAFETY: the stages are fresh.
        unsafe { ring.fetch_from(0, row) }
        ring
    }

    #[inline(always)]
    fn new(base: u32, first: GlobalTile, second: GlobalTile, statistics: Option<StreamedRows>) -> Self {
        let walk = |window| Walk::new(window, split::<S>());
        Self {
            base,
            first: walk(first),
            second: walk(second),
            statistics,
            shape: PhantomData,
        }
    }

    /// Waits for pair `n` and starts to load the next. It is valid until the next `acquire`.
    ///
    /// # Safety
    /// Called in order, from `start`'s `n` on, by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire(&mut self, n: u32) -> Stage {
        Self::wait();
        // SAFETY: the barrier in `wait`.
        unsafe { self.fetch(n + 1, (n + 1) * S::COLUMNS, self.lines()) }
        self.stage(n)
    }

    /// Waits for pair `n`, and starts to load pair `n + 1` from row `next` of the windows, where nothing is read if they have fewer
    /// rows. It is valid until the next `acquire_listed`.
    ///
    /// # Safety
    /// Called in order, from 0 on, by every thread of the block.
    #[inline(always)]
    pub unsafe fn acquire_listed(&mut self, n: u32, next: u32) -> Stage {
        Self::wait();
        // SAFETY: the barrier in `wait`.
        unsafe { self.fetch_from(n + 1, next) }
        self.stage(n)
    }

    /// Waits for the pair that is in flight.
    #[inline(always)]
    fn wait() {
        copy::cp_async_wait::<0>();
        // This barrier closes two hazards: the other threads' parts of pair `n` have landed, and they no longer read
        // pair `n - 1`, whose stage pair `n + 1` will fill.
        sync::sync_threads();
    }

    /// Waits until no copy is in flight and every warp has finished: shared memory is then free for other uses.
    #[inline(always)]
    pub fn drain(&self) {
        drain();
    }

    /// [`fetch`](Self::fetch) from row `row` of the windows.
    #[inline(always)]
    unsafe fn fetch_from(&mut self, n: u32, row: u32) {
        self.first.seek(row);
        self.second.seek(row);
        let lines = (self.statistics.as_ref()).map_or([0; 3], StreamedRows::renewed_lines);
        // SAFETY: the caller's contract.
        unsafe { self.fetch(n, row, lines) }
    }

    /// Returns the addresses of the statistics of row 0, if there are any.
    #[inline(always)]
    fn lines(&self) -> [u64; 3] {
        self.statistics.map_or([0; 3], |statistics| statistics.lines)
    }

    /// Starts to load pair `n`, whose statistics start at row `first_row` of `lines`, and commits its group. Past the end nothing is
    /// read, and the stage is filled with zeros.
    #[inline(always)]
    unsafe fn fetch(&mut self, n: u32, first_row: u32, lines: [u64; 3]) {
        let stage = self.stage(n);
        // SAFETY: the contracts of `start` and `acquire`; statistics are read only of rows that exist.
        unsafe {
            // Both have the same rows. Two counts would occupy two registers during the whole loop.
            if !program::SAVES_REGISTERS {
                self.second.set_left(self.first.left());
            }
            stage.first.load_async(&mut self.first, S::COLUMNS);
            stage.second.load_async(&mut self.second, S::COLUMNS);
            if let Some(statistics) = self.statistics {
                let thread = sreg::thread_idx_x();
                if thread < S::COLUMNS {
                    let row = first_row + thread;
                    let bytes = if row < statistics.rows { 4 } else { 0 };
                    let OfColumns { lse_log2, delta, shift } = stage.queries;
                    let targets = [lse_log2, delta, shift];
                    for i in 0..3 {
                        copy::cp_async_4(targets[i] + thread * 4, lines[i] + row as u64 * 4, bytes);
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
