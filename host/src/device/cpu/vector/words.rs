//! Operations of score programs on a register, beyond products and softmaxes: division, comparison, and integers in
//! the place of f32.
//!
//! A register holds words of 32 bits: f32, i32, or truths, which are all ones or all zeros. Every method has a form
//! over arrays, so an instruction set need not have any of them.

use super::{Portable, Vector};

/// A register as words.
///
/// # Safety
/// The contract of [`Vector`].
pub(in crate::device::cpu) unsafe trait Words: Vector {
    /// `self / other`.
    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        // SAFETY: passed on to the caller, as in all that follow.
        unsafe { zip_numbers(self, other, |x, y| x / y) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: as above.
        unsafe { zip_numbers(self, self, |x, _| x.sqrt()) }
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        // SAFETY: as above.
        unsafe { zip_numbers(self, self, |x, _| x.floor()) }
    }
    /// The truth of `self < other`, false for NaN.
    #[inline(always)]
    unsafe fn less(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_numbers(self, other, |x, y| truth(x < y)) }
    }
    /// The truth of `self <= other`, false for NaN.
    #[inline(always)]
    unsafe fn less_or_equal(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_numbers(self, other, |x, y| truth(x <= y)) }
    }
    /// The truth of `self == other`, false for NaN.
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_numbers(self, other, |x, y| truth(x == y)) }
    }
    /// Words of `x` where `self`, a truth, holds, else of `y`.
    #[inline(always)]
    unsafe fn choose(self, x: Self, y: Self) -> Self {
        // SAFETY: as above.
        unsafe { self.and(x).or(self.and_not(y)) }
    }
    /// The i32 as f32, rounded to the nearest.
    #[inline(always)]
    unsafe fn to_number(self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, self, |x, _| (x as f32).to_bits() as i32) }
    }
    /// Whole numbers as i32: the nearest beyond its range, 0 for NaN.
    #[inline(always)]
    unsafe fn to_word(self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, self, |x, _| f32::from_bits(x as u32) as i32) }
    }
    #[inline(always)]
    unsafe fn add_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, i32::wrapping_add) }
    }
    #[inline(always)]
    unsafe fn sub_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, i32::wrapping_sub) }
    }
    #[inline(always)]
    unsafe fn mul_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, i32::wrapping_mul) }
    }
    #[inline(always)]
    unsafe fn min_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, Ord::min) }
    }
    #[inline(always)]
    unsafe fn max_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, Ord::max) }
    }
    /// The Euclidean quotient by a positive number; 0 by any other.
    #[inline(always)]
    unsafe fn quotient(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| if y > 0 { x.div_euclid(y) } else { 0 }) }
    }
    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| x & y) }
    }
    /// Bits of `other` that `self` has not.
    #[inline(always)]
    unsafe fn and_not(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| !x & y) }
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| x | y) }
    }
    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| x ^ y) }
    }
    /// Moved to the left by `other` modulo 32.
    #[inline(always)]
    unsafe fn shift_left(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| x.wrapping_shl(y as u32)) }
    }
    /// Moved to the right by `other` modulo 32; the sign fills.
    #[inline(always)]
    unsafe fn shift_right(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| x.wrapping_shr(y as u32)) }
    }
    /// The truth of `self < other` of i32.
    #[inline(always)]
    unsafe fn less_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| -i32::from(x < y)) }
    }
    /// The truth of `self == other` of i32.
    #[inline(always)]
    unsafe fn equal_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { zip_words(self, other, |x, y| -i32::from(x == y)) }
    }

    /// The i32 in every lane.
    #[inline(always)]
    unsafe fn splat_word(value: i32) -> Self {
        // SAFETY: as above.
        unsafe { Self::splat(f32::from_bits(value as u32)) }
    }
    /// The smaller number; `self` where `other` is NaN, and the other way round.
    #[inline(always)]
    unsafe fn smaller(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let smaller = self.less(other).choose(self, other);
            other.equal(other).choose(smaller, self)
        }
    }
    /// The larger number; `self` where `other` is NaN, and the other way round.
    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { other.equal(other).choose(self.max(other), self) }
    }
    /// e^x within 2 units in the last place.
    ///
    /// x = n ln 2 + r with n whole and |r| <= ln 2 / 2. e^r is a polynomial; 2^n is multiplied in two steps, so that
    /// results below the smallest normal number are right too.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: as above.
        unsafe {
            let highest = Self::splat(89.0);
            // A NaN stays one in both.
            let x = Self::splat(-104.0).max(self.select_greater(highest, highest, self));
            let round = Self::splat(12_582_912.0); // 1.5 * 2^23
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).add(round).sub(round);
            let r = n.fma(Self::splat(-LN_2_HIGH), x);
            let r = n.fma(Self::splat(-LN_2_LOW), r);
            let mut power = Self::splat(EXP[0]);
            for coefficient in &EXP[1..] {
                power = power.fma(r, Self::splat(*coefficient));
            }
            let power = power.mul(r).fma(r, r).add(Self::splat(1.0));
            let n = n.to_word();
            let half = n.shift_right(Self::splat_word(1));
            let bias = Self::splat_word(127);
            let (first, second) = (half.add_words(bias), n.sub_words(half).add_words(bias));
            power.mul(first.power_of_two()).mul(second.power_of_two())
        }
    }
    /// The natural logarithm within 2 units in the last place.
    #[inline(always)]
    unsafe fn log(self) -> Self {
        // SAFETY: as above.
        unsafe {
            let (zero, one) = (Self::splat(0.0), Self::splat(1.0));
            let small = self.less(Self::splat(f32::MIN_POSITIVE));
            let x = small.choose(self.mul(Self::splat(8_388_608.0)), self);
            let exponent = x.shift_right(Self::splat_word(23)).sub_words(Self::splat_word(126));
            let exponent = exponent.sub_words(small.and(Self::splat_word(23))).to_number();
            let m = x.and(Self::splat_word(0x7f_ffff)).or(Self::splat(0.5));
            let low = m.less(Self::splat(std::f32::consts::FRAC_1_SQRT_2));
            let exponent = exponent.sub(low.and(one));
            let m = m.sub(one).add(low.and(m));
            let square = m.mul(m);
            let mut series = Self::splat(LOG[0]);
            for coefficient in &LOG[1..] {
                series = series.fma(m, Self::splat(*coefficient));
            }
            let rest = series.mul(m).mul(square);
            let rest = exponent.fma(Self::splat(LN_2_LOW), rest);
            let rest = square.fma(Self::splat(-0.5), rest);
            let log = exponent.fma(Self::splat(LN_2_HIGH), m.add(rest));
            let infinity = Self::splat(f32::INFINITY);
            let log = self.equal(infinity).choose(infinity, log);
            let log = self.equal(zero).choose(Self::splat(f32::NEG_INFINITY), log);
            zero.less_or_equal(self).choose(log, Self::splat(f32::NAN))
        }
    }
    /// The hyperbolic tangent within 8 units in the last place: a quotient of polynomials, up to where it is 1.
    #[inline(always)]
    unsafe fn tanh(self) -> Self {
        // SAFETY: as above.
        unsafe {
            let limit = Self::splat(TANH_LIMIT);
            let x = self.select_greater(limit, limit, self); // a NaN stays one
            let x = Self::splat(-TANH_LIMIT).max(x);
            let square = x.mul(x);
            let mut numerator = Self::splat(TANH_NUMERATOR[0]);
            for coefficient in &TANH_NUMERATOR[1..] {
                numerator = numerator.fma(square, Self::splat(*coefficient));
            }
            let mut denominator = Self::splat(TANH_DENOMINATOR[0]);
            for coefficient in &TANH_DENOMINATOR[1..] {
                denominator = denominator.fma(square, Self::splat(*coefficient));
            }
            let quotient = numerator.mul(x).divide(denominator);
            let sign = Self::splat(-0.0);
            let one = Self::splat(1.0).or(sign.and(self));
            sign.and_not(self)
                .select_greater(Self::splat(TANH_IS_ONE), one, quotient)
        }
    }
}

