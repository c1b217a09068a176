//! The forward pass of latent attention over listed work: head_dim up to 576, and up to 512 of v, whose rows may be those of k. All heads
//! of DeepSeek's models share such keys and values once the projections behind them are absorbed.
//!
//! An output of 512 columns does not fit in the registers of a warp with 16 rows of its own. Here all warps of a block share its rows,
//! heads packed, and what they divide changes with each step of Algorithm 1:
//!
//! | step | a warp has | and passes on through shared memory |
//! | --- | --- | --- |
//! | scores | 16 rows, a quarter of head_dim, with its part of Q in registers to the end | its part of each sum |
//! | softmax | 8 rows; half of the warps have none | weights, and the factor of each row's output |
//! | output | all rows, an eighth of the columns of v | |
//!
//! Each barrier between the steps is also one of the pipeline, except the one after the scores.

use crate::abi::ListedForwardParams;
use crate::block::split;
use crate::element::F16;
use crate::forward::Streamed;
use crate::listed::{Listed, Partial};
use crate::lists::for_tiles;
use crate::mask::Span;
use crate::pipeline::latent::LatentRing;
use crate::ptx::matrix::Half;
use crate::ptx::{copy, memory, optimizer, program, sreg, sync};
use crate::shape::{LatentD576, TileSizes};
use crate::softmax::OnlineSoftmax;
use crate::tile::element::Element;
use crate::tile::fragments::{Fragments, Packed};
use crate::tile::global::Walk;
use crate::tile::lanes::LaneRows;
use crate::tile::register::{Accumulator, OutputTile, ScoreTile};
use crate::tile::shared::SharedTile;
use crate::tile::swizzle::swizzle_f32;

/// The sizes, which are those of every element type.
type Sizes = LatentD576<F16>;

/// Queries of a warp's part of the scores: 16 rows, a quarter of head_dim.
type Query = Packed<{ Sizes::SCORE_ROWS as usize / 16 }, { Sizes::PART_COLUMNS as usize / 8 }>;

/// A warp's part of the scores: the sum over a quarter of head_dim.
type PartOfScores<T> = Fragments<T, { Sizes::SCORE_ROWS as usize / 16 }, { Sizes::COLUMNS as usize / 8 }>;

/// Scores of the rows whose softmax a warp has.
type Scores = LaneRows<{ Sizes::COLUMNS as usize / 16 }, 1>;

/// Weights of all rows.
type Weights = Packed<{ Sizes::ROWS as usize / 16 }, { Sizes::COLUMNS as usize / 8 }>;

/// A warp's columns of the output, of all rows.
type Output<T> = Fragments<T, { Sizes::ROWS as usize / 16 }, { Sizes::WARP_COLUMNS as usize / 8 }>;

