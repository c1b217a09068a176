//! The backward pass on the CPU: gradients by recomputation, as the GPU kernels compute them.
//!
//! With P = exp(scale * S - lse) and delta = rowsum(dO * O), which comes first,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dS^T Q
//! ```
//!
//! There are two kinds of tasks. One owns queries and streams keys past them: dQ. The other owns keys, streams the queries
//! of every head that shares them, and works on the transposed tiles: dK and dV. Scores are computed twice, and in return
//! each element of a gradient is one sum in one order by one thread: the same bits on any number of threads.

use flash_attention_kernels::mask::{Blocks, Mask};
use pulp::{Simd, WithSimd};

use super::pointer_mut;
use super::rows::{Rows, RowsMut};
use super::simd::{MAX_LANES, Matrix, backpropagate, dot, multiply_add, transpose};
use super::team::Team;
use crate::Element;
use crate::plan::Tiles;
use crate::problem::{BackwardTensors, Problem};

/// Tasks that a pass should have at least, so that a problem of few heads keeps many threads busy.
const ENOUGH_TASKS: usize = 32;

/// Rows that a task owns at least: fewer would not pay for transposing what is streamed past them.
const MIN_OWNED: usize = 32;

/// Computes dq, dk and dv with a workspace at `delta`, f32 `[batch, heads_q, seqlen_q]`, contiguous. A task owns up to `tiles.block_m` rows and streams `tiles.block_n` at a time past them, a
/// multiple of 16.
///
/// # Safety
/// q, k, v and out of the problem and all of `tensors` are memory of the CPU, laid out as they say, with elements of type
/// `T`, but for lse and delta. dq, dk, dv and delta overlap neither each other nor themselves nor anything else.
/// Nobody writes the inputs or touches the outputs meanwhile.
pub(super) unsafe fn backward<T: Element>(
    team: &Team<'_>,
    problem: &Problem,
    tensors: &BackwardTensors,
    delta: u64,
    tiles: Tiles,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        make_delta::<T>(team, problem, tensors, delta);
        if problem.causal() {
            gradients::<T, true>(team, problem, tensors, delta, tiles);
        } else {
            gradients::<T, false>(team, problem, tensors, delta, tiles);
        }
    }
}

/// delta = rowsum(dO * O).
///
/// # Safety
/// As for [`backward`].
unsafe fn make_delta<T: Element>(team: &Team<'_>, problem: &Problem, tensors: &BackwardTensors, delta: u64) {
    let (seqlen_q, heads_q) = (problem.seqlen_q() as usize, problem.heads_q());
    let head_dim = problem.head_dim() as usize;
    let tiles = seqlen_q.div_ceil(DELTA_ROWS);
    let row = || vec![0.0; head_dim.next_multiple_of(MAX_LANES)];
    team.share(
        problem.batch() * heads_q * tiles,
        || [row(), row()],
        |scratch, task| {
            let (heads, first_row) = (task / tiles, task % tiles * DELTA_ROWS);
            let rows = DELTA_ROWS.min(seqlen_q - first_row);
            // SAFETY: the caller vouches for the tensors; no two tasks have a row in common.
            let task = unsafe {
                DeltaTask::<T> {
                    first_row,
                    out: Rows::new(problem.out(), heads / heads_q, heads % heads_q, head_dim),
                    dout: Rows::new(tensors.dout, heads / heads_q, heads % heads_q, head_dim),
                    delta: std::slice::from_raw_parts_mut(
                        pointer_mut::<f32>(delta).add(heads * seqlen_q + first_row),
                        rows,
                    ),
                    scratch,
                }
            };
            pulp::Arch::new().dispatch(task);
        },
    );
}

/// Queries of a task of [`make_delta`].
const DELTA_ROWS: usize = 256;

/// delta of a run of queries of one head.
struct DeltaTask<'a, T> {
    first_row: usize,
    out: Rows<T>,
    dout: Rows<T>,
    delta: &'a mut [f32],
    scratch: &'a mut [Vec<f32>; 2],
}

