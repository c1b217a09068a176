//! Adds dQ of the streamed tiles to the accumulator in device memory, while the consumers continue.

use crate::abi::HopperBackwardParams;
use crate::hopper::{Shared, work::Work};
use crate::mask::Mask;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{optimizer, sync, tma};
use crate::shape::HopperBackwardShape;

/// Adds the dQ of warpgroup `group`. One thread calls it.
///
/// By default additions have any order. In deterministic mode each square of queries is added in the order of its
/// keys, [`Deal::place`](crate::deal::Deal::place), so that the sum has the same bits in every run: the thread waits
/// for its turn on the square's semaphore.
#[inline(always)]
pub unsafe fn add_queries<S: HopperBackwardShape, const CAUSAL: bool>(
    p: &HopperBackwardParams,
    shared: Shared<S>,
    group: u32,
) {
    let mut shares = Cursor::<1>::start();
    let slots = shared.dq_slots(group);
    for work in Work::of_this_block::<CAUSAL, true>(&p.work, S::ROWS) {
        let mask = Mask::<CAUSAL>::new(optimizer::renew(p.seqlen_q), optimizer::renew(p.seqlen_k));
        let blocks = mask.query_blocks(work.first_row, work.rows(p.seqlen_k), S::COLUMNS);
        for i in 0..p.heads_q_per_kv.get() {
            let first = (work.head * p.heads_q_per_kv.get() + i) * (p.sums.padded_q.get() / S::COLUMNS);
            for m in (blocks.begin..).take_while(|&m| m < optimizer::renew(blocks.end)) {
                let square = ((first + m) * S::CONSUMERS + group) as u64;
                let (turn, is_ordered) = (p.sums.turns + square * 4, p.sums.turns != 0);
                // SAFETY (whole body): the accumulator is padded to whole squares, with a semaphore each; the
                // consumer's dQ is read between acquire and release.
                unsafe {
                    slots.acquire(shares);
                    if is_ordered {
                        // Made again: kept, it would take registers, of which this thread has few.
                        let mask = Mask::<CAUSAL>::new(optimizer::renew(p.seqlen_q), optimizer::renew(p.seqlen_k));
                        let keys = mask.key_blocks(m * S::COLUMNS, S::COLUMNS, S::ROWS);
                        sync::wait_for(turn, work.place(keys));
                        tma::fence_async_global();
                    }
                    tma::add_run(p.sums.dq + square * S::DQ_BYTES as u64, shared.dq(group), S::DQ_BYTES);
                    tma::wait_read();
                    slots.release(shares.slot);
                    if is_ordered {
                        tma::wait_written();
                        sync::signal(turn);
                    }
                }
                shares.advance();
            }
        }
    }
}
