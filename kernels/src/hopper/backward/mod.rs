//! The backward pass on Hopper, in two forms. [`sums`] makes lse and delta of the queries first.
//!
//! Up to head_dim 128 it takes five products. [`keys`] owns keys, streams queries and works on the transposed tiles for dK and
//! dV, so that P^T and dS^T are left operands in the registers they were computed in. dQ of each streamed tile follows from
//! dS^T of all its keys, which the warpgroups show each other in shared memory; [`add`] adds it to an f32 sum in device memory,
//! and [`sums`] rounds that last. Which block adds first is chance, and so are the last bits of dQ, unless each waits for its turn.
//!
//! Beyond, where the accumulators of dK and dV fill the registers, the form is that of [`backward`](crate::backward):
//! [`queries`] owns queries and streams keys for dQ, and [`keys`] computes dK and dV in two walks. No gradient is touched by two
//! blocks: the same bits each time, for eight products.
//!
//! A consumer issues the two products that need no registers, turns the first into probabilities while the second is on its
//! way, and leaves the sums of gradients to run into the next tile, where registers allow.

/// The generic address of one of the parameters' tensor maps.
macro_rules! map {
    ($maps:expr, $field:ident) => {
        $maps + offset_of!(HopperBackwardParams, $field) as u64
    };
}

/// Makes the block ready, then the first warpgroup serves, with few registers, and the others compute. Not a function: ptxas
/// counts registers right only if each branch begins by asking for its own.
macro_rules! share_out {
    ($shape:ident, $shared:ident, $serve:block else $compute:block) => {
        $shared.init();
        if sreg::thread_idx_x() < WARPGROUP {
            wgmma::shrink_registers!($shape::REGISTERS.0);
            $serve
        } else {
            wgmma::grow_registers!($shape::REGISTERS.1);
            $compute
        }
    };
}

mod add;
mod load;
mod shared;
pub mod sums;

use self::add::add_queries;
use self::load::{load_keys, load_queries};
use super::{Barrier, Shared, WARPGROUP, warp_of_group, work::Work};
use crate::abi::HopperBackwardParams;
use crate::delta::any_far_of_share;
use crate::mask::{Blocks, Mask, Span, for_blocks};
use crate::nonfinite;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{memory, sreg, sync, tma, tma::Corner, wgmma};
use crate::scores::{self, OfRows};
use crate::shape::{DELTA_ROWS, HOPPER_ROWS, HOPPER_SLOTS, HopperBackwardShape};
use crate::tile::panels::Panels;
use crate::tile::register::{Accumulator, RowValues, ScoreTile};
use crate::tile::warpgroup::{WarpgroupOutput, WarpgroupScores, WarpgroupSquare};
use crate::tile::{element::Element, global::GlobalTile};
use core::mem::offset_of;

/// dQ of the queries that fall to this block. `maps` is the generic address of `p`, a kernel parameter.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after [`sums::prepare`].
#[inline(always)]
pub unsafe fn queries<S: HopperBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, maps: u64) {
    let shared = Shared::<S>::of_this_block();
    // SAFETY: as in `keys`.
    unsafe {
        share_out!(S, shared, {
            if sreg::thread_idx_x() == 0 {
                load_keys::<S, CAUSAL>(p, maps, shared);
            }
        } else {
            Consumer::<S, CAUSAL>::new(p, maps, shared).queries();
        });
    }
}

/// dK and dV of the keys that fall to this block, and, if the shape says so, what they add to dQ.
///
/// # Safety
/// As [`queries`].
#[inline(always)]
pub unsafe fn keys<S: HopperBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, maps: u64) {
    let shared = Shared::<S>::of_this_block();
    // SAFETY: the parts of shared memory are disjoint; barriers are initialised before anybody goes on.
    unsafe {
        share_out!(S, shared, {
            // A warp each, so that nobody waits for the others.
            let (warp, is_first) = (warp_of_group(), sreg::lane_id() == 0);
            if warp == 0 && is_first {
                load_queries::<S, CAUSAL>(p, maps, shared);
            } else if S::WALK.adds_queries() && warp <= S::CONSUMERS && is_first {
                add_queries::<S, CAUSAL>(p, shared, warp - 1);
            }
        } else {
            Consumer::<S, CAUSAL>::new(p, maps, shared).keys();
        });
    }
}

