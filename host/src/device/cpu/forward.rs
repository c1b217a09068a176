//! The forward pass on the CPU: the loop of the GPU kernels, one task for each tile of queries of each head.

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::mask::Mask;
use pulp::{Simd, WithSimd};

use super::pointer_mut;
use super::rows::{Rows, RowsMut, share};
use super::simd::{MAX_LANES, Matrix, Row, multiply_add, transpose};
use crate::Element;
use crate::plan::{Plan, Tiles, kernel_scale};
use crate::problem::Problem;

/// Computes out and lse.
///
/// # Safety
/// As for [`Backend::run`](crate::device::Backend::run), with elements of type `T`.
pub(super) unsafe fn forward<T: Element>(plan: &Plan, out: u64, lse: u64) {
    // SAFETY: passed on to the caller.
    unsafe {
        if plan.problem().causal() {
            forward_masked::<T, true>(plan, out, lse);
        } else {
            forward_masked::<T, false>(plan, out, lse);
        }
    }
}

/// # Safety
/// As for [`forward`].
unsafe fn forward_masked<T: Element, const CAUSAL: bool>(plan: &Plan, out: u64, lse: u64) {
    let (problem, tiles) = (plan.problem(), plan.tiles());
    let query_tiles = problem.seqlen_q().div_ceil(tiles.block_m) as usize;
    let tasks = problem.batch() * problem.heads_q() * query_tiles;
    share(
        tasks,
        || Scratch::new(problem, tiles),
        |scratch, task| {
            let (heads, tile) = (task / query_tiles, task % query_tiles);
            let (batch, head) = (heads / problem.heads_q(), heads % problem.heads_q());
            let first_row = tile as u32 * tiles.block_m;
            let rows = tiles.block_m.min(problem.seqlen_q() - first_row) as usize;
            let first = (batch * problem.heads_q() + head) * problem.seqlen_q() as usize + first_row as usize;
            let kv_head = head / (problem.heads_q() / problem.heads_kv());
            let head_dim = problem.head_dim() as usize;
            // SAFETY: the caller vouches for the four tensors and lse. batch, head and kv_head are within them; rows of
            // out do not overlap and no two tasks have one in common, so each is written by one thread only.
            let (q, k, v, out, lse) = unsafe {
                (
                    Rows::new(problem.q(), batch, head, head_dim),
                    Rows::new(problem.k(), batch, kv_head, head_dim),
                    Rows::new(problem.v(), batch, kv_head, head_dim),
                    RowsMut(Rows::new(
                        StridedTensor {
                            address: out,
                            ..problem.out()
                        },
                        batch,
                        head,
                        head_dim,
                    )),
                    std::slice::from_raw_parts_mut(pointer_mut::<f32>(lse).add(first), rows),
                )
            };
            let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
            let scale = problem.softmax_scale();
            let tile = QueryTile::<T, CAUSAL> {
                first_row,
                tiles,
                mask,
                scale,
                q,
                k,
                v,
                out,
                lse,
                scratch,
            };
            pulp::Arch::new().dispatch(tile);
        },
    );
}

/// The tiles that a thread works in: what is shared memory and registers on a GPU. All f32, rows padded to whole vectors.
struct Scratch {
    /// `block_m x head_dim`: q, times the sign of the scale.
    query: Vec<f32>,
    /// `head_dim x block_n`: K, transposed, so that scores of neighbouring keys are neighbours.
    keys: Vec<f32>,
    /// `block_n x head_dim`: V.
    values: Vec<f32>,
    /// `block_m x block_n`: scores, then probabilities.
    scores: Vec<f32>,
    /// `block_m x head_dim`: the output, not yet divided by the sum.
    output: Vec<f32>,
    /// The softmax of each query.
    softmax: Vec<Row>,
}

impl Scratch {
    fn new(problem: &Problem, tiles: Tiles) -> Self {
        let width = (problem.head_dim() as usize).next_multiple_of(MAX_LANES);
        let (block_m, block_n) = (tiles.block_m as usize, tiles.block_n as usize);
        Self {
            query: vec![0.0; block_m * width],
            keys: vec![0.0; width * block_n],
            values: vec![0.0; block_n * width],
            scores: vec![0.0; block_m * block_n],
            output: vec![0.0; block_m * width],
            softmax: vec![Row::EMPTY; block_m],
        }
    }
}

/// One task: a tile of queries, from load to store.
struct QueryTile<'a, T, const CAUSAL: bool> {
    first_row: u32,
    tiles: Tiles,
    mask: Mask<CAUSAL>,
    scale: f32,
    q: Rows<T>,
    k: Rows<T>,
    v: Rows<T>,
    out: RowsMut<T>,
    /// One entry for each query of the tile; its length says how many there are.
    lse: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl<T: Element, const CAUSAL: bool> WithSimd for QueryTile<'_, T, CAUSAL> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let blocks = self
            .mask
            .key_blocks(self.first_row, self.rows() as u32, self.tiles.block_n);
        self.load_query();
        for n in blocks.begin..blocks.boundary {
            self.attend::<S, false>(simd, n);
        }
        for n in blocks.boundary..blocks.end {
            self.attend::<S, true>(simd, n);
        }
        self.store();
    }
}

