//! The backward pass on Hopper above head_dim 128, in five products.
//!
//! The accumulators of dK and dV fill the registers of all warpgroups, so each computes them for a part of head_dim, and
//! needs the weights of all keys for it: P and dS go through shared memory, and so all operands of products are there.
//! For 64 queries and the keys of the block
//!
//! ```text
//! S = Q K^T     dP = dO V^T                        a warpgroup has a share of the keys
//! dV^T += dO^T P     dK^T += Q^T dS     dQ = dS K    a warpgroup has slices of head_dim
//! ```
//!
//! dQ of a tile is added to the f32 accumulator in device memory straight from the registers. Blocks add in any order, or
//! in turns ([`load::take_turns`]).
//!
//! Two barriers of all consumers order a step, one when P is written and one when dS is. P is overwritten in the next step
//! after its dO arrived, for whose slot every warpgroup has awaited dV; dS after the barrier of P, before which every
//! warpgroup has awaited dK.

mod load;
mod shared;

use self::load::{load, query_heads, take_turns};
use self::shared::Tiles;
use super::findings::Findings;
use crate::abi::HopperBackwardParams;
use crate::hopper::{Barrier, WARPGROUP, warp_of_group, work::Work};
use crate::mask::{Blocks, Mask};
use crate::nonfinite;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{memory, optimizer, sreg, sync, tma, wgmma};
use crate::scores::{self, OfRows};
use crate::shape::{HOPPER_SLOTS, WideBackwardShape};
use crate::tile::register::{Accumulator, ScoreTile};
use crate::tile::warpgroup::{SQUARE_BYTES, WarpgroupScores, WarpgroupSlices, WarpgroupSquare};
use crate::tile::{element::Element, global::GlobalTile};
use core::mem::offset_of;

/// Computes dK and dV of the keys of this block, and adds their part of dQ. `maps` is the generic address of `p`, a kernel
/// parameter.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made, after
/// [`preprocess`](super::sums::preprocess).
#[inline(always)]
pub unsafe fn wide<S: WideBackwardShape, const CAUSAL: bool>(p: &HopperBackwardParams, maps: u64) {
    let tiles = Tiles::<S>::of_this_block();
    // SAFETY: the parts of shared memory are disjoint; barriers are initialised before any thread continues.
    unsafe {
        share_out!(S, tiles, {
            // One warp each, so that none waits for the others.
            let (warp, is_first) = (warp_of_group(), sreg::lane_id() == 0);
            if warp == 0 && is_first {
                load::<S, CAUSAL>(p, maps, tiles);
            } else if p.sums.turns != 0 && warp <= S::CONSUMERS && is_first {
                take_turns::<S, CAUSAL>(p, tiles, warp - 1);
            }
        } else {
            Consumer::<S, CAUSAL>::new(p, maps, tiles).run();
        });
    }
}

/// Place of a streamed tile of queries.
#[derive(Clone, Copy)]
struct Tile {
    /// First query.
    first_query: u32,
    /// Index of the tile among those of all heads.
    index: u32,
    /// First key of this warpgroup's share.
    first_key: u32,
    /// True if pairs are hidden.
    is_masked: bool,
}

/// A warpgroup that computes.
struct Consumer<'a, S: WideBackwardShape, const CAUSAL: bool> {
    p: &'a HopperBackwardParams,
    maps: u64,
    mask: Mask<CAUSAL>,
    tiles: Tiles<S>,
    /// Index of this consumer.
    group: u32,
    owned: Cursor<1>,
    /// Number of tiles of queries so far.
    steps: u32,
}

impl<'a, S: WideBackwardShape, const CAUSAL: bool> Consumer<'a, S, CAUSAL> {
    #[inline(always)]
    fn new(p: &'a HopperBackwardParams, maps: u64, tiles: Tiles<S>) -> Self {
        Self {
            p,
            maps,
            mask: Mask::new(p.seqlen_q, p.seqlen_k),
            tiles,
            group: sync::uniform(sreg::thread_idx_x() / WARPGROUP) - 1,
            owned: Cursor::start(),
            steps: 0,
        }
    }

