//! The path of tiles: each tile of keys is multiplied with panels of queries, which are lanes. Products are in f32 or
//! of bf16 pairs, or of both if only some numbers may be split into bf16 (see `kernels/parts.rs`).

use std::ops::Range;

use super::pairs::Fit;
use super::scratch::Scratch;
use super::state::State;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{Hide, MAX_LANES, PairProduct, Product, Softmax, Terms};
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::{KeyRows, Panels};

/// Queries that are processed together with a tile of keys: lanes of one panel.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    /// First lane of the panel in the tile.
    pub(super) panel: usize,
    /// First lane in the panel.
    pub(super) first: usize,
    /// Number of lanes: a multiple of the lanes of a register, and of [`SIDE`] for pair products.
    pub(super) count: usize,
}

impl Lanes {
    /// Returns the first lane in the tile.
    pub(super) fn in_tile(self) -> usize {
        self.panel + self.first
    }
}

/// A loaded tile of keys and values, or the first keys of it.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Rows of f32: keys only if they may be needed, values only if they are not multiplied as pairs.
    pub(super) keys: *const f32,
    pub(super) values: *const f32,
    /// Number of keys, padded.
    pub(super) count: usize,
    /// True if all values that matter are finite.
    pub(super) finite: bool,
    /// Keys, and values, that are multiplied as bf16 pairs.
    pub(super) pairs_of_keys: Fit,
    pub(super) pairs_of_values: Fit,
}

impl Scratch {
    /// Attends the queries to the keys and values of tile `n`.
    pub(super) fn attend_block(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, n: u32, state: &mut State) {
        let block_n = forward.tiles.block_n;
        let first_key = n * block_n;
        let seen_from = |position: u32| {
            let end = forward.visibility.visible_end(position);
            end.saturating_sub(first_key).min(block_n) as usize
        };
        if forward.few {
            return self.attend_few(forward, tile, first_key as usize, seen_from, state);
        }
        let seen = |row: usize| seen_from(forward.position(tile, row));
        let masked = n >= tile.whole_blocks;
        // The last query of the tile sees the most.
        let block = self.load_block(forward, tile, first_key as usize, seen(tile.rows - 1), masked);
        if masked {
            for (row, visible) in self.visible.as_mut_slice()[..tile.rows].iter_mut().enumerate() {
                *visible = seen(row) as f32;
            }
        }
        let panels = tile.rows.div_ceil(forward.panels.lanes);
        for (index, (panel, count)) in forward.panels(tile.rows).enumerate() {
            let lanes = Lanes { panel, first: 0, count };
            if n + 1 < tile.blocks {
                forward.prefetch(tile, n + 1, index, panels);
            }
            // Keys that no query of the panel sees are left out.
            let keys = seen((panel + count).min(tile.rows) - 1);
            if keys == 0 {
                continue;
            }
            let block = Block {
                count: forward.padded(keys),
                ..block
            };
            // SAFETY: the panel is one of the tile's, tiles are as large as the plan says, and keys and values are
            // either rows in memory, all of which exist, or the tiles they were loaded to.
            unsafe {
                self.scores_of(forward, lanes, &block);
                if masked {
                    // The first query of the panel sees the least.
                    self.hide_scores(forward, lanes, seen(panel)..block.count);
                }
                self.exponentials_of(forward, lanes, &block, state);
                self.add_values(forward, lanes, &block, state);
                if !block.finite {
                    let seen = self.visible.as_slice()[panel..].to_vec();
                    let sees = |lane: usize, key: usize| (key as f32) < seen[lane];
                    let rows = 0..count.min(tile.rows - panel);
                    self.add_values_where(forward, panel, rows, block.count, sees, state);
                }
            }
        }
    }

