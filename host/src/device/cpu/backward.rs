//! The backward pass on the CPU: gradients by recomputation, as the GPU kernels compute them, in five products.
//!
//! With P = exp(scale * S - lse) and delta = rowsum(dO * O), which comes first,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        dQ = scale * dS K        dK = scale * dS^T Q
//! ```
//!
//! A task owns a run of keys of one head, with their dK and dV, and streams the queries of every head that shares them,
//! tile by tile, the last first. Queries are lanes (see `kernels.rs`), so S, dP and dS are made once, and serve all five
//! products as they lie. What a task has for dQ is added to memory after the task of the keys before it has added its own:
//! each element of a gradient is one sum in one order, the same on any number of threads. Tasks are taken in that order,
//! so the one that is waited for is always at work, and a few rows ahead.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use flash_attention_kernels::entries::Dtype;

use super::kernels::{Backpropagate, Kernels, MAX_LANES, PairProduct, Pairs, Product, ROWS, SIDE};
use super::pointer_mut;
use super::team::{Lines, Team};
use super::tensor::{Head, Panels, Visibility};
use crate::plan::Tiles;
use crate::problem::{BackwardTensors, Problem};

/// Keys whose scores are made at a time: with those of a tile of queries, they stay in the L1 cache.
const BLOCK: usize = 64;

/// Queries of a task that computes delta.
const DELTA_ROWS: usize = 256;

/// One backward problem on its way.
struct Backward<'a> {
    kernels: &'static Kernels,
    /// How pairs of bf16 are multiplied, if that is how this problem is solved.
    pairs: Option<&'static Pairs>,
    problem: &'a Problem,
    tensors: &'a BackwardTensors,
    tiles: Tiles,
    visibility: Visibility,
    delta: u64,
}

/// Computes dq, dk and dv with a workspace at `delta`, f32 `[batch, heads_q, seqlen_q]`, contiguous. A task owns
/// `tiles.block_n` keys and streams `tiles.block_m` queries at a time past them, a multiple of [`MAX_LANES`].
///
/// # Safety
/// q, k, v and out of the problem and all of `tensors` are memory of the CPU, laid out as they say, with elements of the
/// problem's type, but for lse and delta. dq, dk, dv and delta overlap neither each other nor themselves nor anything
/// else. Nobody writes the inputs or touches the outputs meanwhile.
pub(super) unsafe fn backward(team: &Team<'_>, problem: &Problem, tensors: &BackwardTensors, delta: u64, tiles: Tiles) {
    let backward = Backward {
        kernels: team.kernels,
        pairs: team.kernels.pairs.filter(|_| problem.dtype() == Dtype::Bf16),
        problem,
        tensors,
        tiles,
        visibility: Visibility::new(problem),
        delta,
    };
    // SAFETY: passed on to the caller.
    unsafe { backward.make_delta(team) };
    let chunks = problem.seqlen_k().div_ceil(tiles.block_n) as usize;
    let heads = problem.batch() * problem.heads_kv();
    let shared: Vec<SharedHead> = (0..heads).map(|_| SharedHead::new(&backward)).collect();
    // Where there are heads enough, a task takes all the keys of one, and nobody waits for anybody.
    let chunks_of_task = if heads >= 4 * team.threads { chunks } else { 1 };
    let tasks_of_head = chunks / chunks_of_task;
    let scratch = || Scratch::new(&backward);
    team.share(heads * tasks_of_head, scratch, |scratch, task| {
        let head = task / tasks_of_head;
        let first = task % tasks_of_head * chunks_of_task;
        for chunk in first..first + chunks_of_task {
            // SAFETY: passed on to the caller; no other task has these keys.
            unsafe { scratch.chunk(&backward, &shared[head], head, chunk, chunks) };
        }
    });
}

/// What the tasks of one head share.
struct SharedHead {
    /// For each tile of queries of each query head: how many tasks have added their part of dQ.
    added: Vec<AtomicU32>,
    /// dQ so far, where its own memory can not hold an f32: `queries x head_dim`. It is there while tasks need it. And how
    /// many have asked for it.
    sums: Mutex<(Option<Arc<Sums>>, usize)>,
}

/// Memory that tasks write in turn.
struct Sums(
    *mut f32,
    #[allow(dead_code, reason = "what the pointer points to")] Lines,
);

// SAFETY: the tasks take turns: `SharedHead::added` says whose it is.
unsafe impl Send for Sums {}
// SAFETY: as above.
unsafe impl Sync for Sums {}

