//! The decode path for few queries: lanes are elements of a head.

use std::ops::Range;

use super::scratch::Scratch;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{Few, MAX_LANES, Query, Rows};
use flash_attention_kernels::abi::StridedTensor;

/// Bytes within which processors fetch lines ahead of those asked for: a page of memory.
const RUN_BYTES: usize = 4 << 10;

impl Forward<'_> {
    /// Returns the number of key heads per tile, and of query heads for each: as many as fit, share keys or have keys side by side, and
    /// leave tasks for every thread beside the tasks of other problems.
    pub(super) fn heads_together(&self, threads: usize, others: usize) -> [usize; 2] {
        let (problem, queries) = (self.problem, self.problem.seqlen_q() as usize);
        let shared = problem.heads_q() / problem.heads_kv();
        let segments = self.segment_count();
        let suits = |heads: &usize| {
            let divide = if *heads <= shared {
                shared.is_multiple_of(*heads)
            } else {
                let key_heads = heads / shared;
                heads.is_multiple_of(shared)
                    && problem.heads_kv().is_multiple_of(key_heads)
                    && (self.tiles.block_n as usize).is_multiple_of(key_heads)
            };
            let tasks = problem.batch() * problem.heads_q() / heads * segments;
            divide && heads * queries <= self.lanes() && tasks + others >= 2 * threads
        };
        let most = if self.few {
            shared * self.heads_side_by_side()
        } else {
            1
        };
        let heads = (1..=most).rev().find(suits).unwrap_or(1);
        [heads.div_ceil(shared), heads.min(shared)]
    }

    /// Returns the number of key heads whose rows lie side by side within [`RUN_BYTES`]; 1 where each head has its rows in a run.
    fn heads_side_by_side(&self) -> usize {
        let bytes = self.problem.dtype().bytes();
        let side_by_side = |tensor: StridedTensor| {
            let head_bytes = tensor.head_stride as usize * bytes;
            let is_within_row = tensor.head_stride < tensor.row_stride;
            if is_within_row && head_bytes > 0 {
                RUN_BYTES / head_bytes
            } else {
                1
            }
        };
        let of_both = side_by_side(self.problem.k()).min(side_by_side(self.problem.v()));
        of_both.clamp(1, self.problem.heads_kv())
    }
}

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
        let (queries, width) = (forward.problem.seqlen_q() as usize, forward.panels.depth);
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

    /// Lists the rows of a tile of keys and values that lie in several pages, once for all key heads together.
    fn list_rows(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, rows: Range<usize>) {
        let [of_keys, of_values] = &mut self.addresses;
        if forward.key_heads > 1 {
            tile.k.list_rows(rows.clone(), of_keys);
            tile.v.list_rows(rows, of_values);
        }
    }

    /// Returns the places of the keys and values of a tile of key head `index` of those together, after [`list_rows`](Self::list_rows).
    ///
    /// Where several key heads are together, memory has their rows side by side. Each head then asks for a part of the next tile's
    /// rows of all heads, so that memory is read in its order: taking them a head at a time, strides of 4 KiB apart, halves the rate,
    /// measured on Zen 4.
    fn locate_rows(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, index: usize, rows: Range<usize>) -> [Rows; 2] {
        let (block_n, end) = (forward.tiles.block_n as usize, forward.problem.seqlen_k() as usize);
        let heads = forward.key_heads;
        let [of_keys, of_values] = &mut self.addresses;
        if heads == 1 {
            let k = tile.k.locate(rows.clone(), end, of_keys);
            return [k, tile.v.locate(rows, end, of_values)];
        }
        let share = block_n / heads;
        let next = |part: usize| (rows.start + block_n + part * share).min(end);
        let next = next(index)..next(index + 1);
        let k = (tile.k).locate_among([index, heads], rows.clone(), next.clone(), of_keys);
        [k, tile.v.locate_among([index, heads], rows, next, of_values)]
    }

    /// Attends all queries to a tile of keys and values that begins at `first_key`; `seen_from` tells how many of them the
    /// queries at a position see.
    ///
    /// Queries that see as many keys share what is read: without a mask all do, and under a causal one those of heads at one
    /// position.
    pub(super) fn attend_few(
        &mut self,
        forward: &Forward<'_>,
        tile: &Tile<'_>,
        first_key: usize,
        seen_from: impl Fn(u32) -> usize,
        state: &mut State,
    ) {
        let (queries, heads) = (forward.problem.seqlen_q(), forward.sharing);
        let end = forward.problem.seqlen_k() as usize;
        let rows = first_key..(first_key + forward.tiles.block_n as usize).min(end);
        self.list_rows(forward, tile, rows.clone());
        for index in 0..forward.key_heads {
            let [k, v] = self.locate_rows(forward, tile, index, rows.clone());
            let mut first = 0;
            while first < queries {
                let keys = seen_from(first);
                let mut later = first + 1..queries;
                let next = later.find(|&position| seen_from(position) != keys).unwrap_or(queries);
                // Heads at one position, then the next position.
                let rows = (first..next).flat_map(|position| {
                    let heads = index * heads..(index + 1) * heads;
                    heads.map(move |head| head * queries as usize + position as usize)
                });
                self.queries.clear();
                // SAFETY: the rows are those of the tile, for each of which these have room.
                self.queries.extend(rows.map(|row| unsafe {
                    Query {
                        query: self.query.as_ptr().add(row * forward.panels.depth),
                        max: state.max.as_mut_ptr().add(row),
                        sum: state.sum.as_mut_ptr().add(row),
                        best: state.best.as_mut_ptr().add(row),
                        output: state.output.as_mut_ptr().add(row * forward.output_panels.depth),
                    }
                }));
                first = next;
                if keys == 0 {
                    continue;
                }
                // SAFETY: the processor has the instructions, the keys exist, `locate_rows` located them, rows of q and the output
                // are whole registers, and `Scratch::new` made the room for scores.
                unsafe {
                    (forward.kernels.few)(&Few {
                        keys,
                        dtype: forward.problem.dtype(),
                        k,
                        v,
                        head_dim: forward.head_dim(),
                        head_dim_v: forward.head_dim_v(),
                        queries: &self.queries,
                        scores: self.scores.as_mut_ptr(),
                        scale_log2: forward.scale.log2,
                        first_key,
                        into_l1: forward.into_l1,
                    });
                }
            }
        }
    }

    /// Returns the largest score of a query, summed in the order of the backward pass's products, which differs from
    /// that of lanes.
    pub(super) fn best_score(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, row: usize, key: u32) -> f32 {
        let (kernels, head_dim, sign) = (forward.kernels, forward.head_dim(), forward.problem.scale().sign);
        let queries = forward.problem.seqlen_q() as usize;
        let (q, k) = self
            .rows
            .as_mut_slice()
            .split_at_mut(head_dim.next_multiple_of(MAX_LANES));
        let rows = tile.q.later(row / queries * tile.head_steps[0]);
        rows.load(kernels, tile.first_row as usize + row % queries, q);
        let key_head = row / queries / forward.sharing;
        tile.k.later_head(key_head).load(kernels, key as usize, k);
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
        let queries = forward.problem.seqlen_q() as usize;
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
