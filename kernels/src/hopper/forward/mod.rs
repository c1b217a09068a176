//! The forward pass on Hopper: Algorithm 1 on the schedule of FlashAttention-3.
//!
//! One thread of the first warpgroup, the producer, loads the queries of each tile of work, and keys and values
//! through pipelines. The other warpgroups, the consumers, each own 64 queries. While the tensor cores multiply one
//! tile of values, a consumer turns the scores of the next tile of keys into probabilities. Consumers take turns at
//! issuing products, so that the exponentials of one overlap with the products of another. Probabilities never leave
//! the registers.
//!
//! If a head has few queries, the query heads that share keys are packed (PackGQA): a tile holds the first query of
//! all of them, then the second, and so on.
//!
//! Blocks are persistent: each takes several tiles of work. Keys are processed from the last to the first. The few
//! that need a mask come first, and the loop over the others has no mask. The blocks of a [`Cluster`] share the loads of
//! keys and values.

mod finish;
mod shared;

use super::cluster::{Alone, Cluster, Pairs};
use super::{Barrier, Shared, WARPGROUP, warp_of_group, work::Work};
use crate::abi::HopperForwardParams;
use crate::mask::{Blocks, Mask, for_blocks_backwards};
use crate::pipeline::bulk::{Cursor, Slots};
use crate::ptx::{mbarrier, memory, optimizer, program, sreg, sync, tma, tma::Corner, wgmma};
use crate::shape::{HOPPER_ROWS, HOPPER_SLOTS, HopperShape};
use crate::softmax::OnlineSoftmax;
use crate::tile::element::Element;
use crate::tile::register::{Accumulator, Part, RowValues, Rows, ScoreTile};
use crate::tile::warpgroup::{WarpgroupOutput, WarpgroupScores};
use core::marker::PhantomData;
use core::mem::offset_of;

/// Computes a block's share of the launch. `maps` is the generic address of `p`, a kernel parameter.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn forward<S: HopperShape, const CAUSAL: bool>(p: &HopperForwardParams, maps: u64) {
    // SAFETY: the caller's contract.
    unsafe { forward_with::<S, Alone, CAUSAL, false>(p, maps) }
}

/// [`forward`] with the markers of a score program, whose mask applies to every tile. Heads are not packed.
///
/// # Safety
/// The contract of [`forward`].
#[inline(always)]
pub unsafe fn program<S: HopperShape>(p: &HopperForwardParams, maps: u64) {
    // SAFETY: the caller's contract.
    unsafe { forward_with::<S, Alone, false, true>(p, maps) }
}

/// [`forward`] in clusters, without a mask.
///
/// # Safety
/// The contract of [`forward`].
#[inline(always)]
pub unsafe fn in_clusters<S: HopperShape>(p: &HopperForwardParams, maps: u64) {
    // SAFETY: the caller's contract.
    unsafe { forward_with::<S, Pairs, false, false>(p, maps) }
}

#[inline(always)]
unsafe fn forward_with<S: HopperShape, C: Cluster, const CAUSAL: bool, const PROGRAM: bool>(
    p: &HopperForwardParams,
    maps: u64,
) {
    let shared = Shared::<S>::of_this_block();
    // SAFETY: the parts of shared memory are disjoint; barriers are initialised before any thread continues.
    unsafe {
        if sreg::thread_idx_x() == 0 {
            shared.query_slots().init(1, 1, S::CONSUMERS);
            shared.key_slots().init(HOPPER_SLOTS, 1, C::BLOCKS * S::CONSUMERS * 4);
            shared.value_slots().init(HOPPER_SLOTS, 1, C::BLOCKS * S::CONSUMERS * 4);
            for group in 0..S::CONSUMERS {
                memory::st_shared_word(shared.cleaned(group), 0);
            }
            mbarrier::fence_init();
        }
        C::start();
        if sreg::thread_idx_x() < WARPGROUP {
            wgmma::shrink_registers!(S::PRODUCER_REGISTERS);
            if sreg::thread_idx_x() == 0 {
                produce::<S, C, CAUSAL>(p, maps, shared);
            }
        } else {
            wgmma::grow_registers!(S::CONSUMER_REGISTERS);
            Consumer::<S, C, CAUSAL, PROGRAM>::new(p, shared).consume(maps);
        }
        C::end();
    }
}

