//! The backward pass: gradients by recomputation. FlashAttention-2, Algorithm 2, without its atomics.
//!
//! With P = exp(scale * S - lse) and delta = rowsum(dO * O), which [`delta`] makes first,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dS^T Q
//! ```
//!
//! Two kernels share one body. [`queries`] owns queries and streams keys past them: dQ. [`keys`] owns keys, streams queries
//! and works on the transposed tiles throughout, so that P^T and dS^T are left operands in the registers they were computed
//! in: dK and dV, summed over the query heads that share them. Scores are computed twice (seven products instead of five),
//! and in return every gradient is written once, by its owner, in a fixed order: no atomics, no f32 copy of dQ, the same
//! bits each time at every head_dim.

use crate::abi::BackwardParams;
use crate::block::{RowBlock, owned_tile, split};
use crate::mask::{Blocks, Mask};
use crate::pipeline::{PairRing, Stage, StreamedRows};
use crate::ptx::math::{ex2, fma};
use crate::ptx::{memory, sreg, sync};
use crate::shape::{DELTA_ROWS, TileShape};
use crate::softmax::log2_of;
use crate::tile::register::{Accumulator, OutputTile, RowValues, ScoreTile};
use crate::tile::{
    element::Element,
    global::{GlobalTile, Walk},
    shared::SharedTile,
};

/// dQ of `ROWS` queries of one head.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after [`delta`].
#[inline(always)]
pub unsafe fn queries<S: TileShape, const CAUSAL: bool>(p: &BackwardParams) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_q, CAUSAL);
    let kv_head = block.head / p.heads_q_per_kv;
    let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
    let keys = p.seqlen_k.min(blocks.end * S::COLUMNS);
    let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;

    // SAFETY (whole body): owned tiles and stages are disjoint parts of this block's dynamic shared memory, every thread
    // takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        let q = block
            .window(&p.q, block.head, p.seqlen_q, &p.layout)
            .rows_from(block.first_row);
        let dout = block
            .window(&p.dout, block.head, p.seqlen_q, &p.layout)
            .rows_from(block.first_row);
        let owned = load_owned::<S>(q, dout);
        let k = block.window(&p.k, kv_head, keys, &p.layout);
        let v = block.window(&p.v, kv_head, keys, &p.layout);
        let mut ring = PairRing::<S>::start(ring_base::<S>(), 0, k, v, None);
        let first = (block.row_of_head(p.heads_q, p.seqlen_q) + first_row as u64) * 4;
        let rows = p.seqlen_q.saturating_sub(first_row);
        let statistics = OfRows {
            lse_log2: S::Scores::load_rows(p.lse + first, rows).map(log2_of),
            delta: S::Scores::load_rows(p.delta + first, rows),
        };

        let (mut dq, mut none) = (S::Output::zero(), S::Output::zero());
        let Blocks { begin, boundary, end } = blocks;
        for n in begin..boundary {
            let stage = ring.acquire(n);
            add::<S, false, true, false>(p, owned, stage, statistics, |_, _| true, &mut dq, &mut none);
        }
        for n in boundary..end {
            let stage = ring.acquire(n);
            let visible = |row, column| n * S::COLUMNS + column < mask.visible_end(first_row + row);
            add::<S, true, true, false>(p, owned, stage, statistics, visible, &mut dq, &mut none);
        }
        ring.drain();

        let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_q, CAUSAL);
        let target = block.window(&p.dq, block.head, p.seqlen_q, &p.layout);
        store_gradient::<S>(dq, p.softmax_scale, owned.first, target.rows_from(first_row));
    }
}

/// dK and dV of `ROWS` keys of one key/value head.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after [`delta`].
#[inline(always)]
pub unsafe fn keys<S: TileShape, const CAUSAL: bool>(p: &BackwardParams) {
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
    // SAFETY (whole body): as in `queries`.
    unsafe {
        let k = block
            .window(&p.k, block.head, p.seqlen_k, &p.layout)
            .rows_from(block.first_row);
        let v = block
            .window(&p.v, block.head, p.seqlen_k, &p.layout)
            .rows_from(block.first_row);
        let owned = load_owned::<S>(k, v);
        // Worked out again: kept, its addresses would hold registers all through the walk.
        let target = |tensor| {
            let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
            let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;
            block
                .window(tensor, block.head, p.seqlen_k, &p.layout)
                .rows_from(first_row)
        };

        let (mut dk, mut dv) = (S::Output::zero(), S::Output::zero());
        if S::TWO_WALKS {
            walk_queries::<S, CAUSAL, true, false>(p, owned, &mut dk, &mut dv);
            // V is not needed any more: dV asks for Q, K and dO only.
            store_gradient::<S>(dk, p.softmax_scale, owned.second, target(&p.dk));
            walk_queries::<S, CAUSAL, false, true>(p, owned, &mut dk, &mut dv);
        } else {
            walk_queries::<S, CAUSAL, true, true>(p, owned, &mut dk, &mut dv);
            store_gradient::<S>(dk, p.softmax_scale, owned.second, target(&p.dk));
        }
        store_gradient::<S>(dv, 1.0, owned.first, target(&p.dv));
    }
}

