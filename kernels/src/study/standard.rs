//! Standard attention as three plain f32 kernels, with which FlashAttention is compared.
//!
//! [`scores`] writes S = scale * Q K^T to device memory, [`softmax`] turns its rows into P in place, [`output`] reads
//! P for O = P V. The N x N matrix is written twice and read three times. Nothing is slow on purpose: products use
//! shared memory with the tiles of the fused kernel, and the softmax finds maximum and sum in one pass.

use super::StandardParams;
use crate::abi::ForwardParams;
use crate::block::{RowBlock, owned_tile, split};
use crate::mask::Mask;
use crate::ptx::{copy, math, memory, sreg, sync};
use crate::shape::TileShape;
use crate::tile::register::{Accumulator, OutputTile, ScoreTile};
use crate::tile::{global::Walk, shared::SharedTile};
use core::f32::consts::{LN_2, LOG2_E};

/// Returns the address of `S[row, 0]` in the head of `block`.
#[inline(always)]
fn row_of_scores<S: TileShape>(p: &StandardParams, block: &RowBlock<S>, row: u32) -> u64 {
    let row = block.row_of_head(p.forward.heads_q, p.forward.seqlen_q) + row as u64;
    p.scores + row * p.forward.seqlen_k as u64 * 4
}

/// Computes one tile of S: `ROWS` queries by `COLUMNS` keys. The mask is applied here, so hidden pairs are -inf.
///
/// # Safety
/// Launched as its row of `entries` says: `query_tiles * key_tiles` blocks per head, with valid parameters.
#[inline(always)]
pub unsafe fn scores<S: TileShape, const CAUSAL: bool>(p: &StandardParams) {
    let ForwardParams {
        seqlen_q,
        seqlen_k,
        layout,
        ..
    } = p.forward;
    let mask = Mask::<CAUSAL>::new(seqlen_q, seqlen_k);
    let (rest, key_tile) = (sreg::block_idx_x() / p.key_tiles, sreg::block_idx_x() % p.key_tiles);
    let block = RowBlock::<S>::of_block(rest, p.forward.query_tiles, p.forward.heads_q, false);
    let first_key = key_tile * S::COLUMNS;
    let warp_row = sreg::warp_id() * S::WARP_ROWS;
    let key = SharedTile::new(sreg::dynamic_shared_mem() + S::OWNED_BYTES, S::ROW_BYTES);
    // SAFETY (whole body): the two tiles are disjoint parts of this block's shared memory, and windows clip what does
    // not exist.
    unsafe {
        let q = block
            .window(&p.forward.q, block.head, seqlen_q, &layout)
            .rows_from(block.first_row);
        let k = block
            .window(&p.forward.k, block.head / p.forward.heads_q_per_kv, seqlen_k, &layout)
            .rows_from(first_key);
        owned_tile::<S>(0).load_async(&mut Walk::new(q, split::<S>()), S::ROWS);
        key.load_async(&mut Walk::new(k, split::<S>()), S::COLUMNS);
        copy::cp_async_commit();
        copy::cp_async_wait::<0>();
        sync::sync_threads();

        let mut scores = S::Scores::zero();
        scores.add_abt(owned_tile::<S>(0).rows_from(warp_row), key);
        scores.map_coordinates(|row, column, score| {
            let (row, column) = (block.first_row + warp_row + row, first_key + column);
            if row < seqlen_q && column < seqlen_k {
                let visible = mask.keys_of(row).contains(column);
                let score = if visible {
                    score * p.forward.scale * p.forward.scale_sign
                } else {
                    f32::NEG_INFINITY
                };
                memory::st_global_u32(row_of_scores(p, &block, row) + column as u64 * 4, score.to_bits());
            }
            score
        });
    }
}

