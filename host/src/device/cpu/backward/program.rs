//! The path of a block of keys with a program: scores become y, weights are hidden and dropped, and gradients of y
//! become those of scores.

use std::ops::Range;

use super::scratch::{QueryTile, Scratch};
use super::tables::{Read, TableSums};
use super::weighed::Goal;
use super::{BLOCK, Backward};
use crate::device::cpu::kernels::{Backpropagate, Kernels, SIDE};
use crate::device::cpu::program::{Machines, ScoreProgram};
use crate::plan::TableGradients;
use crate::problem::Problem;
use crate::program::strip::Line;
use crate::program::{Coverage, Derivative};

/// A program and its derivative, made ready for a problem.
pub(super) struct BackwardProgram {
    /// The program, which computes its derivatives as well.
    pub(super) scores: ScoreProgram,
    /// Gradients of y become those of scores, if those are not the same.
    slope: Option<Line>,
    /// Gradients of tables, and the reads that add to them.
    pub(super) sums: TableSums,
    reads: Vec<Read>,
}

impl BackwardProgram {
    /// Returns the program of a problem, if it has one. Gradients of tables are zero, or have no address.
    pub(super) fn new(
        kernels: &'static Kernels,
        problem: &Problem,
        derivative: Option<&Derivative>,
        gradients: &TableGradients,
        runs: usize,
    ) -> Option<Self> {
        let scores = ScoreProgram::new(kernels, problem, problem.softmax_scale())?;
        let derivative = derivative.expect("a program that is run backward has one");
        let expression = derivative.expression();
        let sums = TableSums::new(derivative, &scores.tables, gradients, runs);
        let mut roots = vec![scores.program.score(), derivative.score()];
        if !sums.is_empty() {
            for load in derivative.loads() {
                roots.push(load.derivative);
                roots.extend(expression.node(load.load).operands());
            }
        }
        let scores = scores.with_scores(expression, &roots);
        let roots = scores.score.as_ref().map(|code| &code.roots[..]);
        Some(Self {
            slope: roots
                .filter(|_| !derivative.is_one())
                .map(|roots| Line::slope(roots[1])),
            reads: roots.map_or(Vec::new(), |roots| sums.reads(derivative, &roots[2..])),
            sums,
            scores,
        })
    }

    /// Returns the number of queries that are shown or hidden together: whole strips, and whole words of pairs.
    pub(super) fn group(kernels: &Kernels) -> usize {
        kernels
            .strip_lanes
            .next_multiple_of(if kernels.pairs.is_some() || kernels.strip_lanes.is_multiple_of(SIDE) {
                2 * SIDE
            } else {
                kernels.strip_lanes
            })
    }

    /// Returns the scale of y, or of scores that the program leaves as they are: of e and of 2.
    fn scales(&self, problem: &Problem) -> [f32; 2] {
        match self.scores.score {
            Some(_) => [1.0, std::f32::consts::LOG2_E],
            None => [problem.softmax_scale(), problem.scale().log2],
        }
    }
}

impl Scratch {
    /// Turns to a tile of queries of a head and a run of keys.
    pub(super) fn begin_program(
        &mut self,
        backward: &Backward<'_>,
        program: &BackwardProgram,
        of_head: (usize, usize),
        [queries, keys]: [Range<u32>; 2],
    ) {
        let machines = self.machines.as_mut().expect("where there is a program");
        machines.set_queries(&program.scores, of_head, queries.start);
        let sizes = [BackwardProgram::group(backward.kernels) as u32, BLOCK as u32];
        self.walk.set(&program.scores, of_head, [queries, keys], sizes);
    }

    /// Passes a tile of queries over the keys that it sees: adds to all gradients, or to the sums of delta.
    ///
    /// # Safety
    /// The contract of [`pass`](Self::pass), after [`begin_program`](Self::begin_program) for the tile.
    pub(super) unsafe fn pass_scored(
        &mut self,
        backward: &Backward<'_>,
        program: &BackwardProgram,
        tile: QueryTile,
        [first_key, keys]: [usize; 2],
        goal: Goal,
    ) {
        let group = BackwardProgram::group(backward.kernels);
        let mut machines = self.machines.take().expect("where there is a program");
        let walk = std::mem::take(&mut self.walk);
        for (n, cells) in walk.within(0..u32::MAX) {
            let first = n as usize * BLOCK - first_key;
            let count = BLOCK.min(keys - first);
            let shown = |cell: &Coverage| *cell != Coverage::Empty;
            let begin = cells.iter().position(shown).unwrap_or(0);
            let end = cells.iter().rposition(shown).map_or(0, |last| last + 1);
            let first_lane = (begin * group).max(tile.first_lane);
            let end_lane = (end * group).min(tile.first_lane + tile.lanes);
            if first_lane >= end_lane {
                continue;
            }
            let tile = QueryTile {
                first_lane,
                lanes: end_lane - first_lane,
                ..tile
            };
            let masked = cells[begin..end].iter().any(|cell| *cell != Coverage::Full);
            machines.set_keys(&program.scores, (first_key + first) as u32, masked);
            // SAFETY: passed on to the caller; the block is one of the keys, padded as they are.
            unsafe {
                let machines = (program, &mut machines);
                self.pass_block(backward, machines, tile, [first_key, first, count], (masked, goal));
            }
        }
        (self.walk, self.machines) = (walk, Some(machines));
    }

