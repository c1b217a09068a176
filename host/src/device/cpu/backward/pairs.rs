//! The five products of bf16 pairs: the words they read, and how they are packed.

use super::scratch::{QueryTile, Scratch};
use super::{BLOCK, Backward};
use crate::device::cpu::kernels::{PairProduct, Pairing, Pairs, SIDE, Terms};
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::Head;

/// Operands of bf16 pair products: words of two numbers along the inner axis, part after part. Queries of a word are
/// [`SIDE`] apart.
pub(super) struct Words {
    /// Keys that a task owns, as pairs within a head: `block_n x words`; and their values.
    keys: Lines,
    values: Lines,
    /// K transposed, as pairs of keys: `width x block_n / 2`.
    keys_lanes: Lines,
    /// Queries of a tile, as pairs within a head: `words x block_m`.
    q_lanes: Lines,
    dout_lanes: Lines,
    /// Queries of a tile, as pairs of queries: `block_m / 2 x width`.
    q: Lines,
    dout: Lines,
    /// P and dS, as pairs of queries: `BLOCK x block_m / 2`.
    probabilities: Lines,
    ds: Lines,
    /// dS, as pairs of keys: `BLOCK / 2 x block_m`.
    ds_lanes: Lines,
    /// Pairs of keys, before they are transposed: `block_n / 2 x width`.
    rows: Lines,
    /// Scores by pair products, if only some numbers may be split: `BLOCK x block_m`.
    scores: Lines,
    /// Keys of the task, and queries of the tile, that may be split.
    pub(super) keys_fit: Vec<bool>,
    pub(super) queries_fit: Vec<bool>,
}

/// Returns the words from one row of transposed keys to the next. It is a cache line more than needed, so that rows a
/// power of two apart do not share a few sets of L1.
fn keys_stride(backward: &Backward<'_>) -> usize {
    backward.owned / 2 + SIDE
}

/// Returns the words from one row of pairs of queries to the next: of q, and of dout.
fn queries_strides(backward: &Backward<'_>) -> [usize; 2] {
    backward.widths().map(|width| width + SIDE)
}

/// Number of words of one part of each operand; of two, the first is as wide as q and k, the second as v and dout.
struct Sizes {
    keys: [usize; 2],
    keys_lanes: usize,
    key_rows: usize,
    q_lanes: [usize; 2],
    q: [usize; 2],
    scores: usize,
}

impl Sizes {
    fn new(backward: &Backward<'_>) -> Self {
        let ([width, _], words) = (backward.widths(), backward.words());
        let (block_m, block_n) = (backward.tiles.block_m as usize, backward.owned);
        Self {
            keys: words.map(|words| block_n * words),
            keys_lanes: width * keys_stride(backward),
            key_rows: width * block_n / 2,
            q_lanes: words.map(|words| words * block_m),
            q: queries_strides(backward).map(|stride| block_m / 2 * stride),
            scores: BLOCK * block_m / 2,
        }
    }
}

impl Words {
    pub(super) fn new(backward: &Backward<'_>) -> Self {
        let sizes = Sizes::new(backward);
        let lines = |part: usize| {
            let parts = if backward.pairs.is_some() { backward.parts } else { 0 };
            Lines::new(parts * part)
        };
        Self {
            keys: lines(sizes.keys[0]),
            values: lines(sizes.keys[1]),
            keys_lanes: lines(sizes.keys_lanes),
            q_lanes: lines(sizes.q_lanes[0]),
            dout_lanes: lines(sizes.q_lanes[1]),
            q: lines(sizes.q[0]),
            dout: lines(sizes.q[1]),
            probabilities: lines(sizes.scores),
            ds: lines(sizes.scores),
            ds_lanes: lines(sizes.scores),
            rows: lines(sizes.key_rows),
            scores: Lines::new(if backward.splits() { 2 * sizes.scores } else { 0 }),
            keys_fit: Vec::new(),
            queries_fit: Vec::new(),
        }
    }
}

/// Makes a pair product within a head: of keys with queries, or, as number 1, of values with the gradients of outputs.
fn of_heads(
    backward: &Backward<'_>,
    tile: QueryTile,
    (number, [keys_or_values, lanes]): (usize, [&Lines; 2]),
    product: &mut Lines,
    first: usize,
    keys: usize,
) -> PairProduct {
    let (stride, sizes) = (backward.tiles.block_m as usize, Sizes::new(backward));
    let inner = backward.words()[number];
    PairProduct {
        rows: keys,
        inner,
        columns: tile.lanes,
        a: keys_or_values.as_ptr().cast::<u32>().wrapping_add(first * inner),
        a_stride: inner,
        a_part: sizes.keys[number],
        b: lanes.as_ptr().cast::<u32>().wrapping_add(tile.first_lane),
        b_stride: stride,
        b_part: sizes.q_lanes[number],
        terms: Terms::of_inputs(backward.parts),
        c: product.as_mut_ptr().wrapping_add(tile.first_lane),
        c_stride: stride,
        accumulate: false,
    }
}

