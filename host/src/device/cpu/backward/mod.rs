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
//! them, tile by tile, the last first. Queries are lanes (see `kernels/`), so S, dP and dS are made once, and serve
//! all five products as they lie. What a task has for dQ is added to memory after the task of the keys before it has
//! added its own: each element of a gradient is one sum in one order, the same on any number of threads. Tasks are
//! taken in that order, so the one that is waited for is always at work, and a few rows ahead.
//!
//! Here are the problem and its tasks. `delta.rs` comes first; then `chunk.rs` is the walk of a task, with
//! `scratch.rs` what it works in, `single.rs` and `pairs.rs` its products in f32 and of pairs of bf16, and `dq.rs`
//! the sums it shares.

mod chunk;
mod delta;
mod dq;
mod pairs;
mod program;
mod scratch;
mod single;
mod tables;

use super::kernels::{Kernels, MAX_LANES, Pairs, ROWS, SIDE};
use super::pairs_of;
use super::team::{Lines, Team};
use super::tensor::{Head, Visibility};
use crate::plan::{Plan, TableGradients, Tiles};
use crate::problem::{BackwardTensors, Problem};
use crate::progress::Reporter;
use dq::{SharedHead, Turn};
use program::BackwardProgram;
use scratch::Scratch;

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
    visibility: Visibility,
    /// Score program, if there is one. Its mask includes the causal mask, and `visibility` then has none.
    program: Option<BackwardProgram>,
    delta: u64,
    reporter: &'a Reporter<'a>,
}

/// Computes dq, dk and dv with a workspace at `delta`, f32 `[batch, heads_q, seqlen_q]`, contiguous. By the plan's
/// tiles, a task owns `block_n` keys and streams `block_m` queries at a time past them, a multiple of [`MAX_LANES`].
///
/// # Safety
/// q, k, v and out of the problem and all of `tensors` are memory of the CPU, laid out as they say, with elements of
/// the problem's type, but for lse and delta. dq, dk, dv and delta overlap neither each other nor themselves nor
/// anything else. Nobody writes the inputs or touches the outputs meanwhile.
pub(super) unsafe fn backward(
    team: &Team<'_>,
    plan: &Plan,
    tensors: &BackwardTensors,
    delta: u64,
    tables: &TableGradients,
    reporter: &Reporter<'_>,
) {
    let (problem, tiles) = (plan.problem(), plan.tiles());
    let (pairs, parts) = pairs_of(team.kernels, problem).unzip();
    let chunks = problem.seqlen_k().div_ceil(tiles.block_n) as usize;
    let derivative = plan.derivative().map(AsRef::as_ref);
    let program = BackwardProgram::new(team.kernels, problem, derivative, tables, chunks);
    let backward = Backward {
        kernels: team.kernels,
        pairs,
        parts: parts.unwrap_or(1),
        problem,
        tensors,
        tiles,
        visibility: Visibility::new(problem, program.is_none() && problem.causal()),
        program,
        delta,
        reporter,
    };
    let heads = problem.batch() * problem.heads_kv();
    let shared = SharedHead::all(&backward);
    reporter.begin(|| shared.iter().map(|head| head.turns(&backward, chunks)).sum());
    // SAFETY: passed on to the caller.
    unsafe {
        backward.make_delta(team);
        if let Some(program) = backward.program.as_ref().filter(|_| tables.sinks != 0) {
            backward.sink_gradients(team, program, tables.sinks);
        }
    }
    // Where there are heads enough, a task takes all the keys of one, and nobody waits for anybody; but for sums over
    // heads.
    let takes_turns = backward
        .program
        .as_ref()
        .is_some_and(|program| !program.sums.is_empty());
    let chunks_of_task = if heads >= 4 * team.threads && !takes_turns {
        chunks
    } else {
        1
    };
    let tasks_of_head = chunks / chunks_of_task;
    let scratch = || Scratch::new(&backward);
    team.share(heads * tasks_of_head, scratch, |scratch, task| {
        let head = task / tasks_of_head;
        let first = task % tasks_of_head * chunks_of_task;
        for chunk in first..first + chunks_of_task {
            // SAFETY: passed on to the caller; no other task has these keys.
            unsafe { scratch.chunk(&backward, &shared[head], head, chunk, chunks) };
        }
    });
    if let Some(program) = &backward.program {
        program.sums.finish();
    }
}

impl Backward<'_> {
    fn head_dim(&self) -> usize {
        self.problem.head_dim() as usize
    }

    /// head_dim in whole registers.
    fn width(&self) -> usize {
        self.head_dim().next_multiple_of(MAX_LANES)
    }

    /// Returns the multiple to which keys, and queries of a tile, are padded.
    fn padding(&self) -> usize {
        if self.pairs.is_some() { 2 * SIDE } else { ROWS }
    }

    /// Words of a row of a head as pairs, in whole tiles.
    fn words(&self) -> usize {
        self.head_dim().next_multiple_of(2 * SIDE) / 2
    }

    /// Returns true if numbers are split into several bf16, which not all may be.
    fn splits(&self) -> bool {
        self.pairs.is_some() && self.parts > 1
    }

    /// Determines which rows of a tile, of a head each and `stride` apart, are multiplied as pairs of bf16.
    fn fit(&self, tile: &Lines, stride: usize, rows: usize) -> Vec<bool> {
        let may_be_split = |row: &[f32]| {
            let row = &row[..self.head_dim()];
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

    /// Returns the number of keys of a task, at most those of the sequence, padded.
    fn owned(&self) -> usize {
        (self.tiles.block_n as usize)
            .min(self.problem.seqlen_k() as usize)
            .next_multiple_of(self.padding())
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
    /// The contract of [`backward`]; the head exists.
    unsafe fn rows(&self, tensor: flash_attention_kernels::abi::StridedTensor, batch: usize, head: usize) -> Head {
        // SAFETY: passed on to the caller.
        unsafe { Head::new(tensor, self.problem.dtype(), batch, head, self.head_dim()) }
    }
}
