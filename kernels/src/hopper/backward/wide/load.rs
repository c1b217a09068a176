//! The producer of a backward block above head_dim 128: loads, in the order in which consumers use them, and turns.

use super::shared::Tiles;
use crate::abi::HopperBackwardParams;
use crate::hopper::work::Work;
use crate::mask::Mask;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{optimizer, sync, tma::Corner};
use crate::shape::WideBackwardShape;
use core::mem::offset_of;

/// Loads K and V of each tile of work, and the queries that see them with their dO, lse and delta. One thread calls it.
#[inline(always)]
pub unsafe fn load<S: WideBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, maps: u64, tiles: Tiles<S>) {
    let mut owned = Cursor::<1>::start();
    let mut steps = 0;
    for work in Work::of_this_block::<CAUSAL, true>(&p.work, S::ROWS) {
        // SAFETY (whole body): a slot is refilled once it is empty; its barrier counts the bytes of the boxes that
        // follow; the per-query arrays are padded to whole tiles.
        unsafe {
            tiles.load_keys(&mut owned, [map!(maps, k), map!(maps, v)], work.corner(p.heads_kv, 0));
            // Registers are few here: the loop must not be unrolled, and most is worked out anew where it is needed.
            let mask = Mask::<CAUSAL>::new(optimizer::renew(p.seqlen_q), p.seqlen_k);
            let blocks = mask.query_blocks(work.first_row, work.rows(p.seqlen_k), S::COLUMNS);
            for i in query_heads(p) {
                for m in (blocks.begin..).take_while(|&m| m < optimizer::renew(blocks.end)) {
                    let place = || {
                        let head = optimizer::renew(work.head) * p.heads_q_per_kv.get() + i;
                        let corner = Corner {
                            batch: head / p.heads_q,
                            head: head % p.heads_q,
                            row: optimizer::renew(m) * S::COLUMNS,
                            column: 0,
                        };
                        (corner, head as u64 * p.sums.padded_q.get() as u64 + corner.row as u64)
                    };
                    let tiles = tiles.renewed();
                    tiles.load_queries(Cursor::after(steps), map!(maps, q), place(), &p.sums);
                    tiles.load_douts(Cursor::after(steps).of_single(), map!(maps, dout), place(), &p.sums);
                    steps += 1;
                }
            }
        }
    }
}

/// Takes turns at the dQ of each streamed tile for warpgroup `group`, in deterministic mode. One thread calls it.
///
/// Each square of queries is added in the order of its keys, [`Deal::place`](crate::deal::Deal::place), so that the sum has
/// the same bits in every run: the thread waits for its turn on the semaphore of the warpgroup's first square, lets the
/// warpgroup add, and passes the turn once all its warps have.
#[inline(always)]
pub unsafe fn take_turns<S: WideBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    tiles: Tiles<S>,
    group: u32,
) {
    let mut turns = Cursor::<1>::start();
    let slots = tiles.turn_slots(group);
    for work in Work::of_this_block::<CAUSAL, true>(&p.work, S::ROWS) {
        let mask = Mask::<CAUSAL>::new(optimizer::renew(p.seqlen_q), p.seqlen_k);
        let blocks = mask.query_blocks(work.first_row, work.rows(p.seqlen_k), S::COLUMNS);
        for i in query_heads(p) {
            let first = (work.head * p.heads_q_per_kv.get() + i) * (p.sums.padded_q.get() / S::COLUMNS);
            for m in (blocks.begin..).take_while(|&m| m < optimizer::renew(blocks.end)) {
                let square = ((first + m) * S::ALL_SLICES + group * S::SLICES) as u64;
                let turn = p.sums.turns + square * 4;
                let keys = mask.key_blocks(m * S::COLUMNS, S::COLUMNS, S::ROWS);
                // SAFETY (whole body): each square has a semaphore; the warpgroup adds between acquire and release.
                unsafe {
                    sync::wait_for(turn, work.place(keys));
                    slots.fill(turns);
                    turns.advance();
                    slots.wait_empty(turns);
                    sync::signal(turn);
                }
            }
        }
    }
}

/// Iterates over the query heads that share a key head. Their number is read anew for each: a comparison with it that all loops
/// share is kept on the stack.
#[inline(always)]
pub fn query_heads(p: &HopperBackwardParams) -> impl Iterator<Item = u32> {
    (0..).take_while(|&i| i < optimizer::renew(p.heads_q_per_kv.get()))
}
