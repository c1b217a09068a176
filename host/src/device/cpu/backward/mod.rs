//! The backward pass on the CPU: gradients by recomputation, as the GPU kernels compute them, in five products.
//!
//! With P = exp(scale * (S - row_max)) / row_sum, or exp(scale * S - lse) where lse is all there is, and delta =
//! rowsum(dO * O), which comes first,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dS^T Q
//! ```
//!
//! A task owns a run of keys of one head, with their dK and dV, and streams the queries of every head that shares
//! them, tile by tile, the last first. Queries are lanes (see `kernels/`), so S, dP and dS are computed once, and all
//! five products read them in the same layout. A task adds its part of dQ to memory after the task of the keys before it
//! has added its own: each element of a gradient is one sum in one order, the same on any number of threads. Threads take
//! tasks in that order, so the task that another waits for is always running, and a few rows ahead.
//!
//! A batch of problems is one pass over the tasks of all of them, in order.
//!
//! Here are the problems and their tasks. `delta.rs` comes first, and `weighed.rs` for queries that few keys share; then `chunk.rs` is
//! the walk of a task, with `scratch.rs` what it works in, `single.rs` and `pairs.rs` its products in f32 and of pairs of bf16, and
//! `dq.rs` the sums it shares.

mod chunk;
mod delta;
mod dq;
mod pairs;
mod program;
mod scratch;
mod single;
mod tables;
mod weighed;

use std::ops::Range;

use flash_attention_kernels::abi::StridedTensor;

use super::kernels::{Kernels, MAX_LANES, Pairs, ROWS, SIDE};
use super::nanoseconds;
use super::team::{Lines, Team};
use super::tensor::{Head, Visibility};
use crate::plan::{self, Plan, TableGradients, Tiles};
use crate::problem::{BackwardTensors, Problem};
use crate::progress::Reporter;
use delta::make_deltas;
use dq::{SharedHead, Turn};
use program::BackwardProgram;
use scratch::Scratch;
use weighed::make_weighed_deltas;

/// Keys whose scores are made at a time: with those of a tile of queries, they stay in the L1 cache.
const BLOCK: usize = 64;

/// A backward problem being computed.
struct Backward<'a> {
    kernels: &'static Kernels,
    /// Products of bf16 pairs, if this problem uses them.
    pairs: Option<&'static Pairs>,
    /// Number of bf16 parts that an element is split into for them.
    parts: usize,
    problem: &'a Problem,
    tensors: &'a BackwardTensors,
    tiles: Tiles,
    /// Number of keys that a thread's memory has room for: those of a task, at most those of the sequence, padded; of a
    /// batch the largest.
    owned: usize,
    visibility: Visibility,
    /// Score program, if there is one. Its mask includes the causal mask, and `visibility` then has none.
    program: Option<BackwardProgram>,
    delta: u64,
    reporter: &'a Reporter<'a>,
}

/// A backward pass to carry out: a plan, and where its results and its workspace are.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) plan: &'a Plan<plan::Backward>,
    pub(super) tensors: BackwardTensors,
    /// Address of delta, f32 `[batch, heads_q, seqlen_q]`, contiguous.
    pub(super) delta: u64,
    pub(super) tables: TableGradients,
}

/// The work of one task: runs of keys of a head.
struct Task {
    /// Number of the problem.
    problem: usize,
    head: usize,
    chunks: Range<usize>,
}