/// Computes `ROWS` rows of packed heads against the keys of their runs, in one block.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters and lists that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn forward<T: Half>(p: &ListedForwardParams) {
    // Read again after the walk: kept, it would occupy registers during the whole loop.
    // SAFETY: the caller's contract.
    let block = || unsafe { Listed::of_this_block::<Sizes>(p) };

    // SAFETY (whole body): the pipeline and the exchange are disjoint parts of this block's dynamic shared memory, every thread
    // takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        let (mut softmax, mut output) = (OnlineSoftmax::exact(p.forward.scale_log2), Output::zero());
        let cleaned = walk::<T>(&block(), p, &mut softmax, &mut output);

        let (block, warp, exchange) = (block(), sreg::renewed_warp_id(), Exchange::new());
        let first_row = block.work.first_row;
        let rows = block.rows().saturating_sub(first_row);
        let (softmax_row, first_column) = (warp * Sizes::SOFTMAX_ROWS, warp * Sizes::WARP_COLUMNS);
        let has_softmax = warp < Sizes::SOFTMAX_WARPS;
        let own_chunks = first_column / 8;
        let values = || {
            block
                .keys(&p.forward.v, &p.values, Sizes::ELEMENT_BYTES)
                .chunks_from(own_chunks)
        };
        if let Some(place) = block.work.partial {
            if cleaned {
                block.restore::<T>(&mut output, &values(), Sizes::COLUMNS, first_row);
            }
            let partial = Partial::of(p, place);
            partial.store_output(&mut output, 0, first_column, rows);
            if has_softmax {
                partial.store_statistics(&softmax, softmax_row, rows.saturating_sub(softmax_row));
            }
            return;
        }
        if has_softmax {
            let first_row = first_row + softmax_row;
            let finished = softmax.finish(|row| p.plain != 0 && !block.span(first_row + row).is_empty());
            exchange.put_factors(softmax_row, finished.inverse);
            block.store_statistics::<Scores>(&finished, first_row);
        }
        // The inverses of all rows are there.
        sync::sync_threads();
        output.map_rows(exchange.factors::<T>(), |inverse, o| T::mean(o * inverse));
        if cleaned {
            block.restore::<T>(&mut output, &values(), Sizes::COLUMNS, first_row);
        }
        let target = block
            .queries(&p.forward.out, &p.values, Sizes::ELEMENT_BYTES)
            .rows_from(first_row)
            .chunks_from(own_chunks);
        let row_bytes = Sizes::WARP_COLUMNS * Sizes::ELEMENT_BYTES;
        let staging = SharedTile::new(sreg::dynamic_shared_mem() + warp * Sizes::ROWS * row_bytes, row_bytes);
        OutputTile::<Weights>::store(&output, staging, &target);
    }
}

/// Walks the runs of a block. Returns true if values were [cleaned](crate::nonfinite). The pipeline is drained when this returns.
#[inline(always)]
unsafe fn walk<T: Half>(
    block: &Listed<'_>,
    p: &ListedForwardParams,
    softmax: &mut OnlineSoftmax<Scores>,
    output: &mut Output<T>,
) -> bool {
    let work = &block.work;
    // SAFETY (whole body): `forward`'s.
    unsafe {
        program::head(
            block.first_head(),
            work.number,
            work.sequence.seqlen_q,
            work.sequence.seqlen_k,
        );
        softmax.start_program(work.is_first);
        // The second slot of the pipeline is free until the first tile is acquired.
        let base = optimizer::renew(sreg::dynamic_shared_mem());
        let staged = SharedTile::new(base + Sizes::STREAMED_BYTES, Sizes::ROW_BYTES);
        let q = block.queries(&p.forward.q, &p.forward.layout, Sizes::ELEMENT_BYTES);
        staged.load_async(
            &mut Walk::new(q.rows_from(work.first_row), split::<Sizes>()),
            Sizes::ROWS,
        );
        copy::cp_async_commit();
        let (k, v) = (
            block.keys(&p.forward.k, &p.forward.layout, Sizes::ELEMENT_BYTES),
            block.keys(&p.forward.v, &p.values, Sizes::ELEMENT_BYTES),
        );
        let values_are_keys = p.forward.v.has_rows_of(&p.forward.k);
        let mut ring = LatentRing::<Sizes>::start(base, k, v, values_are_keys, work.runs);
        let query = query::<T>(staged, p.forward.scale_sign);
        let mut cleaned = false;
        for_tiles!(work.runs, |index, n, MASKED| {
            let tile = Streamed {
                index,
                first_key: n * Sizes::COLUMNS,
                hides_pairs: MASKED && p.causal != 0,
            };
            let (first_row, span) = (work.first_row, |row| block.span(row));
            cleaned |= attend::<T, MASKED>(tile, first_row, span, &query, &mut ring, softmax, output);
        });
        ring.drain();
        cleaned
    }
}

