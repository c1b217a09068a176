//! The forward pass: one fused kernel, `out` and `lse` from q, k, v. FlashAttention-2, Algorithm 1.
//!
//! The same lines compile for the tensor cores (f16 and bf16, `mma.sync`) and for plain FMA (f32): a shape's tile types
//! say which.

use crate::abi::ForwardParams;
use crate::block::{RowBlock, owned_tile, split};
use crate::mask::{Blocks, Mask};
use crate::pipeline::KeyValueRing;
use crate::ptx::{memory, sreg};
use crate::shape::TileShape;
use crate::softmax::OnlineSoftmax;
use crate::tile::register::{Accumulator, OutputTile, ScoreTile};
use crate::tile::{element::Element, global::Walk, shared::SharedTile};

/// One block: `ROWS` queries of one head against all the keys they see.
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
            query.map(S::WARP_ROWS, |words| {
                <S::Scores as ScoreTile>::Element::scale(words, p.scale_sign)
            });
        }

        let mut softmax = OnlineSoftmax::new(p.scale_log2);
        let mut output = S::Output::zero();
        let Blocks { begin, boundary, end } = blocks;
        for n in begin..boundary {
            attend::<S, CAUSAL, false>(&block, mask, query, &mut ring, n, &mut softmax, &mut output);
        }
        for n in boundary..end {
            attend::<S, CAUSAL, true>(&block, mask, query, &mut ring, n, &mut softmax, &mut output);
        }
        ring.drain();

        // Worked out again: kept, its addresses would hold registers all through the loop.
        let block = RowBlock::<S>::of_this_thread_block(p.query_tiles, p.heads_q, CAUSAL);
        let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;
        let (inverse, lse) = softmax.finish(|row| mask.visible_end(first_row + row) > 0);
        output.map_rows(inverse, |inverse, o| o * inverse);
        output.store(
            query,
            &block
                .window(&p.out, block.head, p.seqlen_q, &p.layout)
                .rows_from(first_row),
        );
        let lse_row = p.lse + (block.row_of_head(p.heads_q, p.seqlen_q) + first_row as u64) * 4;
        S::Scores::for_each_row(lse, |row, lse| {
            if first_row + row < p.seqlen_q {
                memory::st_global_u32(lse_row + row as u64 * 4, lse.to_bits());
            }
        });
    }
}

/// One key block: scores, online softmax, and their product with the values. Scores never leave the registers.
#[inline(always)]
unsafe fn attend<S: TileShape, const CAUSAL: bool, const MASKED: bool>(
    block: &RowBlock<S>,
    mask: Mask<CAUSAL>,
    query: SharedTile,
    ring: &mut KeyValueRing<S>,
    n: u32,
    softmax: &mut OnlineSoftmax<S::Scores>,
    output: &mut S::Output,
) {
    // SAFETY (whole body): `forward`'s; acquired tiles are initialised and visible until the next acquire.
    unsafe {
        let mut scores = S::Scores::zero();
        let key = ring.acquire_key(n);
        scores.add_abt(query, key);
        if MASKED {
            let (first_row, first_key) = (block.first_row + sreg::warp_id() * S::WARP_ROWS, n * S::COLUMNS);
            scores.map_coordinates(|row, column, score| {
                let visible = first_key + column < mask.visible_end(first_row + row);
                if visible { score } else { f32::NEG_INFINITY }
            });
        }
        let rescale = softmax.update(&mut scores);
        output.map_rows(rescale, |rescale, o| o * rescale);
        let probabilities = scores.operand();
        let value = ring.acquire_value(n);
        output.add_ab(&probabilities, value);
    }
}
