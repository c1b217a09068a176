//! delta of queries that few keys share: the sum of P * dP over the keys, of the very numbers that the main loop has. f32 alone.
//!
//! Where one key has all the weight of a query, the gradient of its score, `P * (dP - delta)`, is 0; where several share it, their
//! gradients sum to 0. rowsum(dO * O) is not rounded as dP is, and leaves a remainder of a few roundings of dP. With many keys it is
//! smaller than their own roundings, but with few it is not. A block of queries that has such a one walks over its keys twice: once for
//! delta, which it leaves for the kernel of dK and dV too, and once for dQ.

use super::{Owned, Tile, probabilities, weight_gradients};
use crate::abi::{BackwardParams, DELTA_OF_KEYS};
use crate::mask::Span;
use crate::pipeline::Stage;
use crate::ptx::{program, sync};
use crate::scores::OfRows;
use crate::shape::{TileShape, TileSizes};
use crate::tile::register::{Accumulator, RowValues};

/// Returns true if some queries of the block may have their delta from the keys.
#[inline(always)]
pub(super) fn applies<S: TileSizes>(p: &BackwardParams) -> bool {
    S::ELEMENT_BYTES == 4 && p.delta != 0
}

/// Tells if few keys share any of the block's queries, of which the warp has `rows`. All threads of the block call this together.
///
/// # Safety
/// The statistics of `queries` are readable.
#[inline(always)]
pub(super) unsafe fn any_of_few<S: TileShape>(
    p: &BackwardParams,
    queries: OfRows<<S::Scores as Accumulator>::Rows>,
    rows: u32,
) -> bool {
    // SAFETY: the caller's contract.
    let few = unsafe { queries.of_few::<S::Scores>(p.scale_log2, rows) };
    sync::sync_threads_or(few.any(|few| few != 0.0))
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
        queries: OfRows<<S::Scores as Accumulator>::Rows>,
        tile: Tile<impl Fn(u32) -> Span>,
    ) {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let weights = probabilities::<S, T, MASKED, PROGRAM>(p, owned, stage, queries, &tile);
            let mut products = weight_gradients::<S, T, PROGRAM>(owned, stage);
            products.zip(&weights, |p, dp| if p == 0.0 { 0.0 } else { p * dp });
            self.weights = weights.fold_rows(self.weights, |sum, x| sum + x);
            self.products = products.fold_rows(self.products, |sum, x| sum + x);
        }
    }

    /// Writes delta of the queries from number `first` on, `rows` of this warp, that few keys share. The weights sum to 1 but for their
    /// roundings, which P * dP has as well; not where a sink has a part.
    ///
    /// # Safety
    /// The queries are the warp's own and have a delta, and `queries` are their statistics.
    #[inline(always)]
    pub(super) unsafe fn store(
        self,
        p: &BackwardParams,
        queries: OfRows<<S::Scores as Accumulator>::Rows>,
        first: u64,
        rows: u32,
    ) {
        let [weights, products] = [self.weights, self.products].map(|sums| S::Scores::reduce_rows(sums, |a, b| a + b));
        let divides = p.delta == DELTA_OF_KEYS;
        let delta = products.zip(
            weights,
            |product, weight| if divides { product / weight } else { product },
        );
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let few = queries.of_few::<S::Scores>(p.scale_log2, rows);
            let delta = queries.deltas_with(delta.zip(few, |delta, few| if few != 0.0 { delta } else { f32::NAN }));
            S::Scores::store_rows(delta, p.exponents.delta + first * 4, rows);
            sync::sync_threads();
        }
    }
}
