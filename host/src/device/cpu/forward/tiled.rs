//! The path of tiles: a tile of keys passes panels of queries, which are lanes. Products are of f32 or of pairs of bf16.

use super::scratch::Scratch;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{PairProduct, Product, ROWS, SIDE, Softmax};
use crate::device::cpu::tensor::{Head, Panels};
use crate::plan::kernel_scale;

impl Scratch {
    /// Takes in the keys and values of tile `n`.
    pub(super) fn attend_block(&mut self, forward: &Forward<'_>, tile: &Tile, n: u32, state: &mut State) {
        let (kernels, head_dim, block_n) = (forward.kernels, forward.head_dim(), forward.tiles.block_n);
        let first_key = n * block_n;
        let seen = |row: usize| {
            let end = forward.visibility.visible_end(forward.position(tile, row));
            end.saturating_sub(first_key).min(block_n) as usize
        };
        if forward.few {
            return (0..tile.rows)
                .for_each(|row| self.attend_one(forward, tile, row, first_key as usize, seen(row), state));
        }
        let keys = seen(tile.rows - 1); // the last query of the tile sees the most
        let padded = keys.next_multiple_of(if forward.pairs.is_some() { 2 * SIDE } else { ROWS });
        let first = first_key as usize;
        let masked = n >= tile.whole_blocks;
        let in_place = |rows: Head| (!masked && keys == padded).then(|| rows.in_place(first)).flatten();
        let values = in_place(tile.v).unwrap_or_else(|| {
            let values = self.values.as_mut_slice();
            tile.v.load_tile(kernels, first, [keys, padded], values, head_dim);
            values.as_ptr()
        });
        let mut rows_of_keys = self.keys.as_ptr();
        if forward.pairs.is_some() {
            let stride = forward.words();
            tile.k.copy_halves(first, [keys, padded], &mut self.words.keys, stride);
            self.pair_values(forward, padded);
        } else if let Some(rows) = in_place(tile.k) {
            rows_of_keys = rows;
        } else {
            let tile_of_keys = self.keys.as_mut_slice();
            tile.k.load_tile(kernels, first, [keys, padded], tile_of_keys, head_dim);
        }
        if masked {
            for (row, visible) in self.visible.as_mut_slice()[..tile.rows].iter_mut().enumerate() {
                *visible = seen(row) as f32;
            }
        }
        let loaded = &self.values.as_slice()[..keys * head_dim];
        let finite = !masked || loaded.iter().fold(true, |all, x| all & x.is_finite());
        let panels = tile.rows.div_ceil(forward.panels.lanes);
        for (index, (first, lanes)) in forward.panels(tile.rows).enumerate() {
            if n + 1 < tile.blocks {
                let rows = block_n as usize * index / panels..block_n as usize * (index + 1) / panels;
                let next = (first_key + block_n) as usize;
                let end = forward.problem.seqlen_k() as usize;
                tile.k.prefetch(next + rows.start..(next + rows.end).min(end));
                tile.v.prefetch(next + rows.start..(next + rows.end).min(end));
            }
            let visible = masked.then(|| self.visible.as_ptr().wrapping_add(first));
            // SAFETY: the panel is one of the tile's, tiles are as large as the plan says, and keys and values are either
            // rows in memory, all of which exist, or the tiles they were loaded to.
            unsafe {
                self.scores_of_panel(forward, first, lanes, (padded, rows_of_keys), visible, state);
                if finite {
                    self.add_values(forward, first, lanes, (padded, values), state);
                } else {
                    self.add_seen_values(forward, first, lanes.min(tile.rows - first), state);
                }
            }
        }
    }

