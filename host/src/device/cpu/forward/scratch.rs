//! Tiles of a thread, and the computation of one tile of queries from memory to memory: load, attend, store.

use std::ops::Range;

use super::pairs::Words;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{MAX_LANES, Query, TOGETHER};
use crate::device::cpu::program::{Machines, ScoreProgram, Walk};
use crate::device::cpu::team::Lines;

/// Tiles of a thread, in the place of a GPU's shared memory and registers.
pub(super) struct Scratch {
    /// Q times the sign of the scale, by panels, `depth x lanes`.
    pub(super) query: Lines,
    /// Operands of bf16 pair products; empty without them.
    pub(super) words: Words,
    /// Keys: `block_n x head_dim`.
    pub(super) keys: Lines,
    /// Values: `block_n x head_dim_v`.
    pub(super) values: Lines,
    /// Addresses of the rows of a tile of keys, and of values, where several pages hold them, on the decode path.
    pub(super) addresses: [Vec<*const u8>; 2],
    /// Queries that see as many keys of a tile, on the decode path.
    pub(super) queries: Vec<Query>,
    /// Scores, then exponentials: `block_n x lanes`; on the decode path, scores of [`TOGETHER`] queries in two orders.
    pub(super) scores: Lines,
    /// Number of keys of a tile that each query sees.
    pub(super) visible: Lines,
    /// A few rows of q or out, of the larger head_dim: `MAX_LANES`, or on the decode path one of q and one of k.
    pub(super) rows: Lines,
    /// Machines of the score program, if there is one.
    pub(super) machines: Option<Machines>,
    /// Visibility of keys by the program for the tile's queries.
    pub(super) walk: Walk,
}

impl Scratch {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let (head_dim, head_dim_v, room) = (forward.head_dim(), forward.head_dim_v(), forward.room());
        let block_n = forward.tiles.block_n as usize;
        // The decode path reads keys and values where they lie.
        let (loaded, rows) = if forward.few { (0, 2) } else { (block_n, MAX_LANES) };
        Self {
            query: Lines::new(room * forward.panels.depth),
            words: Words::new(forward),
            keys: Lines::new(loaded * head_dim),
            values: Lines::new(loaded * head_dim_v + MAX_LANES),
            addresses: [Vec::new(), Vec::new()],
            queries: Vec::new(),
            scores: Lines::new(if forward.few {
                2 * TOGETHER * block_n.next_multiple_of(MAX_LANES)
            } else {
                block_n * forward.panels.lanes
            }),
            visible: Lines::new(room),
            rows: Lines::new(rows * head_dim.max(head_dim_v).next_multiple_of(MAX_LANES)),
            machines: (forward.program.as_ref()).map(|program| Machines::new(program, room, block_n)),
            walk: Walk::default(),
        }
    }

    pub(super) fn load_query(&mut self, forward: &Forward<'_>, tile: &Tile<'_>) {
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
        if let Some(program) = &forward.program {
            self.begin_program(forward, program, tile);
        }
    }

    /// Attends the tile's queries to the keys of some blocks.
    pub(super) fn attend(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, blocks: Range<u32>, state: &mut State) {
        state.clear();
        // SAFETY: the processor has the instructions of its kernels.
        forward.pairs.inspect(|pairs| unsafe { (pairs.begin)() });
        match &forward.program {
            None => blocks.for_each(|n| self.attend_block(forward, tile, n, state)),
            Some(program) => self.attend_scored(forward, program, tile, blocks, state),
        }
        // SAFETY: as above.
        forward.pairs.inspect(|pairs| unsafe { (pairs.end)() });
    }

    /// Divides by the sums, and writes out, lse and, if they are wanted, row_max and row_sum.
    pub(super) fn store(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, state: &State) {
        let (max, sum) = (state.max.as_slice(), state.sum.as_slice());
        let sees_a_key = |row: usize| match &forward.program {
            None => forward.visibility.visible_end(forward.position(tile, row)) > 0,
            Some(_) => sum[row] != 0.0,
        };
        let sink = forward.program.as_ref().and_then(|program| program.sink(tile.head));
        let finished: Vec<Finished> = (0..tile.rows)
            .map(|row| Finished::new(sees_a_key(row), max[row], sum[row], forward.scale.natural, sink))
            .collect();
        let factor = forward.program.as_ref().map_or(1.0, ScoreProgram::kept_factor);
        let inverses = finished.iter().map(|finished| finished.inverse * factor);
        if forward.few {
            self.store_few(forward, tile, state, inverses);
        } else {
            let (first, output) = (tile.first_row as usize, &state.output);
            tile.out.store_panels(
                forward.kernels,
                first,
                inverses,
                forward.output_panels,
                output,
                &mut self.rows,
            );
        }
        for (row, finished) in finished.iter().enumerate() {
            // SAFETY: lse has an entry for each of the tile's queries, and this task alone writes it.
            unsafe { forward.lse.at(tile.first + row).write(finished.lse) };
            if let Some([row_max, row_sum]) = forward.statistics {
                let [mut max, sum] = finished.statistics;
                if forward.few && sum > 0.0 {
                    max = self.best_score(forward, tile, row, state.best[row]);
                }
                // Restores the sign of the scale, so that this is the caller's q.k. Minus infinity, of a query that sees no key, stays.
                if max != f32::NEG_INFINITY {
                    max *= forward.scale.sign;
                }
                // SAFETY: the same holds of these.
                unsafe {
                    row_max.at(tile.first + row).write(max);
                    row_sum.at(tile.first + row).write(sum);
                }
            }
        }
    }
}

/// Final values of a query.
struct Finished {
    /// Factor of the sum of exponentials times values; with 0 the output is 0 for any sum.
    inverse: f32,
    lse: f32,
    /// The largest score, and the sum of exponentials relative to it.
    statistics: [f32; 2],
}

impl Finished {
    /// Computes the final values from the largest score and the sum of exponentials relative to it, in units of which
    /// one is `natural` of e, and from the sink's logit if there is one.
    fn new(sees_a_key: bool, max: f32, sum: f32, natural: f32, sink: Option<f32>) -> Self {
        let max_of_e = f64::from(max) * f64::from(natural);
        let with_sink = |sink: f32| {
            let largest = max_of_e.max(sink.into());
            let total = f64::from(sum) * (max_of_e - largest).exp() + (f64::from(sink) - largest).exp();
            (sum + (f64::from(sink) - max_of_e).exp() as f32, largest + total.ln())
        };
        let (sum, lse) = match sink {
            None => (sum, max_of_e + f64::from(sum).ln()),
            Some(sink) if sees_a_key => with_sink(sink),
            Some(sink) => {
                return Self {
                    lse: sink,
                    ..Self::NOTHING
                };
            }
        };
        if !sees_a_key {
            return Self::NOTHING;
        }
        if sum == 0.0 {
            // Every score is minus infinity: 0 / 0 is NaN.
            return Self {
                inverse: f32::NAN,
                statistics: [f32::NEG_INFINITY, f32::NAN],
                ..Self::NOTHING
            };
        }
        Self {
            inverse: 1.0 / sum,
            lse: lse as f32,
            statistics: [max, sum],
        }
    }

    /// Values of a query that sees no key.
    const NOTHING: Self = Self {
        inverse: 0.0,
        lse: f32::NEG_INFINITY,
        statistics: [f32::NEG_INFINITY, 0.0],
    };
}
