//! Online softmax of scores whose keys, and values, have scales by blocks.
//!
//! A score is the product of codes times a factor of its row and block. To base 2 the *share* of a key is its score plus the
//! logarithm of its value's scale, so that weights times codes of values add up to the output. The reference of a row's weights is
//! its largest share, less [`LARGEST`]: the largest weight is `2^LARGEST`, and the steps of e4m3 reach 17 powers of two below it.
//! Weights are added up before they are rounded, each block's divided by the scale of its values.
//!
//! The rounded reference is the same number for all weights of a row and for lse, so it has no error but in the difference from each
//! exponent. Beyond [`FAR`] that is too much, and could make weights that are no codes: such rows subtract the largest product of a
//! block first, as those of [`softmax`](crate::softmax) subtract their maximum, after which no exponent is above [`LARGEST`].

use crate::ptx::math::{ex2, fma, lg2, rcp};
use crate::ptx::sync;
use crate::softmax::{FAR, Finished};
use crate::tile::codes::CodeScores;
use crate::tile::register::{Part, RowValues};
use core::f32::consts::LN_2;

/// Base-2 logarithm of the largest weight. The largest code is 448.
const LARGEST: f32 = 8.0;

/// Scales of a tile of keys, by blocks.
#[derive(Clone, Copy)]
pub struct TileScales {
    /// Scales of keys.
    pub keys: [f32; 2],
    /// Base-2 logarithms of the scales of values, in units of a scale of the caller's.
    pub values_log2: [f32; 2],
}

/// Running statistics of the rows that a lane holds part of.
pub struct Softmax<A: CodeScores> {
    /// Factor of a row's products, which makes base-2 exponents of them.
    scale: A::Rows,
    /// Largest share so far; all lanes of a row hold the same value.
    largest_share: A::Rows,
    /// Largest score so far of this lane's columns, to base 2.
    largest: A::Rows,
    /// Sum of weights, in units of the scale of values, over this lane's columns.
    sum: A::Rows,
}

/// Factors and addends that make weights of a tile's products.
#[derive(Clone, Copy)]
pub struct Weights<R> {
    factor: [R; 2],
    addend: [R; 2],
    values_log2: [f32; 2],
    /// Factor of everything that was summed before.
    pub rescale: R,
}

impl<A: CodeScores> Softmax<A> {
    /// Starts rows that have seen nothing.
    #[inline(always)]
    pub fn new(scale: A::Rows) -> Self {
        Self {
            scale,
            largest_share: A::Rows::splat(f32::NEG_INFINITY),
            largest: A::Rows::splat(f32::NEG_INFINITY),
            sum: A::Rows::splat(0.0),
        }
    }