    /// Passes some lanes of a tile of queries over a block of keys.
    ///
    /// # Safety
    /// The contract of [`pass_scored`](Self::pass_scored).
    unsafe fn pass_block(
        &mut self,
        backward: &Backward<'_>,
        (program, machines): (&BackwardProgram, &mut Machines),
        tile: QueryTile,
        [first_key, first, count]: [usize; 3],
        (masked, goal): (bool, Goal),
    ) {
        let pairs = backward.pairs.filter(|_| self.keys_fit && tile.fits);
        let padded = count.next_multiple_of(backward.padding());
        // SAFETY: passed on to the caller.
        unsafe {
            self.products(backward, pairs, tile, (first, padded));
            let width = backward.kernels.strip_lanes;
            for lane in (tile.first_lane..tile.first_lane + tile.lanes).step_by(width) {
                self.score_strip(
                    backward,
                    (program, machines),
                    (tile, lane),
                    [first_key + first, count],
                    (masked, goal),
                );
            }
        }
        if goal == Goal::Deltas {
            return self.add_weighed(backward, tile, count);
        }
        self.clear_padding(backward, tile, count..padded);
        if !masked || tile.finite && self.keys_are_finite(backward, first, count) {
            // SAFETY: as above.
            unsafe {
                match pairs {
                    Some(pairs) => self.accumulate_pairs(backward, pairs, tile, first, padded),
                    None => self.accumulate(backward, tile, first, padded),
                }
            }
        } else {
            // SAFETY: as above.
            unsafe { self.accumulate_visible(backward, (program, machines), tile, [first, count]) };
        }
    }

    /// Turns S and dP of a strip into P, as it weighs values, and dS; for the sums of delta P is that of the softmax.
    ///
    /// # Safety
    /// The contract of [`pass_scored`](Self::pass_scored).
    unsafe fn score_strip(
        &mut self,
        backward: &Backward<'_>,
        (program, machines): (&BackwardProgram, &mut Machines),
        (tile, lane): (QueryTile, usize),
        [first_key, keys]: [usize; 2],
        (masked, goal): (bool, Goal),
    ) {
        let (kernels, stride) = (backward.kernels, backward.tiles.block_m as usize);
        let scores = (self.probabilities.as_mut_ptr().wrapping_add(lane), stride);
        let ds = (self.ds.as_mut_ptr().wrapping_add(lane), stride);
        let [scale, scale_log2] = program.scales(backward.problem);
        // SAFETY: passed on to the caller; the strip is one of the tile's.
        unsafe {
            machines.score(&program.scores, masked, [lane, keys], scores);
            if let Some(dropped) = &mut machines.dropped {
                dropped.draw(kernels, [tile.first_row + lane, first_key], keys);
                dropped.apply(kernels, keys, ds, true);
            }
            (kernels.backpropagate)(&Backpropagate {
                keys,
                lanes: kernels.strip_lanes,
                scores: scores.0,
                dp: ds.0,
                stride,
                visible: std::ptr::null(),
                scale,
                scale_log2,
                origin: self.origins.as_ptr().wrapping_add(lane),
                inverse_sum: match backward.tensors.statistics {
                    Some(_) => self.inverse_sums.as_ptr().wrapping_add(lane),
                    None => std::ptr::null(),
                },
                delta: self.delta.as_ptr().wrapping_add(lane),
            });
            if let Some(dropped) = machines.dropped.as_mut().filter(|_| goal == Goal::Gradients) {
                dropped.apply(kernels, keys, scores, true);
            }
            if masked {
                machines.clear_hidden(&program.scores, [lane, keys], scores);
                machines.clear_hidden(&program.scores, [lane, keys], ds);
            }
            if goal == Goal::Deltas {
                return;
            }
            let Some(machine) = machines.of_scores() else { return };
            let lanes = kernels.strip_lanes.min(tile.rows.saturating_sub(lane));
            for read in &program.reads {
                let (own, sizes) = (&mut self.own_sums, [keys, lanes]);
                program
                    .sums
                    .add(read, own, machine, lane, sizes, (ds.0.cast_const(), stride));
            }
            if let Some(slope) = &program.slope {
                machine.run(std::slice::from_ref(slope), &program.scores, lane, keys, ds);
            }
        }
    }

    /// Zeroes P and dS of the keys and queries past the end.
    fn clear_padding(&mut self, backward: &Backward<'_>, tile: QueryTile, keys: Range<usize>) {
        let stride = backward.tiles.block_m as usize;
        let lanes = tile.first_lane..tile.first_lane + tile.lanes;
        for scores in [&mut self.probabilities, &mut self.ds] {
            let rows = scores.as_mut_slice().chunks_mut(stride).take(keys.end).enumerate();
            for (key, row) in rows {
                let absent = if key < keys.start {
                    lanes.start.max(tile.rows)
                } else {
                    lanes.start
                };
                if absent < lanes.end {
                    row[absent..lanes.end].fill(0.0);
                }
            }
        }
    }

    /// Adds what a block of keys gives where something is not finite and may be hidden, pair by pair: 0 times
    /// infinity is NaN, so what is hidden must not even be multiplied by 0.
    ///
    /// # Safety
    /// The contract of [`pass_scored`](Self::pass_scored).
    unsafe fn accumulate_visible(
        &mut self,
        backward: &Backward<'_>,
        (program, machines): (&BackwardProgram, &mut Machines),
        tile: QueryTile,
        [first, keys]: [usize; 2],
    ) {
        let width = backward.kernels.strip_lanes;
        for strip in (tile.first_lane..tile.first_lane + tile.lanes).step_by(width) {
            // SAFETY: passed on to the caller.
            let visible = unsafe { machines.visible(&program.scores, true, [strip, keys]) };
            let end = (strip + width).min(tile.rows);
            let sees = |lane: usize, key: usize| visible[key * width + lane - strip];
            self.accumulate_where(backward, strip..end.max(strip), (first, keys), sees);
        }
    }
}