/// How a streamed tile of queries is to be taken.
#[derive(Clone, Copy)]
struct Tile {
    /// Query of column 0.
    first_column: u32,
    /// Whether pairs are hidden.
    is_masked: bool,
}

/// One warpgroup that computes.
struct Consumer<'a, S: HopperBackwardShape, const CAUSAL: bool> {
    p: &'a HopperBackwardParams,
    maps: u64,
    mask: Mask<CAUSAL>,
    shared: Shared<S>,
    /// Which of the consumers it is.
    group: u32,
    owned: Cursor<1>,
    /// The streamed tiles it takes next. Those before are given back later: sums of gradients still read them.
    streamed: Cursor<HOPPER_SLOTS>,
}

impl<'a, S: HopperBackwardShape, const CAUSAL: bool> Consumer<'a, S, CAUSAL> {
    #[inline(always)]
    fn new(p: &'a HopperBackwardParams, maps: u64, shared: Shared<S>) -> Self {
        Self {
            p,
            maps,
            mask: Mask::new(p.seqlen_q, p.seqlen_k),
            shared,
            group: sync::uniform(sreg::thread_idx_x() / WARPGROUP) - 1,
            owned: Cursor::start(),
            streamed: Cursor::start(),
        }
    }

    /// dQ of its 64 queries of every tile of work.
    #[inline(always)]
    unsafe fn queries(&mut self) {
        let mask = self.mask;
        for work in Work::of_this_block::<CAUSAL>(&self.p.work, S::ROWS) {
            let first_row = self.first_row(&work);
            // SAFETY (whole body): tiles are read between acquire and release; a warpgroup's owned rows are its own; lse
            // and delta hold an f32 for each query.
            unsafe {
                self.shared.owned_slots().acquire(self.owned);
                let rows = self.p.seqlen_q.saturating_sub(first_row);
                let first = work.head as u64 * self.p.sums.padded_q.get() as u64 + first_row as u64;
                let shifts = self.shared.row_words(self.group) + warp_of_group() * 16 * 4;
                let (queries, is_far) = OfRows::load::<S::Scores>(&self.p.sums.exponents, first, rows, shifts);
                let mut dq = S::Output::zero();
                let blocks = mask.key_blocks(work.first_row, work.rows(self.p.seqlen_q), S::COLUMNS);
                let span = |row| mask.keys_of(first_row + row);
                for_blocks!(blocks, |n, MASKED| {
                    self.add_to_queries::<MASKED>(n > blocks.begin, queries, is_far, n * S::COLUMNS, span, &mut dq)
                });
                self.await_sums(!blocks.is_empty());
                dq.pin();
                let corner = work.corner(self.p.heads_q, self.group);
                self.store(dq, self.p.softmax_scale, 0, map!(self.maps, dq), corner);
                self.finish();
            }
        }
    }

    /// `dQ += dS K` with the next tile of keys and values. `follows` another of the same tile of work.
    #[inline(always)]
    unsafe fn add_to_queries<const MASKED: bool>(
        &mut self,
        follows: bool,
        queries: OfRows<<S::Scores as Accumulator>::Rows>,
        is_far: bool,
        first_key: u32,
        span: impl Fn(u32) -> Span,
        dq: &mut S::Output,
    ) {
        // SAFETY (whole body): as in `queries`.
        unsafe {
            let (mut p, mut ds) = self.issue_products::<true>(follows);
            wgmma::wait::<1>();
            p.pin();
            scores::weights(&mut p, queries, self.p.scale_log2, is_far);
            if MASKED {
                p.hide(first_key, &span, 0.0);
            }
            wgmma::wait::<0>();
            ds.pin();
            scores::score_gradients(&mut ds, &p, queries, MASKED && Mask::<CAUSAL>::HIDES_PAIRS);
            if MASKED && Mask::<CAUSAL>::HIDES_PAIRS {
                self.clean([self.shared.streamed(0, self.streamed.slot)]);
            }
            let ds = ds.pinned_operand();
            wgmma::fence();
            dq.add_product(&ds, self.shared.streamed(0, self.streamed.slot));
            wgmma::commit();
            self.streamed.advance();
        }
    }

