//! The five products of pairs of bf16: the words they read, and how they are made.

use flash_attention_kernels::entries::Dtype;

use super::scratch::{QueryTile, Scratch};
use super::{BLOCK, Backward};
use crate::device::cpu::kernels::{PairProduct, Pairs, SIDE};
use crate::device::cpu::team::Lines;

/// What products of pairs of bf16 read: words of two neighbours along the inner axis.
pub(super) struct Words {
    /// Of the keys that a task owns, `block_n x words`.
    pub(super) keys: Lines,
    pub(super) values: Lines,
    /// K transposed: `width x block_n / 2`.
    keys_lanes: Lines,
    /// Of a tile of queries, neighbours within a head: `words x block_m`.
    q_lanes: Lines,
    dout_lanes: Lines,
    /// The same, neighbours among the queries: `block_m / 2 x width`.
    q: Lines,
    dout: Lines,
    /// P and dS, neighbours among the queries: `BLOCK x block_m / 2`.
    probabilities: Lines,
    ds: Lines,
    /// dS, neighbours among the keys: `BLOCK / 2 x block_m`.
    ds_lanes: Lines,
    /// Pairs of keys, before they are transposed: `block_n / 2 x width`.
    rows: Lines,
}

impl Words {
    pub(super) fn new(backward: &Backward<'_>) -> Self {
        let (width, words) = (backward.width(), backward.words());
        let (block_m, block_n) = (backward.tiles.block_m as usize, backward.owned());
        let lines = |count: usize| Lines::new(if backward.pairs.is_some() { count } else { 0 });
        Self {
            keys: lines(block_n * words),
            values: lines(block_n * words),
            keys_lanes: lines(width * block_n / 2),
            q_lanes: lines(words * block_m),
            dout_lanes: lines(words * block_m),
            q: lines(block_m / 2 * width),
            dout: lines(block_m / 2 * width),
            probabilities: lines(BLOCK * block_m / 2),
            ds: lines(BLOCK * block_m / 2),
            ds_lanes: lines(BLOCK / 2 * block_m),
            rows: lines(block_n / 2 * width),
        }
    }
}