/// Streams every query that sees the block's keys, head by head of those that share them.
#[inline(always)]
unsafe fn walk_queries<S: TileShape, const CAUSAL: bool, const DK: bool, const DV: bool>(
    p: &BackwardParams,
    owned: Owned,
    dk: &mut S::Output,
    dv: &mut S::Output,
) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
    let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;
    let Blocks { begin, boundary, end } = mask.query_blocks(block.first_row, block.rows(p.seqlen_k), S::COLUMNS);
    for shared in 0..p.heads_q_per_kv.get() {
        let head = block.head * p.heads_q_per_kv.get() + shared;
        let row_of_head = (block.batch as u64 * p.heads_q.get() as u64 + head as u64) * p.seqlen_q as u64;
        let statistics = StreamedRows {
            lse: p.lse + row_of_head * 4,
            delta: p.delta + row_of_head * 4,
            rows: p.seqlen_q,
        };
        let window = |tensor| {
            block
                .window(tensor, head, p.seqlen_q, &p.layout)
                .rows_from(begin * S::COLUMNS)
        };
        // SAFETY (whole body): as in `queries`.
        unsafe {
            let mut ring =
                PairRing::<S>::start(ring_base::<S>(), begin, window(&p.q), window(&p.dout), Some(statistics));
            for m in begin..boundary {
                let stage = ring.acquire(m);
                let visible = |row, column| m * S::COLUMNS + column >= mask.visible_begin(first_row + row);
                add::<S, true, DK, DV>(p, owned, stage, OfColumns, visible, dk, dv);
            }
            for m in boundary..end {
                let stage = ring.acquire(m);
                add::<S, false, DK, DV>(p, owned, stage, OfColumns, |_, _| true, dk, dv);
            }
            ring.drain();
        }
    }
}

/// One streamed pair: `ds_first += dS first` and `p_second += P second`, or one of them.
#[inline(always)]
unsafe fn add<S: TileShape, const MASKED: bool, const DS: bool, const P: bool>(
    p: &BackwardParams,
    owned: Owned,
    stage: Stage,
    statistics: impl Statistics<S::Scores>,
    visible: impl Fn(u32, u32) -> bool,
    ds_first: &mut S::Output,
    p_second: &mut S::Output,
) {
    // SAFETY (whole body): the caller acquired the stage.
    unsafe {
        let mut probabilities = S::Scores::zero();
        probabilities.add_abt(owned.first, stage.first);
        statistics.exponentiate(&mut probabilities, p.scale_log2, stage);
        if MASKED {
            probabilities.map_coordinates(|row, column, x| if visible(row, column) { x } else { 0.0 });
        }
        if P {
            p_second.add_ab(&probabilities.operand(), stage.second);
        }
        if DS {
            let mut ds = S::Scores::zero();
            ds.add_abt(owned.second, stage.second);
            statistics.center(&mut ds, stage);
            ds.zip(&probabilities, |p, x| p * x);
            ds_first.add_ab(&ds.operand(), stage.first);
        }
    }
}

/// lse and delta of the queries, which are the rows of a tile in [`queries`] and its columns in [`keys`].
trait Statistics<A: Accumulator>: Copy {
    /// Scores to probabilities: `exp(scale * s - lse)`.
    ///
    /// # Safety
    /// The caller acquired the stage.
    unsafe fn exponentiate(self, scores: &mut A, scale_log2: f32, stage: Stage);

    /// `dP - delta`.
    ///
    /// # Safety
    /// The caller acquired the stage.
    unsafe fn center(self, dp: &mut A, stage: Stage);
}

/// The queries are rows: their statistics stay in registers.
#[derive(Clone, Copy)]
struct OfRows<R> {
    lse_log2: R,
    delta: R,
}

impl<A: Accumulator> Statistics<A> for OfRows<A::Rows> {
    #[inline(always)]
    unsafe fn exponentiate(self, scores: &mut A, scale_log2: f32, _: Stage) {
        scores.map_rows(self.lse_log2, |lse, s| ex2(fma(s, scale_log2, -lse)));
    }

