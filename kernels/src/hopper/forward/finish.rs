//! The end of a tile of work: results are normalised and stored.

use super::{Consumer, corner, key_blocks};
use crate::abi::HopperForwardParams;
use crate::hopper::cluster::Cluster;
use crate::hopper::{WARPGROUP, warp_of_group, work::Work};
use crate::mask::Mask;
use crate::nonfinite;
use crate::ptx::{memory, program, sreg, tma};
use crate::shape::HopperShape;
use crate::softmax::{Finished, OnlineSoftmax};
use crate::tile::register::{Accumulator, RowValues};
use crate::tile::warpgroup::WarpgroupOutput;
use crate::tile::{element::Element, global::GlobalTile};
use core::mem::offset_of;

impl<S: HopperShape, C: Cluster, const CAUSAL: bool, const PROGRAM: bool> Consumer<'_, S, C, CAUSAL, PROGRAM> {
    /// Normalises and stores the output, through the shared memory that held the queries, and stores lse.
    #[inline(always)]
    pub(super) unsafe fn finish(
        &mut self,
        work: &Work,
        softmax: OnlineSoftmax<S::Scores>,
        mut output: S::Output,
        maps: u64,
    ) {
        let first_row = self.first_row(work);
        let span = |row| self.mask.keys_of(self.query(first_row + row));
        let finished = softmax.finish(|row| !PROGRAM && !span(row).is_empty());
        output.map_rows(finished.inverse, |inverse, o| S::Element::mean(o * inverse));
        let hides_pairs = Mask::<CAUSAL>::HIDES_PAIRS || PROGRAM && program::hides();
        // SAFETY: initialised before the block went on, and set before a barrier of all consumers.
        let cleaned = hides_pairs && unsafe { memory::ld_shared_u32(self.shared.cleaned(self.group)) } != 0;
        if cleaned {
            let (batch, head) = (work.head / self.p.heads, work.head % self.p.heads / self.p.heads_per_kv);
            let values = GlobalTile::new(
                &self.p.values,
                batch,
                head,
                self.p.seqlen_k,
                &self.p.layout,
                S::Element::BYTES,
            );
            let blocks = key_blocks::<S, CAUSAL>(self.p, &self.mask, work);
            // SAFETY: the window clips what does not exist.
            unsafe {
                if PROGRAM {
                    let sees = |row, key| program::visible(first_row + row, key, work.head);
                    nonfinite::restore::<S::Element, _>(&mut output, &values, blocks.all_masked(), S::BLOCK_N, sees);
                } else {
                    let sees = |row, key| span(row).contains(key);
                    nonfinite::restore::<S::Element, _>(&mut output, &values, blocks, S::BLOCK_N, sees);
                }
            }
        } else {
            // Not because this branch is rare: with the code above before the stores, ptxas leaves more registers to the main loop.
            core::hint::cold_path();
        }
        // SAFETY: the caller's contract.
        unsafe {
            let out = maps + offset_of!(HopperForwardParams, out) as u64;
            self.store(work, output, finished, out, cleaned);
        }
    }

    /// Stores the output, by the map `out` through the shared memory that held the queries, and statistics: lse, row_max and row_sum.
    ///
    /// # Safety
    /// Each warp awaited the warpgroup's products with these queries. If values were `cleaned`, the warpgroup has read its flag.
    #[inline(always)]
    pub(in crate::hopper) unsafe fn store(
        &self,
        work: &Work,
        output: S::Output,
        finished: Finished<<S::Scores as Accumulator>::Rows>,
        out: u64,
        cleaned: bool,
    ) {
        let staging = self.shared.query(self.group);
        // SAFETY (whole body): each warp awaited the warpgroup's products with these queries before it arrives at the
        // first barrier; lse holds an f32 for each query.
        unsafe {
            self.sync_group();
            output.write(staging, warp_of_group() * 16, sreg::lane_id());
            tma::fence_async();
            self.sync_group();
            if sreg::thread_idx_x() % WARPGROUP == 0 {
                staging.store(out, corner(self.p, work, self.group));
                if cleaned {
                    memory::st_shared_word(self.shared.cleaned(self.group), 0);
                }
                tma::wait_read();
                self.shared.query_slots().release(self.queries.slot);
            }
            self.store_rows(work, finished.lse, self.p.lse);
            if self.p.row_max != 0 {
                self.store_rows(work, finished.row_max, self.p.row_max);
                self.store_rows(work, finished.row_sum, self.p.row_sum);
            }
        }
    }

    /// Stores an f32 for each of the warp's queries to the array at `address`.
    ///
    /// # Safety
    /// The array has an f32 for each query.
    #[inline(always)]
    unsafe fn store_rows(&self, work: &Work, values: <S::Scores as Accumulator>::Rows, address: u64) {
        let first_row = self.first_row(work);
        S::Scores::for_each_row(values, |row, value| {
            let query = self.query(first_row + row);
            if query < self.p.seqlen_q {
                let head = (work.head << self.p.packed_log2) + (first_row + row - (query << self.p.packed_log2));
                let index = head as u64 * self.p.seqlen_q as u64 + query as u64;
                // SAFETY: the caller's contract.
                unsafe { memory::st_global_u32(address + index * 4, value.to_bits()) }
            }
        });
    }
}