/// Loads every tile that the block's consumers use, in their order. One thread calls it.
#[inline(always)]
unsafe fn produce<S: HopperShape, C: Cluster, const CAUSAL: bool>(
    p: &HopperForwardParams,
    maps: u64,
    shared: Shared<S>,
) {
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let (mut queries, mut tiles) = (Cursor::<1>::start(), Cursor::<HOPPER_SLOTS>::start());
    let map = |offset: usize| maps + offset as u64;
    for work in Work::of::<CAUSAL, false>(&p.work, C::place(), C::BLOCKS * S::BLOCK_M) {
        let work = C::part(work, S::BLOCK_M);
        // SAFETY (whole body): a slot is refilled once it is empty; its barrier counts the bytes of the boxes that
        // follow.
        unsafe {
            let full = shared.query_slots().refill(queries, S::CONSUMERS * S::QUERY_BYTES);
            for group in 0..S::CONSUMERS {
                shared
                    .query(group)
                    .load(map(offset_of!(HopperForwardParams, q)), corner(p, &work, group), full);
            }
            queries.advance();
            // Without a mask it is the same for every tile, but registers are few here.
            let blocks = key_blocks::<S, CAUSAL>(p, &mask, &work);
            for n in (blocks.begin..optimizer::renew(blocks.end)).rev() {
                let corner = Corner {
                    batch: work.head / p.heads,
                    head: work.head % p.heads / p.heads_per_kv,
                    row: n * S::BLOCK_N,
                    column: 0,
                };
                let full = shared.key_slots().refill(tiles, S::TILE_BYTES);
                let k = offset_of!(HopperForwardParams, k);
                C::load(shared.key(tiles.slot), S::BLOCK_N, map(k), corner, full);
                let full = shared.value_slots().refill(tiles, S::TILE_BYTES);
                let v = offset_of!(HopperForwardParams, v);
                C::load(shared.value(tiles.slot), S::BLOCK_N, map(v), corner, full);
                tiles.advance();
            }
        }
    }
}

/// Returns the blocks of keys that a tile's queries see.
#[inline(always)]
pub(super) fn key_blocks<S: HopperShape, const CAUSAL: bool>(
    p: &HopperForwardParams,
    mask: &Mask<CAUSAL>,
    work: &Work,
) -> Blocks {
    let first = work.first_row >> p.packed_log2;
    let last = (work.first_row + work.rows(p.seqlen_q << p.packed_log2) - 1) >> p.packed_log2;
    mask.key_blocks(first, last - first + 1, S::BLOCK_N)
}

/// Returns the corner of the queries of warpgroup `group`, and of their output.
#[inline(always)]
pub(super) fn corner(p: &HopperForwardParams, work: &Work, group: u32) -> Corner {
    let corner = work.corner(p.heads, group);
    Corner {
        row: corner.row >> p.packed_log2,
        ..corner
    }
}

/// One warpgroup that computes.
pub(super) struct Consumer<'a, S: HopperShape, C: Cluster, const CAUSAL: bool, const PROGRAM: bool> {
    p: &'a HopperForwardParams,
    pub(super) mask: Mask<CAUSAL>,
    pub(super) shared: Shared<S>,
    /// Index of this consumer.
    pub(super) group: u32,
    pub(super) queries: Cursor<1>,
    pub(super) keys: Cursor<HOPPER_SLOTS>,
    pub(super) values: Cursor<HOPPER_SLOTS>,
    cluster: PhantomData<C>,
}

impl<'a, S: HopperShape, C: Cluster, const CAUSAL: bool, const PROGRAM: bool> Consumer<'a, S, C, CAUSAL, PROGRAM> {
    #[inline(always)]
    pub(super) fn new(p: &'a HopperForwardParams, shared: Shared<S>) -> Self {
        Self {
            p,
            mask: Mask::new(p.seqlen_q, p.seqlen_k),
            shared,
            group: sync::uniform(sreg::thread_idx_x() / WARPGROUP) - 1,
            queries: Cursor::start(),
            keys: Cursor::start(),
            values: Cursor::start(),
            cluster: PhantomData,
        }
    }

    /// Computes this warpgroup's 64 queries, for every tile of work of the block.
    #[inline(always)]
    unsafe fn consume(&mut self, maps: u64) {
        // SAFETY (whole body): tiles are read between acquire and release; a warpgroup's queries and output are its own.
        unsafe {
            if S::TAKES_TURNS && self.group == S::CONSUMERS - 1 {
                self.pass_turn();
            }
            for work in Work::of::<CAUSAL, false>(&self.p.work, C::place(), C::BLOCKS * S::BLOCK_M) {
                let work = C::part(work, S::BLOCK_M);
                self.shared.query_slots().acquire(self.queries);
                let mut softmax = OnlineSoftmax::new(self.p.scale_log2);
                if PROGRAM {
                    let (head, batch) = (work.head % self.p.heads, work.head / self.p.heads);
                    program::head(head, batch, self.p.seqlen_q, self.p.seqlen_k);
                    softmax.start_program(true);
                }
                let mut output = S::Output::zero();
                self.attend(&work, &mut softmax, &mut output);
                self.finish(&work, softmax, output, maps);
                self.queries.advance();
            }
            if S::TAKES_TURNS && self.group == 0 {
                self.take_turn();
            }
        }
    }

