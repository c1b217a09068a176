//! Online softmax: the running row max and row sum of FlashAttention, Algorithm 1.
//!
//! Scores stay unscaled until the exponential, which folds `softmax_scale * log2(e)` into one FMA: `exp2(s * c - m * c)`. There
//! `s * c` is exact and `m * c` is rounded, so that a row's weights all come out times `2^(m * c - round(m * c))`. That
//! factor cancels in the output and in lse, as long as it is small: up to `|m * c| =` [`FAR`] it lies within `2^(2^-14)` of 1.
//! A row beyond it is far, and subtracts before it multiplies, `exp2((s - m) * c)`: exact where it matters, and never above 1, whatever the
//! magnitude of scores and scale.
//!
//! Far rows are rare, and there are two ways to find them. A kernel that loads ahead of the arithmetic and cannot start again looks in
//! every tile: [`OnlineSoftmax::new`] and [`raise_row`](OnlineSoftmax::raise_row). A kernel that can start again looks at the end. Its
//! maxima start at `-FAR / c`, [`OnlineSoftmax::near`], so that weights do not overflow. If a row has left these bounds, the
//! block walks its keys again with [`OnlineSoftmax::exact`], which subtracts first in every row.
//!
//! The rule for minus infinity, written once: a row that has seen nothing has `row_max = -inf`, and `-inf - -inf` would be
//! NaN where a zero is meant, so a finite number is subtracted there. Masked scores are -inf, and their weight is 0 then. A row
//! that may see no key at all ends with out = 0 and lse = -inf; a row whose every visible score is -inf ends with out = NaN, as
//! IEEE arithmetic has it.

use core::f32::consts::LN_2;

use crate::ptx::math::{ex2, fma, lg2, rcp};
use crate::ptx::{program, sync};
use crate::tile::register::{Accumulator, Part, RowValues};
use crate::tile::warpgroup::WarpgroupScores;

/// Exponent, to base 2, beyond which one rounding of it is too much: there it is off by `2^-14`.
pub const FAR: f32 = 1024.0;

/// Running statistics of the rows that a lane holds part of.
pub struct OnlineSoftmax<A: Accumulator> {
    /// Largest score so far; all lanes of a row hold the same value.
    row_max: A::Rows,
    /// Sum of exponentials relative to it, over this lane's columns only.
    row_sum: A::Rows,
    scale_log2: f32,
    /// Subtracts the maximum of every row before it multiplies.
    is_exact: bool,
}

/// The reference of a tile's weights in a row.
#[derive(Clone, Copy)]
pub struct Reference {
    /// Subtracted from the scaled scores.
    subtracted: f32,
    /// Factor of everything that was summed before.
    pub rescale: f32,
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
    /// Starts rows that have seen nothing, for tiles through [`raise_row`](Self::raise_row),
    /// [`weigh_row`](Self::weigh_row) and [`sum`](Self::sum).
    #[inline(always)]
    pub fn new(scale_log2: f32) -> Self {
        Self::start(scale_log2, f32::NEG_INFINITY, false)
    }

    /// Starts rows that have seen nothing, for tiles through [`update::<false>`](Self::update). The results are right if no row
    /// [left its bounds](Self::left_bounds) in the end.
    #[inline(always)]
    pub fn near(scale_log2: f32) -> Self {
        Self::start(scale_log2, floor(scale_log2), false)
    }

    /// Starts rows that have seen nothing, for tiles through [`update::<true>`](Self::update). The results are right for any row.
    #[inline(always)]
    pub fn exact(scale_log2: f32) -> Self {
        Self::start(scale_log2, -f32::MAX, true)
    }

    #[inline(always)]
    fn start(scale_log2: f32, row_max: f32, is_exact: bool) -> Self {
        Self {
            row_max: A::Rows::splat(row_max),
            row_sum: A::Rows::splat(0.0),
            scale_log2,
            is_exact,
        }
    }

    /// Lets a score program start each row, which has seen nothing yet, with a sink. Of the splits of a row only the first has it.
    #[inline(always)]
    pub fn start_program(&mut self, is_first: bool) {
        let nothing = if self.is_exact { -f32::MAX } else { f32::NEG_INFINITY };
        let started = program::start(nothing, 0.0);
        let (row_max, row_sum) = if is_first { started } else { (nothing, 0.0) };
        (self.row_max, self.row_sum) = (A::Rows::splat(row_max), A::Rows::splat(row_sum));
    }

    /// Tells if a row's largest score is out of the bounds of [`near`](Self::near), or may be. `sees_keys(row)` is true if a row
    /// may see any key.
    #[inline(always)]
    pub fn left_bounds(&self, sees_keys: impl Fn(u32) -> bool) -> bool {
        let (scale, floor) = (self.scale_log2, floor(self.scale_log2));
        let sees_keys = A::rows_from(|row| if sees_keys(row) { 1.0 } else { 0.0 });
        let left = self.row_max.zip(sees_keys, |max, sees_keys| {
            if max * scale > FAR || max <= floor {
                sees_keys
            } else {
                0.0
            }
        });
        left.any(|left| left != 0.0)
    }

