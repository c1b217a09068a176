//! delta of queries that few keys share: the sum of P * dP over the keys, of the very numbers that the main loop has. f32 alone.
//!
//! Where one key has all the weight of a query, the gradient of its score, `P * (dP - delta)`, is 0; where several share it, their
//! gradients sum to 0. rowsum(dO * O) is not rounded as dP is, and leaves a remainder of a few roundings of dP. With many keys it is
//! smaller than their own roundings, but with few it is not. A block with at least one such query walks over its keys twice: once for
//! delta, which it leaves for the kernel of dK and dV too, and once for dQ.

use super::{Owned, Tile, load_owned, probabilities, ring_base, shifts, weight_gradients};
use crate::abi::{BackwardParams, DELTA_OF_KEYS};
use crate::block::RowBlock;
use crate::mask::{Mask, Span, for_blocks};
use crate::pipeline::{PairRing, Stage};
use crate::ptx::{program, sreg, sync};
use crate::scores::OfRows;
use crate::shape::{TileShape, TileSizes};
use crate::tile::register::{Accumulator, RowValues};

/// Returns true if some queries of the block may have their delta from the keys.
#[inline(always)]
pub(super) fn applies<S: TileSizes>(p: &BackwardParams) -> bool {
    S::ELEMENT_BYTES == 4 && p.delta != 0
}

/// Writes delta of the queries of this block that few keys share.
///
/// # Safety
/// The contract of [`dq`](super::dq).
#[inline(always)]
pub(super) unsafe fn weigh_few<S: TileShape, const CAUSAL: bool>(p: &BackwardParams) {
    if !applies::<S>(p) {
        return;
    }
    let mask = Mask::<CAUSAL>::new(p.seqlen_q, p.seqlen_k);
    let block = RowBlock::<S>::of_this_thread_block(p.tiles, p.heads_q, CAUSAL);
    let first_row = block.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
    // SAFETY (whole body): as in `dq`.
    unsafe {
        let first = block.row_of_head(p.heads_q, p.seqlen_q) + first_row as u64;
        let queries = Queries::<S>::load(p, first, p.seqlen_q.saturating_sub(first_row));
        if !queries.any_of_few(p) {
            return;
        }
        let owned = |tensor| {
            block
                .window(tensor, block.head, p.seqlen_q, &p.layout)
                .rows_from(block.first_row)
        };
        let owned = load_owned::<S>(owned(&p.q), owned(&p.dout));
        let blocks = mask.key_blocks(block.first_row, block.rows(p.seqlen_q), S::COLUMNS);
        let keys = p.seqlen_k.min(blocks.end * S::COLUMNS);
        let window = |tensor| {
            block
                .window(tensor, block.head / p.heads_q_per_kv, keys, &p.layout)
                .rows_from(blocks.begin * S::COLUMNS)
        };
        let mut ring = PairRing::<S>::start(ring_base::<S>(), blocks.begin, window(&p.k), window(&p.v), None);
        let span = |row| mask.keys_of(first_row + row);
        let mut sums = Sums::zero();
        for_blocks!(blocks, |n, MASKED| {
            let stage = ring.acquire(n);
            let tile = Tile::of_keys(first_row, n * S::COLUMNS, span, queries.is_far, MASKED && CAUSAL);
            sums.add::<program::OfQueries<MASKED>, MASKED, false>(p, owned, stage, &queries, tile);
        });
        ring.drain();
        queries.store(p, sums);
    }
}

/// A warp's queries.
pub(super) struct Queries<S: TileShape> {
    statistics: OfRows<<S::Scores as Accumulator>::Rows>,
    /// True if one of them is far.
    pub(super) is_far: bool,
    first: u64,
    rows: u32,
}

impl<S: TileShape> Queries<S> {
    /// Loads the statistics of `rows` queries from number `first` on, as [`OfRows::load`] does.
    ///
    /// # Safety
    /// The queries have statistics. The whole warp calls this together.
    #[inline(always)]
    pub(super) unsafe fn load(p: &BackwardParams, first: u64, rows: u32) -> Self {
        // SAFETY: the caller's contract.
        let (statistics, is_far) = unsafe { OfRows::load::<S::Scores>(&p.exponents, first, rows, shifts::<S>()) };
        Self {
            statistics,
            is_far,
            first,
            rows,
        }
    }

    /// Tells if few keys share any of the block's queries. All threads of the block call this together.
    ///
    /// # Safety
    /// The statistics are readable.
    #[inline(always)]
    pub(super) unsafe fn any_of_few(&self, p: &BackwardParams) -> bool {
        // SAFETY: the caller's contract.
        let few = unsafe { self.statistics.of_few::<S::Scores>(p.scale_log2, self.rows) };
        sync::sync_threads_or(few.any(|few| few != 0.0))
    }

    /// Writes delta of those that few keys share. The weights sum to 1, up to their roundings, which P * dP has as well; with a sink
    /// they sum to less. All threads of the block call this together.
    ///
    /// # Safety
    /// The queries are the warp's own and have a delta.
    #[inline(always)]
    pub(super) unsafe fn store(self, p: &BackwardParams, sums: Sums<S>) {
        let [weights, products] = [sums.weights, sums.products].map(|sums| S::Scores::reduce_rows(sums, |a, b| a + b));
        let divides = p.delta == DELTA_OF_KEYS;
        let delta = products.zip(
            weights,
            |product, weight| if divides { product / weight } else { product },
        );
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let few = self.statistics.of_few::<S::Scores>(p.scale_log2, self.rows);
            let delta = delta.zip(few, |delta, few| if few != 0.0 { delta } else { f32::NAN });
            let delta = self.statistics.deltas_with(delta);
            S::Scores::store_rows(delta, p.exponents.delta + self.first * 4, self.rows);
            sync::sync_threads();
        }
    }
}

/// Sums of a warp's queries over their keys, this lane's part.
pub(super) struct Sums<S: TileShape> {
    /// Sums of P.
    weights: <S::Scores as Accumulator>::Rows,
    /// Sums of P * dP.
    products: <S::Scores as Accumulator>::Rows,
}

impl<S: TileShape> Sums<S> {
    #[inline(always)]
    pub(super) fn zero() -> Self {
        let zero = RowValues::splat(0.0);
        Self {
            weights: zero,
            products: zero,
        }
    }

    /// Adds a streamed tile of keys.
    ///
    /// # Safety
    /// The contract of [`add`](super::add).
    #[inline(always)]
    pub(super) unsafe fn add<T: program::Tile, const MASKED: bool, const PROGRAM: bool>(
        &mut self,
        p: &BackwardParams,
        owned: Owned,
        stage: Stage,
        queries: &Queries<S>,
        tile: Tile<impl Fn(u32) -> Span>,
    ) {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let weights = probabilities::<S, T, MASKED, PROGRAM>(p, owned, stage, queries.statistics, &tile);
            let mut products = weight_gradients::<S, T, PROGRAM>(owned, stage);
            products.zip(&weights, |p, dp| if p == 0.0 { 0.0 } else { p * dp });
            self.weights = weights.fold_rows(self.weights, |sum, x| sum + x);
            self.products = products.fold_rows(self.products, |sum, x| sum + x);
        }
    }
}
