//! Tiles of a thread: they load keys and queries, and store the gradients of keys.

use super::pairs::Words;
use super::tables::OwnSums;
use super::weighed::Weighed;
use super::{BLOCK, Backward, Kind};
use crate::device::cpu::kernels::MAX_LANES;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::program::{Machines, Walk};
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::QueryRows;

/// A tile of queries of one head, as it passes a run of keys.
#[derive(Clone, Copy)]
pub(super) struct QueryTile {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// Lanes in use: rows, padded; where a program hides the others, a part of them, in whole words of pairs.
    pub(super) first_lane: usize,
    pub(super) lanes: usize,
    /// True if q and dout are finite.
    pub(super) finite: bool,
    /// True if they are multiplied as bf16 pairs, if keys and values are.
    pub(super) fits: bool,
}

fn all(fit: &[bool]) -> bool {
    !fit.contains(&false)
}

/// Tiles that a thread works in. "width" is head_dim in whole registers, "head_dim_v" and "width_v" are those of values.
pub(super) struct Scratch {
    /// Operands of bf16 pair products; empty without them.
    pub(super) words: Words,
    /// Keys that a task owns: `block_n x head_dim`.
    pub(super) keys: Lines,
    /// Their values: `block_n x head_dim_v`.
    pub(super) values: Lines,
    /// True if the keys are multiplied as bf16 pairs.
    pub(super) keys_fit: bool,
    /// Gradients of the keys, `block_n x width`, and of the values, `block_n x width_v`.
    pub(super) dk: Lines,
    pub(super) dv: Lines,
    /// Queries of a tile, `block_m x width`, and the gradients of their outputs, `block_m x width_v`.
    pub(super) q: Lines,
    pub(super) dout: Lines,
    /// q and dout of a tile transposed, `head_dim x block_m` and `head_dim_v x block_m`; and the gradient of q, `width x
    /// block_m`.
    pub(super) q_lanes: Lines,
    pub(super) dout_lanes: Lines,
    pub(super) dq_lanes: Lines,
    /// S, then P: `BLOCK x block_m`.
    pub(super) probabilities: Lines,
    /// dP, then dS: `BLOCK x block_m`.
    pub(super) ds: Lines,
    /// row_max of each query, or lse if row_max is not known.
    pub(super) origins: Lines,
    /// `1 / row_sum` of each query.
    pub(super) inverse_sums: Lines,
    pub(super) delta: Lines,
    /// Sums over the keys, where delta is made of them.
    pub(super) weighed: Weighed,
    /// Number of keys of a block that each query sees.
    pub(super) visible: Lines,
    /// Machines of the score program, if there is one.
    pub(super) machines: Option<Machines>,
    /// Visibility of the run of keys by the program for the tile's queries.
    pub(super) walk: Walk,
    /// Sums of this thread for gradients of tables.
    pub(super) own_sums: OwnSums,
}

impl Scratch {
    pub(super) fn new(backward: &Backward<'_>) -> Self {
        let ([head_dim, head_dim_v], [width, width_v]) = (backward.head_dims(), backward.widths());
        let (block_m, block_n) = (backward.tiles.block_m as usize, backward.owned);
        let program = backward.program.as_ref();
        Self {
            words: Words::new(backward),
            keys: Lines::new(block_n * head_dim + MAX_LANES),
            values: Lines::new(block_n * head_dim_v),
            keys_fit: false,
            dk: Lines::new(block_n * width),
            dv: Lines::new(block_n * width_v),
            q: Lines::new(block_m * width),
            dout: Lines::new(block_m * width_v),
            q_lanes: Lines::new(head_dim * block_m),
            dout_lanes: Lines::new(head_dim_v * block_m),
            dq_lanes: Lines::new(width * block_m),
            probabilities: Lines::new(BLOCK * block_m),
            ds: Lines::new(BLOCK * block_m),
            origins: Lines::new(block_m),
            inverse_sums: Lines::new(block_m),
            delta: Lines::new(block_m),
            weighed: Weighed::default(),
            visible: Lines::new(block_m),
            machines: program.map(|program| Machines::new(&program.scores, block_m, BLOCK)),
            walk: Walk::default(),
            own_sums: program.map_or(OwnSums::new(), |program| program.sums.own_sums()),
        }
    }