/// ln 2 as the sum of two numbers, the first of so few bits that its product with an exponent is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// (e^r - 1 - r) / r^2, from the Cephes library.
const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    5.0e-1,
];

/// (ln(1 + m) - m + m^2 / 2) / m^3, from the Cephes library.
const LOG: [f32; 9] = [
    7.037_683_6e-2,
    -1.151_461e-1,
    1.167_699_87e-1,
    -1.242_014_1e-1,
    1.424_932_3e-1,
    -1.666_805_8e-1,
    2.000_071_5e-1,
    -2.499_999_4e-1,
    3.333_333e-1,
];

/// tanh(x) = x n(x^2) / d(x^2) as the Eigen library has it, divided by the lowest coefficient of d; highest power
/// first.
const TANH_NUMERATOR: [f32; 7] = [
    -5.641_676e-14,
    4.087_417_2e-11,
    -1.758_378_9e-8,
    1.046_749_9e-5,
    3.036_098_3e-3,
    1.302_255_4e-1,
    9.999_999e-1,
];
const TANH_DENOMINATOR: [f32; 4] = [2.448_661e-4, 2.422_276_3e-2, 4.635_583_8e-1, 1.0];

/// The quotient of polynomials is nearly 1 here, and past 1 beyond.
const TANH_LIMIT: f32 = 7.905_311;

/// Beyond, 1 is the nearest f32.
const TANH_IS_ONE: f32 = 9.02;

/// All ones as f32, or 0.
#[inline(always)]
fn truth(holds: bool) -> f32 {
    f32::from_bits(if holds { u32::MAX } else { 0 })
}

/// `f` of the f32 in each lane.
#[inline(always)]
unsafe fn zip_numbers<V: Vector>(x: V, y: V, f: impl Fn(f32, f32) -> f32) -> V {
    let (mut x_lanes, mut y_lanes) = ([0.0_f32; 16], [0.0_f32; 16]);
    // SAFETY: no register is longer.
    unsafe {
        x.store(x_lanes.as_mut_ptr());
        y.store(y_lanes.as_mut_ptr());
        for lane in 0..V::LANES {
            x_lanes[lane] = f(x_lanes[lane], y_lanes[lane]);
        }
        V::load(x_lanes.as_ptr())
    }
}

/// `f` of the i32 in each lane.
#[inline(always)]
unsafe fn zip_words<V: Vector>(x: V, y: V, f: impl Fn(i32, i32) -> i32) -> V {
    let (mut x_lanes, mut y_lanes) = ([0_i32; 16], [0_i32; 16]);
    // SAFETY: no register is longer, and a load keeps every bit.
    unsafe {
        x.store(x_lanes.as_mut_ptr().cast());
        y.store(y_lanes.as_mut_ptr().cast());
        for lane in 0..V::LANES {
            x_lanes[lane] = f(x_lanes[lane], y_lanes[lane]);
        }
        V::load(x_lanes.as_ptr().cast())
    }
}

// SAFETY: the forms over arrays.
unsafe impl Words for Portable {}
