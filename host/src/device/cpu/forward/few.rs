//! The decode path for few queries: queries are computed one by one, and lanes are elements of a head.

use super::scratch::Scratch;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{AHEAD, MAX_LANES, One, Rows};

impl State {
    /// Merges the result of another run of keys for one query: largest scores, sums and outputs.
    pub(super) fn merge_one(&mut self, forward: &Forward<'_>, row: usize, other: &Self) {
        let scale_log2 = forward.scale.log2;
        let exp2 = |x: f32| f64::from(x * scale_log2).exp2() as f32;
        let (left, right) = (self.max.as_slice()[row], other.max.as_slice()[row]);
        let max = if left > right { left } else { right };
        if right > left {
            self.best[row] = other.best[row];
        }
        let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (of_left, of_right) = (exp2(left - origin), exp2(right - origin));
        self.max.as_mut_slice()[row] = max;
        let depth = forward.output_panels.depth;
        let places = row * depth..(row + 1) * depth;
        let sums = self.sum.as_mut_slice()[row..=row]
            .iter_mut()
            .zip(&other.sum.as_slice()[row..=row]);
        let outputs = self.output.as_mut_slice()[places.clone()]
            .iter_mut()
            .zip(&other.output.as_slice()[places]);
        sums.chain(outputs)
            .for_each(|(to, from)| *to = *to * of_left + *from * of_right);
    }
}

impl Scratch {
    /// Loads queries as rows of whole registers, times the sign of the scale.
    pub(super) fn load_few(&mut self, forward: &Forward<'_>, tile: &Tile) {
        let sign = forward.problem.scale().sign;
        let (queries, width) = (tile.rows / forward.together, forward.panels.depth);
        let all = &mut self.query.as_mut_slice()[..tile.rows * width];
        for (head, of_head) in all.chunks_mut(queries * width).enumerate() {
            let rows = tile.q.later(head * tile.head_steps[0]);
            rows.load_tile(
                forward.kernels,
                tile.first_row as usize,
                [queries, queries],
                of_head,
                width,
            );
        }
        all.iter_mut().for_each(|x| *x *= sign);
    }

    /// Returns the places of the keys and values of a tile, and of those after them.
    pub(super) fn locate_rows(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, first_key: usize) -> [Rows; 2] {
        let count = forward.tiles.block_n as usize + AHEAD;
        let rows = first_key..(first_key + count).min(forward.problem.seqlen_k() as usize);
        let [of_keys, of_values] = &mut self.addresses;
        [
            tile.k.locate(rows.clone(), count, of_keys),
            tile.v.locate(rows, count, of_values),
        ]
    }

    /// Attends one query to `keys` keys and values, located by [`locate_rows`](Self::locate_rows).
    pub(super) fn attend_one(
        &mut self,
        forward: &Forward<'_>,
        row: usize,
        [k, v]: [Rows; 2],
        [first_key, keys]: [usize; 2],
        state: &mut State,
    ) {
        let scale_log2 = forward.scale.log2;
        // SAFETY: the processor has the instructions, the keys exist, `locate_rows` located them and those after them, and rows of
        // q and the output are whole registers.
        unsafe {
            (forward.kernels.one)(&One {
                keys,
                dtype: forward.problem.dtype(),
                k,
                v,
                head_dim: forward.head_dim(),
                head_dim_v: forward.head_dim_v(),
                query: self.query.as_ptr().add(row * forward.panels.depth),
                scores: self.scores.as_mut_ptr(),
                scale_log2,
                max: state.max.as_mut_ptr().add(row),
                sum: state.sum.as_mut_ptr().add(row),
                best: state.best.as_mut_ptr().add(row),
                first_key,
                output: state.output.as_mut_ptr().add(row * forward.output_panels.depth),
            });
        }
    }

    /// Returns the largest score of a query, summed in the order of the backward pass's products, which differs from
    /// that of lanes.
    pub(super) fn best_score(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, row: usize, key: u32) -> f32 {
        let (kernels, head_dim, sign) = (forward.kernels, forward.head_dim(), forward.problem.scale().sign);
        let queries = tile.rows / forward.together;
        let (q, k) = self
            .rows
            .as_mut_slice()
            .split_at_mut(head_dim.next_multiple_of(MAX_LANES));
        let rows = tile.q.later(row / queries * tile.head_steps[0]);
        rows.load(kernels, tile.first_row as usize + row % queries, q);
        tile.k.load(kernels, key as usize, k);
        let pairs = k.iter().zip(&*q).take(head_dim);
        pairs.fold(0.0, |sum, (k, q)| kernels.multiply_add(*k, sign * q, sum))
    }

    /// Writes out: rows of the output times `inverses`.
    pub(super) fn store_few(
        &mut self,
        forward: &Forward<'_>,
        tile: &Tile<'_>,
        state: &State,
        inverses: impl Iterator<Item = f32>,
    ) {
        let queries = tile.rows / forward.together;
        for (row, inverse) in inverses.enumerate() {
            let output = &state.output.as_slice()[row * forward.output_panels.depth..];
            for (to, x) in self.rows.as_mut_slice().iter_mut().zip(&output[..forward.head_dim_v()]) {
                *to = if inverse == 0.0 { 0.0 } else { x * inverse };
            }
            let out = tile.out.later(row / queries * tile.head_steps[1]);
            let place = tile.first_row as usize + row % queries;
            out.store(forward.kernels, place, self.rows.as_slice());
        }
    }
}