    /// Loads the tile of keys and values that starts at `first`, of which queries see `seen`.
    pub(super) fn load_block(
        &mut self,
        forward: &Forward<'_>,
        tile: &Tile<'_>,
        first: usize,
        seen: usize,
        masked: bool,
    ) -> Block {
        let (kernels, head_dim_v) = (forward.kernels, forward.head_dim_v());
        let count = forward.padded(seen);
        let load = |rows: KeyRows<'_>, to: &mut Lines| {
            // Pairs are made of whole registers.
            let is_whole = forward.pairs.is_none() || rows.head_dim().is_multiple_of(MAX_LANES);
            match rows.in_place(first, count).filter(|_| seen == count && is_whole) {
                Some(rows) => rows,
                None => {
                    rows.load_tile(kernels, first, [seen, count], to.as_mut_slice(), rows.head_dim());
                    to.as_ptr()
                }
            }
        };
        let mut values = load(tile.v, &mut self.values);
        // SAFETY: the rows exist, in memory or loaded, and no thread writes them.
        let rows = unsafe { std::slice::from_raw_parts(values, seen * head_dim_v) };
        let finite = !masked || rows.iter().fold(true, |all, x| all & x.is_finite());
        if !finite && values != self.values.as_ptr() {
            let room = self.values.as_mut_slice(); // where `add_values_where` reads them
            tile.v.load_tile(kernels, first, [seen, count], room, head_dim_v);
            values = room.as_ptr();
        }
        let pairs_of_values = match forward.parts {
            0 => Fit::None,
            1 if finite => Fit::All,
            1 => Fit::None,
            // SAFETY: the rows exist.
            _ => unsafe { Fit::of_rows(kernels, (values, seen), head_dim_v, &mut self.words.values_fit) },
        };
        match pairs_of_values {
            Fit::All => self.pair_values(forward, count, values),
            Fit::Some => self.pair_some_values(forward, tile, first, [seen, count]),
            Fit::None => (),
        }
        let mut block = Block {
            keys: self.keys.as_ptr(),
            values: if pairs_of_values == Fit::Some {
                self.values.as_ptr()
            } else {
                values
            },
            count,
            finite,
            pairs_of_keys: Fit::All,
            pairs_of_values,
        };
        if forward.parts == 1 {
            let stride = forward.words();
            let words = self.words.keys.as_mut_slice();
            tile.k.copy_halves(first, [seen, count], words, stride);
            return block;
        }
        block.keys = load(tile.k, &mut self.keys);
        block.pairs_of_keys = match forward.parts {
            0 => Fit::None,
            // SAFETY: the rows exist.
            _ => unsafe {
                Fit::of_rows(
                    kernels,
                    (block.keys, seen),
                    forward.head_dim(),
                    &mut self.words.keys_fit,
                )
            },
        };
        if block.pairs_of_keys != Fit::None {
            self.split_keys(forward, count, block.keys);
        }
        block
    }

    /// Computes the scores of some lanes.
    ///
    /// # Safety
    /// The processor has the kernels' instructions, the lanes are among the tile's, and the keys are loaded.
    pub(super) unsafe fn scores_of(&mut self, forward: &Forward<'_>, lanes: Lanes, block: &Block) {
        let Panels { lanes: stride, depth } = forward.panels;
        let queries = if forward.parts > 1 {
            Fit::of(&self.words.queries_fit[lanes.in_tile()..lanes.in_tile() + lanes.count])
        } else {
            Fit::All
        };
        let fit = queries.and(block.pairs_of_keys);
        // SAFETY: passed on to the caller.
        unsafe {
            if let Some(pairs) = forward.pairs.filter(|_| fit != Fit::None) {
                (pairs.product)(&PairProduct {
                    rows: block.count,
                    inner: forward.words(),
                    columns: lanes.count,
                    a: self.words.keys.as_ptr().cast(),
                    a_stride: forward.words(),
                    a_part: forward.keys_part(),
                    b: {
                        let words = self.words.query.as_ptr().cast::<u32>();
                        words.add(lanes.panel * forward.words() + lanes.first)
                    },
                    b_stride: stride,
                    b_part: forward.query_part(),
                    terms: Terms::of_inputs(forward.parts),
                    c: self.scores.as_mut_ptr().add(lanes.first),
                    c_stride: stride,
                    accumulate: false,
                });
            }
            if fit != Fit::All {
                let scores = if fit == Fit::None {
                    &mut self.scores
                } else {
                    &mut self.words.f32_scores
                };
                (forward.kernels.product)(&Product {
                    rows: block.count,
                    inner: forward.head_dim(),
                    columns: lanes.count,
                    a: block.keys,
                    a_stride: forward.head_dim(),
                    transposed: false,
                    b: self.query.as_ptr().add(lanes.panel * depth + lanes.first),
                    b_stride: stride,
                    c: scores.as_mut_ptr().add(lanes.first),
                    c_stride: stride,
                    accumulate: false,
                });
            }
        }
        if fit == Fit::Some {
            self.choose_scores(forward, lanes, block.count);
        }
    }

    /// Hides the scores of keys of the tile that not all of some lanes see, where one does not.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    unsafe fn hide_scores(&mut self, forward: &Forward<'_>, lanes: Lanes, keys: Range<usize>) {
        // SAFETY: passed on to the caller.
        unsafe {
            (forward.kernels.hide)(&Hide {
                keys,
                lanes: lanes.count,
                scores: self.scores.as_mut_ptr().add(lanes.first),
                stride: forward.panels.lanes,
                visible: self.visible.as_ptr().add(lanes.in_tile()),
            });
        }
    }

    /// Computes the exponentials of the scores of some lanes.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    pub(super) unsafe fn exponentials_of(
        &mut self,
        forward: &Forward<'_>,
        lanes: Lanes,
        block: &Block,
        state: &mut State,
    ) {
        let Panels { lanes: stride, depth } = forward.output_panels;
        let output = lanes.panel * depth + lanes.first;
        // SAFETY: passed on to the caller.
        unsafe {
            (forward.kernels.softmax)(&Softmax {
                keys: block.count,
                lanes: lanes.count,
                scores: self.scores.as_mut_ptr().add(lanes.first),
                stride,
                scale_log2: forward.scale.log2,
                max: state.max.as_mut_ptr().add(lanes.in_tile()),
                sum: state.sum.as_mut_ptr().add(lanes.in_tile()),
                output: state.output.as_mut_ptr().add(output),
                head_dim: forward.head_dim_v(),
                pairs: self.words.scores.as_mut_ptr().cast::<u32>().wrapping_add(lanes.first),
                parts: if block.pairs_of_values == Fit::None {
                    0
                } else {
                    forward.parts
                },
                part: forward.scores_part(),
                both: block.pairs_of_values == Fit::Some,
            });
        }
    }

    /// Adds exponentials times values to some lanes of the output: the pair products, and the f32 products if all
    /// their values are finite.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    pub(super) unsafe fn add_values(&mut self, forward: &Forward<'_>, lanes: Lanes, block: &Block, state: &mut State) {
        let head_dim = forward.head_dim_v();
        let Panels { lanes: stride, depth } = forward.output_panels;
        // SAFETY: passed on to the caller.
        unsafe {
            let c = state.output.as_mut_ptr().add(lanes.panel * depth + lanes.first);
            if let Some(pairs) = forward.pairs.filter(|_| block.pairs_of_values != Fit::None) {
                (pairs.product)(&PairProduct {
                    rows: depth,
                    inner: block.count / 2,
                    columns: lanes.count,
                    a: self.words.values.as_ptr().cast(),
                    a_stride: forward.tiles.block_n as usize / 2,
                    a_part: forward.values_part(),
                    b: self.words.scores.as_ptr().cast::<u32>().add(lanes.first),
                    b_stride: stride,
                    b_part: forward.scores_part(),
                    terms: Terms::of_probabilities(forward.parts),
                    c,
                    c_stride: stride,
                    accumulate: true,
                });
            }
            if block.finite && block.pairs_of_values != Fit::All {
                (forward.kernels.product)(&Product {
                    rows: head_dim,
                    inner: block.count,
                    columns: lanes.count,
                    a: block.values,
                    a_stride: head_dim,
                    transposed: true,
                    b: self.scores.as_ptr().add(lanes.first),
                    b_stride: stride,
                    c,
                    c_stride: stride,
                    accumulate: true,
                });
            }
        }
    }

    /// Adds exponentials times values to some lanes of a panel, where `sees(lane, key)`; each sum in the order of
    /// [`add_values`](Self::add_values). Used if a value that some query does not see is not finite: 0 times infinity is
    /// NaN, so it must not even be multiplied by 0.
    pub(super) fn add_values_where(
        &self,
        forward: &Forward<'_>,
        panel: usize,
        lanes: Range<usize>,
        keys: usize,
        sees: impl Fn(usize, usize) -> bool,
        state: &mut State,
    ) {
        let (head_dim, Panels { lanes: stride, depth }) = (forward.head_dim_v(), forward.output_panels);
        let (scores, values) = (self.scores.as_slice(), self.values.as_slice());
        let output = &mut state.output.as_mut_slice()[panel * depth..];
        for lane in lanes {
            for d in 0..head_dim {
                let mut sum = 0.0;
                for key in (0..keys).filter(|&key| sees(lane, key)) {
                    let (score, value) = (scores[key * stride + lane], values[key * head_dim + d]);
                    sum = forward.kernels.multiply_add(score, value, sum);
                }
                output[d * stride + lane] += sum;
            }
        }
    }
}