impl<T: Element> WithSimd for DeltaTask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let [out, dout] = self.scratch;
        for (row, delta) in self.delta.iter_mut().enumerate() {
            T::widen(self.out.row(self.first_row + row), &mut out[..self.out.head_dim]);
            T::widen(self.dout.row(self.first_row + row), &mut dout[..self.out.head_dim]);
            *delta = dot(simd, out, dout);
        }
    }
}

/// dQ by tiles of queries, dK and dV by tiles of keys.
///
/// # Safety
/// As for [`backward`], and delta has been computed.
unsafe fn gradients<T: Element, const CAUSAL: bool>(
    team: &Team<'_>,
    problem: &Problem,
    tensors: &BackwardTensors,
    delta: u64,
    tiles: Tiles,
) {
    let (seqlen_q, seqlen_k) = (problem.seqlen_q() as usize, problem.seqlen_k() as usize);
    let (query_heads, key_heads) = (
        problem.batch() * problem.heads_q(),
        problem.batch() * problem.heads_kv(),
    );
    let tasks = |owned: usize| {
        (
            key_heads * seqlen_k.div_ceil(owned),
            query_heads * seqlen_q.div_ceil(owned),
        )
    };
    let mut owned = tiles.block_m as usize;
    while owned / 2 >= MIN_OWNED && tasks(owned).0 + tasks(owned).1 < ENOUGH_TASKS {
        owned /= 2;
    }
    let (key_tasks, query_tasks) = tasks(owned);
    let streamed = tiles.block_n as usize;
    team.share(
        key_tasks + query_tasks,
        || Scratch::new(problem, owned, streamed),
        |scratch, task| {
            // Heavy tasks first: those of keys, and of a causal head the first keys, which most queries see.
            let (heads, tile) = if task < key_tasks {
                let tiles = seqlen_k.div_ceil(owned);
                (task / tiles, task % tiles)
            } else {
                let tiles = seqlen_q.div_ceil(owned);
                let task = task - key_tasks;
                (task / tiles, tiles - 1 - task % tiles)
            };
            let first_row = tile * owned;
            let (seqlen, heads_of_batch) = if task < key_tasks {
                (seqlen_k, problem.heads_kv())
            } else {
                (seqlen_q, problem.heads_q())
            };
            let place = Place {
                batch: heads / heads_of_batch,
                head: heads % heads_of_batch,
                first_row: first_row as u32,
                rows: owned.min(seqlen - first_row),
                streamed: streamed as u32,
            };
            // SAFETY: the caller vouches for the tensors, and the place is within them. No two tasks own a row of the same
            // gradient, so each is written by one thread only.
            unsafe {
                if task < key_tasks {
                    pulp::Arch::new().dispatch(Task::<T, CAUSAL, true>::new(problem, tensors, delta, place, scratch));
                } else {
                    pulp::Arch::new().dispatch(Task::<T, CAUSAL, false>::new(problem, tensors, delta, place, scratch));
                }
            }
        },
    );
}

/// The rows that a task owns.
#[derive(Clone, Copy)]
struct Place {
    batch: usize,
    /// Among the query heads, or the key heads.
    head: usize,
    first_row: u32,
    rows: usize,
    /// Rows of a streamed tile.
    streamed: u32,
}

/// The tiles that a thread works in, all f32. Where there are two, the first is of q or k, the second of dout or v.
/// "width" is head_dim rounded up to whole vectors.
struct Scratch {
    /// `owned x width`.
    owned: [Vec<f32>; 2],
    /// `streamed x width`.
    streamed: [Vec<f32>; 2],
    /// `head_dim x streamed`.
    transposed: [Vec<f32>; 2],
    /// `owned x streamed`: scores, then probabilities.
    probabilities: Vec<f32>,
    /// `owned x streamed`: dP, then dS.
    ds: Vec<f32>,
    /// `owned x width`: dS times the first streamed tiles, and P times the second: dQ, or dK and dV.
    gradients: [Vec<f32>; 2],
    /// Of the owned queries, or of the streamed ones. An lse of minus infinity, of a query that saw nothing, is stored as
    /// plus infinity, which makes its probabilities 0 and not infinite.
    lse: Vec<f32>,
    delta: Vec<f32>,
}