/// Computes dq, dk and dv of problems with pairs, in the order given. By a plan's tiles, a task owns `block_n` keys and streams
/// `block_m` queries at a time past them, a multiple of [`MAX_LANES`].
///
/// # Safety
/// q, k, v and out of each problem and all of its `tensors` are memory of the CPU, laid out as they say, with elements of
/// the problem's type, except lse and delta. dq, dk, dv and delta overlap neither each other nor themselves nor
/// anything else, nor those of another call. Nothing else writes the inputs or accesses the outputs meanwhile.
pub(super) unsafe fn backward(team: &Team<'_>, calls: &[Call<'_>], reporter: &Reporter<'_>) {
    let mut problems: Vec<Backward<'_>> = calls.iter().map(|call| Backward::new(team, call, reporter)).collect();
    let owned = problems.iter().map(|problem| problem.owned).max().unwrap_or(0);
    problems.iter_mut().for_each(|problem| problem.owned = owned);
    let shared: Vec<Vec<SharedHead>> = problems.iter().map(SharedHead::all).collect();
    reporter.begin(|| {
        let turns = |(problem, shared): (&Backward<'_>, &Vec<SharedHead>)| -> u64 {
            shared.iter().map(|head| head.turns(problem, problem.chunks())).sum()
        };
        problems.iter().zip(&shared).map(turns).sum()
    });
    // SAFETY: passed on to the caller.
    unsafe {
        make_deltas(team, &problems);
        make_weighed_deltas(team, &problems, &shared);
        for (problem, call) in problems.iter().zip(calls) {
            if let Some(program) = problem.program.as_ref().filter(|_| call.tables.sinks != 0) {
                problem.sink_gradients(team, program, call.tables.sinks);
            }
        }
    }
    let costs: Vec<u128> = calls.iter().map(|call| nanoseconds(&call.plan.cost())).collect();
    let total: u128 = costs.iter().sum();
    let tasks = problems.iter().zip(&costs).enumerate();
    let tasks = tasks.flat_map(|(problem, (of, cost))| {
        let (heads, chunks) = (of.problem.batch() * of.problem.heads_kv(), of.chunks());
        // A head that is little of all work is one task, so that no task waits for another. Sums over heads need their turns.
        let takes_turns = of.program.as_ref().is_some_and(|program| !program.sums.is_empty());
        let is_little = cost * 4 * team.threads as u128 <= total * heads as u128;
        let chunks_of_task = if is_little && !takes_turns { chunks } else { 1 };
        (0..heads).flat_map(move |head| {
            let runs = (0..chunks).step_by(chunks_of_task);
            runs.map(move |first| Task {
                problem,
                head,
                chunks: first..first + chunks_of_task,
            })
        })
    });
    let tasks: Vec<Task> = tasks.collect();
    let own = || None::<(Kind, Scratch)>;
    team.share(tasks.len(), own, |own, index| {
        let Task { problem, head, chunks } = &tasks[index];
        let backward = &problems[*problem];
        let scratch = Scratch::of(own, backward, *problem);
        for chunk in chunks.clone() {
            // SAFETY: passed on to the caller; no other task has these keys.
            unsafe { scratch.chunk(backward, &shared[*problem][*head], *head, chunk, backward.chunks()) };
        }
    });
    for program in problems.iter().filter_map(|problem| problem.program.as_ref()) {
        program.sums.finish();
    }
}

/// Parameters that determine the sizes of a thread's memory, beside those that a batch has in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    parts: Option<usize>,
    block_m: u32,
    head_dims: [usize; 2],
    /// Number of the problem whose program the machines are for.
    program: Option<usize>,
}

impl<'a> Backward<'a> {
    fn new(team: &Team<'_>, call: &'a Call<'_>, reporter: &'a Reporter<'a>) -> Self {
        let (problem, tiles) = (call.plan.problem(), call.plan.tiles());
        let parts = call.plan.cpu_path().expect("the plan is for the CPU").parts;
        let pairs = team.kernels.pairs.filter(|_| parts > 0);
        let chunks = problem.seqlen_k().div_ceil(tiles.block_n) as usize;
        let derivative = call.plan.derivative().map(AsRef::as_ref);
        let program = BackwardProgram::new(team.kernels, problem, derivative, &call.tables, chunks);
        let padding = if pairs.is_some() { 2 * SIDE } else { ROWS };
        Self {
            kernels: team.kernels,
            pairs,
            parts: parts.max(1),
            problem,
            tensors: &call.tensors,
            tiles,
            owned: (tiles.block_n as usize)
                .min(problem.seqlen_k() as usize)
                .next_multiple_of(padding),
            visibility: Visibility::new(problem, program.is_none() && problem.causal()),
            program,
            delta: call.delta,
            reporter,
        }
    }