    /// dK and dV of its 64 keys of every tile of work.
    #[inline(always)]
    unsafe fn keys(&mut self) {
        for work in Work::of_this_block::<CAUSAL>(&self.p.work, S::ROWS) {
            let corner = work.corner(self.p.heads_kv, self.group);
            let (dk_map, dv_map) = (map!(self.maps, dk), map!(self.maps, dv));
            // SAFETY (whole body): as in `queries`.
            unsafe {
                self.shared.owned_slots().acquire(self.owned);
                let is_tainted = S::WALK.adds_queries() && Mask::<CAUSAL>::HIDES_PAIRS && self.clean_keys();
                let (mut dk, mut dv) = (S::Output::zero(), S::Output::zero());
                if S::WALK.is_twice() {
                    self.walk_queries::<true, false>(&work, is_tainted, &mut dk, &mut dv);
                    // V is not needed any more: dV asks for Q, K and dO only.
                    self.store(dk, self.p.softmax_scale, 1, dk_map, corner);
                    self.walk_queries::<false, true>(&work, is_tainted, &mut dk, &mut dv);
                } else {
                    self.walk_queries::<true, true>(&work, is_tainted, &mut dk, &mut dv);
                    self.store(dk, self.p.softmax_scale, 1, dk_map, corner);
                    if S::WALK.adds_queries() {
                        // The other warpgroup's dQ needed this one's keys.
                        self.sync_consumers();
                    }
                }
                self.store(dv, 1.0, 0, dv_map, corner);
                self.finish();
            }
        }
    }

    /// Every query that sees the tile's keys, head by head of those that share them.
    #[inline(always)]
    unsafe fn walk_queries<const DK: bool, const DV: bool>(
        &mut self,
        work: &Work,
        is_tainted: bool,
        dk: &mut S::Output,
        dv: &mut S::Output,
    ) {
        let (mask, first_row, seqlen_k) = (self.mask, self.first_row(work), self.p.seqlen_k);
        let mut blocks = mask.query_blocks(work.first_row, work.rows(seqlen_k), S::COLUMNS);
        // Keys that do not exist must not weigh in dQ.
        if S::WALK.adds_queries() && work.first_row + S::ROWS > seqlen_k {
            blocks = blocks.all_masked();
        }
        let visible = |row, query| {
            let key = first_row + row;
            mask.queries_of(key).contains(query) && (!S::WALK.adds_queries() || key < seqlen_k)
        };
        // SAFETY (whole body): as in `queries`.
        unsafe {
            let mut follows = false;
            for i in 0..self.p.heads_q_per_kv.get() {
                let head = work.head * self.p.heads_q_per_kv.get() + i;
                self.find_far(head, blocks, i == 0, is_tainted);
                // One copy of the body, the largest there is, for both kinds of blocks.
                for m in blocks.begin..blocks.end {
                    let tile = Tile {
                        first_column: m * S::COLUMNS,
                        is_masked: blocks.is_masked(m),
                    };
                    self.add_to_keys::<DK, DV>(follows, tile, visible, dk, dv);
                    follows = true;
                }
            }
            self.await_sums(follows);
            if DK {
                dk.pin();
            }
            if DV {
                dv.pin();
                if Mask::<CAUSAL>::HIDES_PAIRS && memory::ld_shared_u32(self.shared.findings()[1]) != 0 {
                    self.restore_values(work, blocks, dv);
                }
            }
        }
    }

