//! The forward pass on Hopper over e4m3 inputs with scales: the schedule of [`forward`](super::forward) with products of 8 bits, which have
//! twice the rate.
//!
//! Queries, keys and values are codes. A query's scale is a factor of its row's scores, a key's scale a factor of those of its block,
//! and a value's scale is a factor of the weights of its block, which are rounded to codes for the second product; [`softmax`] has all
//! three. Values are transposed in shared memory by the [`producer`], whose four warps have the time.

mod producer;
mod shared;
mod softmax;

use super::{Shared, WARPGROUP, cluster::Alone, forward, work::Work};
use crate::abi::Fp8ForwardParams;
use crate::mask::{Blocks, Mask, for_blocks_backwards};
use crate::ptx::{mbarrier, memory, optimizer, sreg, sync, wgmma};
use crate::shape::{CodeShape, HOPPER_SLOTS, HopperShape as _};
use crate::softmax::Finished;
use crate::tile::codes::{CodeOutput as _, CodeScores};
use crate::tile::register::{Accumulator, Part, RowValues as _};
use crate::tile::warpgroup::{WarpgroupOutput as _, WarpgroupScores as _};
use softmax::{Softmax, TileScales};

/// Computes a block's share of the launch. `maps` is the generic address of `p`, a kernel parameter.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn forward<S: CodeShape, const CAUSAL: bool>(p: &Fp8ForwardParams, maps: u64) {
    let shared = Shared::<S>::of_this_block();
    // SAFETY: the parts of shared memory are disjoint; barriers are initialised before any thread continues.
    unsafe {
        if sreg::thread_idx_x() == 0 {
            shared.query_slots().init(1, 1, S::CONSUMERS);
            shared.key_slots().init(HOPPER_SLOTS, 1, S::CONSUMERS * 4);
            shared.loaded_slots().init(HOPPER_SLOTS, 1, 4);
            shared.value_slots().init(HOPPER_SLOTS, 4, S::CONSUMERS * 4);
            mbarrier::fence_init();
        }
        sync::sync_threads();
        if sreg::thread_idx_x() < WARPGROUP {
            wgmma::shrink_registers!(S::PRODUCER_REGISTERS);
            producer::produce::<S, CAUSAL>(p, maps, shared);
        } else {
            wgmma::grow_registers!(S::CONSUMER_REGISTERS);
            let of_rows = forward::Consumer::new(&p.forward, shared);
            Consumer::<S, CAUSAL> { p, of_rows }.consume(maps);
        }
    }
}

/// One warpgroup that computes.
struct Consumer<'a, S: CodeShape, const CAUSAL: bool> {
    p: &'a Fp8ForwardParams,
    /// Rows, mask, turns and places in the pipelines.
    of_rows: forward::Consumer<'a, S, Alone, CAUSAL, false>,
}