impl Scratch {
    fn new(problem: &Problem, owned: usize, streamed: usize) -> Self {
        let head_dim = problem.head_dim() as usize;
        let width = head_dim.next_multiple_of(MAX_LANES);
        let pair = |size: usize| [vec![0.0; size], vec![0.0; size]];
        Self {
            owned: pair(owned * width),
            streamed: pair(streamed * width),
            transposed: pair(head_dim * streamed),
            probabilities: vec![0.0; owned * streamed],
            ds: vec![0.0; owned * streamed],
            gradients: pair(owned * width),
            lse: vec![0.0; owned.max(streamed)],
            delta: vec![0.0; owned.max(streamed)],
        }
    }
}

/// One task, from load to store: of keys, or else of queries.
struct Task<'a, T, const CAUSAL: bool, const KEYS: bool> {
    place: Place,
    mask: Mask<CAUSAL>,
    scale: f32,
    /// Q and dO, or K and V.
    owned: [Rows<T>; 2],
    /// What is streamed past them, one entry for each head: K and V, or Q and dO of the heads that share the keys.
    streamed: Vec<Streamed<'a, T>>,
    /// dQ, or dK and dV.
    gradients: Vec<RowsMut<T>>,
    scratch: &'a mut Scratch,
}

/// What is streamed of one head.
#[derive(Clone, Copy)]
struct Streamed<'a, T> {
    rows: [Rows<T>; 2],
    /// lse and delta of all the head's queries, whether they are streamed or owned.
    statistics: [&'a [f32]; 2],
}

impl<'a, T: Element, const CAUSAL: bool, const KEYS: bool> Task<'a, T, CAUSAL, KEYS> {
    /// # Safety
    /// As for [`gradients`]; no other task with the same `KEYS` has these rows.
    unsafe fn new(
        problem: &Problem,
        tensors: &BackwardTensors,
        delta: u64,
        place: Place,
        scratch: &'a mut Scratch,
    ) -> Self {
        let Place { batch, head, .. } = place;
        let (head_dim, seqlen_q) = (problem.head_dim() as usize, problem.seqlen_q() as usize);
        let heads_q_per_kv = problem.heads_q() / problem.heads_kv();
        // SAFETY: the caller vouches for the tensors, and every head that is asked for is within them.
        let rows = |tensor, head| unsafe { Rows::<T>::new(tensor, batch, head, head_dim) };
        let queries = |head: usize| [rows(problem.q(), head), rows(tensors.dout, head)];
        let keys = |head: usize| [rows(problem.k(), head), rows(problem.v(), head)];
        let statistics = |head: usize| {
            [tensors.lse, delta].map(|address| {
                let first = (batch * problem.heads_q() + head) * seqlen_q;
                // SAFETY: both hold an f32 for each query, and nobody writes them any more.
                unsafe { std::slice::from_raw_parts(pointer_mut::<f32>(address).add(first), seqlen_q) }
            })
        };
        let (owned, streamed, gradients) = if KEYS {
            let heads = head * heads_q_per_kv..(head + 1) * heads_q_per_kv;
            let streamed = heads.map(|head| Streamed {
                rows: queries(head),
                statistics: statistics(head),
            });
            (keys(head), streamed.collect(), vec![tensors.dk, tensors.dv])
        } else {
            let streamed = Streamed {
                rows: keys(head / heads_q_per_kv),
                statistics: statistics(head),
            };
            (queries(head), vec![streamed], vec![tensors.dq])
        };
        Self {
            place,
            mask: Mask::new(problem.seqlen_q(), problem.seqlen_k()),
            scale: problem.softmax_scale(),
            owned,
            streamed,
            gradients: gradients
                .into_iter()
                .map(|tensor| RowsMut(rows(tensor, head)))
                .collect(),
            scratch,
        }
    }
}

