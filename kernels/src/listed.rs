//! The forward pass over listed work, and with the markers of a score program: [`forward`](crate::forward) for whatever is no
//! rectangle.
//!
//! A block takes its rows and the runs of its tiles from a list of [`work`](crate::work), or from its place in the grid if there is
//! none. Ragged batches, paged caches, splits over keys, packed heads and block-sparse masks are all work of a list, and none of
//! them is known to the loop. Whatever is hidden by lengths or by a causal mask lies in masked tiles.
//!
//! A split's results are partial: its output before the division, the largest score and the sum of weights relative to it.
//! [`combine`] brings the splits of a row together.

use core::f32::consts::LN_2;

use crate::abi::{Layout, ListedForwardParams, StridedTensor};
use crate::block::{RowBlock, owned_tile, split};
use crate::forward::{Streamed, attend, owned_query, unsigned};
use crate::lists::{Runs, Work, for_tiles};
use crate::mask::{Blocks, Mask, Span};
use crate::nonfinite;
use crate::pipeline::KeyValueRing;
use crate::ptx::{math, memory, optimizer, program, sreg, sync};
use crate::shape::{COMBINE_WARPS, TileShape, TileSizes};
use crate::softmax::{Finished, OnlineSoftmax};
use crate::tile::element::Element;
use crate::tile::global::{GlobalTile, Packed, Paged, Walk};
use crate::tile::register::{Accumulator, OutputTile, RowValues, ScoreTile};
use crate::work::SequenceRows;

/// Computes `ROWS` rows of one head against the keys of their runs, in one block.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters and lists that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn forward<S: TileShape>(p: &ListedForwardParams) {
    // Read again after the walk: kept, it would occupy registers during the whole loop.
    // SAFETY: the caller's contract.
    let block = || unsafe { Listed::of_this_block::<S>(p) };

    // SAFETY (whole body): the query tile and the ring are disjoint parts of this block's dynamic shared memory, every
    // thread takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        let (mut softmax, mut output) = (OnlineSoftmax::exact(p.forward.scale_log2), S::Output::zero());
        let cleaned = walk::<S>(&block(), &mut softmax, &mut output);

        let block = block();
        let warp_row = sreg::renewed_warp_id() * S::WARP_ROWS;
        let first_row = block.work.first_row + warp_row;
        let rows = block.rows().saturating_sub(first_row);
        let values = || block.keys(&p.forward.v, &p.values, S::ELEMENT_BYTES);
        if let Some(place) = block.work.partial {
            if cleaned {
                block.restore::<S::Element>(&mut output, &values(), S::COLUMNS, first_row);
            }
            let partial = Partial::of(p, place);
            partial.store_output(&mut output, warp_row, 0, rows);
            partial.store_statistics(&softmax, warp_row, rows);
            return;
        }
        let finished = softmax.finish(|row| p.plain != 0 && !block.span(first_row + row).is_empty());
        output.map_rows(finished.inverse, |inverse, o| S::Element::mean(o * inverse));
        if cleaned {
            block.restore::<S::Element>(&mut output, &values(), S::COLUMNS, first_row);
        }
        let target = block
            .queries(&p.forward.out, &p.values, S::ELEMENT_BYTES)
            .rows_from(first_row);
        output.store(owned_tile::<S>(0).rows_from(sreg::warp_id() * S::WARP_ROWS), &target);
        block.store_statistics::<S::Scores>(&finished, first_row);
    }
}

/// Returns the work of this block.
///
/// # Safety
/// The contract of [`forward`].
#[inline(always)]
unsafe fn work<S: TileSizes>(p: &ListedForwardParams) -> Work {
    let block = optimizer::renew(sreg::block_idx_x());
    if p.work.tiles != 0 {
        // SAFETY: the caller's contract.
        return unsafe { Work::listed(&p.work, block) };
    }
    let RowBlock {
        batch, head, first_row, ..
    } = RowBlock::<S>::of_block(block, p.forward.query_tiles, p.forward.heads_q, false);
    Work {
        number: batch,
        sequence: SequenceRows {
            q_entry: batch,
            q_begin: 0,
            seqlen_q: p.forward.seqlen_q,
            k_entry: batch,
            k_begin: 0,
            seqlen_k: p.forward.seqlen_k,
        },
        head,
        first_row,
        runs: Runs::of_all(&p.work, p.forward.seqlen_k, S::COLUMNS, program::hides()),
        partial: None,
        is_first: true,
    }
}

