//! Loads of the producer, the first warpgroup of a backward block, in the order in which consumers use them.

use crate::abi::HopperBackwardParams;
use crate::hopper::{Shared, work::Work};
use crate::mask::Mask;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{optimizer, tma::Corner};
use crate::shape::{HOPPER_SLOTS, HopperBackwardShape};
use core::mem::offset_of;

/// Loads K and V of each tile of work, and the queries that see them with their dO, lse and delta. One thread calls
/// it.
#[inline(always)]
pub unsafe fn load_queries<S: HopperBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    maps: u64,
    shared: Shared<S>,
) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let mut owned = Cursor::<1>::start();
    let mut streamed = Cursor::<HOPPER_SLOTS>::start();
    for work in Work::of_this_block::<CAUSAL, true>(&p.work, S::ROWS) {
        // SAFETY (whole body): a slot is refilled once it is empty; its barrier counts the bytes of the boxes that
        // follow; the per-query arrays are padded to whole tiles.
        unsafe {
            shared.load_owned(&mut owned, [map!(maps, k), map!(maps, v)], |group| {
                work.corner(p.heads_kv, group)
            });
            let blocks = mask.query_blocks(work.first_row, work.rows(p.seqlen_k), S::COLUMNS);
            for i in 0..p.heads_q_per_kv.get() {
                let head = work.head * p.heads_q_per_kv.get() + i;
                // Registers are few here: the loop must not be unrolled.
                for m in (blocks.begin..).take_while(|&m| m < optimizer::renew(blocks.end)) {
                    let corner = Corner {
                        batch: head / p.heads_q,
                        head: head % p.heads_q,
                        row: m * S::COLUMNS,
                        column: 0,
                    };
                    let sums = head as u64 * p.sums.padded_q.get() as u64 + corner.row as u64;
                    shared.load_queries(&mut streamed, [map!(maps, q), map!(maps, dout)], corner, &p.sums, sums);
                }
            }
        }
    }
}
