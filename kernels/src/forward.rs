//! The forward pass: one fused kernel, `out` and `lse` from q, k, v. FlashAttention-2, Algorithm 1.
//!
//! One source compiles for the tensor cores (f16 and bf16, `mma.sync`) and for plain FMA (f32); the tile types of
//! a shape determine which. v and out have the head_dim of q and k here. The forward pass over listed work, with score programs, or
//! with two head_dims, is [`listed`](crate::listed).

use crate::abi::ForwardParams;
use crate::block::{RowBlock, owned_tile, renewed_split, split};
use crate::mask::{Mask, Span, for_blocks};
use crate::nonfinite;
use crate::pipeline::{KeyValueRing, Order};
use crate::ptx::{optimizer, program, sreg, sync};
use crate::shape::TileShape;
use crate::softmax::{Finished, OnlineSoftmax};
use crate::tile::register::{Accumulator, OutputTile, RowValues, ScoreTile};
use crate::tile::{element::Element, global::Walk, shared::SharedTile};

/// Computes `ROWS` queries of one head against all keys that they see, in one block.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn forward<S: TileShape, const CAUSAL: bool>(p: &ForwardParams) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    // Recomputed after each walk: kept, addresses would occupy registers during the whole loop.
    let block = || RowBlock::<S>::of_this_thread_block(p.query_tiles, p.heads_q, CAUSAL);
    let first_row = |block: &RowBlock<S>| block.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;

    // SAFETY (whole body): the query tile and the ring are disjoint parts of this block's dynamic shared memory, every
    // thread takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        let (mut softmax, mut output) = (OnlineSoftmax::near(p.scale_log2), S::Output::zero());
        let mut cleaned = walk::<S, CAUSAL, false>(p, block, &mut softmax, &mut output);
        let first = first_row(&block());
        let span = |row| mask.keys_of(first + row);
        if sync::sync_threads_or(softmax.left_bounds(|row| !span(row).is_empty())) {
            core::hint::cold_path();
            (softmax, output) = (OnlineSoftmax::exact(p.scale_log2), S::Output::zero());
            cleaned = walk::<S, CAUSAL, true>(p, block, &mut softmax, &mut output);
        }

        let block = block();
        let first_row = first_row(&block);
        let span = |row| mask.keys_of(first_row + row);
        let Finished {
            inverse,
            lse,
            row_max,
            row_sum,
        } = softmax.finish(|row| !span(row).is_empty());
        output.map_rows(inverse, |inverse, o| S::Element::mean(o * inverse));
        if cleaned {
            let values = block.window(&p.v, block.head / p.heads_q_per_kv, p.seqlen_k, &p.layout);
            let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
            let sees = |row, key| span(row).contains(key);
            nonfinite::restore::<S::Element, _>(&mut output, &values, blocks, S::COLUMNS, sees);
        }
        output.store(
            owned_tile::<S>(0).rows_from(sreg::renewed_warp_id() * S::WARP_ROWS),
            &block
                .window(&p.out, block.head, p.seqlen_q, &p.layout)
                .rows_from(first_row),
        );
        let first = (block.row_of_head(p.heads_q, p.seqlen_q) + first_row as u64) * 4;
        let rows = p.seqlen_q.saturating_sub(first_row);
        S::Scores::store_rows(lse, p.lse + first, rows);
        if p.row_max != 0 {
            // The caller's q.k, before its sign was changed.
            S::Scores::store_rows(row_max.map(|max| unsigned(max, p.scale_sign)), p.row_max + first, rows);
            S::Scores::store_rows(row_sum, p.row_sum + first, rows);
        }
    }
}

/// Returns the q.k of a score before Q was multiplied by `sign`; minus infinity (no key seen) is kept.
#[inline(always)]
pub fn unsigned(score: f32, sign: f32) -> f32 {
    if score == f32::NEG_INFINITY {
        score
    } else {
        score * sign
    }
}

/// Walks every key block that the queries of `owned()` see, first to last. A walk `AGAIN` finds Q as the walk before left it, and
/// subtracts the maximum before it multiplies in every row. Returns true if values were [cleaned](nonfinite).
#[inline(always)]
unsafe fn walk<S: TileShape, const CAUSAL: bool, const AGAIN: bool>(
    p: &ForwardParams,
    owned: impl Fn() -> RowBlock<S>,
    softmax: &mut OnlineSoftmax<S::Scores>,
    output: &mut S::Output,
) -> bool {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let blocks_of = |block: &RowBlock<S>| {
        let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
        // One body is enough for a walk that is rare.
        if AGAIN { blocks.all_masked() } else { blocks }
    };
    let mut block = owned();
    let kv_head = block.head / p.heads_q_per_kv;
    let keys = p.seqlen_k.min(blocks_of(&block).end * S::COLUMNS);
    let mut cleaned = false;
    // SAFETY (whole body): `forward`'s.
    unsafe {
        let split = renewed_split::<S>();
        if !AGAIN {
            let q = block.window(&p.q, block.head, p.seqlen_q, &p.layout);
            owned_tile::<S>(0).load_async(&mut Walk::new(q.rows_from(block.first_row), split), S::ROWS);
        }
        let k = block.window(&p.k, kv_head, keys, &p.layout);
        let v = block.window(&p.v, kv_head, keys, &p.layout);
        let base = optimizer::renew(sreg::dynamic_shared_mem()) + S::OWNED_BYTES;
        let mut ring = KeyValueRing::<S>::start(base, k, v, split);
        let query = owned_query::<S>(&ring, if AGAIN { 1.0 } else { p.scale_sign });
        // Renewed for each range: kept, they would occupy registers during the loop over whole blocks.
        #[rustfmt::skip]
        for_blocks!({ block = owned(); blocks_of(&block) }, |n, MASKED| {
            // Worked out where it is asked for, for the same reason.
            let first_row = || block.first_row + sreg::warp_id() * S::WARP_ROWS;
            let span = |row| mask.keys_of(first_row() + row);
            let tile = Streamed {
                index: n,
                first_key: n * S::COLUMNS,
                hides_pairs: MASKED && Mask::<CAUSAL>::HIDES_PAIRS,
            };
            cleaned |= attend::<S, _, MASKED, AGAIN, false>(tile, first_row, span, query, &mut ring, softmax, output)
        });
        ring.drain();
    }
    cleaned
}