impl Scratch {
    /// The keys transposed, as pairs of bf16 that are neighbours along the keys.
    pub(super) fn pair_keys(&mut self, backward: &Backward<'_>, keys: usize) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            let rows = self.words.rows.as_mut_ptr();
            (kernels.pair_rows)(self.keys.as_ptr(), head_dim, keys / 2, width, rows.cast(), width);
            let to = self.words.keys_lanes.as_mut_ptr();
            (kernels.transpose)(rows, width, keys / 2, to, backward.owned() / 2, head_dim);
        }
    }

    /// A tile of queries as pairs of bf16, neighbours within a head and neighbours among the queries.
    pub(super) fn pair_queries(&mut self, backward: &Backward<'_>, padded: usize) {
        let (kernels, width, block_m) = (backward.kernels, backward.width(), backward.tiles.block_m as usize);
        let words = &mut self.words;
        for (rows, lanes, pairs, pairs_lanes) in [
            (&self.q, &self.q_lanes, &mut words.q, &mut words.q_lanes),
            (&self.dout, &self.dout_lanes, &mut words.dout, &mut words.dout_lanes),
        ] {
            // SAFETY: the processor has the instructions; words are half as many rows as what they are made of.
            unsafe {
                let (to, to_lanes) = (pairs.as_mut_ptr().cast(), pairs_lanes.as_mut_ptr().cast());
                (kernels.pair_rows)(rows.as_ptr(), width, padded / 2, width, to, width);
                (kernels.pair_rows)(
                    lanes.as_ptr(),
                    block_m,
                    backward.head_dim() / 2,
                    padded,
                    to_lanes,
                    block_m,
                );
            }
        }
    }

    /// S and dP of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// As for [`pass`](Self::pass); the keys are among those of the task.
    pub(super) unsafe fn score_pairs(
        &mut self,
        backward: &Backward<'_>,
        pairs: &Pairs,
        tile: QueryTile,
        first: usize,
        keys: usize,
    ) {
        let stride = backward.tiles.block_m as usize;
        let words = (backward.words(), &self.words);
        for (keys_or_values, lanes, product) in [
            (&words.1.keys, &words.1.q_lanes, &mut self.probabilities),
            (&words.1.values, &words.1.dout_lanes, &mut self.ds),
        ] {
            // SAFETY: passed on to the caller.
            unsafe {
                multiply_pairs(
                    pairs,
                    PairProduct {
                        rows: keys,
                        inner: words.0,
                        columns: tile.lanes,
                        a: keys_or_values.as_ptr().cast::<u32>().add(first * words.0),
                        a_stride: words.0,
                        b: lanes.as_ptr().cast(),
                        b_stride: stride,
                        c: product.as_mut_ptr(),
                        c_stride: stride,
                        accumulate: false,
                    },
                );
            }
        }
    }

    /// Adds what a block of keys gives: dQ in lanes, dK and dV in rows.
    ///
    /// # Safety
    /// As for [`score_pairs`](Self::score_pairs).
    pub(super) unsafe fn accumulate_pairs(
        &mut self,
        backward: &Backward<'_>,
        pairs: &Pairs,
        tile: QueryTile,
        first: usize,
        keys: usize,
    ) {
        let (kernels, width, stride) = (backward.kernels, backward.width(), backward.tiles.block_m as usize);
        let words = &mut self.words;
        // SAFETY: passed on to the caller; words are half as many as what they are made of.
        unsafe {
            let (p, ds) = (self.probabilities.as_ptr(), self.ds.as_ptr());
            (kernels.narrow)(Dtype::Bf16, p, keys * stride, words.probabilities.as_mut_ptr().cast());
            (kernels.narrow)(Dtype::Bf16, ds, keys * stride, words.ds.as_mut_ptr().cast());
            let to = words.ds_lanes.as_mut_ptr().cast();
            (kernels.pair_rows)(ds, stride, keys / 2, tile.lanes, to, stride);
            multiply_pairs(
                pairs,
                PairProduct {
                    rows: width,
                    inner: keys / 2,
                    columns: tile.lanes,
                    a: words.keys_lanes.as_ptr().cast::<u32>().add(first / 2),
                    a_stride: backward.owned() / 2,
                    b: words.ds_lanes.as_ptr().cast(),
                    b_stride: stride,
                    c: self.dq_lanes.as_mut_ptr(),
                    c_stride: stride,
                    accumulate: true,
                },
            );
        }
        let products = [
            (&words.probabilities, &words.dout, &mut self.dv),
            (&words.ds, &words.q, &mut self.dk),
        ];
        for (weights, queries, gradient) in products {
            // SAFETY: as above.
            unsafe {
                multiply_pairs(
                    pairs,
                    PairProduct {
                        rows: keys,
                        inner: tile.lanes / 2,
                        columns: width,
                        a: weights.as_ptr().cast(),
                        a_stride: stride / 2,
                        b: queries.as_ptr().cast(),
                        b_stride: width,
                        c: gradient.as_mut_ptr().add(first * width),
                        c_stride: width,
                        accumulate: true,
                    },
                );
            }
        }
    }
}

/// A product of any number of columns, in the widths that there are.
///
/// # Safety
/// As for `pairs.product`.
unsafe fn multiply_pairs(pairs: &Pairs, product: PairProduct) {
    for column in (0..product.columns).step_by(2 * SIDE) {
        // SAFETY: passed on to the caller; the columns are within b and c.
        unsafe {
            (pairs.product)(&PairProduct {
                columns: (product.columns - column).min(2 * SIDE),
                b: product.b.add(column),
                c: product.c.add(column),
                ..product
            });
        }
    }
}
