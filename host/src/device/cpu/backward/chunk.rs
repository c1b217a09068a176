//! The walk of one task: tiles of queries pass a run of keys, block by block.

use std::sync::atomic::Ordering;

use super::dq::{GradientRows, SharedHead, wait_for};
use super::scratch::{QueryTile, Scratch};
use super::weighed::Goal;
use super::{BLOCK, Backward};
use crate::device::cpu::kernels::{Backpropagate, Pairs};

impl Scratch {
    /// The gradients that come from run `chunk` of the keys of a head.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward), and no other task has these keys.
    pub(super) unsafe fn chunk(
        &mut self,
        backward: &Backward<'_>,
        shared: &SharedHead,
        head: usize,
        chunk: usize,
        chunks: usize,
    ) {
        let (problem, tensors) = (backward.problem, backward.tensors);
        let (batch, kv_head) = (head / problem.heads_kv(), head % problem.heads_kv());
        let block_n = backward.tiles.block_n as usize;
        let first_key = chunk * block_n;
        let keys = block_n.min(problem.seqlen_k() as usize - first_key);
        // SAFETY: passed on to the caller; the keys are within their tensors.
        unsafe { self.load_keys(backward, batch, kv_head, first_key, keys) };
        let sums = shared.sums(backward, chunks);
        if let Some(program) = &backward.program {
            program.sums.begin(head, chunk);
        }
        for in_group in 0..backward.group() {
            let query_head = kv_head * backward.group() + in_group;
            for tile in (0..backward.query_tiles()).rev() {
                let first_row = tile * backward.tiles.block_m as usize;
                let rows = (backward.tiles.block_m as usize).min(problem.seqlen_q() as usize - first_row);
                let Some(turn) = shared.turn(backward, in_group, tile, chunk) else {
                    continue;
                };
                // SAFETY: as above.
                unsafe {
                    self.dq_lanes.as_mut_slice().fill(0.0);
                    if turn.sees_any {
                        let tile = self.load_queries(backward, batch, query_head, first_row, rows);
                        let of_head = (batch, query_head);
                        self.walk_keys(backward, of_head, tile, [first_key, keys], Goal::Gradients);
                    }
                    let added = &shared.added[in_group * backward.query_tiles() + tile];
                    let dq = GradientRows {
                        rows: backward.rows(tensors.dq, batch, query_head, problem.head_dim() as usize),
                        sums: sums.as_ref().map(|sums| sums.0),
                        first_sum: in_group * problem.seqlen_q() as usize + first_row,
                        first_row,
                        count: rows,
                        is_first: turn.place == 0,
                        is_last: turn.is_last,
                    };
                    wait_for(added, turn.place);
                    self.add_dq(backward, &dq);
                    added.store(turn.place + 1, Ordering::Release);
                }
                backward.reporter.add(1);
            }
        }
        if let Some(program) = &backward.program {
            program.sums.end(head, chunk, &mut self.own_sums);
        }
        // SAFETY: as above, and no other task has these keys.
        unsafe { self.store_key_gradients(backward, batch, kv_head, first_key, keys) };
    }

