//! The forward pass: one fused kernel, `out` and `lse` from q, k, v. FlashAttention-2, Algorithm 1.
//!
//! The same code compiles for the tensor cores (f16 and bf16, `mma.sync`) and for plain FMA (f32); the tile types of
//! a shape determine which.

use crate::abi::ForwardParams;
use crate::block::{RowBlock, owned_tile, split};
use crate::mask::{Mask, for_blocks};
use crate::nonfinite;
use crate::pipeline::KeyValueRing;
use crate::ptx::sreg;
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
    let block = RowBlock::<S>::of_this_thread_block(p.query_tiles, p.heads_q, CAUSAL);
    let kv_head = block.head / p.heads_q_per_kv;
    let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
    let keys = p.seqlen_k.min(blocks.end * S::COLUMNS);
    let warp_row = sreg::warp_id() * S::WARP_ROWS;

    // SAFETY (whole body): the query tile and the ring are disjoint parts of this block's dynamic shared memory, every
    // thread takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        let q = block
            .window(&p.q, block.head, p.seqlen_q, &p.layout)
            .rows_from(block.first_row);
        let k = block.window(&p.k, kv_head, keys, &p.layout);
        let v = block.window(&p.v, kv_head, keys, &p.layout);
        owned_tile::<S>(0).load_async(&mut Walk::new(q, split::<S>()), S::ROWS);
        let mut ring = KeyValueRing::<S>::start(sreg::dynamic_shared_mem() + S::OWNED_BYTES, k, v);
        let query = owned_tile::<S>(0).rows_from(warp_row);
        if p.scale_sign != 1.0 {
            // Rare: fold a scale that is not positive into Q, so that the largest score stays the largest exponent.
            ring.drain();
            query.map(S::WARP_ROWS, |words| S::Element::scale(words, p.scale_sign));
        }

        let mut softmax = OnlineSoftmax::new(p.scale_log2);
        let mut output = S::Output::zero();
        let mut cleaned = false;
        for_blocks!(blocks, |n, MASKED| {
            cleaned |= attend::<S, CAUSAL, MASKED>(&block, mask, query, &mut ring, n, &mut softmax, &mut output)
        });
        ring.drain();

        // Worked out again: kept, its addresses would hold registers all through the loop.
        let block = RowBlock::<S>::of_this_thread_block(p.query_tiles, p.heads_q, CAUSAL);
        let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;
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
            nonfinite::restore::<S::Element, _>(&mut output, &values, blocks, S::COLUMNS, span);
        }
        output.store(
            query,
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
fn unsigned(score: f32, sign: f32) -> f32 {
    if score == f32::NEG_INFINITY {
        score
    } else {
        score * sign
    }
}

/// One key block: scores, online softmax, and their product with the values. Scores never leave the registers. Returns whether
/// values were [cleaned](nonfinite).
#[inline(always)]
unsafe fn attend<S: TileShape, const CAUSAL: bool, const MASKED: bool>(
    block: &RowBlock<S>,
    mask: Mask<CAUSAL>,
    query: SharedTile,
    ring: &mut KeyValueRing<S>,
    n: u32,
    softmax: &mut OnlineSoftmax<S::Scores>,
    output: &mut S::Output,
) -> bool {
    // SAFETY (whole body): the reasons given in `forward`; acquired tiles are initialised and visible until the next
    // acquire.
    unsafe {
        let mut scores = S::Scores::zero();
        let key = ring.acquire_key(n);
        scores.add_abt(query, key);
        if MASKED {
            let (first_row, first_key) = (block.first_row + sreg::warp_id() * S::WARP_ROWS, n * S::COLUMNS);
            scores.hide(first_key, |row| mask.keys_of(first_row + row), f32::NEG_INFINITY);
        }
        let rescale = softmax.update(&mut scores);
        output.map_rows(rescale, |rescale, o| o * rescale);
        let probabilities = scores.operand();
        let value = ring.acquire_value(n);
        let cleaned = MASKED && Mask::<CAUSAL>::HIDES_PAIRS && value.clean::<S::Element>(split::<S>(), S::COLUMNS);
        output.add_ab(&probabilities, value);
        cleaned
    }
}