impl SharedHead {
    fn new(backward: &Backward<'_>) -> Self {
        let tiles = backward.group() * backward.query_tiles();
        Self {
            added: (0..tiles).map(|_| AtomicU32::new(0)).collect(),
            sums: Mutex::new((None, 0)),
        }
    }

    /// The sums, for one of so many runs of keys, each of which asks once; `None` where dq itself holds them, or nothing is
    /// added up.
    fn sums(&self, backward: &Backward<'_>, chunks: usize) -> Option<Arc<Sums>> {
        if backward.problem.dtype() == Dtype::F32 || chunks == 1 {
            return None;
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let (memory, asked) = &mut *sums;
        let queries = backward.group() * backward.problem.seqlen_q() as usize;
        let new = || {
            let mut lines = Lines::new(queries * backward.head_dim());
            Arc::new(Sums(lines.as_mut_ptr(), lines))
        };
        let of_task = memory.get_or_insert_with(new).clone();
        *asked += 1;
        if *asked == chunks {
            *memory = None; // the last of them gives it back
        }
        Some(of_task)
    }
}

impl Backward<'_> {
    fn head_dim(&self) -> usize {
        self.problem.head_dim() as usize
    }

    /// head_dim in whole registers.
    fn width(&self) -> usize {
        self.head_dim().next_multiple_of(MAX_LANES)
    }

    /// What keys, and queries of a tile, are padded to a multiple of.
    fn padding(&self) -> usize {
        if self.pairs.is_some() { 2 * SIDE } else { ROWS }
    }

    /// Words of a row of a head as pairs, in whole tiles.
    fn words(&self) -> usize {
        self.head_dim().next_multiple_of(2 * SIDE) / 2
    }

    /// Keys of a task, as far as there are any, padded.
    fn owned(&self) -> usize {
        (self.tiles.block_n as usize)
            .min(self.problem.seqlen_k() as usize)
            .next_multiple_of(self.padding())
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.problem.heads_q() / self.problem.heads_kv()
    }

    fn query_tiles(&self) -> usize {
        self.problem.seqlen_q().div_ceil(self.tiles.block_m) as usize
    }

    /// The rows of one head of a tensor.
    ///
    /// # Safety
    /// As for [`backward`]; the head exists.
    unsafe fn rows(&self, tensor: flash_attention_kernels::abi::StridedTensor, batch: usize, head: usize) -> Head {
        // SAFETY: passed on to the caller.
        unsafe { Head::new(tensor, self.problem.dtype(), batch, head, self.head_dim()) }
    }

    /// delta = rowsum(dO * O). Where there is one key, O is V, and dP - delta is to be 0 and not what two roundings leave: it
    /// is summed in the order of dP = dO V^T then.
    ///
    /// # Safety
    /// As for [`backward`].
    unsafe fn make_delta(&self, team: &Team<'_>) {
        let (kernels, head_dim) = (self.kernels, self.head_dim());
        let (heads_q, seqlen_q) = (self.problem.heads_q(), self.problem.seqlen_q() as usize);
        let (lanes, depth) = (kernels.lanes, head_dim);
        let tiles = seqlen_q.div_ceil(DELTA_ROWS);
        let tasks = self.problem.batch() * heads_q * tiles;
        let scratch = || {
            let panel = || Lines::new(lanes * depth);
            [
                panel(),
                panel(),
                Lines::new(MAX_LANES * self.width()),
                Lines::new(lanes),
            ]
        };
        team.share(tasks, scratch, |[x, y, rows, sums], task| {
            let (heads, first) = (task / tiles, task % tiles * DELTA_ROWS);
            let (batch, head) = (heads / heads_q, heads % heads_q);
            // SAFETY: passed on to the caller.
            let (out, dout) = unsafe {
                (
                    self.rows(self.problem.out(), batch, head),
                    self.rows(self.tensors.dout, batch, head),
                )
            };
            let end = seqlen_q.min(first + DELTA_ROWS);
            for row in (first..end).step_by(lanes) {
                let queries = row..end.min(row + lanes);
                let shape = Panels { lanes, depth };
                out.load_panels(kernels, queries.clone(), 1.0, shape, x, rows);
                dout.load_panels(kernels, queries.clone(), 1.0, shape, y, rows);
                // SAFETY: both are panels of `head_dim` rows, and delta has an entry for each of the rows, which this task
                // alone writes.
                unsafe {
                    let one_key = self.problem.seqlen_k() == 1;
                    (kernels.dot)(x.as_ptr(), y.as_ptr(), head_dim, one_key, sums.as_mut_ptr());
                    let delta = pointer_mut::<f32>(self.delta).add(heads * seqlen_q + row);
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), delta, queries.len());
                }
            }
        });
    }
}