    /// Adds to dV what was zeroed in tiles of dO.
    #[inline(always)]
    unsafe fn restore_values(&self, work: &Work, blocks: Blocks, dv: &mut S::Output) {
        let first_row = self.first_row(work);
        let span = |row| self.mask.queries_of(first_row + row);
        for i in 0..self.p.heads_q_per_kv.get() {
            let head = work.head * self.p.heads_q_per_kv.get() + i;
            let (batch, head) = (head / self.p.heads_q, head % self.p.heads_q);
            let (tensor, layout) = (&self.p.dout_rows, &self.p.layout);
            let douts = GlobalTile::new(tensor, batch, head, self.p.seqlen_q, layout, S::Element::BYTES);
            // SAFETY: the window clips what does not exist.
            unsafe { nonfinite::restore::<S::Element, _>(dv, &douts, blocks, S::COLUMNS, span) }
        }
    }

    /// `dK += dS^T Q` and `dV += P^T dO`, or one of them, with the next tile of queries, and dQ of that.
    #[inline(always)]
    unsafe fn add_to_keys<const DK: bool, const DV: bool>(
        &mut self,
        follows: bool,
        tile: Tile,
        visible: impl Fn(u32, u32) -> bool,
        dk: &mut S::Output,
        dv: &mut S::Output,
    ) {
        let slot = self.streamed.slot;
        let visible = |row, column| visible(row, tile.first_column + column);
        // SAFETY (whole body): as in `queries`; the slot's statistics came with its tiles.
        unsafe {
            if Mask::<CAUSAL>::HIDES_PAIRS && tile.is_masked {
                self.shared.streamed_slots().acquire(self.streamed);
                self.clean([0, 1].map(|which| self.shared.streamed(which, slot)));
            }
            let (mut p, mut ds) = self.issue_products::<DK>(follows);
            if DK {
                wgmma::wait::<1>();
            } else {
                wgmma::wait::<0>();
            }
            p.pin();
            let queries = self.shared.queries(slot);
            let is_far = memory::ld_shared_u32(self.shared.findings()[0]) != 0;
            scores::weights(&mut p, queries, self.p.scale_log2, is_far);
            if S::WALK.adds_queries() && Mask::<CAUSAL>::HIDES_PAIRS && is_far {
                let taints = self.shared.row_words(self.group) + warp_of_group() * 16 * 4;
                p.map_rows(
                    S::Scores::rows_from(|row| memory::ld_shared(taints + row * 4)),
                    |taint, p| p + taint,
                );
            }
            if tile.is_masked {
                p.hide_pairs(visible, 0.0);
            }
            if DV {
                let p = p.pinned_operand();
                wgmma::fence();
                dv.add_product(&p, self.shared.streamed(1, slot));
                wgmma::commit();
            }
            if DK {
                if DV {
                    wgmma::wait::<1>();
                } else {
                    wgmma::wait::<0>();
                }
                ds.pin();
                let hides = Mask::<CAUSAL>::HIDES_PAIRS && tile.is_masked;
                scores::score_gradients(&mut ds, &p, queries, hides);
                let ds = ds.pinned_operand();
                if S::WALK.adds_queries() {
                    self.show_ds(&ds);
                    wgmma::fence();
                    let mut dq = self.issue_dq();
                    dk.add_product(&ds, self.shared.streamed(0, slot));
                    wgmma::commit();
                    wgmma::wait::<1>();
                    dq.pin();
                    self.give_dq(&dq);
                    if !S::SUMS_RUN_ON {
                        wgmma::wait::<0>();
                        dk.pin();
                    }
                } else {
                    wgmma::fence();
                    dk.add_product(&ds, self.shared.streamed(0, slot));
                    wgmma::commit();
                }
            }
            self.streamed.advance();
        }
    }

    /// Zeroes NaN and infinity in this warpgroup's keys, which others multiply by gradients of pairs that are hidden; whether there were
    /// any. Whatever sees such a key is NaN, as is its query's sum of weights; what its score would have been is not asked.
    #[inline(always)]
    unsafe fn clean_keys(&self) -> bool {
        let thread = sreg::thread_idx_x() % WARPGROUP;
        let keys = self.shared.owned(0, self.group);
        let mut is_tainted = false;
        // SAFETY (whole body): the tile and its taints are the warpgroup's own until all consumers meet in `find_far`.
        unsafe {
            if thread < HOPPER_ROWS {
                is_tainted = keys.clean_row::<S::Element>(thread);
                let taint = if is_tainted { f32::NAN } else { 0.0 };
                memory::st_shared_word(self.shared.row_words(self.group) + thread * 4, taint.to_bits());
            }
            tma::fence_async();
        }
        is_tainted
    }

