//! The forward pass on the CPU: the loop of the GPU kernels, one task for each tile of queries of each head.
//!
//! Scores are computed as K Q^T and the output as V^T P^T, so that queries are lanes (see `kernels.rs`). Keys are taken in
//! segments, each summed from nothing and then merged by largest score, in order: whether one task takes all segments of
//! a tile or each is a task of its own leaves no trace in the result.

use std::ops::Range;
use std::sync::OnceLock;

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;

use super::kernels::{Kernels, MAX_LANES, Merge, One, PairProduct, Pairs, Product, ROWS, SIDE, Softmax};
use super::pointer_mut;
use super::team::{Lines, Team};
use super::tensor::{Head, Panels, Visibility};
use crate::plan::{Plan, Tiles, kernel_scale};
use crate::problem::Problem;

/// Keys of a segment at least.
const SEGMENT: u32 = 2048;

/// Segments of a sequence at most.
const MAX_SEGMENTS: u32 = 16;

/// So few queries are solved one by one, lanes being elements of a head: as lanes they would leave most of a register idle.
const FEW: u32 = 4;

/// One forward problem on its way.
struct Forward<'a> {
    kernels: &'static Kernels,
    problem: &'a Problem,
    /// How pairs of bf16 are multiplied, if that is how this problem is solved.
    pairs: Option<&'static Pairs>,
    /// Whether queries are solved one by one. Tiles of q and the output then hold rows of `panels.depth`.
    few: bool,
    panels: Panels,
    tiles: Tiles,
    visibility: Visibility,
    out: u64,
    lse: u64,
}

/// A tile of queries of one head.
#[derive(Clone, Copy)]
struct Tile {
    q: Head,
    k: Head,
    v: Head,
    out: Head,
    lse: *mut f32,
    first_row: u32,
    rows: usize,
    /// Tiles of keys that any of the queries sees.
    blocks: u32,
    /// Those of them that every query sees all of.
    whole_blocks: u32,
}

/// Computes out and lse.
///
/// # Safety
/// As for [`Backend::run`](crate::device::Backend::run).
pub(super) unsafe fn forward(team: &Team<'_>, plan: &Plan, out: u64, lse: u64) {
    let (problem, tiles) = (plan.problem(), plan.tiles());
    let few = problem.seqlen_q() <= FEW;
    let pairs = team.kernels.pairs.filter(|_| problem.dtype() == Dtype::Bf16 && !few);
    let forward = Forward {
        kernels: team.kernels,
        pairs,
        few,
        panels: Panels {
            lanes: if pairs.is_some() { 2 * SIDE } else { team.kernels.panel },
            depth: (problem.head_dim() as usize).next_multiple_of(SIDE),
        },
        problem,
        tiles,
        visibility: Visibility::new(problem),
        out,
        lse,
    };
    let query_tiles = problem.seqlen_q().div_ceil(tiles.block_m) as usize;
    let heads = problem.batch() * problem.heads_q();
    let tasks = heads * query_tiles;
    // Heavy tiles first: under a causal mask the last see the most keys.
    let tile = |task: usize| forward.tile(task / query_tiles, query_tiles - 1 - task % query_tiles);
    let segments = forward.segments(problem.seqlen_k().div_ceil(tiles.block_n)).count();
    if tasks >= 2 * team.threads || segments == 1 {
        let scratch = || (Scratch::new(&forward), State::new(&forward), State::new(&forward));
        team.share(tasks, scratch, |(scratch, state, partial), task| {
            let tile = tile(task);
            scratch.load_query(&forward, &tile);
            for (index, blocks) in forward.segments(tile.blocks).enumerate() {
                if index == 0 {
                    scratch.attend(&forward, &tile, blocks, state);
                } else {
                    scratch.attend(&forward, &tile, blocks, partial);
                    state.merge(&forward, tile.rows, partial);
                }
            }
            scratch.store(&forward, &tile, state);
        });
        return;
    }
    let partials: Vec<OnceLock<State>> = (0..tasks * segments).map(|_| OnceLock::new()).collect();
    team.share(
        tasks * segments,
        || Scratch::new(&forward),
        |scratch, task| {
            let tile = tile(task / segments);
            if let Some(blocks) = forward.segments(tile.blocks).nth(task % segments) {
                let mut state = State::new(&forward);
                scratch.load_query(&forward, &tile);
                scratch.attend(&forward, &tile, blocks, &mut state);
                let _ = partials[task].set(state); // nobody else has this task
            }
        },
    );
    let scratch = || (Scratch::new(&forward), State::new(&forward));
    team.share(tasks, scratch, |(scratch, state), task| {
        let mut parts = partials[task * segments..][..segments].iter().filter_map(OnceLock::get);
        if let Some(first) = parts.next() {
            state.copy(first);
            parts.for_each(|part| state.merge(&forward, tile(task).rows, part));
        }
        scratch.store(&forward, &tile(task), state);
    });
}

