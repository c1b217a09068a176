//! The tiles a thread works in, and one tile of queries from memory to memory: loaded, attended, stored.

use std::ops::Range;

use super::pairs::Words;
use super::program::Machines;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::program::{ScoreProgram, Walk};
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
    /// What the program runs in, if there is one.
    pub(super) machines: Option<Machines>,
    /// What the tile's queries see by it.
    pub(super) walk: Walk,
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
            machines: Machines::new(forward),
            walk: Walk::default(),
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
        if let Some(program) = &forward.program {
            self.begin_program(forward, program, tile);
        }
    }

    /// Attention of the tile's queries to the keys of some blocks.
    pub(super) fn attend(&mut self, forward: &Forward<'_>, tile: &Tile, blocks: Range<u32>, state: &mut State) {
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

    /// Divides by the sums, and writes out, lse and, where they are wanted, row_max and row_sum.
    pub(super) fn store(&mut self, forward: &Forward<'_>, tile: &Tile, state: &State) {
        let (max, sum) = (state.max.as_slice(), state.sum.as_slice());
        let sees_a_key: Vec<bool> = (0..tile.rows)
            .map(|row| match &forward.program {
                None => forward.visibility.visible_end(forward.position(tile, row)) > 0,
                Some(_) => sum[row] != 0.0,
            })
            .collect();
        let sink = forward.program.as_ref().and_then(|program| program.sink(tile.head));
        let finished: Vec<Finished> = sees_a_key
            .into_iter()
            .enumerate()
            .map(|(row, sees)| Finished::new(sees, max[row], sum[row], forward.scale.natural, sink))
            .collect();
        let factor = forward.program.as_ref().map_or(1.0, ScoreProgram::kept_factor);
        let inverses = finished.iter().map(|finished| finished.inverse * factor);
        if forward.few {
            self.store_few(forward, tile, state, inverses);
        } else {
            let (first, output) = (tile.first_row as usize, &state.output);
            tile.out
                .store_panels(forward.kernels, first, inverses, forward.panels, output, &mut self.rows);
        }
        for (row, finished) in finished.iter().enumerate() {
            // SAFETY: lse has an entry for each of the tile's queries, and this task alone writes it.
            unsafe {
                pointer_mut::<f32>(forward.lse)
                    .add(tile.first + row)
                    .write(finished.lse)
            };
            if let Some([row_max, row_sum]) = forward.statistics {
                let [mut max, sum] = finished.statistics;
                if forward.few && sum > 0.0 {
                    max = self.best_score(forward, tile, row, state.best[row]);
                }
                // SAFETY: the same holds of these.
                unsafe {
                    pointer_mut::<f32>(row_max)
                        .add(tile.first + row)
                        .write(max * forward.scale.sign);
                    pointer_mut::<f32>(row_sum).add(tile.first + row).write(sum);
                }
            }
        }
    }
}

/// What a query has at the end of its keys.
struct Finished {
    /// What exponentials times values are multiplied by; 0 makes zeros, whatever they are.
    inverse: f32,
    lse: f32,
    /// The largest score, and the sum of exponentials relative to it.
    statistics: [f32; 2],
}

impl Finished {
    /// From the largest score and the sum of exponentials relative to it, in units of which one is `natural` of e; with a
    /// logit that has no value, if there is one.
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
            // Every score is minus infinity: 0 / 0.
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

    /// No key is seen.
    const NOTHING: Self = Self {
        inverse: 0.0,
        lse: f32::NEG_INFINITY,
        statistics: [f32::NEG_INFINITY, 0.0],
    };
}
