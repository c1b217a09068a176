//! The tiles a thread works in, and one tile of queries from memory to memory: loaded, attended, stored.

use std::ops::Range;

use super::pairs::Words;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::team::Lines;

/// The tiles that a thread works in: what is shared memory and registers on a GPU.
pub(super) struct Scratch {
    /// Q times the sign of the scale, panel by panel, `depth x lanes`.
    pub(super) query: Lines,
    /// What products of pairs read; empty if there are none.
    pub(super) words: Words,
    /// `block_n x head_dim`.
    pub(super) keys: Lines,
    pub(super) values: Lines,
    /// `block_n x lanes`: scores, then exponentials.
    pub(super) scores: Lines,
    /// How many keys of a tile each query sees.
    pub(super) visible: Lines,
    /// A few rows of q or out, `MAX_LANES x head_dim`.
    pub(super) rows: Lines,
}

impl Scratch {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let (head_dim, lanes) = (forward.head_dim(), forward.lanes());
        let block_n = forward.tiles.block_n as usize;
        Self {
            query: Lines::new(lanes * forward.panels.depth),
            words: Words::new(forward),
            keys: Lines::new(block_n * head_dim),
            values: Lines::new(block_n * head_dim + MAX_LANES),
            scores: Lines::new(block_n * forward.panels.lanes),
            visible: Lines::new(lanes),
            rows: Lines::new(MAX_LANES * head_dim.next_multiple_of(MAX_LANES)),
        }
    }

    pub(super) fn load_query(&mut self, forward: &Forward<'_>, tile: &Tile) {
        if forward.few {
            return self.load_few(forward, tile);
        }
        let sign = forward.problem.scale().sign;
        let first = tile.first_row as usize;
        tile.q.load_panels(
            forward.kernels,
            first..first + tile.rows,
            sign,
            forward.panels,
            &mut self.query,
            &mut self.rows,
        );
        if forward.pairs.is_some() {
            self.pair_queries(forward, tile);
        }
    }

    /// Attention of the tile's queries to the keys of some blocks.
    pub(super) fn attend(&mut self, forward: &Forward<'_>, tile: &Tile, blocks: Range<u32>, state: &mut State) {
        state.clear();
        // SAFETY: the processor has the instructions of its kernels.
        forward.pairs.inspect(|pairs| unsafe { (pairs.begin)() });
        for n in blocks {
            self.attend_block(forward, tile, n, state);
        }
        // SAFETY: as above.
        forward.pairs.inspect(|pairs| unsafe { (pairs.end)() });
    }

    /// Divides by the sums, and writes out, lse and, where they are wanted, row_max and row_sum.
    pub(super) fn store(&mut self, forward: &Forward<'_>, tile: &Tile, state: &State) {
        let magnitude = f64::from(forward.problem.softmax_scale().abs());
        let sign = forward.problem.scale().sign;
        let (max, sum) = (state.max.as_slice(), state.sum.as_slice());
        let sees_a_key = |row: usize| forward.visibility.visible_end(forward.position(tile, row)) > 0;
        let inverse = |row: usize| match sum[row] {
            _ if !sees_a_key(row) => 0.0,
            0.0 => f32::NAN, // every score is minus infinity: 0 / 0
            sum => 1.0 / sum,
        };
        let inverses = (0..tile.rows).map(inverse);
        if forward.few {
            self.store_few(forward, tile, state, inverses);
        } else {
            let (first, output) = (tile.first_row as usize, &state.output);
            tile.out
                .store_panels(forward.kernels, first, inverses, forward.panels, output, &mut self.rows);
        }
        for row in 0..tile.rows {
            let lse = if !sees_a_key(row) || sum[row] == 0.0 {
                f32::NEG_INFINITY
            } else {
                (f64::from(max[row]) * magnitude + f64::from(sum[row]).ln()) as f32
            };
            // SAFETY: lse has an entry for each of the tile's queries, and this task alone writes it.
            unsafe { pointer_mut::<f32>(forward.lse).add(tile.first + row).write(lse) };
            if let Some([row_max, row_sum]) = forward.statistics {
                let (max, sum) = match sum[row] {
                    _ if !sees_a_key(row) => (f32::NEG_INFINITY, 0.0),
                    0.0 => (f32::NEG_INFINITY, f32::NAN),
                    sum if forward.few => (self.best_score(forward, tile, row, state.best[row]) * sign, sum),
                    sum => (max[row] * sign, sum),
                };
                // SAFETY: the same holds of these.
                unsafe {
                    pointer_mut::<f32>(row_max).add(tile.first + row).write(max);
                    pointer_mut::<f32>(row_sum).add(tile.first + row).write(sum);
                }
            }
        }
    }
}