/// Walks the runs of a block. Returns true if values were [cleaned](nonfinite).
#[inline(always)]
unsafe fn walk<S: TileShape>(
    block: &Listed<'_>,
    softmax: &mut OnlineSoftmax<S::Scores>,
    output: &mut S::Output,
) -> bool {
    let Listed { work, p } = block;
    // SAFETY (whole body): `forward`'s.
    unsafe {
        program::head(
            block.first_head(),
            work.number,
            work.sequence.seqlen_q,
            work.sequence.seqlen_k,
        );
        softmax.start_program(work.is_first);
        let q = block
            .queries(&p.forward.q, &p.forward.layout, S::ELEMENT_BYTES)
            .rows_from(work.first_row);
        let split = split::<S>();
        owned_tile::<S>(0).load_async(&mut Walk::new(q, split), S::ROWS);
        let (k, v) = (
            block.keys(&p.forward.k, &p.forward.layout, S::ELEMENT_BYTES),
            block.keys(&p.forward.v, &p.values, S::ELEMENT_BYTES),
        );
        let base = optimizer::renew(sreg::dynamic_shared_mem()) + S::OWNED_BYTES;
        let mut ring = KeyValueRing::start_runs(base, k, v, split, work.runs);
        let query = owned_query::<S>(&ring, p.forward.scale_sign);
        let first_row = work.first_row + sreg::warp_id() * S::WARP_ROWS;
        let span = |row| block.span(first_row + row);
        let mut cleaned = false;
        for_tiles!(work.runs, |index, n, MASKED| {
            let tile = Streamed {
                index,
                first_key: n * S::COLUMNS,
                hides_pairs: MASKED && p.causal != 0,
            };
            cleaned |= attend::<S, _, MASKED, true, true>(tile, || first_row, span, query, &mut ring, softmax, output);
        });
        ring.drain();
        cleaned
    }
}

/// A block's work and the tensors that it is of.
pub struct Listed<'a> {
    pub work: Work,
    p: &'a ListedForwardParams,
}

impl<'a> Listed<'a> {
    /// Returns the work of this block.
    ///
    /// # Safety
    /// The contract of [`forward`].
    #[inline(always)]
    pub unsafe fn of_this_block<S: TileSizes>(p: &'a ListedForwardParams) -> Self {
        // SAFETY: the caller's contract.
        let work = unsafe { work::<S>(p) };
        Self { work, p }
    }
}