    /// Raises the references to a tile of `BLOCKS` blocks, whose products are then ready for [`weigh`](Self::weigh). With `HIDES` some
    /// may be hidden. The whole warp calls it together.
    #[inline(always)]
    pub fn raise<const HIDES: bool>(
        &mut self,
        products: &mut A,
        blocks: usize,
        scales: TileScales,
    ) -> Weights<A::Rows> {
        let nothing = A::Rows::splat(f32::NEG_INFINITY);
        let (mut factor, mut largest, mut share) = ([self.scale; 2], [nothing; 2], nothing);
        for block in 0..blocks {
            // Not 0, by which a hidden product would be NaN.
            factor[block] = self
                .scale
                .map(|scale| (scale * scales.keys[block]).max(f32::MIN_POSITIVE));
            largest[block] = products.max_of_block(block);
            let score = largest[block].zip(factor[block], |product, factor| product * factor);
            self.largest = self.largest.zip(score, f32::max);
            share = share.zip(score, |share, score| share.max(score + scales.values_log2[block]));
        }
        let old = self.largest_share;
        let of_lane = share.zip(old, f32::max);
        // A row that is far is far in one of its lanes.
        let any_is_far = sync::any(of_lane.any(|share| is_far(share) && !(HIDES && share == f32::NEG_INFINITY)));
        self.largest_share = A::reduce_rows(of_lane, f32::max);
        // A row that has seen nothing subtracts a finite number.
        let reference = self.largest_share.map(|share| share.max(-f32::MAX));
        let near = |block: usize, reference: f32| (scales.values_log2[block] + LARGEST) - reference;
        let mut addend = [reference; 2];
        for block in 0..blocks {
            addend[block] = reference.map(|reference| near(block, reference));
        }
        if any_is_far {
            core::hint::cold_path();
            for block in 0..blocks {
                let largest = A::reduce_rows(largest[block], f32::max).map(|product| product.max(-f32::MAX));
                // Other rows subtract 0, which changes no bit.
                let subtracted = largest.zip(
                    reference,
                    |largest, reference| if is_far(reference) { largest } else { 0.0 },
                );
                products.map_block(block, Part::WHOLE, [subtracted; 2], |subtracted, _, product| {
                    product - subtracted
                });
                let share = largest.zip(factor[block], |product, factor| product * factor);
                let share = share.map(|score| score + scales.values_log2[block]);
                addend[block] = share.zip(reference, |share, reference| match is_far(reference) {
                    true => (share - reference) + LARGEST,
                    false => near(block, reference),
                });
            }
        }
        Weights {
            factor,
            addend,
            values_log2: scales.values_log2,
            rescale: old.zip(reference, |old, new| ex2(old - new)),
        }
    }

    /// Turns a part of a tile's products into weights.
    #[inline(always)]
    pub fn weigh(&self, products: &mut A, blocks: usize, part: Part, weights: &Weights<A::Rows>) {
        for block in 0..blocks {
            let rows = [weights.factor[block], weights.addend[block]];
            products.map_block(block, part, rows, |factor, addend, product| {
                ex2(fma(product, factor, addend))
            });
        }
    }

    /// Adds a tile's weights to the rows' sums.
    #[inline(always)]
    pub fn sum(&mut self, tile: &A, blocks: usize, weights: &Weights<A::Rows>) {
        self.sum = self.sum.zip(weights.rescale, |sum, rescale| sum * rescale);
        for block in 0..blocks {
            let unit = ex2(-weights.values_log2[block]);
            self.sum = tile
                .sum_of_block(block)
                .zip(self.sum, |of_block, sum| fma(of_block, unit, sum));
        }
    }

    /// Returns the results of the rows; `inverse` normalises outputs in units of the scale of values. `scale_log2` makes base-2
    /// exponents of q.k, and `sees_keys(row)` is true if a row may see a key.
    #[inline(always)]
    pub fn finish(self, scale_log2: f32, sees_keys: impl Fn(u32) -> bool) -> Finished<A::Rows> {
        let sum = A::reduce_rows(self.sum, |a, b| a + b);
        let largest = A::reduce_rows(self.largest, f32::max);
        let reference = self.largest_share.map(|share| share - LARGEST);
        let of_nothing = A::rows_from(|row| if sees_keys(row) { f32::NAN } else { 0.0 });
        let or_nothing = |sum: f32, x: f32| if sum == 0.0 { f32::NEG_INFINITY } else { x };
        let of_largest = reference.zip(largest, |reference, largest| ex2(reference - largest));
        Finished {
            inverse: sum.zip(of_nothing, |sum, nothing| if sum == 0.0 { nothing } else { rcp(sum) }),
            lse: sum.zip(reference, |sum, reference| {
                or_nothing(sum, (reference + lg2(sum)) * LN_2)
            }),
            row_max: sum.zip(largest, |sum, largest| or_nothing(sum, largest * rcp(scale_log2))),
            row_sum: sum
                .zip(of_largest, |sum, factor| if sum == 0.0 { 0.0 } else { sum * factor })
                .zip(of_nothing, |sum, nothing| if sum == 0.0 { nothing } else { sum }),
        }
    }
}

/// Tells if a row of this largest share subtracts the largest products before it multiplies.
#[inline(always)]
fn is_far(share: f32) -> bool {
    share.abs() > FAR
}