    /// A tile of queries of a head passes the loaded keys: adds to all gradients, dQ's in lanes and without its factor, or to the sums
    /// of delta.
    ///
    /// # Safety
    /// The processor has the kernels' instructions.
    pub(super) unsafe fn walk_keys(
        &mut self,
        backward: &Backward<'_>,
        of_head: (usize, usize),
        tile: QueryTile,
        [first_key, keys]: [usize; 2],
        goal: Goal,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            backward.pairs.inspect(|pairs| (pairs.begin)());
            match &backward.program {
                None => self.pass(backward, tile, [first_key, keys], goal),
                Some(program) => {
                    let ranges = [tile.first_row..tile.first_row + tile.rows, first_key..first_key + keys];
                    let ranges = ranges.map(|range| range.start as u32..range.end as u32);
                    self.begin_program(backward, program, of_head, ranges);
                    self.pass_scored(backward, program, tile, [first_key, keys], goal);
                }
            }
            backward.pairs.inspect(|pairs| (pairs.end)());
        }
    }

    /// [`walk_keys`](Self::walk_keys) without a program.
    ///
    /// # Safety
    /// The processor has the kernels' instructions.
    unsafe fn pass(&mut self, backward: &Backward<'_>, tile: QueryTile, [first_key, keys]: [usize; 2], goal: Goal) {
        let pairs = backward.pairs.filter(|_| self.keys_fit && tile.fits);
        for first in (0..keys).step_by(BLOCK) {
            let seen = |row: usize| {
                let end = backward.visibility.visible_end((tile.first_row + row) as u32) as usize;
                end.saturating_sub(first_key + first).min(BLOCK.min(keys - first))
            };
            // The last query sees the most. Keys that it does not see are left out.
            let most = seen(tile.rows - 1);
            if most == 0 {
                break; // nor do the blocks after it see anything
            }
            let count = most.next_multiple_of(backward.padding()).min(BLOCK.min(keys - first));
            let padded = count.next_multiple_of(backward.padding());
            let masked = seen(0) < padded;
            if masked {
                for (row, visible) in self.visible.as_mut_slice()[..tile.rows].iter_mut().enumerate() {
                    *visible = seen(row) as f32;
                }
            }
            // SAFETY: passed on to the caller; the block is one of the keys, padded as they are.
            unsafe {
                self.products(backward, pairs, tile, (first, padded));
                self.gradients(backward, tile, padded, masked);
            }
            if goal == Goal::Deltas {
                self.add_weighed(backward, tile, count);
            } else if !masked || tile.finite && self.keys_are_finite(backward, first, count) {
                // SAFETY: as above.
                unsafe {
                    match pairs {
                        Some(pairs) => self.accumulate_pairs(backward, pairs, tile, first, padded),
                        None => self.accumulate(backward, tile, first, padded),
                    }
                }
            } else {
                self.accumulate_seen(backward, tile, first, count);
            }
        }
    }

    /// Returns true if these keys and values are finite.
    pub(super) fn keys_are_finite(&self, backward: &Backward<'_>, first: usize, count: usize) -> bool {
        let tiles = [&self.keys, &self.values].into_iter().zip(backward.head_dims());
        let mut blocks = tiles.map(|(tile, head_dim)| &tile.as_slice()[first * head_dim..][..count * head_dim]);
        blocks.all(|block| block.iter().fold(true, |all, x| all & x.is_finite()))
    }

    /// S and dP of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// The contract of [`pass`](Self::pass); the keys are among those of the task.
    pub(super) unsafe fn products(
        &mut self,
        backward: &Backward<'_>,
        pairs: Option<&Pairs>,
        tile: QueryTile,
        (first, keys): (usize, usize),
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match pairs {
                Some(pairs) => self.score_pairs(backward, pairs, tile, first, keys),
                None => {
                    self.score(backward, tile, first, keys);
                    if let Some(pairs) = backward.pairs.filter(|_| backward.splits()) {
                        self.choose_scores(backward, pairs, tile, first, keys);
                    }
                }
            }
        }
    }

    /// S and dP of so many keys become P and dS, in the tile's lanes.
    ///
    /// # Safety
    /// The contract of [`pass`](Self::pass).
    unsafe fn gradients(&mut self, backward: &Backward<'_>, tile: QueryTile, keys: usize, masked: bool) {
        let (stride, first) = (backward.tiles.block_m as usize, tile.first_lane);
        // SAFETY: passed on to the caller; the lanes are among those of each line.
        unsafe {
            (backward.kernels.backpropagate)(&Backpropagate {
                keys,
                lanes: tile.lanes,
                scores: self.probabilities.as_mut_ptr().add(first),
                dp: self.ds.as_mut_ptr().add(first),
                stride,
                visible: if masked {
                    self.visible.as_ptr().add(first)
                } else {
                    std::ptr::null()
                },
                scale: backward.problem.softmax_scale(),
                scale_log2: backward.problem.scale().log2,
                origin: self.origins.as_ptr().add(first),
                inverse_sum: match backward.tensors.statistics {
                    Some(_) => self.inverse_sums.as_ptr().add(first),
                    None => std::ptr::null(),
                },
                delta: self.delta.as_ptr().add(first),
            });
        }
    }
}