    #[inline(always)]
    unsafe fn center(self, dp: &mut A, _: Stage) {
        dp.map_rows(self.delta, |delta, x| x - delta);
    }
}

/// The queries are columns: their statistics come with their tiles.
#[derive(Clone, Copy)]
struct OfColumns;

impl<A: Accumulator> Statistics<A> for OfColumns {
    #[inline(always)]
    unsafe fn exponentiate(self, scores: &mut A, scale_log2: f32, stage: Stage) {
        // SAFETY: the caller's contract.
        unsafe { scores.map_columns(stage.lse, |lse, s| ex2(fma(s, scale_log2, -log2_of(lse)))) }
    }

    #[inline(always)]
    unsafe fn center(self, dp: &mut A, stage: Stage) {
        // SAFETY: the caller's contract.
        unsafe { dp.map_columns(stage.delta, |delta, x| x - delta) }
    }
}

/// This warp's rows of the two tiles a block owns: Q and dO, or K and V.
#[derive(Clone, Copy)]
struct Owned {
    first: SharedTile,
    second: SharedTile,
}

/// Starts to load the owned tiles; the first `acquire` awaits them too.
#[inline(always)]
unsafe fn load_owned<S: TileShape>(first: GlobalTile, second: GlobalTile) -> Owned {
    let warp_row = sreg::warp_id() * S::WARP_ROWS;
    // SAFETY: the tiles are fresh, and the caller's windows readable.
    unsafe {
        owned_tile::<S>(0).load_async(&mut Walk::new(first, split::<S>()), S::ROWS);
        owned_tile::<S>(1).load_async(&mut Walk::new(second, split::<S>()), S::ROWS);
    }
    Owned {
        first: owned_tile::<S>(0).rows_from(warp_row),
        second: owned_tile::<S>(1).rows_from(warp_row),
    }
}

/// Shared address of the stages.
#[inline(always)]
fn ring_base<S: TileShape>() -> u32 {
    sreg::dynamic_shared_mem() + 2 * S::OWNED_BYTES
}

/// Writes `factor * gradient` to `target`, by way of the warp's rows of a tile that nobody needs any more.
#[inline(always)]
unsafe fn store_gradient<S: TileShape>(mut gradient: S::Output, factor: f32, staging: SharedTile, target: GlobalTile) {
    let factor = <S::Output as Accumulator>::Rows::splat(factor);
    gradient.map_rows(factor, |factor, x| x * factor);
    // SAFETY: the caller's target, and a tile whose readers were this warp alone.
    unsafe { gradient.store(staging, &target) }
}

/// delta = rowsum(dO * O), one f32 a query, for [`DELTA_ROWS`] queries a block. 8 lanes share a row.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn delta<E: Element>(p: &BackwardParams) {
    let block = sync::renew(sreg::block_idx_x());
    let (rest, tile) = (block / p.tiles, block % p.tiles);
    let (batch, head) = (rest / p.heads_q, rest % p.heads_q);
    let row = tile * DELTA_ROWS + sreg::thread_idx_x() / LANES;
    let window = |tensor| GlobalTile::new(tensor, batch, head, p.seqlen_q, &p.layout, E::BYTES);
    // SAFETY: windows clip what does not exist.
    let sum = unsafe { dot_of_row::<E>(window(&p.out), window(&p.dout), row) };
    if sreg::thread_idx_x() % LANES == 0 && row < p.seqlen_q {
        let index = (batch as u64 * p.heads_q.get() as u64 + head as u64) * p.seqlen_q as u64 + row as u64;
        // SAFETY: delta holds an f32 for each query.
        unsafe { memory::st_global_u32(p.delta + index * 4, sum.to_bits()) }
    }
}

/// The sum of the products of row `row` of two windows; [`LANES`] lanes share the row, and all receive the sum.
///
/// # Safety
/// The windows are readable, and as wide as each other. The whole warp calls this together.
#[inline(always)]
pub unsafe fn dot_of_row<E: Element>(a: GlobalTile, b: GlobalTile, row: u32) -> f32 {
    let mut sum = 0.0;
    for step in 0..a.chunks().div_ceil(LANES) {
        let chunk = step * LANES + sreg::thread_idx_x() % LANES;
        if a.contains(row, chunk) {
            // SAFETY: the chunk exists.
            sum += unsafe { E::dot(a.load(row, chunk), b.load(row, chunk)) };
        }
    }
    let mut distance = 1;
    while distance < LANES {
        sum += sync::shuffle_xor(sum, distance);
        distance *= 2;
    }
    sum
}

/// Lanes that share a row in [`dot_of_row`].
pub const LANES: u32 = 8;