/// Turns `ROWS` rows of S into P, in place, one row per warp at a time, and writes their lse.
///
/// # Safety
/// The contract of [`scores`], with `query_tiles` blocks per head, launched after it.
#[inline(always)]
pub unsafe fn softmax<S: TileShape, const CAUSAL: bool>(p: &StandardParams) {
    let ForwardParams { seqlen_q, seqlen_k, .. } = p.forward;
    let mask = Mask::<CAUSAL>::new(seqlen_q, seqlen_k);
    let block = RowBlock::<S>::of_block(sreg::block_idx_x(), p.forward.query_tiles, p.forward.heads_q, false);
    let lane = sreg::lane_id();
    for r in 0..S::WARP_ROWS {
        let row = block.first_row + sreg::warp_id() * S::WARP_ROWS + r;
        if row >= seqlen_q {
            break;
        }
        let address = row_of_scores(p, &block, row);
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut column = lane;
        while column < seqlen_k {
            // SAFETY: `scores` wrote every element of the row.
            let x = unsafe { f32::from_bits(memory::ld_global_u32(address + column as u64 * 4)) };
            (max, sum) = add(max, sum, x, 1.0);
            column += 32;
        }
        let mut distance = 1;
        while distance < 32 {
            let (other_max, other_sum) = (sync::shuffle_xor(max, distance), sync::shuffle_xor(sum, distance));
            (max, sum) = add(max, sum, other_max, other_sum);
            distance *= 2;
        }
        let sees_keys = !mask.keys_of(row).is_empty();
        let inverse = if sees_keys { math::rcp(sum) } else { 0.0 };
        let mut column = lane;
        while column < seqlen_k {
            let at = address + column as u64 * 4;
            // SAFETY: `scores` wrote every element of the row; each element belongs to one lane.
            unsafe {
                let x = f32::from_bits(memory::ld_global_u32(at));
                memory::st_global_u32(at, (math::ex2((x - finite(max)) * LOG2_E) * inverse).to_bits());
            }
            column += 32;
        }
        if lane == 0 {
            let lse = if sees_keys {
                math::fma(math::lg2(sum), LN_2, max)
            } else {
                f32::NEG_INFINITY
            };
            let at = p.forward.lse + (block.row_of_head(p.forward.heads_q, seqlen_q) + row as u64) * 4;
            // SAFETY: lse holds an f32 for each query.
            unsafe { memory::st_global_u32(at, lse.to_bits()) }
        }
    }
}

/// Combines maximum and sum of exponentials of two sets.
#[inline(always)]
fn add(max: f32, sum: f32, other_max: f32, other_sum: f32) -> (f32, f32) {
    let new = finite(max.max(other_max));
    let rescale = |x: f32| math::ex2((x - new) * LOG2_E);
    (max.max(other_max), sum * rescale(max) + other_sum * rescale(other_max))
}

/// Returns the maximum to subtract: 0 where no key was seen, since `-inf - -inf` is NaN.
#[inline(always)]
fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Computes `ROWS` rows of O = P V.
///
/// # Safety
/// The contract of [`scores`], with `query_tiles` blocks per head, launched after [`softmax`].
#[inline(always)]
pub unsafe fn output<S: TileShape, const CAUSAL: bool>(p: &StandardParams) {
    let ForwardParams {
        seqlen_q,
        seqlen_k,
        layout,
        ..
    } = p.forward;
    let block = RowBlock::<S>::of_block(sreg::block_idx_x(), p.forward.query_tiles, p.forward.heads_q, false);
    let first_row = block.first_row + sreg::warp_id() * S::WARP_ROWS;
    let value = SharedTile::new(sreg::dynamic_shared_mem() + S::OWNED_BYTES, S::ROW_BYTES);
    // SAFETY (whole body): the tile is this block's shared memory, and windows clip elements that do not exist.
    unsafe {
        let v = block.window(&p.forward.v, block.head / p.forward.heads_q_per_kv, seqlen_k, &layout);
        let mut walk = Walk::new(v, split::<S>());
        let mut output = S::Output::zero();
        for n in 0..seqlen_k.div_ceil(S::COLUMNS) {
            value.load_async(&mut walk, S::COLUMNS);
            copy::cp_async_commit();
            copy::cp_async_wait::<0>();
            sync::sync_threads();
            let mut probabilities = S::Scores::zero();
            probabilities.map_coordinates(|row, column, zero| {
                let (row, column) = (first_row + row, n * S::COLUMNS + column);
                if row < seqlen_q && column < seqlen_k {
                    f32::from_bits(memory::ld_global_u32(row_of_scores(p, &block, row) + column as u64 * 4))
                } else {
                    zero
                }
            });
            output.add_ab(&probabilities.operand(), value);
            sync::sync_threads();
        }
        let target = block
            .window(&p.forward.out, block.head, seqlen_q, &layout)
            .rows_from(first_row);
        output.store(owned_tile::<S>(0).rows_from(sreg::warp_id() * S::WARP_ROWS), &target);
    }
}
