//! Elementwise steps between the products of backward: weights from scores, and gradients of scores from gradients of
//! weights. Both kernel families call these, so hidden pairs and large numbers are handled in one place. The steps of
//! forward are in [`softmax`](crate::softmax), which also hides with [`Accumulator::hide`].

use crate::abi::Exponents;
use crate::ptx::math::{ex2, fma, min_nan};
use crate::ptx::{memory, sreg, sync};
use crate::softmax::FAR;
use crate::tile::register::{Accumulator, Part, RowValues};
use crate::tile::warpgroup::WarpgroupScores;

/// Base-2 logarithm of a sum of weights, relative to the largest, of which one key has more than half.
const FEW_KEYS_LOG2: f32 = 1.0;

/// A scaled score beyond those of ordinary inputs, as an exponent of 2.
const LARGE_SCORE: f32 = 32.0;

/// Statistics of the queries of a tile that backward reads, whether queries are its rows or its columns.
pub trait QueryValues<A: Accumulator>: Copy {
    /// Subtracts the shift of each query: `x -= shift`, before scores are scaled.
    ///
    /// # Safety
    /// The statistics are initialised and readable.
    unsafe fn subtract_shift(self, scores: &mut A);

    /// Combines each score with its query's lse: `x = f(lse_log2, x)`.
    ///
    /// # Safety
    /// The contract of [`subtract_shift`](Self::subtract_shift).
    unsafe fn with_lse(self, scores: &mut A, f: impl Fn(f32, f32) -> f32);

    /// Subtracts the delta of each query: `x -= delta`.
    ///
    /// # Safety
    /// The contract of [`subtract_shift`](Self::subtract_shift).
    unsafe fn subtract_delta(self, dp: &mut A);
}

/// Statistics of queries that are rows: they stay in registers, except for the shifts, which are in shared memory.
#[derive(Clone, Copy)]
pub struct OfRows<R> {
    lse_log2: R,
    delta: R,
    shift: u32,
}

impl<R: RowValues> OfRows<R> {
    /// Loads the statistics of `rows` queries from index `first` on; those past the end are 0. Also returns true
    /// if any of the queries is far. Shifts are written to the shared address `shift`.
    ///
    /// # Safety
    /// The queries have statistics, and each row of the warp has a word of shared memory. The whole warp calls this
    /// together.
    #[inline(always)]
    pub unsafe fn load<A: Accumulator<Rows = R>>(
        exponents: &Exponents,
        first: u64,
        rows: u32,
        shift: u32,
    ) -> (Self, bool) {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let lse_log2 = A::load_rows(exponents.lse_log2 + first * 4, rows);
            let delta = A::load_rows(exponents.delta + first * 4, rows);
            let shifts = A::load_rows(exponents.shift + first * 4, rows);
            A::for_each_row(shifts, |row, x| memory::st_shared_word(shift + row * 4, x.to_bits()));
            sync::sync_warp();
            let is_far = sync::any(shifts.any(|x| x != 0.0) || lse_log2.any(|x| x.abs() > FAR));
            (Self { lse_log2, delta, shift }, is_far)
        }
    }
}

impl<R: RowValues> OfRows<R> {
    /// Returns 1 for each of the first `rows` queries of f32 that few keys share, and 0 for others: those of which one key has more than
    /// half of the weight, and those with a large score, which several keys may have.
    ///
    /// # Safety
    /// The statistics are readable.
    #[inline(always)]
    pub unsafe fn of_few<A: Accumulator<Rows = R>>(self, scale_log2: f32, rows: u32) -> R {
        let most = A::rows_from(|row| {
            // SAFETY: written when the queries were loaded.
            let score = unsafe { memory::ld_shared(self.shift + row * 4) } * scale_log2;
            match (row < rows, score.abs() > LARGE_SCORE) {
                (false, _) => f32::NEG_INFINITY,
                (true, false) => FEW_KEYS_LOG2,
                (true, true) => f32::INFINITY,
            }
        });
        most.zip(self.lse_log2, |most, lse| if lse < most { 1.0 } else { 0.0 })
    }

    /// Returns the deltas with those of `others` that are numbers in their places. A delta that is NaN stays NaN.
    #[inline(always)]
    pub fn deltas_with(self, others: R) -> R {
        self.delta.zip(
            others,
            |delta, other| if delta.is_nan() || other.is_nan() { delta } else { other },
        )
    }

    /// Loads the statistics of rows that lie in shared memory, from row `first` on.
    ///
    /// # Safety
    /// The statistics are initialised and readable.
    #[inline(always)]
    pub unsafe fn of_columns<A: Accumulator<Rows = R>>(lines: OfColumns, first: u32) -> Self {
        // SAFETY: the caller's contract.
        let load = |line| A::rows_from(|row| unsafe { memory::ld_shared(line + (first + row) * 4) });
        Self {
            lse_log2: load(lines.lse_log2),
            delta: load(lines.delta),
            shift: lines.shift + first * 4,
        }
    }
}