impl Forward<'_> {
    fn head_dim(&self) -> usize {
        self.problem.head_dim() as usize
    }

    /// The segments of the first `blocks` tiles of keys; at least one, if an empty one. Their length depends on
    /// seqlen_k alone.
    fn segments(&self, blocks: u32) -> impl Iterator<Item = Range<u32>> {
        let longest = self.problem.seqlen_k().div_ceil(MAX_SEGMENTS).max(SEGMENT);
        let length = longest.div_ceil(self.tiles.block_n);
        (0..blocks.div_ceil(length).max(1)).map(move |i| i * length..((i + 1) * length).min(blocks))
    }

    /// Tile `tile` of head `heads`, all batches counted.
    fn tile(&self, heads: usize, tile: usize) -> Tile {
        let (problem, Tiles { block_m, block_n }) = (self.problem, self.tiles);
        let (batch, head) = (heads / problem.heads_q(), heads % problem.heads_q());
        let kv_head = head / (problem.heads_q() / problem.heads_kv());
        let first_row = tile as u32 * block_m;
        let rows = block_m.min(problem.seqlen_q() - first_row);
        let first = heads * problem.seqlen_q() as usize + first_row as usize;
        let address = self.out;
        let (blocks, whole_blocks) = self.visibility.key_blocks(first_row, rows, block_n);
        // SAFETY: the caller of `forward` vouches for the four tensors and lse; batch, head and kv_head are within them.
        // Rows of out do not overlap and no two tasks have one in common, so each is written by one thread only.
        unsafe {
            let rows_of = |tensor, head| Head::new(tensor, problem.dtype(), batch, head, self.head_dim());
            Tile {
                q: rows_of(problem.q(), head),
                k: rows_of(problem.k(), kv_head),
                v: rows_of(problem.v(), kv_head),
                out: rows_of(
                    StridedTensor {
                        address,
                        ..problem.out()
                    },
                    head,
                ),
                lse: pointer_mut::<f32>(self.lse).add(first),
                first_row,
                rows: rows as usize,
                blocks,
                whole_blocks,
            }
        }
    }

    /// Words of a row of keys as pairs, in whole tiles.
    fn words(&self) -> usize {
        self.head_dim().next_multiple_of(2 * SIDE) / 2
    }

    /// Queries of a tile, rounded up to whole panels.
    fn lanes(&self) -> usize {
        (self.tiles.block_m as usize).next_multiple_of(self.panels.lanes)
    }

    /// (first lane, lanes in use) of the panels that hold `rows` queries.
    fn panels(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (panel, lanes) = (self.panels.lanes, self.kernels.lanes);
        (0..rows)
            .step_by(panel)
            .map(move |first| (first, (rows - first).min(panel).next_multiple_of(lanes)))
    }
}

/// The softmax of a tile's queries, as far as their keys have been seen, and the output not yet divided by the sums.
struct State {
    max: Lines,
    sum: Lines,
    /// Panel by panel, `depth x lanes`.
    output: Lines,
}

impl State {
    fn new(forward: &Forward<'_>) -> Self {
        let lanes = forward.lanes();
        Self {
            max: Lines::new(lanes),
            sum: Lines::new(lanes),
            output: Lines::new(lanes * forward.panels.depth),
        }
    }

    /// Nothing seen yet.
    fn clear(&mut self) {
        self.max.as_mut_slice().fill(f32::NEG_INFINITY);
        self.sum.as_mut_slice().fill(0.0);
        self.output.as_mut_slice().fill(0.0);
    }