    /// Computes this warpgroup's slices of dK and dV, for every tile of work.
    #[inline(always)]
    unsafe fn run(&mut self) {
        for work in Work::of_this_block::<CAUSAL, true>(&self.p.work, S::ROWS) {
            // SAFETY (whole body): tiles are read between acquire and release.
            unsafe {
                self.tiles.owned_slots().acquire(self.owned);
                let is_tainted = Mask::<CAUSAL>::HIDES_PAIRS && self.clean_keys();
                let (mut dk, mut dv) = (S::Slices::zero(), S::Slices::zero());
                self.walk_queries(&work, is_tainted, &mut dk, &mut dv);
                self.store(&work, dk, dv);
            }
        }
    }

    /// Streams every query that sees the tile's keys, for each query head that shares them.
    #[inline(always)]
    unsafe fn walk_queries(&mut self, work: &Work, is_tainted: bool, dk: &mut S::Slices, dv: &mut S::Slices) {
        let (p, blocks) = (self.p, self.blocks(work.first_row));
        // SAFETY (whole body): the reasons given in `run`.
        unsafe {
            let mut follows = false;
            for i in query_heads(p) {
                let head = work.head * p.heads_q_per_kv.get() + i;
                let findings = self.findings();
                findings.find_far(&p.sums, head, blocks, S::COLUMNS, i == 0, is_tainted);
                let mut m = blocks.begin;
                // Worked out anew for each tile: kept, it would occupy registers during the whole loop.
                while m < self.blocks(optimizer::renew(work.first_row)).end {
                    let (head, first_row) = (optimizer::renew(head), optimizer::renew(work.first_row));
                    let tile = Tile {
                        first_query: m * S::COLUMNS,
                        index: head * (p.sums.padded_q.get() / S::COLUMNS) + m,
                        first_key: first_row + self.group * S::SHARE,
                        is_masked: self.blocks(first_row).is_masked(m),
                    };
                    self.step(follows, tile, dk, dv);
                    follows = true;
                    m += 1;
                }
            }
            wgmma::wait::<0>();
            dk.pin();
            dv.pin();
            if follows {
                self.release(self.streamed().previous_slot());
            }
            if Mask::<CAUSAL>::HIDES_PAIRS && self.findings().has_cleaned() {
                self.restore_values(work, dv);
            }
        }
    }

    /// Returns the blocks of queries that see the keys from `first_row` on.
    #[inline(always)]
    fn blocks(&self, first_row: u32) -> Blocks {
        let seqlen_k = self.p.seqlen_k;
        let blocks = self
            .mask
            .query_blocks(first_row, S::ROWS.min(seqlen_k - first_row), S::COLUMNS);
        // Keys that do not exist must have no weight in dQ.
        if first_row + S::ROWS > seqlen_k {
            blocks.all_masked()
        } else {
            blocks
        }
    }

    /// Returns the state of the pipeline of queries.
    #[inline(always)]
    fn streamed(&self) -> Cursor<HOPPER_SLOTS> {
        Cursor::after(self.steps)
    }

    /// Adds the next tile of queries to dK and dV, and the keys to its dQ. `follows` is true if it is not the first of its
    /// tile of work.
    #[inline(always)]
    unsafe fn step(&mut self, follows: bool, tile: Tile, dk: &mut S::Slices, dv: &mut S::Slices) {
        let (streamed, first) = (self.streamed(), self.group * S::SLICES);
        let slot = streamed.slot;
        let first_row = warp_of_group() * 16;
        let hides = Mask::<CAUSAL>::HIDES_PAIRS && tile.is_masked;
        // SAFETY (whole body): the reasons given in `run`; statistics arrive with their tiles.
        unsafe {
            if hides {
                self.tiles.query_slots().acquire(streamed);
                self.tiles.dout_slots().acquire(streamed.of_single());
                self.findings()
                    .clean::<S::Element, 2>([self.tiles.queries(slot), self.tiles.douts()]);
            }
            let (mut p, mut ds) = self.issue_products();
            wgmma::wait::<1>();
            if follows {
                self.release(streamed.previous_slot());
            }
            p.pin();
            let tiles = self.tiles.renewed();
            let queries = OfRows::of_columns::<S::Scores>(tiles.statistics(slot), first_row);
            let is_far = self.findings().is_far();
            scores::weights(&mut p, queries, self.p.scale_log2, is_far);
            if Mask::<CAUSAL>::HIDES_PAIRS && is_far {
                let taints = tiles.taints() + self.group * S::SHARE * 4;
                p.map_columns(taints, |taint, p| p + taint);
            }
            if tile.is_masked {
                let first_query = tile.first_query + first_row;
                p.hide(tile.first_key, |row| self.mask.keys_of(first_query + row), 0.0);
            }
            self.show(&p, tiles.weights());
            wgmma::fence();
            for slice in 0..S::SLICES {
                dv.add_product(slice, tiles.douts(), first, tiles.weights());
            }
            wgmma::commit();
            wgmma::wait::<1>();
            ds.pin();
            scores::score_gradients(&mut ds, &p, queries, hides);
            self.show(&ds, tiles.score_gradients());
            let add = (self.p.seqlen_q == 0) as u32;
            wgmma::fence();
            let mut dq = S::Square::product_across(tiles.score_gradients(), tiles.keys().panel(first));
            for slice in 0..S::SLICES {
                let tiles = self.tiles.renewed();
                if slice > 0 {
                    wgmma::fence();
                    dq.restart_across(tiles.score_gradients(), tiles.keys().panel(first + slice), add);
                }
                wgmma::commit();
                dk.add_product(slice, tiles.queries(slot), first, tiles.score_gradients());
                wgmma::commit();
                wgmma::wait::<1>();
                dq.pin();
                if slice == 0 {
                    self.release_dout();
                    self.await_turn();
                }
                self.add_queries(&dq, tile.index * S::ALL_SLICES + first + slice);
            }
            self.pass_turn();
            self.steps += 1;
        }
    }

