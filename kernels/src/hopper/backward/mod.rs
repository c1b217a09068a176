//! The backward pass on Hopper, in five products. The preprocess kernel in [`sums`] computes lse and delta of the queries
//! first.
//!
//! [`dqkv`] owns keys, streams queries and works on the transposed tiles for dK and dV, so that P^T and dS^T are left
//! operands in the registers where they were computed. dQ of each streamed tile needs dS^T of all its keys, which the
//! warpgroups exchange in shared memory. [`add`] adds it to an f32 accumulator in device memory, and the postprocess
//! kernel in [`sums`] rounds it at the end. Blocks add in any order, so the last bits of dQ vary, unless each block waits
//! for its turn. Tiles with hidden pairs, and all tiles of a head with a far query, have a loop of their own; the others, nearly
//! all, are processed in [`halves`]. Above head_dim 128 the accumulators of dK and dV fill the registers of all warpgroups together, which
//! [`wide`] divides in another way.
//!
//! A consumer issues the two products that need no registers and turns the first into probabilities while the second
//! runs. Where registers allow, the products that accumulate gradients continue into the next tile.

/// Returns the generic address of a tensor map in the parameters.
macro_rules! map {
    ($maps:expr, $field:ident) => {
        $maps + offset_of!(HopperBackwardParams, $field) as u64
    };
}

/// Initialises the block; then the first warpgroup serves as producer, with few registers, and the others compute. It
/// is not a function: ptxas counts registers correctly only if each branch starts by requesting its own.
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
mod findings;
mod halves;
mod load;
mod shared;
pub mod sums;
mod wide;

pub use wide::wide;

use self::add::add_queries;
use self::findings::Findings;
use self::load::load_queries;
use super::{Barrier, Shared, WARPGROUP, warp_of_group, work::Work};
use crate::abi::HopperBackwardParams;
use crate::mask::{Blocks, Mask, Span};
use crate::nonfinite;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{memory, optimizer, sreg, sync, tma, tma::Corner, wgmma};
use crate::scores;
use crate::shape::{HOPPER_ROWS, HOPPER_SLOTS, HopperBackwardShape};
use crate::tile::register::{Accumulator, RowValues, ScoreTile};
use crate::tile::warpgroup::{WarpgroupOutput, WarpgroupScores, WarpgroupSquare};
use crate::tile::{element::Element, global::GlobalTile};
use core::mem::offset_of;

/// Computes dK and dV of the keys of this block, and their part of dQ. `maps` is the generic address of `p`, a kernel
/// parameter.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after [`sums::preprocess`].
#[inline(always)]
pub unsafe fn dqkv<S: HopperBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, maps: u64) {
    let shared = Shared::<S>::of_this_block();
    // SAFETY: the parts of shared memory are disjoint; barriers are initialised before any thread continues.
    unsafe {
        share_out!(S, shared, {
            // One warp each, so that none waits for the others.
            let (warp, is_first) = (warp_of_group(), sreg::lane_id() == 0);
            if warp == 0 && is_first {
                load_queries::<S, CAUSAL>(p, maps, shared);
            } else if warp <= S::CONSUMERS && is_first {
                add_queries::<S, CAUSAL>(p, shared, warp - 1);
            }
        } else {
            Consumer::<S, CAUSAL>::new(p, maps, shared).keys();
        });
    }
}

/// Treatment of a streamed tile of queries.
#[derive(Clone, Copy)]
struct Tile {
    /// Query of column 0.
    first_column: u32,
    /// True if pairs are hidden.
    is_masked: bool,
}