    fn copy(&mut self, from: &Self) {
        let pairs = [
            (&mut self.max, &from.max),
            (&mut self.sum, &from.sum),
            (&mut self.output, &from.output),
        ];
        pairs
            .into_iter()
            .for_each(|(to, from)| to.as_mut_slice().copy_from_slice(from.as_slice()));
    }

    /// Takes in what another run of keys gave for one query: largest scores, sums and outputs.
    fn merge_one(&mut self, forward: &Forward<'_>, row: usize, other: &Self) {
        let (_, scale_log2, _) = kernel_scale(forward.problem.softmax_scale());
        let exp2 = |x: f32| f64::from(x * scale_log2).exp2() as f32;
        let (left, right) = (self.max.as_slice()[row], other.max.as_slice()[row]);
        let max = if left > right { left } else { right };
        let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (of_left, of_right) = (exp2(left - origin), exp2(right - origin));
        self.max.as_mut_slice()[row] = max;
        let depth = forward.panels.depth;
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

    /// Takes in what another run of keys gave.
    fn merge(&mut self, forward: &Forward<'_>, rows: usize, other: &Self) {
        let (_, scale_log2, _) = kernel_scale(forward.problem.softmax_scale());
        let (head_dim, depth) = (forward.head_dim(), forward.panels.depth);
        if forward.few {
            return (0..rows).for_each(|row| self.merge_one(forward, row, other));
        }
        for (first, lanes) in forward.panels(rows) {
            // SAFETY: the panel is one of both states, which are of one size.
            unsafe {
                (forward.kernels.merge)(&Merge {
                    lanes,
                    stride: forward.panels.lanes,
                    head_dim,
                    scale_log2,
                    max: self.max.as_mut_ptr().add(first),
                    sum: self.sum.as_mut_ptr().add(first),
                    output: self.output.as_mut_ptr().add(first * depth),
                    other_max: other.max.as_ptr().add(first),
                    other_sum: other.sum.as_ptr().add(first),
                    other_output: other.output.as_ptr().add(first * depth),
                });
            }
        }
    }
}

/// What products of pairs of bf16 read: words of two neighbours along the inner axis.
struct Words {
    /// Panel by panel, `words x lanes`.
    query: Lines,
    /// `block_n x words`.
    keys: Lines,
    /// `depth x block_n / 2`, and the transpose.
    values: Lines,
    rows: Lines,
    /// `block_n / 2 x lanes`: exponentials.
    scores: Lines,
}

impl Words {
    fn new(forward: &Forward<'_>) -> Self {
        let (block_n, depth, words) = (forward.tiles.block_n as usize, forward.panels.depth, forward.words());
        let lines = |count: usize| Lines::new(if forward.pairs.is_some() { count } else { 0 });
        Self {
            query: lines(forward.lanes() * words),
            keys: lines(block_n * words),
            values: lines(depth * block_n / 2),
            rows: lines(block_n / 2 * depth),
            scores: lines(block_n / 2 * forward.panels.lanes),
        }
    }
}

/// The tiles that a thread works in: what is shared memory and registers on a GPU.
struct Scratch {
    /// Q times the sign of the scale, panel by panel, `depth x lanes`.
    query: Lines,
    /// What products of pairs read; empty if there are none.
    words: Words,
    /// `block_n x head_dim`.
    keys: Lines,
    values: Lines,
    /// `block_n x lanes`: scores, then exponentials.
    scores: Lines,
    /// How many keys of a tile each query sees.
    visible: Lines,
    /// A few rows of q or out, `MAX_LANES x head_dim`.
    rows: Lines,
}

impl Scratch {
    fn new(forward: &Forward<'_>) -> Self {
        let (head_dim, lanes) = (forward.head_dim(), forward.lanes());
        let block_n = forward.tiles.block_n as usize;
        Self {
            query: Lines::new(lanes * forward.panels.depth),
            words: Words::new(forward),
            keys: Lines::new(block_n * head_dim),
            values: Lines::new(block_n * head_dim + MAX_LANES),
            scores: Lines::new(block_n * forward.panels.lanes),
            visible: Lines::new(lanes),
            rows: Lines::new(MAX_LANES * head_dim.next_multiple_of(MAX_LANES)),
        }
    }