impl<S: CodeShape, const CAUSAL: bool> Consumer<'_, S, CAUSAL> {
    /// Computes this warpgroup's 64 queries, for every tile of work of the block.
    #[inline(always)]
    unsafe fn consume(&mut self, maps: u64) {
        // SAFETY (whole body): tiles are read between acquire and release; a warpgroup's queries and output are its own.
        unsafe {
            let group = self.of_rows.group;
            if S::TAKES_TURNS && group == S::CONSUMERS - 1 {
                self.of_rows.pass_turn();
            }
            for work in Work::of_this_block::<CAUSAL, false>(&self.p.forward.work, S::BLOCK_M) {
                let mut softmax = Softmax::new(self.row_scales(&work));
                let mut output = S::Output::zero();
                self.of_rows.shared.query_slots().acquire(self.of_rows.queries);
                let blocks = forward::key_blocks::<S, CAUSAL>(&self.p.forward, &self.of_rows.mask, &work);
                let mut met_nan = false;
                if !blocks.is_empty() {
                    met_nan = self.attend(&work, blocks, &mut softmax, &mut output);
                }
                self.finish(&work, blocks, softmax, output, met_nan, maps);
                self.of_rows.queries.advance();
            }
            if S::TAKES_TURNS && group == 0 {
                self.of_rows.take_turn();
            }
        }
    }

    /// Loads the scales of this lane's queries, and multiplies them by the scale of the softmax. Rows that do not exist have that of the
    /// last one.
    #[inline(always)]
    unsafe fn row_scales(&self, work: &Work) -> <S::Scores as Accumulator>::Rows {
        let (p, first_row) = (&self.p.forward, self.of_rows.first_row(work));
        S::Scores::rows_from(|row| {
            let query = self.of_rows.query(first_row + row);
            let head = (work.head << p.packed_log2) + (first_row + row - (query << p.packed_log2));
            // SAFETY: the address is that of a scale.
            let scale = unsafe { memory::ld_global_u32(self.p.q.address_of(head, query)) };
            f32::from_bits(scale) * p.scale_log2
        })
    }

    /// Runs the online softmax over all keys that the tile's queries see, at least one block. Returns true if values of NaN were zeroed.
    #[inline(always)]
    unsafe fn attend(
        &mut self,
        work: &Work,
        blocks: Blocks,
        softmax: &mut Softmax<S::Scores>,
        output: &mut S::Output,
    ) -> bool {
        let (last, before) = self.of_rows.mask.split_last(blocks);
        // SAFETY (whole body): as in `consume`.
        unsafe {
            self.of_rows.shared.key_slots().acquire(self.of_rows.keys);
            wgmma::fence();
            let mut products = self.score();
            wgmma::wait::<0>();
            products.pin();
            let scales = self.take_scales();
            self.of_rows.hide(work, last, &mut products);
            let weights = softmax.raise::<true>(&mut products, S::BLOCKS, scales);
            softmax.weigh(&mut products, S::BLOCKS, Part::WHOLE, &weights);
            softmax.sum(&products, S::BLOCKS, &weights);
            let mut codes = products.pinned_codes();
            self.of_rows.shared.value_slots().acquire(self.of_rows.values);
            let mut met_nan = Mask::<CAUSAL>::HIDES_PAIRS && blocks.is_masked(last) && self.met_nan();
            for_blocks_backwards!(before, |n, MASKED| {
                self.step::<MASKED>(work, n, softmax, output, &mut codes);
                if MASKED && Mask::<CAUSAL>::HIDES_PAIRS {
                    met_nan |= self.met_nan();
                }
            });
            wgmma::fence();
            self.add_values(&codes, output);
            wgmma::wait::<0>();
            output.pin();
            self.of_rows.release_value();
            met_nan
        }
    }

    /// Computes the weights of key block `n`, overlapped with the product of the previous block's weights and values.
    #[inline(always)]
    unsafe fn step<const MASKED: bool>(
        &mut self,
        work: &Work,
        n: u32,
        softmax: &mut Softmax<S::Scores>,
        output: &mut S::Output,
        codes: &mut <S::Scores as CodeScores>::Codes,
    ) {
        // SAFETY (whole body): as in `consume`.
        unsafe {
            self.of_rows.shared.key_slots().acquire(self.of_rows.keys);
            self.of_rows.take_turn();
            wgmma::fence();
            let mut products = self.score();
            self.add_values(codes, output);
            self.of_rows.pass_turn();
            wgmma::wait::<1>();
            products.pin();
            let scales = self.take_scales();
            let mut values = self.of_rows.values;
            values.advance();
            let is_full = self.of_rows.shared.value_slots().is_full(values);
            if MASKED {
                self.of_rows.hide(work, n, &mut products);
            }
            let weights = softmax.raise::<MASKED>(&mut products, S::BLOCKS, scales);
            let [before, after] = Part::split(S::EIGHTHS_BEFORE);
            softmax.weigh(&mut products, S::BLOCKS, before, &weights);
            products.pin();
            // Awaited here, the next values keep ptxas from moving the wait for the output to another place.
            if !is_full {
                self.of_rows.shared.value_slots().acquire(values);
            }
            wgmma::wait::<0>();
            output.pin();
            self.of_rows.release_value();
            softmax.weigh(&mut products, S::BLOCKS, after, &weights);
            softmax.sum(&products, S::BLOCKS, &weights);
            if !S::SKIPS_RESCALING || sync::any(weights.rescale.any(|rescale| rescale != 1.0)) {
                output.map_rows(weights.rescale, |rescale, o| o * rescale);
            }
            *codes = products.pinned_codes();
        }
    }

    /// Issues Q K^T with the tile of keys that was acquired.
    #[inline(always)]
    unsafe fn score(&self) -> S::Scores {
        let (shared, of_rows) = (self.of_rows.shared, &self.of_rows);
        // SAFETY: as in `consume`.
        unsafe {
            let queries = shared.query_codes(of_rows.group);
            let products = S::Scores::product_of_codes(queries, shared.key_codes(of_rows.keys.slot));
            wgmma::commit();
            products
        }
    }

    /// Issues `output += P V` with the acquired tile of values.
    #[inline(always)]
    unsafe fn add_values(&self, weights: &<S::Scores as CodeScores>::Codes, output: &mut S::Output) {
        let (shared, slot) = (self.of_rows.shared, self.of_rows.values.slot);
        // SAFETY: as in `consume`.
        unsafe {
            output.add_codes(weights, shared.value_codes(slot));
            wgmma::commit();
        }
    }

    /// Reads the scales of the acquired tile of keys, whose products are done, and releases it.
    #[inline(always)]
    unsafe fn take_scales(&mut self) -> TileScales {
        // SAFETY (whole body): as in `consume`. All lanes have read before one of them releases the tile.
        unsafe {
            let [a, b, c, d] = memory::ld_shared_v4(self.of_rows.shared.scales(self.of_rows.keys.slot));
            sync::sync_warp();
            self.of_rows.release_key();
            TileScales {
                keys: [a, b],
                values_log2: [c, d],
            }
        }
    }

    /// Returns true if values of NaN were zeroed in the acquired tile, which hides pairs.
    #[inline(always)]
    unsafe fn met_nan(&self) -> bool {
        let slot = self.of_rows.values.slot;
        // SAFETY: as in `consume`. All lanes have read before one of them releases the tile.
        let words = unsafe { memory::ld_shared_words(self.of_rows.shared.found_nan(slot)) };
        sync::sync_warp();
        words[0] | words[1] | words[2] | words[3] != 0
    }

    /// Normalises and stores the results.
    #[inline(always)]
    unsafe fn finish(
        &mut self,
        work: &Work,
        blocks: Blocks,
        softmax: Softmax<S::Scores>,
        mut output: S::Output,
        met_nan: bool,
        maps: u64,
    ) {
        let p = &self.p.forward;
        let first_row = self.of_rows.first_row(work);
        let span = |row| self.of_rows.mask.keys_of(self.of_rows.query(first_row + row));
        let finished = softmax.finish(p.scale_log2, |row| !span(row).is_empty());
        // The scale that those of other values are relative to; without keys it is that of the first.
        let first_key = (blocks.end - !blocks.is_empty() as u32) * S::BLOCK_N;
        let unit = self.p.v.address_of(work.head / p.heads_per_kv, first_key);
        // SAFETY: the address is that of a scale.
        let unit = f32::from_bits(unsafe { memory::ld_global_u32(unit) });
        output.map_rows(finished.inverse, |inverse, o| o * inverse * unit);
        if met_nan {
            core::hint::cold_path();
            // SAFETY: the blocks are those of keys that exist.
            unsafe { self.restore_nan(work, blocks, &mut output) }
        }
        let out = producer::map!(maps, out);
        // SAFETY: each warp awaited the warpgroup's products with these queries; lse holds an f32 for each query.
        unsafe { self.of_rows.store(work, output, finished, out, false) }
    }

    /// Makes NaN of outputs of which a visible value in a masked block is NaN. Weights are at least 0, so it reaches a sum as it is.
    #[inline(always)]
    unsafe fn restore_nan(&self, work: &Work, blocks: Blocks, output: &mut S::Output) {
        let p = &self.p.forward;
        let (batch, head) = (work.head / p.heads, work.head % p.heads / p.heads_per_kv);
        let (values, first_row) = (&p.values, self.of_rows.first_row(work));
        let base = values.address + batch as u64 * values.batch_stride + head as u64 * values.head_stride;
        let whole = blocks.whole_begin * S::BLOCK_N..blocks.whole_end * S::BLOCK_N;
        for position in blocks.begin * S::BLOCK_N..(blocks.end * S::BLOCK_N).min(p.seqlen_k) {
            if whole.contains(&position) {
                continue;
            }
            let row_address = base + position as u64 * values.row_stride;
            // Recomputed for each position: kept, columns would occupy registers during the whole loop.
            let none = optimizer::renew(0);
            output.map_coordinates(|row, column, x| {
                let column = column + none;
                let span = self.of_rows.mask.keys_of(self.of_rows.query(first_row + row));
                if !span.contains(position) || column >= p.layout.head_dim {
                    return x;
                }
                // SAFETY: the element exists.
                let code = unsafe { memory::ld_global_u8(row_address + column as u64) };
                if code & 0x7f == 0x7f { f32::NAN } else { x }
            });
        }
    }
}
