//! What products of pairs of bf16 read: the words, and how they are made.

use super::Forward;
use super::scratch::Scratch;
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::Panels;

/// What products of pairs of bf16 read: words of two neighbours along the inner axis.
pub(super) struct Words {
    /// Panel by panel, `words x lanes`.
    pub(super) query: Lines,
    /// `block_n x words`.
    pub(super) keys: Lines,
    /// `depth x block_n / 2`, and the transpose.
    pub(super) values: Lines,
    rows: Lines,
    /// `block_n / 2 x lanes`: exponentials.
    pub(super) scores: Lines,
}

impl Words {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let (block_n, depth, words) = (forward.tiles.block_n as usize, forward.panels.depth, forward.words());
        let lines = |count: usize| Lines::new(if forward.pairs.is_some() { count } else { 0 });
        Self {
            query: lines(forward.lanes() * words),
            keys: lines(block_n * words),
            values: lines(depth * block_n / 2),
            rows: lines(block_n / 2 * depth),
            scores: lines(block_n / 2 * forward.panels.lanes),
        }
    }
}

impl Scratch {
    /// The queries as pairs of bf16, neighbours within a head.
    pub(super) fn pair_queries(&mut self, forward: &Forward<'_>, rows: usize) {
        let (kernels, Panels { lanes, depth }) = (forward.kernels, forward.panels);
        for (first, used) in forward.panels(rows) {
            // SAFETY: the processor has the instructions; both are panels of their tiles.
            unsafe {
                let (from, to) = (
                    self.query.as_ptr().add(first * depth),
                    self.words.query.as_mut_ptr().cast::<u32>().add(first * forward.words()),
                );
                (kernels.pair_rows)(from, lanes, forward.head_dim() / 2, used, to, lanes);
            }
        }
    }

    /// The values as pairs of bf16, neighbours along the keys, a row for each element of a head.
    pub(super) fn pair_values(&mut self, forward: &Forward<'_>, keys: usize) {
        let (kernels, head_dim) = (forward.kernels, forward.head_dim());
        let width = head_dim.next_multiple_of(MAX_LANES);
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            let (from, pairs) = (self.values.as_ptr(), self.words.rows.as_mut_ptr());
            (kernels.pair_rows)(from, head_dim, keys / 2, width, pairs.cast(), width);
            let to = self.words.values.as_mut_ptr();
            (kernels.transpose)(pairs, width, keys / 2, to, forward.tiles.block_n as usize / 2, head_dim);
        }
    }
}