/// Returns this warp's queries, multiplied by `sign`. They were loaded before the ring's first tiles.
///
/// # Safety
/// Every thread of the block calls this together.
#[inline(always)]
pub unsafe fn owned_query<S: TileShape>(ring: &KeyValueRing<S, impl Order>, sign: f32) -> SharedTile {
    let query = owned_tile::<S>(0).rows_from(sreg::warp_id() * S::WARP_ROWS);
    if sign != 1.0 {
        // Rare: fold a scale that is not positive into Q, so that the largest score stays the largest exponent.
        ring.drain();
        // SAFETY: the queries have landed, and only this warp reads its rows.
        unsafe { query.map(S::WARP_ROWS, |words| S::Element::scale(words, sign)) }
    }
    query
}

/// A tile of keys and values in the order of the walk.
#[derive(Clone, Copy)]
pub struct Streamed {
    /// Number of the tile among those of the ring.
    pub index: u32,
    /// Position of the first key.
    pub first_key: u32,
    /// True if pairs that exist may be hidden, not counting those that a score program hides.
    pub hides_pairs: bool,
}

/// One key block: scores, online softmax, and their product with the values. Scores never leave the registers. Returns whether
/// values were [cleaned](nonfinite). `first_row` is the position of the warp's first row, and `span` says what a row of the warp sees.
///
/// # Safety
/// Every thread of the block calls this together, in the order of the ring's tiles, after [`owned_query`].
#[inline(always)]
pub unsafe fn attend<S: TileShape, O: Order, const MASKED: bool, const EXACT: bool, const PROGRAM: bool>(
    tile: Streamed,
    first_row: impl Fn() -> u32,
    span: impl Fn(u32) -> Span,
    query: SharedTile,
    ring: &mut KeyValueRing<S, O>,
    softmax: &mut OnlineSoftmax<S::Scores>,
    output: &mut S::Output,
) -> bool {
    // SAFETY (whole body): the caller's contract; acquired tiles are initialised and visible until the next acquire.
    unsafe {
        let mut scores = S::Scores::zero();
        // Blocks of 16 keys of a streamed tile.
        let blocks = (S::TILE_COLUMNS / 16) as usize;
        for part in 0..S::STEP_TILES {
            let key = ring.acquire_key(tile.index, part);
            if PROGRAM && part == 0 {
                S::Scores::announce::<program::OfQueries<MASKED>>(first_row(), tile.first_key);
            }
            let first = part as usize * blocks;
            scores.add_abt_in(first..first + blocks, query, key);
        }
        if PROGRAM {
            scores.splice::<program::Scores, program::OfQueries<MASKED>>();
        }
        if PROGRAM && MASKED {
            scores.splice::<program::Masked, program::OfQueries<MASKED>>();
        }
        if MASKED {
            scores.hide(tile.first_key, span, f32::NEG_INFINITY);
        }
        // Before the softmax: no barrier then separates it from the products, in whose time the exponentials fit. Programs need the
        // registers.
        let early = if PROGRAM {
            None
        } else {
            Some(ring.acquire_value(tile.index, 0))
        };
        let rescale = softmax.update::<EXACT>(&mut scores);
        output.map_rows(rescale, |rescale, o| o * rescale);
        if PROGRAM {
            scores.splice::<program::Weights, program::OfQueries<MASKED>>();
        }
        let probabilities = scores.operand();
        let mut value = early.unwrap_or_else(|| ring.acquire_value(tile.index, 0));
        let hides_pairs = tile.hides_pairs || PROGRAM && MASKED && program::hides();
        let mut cleaned = false;
        for part in 0..S::STEP_TILES {
            if part > 0 {
                value = ring.acquire_value(tile.index, part);
            }
            cleaned |= hides_pairs
                && value.clean::<S::Element>(
                    if PROGRAM { split::<S>() } else { renewed_split::<S>() },
                    S::TILE_COLUMNS,
                );
            let first = part as usize * blocks;
            output.add_ab_in(first..first + blocks, &probabilities, value);
        }
        cleaned
    }
}