    /// Issues this warpgroup's share of S and dP of the next tile, each in a group of its own.
    #[inline(always)]
    unsafe fn issue_products(&self) -> (S::Scores, S::Scores) {
        let (tiles, streamed, first_key) = (self.tiles.renewed(), self.streamed(), self.group * S::SHARE);
        // SAFETY (whole body): the reasons given in `run`.
        unsafe {
            tiles.query_slots().acquire(streamed);
            wgmma::fence();
            let s = S::Scores::product(tiles.queries(streamed.slot), tiles.keys().from_row(first_key));
            wgmma::commit();
            tiles.dout_slots().acquire(streamed.of_single());
            let dp = S::Scores::product(tiles.douts(), tiles.values().from_row(first_key));
            wgmma::commit();
            (s, dp)
        }
    }

    /// Publishes this warpgroup's share of P or dS in `target`, and waits for the others.
    #[inline(always)]
    unsafe fn show(&self, share: &S::Scores, target: crate::tile::panels::Panels) {
        let share = share.operand();
        // SAFETY (whole body): no product reads the tile any more, for the reasons at the top.
        unsafe {
            let first_key = self.group * S::SHARE;
            S::Scores::write(
                &share,
                target,
                warp_of_group() * 16,
                first_key,
                optimizer::renew(sreg::lane_id()),
            );
            tma::fence_async();
            self.sync_consumers();
        }
    }

    /// Adds a square of dQ to the accumulator.
    #[inline(always)]
    unsafe fn add_queries(&self, dq: &S::Square, square: u32) {
        let target = self.p.sums.dq + square as u64 * SQUARE_BYTES as u64;
        // SAFETY: the accumulator is padded to whole squares.
        unsafe { dq.add_to(target, sreg::thread_idx_x() % WARPGROUP) }
    }

    /// Tells if blocks add to dQ in turns.
    #[inline(always)]
    fn takes_turns(&self) -> bool {
        // Compared anew: kept, the address would occupy registers of the producer.
        optimizer::renew((self.p.sums.turns != 0) as u32) != 0
    }

    /// Waits until this warpgroup may add to dQ of the next tile.
    #[inline(always)]
    unsafe fn await_turn(&self) {
        if self.takes_turns() {
            // SAFETY: the reasons given in `run`.
            unsafe { self.tiles.turn_slots(self.group).acquire(self.streamed().of_single()) }
        }
    }

    /// Passes the turn when every warp has issued its additions.
    #[inline(always)]
    unsafe fn pass_turn(&self) {
        if self.takes_turns() {
            sync::sync_warp();
            if sreg::lane_id() == 0 {
                // SAFETY: the reasons given in `run`.
                unsafe { self.tiles.turn_slots(self.group).release(0) }
            }
        }
    }

