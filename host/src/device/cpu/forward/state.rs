//! State of a tile's queries after the keys seen so far: the online softmax, and its output.

use super::Forward;
use crate::device::cpu::kernels::Merge;
use crate::device::cpu::team::Lines;

/// Softmax state of a tile's queries, and the output before division by the sums.
pub(super) struct State {
    pub(super) max: Lines,
    pub(super) sum: Lines,
    /// Key with the largest score, on the decode path.
    pub(super) best: Vec<u32>,
    /// Panel by panel, `depth x lanes`.
    pub(super) output: Lines,
}

impl State {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let room = forward.room();
        Self {
            max: Lines::new(room),
            sum: Lines::new(room),
            best: vec![0; if forward.few { room } else { 0 }],
            output: Lines::new(room * forward.output_panels.depth),
        }
    }

    /// Resets to the state before any key.
    pub(super) fn clear(&mut self) {
        self.max.as_mut_slice().fill(f32::NEG_INFINITY);
        self.sum.as_mut_slice().fill(0.0);
        self.best.fill(0);
        self.output.as_mut_slice().fill(0.0);
    }

    pub(super) fn copy(&mut self, from: &Self) {
        self.best.copy_from_slice(&from.best);
        let pairs = [
            (&mut self.max, &from.max),
            (&mut self.sum, &from.sum),
            (&mut self.output, &from.output),
        ];
        pairs
            .into_iter()
            .for_each(|(to, from)| to.as_mut_slice().copy_from_slice(from.as_slice()));
    }

    /// Merges the state of another run of keys.
    pub(super) fn merge(&mut self, forward: &Forward<'_>, rows: usize, other: &Self) {
        let scale_log2 = forward.scale.log2;
        let (head_dim, depth) = (forward.head_dim_v(), forward.output_panels.depth);
        if forward.few {
            return (0..rows).for_each(|row| self.merge_one(forward, row, other));
        }
        for (first, lanes) in forward.panels(rows) {
            // SAFETY: the panel is one of both states, which are of one size.
            unsafe {
                (forward.kernels.merge)(&Merge {
                    lanes,
                    stride: forward.panels.lanes,
                    head_dim,
                    scale_log2,
                    max: self.max.as_mut_ptr().add(first),
                    sum: self.sum.as_mut_ptr().add(first),
                    output: self.output.as_mut_ptr().add(first * depth),
                    other_max: other.max.as_ptr().add(first),
                    other_sum: other.sum.as_ptr().add(first),
                    other_output: other.output.as_ptr().add(first * depth),
                });
            }
        }
    }
}
