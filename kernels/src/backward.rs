//! The backward pass: gradients by recomputation. FlashAttention-2, Algorithm 2, without its atomics.
//!
//! With P = exp(scale * S - lse) and delta = rowsum(dO * O), which [`delta`](crate::delta) makes first,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dS^T Q
//! ```
//!
//! Two kernels share one body. [`dq`] owns queries and streams keys: it computes dQ. [`dkv`] owns keys, streams
//! queries and works on the transposed tiles, so that P^T and dS^T are left operands in the registers where they were
//! computed: it computes dK and dV, summed over the query heads that share the keys. Scores are computed twice (seven
//! products instead of five). In return every gradient is written once, by its owner, in a fixed order: no atomics,
//! no f32 copy of dQ, and bitwise reproducible results at every head_dim.
//!
//! v, out and their gradients have the head_dim of q and k here. The pass over listed work, with the markers of a score program, or
//! with two head_dims, is [`listed`].

mod listed;
mod weighed;

pub use listed::{listed_dkv, listed_dq};

use crate::abi::{BackwardParams, Exponents};
use crate::block::{RowBlock, owned_tile, split};
use crate::delta::any_far_of_share;
use crate::mask::{Blocks, Mask, Span, for_blocks};
use crate::nonfinite;
use crate::pipeline::{PairRing, Stage, StreamedRows};
use crate::ptx::{memory, optimizer, program, sreg, sync};
use crate::scores::{self, OfRows, QueryValues};
use crate::shape::{DELTA_ROWS, TileShape};
use crate::tile::register::{Accumulator, OutputTile, RowValues, ScoreTile};
use crate::tile::{
    global::{GlobalTile, Walk},
    shared::SharedTile,
};

/// Computes dQ of `ROWS` queries of one head.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after
/// [`delta`](crate::delta::delta).
#[inline(always)]
pub unsafe fn dq<S: TileShape, const CAUSAL: bool>(p: &BackwardParams) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_q, CAUSAL);
    let kv_head = block.head / p.heads_q_per_kv;
    let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
    let keys = p.seqlen_k.min(blocks.end * S::COLUMNS);
    let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;

    // SAFETY (whole body): owned tiles and stages are disjoint parts of this block's dynamic shared memory, every
    // thread takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        weighed::weigh_few::<S, CAUSAL>(p);
        let q = block
            .window(&p.q, block.head, p.seqlen_q, &p.layout)
            .rows_from(block.first_row);
        let dout = block
            .window(&p.dout, block.head, p.seqlen_q, &p.layout)
            .rows_from(block.first_row);
        let owned = load_owned::<S>(q, dout);
        let window = |tensor| {
            block
                .window(tensor, kv_head, keys, &p.layout)
                .rows_from(blocks.begin * S::COLUMNS)
        };
        let (k, v) = (window(&p.k), window(&p.v));
        let span = |row| mask.keys_of(first_row + row);
        let mut ring = PairRing::<S>::start(ring_base::<S>(), blocks.begin, k, v, None);
        let first = block.row_of_head(p.heads_q, p.seqlen_q) + first_row as u64;
        let rows = p.seqlen_q.saturating_sub(first_row);
        let (queries, is_far) = OfRows::load::<S::Scores>(&p.exponents, first, rows, shifts::<S>());

        let (mut dq, mut none) = (S::Output::zero(), S::Output::zero());
        for_blocks!(blocks, |n, MASKED| {
            let stage = ring.acquire(n);
            let tile = Tile::of_keys(first_row, n * S::COLUMNS, span, is_far, MASKED && CAUSAL);
            add::<S, program::OfQueries<MASKED>, MASKED, false, true, false>(
                p, owned, stage, queries, tile, &mut dq, &mut none,
            );
        });
        ring.drain();

        // Recomputed here: kept, its addresses would occupy registers during the whole loop.
        let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_q, CAUSAL);
        let first_row = block.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
        let target = block.window(&p.dq, block.head, p.seqlen_q, &p.layout);
        store_gradient::<S>(dq, p.softmax_scale, owned.first, target.rows_from(first_row));
    }
}