impl<T: Element, const CAUSAL: bool, const KEYS: bool> WithSimd for Task<'_, T, CAUSAL, KEYS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.load_owned();
        let (first_row, rows, block) = (self.place.first_row, self.place.rows as u32, self.place.streamed);
        for head in 0..self.streamed.len() {
            let head = self.streamed[head];
            if KEYS {
                let Blocks { begin, boundary, end } = self.mask.query_blocks(first_row, rows, block);
                for m in begin..boundary {
                    self.add::<S, true>(simd, head, m);
                }
                for m in boundary..end {
                    self.add::<S, false>(simd, head, m);
                }
            } else {
                let Blocks { begin, boundary, end } = self.mask.key_blocks(first_row, rows, block);
                self.load_statistics(head, first_row as usize, self.place.rows);
                for n in begin..boundary {
                    self.add::<S, false>(simd, head, n);
                }
                for n in boundary..end {
                    self.add::<S, true>(simd, head, n);
                }
            }
        }
        self.store();
    }
}

impl<T: Element, const CAUSAL: bool, const KEYS: bool> Task<'_, T, CAUSAL, KEYS> {
    #[inline(always)]
    fn head_dim(&self) -> usize {
        self.owned[0].head_dim
    }

    /// Elements from one row to the next in tiles of head_dim.
    #[inline(always)]
    fn width(&self) -> usize {
        self.head_dim().next_multiple_of(MAX_LANES)
    }

    /// Rows of the streamed tile that starts at `first` which exist and are visible to anything owned.
    #[inline(always)]
    fn columns(&self, head: Streamed<'_, T>, first: u32) -> usize {
        let end = if KEYS {
            head.statistics[0].len() as u32
        } else {
            self.mask.visible_end(self.place.first_row + self.place.rows as u32 - 1)
        };
        (end - first).min(self.place.streamed) as usize
    }

    /// Columns of the streamed tile that starts at `first` which make a visible pair with an owned row.
    #[inline(always)]
    fn visible(&self, row: usize, first: u32, columns: usize) -> std::ops::Range<usize> {
        let row = self.place.first_row + row as u32;
        let within = |position: u32| (position.saturating_sub(first) as usize).min(columns);
        if KEYS {
            within(self.mask.visible_begin(row))..columns
        } else {
            0..within(self.mask.visible_end(row))
        }
    }

    #[inline(always)]
    fn load_owned(&mut self) {
        let (width, first) = (self.width(), self.place.first_row as usize);
        for (rows, tile) in self.owned.iter().zip(&mut self.scratch.owned) {
            rows.load(first, self.place.rows, tile, width);
        }
        self.scratch.gradients.iter_mut().for_each(|tile| tile.fill(0.0));
    }

    /// Loads lse and delta of `rows` queries.
    #[inline(always)]
    fn load_statistics(&mut self, head: Streamed<'_, T>, first: usize, rows: usize) {
        let [lse, delta] = head.statistics.map(|of_head| &of_head[first..][..rows]);
        for (to, &lse) in self.scratch.lse.iter_mut().zip(lse) {
            *to = if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse };
        }
        self.scratch.delta[..rows].copy_from_slice(delta);
    }

    /// Loads a streamed tile of `columns` rows, as it is and transposed. Says whether all of it is finite.
    #[inline(always)]
    fn load_streamed(&mut self, head: Streamed<'_, T>, first: usize, columns: usize) -> bool {
        let (head_dim, width, block) = (self.head_dim(), self.width(), self.place.streamed as usize);
        let Scratch {
            streamed, transposed, ..
        } = &mut *self.scratch;
        let mut finite = true;
        for ((rows, tile), transposed) in head.rows.iter().zip(streamed).zip(transposed) {
            finite &= rows.load(first, columns, tile, width);
            let tile = Matrix {
                data: tile,
                stride: width,
            };
            transpose(tile, columns.next_multiple_of(MAX_LANES), head_dim, transposed, block);
        }
        finite
    }

    /// Streamed tile `n` of a head: adds its part of the gradients.
    #[inline(always)]
    fn add<S: Simd, const MASKED: bool>(&mut self, simd: S, head: Streamed<'_, T>, n: u32) {
        let (rows, block) = (self.place.rows, self.place.streamed as usize);
        let first = n * self.place.streamed;
        let columns = self.columns(head, first);
        let finite = self.load_streamed(head, first as usize, columns);
        if KEYS {
            self.load_statistics(head, first as usize, columns);
        }
        self.scores(simd, columns);
        for row in 0..rows {
            let Scratch {
                probabilities,
                ds,
                lse,
                delta,
                ..
            } = &mut *self.scratch;
            let padded = columns.next_multiple_of(MAX_LANES);
            let (p, ds) = (
                &mut probabilities[row * block..][..padded],
                &mut ds[row * block..][..padded],
            );
            if KEYS {
                backpropagate::<S, true>(simd, self.scale, (&lse[..padded], &delta[..padded]), (p, ds));
            } else {
                backpropagate::<S, false>(simd, self.scale, (&lse[row..=row], &delta[row..=row]), (p, ds));
            }
        }
        if !MASKED {
            self.accumulate(simd, 0..rows, 0..columns);
            return;
        }
        for row in 0..rows {
            let visible = self.visible(row, first, columns);
            for tile in [&mut self.scratch.probabilities, &mut self.scratch.ds] {
                tile[row * block..][..visible.start].fill(0.0);
                tile[row * block..][visible.end..columns].fill(0.0);
            }
            if !finite {
                // 0 times infinity is NaN: what is not seen must not even be multiplied by 0.
                self.accumulate(simd, row..row + 1, visible);
            }
        }
        if finite {
            self.accumulate(simd, 0..rows, 0..columns);
        }
    }

    /// S and dP of the owned rows and the streamed tile.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, simd: S, columns: usize) {
        let (rows, head_dim, width) = (self.place.rows, self.head_dim(), self.width());
        let block = self.place.streamed as usize;
        let Scratch {
            owned,
            transposed,
            probabilities,
            ds,
            ..
        } = &mut *self.scratch;
        let size = (rows, head_dim, columns.next_multiple_of(MAX_LANES));
        for ((owned, transposed), product) in owned.iter().zip(transposed).zip([probabilities, ds]) {
            let owned = Matrix {
                data: owned,
                stride: width,
            };
            let transposed = Matrix {
                data: transposed,
                stride: block,
            };
            product[..rows * block].fill(0.0);
            multiply_add(simd, size, owned, transposed, product, block);
        }
    }

    /// Adds dS times the first streamed tile, and for keys P times the second, for some rows and columns.
    #[inline(always)]
    fn accumulate<S: Simd>(&mut self, simd: S, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>) {
        let (width, block) = (self.width(), self.place.streamed as usize);
        let Scratch {
            probabilities,
            ds,
            streamed,
            gradients,
            ..
        } = &mut *self.scratch;
        let size = (rows.len(), columns.len(), width);
        let products = [&*ds, &*probabilities].into_iter().zip(streamed).zip(gradients);
        for ((weights, streamed), gradient) in products.take(if KEYS { 2 } else { 1 }) {
            let weights = Matrix {
                data: &weights[rows.start * block + columns.start..],
                stride: block,
            };
            let streamed = Matrix {
                data: &streamed[columns.start * width..],
                stride: width,
            };
            multiply_add(
                simd,
                size,
                weights,
                streamed,
                &mut gradient[rows.start * width..],
                width,
            );
        }
    }

    /// Writes the gradients; dQ and dK get their factor.
    #[inline(always)]
    fn store(&mut self) {
        let (head_dim, width, first) = (self.head_dim(), self.width(), self.place.first_row as usize);
        let factors = [self.scale, 1.0];
        for ((target, tile), factor) in self.gradients.iter_mut().zip(&mut self.scratch.gradients).zip(factors) {
            for row in 0..self.place.rows {
                let gradient = &mut tile[row * width..][..head_dim];
                gradient.iter_mut().for_each(|x| *x *= factor);
                T::narrow(gradient, target.row(first + row));
            }
        }
    }
}