    fn load_query(&mut self, forward: &Forward<'_>, tile: &Tile) {
        let (_, _, sign) = kernel_scale(forward.problem.softmax_scale());
        let (first, query) = (tile.first_row as usize, &mut self.query);
        if forward.few {
            let width = forward.panels.depth;
            tile.q.load_tile(
                forward.kernels,
                first,
                [tile.rows, tile.rows],
                query.as_mut_slice(),
                width,
            );
            query.as_mut_slice()[..tile.rows * width]
                .iter_mut()
                .for_each(|x| *x *= sign);
            return;
        }
        tile.q.load_panels(
            forward.kernels,
            first..first + tile.rows,
            sign,
            forward.panels,
            query,
            &mut self.rows,
        );
        if forward.pairs.is_some() {
            self.pair_queries(forward, tile.rows);
        }
    }

    /// Attention of the tile's queries to the keys of some blocks.
    fn attend(&mut self, forward: &Forward<'_>, tile: &Tile, blocks: Range<u32>, state: &mut State) {
        state.clear();
        // SAFETY: the processor has the instructions of its kernels.
        forward.pairs.inspect(|pairs| unsafe { (pairs.begin)() });
        for n in blocks {
            self.attend_block(forward, tile, n, state);
        }
        // SAFETY: as above.
        forward.pairs.inspect(|pairs| unsafe { (pairs.end)() });
    }

    /// Takes in the keys and values of tile `n`.
    fn attend_block(&mut self, forward: &Forward<'_>, tile: &Tile, n: u32, state: &mut State) {
        let (kernels, head_dim, block_n) = (forward.kernels, forward.head_dim(), forward.tiles.block_n);
        let first_key = n * block_n;
        let seen = |row: usize| {
            let end = forward.visibility.visible_end(tile.first_row + row as u32);
            end.saturating_sub(first_key).min(block_n) as usize
        };
        if forward.few {
            return (0..tile.rows)
                .for_each(|row| self.attend_one(forward, tile, row, first_key as usize, seen(row), state));
        }
        let keys = seen(tile.rows - 1); // the last query of the tile sees the most
        let padded = keys.next_multiple_of(if forward.pairs.is_some() { 2 * SIDE } else { ROWS });
        let first = first_key as usize;
        tile.v
            .load_tile(kernels, first, [keys, padded], self.values.as_mut_slice(), head_dim);
        if forward.pairs.is_some() {
            let stride = forward.words();
            tile.k.copy_halves(first, [keys, padded], &mut self.words.keys, stride);
            self.pair_values(forward, padded);
        } else {
            let tile_of_keys = self.keys.as_mut_slice();
            tile.k.load_tile(kernels, first, [keys, padded], tile_of_keys, head_dim);
        }
        let masked = n >= tile.whole_blocks;
        if masked {
            for (row, visible) in self.visible.as_mut_slice()[..tile.rows].iter_mut().enumerate() {
                *visible = seen(row) as f32;
            }
        }
        let values = &self.values.as_slice()[..keys * head_dim];
        let finite = !masked || values.iter().fold(true, |all, x| all & x.is_finite());
        for (first, lanes) in forward.panels(tile.rows) {
            let visible = masked.then(|| self.visible.as_ptr().wrapping_add(first));
            // SAFETY: the panel is one of the tile's, and tiles are as large as the plan says.
            unsafe {
                self.scores_of_panel(forward, first, lanes, padded, visible, state);
                if finite {
                    self.add_values(forward, first, lanes, padded, state);
                } else {
                    self.add_seen_values(forward, first, lanes.min(tile.rows - first), state);
                }
            }
        }
    }