impl Listed<'_> {
    /// Returns the first query head of the packed ones.
    #[inline(always)]
    pub fn first_head(&self) -> u32 {
        self.work.head * self.p.packed.value
    }

    /// Returns the number of rows that exist in the sequence, packed heads counted.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.work.sequence.seqlen_q * self.p.packed.value
    }

    /// Returns the keys that a row of the sequence sees, before a score program hides any.
    #[inline(always)]
    pub fn span(&self, row: u32) -> Span {
        let SequenceRows { seqlen_q, seqlen_k, .. } = self.work.sequence;
        if self.p.causal != 0 {
            Mask::<true>::new(seqlen_q, seqlen_k).keys_of(self.p.packed.divide(row).0)
        } else {
            Mask::<false>::new(seqlen_q, seqlen_k).keys_of(0)
        }
    }

    /// Returns the rows of the sequence in q or out.
    #[inline(always)]
    pub fn queries(&self, tensor: &StridedTensor, layout: &Layout, element_bytes: u32) -> GlobalTile<Packed> {
        let SequenceRows {
            q_entry,
            q_begin,
            seqlen_q,
            ..
        } = self.work.sequence;
        let head = self.first_head();
        GlobalTile::new(tensor, q_entry, head, q_begin + seqlen_q, layout, element_bytes)
            .rows_from(q_begin)
            .packed(tensor, self.p.packed)
    }

    /// Returns the rows of the sequence in k or v.
    #[inline(always)]
    pub fn keys(&self, tensor: &StridedTensor, layout: &Layout, element_bytes: u32) -> GlobalTile<Paged> {
        let SequenceRows {
            k_entry,
            k_begin,
            seqlen_k,
            ..
        } = self.work.sequence;
        let head = self.first_head() / self.p.forward.heads_q_per_kv;
        GlobalTile::new(tensor, 0, head, seqlen_k, layout, element_bytes).paged(tensor, &self.p.pages, k_entry, k_begin)
    }

    /// Returns the index of a row in lse, row_max and row_sum.
    #[inline(always)]
    fn statistic(&self, row: u32) -> u64 {
        let SequenceRows { q_entry, q_begin, .. } = self.work.sequence;
        let (position, head) = self.p.packed.divide(row);
        let head = q_entry as u64 * self.p.forward.heads_q.get() as u64 + (self.first_head() + head) as u64;
        head * self.p.forward.seqlen_q as u64 + (q_begin + position) as u64
    }

    /// Stores the statistics of a warp's rows from `first_row` on.
    ///
    /// # Safety
    /// The contract of [`forward`].
    #[inline(always)]
    pub unsafe fn store_statistics<A: Accumulator>(&self, finished: &Finished<A::Rows>, first_row: u32) {
        let (p, rows) = (self.p, self.rows().saturating_sub(first_row));
        let store = |values, address: u64| {
            A::for_each_row(values, |row, value: f32| {
                if row < rows {
                    // SAFETY: the row exists.
                    unsafe {
                        memory::st_global_u32(address + self.statistic(first_row + row) * 4, value.to_bits());
                    }
                }
            });
        };
        store(finished.lse, p.forward.lse);
        if p.forward.row_max != 0 {
            // The caller's q.k, before its sign was changed.
            store(
                finished.row_max.map(|max| unsigned(max, p.forward.scale_sign)),
                p.forward.row_max,
            );
            store(finished.row_sum, p.forward.row_sum);
        }
    }

    /// Adds to the output, of rows from `first_row` on, what was [cleaned](nonfinite) of the values in tiles of `columns` keys.
    ///
    /// # Safety
    /// The contract of [`forward`].
    #[inline(always)]
    pub unsafe fn restore<E: Element>(
        &self,
        output: &mut impl Accumulator,
        values: &GlobalTile<Paged>,
        columns: u32,
        first_row: u32,
    ) {
        let sees = |row, key| {
            self.span(first_row + row).contains(key) && program::visible(first_row + row, key, self.first_head())
        };
        for run in 0..self.work.runs.count {
            // SAFETY: the caller's contract, and the window clips what does not exist.
            unsafe {
                let run = self.work.runs.get(run);
                if run.masked != 0 {
                    let blocks = Blocks::masked(run.begin..run.end);
                    nonfinite::restore::<E, _>(output, values, blocks, columns, sees);
                }
            }
        }
    }
}

/// Partial results of the rows of one block.
#[derive(Clone, Copy)]
pub struct Partial {
    base: u64,
    head_dim: u32,
    rows: u32,
}

impl Partial {
    /// Returns the partial results at a place.
    #[inline(always)]
    pub fn of(p: &ListedForwardParams, place: u32) -> Self {
        let (head_dim, rows) = (p.values.head_dim, p.block_m);
        Self {
            base: p.partial + place as u64 * (rows * (head_dim + 2) * 4) as u64,
            head_dim,
            rows,
        }
    }

    /// Stores an output before the division: `rows` rows from `first_row` on of those of the block, columns from `first_column` on.
    ///
    /// # Safety
    /// The contract of [`forward`].
    #[inline(always)]
    pub unsafe fn store_output(self, output: &mut impl Accumulator, first_row: u32, first_column: u32, rows: u32) {
        output.map_coordinates(|row, column, x| {
            if row < rows && first_column + column < self.head_dim {
                // SAFETY: the element exists.
                unsafe {
                    memory::st_global_u32(self.element(first_row + row, first_column + column), x.to_bits());
                }
            }
            x
        });
    }

