//! The five products in f32; and what is done in their place where some element is not finite.

use super::Backward;
use super::scratch::{QueryTile, Scratch};
use crate::device::cpu::kernels::Product;

impl Scratch {
    /// S and dP of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// As for [`pass`](Self::pass); the keys are among those of the task.
    pub(super) unsafe fn score(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let (kernels, head_dim, stride) = (backward.kernels, backward.head_dim(), backward.tiles.block_m as usize);
        let products = [
            (&self.keys, &self.q_lanes, &mut self.probabilities),
            (&self.values, &self.dout_lanes, &mut self.ds),
        ];
        for (keys_or_values, lanes, product) in products {
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

    /// Adds what a block of keys gives: dQ in lanes, dK and dV in rows.
    ///
    /// # Safety
    /// As for [`score`](Self::score).
    pub(super) unsafe fn accumulate(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        let stride = backward.tiles.block_m as usize;
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
            (&self.probabilities, &self.dout, &mut self.dv),
            (&self.ds, &self.q, &mut self.dk),
        ];
        for (weights, queries, gradient) in products {
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

    /// The same where something is not finite and not every query sees every key: 0 times infinity is NaN, so what is not
    /// seen must not even be multiplied by 0.
    pub(super) fn accumulate_seen(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        for key in 0..keys {
            for lane in 0..tile.rows {
                if (key as f32) < self.visible.as_slice()[lane] {
                    self.accumulate_pair(backward, lane, (first, key));
                }
            }
        }
    }

    /// Adds what one query and one key of a block give.
    pub(super) fn accumulate_pair(&mut self, backward: &Backward<'_>, lane: usize, (first, key): (usize, usize)) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        let stride = backward.tiles.block_m as usize;
        let (p, ds) = (
            self.probabilities.as_slice()[key * stride + lane],
            self.ds.as_slice()[key * stride + lane],
        );
        let (q, dout) = (self.q.as_slice(), self.dout.as_slice());
        let (dq, dk, dv) = (
            self.dq_lanes.as_mut_slice(),
            self.dk.as_mut_slice(),
            self.dv.as_mut_slice(),
        );
        for d in 0..head_dim {
            let (of_key, of_query) = ((first + key) * width + d, lane * width + d);
            let k = self.keys.as_slice()[(first + key) * head_dim + d];
            dq[d * stride + lane] = kernels.multiply_add(k, ds, dq[d * stride + lane]);
            dk[of_key] = kernels.multiply_add(ds, q[of_query], dk[of_key]);
            dv[of_key] = kernels.multiply_add(p, dout[of_query], dv[of_key]);
        }
    }
}