    /// One query takes in `keys` keys and values.
    fn attend_one(
        &mut self,
        forward: &Forward<'_>,
        tile: &Tile,
        row: usize,
        first_key: usize,
        keys: usize,
        state: &mut State,
    ) {
        let (_, scale_log2, _) = kernel_scale(forward.problem.softmax_scale());
        let depth = forward.panels.depth;
        let ((k, k_stride_bytes), (v, v_stride_bytes)) = (tile.k.row(first_key), tile.v.row(first_key));
        // SAFETY: the processor has the instructions, the keys exist, and rows of q and the output are whole registers.
        unsafe {
            (forward.kernels.one)(&One {
                keys,
                dtype: forward.problem.dtype(),
                k,
                k_stride_bytes,
                v,
                v_stride_bytes,
                head_dim: forward.head_dim(),
                query: self.query.as_ptr().add(row * depth),
                scores: self.scores.as_mut_ptr(),
                scale_log2,
                max: state.max.as_mut_ptr().add(row),
                sum: state.sum.as_mut_ptr().add(row),
                output: state.output.as_mut_ptr().add(row * depth),
            });
        }
    }

    /// Scores of the panel that starts at lane `first`, and their exponentials.
    ///
    /// # Safety
    /// The processor has the kernels' instructions, and the panel is one of the tile's.
    unsafe fn scores_of_panel(
        &mut self,
        forward: &Forward<'_>,
        first: usize,
        lanes: usize,
        keys: usize,
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
                    a: self.keys.as_ptr(),
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
    unsafe fn add_values(&mut self, forward: &Forward<'_>, first: usize, lanes: usize, keys: usize, state: &mut State) {
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
                    a: self.values.as_ptr(),
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

    /// The queries as pairs of bf16, neighbours within a head.
    fn pair_queries(&mut self, forward: &Forward<'_>, rows: usize) {
        let (kernels, Panels { lanes, depth }) = (forward.kernels, forward.panels);
        for (first, used) in forward.panels(rows) {
            // SAFETY: the processor has the instructions; both are panels of their tiles.
            unsafe {
                let (from, to) = (
                    self.query.as_ptr().add(first * depth),
                    self.words.query.as_mut_ptr().cast::<u32>().add(first * forward.words()),
                );
                (kernels.pair_rows)(from, lanes, forward.head_dim() / 2, used, to, lanes);
            }
        }
    }

    /// The values as pairs of bf16, neighbours along the keys, a row for each element of a head.
    fn pair_values(&mut self, forward: &Forward<'_>, keys: usize) {
        let (kernels, head_dim) = (forward.kernels, forward.head_dim());
        let width = head_dim.next_multiple_of(MAX_LANES);
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            let (from, pairs) = (self.values.as_ptr(), self.words.rows.as_mut_ptr());
            (kernels.pair_rows)(from, head_dim, keys / 2, width, pairs.cast(), width);
            let to = self.words.values.as_mut_ptr();
            (kernels.transpose)(pairs, width, keys / 2, to, forward.tiles.block_n as usize / 2, head_dim);
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

    /// Divides by the sums, and writes out and lse.
    fn store(&mut self, forward: &Forward<'_>, tile: &Tile, state: &State) {
        let magnitude = f64::from(forward.problem.softmax_scale().abs());
        let (max, sum) = (state.max.as_slice(), state.sum.as_slice());
        let sees_a_key = |row: usize| forward.visibility.visible_end(tile.first_row + row as u32) > 0;
        let inverse = |row: usize| match sum[row] {
            _ if !sees_a_key(row) => 0.0,
            0.0 => f32::NAN, // every score is minus infinity: 0 / 0
            sum => 1.0 / sum,
        };
        let (first, inverses) = (tile.first_row as usize, (0..tile.rows).map(inverse));
        if forward.few {
            for (row, inverse) in inverses.enumerate() {
                let output = &state.output.as_slice()[row * forward.panels.depth..];
                for (to, x) in self.rows.as_mut_slice().iter_mut().zip(&output[..forward.head_dim()]) {
                    *to = if inverse == 0.0 { 0.0 } else { x * inverse };
                }
                tile.out.store(forward.kernels, first + row, self.rows.as_slice());
            }
        } else {
            let output = &state.output;
            tile.out
                .store_panels(forward.kernels, first, inverses, forward.panels, output, &mut self.rows);
        }
        for row in 0..tile.rows {
            let lse = if !sees_a_key(row) || sum[row] == 0.0 {
                f32::NEG_INFINITY
            } else {
                (f64::from(max[row]) * magnitude + f64::from(sum[row]).ln()) as f32
            };
            // SAFETY: lse has an entry for each of the tile's queries, and this task alone writes it.
            unsafe { tile.lse.add(row).write(lse) };
        }
    }
}