impl<T: Element, const CAUSAL: bool> QueryTile<'_, T, CAUSAL> {
    /// Queries that exist.
    #[inline(always)]
    fn rows(&self) -> usize {
        self.lse.len()
    }

    /// Elements from one row to the next in tiles of head_dim.
    #[inline(always)]
    fn width(&self) -> usize {
        self.q.head_dim.next_multiple_of(MAX_LANES)
    }

    /// Keys of the tile that query `row` of the tile sees.
    #[inline(always)]
    fn visible(&self, row: usize, first_key: u32) -> usize {
        let end = self.mask.visible_end(self.first_row + row as u32);
        end.saturating_sub(first_key).min(self.tiles.block_n) as usize
    }

    #[inline(always)]
    fn load_query(&mut self) {
        let (head_dim, width) = (self.q.head_dim, self.width());
        let (_, _, sign) = kernel_scale(self.scale);
        for row in 0..self.rows() {
            let query = &mut self.scratch.query[row * width..][..head_dim];
            T::widen(self.q.row(self.first_row as usize + row), query);
            query.iter_mut().for_each(|x| *x *= sign);
        }
        self.scratch.output.fill(0.0);
        self.scratch.softmax.fill(Row::EMPTY);
    }

    /// Takes in the keys and values of tile `n`.
    #[inline(always)]
    fn attend<S: Simd, const MASKED: bool>(&mut self, simd: S, n: u32) {
        let (rows, width, block_n) = (self.rows(), self.width(), self.tiles.block_n as usize);
        let (_, scale_log2, _) = kernel_scale(self.scale);
        let first_key = n * self.tiles.block_n;
        let keys = self.visible(rows - 1, first_key); // the last query of the tile sees the most
        let finite = self.load_keys_and_values(first_key as usize, keys);

        let Scratch {
            query,
            keys: keys_tile,
            scores,
            ..
        } = &mut *self.scratch;
        scores[..rows * block_n].fill(0.0);
        let query = Matrix {
            data: query,
            stride: width,
        };
        let transposed = Matrix {
            data: keys_tile,
            stride: block_n,
        };
        multiply_add(
            simd,
            (rows, self.q.head_dim, block_n),
            query,
            transposed,
            scores,
            block_n,
        );

        for row in 0..rows {
            if MASKED {
                let visible = self.visible(row, first_key);
                self.scratch.scores[row * block_n + visible..(row + 1) * block_n].fill(f32::NEG_INFINITY);
            }
            let Scratch {
                scores,
                softmax,
                output,
                ..
            } = &mut *self.scratch;
            let rescale = softmax[row].update(simd, &mut scores[row * block_n..][..block_n], scale_log2);
            if rescale != 1.0 {
                output[row * width..][..width].iter_mut().for_each(|x| *x *= rescale);
            }
        }
        if finite || !MASKED {
            self.add_values(simd, 0, rows, keys);
        } else {
            // 0 times infinity is NaN: values that a query does not see must not even be multiplied by 0.
            for row in 0..rows {
                self.add_values(simd, row, 1, self.visible(row, first_key));
            }
        }
    }

    /// output += probabilities x values, for a run of queries and the first `keys` keys.
    #[inline(always)]
    fn add_values<S: Simd>(&mut self, simd: S, first: usize, rows: usize, keys: usize) {
        let (width, block_n) = (self.width(), self.tiles.block_n as usize);
        let Scratch {
            scores, values, output, ..
        } = &mut *self.scratch;
        let probabilities = Matrix {
            data: &scores[first * block_n..],
            stride: block_n,
        };
        let values = Matrix {
            data: values,
            stride: width,
        };
        multiply_add(
            simd,
            (rows, keys, width),
            probabilities,
            values,
            &mut output[first * width..],
            width,
        );
    }

    /// Loads the first `keys` keys, transposed, and values of a tile. Says whether all the values are finite.
    #[inline(always)]
    fn load_keys_and_values(&mut self, first_key: usize, keys: usize) -> bool {
        let (head_dim, width, block_n) = (self.q.head_dim, self.width(), self.tiles.block_n as usize);
        let Scratch {
            keys: transposed,
            values: tile,
            ..
        } = &mut *self.scratch;
        // K passes through the tile that V is then loaded to.
        self.k.load(first_key, keys, tile, width);
        let key_tile = Matrix {
            data: tile,
            stride: width,
        };
        transpose(
            key_tile,
            keys.next_multiple_of(MAX_LANES),
            head_dim,
            transposed,
            block_n,
        );
        self.v.load(first_key, keys, tile, width)
    }

    /// Divides by the sums, and writes out and lse.
    #[inline(always)]
    fn store(&mut self) {
        let (head_dim, width) = (self.q.head_dim, self.width());
        let magnitude = f64::from(self.scale.abs());
        for row in 0..self.rows() {
            let sees_a_key = self.mask.visible_end(self.first_row + row as u32) > 0;
            let Row { max, sum } = self.scratch.softmax[row];
            let (inverse, lse) = if !sees_a_key {
                (0.0, f32::NEG_INFINITY)
            } else if sum == 0.0 {
                (f32::NAN, f32::NEG_INFINITY) // every score is minus infinity: 0 / 0, and ln 0
            } else {
                (1.0 / sum, (f64::from(max) * magnitude + f64::from(sum).ln()) as f32)
            };
            let output = &mut self.scratch.output[row * width..][..head_dim];
            output.iter_mut().for_each(|x| *x *= inverse);
            T::narrow(output, self.out.row(self.first_row as usize + row));
            self.lse[row] = lse;
        }
    }
}