    /// A thread's tiles for a problem: those that it has if they fit, else new ones.
    pub(super) fn of<'a>(own: &'a mut Option<(Kind, Self)>, backward: &Backward<'_>, problem: usize) -> &'a mut Self {
        let kind = backward.kind(problem);
        let kept = own.take().filter(|(of, _)| *of == kind);
        let (_, scratch) = own.insert(kept.unwrap_or_else(|| (kind, Self::new(backward))));
        scratch
    }

    /// Loads keys and values of a head, from `first_key` on, and clears their gradients.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward); the keys exist.
    pub(super) unsafe fn load_keys(
        &mut self,
        backward: &Backward<'_>,
        batch: usize,
        kv_head: usize,
        first_key: usize,
        keys: usize,
    ) {
        let (problem, kernels) = (backward.problem, backward.kernels);
        let ([head_dim, head_dim_v], [width, width_v]) = (backward.head_dims(), backward.widths());
        let padded = keys.next_multiple_of(backward.padding());
        let sources = [(problem.k(), head_dim), (problem.v(), head_dim_v)];
        // SAFETY: passed on to the caller; the heads are within their tensors.
        let sources = sources.map(|(tensor, head_dim)| unsafe { backward.rows(tensor, batch, kv_head, head_dim) });
        for (source, tile) in sources.iter().zip([&mut self.keys, &mut self.values]) {
            source.load_tile(kernels, first_key, [keys, padded], tile.as_mut_slice(), source.head_dim);
        }
        self.words.keys_fit = backward.fit(&self.keys, [head_dim; 2], keys);
        self.keys_fit = all(&self.words.keys_fit) && all(&backward.fit(&self.values, [head_dim_v; 2], keys));
        if self.words.keys_fit.contains(&true) {
            self.pair_keys(backward, sources, first_key, [keys, padded]);
        }
        self.dk.as_mut_slice()[..padded * width].fill(0.0);
        self.dv.as_mut_slice()[..padded * width_v].fill(0.0);
    }