/// A tile of queries of one head, as it passes a run of keys.
#[derive(Clone, Copy)]
struct QueryTile {
    first_row: usize,
    rows: usize,
    /// Lanes in use: rows, padded.
    lanes: usize,
    /// Whether q and dout are finite.
    finite: bool,
}

/// What products of pairs of bf16 read: words of two neighbours along the inner axis.
struct Words {
    /// Of the keys that a task owns, `block_n x words`.
    keys: Lines,
    values: Lines,
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
    fn new(backward: &Backward<'_>) -> Self {
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

/// The tiles that a thread works in. "width" is head_dim in whole registers.
struct Scratch {
    /// Empty where products are of f32.
    words: Words,
    /// Of the keys that a task owns: `block_n x head_dim`.
    keys: Lines,
    values: Lines,
    /// Their gradients: `block_n x width`.
    dk: Lines,
    dv: Lines,
    /// Of a tile of queries, `block_m x width`.
    q: Lines,
    dout: Lines,
    /// The same transposed: `head_dim x block_m`; and the gradient of q, `width x block_m`.
    q_lanes: Lines,
    dout_lanes: Lines,
    dq_lanes: Lines,
    /// `BLOCK x block_m`: S, then P.
    probabilities: Lines,
    /// `BLOCK x block_m`: dP, then dS.
    ds: Lines,
    lse: Lines,
    delta: Lines,
    /// How many keys of a block each query sees.
    visible: Lines,
}

impl Scratch {
    fn new(backward: &Backward<'_>) -> Self {
        let (head_dim, width) = (backward.head_dim(), backward.width());
        let (block_m, block_n) = (backward.tiles.block_m as usize, backward.owned());
        Self {
            words: Words::new(backward),
            keys: Lines::new(block_n * head_dim + MAX_LANES),
            values: Lines::new(block_n * head_dim),
            dk: Lines::new(block_n * width),
            dv: Lines::new(block_n * width),
            q: Lines::new(block_m * width),
            dout: Lines::new(block_m * width),
            q_lanes: Lines::new(head_dim * block_m),
            dout_lanes: Lines::new(head_dim * block_m),
            dq_lanes: Lines::new(width * block_m),
            probabilities: Lines::new(BLOCK * block_m),
            ds: Lines::new(BLOCK * block_m),
            lse: Lines::new(block_m),
            delta: Lines::new(block_m),
            visible: Lines::new(block_m),
        }
    }

    /// The gradients that come from run `chunk` of the keys of a head.
    ///
    /// # Safety
    /// As for [`backward`], and no other task has these keys.
    unsafe fn chunk(&mut self, backward: &Backward<'_>, shared: &SharedHead, head: usize, chunk: usize, chunks: usize) {
        let (problem, tensors, kernels) = (backward.problem, backward.tensors, backward.kernels);
        let (batch, kv_head) = (head / problem.heads_kv(), head % problem.heads_kv());
        let (head_dim, width, block_n) = (backward.head_dim(), backward.width(), backward.tiles.block_n as usize);
        let first_key = chunk * block_n;
        let keys = block_n.min(problem.seqlen_k() as usize - first_key);
        let padded = keys.next_multiple_of(backward.padding());
        // SAFETY: passed on to the caller, here and below; the heads are within their tensors.
        let of_keys = |tensor| unsafe { backward.rows(tensor, batch, kv_head) };
        of_keys(problem.k()).load_tile(kernels, first_key, [keys, padded], self.keys.as_mut_slice(), head_dim);
        of_keys(problem.v()).load_tile(kernels, first_key, [keys, padded], self.values.as_mut_slice(), head_dim);
        if backward.pairs.is_some() {
            let words = backward.words();
            of_keys(problem.k()).copy_halves(first_key, [keys, padded], &mut self.words.keys, words);
            of_keys(problem.v()).copy_halves(first_key, [keys, padded], &mut self.words.values, words);
            self.pair_keys(backward, padded);
        }
        self.dk.as_mut_slice()[..padded * width].fill(0.0);
        self.dv.as_mut_slice()[..padded * width].fill(0.0);
        let sums = shared.sums(backward, chunks);
        for in_group in 0..backward.group() {
            let query_head = kv_head * backward.group() + in_group;
            for tile in (0..backward.query_tiles()).rev() {
                let first_row = tile * backward.tiles.block_m as usize;
                let rows = (backward.tiles.block_m as usize).min(problem.seqlen_q() as usize - first_row);
                let end = backward.visibility.visible_end((first_row + rows) as u32 - 1) as usize;
                let sees_any = end > first_key;
                if !sees_any && chunk > 0 {
                    break; // earlier queries see no more
                }
                // SAFETY: as above.
                unsafe {
                    self.dq_lanes.as_mut_slice().fill(0.0);
                    if sees_any {
                        let tile = self.load_queries(backward, batch, query_head, first_row, rows);
                        // The processor has the instructions of its kernels.
                        backward.pairs.inspect(|pairs| (pairs.begin)());
                        self.pass(backward, tile, first_key, keys);
                        backward.pairs.inspect(|pairs| (pairs.end)());
                    }
                    let added = &shared.added[in_group * backward.query_tiles() + tile];
                    let dq = GradientRows {
                        rows: backward.rows(tensors.dq, batch, query_head),
                        sums: sums.as_ref().map(|sums| sums.0),
                        first_sum: in_group * problem.seqlen_q() as usize + first_row,
                        first_row,
                        count: rows,
                        is_first: chunk == 0,
                        is_last: end <= first_key + keys,
                    };
                    wait_for(added, chunk as u32);
                    self.add_dq(backward, &dq);
                    added.store(chunk as u32 + 1, Ordering::Release);
                }
            }
        }
        for (tensor, gradient, factor) in [
            (tensors.dk, &mut self.dk, problem.softmax_scale()),
            (tensors.dv, &mut self.dv, 1.0),
        ] {
            let target = of_keys(tensor);
            for (key, row) in gradient.as_mut_slice().chunks_mut(width).take(keys).enumerate() {
                row.iter_mut().for_each(|x| *x *= factor);
                target.store(kernels, first_key + key, row);
            }
        }
    }

    /// Loads a tile of queries, as it is and transposed, with what belongs to each query.
    ///
    /// # Safety
    /// As for [`backward`]; the queries exist.
    unsafe fn load_queries(
        &mut self,
        backward: &Backward<'_>,
        batch: usize,
        head: usize,
        first_row: usize,
        rows: usize,
    ) -> QueryTile {
        let (kernels, width, block_m) = (backward.kernels, backward.width(), backward.tiles.block_m as usize);
        let padded = rows.next_multiple_of(kernels.lanes.max(backward.padding()));
        let sources = [backward.problem.q(), backward.tensors.dout];
        let tiles = [(&mut self.q, &mut self.q_lanes), (&mut self.dout, &mut self.dout_lanes)];
        for (source, (tile, lanes)) in sources.into_iter().zip(tiles) {
            // SAFETY: passed on to the caller; tiles are `block_m` rows and lanes.
            unsafe {
                let source = backward.rows(source, batch, head);
                source.load_tile(kernels, first_row, [rows, padded], tile.as_mut_slice(), width);
                let (from, to) = (tile.as_ptr(), lanes.as_mut_ptr());
                (kernels.transpose)(from, width, padded, to, block_m, backward.head_dim());
            }
        }
        if backward.pairs.is_some() {
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
        let first = (batch * backward.problem.heads_q() + head) * backward.problem.seqlen_q() as usize + first_row;
        // SAFETY: lse and delta have an entry for each query, and nobody writes them any more.
        let (lse, delta) = unsafe {
            (
                std::slice::from_raw_parts(pointer_mut::<f32>(backward.tensors.lse).add(first), rows),
                std::slice::from_raw_parts(pointer_mut::<f32>(backward.delta).add(first), rows),
            )
        };
        for (to, &lse) in self.lse.as_mut_slice().iter_mut().zip(lse) {
            // Of a query that saw nothing: probabilities are to be 0, not infinite.
            *to = if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse };
        }
        self.delta.as_mut_slice()[..rows].copy_from_slice(delta);
        // Of lanes that are no query, which products of pairs take in: as if it saw nothing.
        self.lse.as_mut_slice()[rows..padded].fill(f32::INFINITY);
        self.delta.as_mut_slice()[rows..padded].fill(0.0);
        self.visible.as_mut_slice()[rows..padded].fill(0.0);
        let rows_are_finite = |tile: &Lines| {
            let mut rows = tile.as_slice().chunks(width).take(rows);
            rows.all(|row| {
                row[..backward.head_dim()]
                    .iter()
                    .fold(true, |all, x| all & x.is_finite())
            })
        };
        QueryTile {
            first_row,
            rows,
            lanes: padded,
            finite: rows_are_finite(&self.q) && rows_are_finite(&self.dout),
        }
    }

    /// A tile of queries passes the keys: adds to all gradients, dQ's in lanes and without its factor.
    ///
    /// # Safety
    /// The processor has the kernels' instructions.
    unsafe fn pass(&mut self, backward: &Backward<'_>, tile: QueryTile, first_key: usize, keys: usize) {
        let head_dim = backward.head_dim();
        for first in (0..keys).step_by(BLOCK) {
            let count = BLOCK.min(keys - first);
            let seen = |row: usize| {
                let end = backward.visibility.visible_end((tile.first_row + row) as u32) as usize;
                end.saturating_sub(first_key + first).min(count)
            };
            if seen(tile.rows - 1) == 0 {
                break; // nor do the blocks after it see anything
            }
            let padded = count.next_multiple_of(backward.padding());
            let masked = seen(0) < padded;
            if masked {
                for (row, visible) in self.visible.as_mut_slice()[..tile.rows].iter_mut().enumerate() {
                    *visible = seen(row) as f32;
                }
            }
            // SAFETY: passed on to the caller; the block is one of the keys, padded as they are.
            unsafe { self.scores(backward, tile, first, padded, masked) };
            let finite = |keys: &Lines| {
                let block = &keys.as_slice()[first * head_dim..][..count * head_dim];
                block.iter().fold(true, |all, x| all & x.is_finite())
            };
            if !masked || tile.finite && finite(&self.keys) && finite(&self.values) {
                // SAFETY: as above.
                unsafe { self.accumulate(backward, tile, first, padded) };
            } else {
                self.accumulate_seen(backward, tile, first, count);
            }
        }
    }

    /// P and dS of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// As for [`pass`](Self::pass); the keys are among those of the task.
    unsafe fn scores(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize, masked: bool) {
        let (kernels, head_dim, stride) = (backward.kernels, backward.head_dim(), backward.tiles.block_m as usize);
        if let Some(pairs) = backward.pairs {
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
        let products = [
            (&self.keys, &self.q_lanes, &mut self.probabilities),
            (&self.values, &self.dout_lanes, &mut self.ds),
        ];
        let products = products.into_iter().filter(|_| backward.pairs.is_none());
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
                    b: lanes.as_ptr(),
                    b_stride: stride,
                    c: product.as_mut_ptr(),
                    c_stride: stride,
                    accumulate: false,
                });
            }
        }
        // SAFETY: passed on to the caller.
        unsafe {
            (kernels.backpropagate)(&Backpropagate {
                keys,
                lanes: tile.lanes,
                scores: self.probabilities.as_mut_ptr(),
                dp: self.ds.as_mut_ptr(),
                stride,
                visible: if masked {
                    self.visible.as_ptr()
                } else {
                    std::ptr::null()
                },
                scale: backward.problem.softmax_scale(),
                lse: self.lse.as_ptr(),
                delta: self.delta.as_ptr(),
            });
        }
    }

    /// Adds what a block of keys gives: dQ in lanes, dK and dV in rows.
    ///
    /// # Safety
    /// As for [`scores`](Self::scores).
    unsafe fn accumulate(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        if let Some(pairs) = backward.pairs {
            // SAFETY: passed on to the caller.
            return unsafe { self.accumulate_pairs(backward, pairs, tile, first, keys) };
        }
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
                b: self.ds.as_ptr(),
                b_stride: stride,
                c: self.dq_lanes.as_mut_ptr(),
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
                    inner: tile.rows,
                    columns: head_dim.next_multiple_of(kernels.lanes),
                    a: weights.as_ptr(),
                    a_stride: stride,
                    transposed: false,
                    b: queries.as_ptr(),
                    b_stride: width,
                    c: gradient.as_mut_ptr().add(first * width),
                    c_stride: width,
                    accumulate: true,
                });
            }
        }
    }

    /// The same by products of pairs.
    ///
    /// # Safety
    /// As for [`scores`](Self::scores).
    unsafe fn accumulate_pairs(
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

    /// The keys transposed, as pairs of bf16 that are neighbours along the keys.
    fn pair_keys(&mut self, backward: &Backward<'_>, keys: usize) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            let rows = self.words.rows.as_mut_ptr();
            (kernels.pair_rows)(self.keys.as_ptr(), head_dim, keys / 2, width, rows.cast(), width);
            let to = self.words.keys_lanes.as_mut_ptr();
            (kernels.transpose)(rows, width, keys / 2, to, backward.owned() / 2, head_dim);
        }
    }

    /// The same where something is not finite and not every query sees every key: 0 times infinity is NaN, so what is not
    /// seen must not even be multiplied by 0.
    fn accumulate_seen(&mut self, backward: &Backward<'_>, tile: QueryTile, first: usize, keys: usize) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        let stride = backward.tiles.block_m as usize;
        let (p, ds) = (self.probabilities.as_slice(), self.ds.as_slice());
        let (q, dout) = (self.q.as_slice(), self.dout.as_slice());
        let (dq, dk, dv) = (
            self.dq_lanes.as_mut_slice(),
            self.dk.as_mut_slice(),
            self.dv.as_mut_slice(),
        );
        for key in 0..keys {
            for lane in 0..tile.rows {
                if key as f32 >= self.visible.as_slice()[lane] {
                    continue;
                }
                let (p, ds) = (p[key * stride + lane], ds[key * stride + lane]);
                for d in 0..head_dim {
                    let (of_key, of_query) = ((first + key) * width + d, lane * width + d);
                    let k = self.keys.as_slice()[(first + key) * head_dim + d];
                    dq[d * stride + lane] = kernels.multiply_add(k, ds, dq[d * stride + lane]);
                    dk[of_key] = kernels.multiply_add(ds, q[of_query], dk[of_key]);
                    dv[of_key] = kernels.multiply_add(p, dout[of_query], dv[of_key]);
                }
            }
        }
    }

    /// Adds dQ of a tile to what tasks before this one have added.
    ///
    /// # Safety
    /// As for [`backward`], and it is this task's turn.
    unsafe fn add_dq(&mut self, backward: &Backward<'_>, dq: &GradientRows) {
        let (kernels, head_dim, width) = (backward.kernels, backward.head_dim(), backward.width());
        let scale = backward.problem.softmax_scale();
        // The rows of q are not needed any more.
        let rows = &mut self.q;
        // SAFETY: the tile is `block_m` lanes, the rows are as many, of whole registers.
        unsafe {
            let from = self.dq_lanes.as_ptr();
            let stride = backward.tiles.block_m as usize;
            (kernels.transpose)(from, stride, head_dim, rows.as_mut_ptr(), width, dq.count);
        }
        for (i, row) in rows.as_mut_slice().chunks_mut(width).take(dq.count).enumerate() {
            let row = &mut row[..head_dim];
            row.iter_mut().for_each(|x| *x *= scale);
            let sums = dq.sums.map(|sums| {
                // SAFETY: one row of the sums, which are this task's for now.
                unsafe { std::slice::from_raw_parts_mut(sums.add((dq.first_sum + i) * head_dim), head_dim) }
            });
            if !dq.is_first {
                match &sums {
                    Some(sums) => row.iter_mut().zip(sums.iter()).for_each(|(x, sum)| *x += sum),
                    None => {
                        let before = &mut self.dout.as_mut_slice()[..head_dim]; // nor are those of dout
                        dq.rows.load(kernels, dq.first_row + i, before);
                        row.iter_mut().zip(before).for_each(|(x, sum)| *x += *sum);
                    }
                }
            }
            match sums {
                Some(sums) if !dq.is_last => sums.copy_from_slice(row),
                _ => dq.rows.store(kernels, dq.first_row + i, row),
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

/// Where the dQ of a tile of queries is added up.
struct GradientRows {
    rows: Head,
    sums: Option<*mut f32>,
    /// The tile's first row in the sums.
    first_sum: usize,
    first_row: usize,
    count: usize,
    /// Whether nothing has been added yet.
    is_first: bool,
    /// Whether nothing will be added any more.
    is_last: bool,
}

/// Waits until `added` is `count`.
fn wait_for(added: &AtomicU32, count: u32) {
    let mut spins = 0_u32;
    while added.load(Ordering::Acquire) != count {
        spins += 1;
        if spins < 1000 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}