    /// Turns scores into unnormalised probabilities, and returns what everything summed before must be multiplied by. The whole warp
    /// calls it together.
    #[inline(always)]
    pub fn update<const EXACT: bool>(&mut self, scores: &mut A) -> A::Rows {
        let scale = self.scale_log2;
        let old_max = self.row_max;
        self.row_max = A::reduce_rows(scores.max_rows(old_max), f32::max);
        let (subtracted, rescale) = if EXACT {
            scores.map_rows(self.row_max, |max, score| score - max);
            let rescale = old_max.zip(self.row_max, |old, new| ex2((old - new) * scale));
            (A::Rows::splat(0.0), rescale)
        } else {
            // Rounded as it was when it was subtracted, so the products of rescalings telescope exactly.
            let subtracted = self.row_max.map(|max| max * scale);
            (subtracted, old_max.zip(subtracted, |old, new| ex2(old * scale - new)))
        };
        scores.map_rows(subtracted, |max, score| ex2(fma(score, scale, -max)));
        self.sum(scores, rescale);
        rescale
    }

    /// Adds a tile's probabilities to the rows' sums, of which the earlier ones are rescaled.
    #[inline(always)]
    pub fn sum(&mut self, probabilities: &A, rescale: A::Rows) {
        let before = self.row_sum.zip(rescale, |sum, r| sum * r);
        self.row_sum = probabilities.fold_rows(before, |sum, p| sum + p);
    }

    /// Returns the largest score of the keys so far, and the sum of weights relative to it.
    #[inline(always)]
    pub fn partial(&self) -> (A::Rows, A::Rows) {
        (self.row_max, A::reduce_rows(self.row_sum, |a, b| a + b))
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
        let row_max = self
            .row_max
            .zip(row_sum, |max, sum| if sum == 0.0 { f32::NEG_INFINITY } else { max });
        // The sum of a near row, without the factor that the rounding of `max * scale` left in it.
        let exact_sum = self.row_max.zip(row_sum, |max, sum| {
            if sum == 0.0 || self.is_exact || is_far(max, scale) {
                sum
            } else {
                fma(-fma(max, scale, -(max * scale)) * LN_2, sum, sum)
            }
        });
        Finished {
            inverse,
            lse,
            row_max,
            row_sum: exact_sum.zip(of_nothing, |sum, nothing| if sum == 0.0 { nothing } else { sum }),
        }
    }
}

impl<A: WarpgroupScores> OnlineSoftmax<A> {
    /// Raises the maximum of one of a lane's two rows to that of a tile, whose scores of this row are then ready for
    /// [`weigh_row`](Self::weigh_row). If the tile `hides` some, rows that have seen nothing are common. The whole warp calls it together.
    #[inline(always)]
    pub fn raise_row(&mut self, scores: &mut A, row: usize, hides: bool) -> Reference {
        let scale = self.scale_log2;
        let old_max = self.row_max.0[0][row];
        let lane_max = scores.max_row(row, old_max);
        // Each lane tests its own columns: a row that is far is far in one of its lanes.
        let of_lane = if hides && lane_max == f32::NEG_INFINITY {
            0.0
        } else {
            lane_max * scale
        };
        let is_any_far = sync::any(of_lane.abs() > FAR);
        let max = A::reduce_row(lane_max, f32::max);
        self.row_max.0[0][row] = max;
        if is_any_far {
            core::hint::cold_path();
            let (shift, reference) = of_any_row(old_max, max, scale);
            scores.map_row_in(Part::WHOLE, row, |score| score - shift);
            return reference;
        }
        // Rounded as it was when it was subtracted, so the products of rescalings telescope exactly.
        let subtracted = (max * scale).max(-f32::MAX);
        Reference {
            subtracted,
            rescale: ex2(old_max * scale - subtracted),
        }
    }

    /// Turns a part of a row's scores into unnormalised probabilities.
    #[inline(always)]
    pub fn weigh_row(&self, scores: &mut A, part: Part, row: usize, reference: Reference) {
        let (scale, subtracted) = (self.scale_log2, reference.subtracted);
        scores.map_row_in(part, row, |score| ex2(fma(score, scale, -subtracted)));
    }
}

/// Returns what a row that may be far subtracts from its scores, and its reference afterwards: a far row subtracts its maximum. A row that
/// has seen nothing has summed nothing, so any finite factor is right.
#[inline(always)]
fn of_any_row(old_max: f32, new_max: f32, scale: f32) -> (f32, Reference) {
    let (old, new) = (old_max.max(-f32::MAX), new_max.max(-f32::MAX));
    let (shift, subtracted) = if is_far(new, scale) {
        (new, 0.0)
    } else {
        (0.0, new * scale)
    };
    // The difference of the two references, each exact if far, else rounded.
    let rescale = ex2(match (is_far(old, scale), is_far(new, scale)) {
        (true, true) => (old - new) * scale,
        (true, false) => fma(old, scale, -(new * scale)),
        (false, true) => fma(-new, scale, old * scale),
        (false, false) => old * scale - new * scale,
    });
    (shift, Reference { subtracted, rescale })
}

/// The maximum that near rows start with: subtracted, it leaves no weight above 1 and no row's weights too small.
#[inline(always)]
fn floor(scale: f32) -> f32 {
    (-FAR / scale).max(-f32::MAX)
}

/// Tells if a row of this maximum, a finite number, subtracts it before it multiplies by the scale.
#[inline(always)]
fn is_far(max: f32, scale: f32) -> bool {
    (max * scale).abs() > FAR
}