    /// Loads a tile of queries, also transposed, and the statistics of each query.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward); the queries exist.
    pub(super) unsafe fn load_queries(
        &mut self,
        backward: &Backward<'_>,
        batch: usize,
        head: usize,
        first_row: usize,
        rows: usize,
    ) -> QueryTile {
        let (kernels, block_m) = (backward.kernels, backward.tiles.block_m as usize);
        let ([head_dim, head_dim_v], [width, width_v]) = (backward.head_dims(), backward.widths());
        let padded = rows.next_multiple_of(kernels.lanes.max(backward.padding()));
        let first = (batch * backward.problem.heads_q() + head) * backward.problem.seqlen_q() as usize + first_row;
        let of_queries = |tensor| QueryRows::new(tensor, backward.problem);
        let (lse, statistics) = (
            of_queries(backward.tensors.lse),
            backward.tensors.statistics.map(|tensors| tensors.map(of_queries)),
        );
        // SAFETY: each of these has a number for each query, and no thread writes them meanwhile.
        let number = |of: &QueryRows, row| unsafe { of.at(first + row).read() };
        let load = |to: &mut [f32], from: &QueryRows| {
            let rows = to.iter_mut().take(rows).enumerate();
            rows.for_each(|(row, to)| *to = number(from, row));
        };
        let sees_nothing = |row: &usize| match (&backward.program, &statistics) {
            (None, _) => backward.visibility.visible_end((first_row + row) as u32) == 0,
            (Some(_), Some([_, row_sum])) => number(row_sum, *row) == 0.0,
            (Some(_), None) => number(&lse, *row) == f32::NEG_INFINITY,
        };
        let unseeing: Vec<usize> = (0..rows).filter(sees_nothing).collect();
        let tiles = [
            (backward.problem.q(), &mut self.q, &mut self.q_lanes, [head_dim, width]),
            (
                backward.tensors.dout,
                &mut self.dout,
                &mut self.dout_lanes,
                [head_dim_v, width_v],
            ),
        ];
        for (source, tile, lanes, [head_dim, width]) in tiles {
            // SAFETY: passed on to the caller; tiles are `block_m` rows and lanes.
            unsafe {
                let source = backward.rows(source, batch, head, head_dim);
                source.load_tile(kernels, first_row, [rows, padded], tile.as_mut_slice(), width);
                // Queries that see no key have no effect, whatever they hold.
                for row in &unseeing {
                    tile.as_mut_slice()[row * width..][..width].fill(0.0);
                }
                let (from, to) = (tile.as_ptr(), lanes.as_mut_ptr());
                (kernels.transpose)(from, width, padded, to, block_m, head_dim);
            }
        }
        self.words.queries_fit = backward.fit(&self.q, [head_dim, width], rows);
        let fits = all(&self.words.queries_fit) && all(&backward.fit(&self.dout, [head_dim_v, width_v], rows));
        if self.words.queries_fit.contains(&true) {
            self.pair_queries(backward, padded);
        }
        let origins = self.origins.as_mut_slice();
        match &statistics {
            Some([row_max, row_sum]) => {
                load(origins, row_max);
                let sums = self.inverse_sums.as_mut_slice();
                load(sums, row_sum);
                let inverse = |sum: f32| if sum == 0.0 { f32::NAN } else { 1.0 / sum };
                sums[..rows].iter_mut().for_each(|sum| *sum = inverse(*sum));
                sums[rows..padded].fill(0.0);
            }
            None => load(origins, &lse),
        }
        // Where a query sees no key, probabilities are to be 0. If it sees keys, an lse of -inf or a row_sum of 0 makes them NaN.
        // SAFETY: delta has a number for each query, and no thread writes it any more.
        let delta = unsafe { std::slice::from_raw_parts(pointer_mut::<f32>(backward.delta).add(first), rows) };
        self.delta.as_mut_slice()[..rows].copy_from_slice(delta);
        // An infinite row_max would be NaN times a scale of 0; there the inverse sum of 0 makes the weights 0.
        let nothing = match statistics {
            Some(_) => 0.0,
            None => f32::INFINITY,
        };
        for row in unseeing {
            origins[row] = nothing;
            self.inverse_sums.as_mut_slice()[row] = 0.0;
            self.delta.as_mut_slice()[row] = 0.0;
        }
        // Products of pairs also read the lanes past the last query: they get the values of a query that sees no key.
        origins[rows..padded].fill(nothing);
        self.delta.as_mut_slice()[rows..padded].fill(0.0);
        self.visible.as_mut_slice()[rows..padded].fill(0.0);
        let rows_are_finite = |tile: &Lines, [head_dim, width]: [usize; 2]| {
            let is_finite = |row: &[f32]| row[..head_dim].iter().fold(true, |all, x| all & x.is_finite());
            tile.as_slice().chunks(width).take(rows).all(is_finite)
        };
        QueryTile {
            first_row,
            rows,
            first_lane: 0,
            lanes: padded,
            finite: rows_are_finite(&self.q, [head_dim, width]) && rows_are_finite(&self.dout, [head_dim_v, width_v]),
            fits,
        }
    }

    /// Writes dK and dV of the loaded keys.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward); no other task has these keys.
    pub(super) unsafe fn store_key_gradients(
        &mut self,
        backward: &Backward<'_>,
        batch: usize,
        kv_head: usize,
        first_key: usize,
        keys: usize,
    ) {
        let (problem, tensors, kernels) = (backward.problem, backward.tensors, backward.kernels);
        let lengths = backward.head_dims().into_iter().zip(backward.widths());
        let gradients = [
            (tensors.dk, &mut self.dk, problem.softmax_scale()),
            (tensors.dv, &mut self.dv, 1.0),
        ];
        for ((tensor, gradient, factor), (head_dim, width)) in gradients.into_iter().zip(lengths) {
            // SAFETY: passed on to the caller; the heads are within their tensors.
            let target = unsafe { backward.rows(tensor, batch, kv_head, head_dim) };
            for (key, row) in gradient.as_mut_slice().chunks_mut(width).take(keys).enumerate() {
                row.iter_mut().for_each(|x| *x *= factor);
                target.store(kernels, first_key + key, row);
            }
        }
    }
}
