//! What the first warpgroup of a backward block loads, in the order in which the consumers take it.

use crate::abi::HopperBackwardParams;
use crate::hopper::{Shared, work::Work};
use crate::mask::{Blocks, Mask};
use crate::pipeline::bulk::Cursor;
use crate::ptx::{memory, sreg, sync, tma::Corner};
use crate::shape::{HOPPER_SLOTS, HopperBackwardShape};
use crate::softmax::log2_of;
use core::mem::offset_of;

/// Loads Q and dO of each tile of work, and the keys and values that they see. One thread.
#[inline(always)]
pub unsafe fn load_keys<S: HopperBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    maps: u64,
    shared: Shared<S>,
) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let (mut owned, mut streamed) = (Cursor::<1>::start(), Cursor::<HOPPER_SLOTS>::start());
    for work in Work::of_this_block(&p.work, S::ROWS, true) {
        // SAFETY (whole body): a slot is refilled when it is empty; its barrier counts the bytes of the boxes that follow.
        unsafe {
            shared.load_owned(&mut owned, [map!(maps, q), map!(maps, dout)], |group| {
                work.corner(p.heads_q, group)
            });
            let end = sync::renew(mask.key_blocks(work.first_row, work.rows(p.seqlen_q), S::COLUMNS).end);
            for n in 0..end {
                let corner = Corner {
                    batch: work.head / p.heads_q,
                    head: work.head % p.heads_q / p.heads_q_per_kv,
                    row: n * S::COLUMNS,
                    column: 0,
                };
                shared.load_streamed(&mut streamed, [map!(maps, k), map!(maps, v)], corner);
            }
        }
    }
}

/// Loads K and V of each tile of work, and the queries that see them with their dO. One thread.
#[inline(always)]
pub unsafe fn load_queries<S: HopperBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    maps: u64,
    shared: Shared<S>,
) {
    let mut owned = Cursor::<1>::start();
    let mut streamed = Cursor::<HOPPER_SLOTS>::start();
    for work in Work::of_this_block(&p.work, S::ROWS, false) {
        // SAFETY (whole body): as in `load_keys`.
        unsafe {
            shared.load_owned(&mut owned, [map!(maps, k), map!(maps, v)], |group| {
                work.corner(p.heads_kv, group)
            });
            for_each_query_tile::<S, CAUSAL>(p, &work, |head, m| {
                let corner = Corner {
                    batch: head / p.heads_q,
                    head: head % p.heads_q,
                    row: m * S::COLUMNS,
                    column: 0,
                };
                shared.load_streamed(&mut streamed, [map!(maps, q), map!(maps, dout)], corner);
            });
        }
    }
}

/// Loads lse, in base 2, and delta of the same queries. One warp.
#[inline(always)]
pub unsafe fn load_statistics<S: HopperBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, shared: Shared<S>) {
    let mut streamed = Cursor::<HOPPER_SLOTS>::start();
    let lane = sreg::lane_id();
    for work in Work::of_this_block(&p.work, S::ROWS, false) {
        for_each_query_tile::<S, CAUSAL>(p, &work, |head, m| {
            // SAFETY (whole body): the slot is empty; lse and delta hold an f32 for each query.
            unsafe {
                shared.streamed_slots().wait_empty(streamed);
                for i in 0..S::COLUMNS.div_ceil(32) {
                    let (column, row) = (i * 32 + lane, m * S::COLUMNS + i * 32 + lane);
                    if column < S::COLUMNS {
                        // Queries that do not exist weigh 1, and their dO is 0.
                        let (mut lse, mut delta) = (0.0, 0.0);
                        if row < p.seqlen_q {
                            let at = (head as u64 * p.seqlen_q as u64 + row as u64) * 4;
                            lse = log2_of(f32::from_bits(memory::ld_global_u32(p.lse + at)));
                            delta = f32::from_bits(memory::ld_global_u32(p.delta + at));
                        }
                        memory::st_shared_word(shared.lse(streamed.slot) + column * 4, lse.to_bits());
                        memory::st_shared_word(shared.delta(streamed.slot) + column * 4, delta.to_bits());
                    }
                }
                sync::sync_warp();
                if lane == 0 {
                    shared.streamed_slots().fill(streamed);
                }
                streamed.advance();
            }
        });
    }
}

/// Every (query head, query tile) that sees keys of the tile of work, in the order of the consumers; twice where dK and dV
/// are two walks.
#[inline(always)]
fn for_each_query_tile<S: HopperBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    work: &Work,
    mut visit: impl FnMut(u32, u32),
) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let Blocks { begin, end, .. } = mask.query_blocks(work.first_row, work.rows(p.seqlen_k), S::COLUMNS);
    let walks = if S::TWO_WALKS { 2 } else { 1 };
    for i in 0..walks * p.heads_q_per_kv.get() {
        let head = work.head * p.heads_q_per_kv.get() + i % p.heads_q_per_kv;
        for m in begin..sync::renew(end) {
            visit(head, m);
        }
    }
}