    /// Runs the online softmax over all keys that the tile's queries see.
    #[inline(always)]
    unsafe fn attend(&mut self, work: &Work, softmax: &mut OnlineSoftmax<S::Scores>, output: &mut S::Output) {
        let blocks = key_blocks::<S, CAUSAL>(self.p, &self.mask, work);
        if blocks.is_empty() {
            return;
        }
        let (last, before) = self.mask.split_last(blocks);
        // SAFETY (whole body): as in `consume`.
        unsafe {
            self.shared.key_slots().acquire(self.keys);
            wgmma::fence();
            let mut scores = self.score();
            self.announce::<true>(work, last);
            wgmma::wait::<0>();
            scores.pin();
            self.release_key();
            Self::splice::<true>(&mut scores);
            self.hide(work, last, &mut scores);
            let rescale = [0, 1].map(|row| {
                let reference = softmax.raise_row(&mut scores, row, true);
                softmax.weigh_row(&mut scores, Part::WHOLE, row, reference);
                reference.rescale
            });
            softmax.sum(&scores, Rows([rescale]));
            Self::splice_weights::<true>(&mut scores);
            let mut probabilities = scores.pinned_operand();
            self.shared.value_slots().acquire(self.values);
            if Mask::<CAUSAL>::HIDES_PAIRS && blocks.is_masked(last) || PROGRAM && program::hides() {
                self.clean(self.values.slot);
            }
            for_blocks_backwards!(before, |n, MASKED| {
                self.step::<MASKED>(work, n, softmax, output, &mut probabilities)
            });
            wgmma::fence();
            self.add_values(&probabilities, output);
            wgmma::wait::<0>();
            output.pin();
            self.release_value();
        }
    }

    /// Computes the scores of key block `n`, overlapped with the product of the previous block's probabilities and
    /// values.
    #[inline(always)]
    unsafe fn step<const MASKED: bool>(
        &mut self,
        work: &Work,
        n: u32,
        softmax: &mut OnlineSoftmax<S::Scores>,
        output: &mut S::Output,
        probabilities: &mut <S::Scores as ScoreTile>::Operand,
    ) {
        // SAFETY (whole body): as in `consume`.
        unsafe {
            self.shared.key_slots().acquire(self.keys);
            self.take_turn();
            wgmma::fence();
            let mut scores = self.score();
            self.add_values(probabilities, output);
            self.pass_turn();
            self.announce::<MASKED>(work, n);
            wgmma::wait::<1>();
            scores.pin();
            self.release_key();
            let mut values = self.values;
            values.advance();
            let is_full = self.shared.value_slots().is_full(values);
            Self::splice::<MASKED>(&mut scores);
            if MASKED {
                self.hide(work, n, &mut scores);
            }
            // ptxas mixes the instructions between two branches, and each row has one in `raise_row`. So the exponentials of the first
            // row share their time with the maximum of the second, then with its exchange between lanes.
            let hides = MASKED || PROGRAM;
            let upper = softmax.raise_row(&mut scores, 0, hides);
            softmax.weigh_row(&mut scores, Part::eighths(0, 4), 0, upper);
            let lower = softmax.raise_row(&mut scores, 1, hides);
            softmax.weigh_row(&mut scores, Part::eighths(4, 6), 0, upper);
            scores.pin();
            // Awaited here, the next values keep ptxas from moving the wait for the output to another place.
            if !is_full {
                self.shared.value_slots().acquire(values);
            }
            wgmma::wait::<0>();
            output.pin();
            self.release_value();
            softmax.weigh_row(&mut scores, Part::eighths(6, 8), 0, upper);
            softmax.weigh_row(&mut scores, Part::WHOLE, 1, lower);
            let rescale = Rows([[upper.rescale, lower.rescale]]);
            softmax.sum(&scores, rescale);
            Self::splice_weights::<MASKED>(&mut scores);
            if !S::SKIPS_RESCALING || sync::any(rescale.any(|rescale| rescale != 1.0)) {
                output.map_rows(rescale, |rescale, o| o * rescale);
            }
            *probabilities = scores.pinned_operand();
            if MASKED && Mask::<CAUSAL>::HIDES_PAIRS || PROGRAM && program::hides() {
                self.clean(self.values.slot);
            }
        }
    }

    /// Zeroes NaN and infinity in a slot of values that no consumer has multiplied yet. A flag in shared memory
    /// records that there were any, until the tile of work is finished.
    #[inline(always)]
    unsafe fn clean(&self, slot: u32) {
        let (thread, threads) = (sreg::thread_idx_x() - WARPGROUP, S::CONSUMERS * WARPGROUP);
        let values = self.shared.value(slot);
        // SAFETY (whole body): each chunk belongs to one thread; the first barrier comes once all consumers have the
        // tile, the second before any multiplies it.
        unsafe {
            let any = Barrier::Consumers.sync_or(threads, values.has_nonfinite::<S::Element>(thread, threads));
            if sync::any(any) {
                values.zero_nonfinite::<S::Element>(thread, threads);
                if thread % WARPGROUP == 0 {
                    memory::st_shared_word(self.shared.cleaned(self.group), 1);
                }
                tma::fence_async();
                Barrier::Consumers.sync(threads);
            }
        }
    }

