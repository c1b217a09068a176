//! delta = rowsum(dO * O), which is computed before everything else.

use super::Backward;
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::team::{Lines, Team};
use crate::device::cpu::tensor::Panels;

/// Number of queries of a task that computes delta.
const DELTA_ROWS: usize = 256;

impl Backward<'_> {
    /// Computes delta = rowsum(dO * O). With a single key, O is V, and dP - delta must be exactly 0. delta is then
    /// summed in the order of dP = dO V^T, so that both have equal rounding errors.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward).
    pub(super) unsafe fn make_delta(&self, team: &Team<'_>) {
        let (kernels, head_dim) = (self.kernels, self.head_dim());
        let (heads_q, seqlen_q) = (self.problem.heads_q(), self.problem.seqlen_q() as usize);
        let (lanes, depth) = (kernels.lanes, head_dim);
        let tiles = seqlen_q.div_ceil(DELTA_ROWS);
        let tasks = self.problem.batch() * heads_q * tiles;
        let scratch = || {
            let panel = || Lines::new(lanes * depth);
            [
                panel(),
                panel(),
                Lines::new(MAX_LANES * self.width()),
                Lines::new(lanes),
            ]
        };
        team.share(tasks, scratch, |[x, y, rows, sums], task| {
            let (heads, first) = (task / tiles, task % tiles * DELTA_ROWS);
            let (batch, head) = (heads / heads_q, heads % heads_q);
            // SAFETY: passed on to the caller.
            let (out, dout) = unsafe {
                (
                    self.rows(self.problem.out(), batch, head),
                    self.rows(self.tensors.dout, batch, head),
                )
            };
            let end = seqlen_q.min(first + DELTA_ROWS);
            for row in (first..end).step_by(lanes) {
                let queries = row..end.min(row + lanes);
                let shape = Panels { lanes, depth };
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
        });
    }
}
