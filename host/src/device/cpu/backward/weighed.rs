//! delta of queries that few keys share: the sum of P * dP over the keys, from the very numbers that the products of the main pass
//! have.
//!
//! Where one key has all the weight of a query, the gradient of its score, `P * (dP - delta)`, is 0; where several share it, their
//! gradients sum to 0. rowsum(dO * O) is not rounded as dP is, and leaves a remainder of a few roundings of dP. With many keys it is
//! smaller than their own roundings, but with few it is not. So P and dP of such queries are computed beforehand, by the same
//! instructions as afterwards.

use flash_attention_kernels::entries::Dtype;

use super::dq::SharedHead;
use super::scratch::{QueryTile, Scratch};
use super::{Backward, Kind};
use crate::device::cpu::kernels::SIDE;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::team::Team;
use crate::device::cpu::tensor::QueryRows;

/// Queries with a smaller row_sum have their delta from the keys: those of which one key has more than half of the weight.
///
/// A larger limit is not worth its price: with 16 most tiles of 512 keys of normal numbers have such a query and take two more products,
/// a third of the time.
const FEW_KEYS: f32 = 2.0;

/// Queries with a larger scaled score, as an exponent of 2, have it too: several keys may have that score, and then share the weight.
/// Scores of ordinary inputs are smaller.
///
/// With it, 3 of 2000 drawn cases of `tests/tests/suite/numbers.rs` exceed the rule's bound, where the rounding of scores of some
/// thousands is a matter of luck. Without it, 16 of 500 did, and without any delta from the keys 56 of 250.
const LARGE_SCORE: f32 = 32.0;

/// Queries that are taken together: whole strips, and whole words of pairs.
const GROUP: usize = 2 * SIDE;

/// Purpose of a walk of a tile of queries over keys.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    Deltas,
    Gradients,
}

/// Sums of a tile of queries over their keys. They take memory once a tile has such queries.
#[derive(Default)]
pub(super) struct Weighed {
    /// Sums of P.
    weights: Vec<f64>,
    /// Sums of P * dP.
    products: Vec<f64>,
}

/// A tile of queries of a head.
struct Task {
    problem: usize,
    /// Head of all query heads of all batch entries.
    head: usize,
    tile: usize,
}

/// Computes delta once more, from the keys, of queries of f32 problems that few keys share. Without row_sum none is known.
///
/// # Safety
/// The contract of [`backward`](super::backward).
pub(super) unsafe fn make_weighed_deltas(team: &Team<'_>, problems: &[Backward<'_>], shared: &[Vec<SharedHead>]) {
    let tasks: Vec<Task> = (problems.iter().enumerate())
        .flat_map(|(index, problem)| {
            let tiles = problem.query_tiles();
            // SAFETY: passed on to the caller.
            let tiles_of_few = unsafe { problem.tiles_of_few() };
            tiles_of_few.into_iter().map(move |task| Task {
                problem: index,
                head: task / tiles,
                tile: task % tiles,
            })
        })
        .collect();
    let own = || None::<(Kind, Scratch)>;
    team.share(tasks.len(), own, |own, index| {
        let Task { problem, head, tile } = tasks[index];
        let (backward, shared) = (&problems[problem], &shared[problem]);
        let scratch = Scratch::of(own, backward, problem);
        // SAFETY: passed on to the caller; no other task has these queries.
        unsafe { scratch.weigh(backward, shared, head, tile) };
    });
}

impl Backward<'_> {
    /// Tiles of queries, those of all heads counted in order, some of which few keys share.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward).
    unsafe fn tiles_of_few(&self) -> Vec<usize> {
        if self.problem.dtype() != Dtype::F32 || self.tensors.statistics.is_none() {
            return Vec::new();
        }
        let (seqlen, block_m) = (self.problem.seqlen_q() as usize, self.tiles.block_m as usize);
        let heads = 0..self.problem.batch() * self.problem.heads_q();
        let tiles = heads.flat_map(|head| (0..seqlen).step_by(block_m).map(move |first| (head, first)));
        let is_of_few = |(head, first): (usize, usize)| {
            let mut queries = head * seqlen + first..head * seqlen + seqlen.min(first + block_m);
            // SAFETY: passed on to the caller.
            queries.any(|query| unsafe { self.has_few(query) })
        };
        let numbered = tiles.enumerate().filter(|(_, tile)| is_of_few(*tile));
        numbered.map(|(number, _)| number).collect()
    }

    /// The part of a tile's lanes, from the first query to the last that few keys share. The tile starts at query `first`.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward).
    unsafe fn of_few(&self, tile: QueryTile, first: usize) -> QueryTile {
        // SAFETY: passed on to the caller.
        let is_of_few = |row: &usize| unsafe { self.has_few(first + row) };
        let first_lane = (0..tile.rows).find(is_of_few).unwrap_or(0) / GROUP * GROUP;
        let end = (0..tile.rows).rfind(is_of_few).map_or(0, |last| last + 1);
        QueryTile {
            first_lane,
            lanes: end.next_multiple_of(GROUP).min(tile.lanes) - first_lane,
            ..tile
        }
    }

    /// Tells if few keys share a query, counted over all heads. Without row_sum no query is known to have few; a row_sum of 0 is that of
    /// a query that sees none.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward).
    unsafe fn has_few(&self, query: usize) -> bool {
        self.tensors.statistics.is_some_and(|statistics| {
            // SAFETY: there is a row_max and a row_sum for each query, and no thread writes them meanwhile.
            let [row_max, row_sum] =
                statistics.map(|rows| unsafe { QueryRows::new(rows, self.problem).at(query).read() });
            let is_large = (row_max * self.problem.scale().log2).abs() > LARGE_SCORE;
            row_sum > 0.0 && (row_sum < FEW_KEYS || is_large)
        })
    }
}

