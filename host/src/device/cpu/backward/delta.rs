//! delta = rowsum(dO * O), which is computed before everything else.

use super::Backward;
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::team::{Lines, Team};
use crate::device::cpu::tensor::Panels;

/// Number of queries of a task that computes delta.
const DELTA_ROWS: usize = 256;

/// Computes delta = rowsum(dO * O) of all problems. With a single key, O is V, and dP - delta must be exactly 0. delta is then
/// summed in the order of dP = dO V^T, so that both have equal rounding errors.
///
/// # Safety
/// The contract of [`backward`](super::backward).
pub(super) unsafe fn make_deltas(team: &Team<'_>, problems: &[Backward<'_>]) {
    let tasks = problems.iter().enumerate();
    let tasks = tasks.flat_map(|(index, problem)| (0..problem.delta_tasks()).map(move |task| (index, task)));
    let tasks: Vec<_> = tasks.collect();
    let width = problems.iter().map(|problem| problem.widths()[1]).max().unwrap_or(0);
    let lanes = team.kernels.lanes;
    let scratch = || Scratch {
        out: Lines::new(lanes * width),
        dout: Lines::new(lanes * width),
        rows: Lines::new(MAX_LANES * width),
        sums: Lines::new(lanes),
    };
    team.share(tasks.len(), scratch, |scratch, index| {
        let (problem, task) = tasks[index];
        // SAFETY: passed on to the caller.
        unsafe { problems[problem].make_delta(scratch, task) };
    });
}

/// Panels of a thread.
struct Scratch {
    out: Lines,
    dout: Lines,
    /// Rows before they become panels.
    rows: Lines,
    sums: Lines,
}

impl Backward<'_> {
    /// Number of tasks for the tiles of queries of all heads.
    fn delta_tasks(&self) -> usize {
        let tiles = (self.problem.seqlen_q() as usize).div_ceil(DELTA_ROWS);
        self.problem.batch() * self.problem.heads_q() * tiles
    }

    /// Computes delta of the queries of a task.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward).
    unsafe fn make_delta(&self, scratch: &mut Scratch, task: usize) {
        let (kernels, [_, head_dim]) = (self.kernels, self.head_dims());
        let (heads_q, seqlen_q) = (self.problem.heads_q(), self.problem.seqlen_q() as usize);
        let shape = Panels {
            lanes: kernels.lanes,
            depth: head_dim,
        };
        let tiles = seqlen_q.div_ceil(DELTA_ROWS);
        let (heads, first) = (task / tiles, task % tiles * DELTA_ROWS);
        let (batch, head) = (heads / heads_q, heads % heads_q);
        // SAFETY: passed on to the caller.
        let (out, dout) = unsafe {
            (
                self.rows(self.problem.out(), batch, head, head_dim),
                self.rows(self.tensors.dout, batch, head, head_dim),
            )
        };
        let Scratch {
            out: x,
            dout: y,
            rows,
            sums,
        } = scratch;
        let end = seqlen_q.min(first + DELTA_ROWS);
        for row in (first..end).step_by(kernels.lanes) {
            let queries = row..end.min(row + kernels.lanes);
            out.load_panels(kernels, queries.clone(), 1.0, shape, x, rows);
            dout.load_panels(kernels, queries.clone(), 1.0, shape, y, rows);
            // SAFETY: both are panels of `head_dim` rows, and delta has an entry for each of the rows, which this
            // task alone writes.
            unsafe {
                let one_key = self.problem.seqlen_k() == 1;
                (kernels.dot)(x.as_ptr(), y.as_ptr(), head_dim, one_key, sums.as_mut_ptr());
                let delta = pointer_mut::<f32>(self.delta).add(heads * seqlen_q + row);
                std::ptr::copy_nonoverlapping(sums.as_ptr(), delta, queries.len());
            }
        }
    }
}
