//! Operands of bf16 pair products: their words, how they are packed, and the queries that use them.

use super::scratch::Scratch;
use super::tiled::Lanes;
use super::{Forward, Tile};
use crate::device::cpu::kernels::{Kernels, MAX_LANES, Pairing, SIDE};
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::Panels;

/// Operands of bf16 pair products: words of two numbers along the inner axis, part after part.
pub(super) struct Words {
    /// Queries by panels, `words x lanes`.
    pub(super) query: Lines,
    /// Keys: `block_n x words`.
    pub(super) keys: Lines,
    /// Values: `output_panels.depth x block_n / 2`, and the transpose.
    pub(super) values: Lines,
    rows: Lines,
    /// Exponentials: `block_n / 2 x lanes`.
    pub(super) scores: Lines,
    /// f32 scores, `block_n x lanes`, if only some rows are multiplied as pairs.
    pub(super) f32_scores: Lines,
    /// Queries, keys and values of the tile that may be split.
    pub(super) queries_fit: Vec<bool>,
    pub(super) keys_fit: Vec<bool>,
    pub(super) values_fit: Vec<bool>,
}

/// Number of rows, of some, that may be split.
///
/// If one of two rows may not be split, their product is computed in f32. This depends on these two rows alone: a
/// score is one sum in one order, whatever else is in the tile, even a key that its query does not see.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    None,
    Some,
    All,
}

impl Fit {
    pub(super) fn of(rows: &[bool]) -> Self {
        match rows.iter().filter(|&&fits| fits).count() {
            count if count == rows.len() => Self::All,
            0 => Self::None,
            _ => Self::Some,
        }
    }

    /// Determines which of `count` rows of `head_dim`, which exist, may be split, and writes it to `fit`.
    ///
    /// # Safety
    /// The processor has the instructions.
    pub(super) unsafe fn of_rows(
        kernels: &Kernels,
        (rows, count): (*const f32, usize),
        head_dim: usize,
        fit: &mut [bool],
    ) -> Self {
        let may_be_split = kernels.may_be_split;
        fit.fill(true);
        // SAFETY: passed on to the caller.
        unsafe {
            if may_be_split(rows, count * head_dim) {
                return Self::All;
            }
            let fit = &mut fit[..count];
            for (row, fits) in fit.iter_mut().enumerate() {
                *fits = may_be_split(rows.add(row * head_dim), head_dim);
            }
            Self::of(fit)
        }
    }

    /// Combines two sets of rows: the fit of all products of a row of one with a row of the other.
    pub(super) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, _) | (_, Self::None) => Self::None,
            (Self::All, Self::All) => Self::All,
            _ => Self::Some,
        }
    }
}

impl Words {
    pub(super) fn new(forward: &Forward<'_>) -> Self {
        let lines = |part: usize| Lines::new(forward.parts * part);
        let (block_n, lanes) = (forward.tiles.block_n as usize, forward.panels.lanes);
        Self {
            query: lines(forward.query_part()),
            keys: lines(forward.keys_part()),
            values: lines(forward.values_part()),
            rows: lines(forward.values_part()),
            scores: lines(forward.scores_part()),
            f32_scores: Lines::new(if forward.parts > 1 { block_n * lanes } else { 0 }),
            queries_fit: vec![true; forward.lanes()],
            keys_fit: vec![true; block_n],
            values_fit: vec![true; block_n],
        }
    }
}

/// Words of one part.
impl Forward<'_> {
    pub(super) fn query_part(&self) -> usize {
        self.lanes() * self.words()
    }

    pub(super) fn keys_part(&self) -> usize {
        self.tiles.block_n as usize * self.words()
    }

    pub(super) fn values_part(&self) -> usize {
        self.output_panels.depth * self.tiles.block_n as usize / 2
    }

    pub(super) fn scores_part(&self) -> usize {
        self.tiles.block_n as usize / 2 * self.panels.lanes
    }

    /// Returns the distance of the two elements of a head that make a word: 1, neighbours, if words are copied from
    /// memory.
    fn apart(&self) -> usize {
        if self.parts == 1 { 1 } else { SIDE }
    }
}