/// Returns this warp's part of the queries, multiplied by `sign`. They were staged before the pipeline's first tile.
///
/// # Safety
/// Every thread of the block calls this together.
#[inline(always)]
unsafe fn query<T: Half>(staged: SharedTile, sign: f32) -> Query {
    // The first tile, which is newer, may be in flight.
    copy::cp_async_wait::<1>();
    sync::sync_threads();
    let Part { number, first_row } = Part::of_this_warp();
    // SAFETY: the queries have landed. No warp overwrites them before all have passed the barrier of the first tile.
    let mut query = unsafe { Query::load(staged.rows_from(first_row), number * K_BLOCKS) };
    if sign != 1.0 {
        // Rare: fold a scale that is not positive into Q, so that the largest score stays the largest exponent.
        query.scale::<T>(sign);
    }
    query
}

/// One key block: parts of the scores, online softmax, and the product of weights and values. Returns whether values were
/// [cleaned](crate::nonfinite). `first_row` is the first row of the block, and `span` says what a row sees.
///
/// # Safety
/// Every thread of the block calls this together, in the order of the ring's tiles, after [`query`].
#[inline(always)]
unsafe fn attend<T: Half, const MASKED: bool>(
    tile: Streamed,
    first_row: u32,
    span: impl Fn(u32) -> Span,
    query: &Query,
    ring: &mut LatentRing<Sizes>,
    softmax: &mut OnlineSoftmax<Scores>,
    output: &mut Output<T>,
) -> bool {
    let (exchange, warp) = (Exchange::new(), sreg::warp_id());
    // SAFETY (whole body): the caller's contract; acquired tiles are initialised and visible as the ring says. What is exchanged is
    // read after the next barrier and written again after the one behind that.
    unsafe {
        let mut part = PartOfScores::<T>::zero();
        let key = ring.acquire_key(tile.index);
        let of_warp = Part::of_this_warp();
        part.add_part_of_abt(query, key, of_warp.number * K_BLOCKS);
        exchange.put_part(of_warp, &part);
        // All parts are there.
        sync::sync_threads();
        if warp < Sizes::SOFTMAX_WARPS {
            let own_row = warp * Sizes::SOFTMAX_ROWS;
            let first_row = first_row + own_row;
            Scores::announce::<program::OfQueries<MASKED>>(first_row, tile.first_key);
            let mut scores = exchange.sum_of_parts(own_row);
            scores.splice::<program::Scores, program::OfQueries<MASKED>>();
            if MASKED {
                scores.splice::<program::Masked, program::OfQueries<MASKED>>();
                scores.hide(tile.first_key, |row| span(first_row + row), f32::NEG_INFINITY);
            }
            let rescale = softmax.update::<true>(&mut scores);
            scores.splice::<program::Weights, program::OfQueries<MASKED>>();
            exchange.put_weights::<T>(own_row, &mut scores);
            exchange.put_factors(own_row, rescale);
        }
        let value = ring.acquire_value(tile.index);
        let hides_pairs = tile.hides_pairs || MASKED && program::hides();
        let cleaned = hides_pairs && value.clean::<T>(split::<Sizes>(), Sizes::COLUMNS);
        output.map_rows(exchange.factors::<T>(), |rescale, o| o * rescale);
        output.add_ab(&exchange.weights(), value.chunks_from(warp * Sizes::WARP_COLUMNS / 8));
        cleaned
    }
}

/// Number of k blocks of a part of the scores.
const K_BLOCKS: u32 = Sizes::PART_COLUMNS / 16;

/// A warp's part of the scores: the sum over quarter `number` of head_dim, of 16 rows.
#[derive(Clone, Copy)]
struct Part {
    number: u32,
    first_row: u32,
}

impl Part {
    #[inline(always)]
    fn of_this_warp() -> Self {
        let warp = sreg::warp_id();
        Self {
            number: warp % Sizes::PARTS,
            first_row: warp / Sizes::PARTS * Sizes::SCORE_ROWS,
        }
    }
}

/// Shared memory behind the pipeline in which the warps of a block exchange parts of the scores, weights, and a factor for each row.
#[derive(Clone, Copy)]
struct Exchange {
    base: u32,
}