    /// Scores of the panel that starts at lane `first`, and their exponentials.
    ///
    /// # Safety
    /// The processor has the kernels' instructions, the panel is one of the tile's, and there are as many rows of keys.
    unsafe fn scores_of_panel(
        &mut self,
        forward: &Forward<'_>,
        first: usize,
        lanes: usize,
        (keys, rows_of_keys): (usize, *const f32),
        visible: Option<*const f32>,
        state: &mut State,
    ) {
        let (kernels, head_dim) = (forward.kernels, forward.head_dim());
        let Panels { lanes: stride, depth } = forward.panels;
        let (_, scale_log2, _) = kernel_scale(forward.problem.softmax_scale());
        // SAFETY: passed on to the caller.
        unsafe {
            if let Some(pairs) = forward.pairs {
                (pairs.product)(&PairProduct {
                    rows: keys,
                    inner: forward.words(),
                    columns: lanes,
                    a: self.words.keys.as_ptr().cast(),
                    a_stride: forward.words(),
                    b: self.words.query.as_ptr().cast::<u32>().add(first * forward.words()),
                    b_stride: stride,
                    c: self.scores.as_mut_ptr(),
                    c_stride: stride,
                    accumulate: false,
                });
            } else {
                (kernels.product)(&Product {
                    rows: keys,
                    inner: head_dim,
                    columns: lanes,
                    a: rows_of_keys,
                    a_stride: head_dim,
                    transposed: false,
                    b: self.query.as_ptr().add(first * depth),
                    b_stride: stride,
                    c: self.scores.as_mut_ptr(),
                    c_stride: stride,
                    accumulate: false,
                });
            }
            (kernels.softmax)(&Softmax {
                keys,
                lanes,
                scores: self.scores.as_mut_ptr(),
                stride,
                visible: visible.unwrap_or(std::ptr::null()),
                scale_log2,
                max: state.max.as_mut_ptr().add(first),
                sum: state.sum.as_mut_ptr().add(first),
                output: state.output.as_mut_ptr().add(first * depth),
                head_dim,
                pairs: match forward.pairs {
                    Some(_) => self.words.scores.as_mut_ptr().cast(),
                    None => std::ptr::null_mut(),
                },
            });
        }
    }

    /// Adds exponentials times values to a panel of the output.
    ///
    /// # Safety
    /// As for [`scores_of_panel`](Self::scores_of_panel).
    unsafe fn add_values(
        &mut self,
        forward: &Forward<'_>,
        first: usize,
        lanes: usize,
        (keys, values): (usize, *const f32),
        state: &mut State,
    ) {
        let head_dim = forward.head_dim();
        let Panels { lanes: stride, depth } = forward.panels;
        // SAFETY: passed on to the caller.
        unsafe {
            let c = state.output.as_mut_ptr().add(first * depth);
            if let Some(pairs) = forward.pairs {
                (pairs.product)(&PairProduct {
                    rows: depth,
                    inner: keys / 2,
                    columns: lanes,
                    a: self.words.values.as_ptr().cast(),
                    a_stride: forward.tiles.block_n as usize / 2,
                    b: self.words.scores.as_ptr().cast(),
                    b_stride: stride,
                    c,
                    c_stride: stride,
                    accumulate: true,
                });
            } else {
                (forward.kernels.product)(&Product {
                    rows: head_dim,
                    inner: keys,
                    columns: lanes,
                    a: values,
                    a_stride: head_dim,
                    transposed: true,
                    b: self.scores.as_ptr(),
                    b_stride: stride,
                    c,
                    c_stride: stride,
                    accumulate: true,
                });
            }
        }
    }

    /// The same where a value that some query does not see is not finite: 0 times infinity is NaN, so it must not even
    /// be multiplied by 0.
    fn add_seen_values(&self, forward: &Forward<'_>, first: usize, rows: usize, state: &mut State) {
        let (head_dim, Panels { lanes: stride, depth }) = (forward.head_dim(), forward.panels);
        let (scores, values) = (self.scores.as_slice(), self.values.as_slice());
        let output = &mut state.output.as_mut_slice()[first * depth..];
        for lane in 0..rows {
            let seen = self.visible.as_slice()[first + lane] as usize;
            for d in 0..head_dim {
                let sum = &mut output[d * stride + lane];
                for key in 0..seen {
                    *sum = forward
                        .kernels
                        .multiply_add(scores[key * stride + lane], values[key * head_dim + d], *sum);
                }
            }
        }
    }
}