/// Computes dK and dV of `ROWS` keys of one key/value head.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after
/// [`delta`](crate::delta::delta).
#[inline(always)]
pub unsafe fn dkv<S: TileShape, const CAUSAL: bool>(p: &BackwardParams) {
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
    // SAFETY (whole body): as in `dq`.
    unsafe {
        let k = block
            .window(&p.k, block.head, p.seqlen_k, &p.layout)
            .rows_from(block.first_row);
        let v = block
            .window(&p.v, block.head, p.seqlen_k, &p.layout)
            .rows_from(block.first_row);
        let owned = load_owned::<S>(k, v);
        // Recomputed here: kept, its addresses would occupy registers during the whole loop.
        let target = |tensor| {
            let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
            let first_row = block.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
            block
                .window(tensor, block.head, p.seqlen_k, &p.layout)
                .rows_from(first_row)
        };

        let (mut dk, mut dv) = (S::Output::zero(), S::Output::zero());
        if sreg::thread_idx_x() == 0 {
            memory::st_shared_word(cleaned::<S>(), 0);
        }
        if S::TWO_WALKS {
            walk_queries::<S, CAUSAL, true, false>(p, owned, &mut dk, &mut dv);
            // V is not needed any more: dV asks for Q, K and dO only.
            store_gradient::<S>(dk, p.softmax_scale, owned.second, target(&p.dk));
            walk_queries::<S, CAUSAL, false, true>(p, owned, &mut dk, &mut dv);
        } else {
            walk_queries::<S, CAUSAL, true, true>(p, owned, &mut dk, &mut dv);
            store_gradient::<S>(dk, p.softmax_scale, owned.second, target(&p.dk));
        }
        if CAUSAL && memory::ld_shared_u32(cleaned::<S>()) != 0 {
            restore_values::<S, CAUSAL>(p, &mut dv);
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
    let blocks = mask.query_blocks(block.first_row, block.rows(p.seqlen_k), S::COLUMNS);
    for shared in 0..p.heads_q_per_kv.get() {
        let head = block.head * p.heads_q_per_kv.get() + shared;
        let row_of_head = (block.batch as u64 * p.heads_q.get() as u64 + head as u64) * p.seqlen_q as u64;
        let Exponents {
            lse_log2, delta, shift, ..
        } = p.exponents;
        let statistics = StreamedRows {
            lines: [lse_log2, delta, shift].map(|line| line + row_of_head * 4),
            rows: p.seqlen_q,
            head: 0,
            rows_of_head: 0,
            begin: 0,
        };
        let window = |tensor| {
            block
                .window(tensor, head, p.seqlen_q, &p.layout)
                .rows_from(blocks.begin * S::COLUMNS)
        };
        // SAFETY (whole body): the reasons given in `dq`.
        unsafe {
            let mut ring = PairRing::<S>::start(
                ring_base::<S>(),
                blocks.begin,
                window(&p.q),
                window(&p.dout),
                Some(statistics),
            );
            let is_far = S::ELEMENT_BYTES == 2 && any_far::<S>(p, block.batch * p.heads_q.get() + head, blocks);
            let span = |row| mask.queries_of(first_row + row);
            for_blocks!(blocks, |m, MASKED| {
                let stage = ring.acquire(m);
                let tile = Tile {
                    first_row,
                    first_column: m * S::COLUMNS,
                    span,
                    is_far,
                    hides: MASKED && CAUSAL,
                    is_of_keys: false,
                };
                if tile.hides {
                    clean_queries::<S>(&stage);
                }
                add::<S, program::OfKeys<MASKED>, MASKED, false, DK, DV>(p, owned, stage, stage.queries, tile, dk, dv);
            });
            ring.drain();
        }
    }
}

/// Adds to dV what was zeroed in tiles of dO.
#[inline(always)]
unsafe fn restore_values<S: TileShape, const CAUSAL: bool>(p: &BackwardParams, dv: &mut S::Output) {
    let mask = Mask::<CAUSAL>::new(optimizer::renew(p.seqlen_q), optimizer::renew(p.seqlen_k));
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_kv, false);
    let first_row = block.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
    let blocks = mask.query_blocks(block.first_row, block.rows(p.seqlen_k), S::COLUMNS);
    let sees = |row, query| mask.queries_of(first_row + row).contains(query);
    for shared in 0..p.heads_q_per_kv.get() {
        let head = block.head * p.heads_q_per_kv.get() + shared;
        let douts = block.window(&p.dout, head, p.seqlen_q, &p.layout);
        // SAFETY: the window clips what does not exist.
        unsafe { nonfinite::restore::<S::Element, _>(dv, &douts, blocks, S::COLUMNS, sees) }
    }
}

/// Zeroes what is not finite in a stage of queries and their dO, and notes in shared memory if there was any of dO. Of queries that are
/// not finite neither are the sums of weights, so that whatever sees them is NaN without them.
///
/// # Safety
/// The stage was acquired. Every thread of the block calls this together.
#[inline(always)]
unsafe fn clean_queries<S: TileShape>(stage: &Stage) {
    // SAFETY (whole body): the caller's contract; all threads that write the flag write 1.
    unsafe {
        stage.first.clean::<S::Element>(split::<S>(), S::COLUMNS);
        let any = stage.second.clean::<S::Element>(split::<S>(), S::COLUMNS);
        if any && sreg::thread_idx_x() == 0 {
            memory::st_shared_word(cleaned::<S>(), 1);
        }
    }
}

/// Returns true if any query of `blocks` in this head is far. All threads of the block call this together.
#[inline(always)]
unsafe fn any_far<S: TileShape>(p: &BackwardParams, head: u32, blocks: Blocks) -> bool {
    let first = head as u64 * p.seqlen_q.div_ceil(DELTA_ROWS) as u64;
    let flag = |block: u32| first + (block * S::COLUMNS).min(p.seqlen_q).div_ceil(DELTA_ROWS) as u64;
    let flags = flag(blocks.begin)..flag(blocks.end);
    // SAFETY: there is a flag for each `DELTA_ROWS` queries, and a tile is whole runs of them.
    let any = unsafe { any_far_of_share(&p.exponents, flags, sreg::thread_idx_x(), S::THREADS) };
    sync::sync_threads_or(any)
}

/// Treatment of a streamed tile.
#[derive(Clone, Copy)]
struct Tile<F> {
    /// Position of row 0.
    first_row: u32,
    /// Position of column 0.
    first_column: u32,
    /// Positions of the columns' sequence that a row sees.
    span: F,
    /// True if a query may be far.
    is_far: bool,
    /// True if pairs that exist may be hidden.
    hides: bool,
    /// True if keys are streamed. They are [cleaned](nonfinite) only after their scores, which may be minus infinity.
    is_of_keys: bool,
}

impl<F> Tile<F> {
    /// Treatment of a tile of keys, of which pairs are hidden if it `hides`.
    #[inline(always)]
    fn of_keys(first_row: u32, first_column: u32, span: F, is_far: bool, hides: bool) -> Self {
        Self {
            first_row,
            first_column,
            span,
            is_far,
            hides,
            is_of_keys: true,
        }
    }
}

/// One streamed pair: `ds_first += dS first` and `p_second += P second`, or one of them.
#[inline(always)]
unsafe fn add<
    S: TileShape,
    T: program::Tile,
    const MASKED: bool,
    const PROGRAM: bool,
    const DS: bool,
    const P: bool,
>(
    p: &BackwardParams,
    owned: Owned,
    stage: Stage,
    queries: impl QueryValues<S::Scores>,
    tile: Tile<impl Fn(u32) -> Span>,
    ds_first: &mut S::Output,
    p_second: &mut S::Output,
) {
    // SAFETY (whole body): the caller acquired the stage; keys are cleaned after the products that need them
    // unchanged.
    unsafe {
        let probabilities = probabilities::<S, T, MASKED, PROGRAM>(p, owned, stage, queries, &tile);
        if P {
            let mut weights = probabilities;
            if PROGRAM {
                weights.splice::<program::Weights, T>();
            }
            p_second.add_ab(&weights.operand(), stage.second);
        }
        if DS {
            let mut ds = weight_gradients::<S, T, PROGRAM>(owned, stage);
            scores::score_gradients(&mut ds, &probabilities, queries, tile.hides);
            if PROGRAM {
                ds.splice::<program::Gradients, T>();
            }
            if tile.hides && tile.is_of_keys {
                stage.first.clean::<S::Element>(split::<S>(), S::COLUMNS);
            }
            ds_first.add_ab(&ds.operand(), stage.first);
        }
    }
}

/// P of a streamed tile: 0 where a pair is hidden.
///
/// # Safety
/// The contract of [`add`].
#[inline(always)]
unsafe fn probabilities<S: TileShape, T: program::Tile, const MASKED: bool, const PROGRAM: bool>(
    p: &BackwardParams,
    owned: Owned,
    stage: Stage,
    queries: impl QueryValues<S::Scores>,
    tile: &Tile<impl Fn(u32) -> Span>,
) -> S::Scores {
    // SAFETY (whole body): the caller's contract.
    unsafe {
        let mut probabilities = S::Scores::zero();
        if PROGRAM {
            S::Scores::announce::<T>(tile.first_row, tile.first_column);
        }
        probabilities.add_abt(owned.first, stage.first);
        if PROGRAM {
            probabilities.splice::<program::Scores, T>();
        }
        scores::weights(
            &mut probabilities,
            queries,
            p.scale_log2,
            S::ELEMENT_BYTES == 4 || tile.is_far,
        );
        if PROGRAM && MASKED {
            probabilities.splice::<program::Hidden, T>();
        }
        if MASKED {
            probabilities.hide(tile.first_column, &tile.span, 0.0);
        }
        probabilities
    }
}

/// dP of a streamed tile.
///
/// # Safety
/// The contract of [`add`].
#[inline(always)]
unsafe fn weight_gradients<S: TileShape, T: program::Tile, const PROGRAM: bool>(
    owned: Owned,
    stage: Stage,
) -> S::Scores {
    let mut dp = S::Scores::zero();
    // SAFETY: the caller's contract.
    unsafe { dp.add_abt(owned.second, stage.second) };
    if PROGRAM {
        dp.splice::<program::Weights, T>();
    }
    dp
}

/// Rows of this warp in the two tiles that a block owns: Q and dO, or K and V.
#[derive(Clone, Copy)]
struct Owned {
    first: SharedTile,
    second: SharedTile,
}

/// Starts to load the owned tiles; the first `acquire` also waits for them.
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

/// Returns the shared address of the stages.
#[inline(always)]
fn ring_base<S: TileShape>() -> u32 {
    sreg::dynamic_shared_mem() + 2 * S::OWNED_BYTES
}

/// Returns the address in shared memory of the shifts of this warp's queries, in a block of queries.
#[inline(always)]
fn shifts<S: TileShape>() -> u32 {
    sreg::dynamic_shared_mem() + S::BACKWARD_BYTES - 4 * S::ROWS + sreg::warp_id() * S::WARP_ROWS * 4
}

/// Returns the address of a flag in shared memory: dO was [cleaned](nonfinite) in a block of keys. It takes the place
/// of the shifts in a block of queries. As a register the flag would occupy one during the whole loop.
#[inline(always)]
fn cleaned<S: TileShape>() -> u32 {
    sreg::dynamic_shared_mem() + S::BACKWARD_BYTES - 4 * S::ROWS
}

/// Writes `factor * gradient` to `target`, through the warp's rows of a tile that is not needed any more.
#[inline(always)]
unsafe fn store_gradient<S: TileShape>(mut gradient: S::Output, factor: f32, staging: SharedTile, target: GlobalTile) {
    let factor = <S::Output as Accumulator>::Rows::splat(factor);
    gradient.map_rows(factor, |factor, x| x * factor);
    // SAFETY: the target is the caller's, and only this warp reads these rows of the tile.
    unsafe { gradient.store(staging, &target) }
}