    /// Releases a slot of queries to the producer, with one arrival per warp: a wait covers only a warp's own part of a product.
    #[inline(always)]
    unsafe fn release(&self, slot: u32) {
        if sreg::lane_id() == 0 {
            // SAFETY: the reasons given in `run`.
            unsafe { self.tiles.query_slots().release(slot) }
        }
    }

    /// Releases dO to the producer, and with it P to all warpgroups.
    #[inline(always)]
    unsafe fn release_dout(&self) {
        if sreg::lane_id() == 0 {
            // SAFETY: the reasons given in `run`.
            unsafe { self.tiles.dout_slots().release(0) }
        }
    }

    /// Zeroes NaN and infinity in the keys, which queries multiply by gradients of hidden pairs; returns true if this thread found
    /// any. Every query that sees such a key gets NaN, as its sum of weights is NaN; the actual score does not matter.
    #[inline(always)]
    unsafe fn clean_keys(&self) -> bool {
        let key = sreg::thread_idx_x() - WARPGROUP;
        let mut is_tainted = false;
        // SAFETY (whole body): the row and its taint are the thread's own until all consumers meet in `find_far`.
        unsafe {
            if key < S::ROWS {
                is_tainted = self.tiles.keys().clean_row::<S::Element>(key);
                let taint = if is_tainted { f32::NAN } else { 0.0 };
                memory::st_shared_word(self.tiles.taints() + key * 4, taint.to_bits());
            }
            tma::fence_async();
        }
        is_tainted
    }

    /// Adds the elements that were zeroed in tiles of dO to dV.
    #[inline(always)]
    unsafe fn restore_values(&self, work: &Work, dv: &mut S::Slices) {
        let (p, first, first_row) = (self.p, self.group * S::SLICES, work.first_row);
        // Recomputed here: kept, it would occupy registers during the whole loop.
        let blocks = self.blocks(optimizer::renew(first_row));
        let sees = |row, query| self.mask.queries_of(first_row + row).contains(query);
        let first_column = warp_of_group() * 16;
        for i in 0..p.heads_q_per_kv.get() {
            let head = work.head * p.heads_q_per_kv.get() + i;
            let (batch, head) = (head / p.heads_q, head % p.heads_q);
            let douts = GlobalTile::new(&p.dout_rows, batch, head, p.seqlen_q, &p.layout, S::Element::BYTES);
            nonfinite::for_hidden!(blocks, S::COLUMNS, p.seqlen_q, |query, none| {
                // SAFETY: the window clips what does not exist.
                dv.map_coordinates(first, |row, column, x| unsafe {
                    let column = first_column + column + none;
                    nonfinite::restored::<S::Element>(x, &douts, query, column, sees(row, query))
                });
            });
        }
    }

    /// Writes this warpgroup's slices of dK and dV through the tiles of K and V, which are not needed any more.
    #[inline(always)]
    unsafe fn store(&mut self, work: &Work, mut dk: S::Slices, dv: S::Slices) {
        let (tiles, first) = (self.tiles, self.group * S::SLICES);
        let (warp, lane) = (warp_of_group(), sreg::lane_id());
        dk.scale(self.p.softmax_scale);
        // SAFETY (whole body): each warp awaited its products before it arrives at the first barrier; a warpgroup's slices
        // are its own.
        unsafe {
            self.sync_consumers();
            dv.write(tiles.values(), first, warp, lane);
            dk.write(tiles.keys(), first, warp, lane);
            tma::fence_async();
            Barrier::Group(self.group).sync(WARPGROUP);
            if sreg::thread_idx_x() % WARPGROUP == 0 {
                let corner = work.corner(self.p.heads_kv, 0);
                for slice in first..first + S::SLICES {
                    tiles.values().store_panel(slice, map!(self.maps, dv), corner);
                    tiles.keys().store_panel(slice, map!(self.maps, dk), corner);
                }
                tma::wait_read();
                tiles.owned_slots().release(self.owned.slot);
            }
        }
        self.owned.advance();
    }

    #[inline(always)]
    fn findings(&self) -> Findings {
        Findings::new(self.tiles.findings(), S::CONSUMERS)
    }

    /// Waits for all consumer warpgroups.
    #[inline(always)]
    fn sync_consumers(&self) {
        // SAFETY: the barrier is used for nothing else, and all warpgroups have the same tiles.
        unsafe { Barrier::Consumers.sync(S::CONSUMERS * WARPGROUP) }
    }
}