impl Scratch {
    /// Packs the queries as bf16 pairs within a head.
    pub(super) fn pair_queries(&mut self, forward: &Forward<'_>, tile: &Tile<'_>) {
        let (kernels, Panels { lanes, depth }) = (forward.kernels, forward.panels);
        for (first, used) in forward.panels(tile.rows) {
            // SAFETY: the processor has the instructions; both are panels of their tiles.
            unsafe {
                (kernels.pair_rows)(&Pairing {
                    from: self.query.as_ptr().add(first * depth),
                    stride: lanes,
                    rows: forward.head_dim(),
                    columns: used,
                    apart: forward.apart(),
                    to: self.words.query.as_mut_ptr().cast::<u32>().add(first * forward.words()),
                    to_stride: lanes,
                    parts: forward.parts,
                    part: forward.query_part(),
                });
            }
        }
        if forward.parts > 1 {
            self.words.queries_fit.fill(true);
            // Queries that see no key have no effect, whatever they hold. Programs hide pairs one by one.
            let sees_a_key = |query: &usize| forward.visibility.visible_end(forward.position(tile, *query)) > 0;
            let row = &mut self.rows.as_mut_slice()[..forward.head_dim()];
            for query in (0..tile.rows).filter(sees_a_key) {
                tile.q.load(kernels, tile.first_row as usize + query, row);
                // SAFETY: the processor has the instructions.
                self.words.queries_fit[query] = unsafe { (kernels.may_be_split)(row.as_ptr(), row.len()) };
            }
        }
    }

    /// Packs `keys` keys at `from` as bf16 pairs within a head, in parts.
    pub(super) fn split_keys(&mut self, forward: &Forward<'_>, keys: usize, from: *const f32) {
        // SAFETY: the processor has the instructions, and tiles have room for all their keys.
        unsafe {
            (forward.kernels.pair_columns)(&Pairing {
                from,
                stride: forward.head_dim(),
                rows: keys,
                columns: forward.head_dim(),
                apart: SIDE,
                to: self.words.keys.as_mut_ptr().cast(),
                to_stride: forward.words(),
                parts: forward.parts,
                part: forward.keys_part(),
            });
        }
    }

    /// Packs pairs of the values that may be split, with 0 in place of the others, and loads the others, with 0 in
    /// place of these.
    pub(super) fn pair_some_values(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, first: usize, count: [usize; 2]) {
        let head_dim = forward.head_dim_v();
        let load = |scratch: &mut Self, fit: bool| {
            let values = scratch.values.as_mut_slice();
            tile.v.load_tile(forward.kernels, first, count, values, head_dim);
            for (row, fits) in values.chunks_mut(head_dim).zip(&scratch.words.values_fit) {
                if *fits != fit {
                    row.fill(0.0);
                }
            }
        };
        load(self, true);
        self.pair_values(forward, count[1], self.values.as_ptr());
        load(self, false);
    }

    /// Chooses the scores of some lanes: those of f32 where the query or the key may not be split.
    pub(super) fn choose_scores(&mut self, forward: &Forward<'_>, lanes: Lanes, keys: usize) {
        let (stride, words) = (forward.panels.lanes, &self.words);
        let rows = self.scores.as_mut_slice().chunks_mut(stride);
        let rows = rows
            .zip(words.f32_scores.as_slice().chunks(stride))
            .zip(&words.keys_fit);
        for ((scores, f32_scores), key_fits) in rows.take(keys) {
            let fit = &words.queries_fit[lanes.in_tile()..lanes.in_tile() + lanes.count];
            for (lane, query_fits) in (lanes.first..).zip(fit) {
                if !(key_fits & query_fits) {
                    scores[lane] = f32_scores[lane];
                }
            }
        }
    }

    /// Packs the values at `from` as bf16 pairs, neighbours along the keys, one row for each element of a head.
    pub(super) fn pair_values(&mut self, forward: &Forward<'_>, keys: usize, from: *const f32) {
        let (kernels, head_dim) = (forward.kernels, forward.head_dim_v());
        let width = head_dim.next_multiple_of(MAX_LANES);
        // SAFETY: the processor has the instructions, and tiles have room for whole registers.
        unsafe {
            let pairs = self.words.rows.as_mut_ptr();
            (kernels.pair_rows)(&Pairing {
                from,
                stride: head_dim,
                rows: keys,
                columns: width,
                apart: 1,
                to: pairs.cast(),
                to_stride: width,
                parts: forward.parts,
                part: forward.values_part(),
            });
            for part in 0..forward.parts {
                let pairs = pairs.add(part * forward.values_part());
                let to = self.words.values.as_mut_ptr().add(part * forward.values_part());
                (kernels.transpose)(pairs, width, keys / 2, to, forward.tiles.block_n as usize / 2, head_dim);
            }
        }
    }
}