    /// Stores the statistics of `rows` rows from `first_row` on of those of the block.
    ///
    /// # Safety
    /// The contract of [`forward`].
    #[inline(always)]
    pub unsafe fn store_statistics<A: Accumulator>(self, softmax: &OnlineSoftmax<A>, first_row: u32, rows: u32) {
        let (row_max, row_sum) = softmax.partial();
        // SAFETY: the rows exist.
        unsafe {
            A::store_rows(row_max, self.row_max(first_row), rows);
            A::store_rows(row_sum, self.row_sum(first_row), rows);
        }
    }

    /// Returns the address of an element of the output.
    #[inline(always)]
    fn element(&self, row: u32, column: u32) -> u64 {
        self.base + ((row * self.head_dim + column) * 4) as u64
    }

    /// Returns the address of a row's largest score.
    #[inline(always)]
    fn row_max(&self, row: u32) -> u64 {
        self.element(self.rows, 0) + (row * 4) as u64
    }

    /// Returns the address of a row's sum of weights.
    #[inline(always)]
    fn row_sum(&self, row: u32) -> u64 {
        self.row_max(self.rows + row)
    }
}

/// Combines the partial results of splits, whose places and number are the runs of the listed work.
///
/// # Safety
/// Launched as its row of `entries` says, after [`forward`] with the same parameters except the list of tiles.
#[inline(always)]
pub unsafe fn combine<E: Element>(p: &ListedForwardParams) {
    // SAFETY (whole body): the lists hold this block's work, and windows clip what does not exist.
    unsafe {
        let block = optimizer::renew(sreg::block_idx_x());
        let (work, first, splits) = Work::combined(&p.work, block);
        let block = Listed { work, p };
        let (scale, lane) = (p.forward.scale_log2, sreg::lane_id());
        let partial = |split: u32| Partial::of(p, first + split * p.work.heads.get());
        let rows = (block.rows() - block.work.first_row).min(p.block_m);
        let mut row = sreg::warp_id();
        while row < rows {
            let position = block.work.first_row + row;
            let mut row_max = f32::MIN;
            for split in 0..splits {
                row_max = row_max.max(load(partial(split).row_max(row)));
            }
            let mut row_sum = 0.0;
            for split in 0..splits {
                let weight = math::ex2((load(partial(split).row_max(row)) - row_max) * scale);
                row_sum += weight * load(partial(split).row_sum(row));
            }
            let is_nan = p.plain != 0 && !block.span(position).is_empty();
            let nothing = if is_nan { f32::NAN } else { 0.0 };
            let inverse = if row_sum == 0.0 { nothing } else { math::rcp(row_sum) };
            let target = block.queries(&p.forward.out, &p.values, E::BYTES).rows_from(position);
            let mut column = lane * 2;
            while column < p.values.head_dim {
                let mut sums = [0.0; 2];
                for split in 0..splits {
                    let partial = partial(split);
                    let weight = math::ex2((load(partial.row_max(row)) - row_max) * scale);
                    // The output of a split that saw nothing is of no meaning.
                    if load(partial.row_sum(row)) != 0.0 {
                        for i in 0..2 {
                            let x = load(partial.element(row, column + i as u32));
                            sums[i] = math::fma(weight, x, sums[i]);
                        }
                    }
                }
                E::store_pair(
                    target.element_address(0, column),
                    sums.map(|sum| E::mean(sum * inverse)),
                );
                column += 64;
            }
            if lane == 0 {
                let at = block.statistic(position) * 4;
                let store = |address: u64, value: f32| memory::st_global_u32(address + at, value.to_bits());
                let saw = row_sum != 0.0;
                let lse = (row_max * scale + math::lg2(row_sum)) * LN_2;
                store(p.forward.lse, if saw { lse } else { f32::NEG_INFINITY });
                if p.forward.row_max != 0 {
                    let max = if saw { row_max } else { f32::NEG_INFINITY };
                    store(p.forward.row_max, unsigned(max, p.forward.scale_sign));
                    store(p.forward.row_sum, if saw { row_sum } else { nothing });
                }
            }
            row += COMBINE_WARPS;
        }
    }
}

/// Reads an f32.
///
/// # Safety
/// The address is readable and 4-byte aligned.
#[inline(always)]
unsafe fn load(address: u64) -> f32 {
    // SAFETY: the caller's contract.
    f32::from_bits(unsafe { memory::ld_global_u32(address) })
}