/// A warpgroup that computes.
struct Consumer<'a, S: HopperBackwardShape, const CAUSAL: bool> {
    p: &'a HopperBackwardParams,
    maps: u64,
    mask: Mask<CAUSAL>,
    shared: Shared<S>,
    /// Index of this consumer.
    group: u32,
    owned: Cursor<1>,
    /// Next streamed tiles. Earlier ones are released later, since products that accumulate gradients still read
    /// them.
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

    /// Computes dK and dV of this warpgroup's 64 keys, for every tile of work.
    #[inline(always)]
    unsafe fn keys(&mut self) {
        for work in Work::of_this_block::<CAUSAL, true>(&self.p.work, S::ROWS) {
            let corner = work.corner(self.p.heads_kv, self.group);
            let (dk_map, dv_map) = (map!(self.maps, dk), map!(self.maps, dv));
            // SAFETY (whole body): tiles are read between acquire and release; a warpgroup's owned rows are its own.
            unsafe {
                self.shared.owned_slots().acquire(self.owned);
                if Mask::<CAUSAL>::HIDES_PAIRS {
                    self.clean_keys();
                }
                let (mut dk, mut dv) = (S::Output::zero(), S::Output::zero());
                self.walk_queries(&work, &mut dk, &mut dv);
                self.store(dk, self.p.softmax_scale, 1, dk_map, corner);
                // The dQ of the other warpgroup needed the keys of this one.
                self.sync_consumers();
                self.store(dv, 1.0, 0, dv_map, corner);
                self.finish();
            }
        }
    }

    /// Streams every query that sees the tile's keys, for each query head that shares them.
    #[inline(always)]
    unsafe fn walk_queries(&mut self, work: &Work, dk: &mut S::Output, dv: &mut S::Output) {
        let (mask, first_row, seqlen_k) = (self.mask, self.first_row(work), self.p.seqlen_k);
        let queries_of = |row| {
            let key = first_row + row;
            if key < seqlen_k {
                mask.queries_of(key)
            } else {
                Span { begin: 0, end: 0 }
            }
        };
        // Computed again at each call: kept, they would take registers from the loops.
        let query_blocks = || {
            let first_key = optimizer::renew(work.first_row);
            let keys = seqlen_k.wrapping_sub(first_key).min(S::ROWS);
            let blocks = mask.query_blocks(first_key, keys, S::COLUMNS);
            // Keys that do not exist must have no weight in dQ.
            if first_key + S::ROWS > seqlen_k {
                blocks.all_masked()
            } else {
                blocks
            }
        };
        // SAFETY (whole body): the reasons given in `dqkv`.
        unsafe {
            for i in 0..self.p.heads_q_per_kv.get() {
                let head = work.head * self.p.heads_q_per_kv.get() + i;
                let (blocks, findings) = (query_blocks(), self.findings());
                findings.find_far(&self.p.sums, head, blocks, S::COLUMNS, i == 0, self.is_tainted());
                // Tiles that need the mask come before the others, so there are two loops at most.
                let end = if findings.is_far() {
                    blocks.end
                } else {
                    blocks.whole_begin
                };
                // One copy of the body, which is the largest of all, for both kinds of blocks.
                for m in blocks.begin..end {
                    let tile = Tile {
                        first_column: m * S::COLUMNS,
                        is_masked: blocks.is_masked(m),
                    };
                    self.add_to_keys(tile, queries_of, dk, dv);
                }
                if !self.findings().is_far() {
                    let blocks = query_blocks();
                    self.add_near_tiles(blocks.end - blocks.whole_begin, dk, dv);
                }
            }
            if Mask::<CAUSAL>::HIDES_PAIRS && self.findings().has_cleaned() {
                self.restore_values(work, query_blocks(), dv);
            }
        }
    }

    /// Adds the elements that were zeroed in tiles of dO to dV.
    #[inline(always)]
    unsafe fn restore_values(&self, work: &Work, blocks: Blocks, dv: &mut S::Output) {
        let first_row = self.first_row(work);
        let sees = |row, query| self.mask.queries_of(first_row + row).contains(query);
        for i in 0..self.p.heads_q_per_kv.get() {
            let head = work.head * self.p.heads_q_per_kv.get() + i;
            let (batch, head) = (head / self.p.heads_q, head % self.p.heads_q);
            let (tensor, layout) = (&self.p.dout_rows, &self.p.layout);
            let douts = GlobalTile::new(tensor, batch, head, self.p.seqlen_q, layout, S::Element::BYTES);
            // SAFETY: the window clips what does not exist.
            unsafe { nonfinite::restore::<S::Element, _>(dv, &douts, blocks, S::COLUMNS, sees) }
        }
    }

    /// Adds `dS^T Q` to dK and `P^T dO` to dV for the next tile of queries, and computes its dQ. Before and afterwards no product is
    /// pending.
    #[inline(always)]
    unsafe fn add_to_keys(
        &mut self,
        tile: Tile,
        queries_of: impl Fn(u32) -> Span,
        dk: &mut S::Output,
        dv: &mut S::Output,
    ) {
        let slot = self.streamed.slot;
        // SAFETY (whole body): the reasons given in `dqkv`; the slot's statistics arrived with its tiles.
        unsafe {
            if Mask::<CAUSAL>::HIDES_PAIRS && tile.is_masked {
                self.shared.streamed_slots().acquire(self.streamed);
                let tiles = [0, 1].map(|which| self.shared.streamed(which, slot));
                self.findings().clean::<S::Element, 2>(tiles);
            }
            let (mut p, mut ds) = self.issue_products(|| {});
            wgmma::wait::<1>();
            p.pin();
            let queries = self.shared.queries(slot);
            let is_far = self.findings().is_far();
            scores::weights(&mut p, queries, self.p.scale_log2, is_far);
            if Mask::<CAUSAL>::HIDES_PAIRS && is_far {
                let taints = self.shared.row_words(self.group) + warp_of_group() * 16 * 4;
                p.map_rows(
                    S::Scores::rows_from(|row| memory::ld_shared(taints + row * 4)),
                    |taint, p| p + taint,
                );
            }
            if tile.is_masked {
                p.hide(tile.first_column, queries_of, 0.0);
            }
            let weights = p.pinned_operand();
            wgmma::fence();
            dv.add_product(&weights, self.shared.streamed(1, slot));
            wgmma::commit();
            wgmma::wait::<1>();
            ds.pin();
            let hides = Mask::<CAUSAL>::HIDES_PAIRS && tile.is_masked;
            scores::score_gradients(&mut ds, &p, queries, hides);
            self.add_queries_and_keys(&ds.pinned_operand(), dk);
            // The loop over other tiles has no registers for products that run on.
            wgmma::wait::<0>();
            dk.pin();
            dv.pin();
            self.streamed.advance();
            self.release();
        }
    }

    /// Zeroes NaN and infinity in this warpgroup's keys, which other rows multiply by gradients of hidden pairs, and taints
    /// the rows. Every query that sees such a key gets NaN, as its sum of weights is NaN; the actual score does not matter.
    #[inline(always)]
    unsafe fn clean_keys(&self) {
        let thread = sreg::thread_idx_x() % WARPGROUP;
        let keys = self.shared.owned(0, self.group);
        // SAFETY (whole body): the tile and its taints are the warpgroup's own until all consumers meet in `find_far`.
        unsafe {
            if thread < HOPPER_ROWS {
                let taint = if keys.clean_row::<S::Element>(thread) {
                    f32::NAN
                } else {
                    0.0
                };
                memory::st_shared_word(self.shared.row_words(self.group) + thread * 4, taint.to_bits());
            }
            tma::fence_async();
        }
    }

    /// Returns true if the row of keys that this thread cleaned is tainted.
    #[inline(always)]
    unsafe fn is_tainted(&self) -> bool {
        let thread = sreg::thread_idx_x() % WARPGROUP;
        // SAFETY: `clean_keys` wrote it in this thread.
        Mask::<CAUSAL>::HIDES_PAIRS
            && thread < HOPPER_ROWS
            && unsafe { memory::ld_shared(self.shared.row_words(self.group) + thread * 4) }.is_nan()
    }

    /// Computes this warpgroup's share of the current tile's dQ, and adds `dS^T Q` to dK; that product is pending.
    #[inline(always)]
    unsafe fn add_queries_and_keys(&mut self, ds: &<S::Scores as ScoreTile>::Operand, dk: &mut S::Output) {
        // SAFETY (whole body): the reasons given in `dqkv`.
        unsafe {
            self.show_ds(ds);
            wgmma::fence();
            let mut dq = self.issue_dq();
            dk.add_product(ds, self.shared.streamed(0, self.streamed.slot));
            wgmma::commit();
            wgmma::wait::<1>();
            dq.pin();
            self.give_dq(&dq);
        }
    }

    #[inline(always)]
    fn findings(&self) -> Findings {
        Findings::new(self.shared.findings(), S::CONSUMERS)
    }

    /// Publishes dS^T of the current tile in shared memory. dQ needs the keys of both warpgroups, so it waits until
    /// both have.
    #[inline(always)]
    unsafe fn show_ds(&self, ds: &<S::Scores as ScoreTile>::Operand) {
        let shared = self.shared.renewed();
        // SAFETY (whole body): the reasons given in `dqkv`. No thread still reads the earlier dS^T of the slot:
        // its readers awaited their products before they arrived at the barrier of the tile in between.
        unsafe {
            let target = shared.ds(self.streamed.slot, self.group);
            S::Scores::write(ds, target, warp_of_group() * 16, 0, sreg::lane_id());
            tma::fence_async();
            self.sync_consumers();
        }
    }

    /// Issues this warpgroup's square of `dQ = dS K`.
    #[inline(always)]
    unsafe fn issue_dq(&self) -> S::Square {
        let (slot, shared) = (self.streamed.slot, self.shared.renewed());
        let (queries, columns) = S::square(self.group);
        // SAFETY: the reasons given in `dqkv`; dS^T of both warpgroups is complete.
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

    /// Stores this warpgroup's square of a tile's dQ in shared memory, for [`add`].
    #[inline(always)]
    unsafe fn give_dq(&self, dq: &S::Square) {
        let (slots, share) = (self.shared.dq_slots(self.group), self.streamed.of_single());
        // SAFETY (whole body): this memory belongs to the warpgroup between the two barriers; each warp arrives for
        // all its lanes.
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

    /// Issues the scores of the next streamed tiles and dP, each in a group of its own. Between them it waits for products that
    /// accumulate gradients, and calls `release` for their tiles.
    #[inline(always)]
    unsafe fn issue_products(&self, release: impl FnOnce()) -> (S::Scores, S::Scores) {
        let (slot, shared) = (self.streamed.slot, self.shared.renewed());
        // SAFETY (whole body): the reasons given in `dqkv`.
        unsafe {
            shared.streamed_slots().acquire(self.streamed);
            wgmma::fence();
            let p = S::Scores::product(shared.owned(0, self.group), shared.streamed(0, slot));
            wgmma::commit();
            wgmma::wait::<1>();
            release();
            let ds = S::Scores::product(shared.owned(1, self.group), shared.streamed(1, slot));
            wgmma::commit();
            (p, ds)
        }
    }

    /// Releases the previous slot of streamed tiles to the producer, with one arrival per warp: a wait covers only a
    /// warp's own part of a product.
    #[inline(always)]
    unsafe fn release(&self) {
        if sreg::lane_id() == 0 {
            // SAFETY: the reasons given in `dqkv`.
            unsafe { self.shared.streamed_slots().release(self.streamed.previous_slot()) }
        }
    }

    /// Writes `factor * gradient` to the box of `map` at `corner`, through an owned tile that is not needed any more.
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

    /// Releases the owned tiles once the stores from them have read them.
    #[inline(always)]
    unsafe fn finish(&mut self) {
        if self.is_first_of_group() {
            tma::wait_read();
            // SAFETY: the reasons given in `dqkv`; the rest of the warpgroup passed the barrier of the last store.
            unsafe { self.shared.owned_slots().release(self.owned.slot) }
        }
        self.owned.advance();
    }

    /// Returns the first owned row of this warp.
    #[inline(always)]
    fn first_row(&self, work: &Work) -> u32 {
        work.first_row + self.group * HOPPER_ROWS + warp_of_group() * 16
    }

    /// Returns true in the thread that issues the warpgroup's copies to the tensor memory accelerator.
    #[inline(always)]
    fn is_first_of_group(&self) -> bool {
        sreg::thread_idx_x() % WARPGROUP == 0
    }

    /// Waits for both consumer warpgroups.
    #[inline(always)]
    fn sync_consumers(&self) {
        // SAFETY: the barrier is used for nothing else, and both warpgroups have the same tiles.
        unsafe { Barrier::Consumers.sync(S::CONSUMERS * WARPGROUP) }
    }

    /// Waits for all warps of this warpgroup.
    #[inline(always)]
    fn sync_group(&self) {
        // SAFETY: the barrier is used for nothing else, and control is uniform over the warpgroup.
        unsafe { Barrier::Group(self.group).sync(WARPGROUP) }
    }
}