    /// Number of runs of keys.
    fn chunks(&self) -> usize {
        self.problem.seqlen_k().div_ceil(self.tiles.block_n) as usize
    }

    fn kind(&self, problem: usize) -> Kind {
        Kind {
            parts: self.pairs.map(|_| self.parts),
            block_m: self.tiles.block_m,
            head_dims: self.head_dims(),
            program: self.program.as_ref().map(|_| problem),
        }
    }
}

impl Backward<'_> {
    /// head_dim of q and k, and of v and dout.
    fn head_dims(&self) -> [usize; 2] {
        [self.problem.head_dim(), self.problem.head_dim_v()].map(|head_dim| head_dim as usize)
    }

    /// [`head_dims`](Self::head_dims) in whole registers.
    fn widths(&self) -> [usize; 2] {
        self.head_dims().map(|head_dim| head_dim.next_multiple_of(MAX_LANES))
    }

    /// Returns the multiple to which keys, and queries of a tile, are padded.
    fn padding(&self) -> usize {
        if self.pairs.is_some() { 2 * SIDE } else { ROWS }
    }

    /// Words of rows of [`head_dims`](Self::head_dims) as pairs, in whole tiles.
    fn words(&self) -> [usize; 2] {
        self.head_dims().map(|head_dim| head_dim.next_multiple_of(2 * SIDE) / 2)
    }

    /// Returns true if numbers are split into several bf16, which not all may be.
    fn splits(&self) -> bool {
        self.pairs.is_some() && self.parts > 1
    }

    /// Determines which rows of a tile, of `head_dim` each and `stride` apart, are multiplied as pairs of bf16.
    fn fit(&self, tile: &Lines, [head_dim, stride]: [usize; 2], rows: usize) -> Vec<bool> {
        let may_be_split = |row: &[f32]| {
            let row = &row[..head_dim];
            // SAFETY: the processor has the instructions.
            unsafe { (self.kernels.may_be_split)(row.as_ptr(), row.len()) }
        };
        if self.splits() {
            let rows = tile.as_slice().chunks(stride).take(rows);
            rows.map(may_be_split).collect()
        } else {
            vec![self.pairs.is_some(); rows]
        }
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.problem.heads_q() / self.problem.heads_kv()
    }

    fn query_tiles(&self) -> usize {
        self.problem.seqlen_q().div_ceil(self.tiles.block_m) as usize
    }

    /// Returns the turn of a run of keys at the dQ of a tile of queries without a program; `None` if it has none.
    fn turn(&self, tile: usize, chunk: usize) -> Option<Turn> {
        let first_key = chunk * self.tiles.block_n as usize;
        let end = self.seen_by(tile);
        (end > first_key || chunk == 0).then_some(Turn {
            place: chunk as u32,
            is_last: end <= first_key + self.tiles.block_n as usize,
            sees_any: end > first_key,
        })
    }

    /// Keys that the last query of a tile sees, from the first.
    fn seen_by(&self, tile: usize) -> usize {
        let end = (tile as u32 + 1).saturating_mul(self.tiles.block_m);
        self.visibility.visible_end(end.min(self.problem.seqlen_q()) - 1) as usize
    }

    /// The rows of one head of a tensor.
    ///
    /// # Safety
    /// The contract of [`backward`]; the head exists, and its rows have `head_dim` elements.
    unsafe fn rows(&self, tensor: StridedTensor, batch: usize, head: usize, head_dim: usize) -> Head {
        // SAFETY: passed on to the caller.
        unsafe { Head::new(tensor, self.problem.dtype(), batch, head, head_dim) }
    }
}