impl<A: Accumulator> QueryValues<A> for OfRows<A::Rows> {
    #[inline(always)]
    unsafe fn subtract_shift(self, scores: &mut A) {
        // SAFETY: written when the queries were loaded.
        let shifts = A::rows_from(|row| unsafe { memory::ld_shared(self.shift + row * 4) });
        scores.map_rows(shifts, |shift, s| s - shift);
    }

    #[inline(always)]
    unsafe fn with_lse(self, scores: &mut A, f: impl Fn(f32, f32) -> f32) {
        scores.map_rows(self.lse_log2, f);
    }

    #[inline(always)]
    unsafe fn subtract_delta(self, dp: &mut A) {
        dp.map_rows(self.delta, |delta, x| x - delta);
    }
}

/// Statistics of queries that are columns: they lie in shared memory, beside their tiles.
#[derive(Clone, Copy)]
pub struct OfColumns {
    /// Shared address of each column's lse_log2.
    pub lse_log2: u32,
    /// Shared address of each column's delta.
    pub delta: u32,
    /// Shared address of each column's shift.
    pub shift: u32,
}

impl OfColumns {
    /// Returns true if any of the first `columns` queries is far. A query that sees nothing of a score program is not.
    ///
    /// # Safety
    /// The statistics are initialised and readable. The whole warp calls this together.
    #[inline(always)]
    pub unsafe fn any_far(self, columns: u32) -> bool {
        let mut is_far = false;
        let mut column = sreg::lane_id();
        while column < columns {
            // SAFETY: the caller's contract.
            let [lse_log2, shift] =
                [self.lse_log2, self.shift].map(|line| unsafe { memory::ld_shared(line + column * 4) });
            is_far |= shift != 0.0 || lse_log2.abs() > FAR && lse_log2 != f32::INFINITY;
            column += 32;
        }
        sync::any(is_far)
    }
}

impl<A: Accumulator> QueryValues<A> for OfColumns {
    #[inline(always)]
    unsafe fn subtract_shift(self, scores: &mut A) {
        // SAFETY: the caller's contract.
        unsafe { scores.map_columns(self.shift, |shift, s| s - shift) }
    }

    #[inline(always)]
    unsafe fn with_lse(self, scores: &mut A, f: impl Fn(f32, f32) -> f32) {
        // SAFETY: the caller's contract.
        unsafe { scores.map_columns(self.lse_log2, f) }
    }

    #[inline(always)]
    unsafe fn subtract_delta(self, dp: &mut A) {
        // SAFETY: the caller's contract.
        unsafe { dp.map_columns(self.delta, |delta, x| x - delta) }
    }
}

/// Turns scores into weights, `exp2((s - shift) * scale_log2 - lse_log2)`. If no query is far, `shift` is 0. If one
/// is, no weight exceeds 1.
///
/// # Safety
/// The statistics of `queries` are readable.
#[inline(always)]
pub unsafe fn weights<A: Accumulator>(scores: &mut A, queries: impl QueryValues<A>, scale_log2: f32, is_far: bool) {
    // SAFETY (whole body): the caller's contract.
    unsafe {
        if is_far {
            queries.subtract_shift(scores);
            queries.with_lse(scores, |lse, s| ex2(min_nan(fma(s, scale_log2, -lse), 0.0)));
        } else {
            queries.with_lse(scores, |lse, s| ex2(fma(s, scale_log2, -lse)));
        }
    }
}

/// Turns gradients of weights into gradients of scores: `dS = P * (dP - delta)`. With `hides`, dS is 0 where P is 0:
/// dP and delta of a hidden pair may be NaN or infinite.
///
/// # Safety
/// The statistics of `queries` are readable.
#[inline(always)]
pub unsafe fn score_gradients<A: Accumulator>(dp: &mut A, weights: &A, queries: impl QueryValues<A>, hides: bool) {
    // SAFETY: the caller's contract.
    unsafe { queries.subtract_delta(dp) }
    if hides {
        dp.zip(weights, |p, x| if p == 0.0 { 0.0 } else { p * x });
    } else {
        dp.zip(weights, |p, x| p * x);
    }
}

/// [`weights`] of a part of the columns, whose queries are all near.
#[inline(always)]
pub fn weights_in<A: WarpgroupScores>(scores: &mut A, part: Part, lse_log2: A::Columns, scale_log2: f32) {
    scores.map_columns_in(part, lse_log2, |lse, s| ex2(fma(s, scale_log2, -lse)));
}

/// [`score_gradients`] of a part of the columns, of which no pair is hidden.
#[inline(always)]
pub fn score_gradients_in<A: WarpgroupScores>(dp: &mut A, weights: &A, part: Part, delta: A::Columns) {
    dp.map_columns_in(part, delta, |delta, x| x - delta);
    dp.zip_in(part, weights, |p, x| p * x);
}