impl Exchange {
    #[inline(always)]
    fn new() -> Self {
        Self {
            base: sreg::dynamic_shared_mem() + Sizes::STAGES * Sizes::STREAMED_BYTES,
        }
    }

    /// Returns the address of a score in part `number`.
    #[inline(always)]
    fn score(self, number: u32, row: u32, column: u32) -> u32 {
        self.base + number * Sizes::PART_BYTES + (row * Sizes::COLUMNS + swizzle_f32(row, column)) * 4
    }

    /// Writes a part of the scores.
    ///
    /// # Safety
    /// No other warp accesses that part of these rows.
    #[inline(always)]
    unsafe fn put_part<T: Half>(self, Part { number, first_row }: Part, part: &PartOfScores<T>) {
        part.for_each_pair(|row, column, scores| {
            // SAFETY: the caller's contract. The swizzle keeps runs of eight columns together.
            unsafe { memory::st_shared_v2(self.score(number, first_row + row, column), scores) }
        });
    }

    /// Returns the scores of the rows from `first_row` on.
    ///
    /// # Safety
    /// All parts are initialised and visible to the warp.
    #[inline(always)]
    unsafe fn sum_of_parts(self, first_row: u32) -> Scores {
        let mut scores = Scores::zero();
        scores.map_coordinates(|row, column, _| {
            let mut sum = 0.0;
            for number in 0..Sizes::PARTS {
                // SAFETY: the caller's contract.
                let part = unsafe { memory::ld_shared(self.score(number, first_row + row, column)) };
                sum = if number == 0 { part } else { sum + part };
            }
            sum
        });
        scores
    }

    /// The weights as a tile.
    #[inline(always)]
    fn tile_of_weights(self) -> SharedTile {
        let row_bytes = Sizes::COLUMNS * Sizes::ELEMENT_BYTES;
        SharedTile::new(self.base + Sizes::PARTS * Sizes::PART_BYTES, row_bytes)
    }

    /// Writes the weights of the rows from `first_row` on, rounded.
    ///
    /// # Safety
    /// No other warp accesses these rows.
    #[inline(always)]
    unsafe fn put_weights<T: Half>(self, first_row: u32, weights: &mut Scores) {
        let tile = self.tile_of_weights();
        weights.map_coordinates(|row, column, weight| {
            let address = tile.address(first_row + row, column / 8) + column % 8 * 2;
            // SAFETY: the caller's contract.
            unsafe { memory::st_shared_u16(address, T::pack(weight, weight) as u16) }
            weight
        });
    }

    /// Returns the weights of all rows.
    ///
    /// # Safety
    /// They are initialised and visible to the whole warp, which calls this together.
    #[inline(always)]
    unsafe fn weights(self) -> Weights {
        // SAFETY: the caller's contract.
        unsafe { Weights::load(self.tile_of_weights(), 0) }
    }

    /// Returns the address of a row's factor.
    #[inline(always)]
    fn factor(self, row: u32) -> u32 {
        self.base + Sizes::PARTS * Sizes::PART_BYTES + Sizes::WEIGHT_BYTES + row * 4
    }

    /// Writes a factor for each of the rows from `first_row` on.
    ///
    /// # Safety
    /// No other warp accesses those of these rows.
    #[inline(always)]
    unsafe fn put_factors(self, first_row: u32, factors: <Scores as Accumulator>::Rows) {
        Scores::for_each_row(factors, |row, factor| {
            // SAFETY: the caller's contract.
            unsafe { memory::st_shared_word(self.factor(first_row + row), factor.to_bits()) }
        });
    }

    /// Returns the factors of all rows.
    ///
    /// # Safety
    /// They are initialised and visible to the warp.
    #[inline(always)]
    unsafe fn factors<T: Half>(self) -> <Output<T> as Accumulator>::Rows {
        // SAFETY: the caller's contract.
        Output::<T>::rows_from(|row| unsafe { memory::ld_shared(self.factor(row)) })
    }
}