    /// Issues Q K^T with the tile of keys that was acquired.
    #[inline(always)]
    unsafe fn score(&mut self) -> S::Scores {
        // SAFETY: as in `consume`.
        unsafe {
            let scores = S::Scores::product(self.shared.query(self.group), self.shared.key(self.keys.slot));
            wgmma::commit();
            scores
        }
    }

    /// Issues `output += P V` with the acquired tile of values.
    #[inline(always)]
    unsafe fn add_values(&mut self, probabilities: &<S::Scores as ScoreTile>::Operand, output: &mut S::Output) {
        // SAFETY: the reasons given in `consume`.
        unsafe {
            output.add_product(probabilities, self.shared.value(self.values.slot));
            wgmma::commit();
        }
    }

    /// Begins the scores of key block `n` for the program. `EDGE` is true if keys of it may lie past the end.
    #[inline(always)]
    fn announce<const EDGE: bool>(&self, work: &Work, n: u32) {
        if PROGRAM {
            S::Scores::announce::<program::OfQueries<EDGE>>(self.first_row(work), n * S::BLOCK_N);
        }
    }

    /// Marks the place where the program turns products into scores, and hides some.
    #[inline(always)]
    fn splice<const EDGE: bool>(scores: &mut S::Scores) {
        if PROGRAM {
            scores.splice::<program::Scores, program::OfQueries<EDGE>>();
            scores.splice::<program::Masked, program::OfQueries<EDGE>>();
        }
    }

    /// Marks the place where the program changes weights.
    #[inline(always)]
    fn splice_weights<const EDGE: bool>(weights: &mut S::Scores) {
        if PROGRAM {
            weights.splice::<program::Weights, program::OfQueries<EDGE>>();
        }
    }

    /// Minus infinity for the keys of block `n` that a query does not see.
    #[inline(always)]
    pub(super) fn hide(&self, work: &Work, n: u32, scores: &mut S::Scores) {
        let (first_row, first_key) = (self.first_row(work), n * S::BLOCK_N);
        let span = |row| self.mask.keys_of(self.query(first_row + row));
        scores.hide(first_key, span, f32::NEG_INFINITY);
    }

    /// Returns the query of row `row` of a head.
    #[inline(always)]
    pub(super) fn query(&self, row: u32) -> u32 {
        row >> self.p.packed_log2
    }

    /// Returns the first row of this warp.
    #[inline(always)]
    pub(super) fn first_row(&self, work: &Work) -> u32 {
        work.first_row + self.group * HOPPER_ROWS + warp_of_group() * 16
    }

    /// Releases the tile of keys, with one arrival per warp in each block of the cluster, and advances to the next: a wait covers only a
    /// warp's own part of a product.
    #[inline(always)]
    pub(super) unsafe fn release_key(&mut self) {
        // SAFETY: the reasons given in `consume`.
        unsafe { C::release(self.shared.key_slots(), self.keys.slot) };
        self.keys.advance();
    }

    /// Releases the tile of values and advances to the next.
    #[inline(always)]
    pub(super) unsafe fn release_value(&mut self) {
        // SAFETY: the reasons given in `consume`.
        unsafe { C::release(self.shared.value_slots(), self.values.slot) };
        self.values.advance();
    }

    /// Waits until the warpgroup before this one has issued its products.
    #[inline(always)]
    pub(super) fn take_turn(&self) {
        if S::TAKES_TURNS {
            // SAFETY: a whole warpgroup waits and a whole warpgroup arrives; the ring is started by `consume`, which also
            // takes the last turn that was passed.
            unsafe { Barrier::Turn(self.group).sync(2 * WARPGROUP) }
        }
    }

    /// Lets the next warpgroup issue its products.
    #[inline(always)]
    pub(super) fn pass_turn(&self) {
        let next = if self.group + 1 == S::CONSUMERS {
            0
        } else {
            self.group + 1
        };
        if S::TAKES_TURNS {
            // SAFETY: as for `take_turn`.
            unsafe { Barrier::Turn(next).arrive(2 * WARPGROUP) }
        }
    }

    /// Waits for all warps of this warpgroup.
    #[inline(always)]
    fn sync_group(&self) {
        // SAFETY: the barrier is used for nothing else, and control is uniform over the warpgroup.
        unsafe { Barrier::Group(self.group).sync(WARPGROUP) }
    }
}