    /// Finds whether any query of a head that `blocks` walks is far; the `first` head's walk begins with no tile cleaned. Both warpgroups
    /// look together.
    #[inline(always)]
    unsafe fn find_far(&self, head: u32, blocks: Blocks, first: bool, is_tainted: bool) {
        let flags_per_tile = (S::COLUMNS / DELTA_ROWS) as u64;
        let start = head as u64 * (self.p.sums.padded_q.get() / DELTA_ROWS) as u64;
        let flags = start + blocks.begin as u64 * flags_per_tile..start + blocks.end as u64 * flags_per_tile;
        // SAFETY (whole body): there is a flag for each `DELTA_ROWS` queries; a barrier of its own, and both walk the same tiles.
        unsafe {
            let (thread, threads) = (sreg::thread_idx_x() - WARPGROUP, S::CONSUMERS * WARPGROUP);
            let any = any_far_of_share(&self.p.sums.exponents, flags, thread, threads);
            let any = Barrier::Consumers.sync_or(threads, any || is_tainted);
            if thread == 0 {
                let [far, cleaned] = self.shared.findings();
                memory::st_shared_word(far, any as u32);
                if first {
                    memory::st_shared_word(cleaned, 0);
                }
            }
            Barrier::Consumers.sync(threads);
        }
    }

    /// Zeroes NaN and infinity in streamed tiles, by both warpgroups. Products with the tiles as they are were
    /// awaited, and those that follow take them as they are then. It is among the findings that there were any.
    #[inline(always)]
    unsafe fn clean<const TILES: usize>(&self, tiles: [Panels; TILES]) {
        let (thread, threads) = (sreg::thread_idx_x() - WARPGROUP, S::CONSUMERS * WARPGROUP);
        // SAFETY (whole body): each chunk is one thread's; the first barrier comes after every read of the tile as it is, the
        // second before those that follow.
        unsafe {
            let mut any = false;
            for tile in tiles {
                any |= tile.has_nonfinite::<S::Element>(thread, threads);
            }
            let any = Barrier::Consumers.sync_or(threads, any);
            if any {
                for tile in tiles {
                    tile.zero_nonfinite::<S::Element>(thread, threads);
                }
                if thread == 0 {
                    memory::st_shared_word(self.shared.findings()[1], 1);
                }
                tma::fence_async();
                Barrier::Consumers.sync(threads);
            }
        }
    }

    /// Shows dS^T of the current tile to the other warpgroup, and waits for the other's.
    #[inline(always)]
    unsafe fn show_ds(&self, ds: &<S::Scores as ScoreTile>::Operand) {
        let shared = self.shared.renewed();
        // SAFETY (whole body): as in `queries`. Nobody reads what dS^T of the slot was before: its readers awaited their
        // products before they arrived at the barrier of the tile in between.
        unsafe {
            let target = shared.ds(self.streamed.slot, self.group);
            S::Scores::write(ds, target, warp_of_group() * 16, sreg::lane_id());
            tma::fence_async();
            self.sync_consumers();
        }
    }

    /// Issues this warpgroup's square of `dQ = dS K`.
    #[inline(always)]
    unsafe fn issue_dq(&self) -> S::Square {
        let (slot, shared) = (self.streamed.slot, self.shared.renewed());
        let (queries, columns) = S::square(self.group);
        // SAFETY: as in `queries`; both warpgroups' parts of dS^T are there.
        unsafe {
            let dq = S::Square::product([0, 1].map(|group| {
                (
                    shared.ds(slot, group).panel(queries),
                    shared.owned(0, group).panel(columns),
                )
            }));
            wgmma::commit();
            dq
        }
    }

