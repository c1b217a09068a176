//! The five products in f32; and what is done in their place where some element is not finite.

use std::ops::Range;

use super::Backward;
use super::scratch::{QueryTile, Scratch};
use crate::device::cpu::kernels::Product;

impl Scratch {
    /// Computes S and dP of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// The contract of [`pass`](Self::pass); the keys are among those of the task.
    pub(super) unsafe fn score(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let (kernels, stride) = (backward.kernels, backward.tiles.block_m as usize);
        let products = [
            (&self.keys, &self.q_lanes, &mut self.probabilities),
            (&self.values, &self.dout_lanes, &mut self.ds),
        ];
        for ((keys_or_values, lanes, product), head_dim) in products.into_iter().zip(backward.head_dims()) {
            // SAFETY: passed on to the caller.
            unsafe {
                (kernels.product)(&Product {
                    rows: keys,
                    inner: head_dim,
                    columns: tile.lanes,
                    a: keys_or_values.as_ptr().add(first * head_dim),
                    a_stride: head_dim,
                    transposed: false,
                    b: lanes.as_ptr().add(tile.first_lane),
                    b_stride: stride,
                    c: product.as_mut_ptr().add(tile.first_lane),
                    c_stride: stride,
                    accumulate: false,
                });
            }
        }
    }

    /// Adds the contribution of a block of keys: dQ in lanes, dK and dV in rows.
    ///
    /// # Safety
    /// The contract of [`score`](Self::score).
    pub(super) unsafe fn accumulate(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let (kernels, stride) = (backward.kernels, backward.tiles.block_m as usize);
        let ([head_dim, head_dim_v], [width, width_v]) = (backward.head_dims(), backward.widths());
        // SAFETY: passed on to the caller.
        unsafe {
            (kernels.product)(&Product {
                rows: head_dim,
                inner: keys,
                columns: tile.lanes,
                a: self.keys.as_ptr().add(first * head_dim),
                a_stride: head_dim,
                transposed: true,
                b: self.ds.as_ptr().add(tile.first_lane),
                b_stride: stride,
                c: self.dq_lanes.as_mut_ptr().add(tile.first_lane),
                c_stride: stride,
                accumulate: true,
            });
        }
        let products = [
            (&self.probabilities, &self.dout, &mut self.dv, [head_dim_v, width_v]),
            (&self.ds, &self.q, &mut self.dk, [head_dim, width]),
        ];
        for (weights, queries, gradient, [head_dim, width]) in products {
            // SAFETY: as above.
            unsafe {
                (kernels.product)(&Product {
                    rows: keys,
                    inner: tile.lanes.min(tile.rows - tile.first_lane),
                    columns: head_dim.next_multiple_of(kernels.lanes),
                    a: weights.as_ptr().add(tile.first_lane),
                    a_stride: stride,
                    transposed: false,
                    b: queries.as_ptr().add(tile.first_lane * width),
                    b_stride: width,
                    c: gradient.as_mut_ptr().add(first * width),
                    c_stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// Adds the contribution of a block of keys if something is not finite and some query does not see all of them: 0 times
    /// infinity is NaN, so what is not seen must not even be multiplied by 0.
    pub(super) fn accumulate_seen(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let visible = self.visible.as_slice()[..tile.rows].to_vec();
        let sees = |lane: usize, key: usize| (key as f32) < visible[lane];
        self.accumulate_where(backward, 0..tile.rows, (first, keys), sees);
    }

    /// Adds the contribution of a block of keys and the queries of some lanes, where `sees(lane, key)`; each sum in the
    /// order of [`accumulate`](Self::accumulate).
    pub(super) fn accumulate_where(
        &mut self,
        backward: &Backward<'_>,
        lanes: Range<usize>,
        (first, keys): (usize, usize),
        sees: impl Fn(usize, usize) -> bool,
    ) {
        let (kernels, stride) = (backward.kernels, backward.tiles.block_m as usize);
        let ([head_dim, head_dim_v], [width, width_v]) = (backward.head_dims(), backward.widths());
        let (p, ds) = (self.probabilities.as_slice(), self.ds.as_slice());
        let (k, q, dout) = (self.keys.as_slice(), self.q.as_slice(), self.dout.as_slice());
        for d in 0..head_dim {
            for lane in lanes.clone() {
                let mut sum = 0.0;
                for key in (0..keys).filter(|&key| sees(lane, key)) {
                    sum = kernels.multiply_add(k[(first + key) * head_dim + d], ds[key * stride + lane], sum);
                }
                self.dq_lanes.as_mut_slice()[d * stride + lane] += sum;
            }
        }
        let products = [
            (ds, q, &mut self.dk, [head_dim, width]),
            (p, dout, &mut self.dv, [head_dim_v, width_v]),
        ];
        for (weights, queries, gradient, [head_dim, width]) in products {
            for (key, d) in (0..keys).flat_map(|key| (0..head_dim).map(move |d| (key, d))) {
                let mut sum = 0.0;
                for lane in lanes.clone().filter(|&lane| sees(lane, key)) {
                    sum = kernels.multiply_add(weights[key * stride + lane], queries[lane * width + d], sum);
                }
                gradient.as_mut_slice()[(first + key) * width + d] += sum;
            }
        }
    }
}