impl Scratch {
    /// Packs loaded keys and values as bf16 pairs: both within a head, and the keys also transposed.
    pub(super) fn pair_keys(&mut self, backward: &Backward<'_>, sources: [Head; 2], first: usize, count: [usize; 2]) {
        let (kernels, [head_dim, head_dim_v], [width, _]) = (backward.kernels, backward.head_dims(), backward.widths());
        let ([words_of_key, words_of_value], sizes) = (backward.words(), Sizes::new(backward));
        let words = &mut self.words;
        let pairing = Pairing {
            from: self.keys.as_ptr(),
            stride: head_dim,
            rows: count[1],
            columns: head_dim,
            apart: SIDE,
            to: words.keys.as_mut_ptr().cast(),
            to_stride: words_of_key,
            parts: backward.parts,
            part: sizes.keys[0],
        };
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            if backward.parts == 1 {
                sources[0].copy_halves(first, count, words.keys.as_mut_slice(), words_of_key);
                sources[1].copy_halves(first, count, words.values.as_mut_slice(), words_of_value);
            } else {
                (kernels.pair_columns)(&pairing);
                (kernels.pair_columns)(&Pairing {
                    from: self.values.as_ptr(),
                    stride: head_dim_v,
                    columns: head_dim_v,
                    to: words.values.as_mut_ptr().cast(),
                    to_stride: words_of_value,
                    part: sizes.keys[1],
                    ..pairing
                });
            }
            let rows = words.rows.as_mut_ptr();
            (kernels.pair_rows)(&Pairing {
                columns: width,
                apart: 1,
                to: rows.cast(),
                to_stride: width,
                part: sizes.key_rows,
                ..pairing
            });
            for part in 0..backward.parts {
                let rows = rows.add(part * sizes.key_rows);
                let to = words.keys_lanes.as_mut_ptr().add(part * sizes.keys_lanes);
                (kernels.transpose)(rows, width, count[1] / 2, to, keys_stride(backward), head_dim);
            }
        }
    }

    /// Packs a tile of queries as bf16 pairs, within a head and of queries.
    pub(super) fn pair_queries(&mut self, backward: &Backward<'_>, padded: usize) {
        let (kernels, block_m) = (backward.kernels, backward.tiles.block_m as usize);
        let (head_dims, widths, strides) = (backward.head_dims(), backward.widths(), queries_strides(backward));
        let (sizes, words) = (Sizes::new(backward), &mut self.words);
        let operands = [
            (&self.q, &self.q_lanes, &mut words.q, &mut words.q_lanes),
            (&self.dout, &self.dout_lanes, &mut words.dout, &mut words.dout_lanes),
        ];
        for (number, (rows, lanes, pairs, pairs_lanes)) in operands.into_iter().enumerate() {
            // SAFETY: the processor has the instructions; words are half as many rows as what they are made of.
            unsafe {
                let of_queries = Pairing {
                    from: rows.as_ptr(),
                    stride: widths[number],
                    rows: padded,
                    columns: widths[number],
                    apart: SIDE,
                    to: pairs.as_mut_ptr().cast(),
                    to_stride: strides[number],
                    parts: backward.parts,
                    part: sizes.q[number],
                };
                (kernels.pair_rows)(&of_queries);
                (kernels.pair_rows)(&Pairing {
                    from: lanes.as_ptr(),
                    stride: block_m,
                    rows: head_dims[number],
                    columns: padded,
                    // Like the keys: neighbours, if words are copied from memory.
                    apart: if backward.parts == 1 { 1 } else { SIDE },
                    to: pairs_lanes.as_mut_ptr().cast(),
                    to_stride: block_m,
                    part: sizes.q_lanes[number],
                    ..of_queries
                });
            }
        }
    }

    /// Computes S and dP of the queries and the block of keys that starts at `first`.
    ///
    /// # Safety
    /// The contract of [`pass`](Self::pass); the keys are among those of the task.
    pub(super) unsafe fn score_pairs(
        &mut self,
        backward: &Backward<'_>,
        pairs: &Pairs,
        tile: QueryTile,
        first: usize,
        keys: usize,
    ) {
        let words = &self.words;
        let products = [
            ([&words.keys, &words.q_lanes], &mut self.probabilities),
            ([&words.values, &words.dout_lanes], &mut self.ds),
        ];
        for (number, (operands, product)) in products.into_iter().enumerate() {
            let product = of_heads(backward, tile, (number, operands), product, first, keys);
            // SAFETY: passed on to the caller.
            unsafe { (pairs.product)(&product) };
        }
    }

    /// Replaces f32 scores by scores of pair products where both the query and the key may be split. These are the
    /// scores that forward computed, whatever else is in the tile.
    ///
    /// # Safety
    /// The contract of [`score_pairs`](Self::score_pairs).
    pub(super) unsafe fn choose_scores(
        &mut self,
        backward: &Backward<'_>,
        pairs: &Pairs,
        tile: QueryTile,
        first: usize,
        keys: usize,
    ) {
        let words = &mut self.words;
        let keys_fit = words.keys_fit[first..].iter().take(keys);
        let queries_fit = &words.queries_fit[..tile.rows];
        if keys_fit.clone().all(|fits| !fits) || queries_fit.iter().all(|fits| !fits) {
            return;
        }
        let of_heads = of_heads(
            backward,
            tile,
            (0, [&words.keys, &words.q_lanes]),
            &mut words.scores,
            first,
            keys,
        );
        // SAFETY: passed on to the caller.
        unsafe { (pairs.product)(&of_heads) };
        let stride = backward.tiles.block_m as usize;
        let rows = self.probabilities.as_mut_slice().chunks_mut(stride);
        let rows = rows.zip(words.scores.as_slice().chunks(stride)).zip(keys_fit);
        for ((scores, of_pairs), _) in rows.filter(|(_, key_fits)| **key_fits) {
            let lanes = (queries_fit.iter().enumerate()).skip(tile.first_lane).take(tile.lanes);
            for (lane, _) in lanes.filter(|(_, query_fits)| **query_fits) {
                scores[lane] = of_pairs[lane];
            }
        }
    }

    /// Adds the contribution of a block of keys: dQ in lanes, dK and dV in rows.
    ///
    /// # Safety
    /// The contract of [`score_pairs`](Self::score_pairs).
    pub(super) unsafe fn accumulate_pairs(
        &mut self,
        backward: &Backward<'_>,
        pairs: &Pairs,
        tile: QueryTile,
        first: usize,
        keys: usize,
    ) {
        let (widths, stride, sizes) = (backward.widths(), backward.tiles.block_m as usize, Sizes::new(backward));
        let queries_strides = queries_strides(backward);
        // SAFETY: passed on to the caller.
        unsafe { self.pair_scores(backward, tile, keys) };
        let words = &self.words;
        let of_queries = PairProduct {
            rows: widths[0],
            inner: keys / 2,
            columns: tile.lanes,
            a: words.keys_lanes.as_ptr().cast::<u32>().wrapping_add(first / 2),
            a_stride: keys_stride(backward),
            a_part: sizes.keys_lanes,
            b: words.ds_lanes.as_ptr().cast::<u32>().wrapping_add(tile.first_lane),
            b_stride: stride,
            b_part: sizes.scores,
            terms: Terms::of_probabilities(backward.parts),
            c: self.dq_lanes.as_mut_ptr().wrapping_add(tile.first_lane),
            c_stride: stride,
            accumulate: true,
        };
        let of_keys = |number: usize, weights: &Lines, queries: &Lines, gradient: &mut Lines| PairProduct {
            rows: keys,
            inner: tile.lanes / 2,
            columns: widths[number],
            a: weights.as_ptr().cast::<u32>().wrapping_add(tile.first_lane / 2),
            a_stride: stride / 2,
            a_part: sizes.scores,
            b: {
                let first = tile.first_lane / 2 * queries_strides[number];
                queries.as_ptr().cast::<u32>().wrapping_add(first)
            },
            b_stride: queries_strides[number],
            b_part: sizes.q[number],
            terms: Terms::of_probabilities(backward.parts),
            c: gradient.as_mut_ptr().wrapping_add(first * widths[number]),
            c_stride: widths[number],
            accumulate: true,
        };
        let of_values = of_keys(1, &words.probabilities, &words.dout, &mut self.dv);
        let of_keys = of_keys(0, &words.ds, &words.q, &mut self.dk);
        for product in [of_queries, of_values, of_keys] {
            // SAFETY: passed on to the caller; words are half as many as what they are made of.
            unsafe { (pairs.product)(&product) };
        }
    }

    /// Packs P and dS as bf16 pairs: both as pairs of queries, and dS also as pairs of keys.
    ///
    /// # Safety
    /// The contract of [`score_pairs`](Self::score_pairs).
    unsafe fn pair_scores(&mut self, backward: &Backward<'_>, tile: QueryTile, keys: usize) {
        let (kernels, stride) = (backward.kernels, backward.tiles.block_m as usize);
        let words = &mut self.words;
        let of_queries = Pairing {
            from: self.probabilities.as_ptr().wrapping_add(tile.first_lane),
            stride,
            rows: keys,
            columns: tile.lanes,
            apart: SIDE,
            to: words
                .probabilities
                .as_mut_ptr()
                .cast::<u32>()
                .wrapping_add(tile.first_lane / 2),
            to_stride: stride / 2,
            parts: backward.parts,
            part: Sizes::new(backward).scores,
        };
        let from = self.ds.as_ptr().wrapping_add(tile.first_lane);
        // SAFETY: passed on to the caller.
        unsafe {
            (kernels.pair_columns)(&of_queries);
            let to = words.ds.as_mut_ptr().cast::<u32>().add(tile.first_lane / 2);
            (kernels.pair_columns)(&Pairing { from, to, ..of_queries });
            (kernels.pair_rows)(&Pairing {
                from,
                apart: 1,
                to: words.ds_lanes.as_mut_ptr().cast::<u32>().add(tile.first_lane),
                to_stride: stride,
                ..of_queries
            });
        }
    }
}
