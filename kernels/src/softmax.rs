//! Online softmax: the running row max and row sum of FlashAttention, Algorithm 1.
//!
//! Scores stay unscaled until the exponential, which folds `softmax_scale * log2(e)` into one FMA: `exp2(s * c - m * c)`.
//!
//! The rule for minus infinity, written once: a row that has seen nothing has `row_max = -inf`, and `-inf - -inf` would be
//! NaN where a zero is meant, so the maximum that is subtracted is 0 there. Masked scores are -inf and vanish against
//! any maximum. A row that may see no key at all ends with out = 0 and lse = -inf; a row whose every visible score is -inf
//! ends with out = NaN, as IEEE arithmetic has it.

use core::f32::consts::{LN_2, LOG2_E};

use crate::ptx::math::{ex2, fma, lg2, rcp};
use crate::tile::register::{Accumulator, RowValues};

/// Running statistics of the rows that a lane holds part of.
pub struct OnlineSoftmax<A: Accumulator> {
    /// Largest score so far; the lanes of a row agree on it.
    row_max: A::Rows,
    /// Sum of exponentials relative to it, over this lane's columns only.
    row_sum: A::Rows,
    scale_log2: f32,
}

impl<A: Accumulator> OnlineSoftmax<A> {
    /// Nothing seen yet.
    #[inline(always)]
    pub fn new(scale_log2: f32) -> Self {
        Self {
            row_max: A::Rows::splat(f32::NEG_INFINITY),
            row_sum: A::Rows::splat(0.0),
            scale_log2,
        }
    }

    /// Turns scores into unnormalised probabilities, and returns what everything summed before must be multiplied by.
    #[inline(always)]
    pub fn update(&mut self, scores: &mut A) -> A::Rows {
        let scale = self.scale_log2;
        let old_max = self.row_max;
        self.row_max = A::reduce_rows(scores.fold_rows(old_max, f32::max), f32::max);
        let subtracted = self
            .row_max
            .map(|max| if max == f32::NEG_INFINITY { 0.0 } else { max * scale });
        // Rounded as it was when it was subtracted: the products of rescalings then telescope exactly.
        let rescale = old_max.zip(subtracted, |old, new| ex2(old * scale - new));
        scores.map_rows(subtracted, |max, score| ex2(fma(score, scale, -max)));
        self.row_sum = scores.fold_rows(self.row_sum.zip(rescale, |sum, r| sum * r), |sum, p| sum + p);
        rescale
    }

    /// (factor that normalises the output, natural log-sum-exp). `sees_keys(row)` is whether a row may see any key.
    #[inline(always)]
    pub fn finish(self, sees_keys: impl Fn(u32) -> bool) -> (A::Rows, A::Rows) {
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
        (inverse, lse)
    }
}

/// lse in base 2. A row that saw nothing has minus infinity, which must make every probability 0, not infinite.
#[inline(always)]
pub fn log2_of(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY {
        f32::INFINITY
    } else {
        lse * LOG2_E
    }
}
