//! Online softmax: the running row max and row sum of FlashAttention, Algorithm 1.
//!
//! Scores stay unscaled until the exponential, which folds `softmax_scale * log2(e)` into one FMA: `exp2(s * c - m * c)`. There
//! `s * c` is exact and `m * c` is rounded, so that a row's weights all come out times `2^(m * c - round(m * c))`. That
//! factor cancels in the output and in lse, as long as it is small: up to `|m * c| =` [`FAR`] it lies within `2^(2^-14)` of 1.
//! A row beyond subtracts before it multiplies, `exp2((s - m) * c)`: exact where it matters, and never above 1, whatever the
//! magnitude of scores and scale. A warp that has met such a row goes that way from then on.
//!
//! The rule for minus infinity, written once: a row that has seen nothing has `row_max = -inf`, and `-inf - -inf` would be
//! NaN where a zero is meant, so the maximum that is subtracted is 0 there. Masked scores are -inf and vanish against
//! any maximum. A row that may see no key at all ends with out = 0 and lse = -inf; a row whose every visible score is -inf
//! ends with out = NaN, as IEEE arithmetic has it.

use core::f32::consts::LN_2;

use crate::ptx::math::{ex2, fma, lg2, rcp};
use crate::ptx::sync;
use crate::tile::register::{Accumulator, RowValues};

/// Exponent, to base 2, beyond which one rounding of it is too much: there it is off by `2^-14`.
pub const FAR: f32 = 1024.0;

/// Running statistics of the rows that a lane holds part of.
pub struct OnlineSoftmax<A: Accumulator> {
    /// Largest score so far; all lanes of a row hold the same value.
    row_max: A::Rows,
    /// Sum of exponentials relative to it, over this lane's columns only.
    row_sum: A::Rows,
    scale_log2: f32,
    /// True once a row of this warp has been far.
    is_far: bool,
}

/// Results of the softmax of a row.
pub struct Finished<R> {
    /// Factor that normalises the output.
    pub inverse: R,
    /// Natural log-sum-exp.
    pub lse: R,
    /// Largest score.
    pub row_max: R,
    /// Sum of exponentials relative to `row_max`; NaN if every visible score is minus infinity, 0 if none is visible.
    pub row_sum: R,
}

impl<A: Accumulator> OnlineSoftmax<A> {
    /// Nothing seen yet.
    #[inline(always)]
    pub fn new(scale_log2: f32) -> Self {
        Self {
            row_max: A::Rows::splat(f32::NEG_INFINITY),
            row_sum: A::Rows::splat(0.0),
            scale_log2,
            is_far: false,
        }
    }

    /// Turns scores into unnormalised probabilities, and returns what everything summed before must be multiplied by. The
    /// whole warp calls it together.
    #[inline(always)]
    pub fn update(&mut self, scores: &mut A) -> A::Rows {
        let scale = self.scale_log2;
        let old_max = self.row_max;
        self.row_max = A::reduce_rows(scores.fold_rows(old_max, f32::max), f32::max);
        let mut subtracted = self
            .row_max
            .map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max * scale });
        // Rounded as it was when it was subtracted: the products of rescalings then telescope exactly.
        let mut rescale = old_max.zip(subtracted, |old, new| ex2(old * scale - new));
        self.is_far = sync::any(self.is_far || subtracted.any(|x| x.abs() > FAR));
        if self.is_far {
            core::hint::cold_path();
            (subtracted, rescale) = self.shift(old_max, scores);
        }
        scores.map_rows(subtracted, |max, score| ex2(fma(score, scale, -max)));
        self.row_sum = scores.fold_rows(self.row_sum.zip(rescale, |sum, r| sum * r), |sum, p| sum + p);
        rescale
    }

    /// Subtracts the maximum of each far row from its scores, and returns what is left to subtract from their exponents, and the
    /// factor of everything before.
    #[inline(always)]
    fn shift(&self, old_max: A::Rows, scores: &mut A) -> (A::Rows, A::Rows) {
        let scale = self.scale_log2;
        let new_max = self.row_max;
        let shift = new_max.map(|max| if is_far(max, scale) { max } else { 0.0 });
        scores.map_rows(shift, |shift, score| score - shift);
        let subtracted = new_max.map(|max| {
            if max == f32::NEG_INFINITY || is_far(max, scale) {
                0.0
            } else {
                max * scale
            }
        });
        // Relative to what each was subtracted: the product, exact if far, else rounded.
        let rescale = old_max.zip(new_max, |old, new| {
            if old == f32::NEG_INFINITY {
                0.0
            } else {
                ex2(match (is_far(old, scale), is_far(new, scale)) {
                    (true, true) => (old - new) * scale,
                    (true, false) => fma(old, scale, -(new * scale)),
                    (false, true) => fma(-new, scale, old * scale),
                    (false, false) => old * scale - new * scale,
                })
            }
        });
        (subtracted, rescale)
    }

    /// Returns the results of the rows. `sees_keys(row)` is true if a row may see a key.
    #[inline(always)]
    pub fn finish(self, sees_keys: impl Fn(u32) -> bool) -> Finished<A::Rows> {
        let scale = self.scale_log2;
        let row_sum = A::reduce_rows(self.row_sum, |a, b| a + b);
        let of_nothing = A::rows_from(|row| if sees_keys(row) { f32::NAN } else { 0.0 });
        let inverse = row_sum.zip(of_nothing, |sum, nothing| if sum == 0.0 { nothing } else { rcp(sum) });
        let lse = self.row_max.zip(row_sum, |max, sum| {
            if sum == 0.0 {
                f32::NEG_INFINITY
            } else {
                (max * scale + lg2(sum)) * LN_2
            }
        });
        // Of a near row, without the factor that the rounded product left in it.
        let exact_sum = self.row_max.zip(row_sum, |max, sum| {
            if sum == 0.0 || is_far(max, scale) {
                sum
            } else {
                fma(-fma(max, scale, -(max * scale)) * LN_2, sum, sum)
            }
        });
        Finished {
            inverse,
            lse,
            row_max: self.row_max,
            row_sum: exact_sum.zip(of_nothing, |sum, nothing| if sum == 0.0 { nothing } else { sum }),
        }
    }
}

/// Tells if a row of this maximum subtracts it before it multiplies by the scale.
#[inline(always)]
fn is_far(max: f32, scale: f32) -> bool {
    max != f32::NEG_INFINITY && (max * scale).abs() > FAR
}