    /// Leaves this warpgroup's square of a tile's dQ for [`add`].
    #[inline(always)]
    unsafe fn give_dq(&self, dq: &S::Square) {
        let (slots, share) = (self.shared.dq_slots(self.group), self.streamed.of_single());
        // SAFETY (whole body): the room is this warpgroup's between the two barriers; each warp arrives for all its lanes.
        unsafe {
            slots.wait_empty(share);
            dq.write(self.shared.dq(self.group), sreg::thread_idx_x() % WARPGROUP);
            tma::fence_async();
            sync::sync_warp();
            if sreg::lane_id() == 0 {
                slots.fill(share);
            }
        }
    }

    /// Issues the scores of the next streamed tiles and, in a group of its own, if `DS`, dP; else zeros.
    #[inline(always)]
    unsafe fn issue_products<const DS: bool>(&mut self, follows: bool) -> (S::Scores, S::Scores) {
        let (slot, shared) = (self.streamed.slot, self.shared.renewed());
        // SAFETY (whole body): as in `queries`.
        unsafe {
            shared.streamed_slots().acquire(self.streamed);
            wgmma::fence();
            let p = S::Scores::product(shared.owned(0, self.group), shared.streamed(0, slot));
            wgmma::commit();
            wgmma::wait::<1>();
            if follows {
                self.release();
            }
            let mut ds = S::Scores::zero();
            if DS {
                ds = S::Scores::product(shared.owned(1, self.group), shared.streamed(1, slot));
                wgmma::commit();
            }
            (p, ds)
        }
    }

    /// Waits for the sums that are still under way, if there are `some`, and gives their tiles back.
    #[inline(always)]
    unsafe fn await_sums(&mut self, some: bool) {
        wgmma::wait::<0>();
        if some {
            // SAFETY: as in `queries`.
            unsafe { self.release() }
        }
    }

    /// Gives the streamed tiles back that came last before the current ones. Each warp does so for itself: a wait covers its own part of a product only.
    #[inline(always)]
    unsafe fn release(&self) {
        if sreg::lane_id() == 0 {
            // SAFETY: as in `queries`.
            unsafe { self.shared.streamed_slots().release(self.streamed.previous_slot()) }
        }
    }

    /// Writes `factor * gradient` to the box of `map` at `corner`, by way of one of the owned tiles, which nobody needs any
    /// more.
    #[inline(always)]
    unsafe fn store(&self, mut gradient: S::Output, factor: f32, owned: u32, map: u64, corner: Corner) {
        gradient.map_rows(<S::Output as Accumulator>::Rows::splat(factor), |factor, x| x * factor);
        let staging = self.shared.owned(owned, self.group);
        // SAFETY (whole body): each warp awaited the products that read the tile before it arrives at the first barrier.
        unsafe {
            self.sync_group();
            gradient.write(staging, warp_of_group() * 16, sreg::lane_id());
            tma::fence_async();
            self.sync_group();
            if self.is_first_of_group() {
                staging.store(map, corner);
            }
        }
    }

    /// Gives the owned tiles back, once what was stored from them has been read.
    #[inline(always)]
    unsafe fn finish(&mut self) {
        if self.is_first_of_group() {
            tma::wait_read();
            // SAFETY: as in `queries`; the rest of the warpgroup passed the barrier of the last store.
            unsafe { self.shared.owned_slots().release(self.owned.slot) }
        }
        self.owned.advance();
    }

    /// First owned row of this warp.
    #[inline(always)]
    fn first_row(&self, work: &Work) -> u32 {
        work.first_row + self.group * HOPPER_ROWS + warp_of_group() * 16
    }

    /// Whether this is the thread that speaks to the tensor memory accelerator for its warpgroup.
    #[inline(always)]
    fn is_first_of_group(&self) -> bool {
        sreg::thread_idx_x() % WARPGROUP == 0
    }

    /// Waits for both warpgroups that compute.
    #[inline(always)]
    fn sync_consumers(&self) {
        // SAFETY: a barrier of its own, and both walk the same tiles.
        unsafe { Barrier::Consumers.sync(S::CONSUMERS * WARPGROUP) }
    }

    /// Waits for the whole of this warpgroup.
    #[inline(always)]
    fn sync_group(&self) {
        // SAFETY: a barrier of its own, and control is uniform over the warpgroup.
        unsafe { Barrier::Group(self.group).sync(WARPGROUP) }
    }
}