impl Weighed {
    /// Starts sums of 0 for so many queries.
    fn start(&mut self, queries: usize) {
        for sums in [&mut self.weights, &mut self.products] {
            sums.clear();
            sums.resize(queries, 0.0);
        }
    }
}

impl Scratch {
    /// Writes delta of the queries of a tile that few keys share.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward); no other task has these queries.
    unsafe fn weigh(&mut self, backward: &Backward<'_>, shared: &[SharedHead], head: usize, tile: usize) {
        let problem = backward.problem;
        let (batch, query_head) = (head / problem.heads_q(), head % problem.heads_q());
        let (kv_head, in_group) = (query_head / backward.group(), query_head % backward.group());
        let shared = &shared[batch * problem.heads_kv() + kv_head];
        let (block_m, block_n) = (backward.tiles.block_m as usize, backward.tiles.block_n as usize);
        let first_row = tile * block_m;
        let rows = block_m.min(problem.seqlen_q() as usize - first_row);
        // SAFETY: passed on to the caller; the queries and keys are within their tensors.
        unsafe {
            let queries = self.load_queries(backward, batch, query_head, first_row, rows);
            let first_query = head * problem.seqlen_q() as usize + first_row;
            let queries = backward.of_few(queries, first_query);
            // P * (dP - 0) is what is summed.
            self.delta.as_mut_slice().fill(0.0);
            self.weighed.start(block_m);
            for chunk in 0..backward.chunks() {
                let turn = shared.turn(backward, in_group, tile, chunk);
                if turn.is_none_or(|turn| !turn.sees_any) {
                    continue;
                }
                let first_key = chunk * block_n;
                let keys = block_n.min(problem.seqlen_k() as usize - first_key);
                self.load_keys(backward, batch, kv_head, first_key, keys);
                self.walk_keys(backward, (batch, query_head), queries, [first_key, keys], Goal::Deltas);
            }
            self.store_deltas(backward, first_query, rows);
        }
    }

    /// Adds up P and P * dP, which lie in the places of P and dS, of so many keys.
    pub(super) fn add_weighed(&mut self, backward: &Backward<'_>, tile: QueryTile, keys: usize) {
        let (stride, lanes) = (
            backward.tiles.block_m as usize,
            tile.first_lane..tile.first_lane + tile.lanes,
        );
        let sums = [
            (&self.probabilities, &mut self.weighed.weights),
            (&self.ds, &mut self.weighed.products),
        ];
        for (terms, sums) in sums {
            for row in terms.as_slice().chunks(stride).take(keys) {
                let sums = sums[lanes.clone()].iter_mut();
                sums.zip(&row[lanes.clone()]).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
    }

    /// Writes delta of the queries from `first` on that few keys share. The weights sum to 1, up to their roundings, which P * dP has as
    /// well; with a sink they sum to less.
    ///
    /// # Safety
    /// The contract of [`weigh`](Self::weigh).
    unsafe fn store_deltas(&self, backward: &Backward<'_>, first: usize, rows: usize) {
        let program = backward.program.as_ref().map(|program| &program.scores.program);
        let has_sinks = program.is_some_and(|program| program.sinks().is_some());
        for row in 0..rows {
            let (weights, product) = (self.weighed.weights[row], self.weighed.products[row]);
            let weights = if has_sinks { 1.0 } else { weights };
            // SAFETY: there is a delta for each query, and no other task writes it meanwhile.
            unsafe {
                if backward.has_few(first + row) && weights != 0.0 {
                    *pointer_mut::<f32>(backward.delta).add(first + row) = (product / weights) as f32;
                }
            }
        }
    }
}
