//! Double-precision arithmetic (manual section "Floating Point Instructions", type `.f64`).
//!
//! For round-to-nearest-even the host's own instruction is used; the directed modes use [`Exact`]. A NaN operand
//! passes its payload, made quiet; a new NaN is 0xfff8000000000000, as on hardware.

use super::Rounding;
use super::float32::Property;
use super::minmax::{Extremum, MinMaxMode, extremum};
use super::round::Exact;

/// NaN of an invalid f64 operation.
pub const F64_NAN_BITS: u64 = 0xfff8_0000_0000_0000;

/// Replaces a NaN result by the first NaN operand, made quiet, or by the default NaN.
fn finish(result: f64, operands: &[f64]) -> f64 {
    if !result.is_nan() {
        return result;
    }
    let payload = operands.iter().find(|x| x.is_nan());
    f64::from_bits(payload.map_or(F64_NAN_BITS, |x| x.to_bits() | 1 << 51))
}

/// Rounds an exact sum; a zero sum of opposite signs is -0 when rounding down.
fn round_sum(sum: Exact, negative_zero: bool, rounding: Rounding) -> f64 {
    if sum.significand == 0 {
        return if negative_zero { -0.0 } else { 0.0 };
    }
    sum.to_f64(rounding)
}

/// Returns true if a zero sum is negative, given the signs of its two parts.
fn zero_sum_is_negative(a: bool, b: bool, rounding: Rounding) -> bool {
    if a == b { a } else { rounding == Rounding::Down }
}

/// `add{.rnd}.f64`.
pub fn add(a: f64, b: f64, rounding: Rounding) -> f64 {
    let nearest = a + b;
    if rounding == Rounding::NearestEven || !a.is_finite() || !b.is_finite() {
        return finish(nearest, &[a, b]);
    }
    let negative_zero = zero_sum_is_negative(a.is_sign_negative(), b.is_sign_negative(), rounding);
    round_sum(Exact::from_f64(a).add(Exact::from_f64(b)), negative_zero, rounding)
}

/// `sub{.rnd}.f64`.
pub fn sub(a: f64, b: f64, rounding: Rounding) -> f64 {
    if b.is_nan() {
        finish(b, &[a, b])
    } else {
        add(a, -b, rounding)
    }
}

/// `mul{.rnd}.f64`.
pub fn mul(a: f64, b: f64, rounding: Rounding) -> f64 {
    if rounding == Rounding::NearestEven || !a.is_finite() || !b.is_finite() {
        return finish(a * b, &[a, b]);
    }
    Exact::from_f64(a).mul(Exact::from_f64(b)).to_f64(rounding)
}

/// `fma.rnd.f64` and `mad.rnd.f64`: one rounding.
pub fn fma(a: f64, b: f64, c: f64, rounding: Rounding) -> f64 {
    if rounding == Rounding::NearestEven || !a.is_finite() || !b.is_finite() || !c.is_finite() {
        return finish(a.mul_add(b, c), &[a, b, c]);
    }
    let product_negative = a.is_sign_negative() != b.is_sign_negative();
    let negative_zero = zero_sum_is_negative(product_negative, c.is_sign_negative(), rounding);
    let product = Exact::from_f64(a).mul(Exact::from_f64(b));
    round_sum(product.add(Exact::from_f64(c)), negative_zero, rounding)
}

/// `div.rnd.f64`.
pub fn div(a: f64, b: f64, rounding: Rounding) -> f64 {
    if rounding == Rounding::NearestEven || !a.is_finite() || !b.is_finite() || a == 0.0 || b == 0.0 {
        return finish(a / b, &[a, b]);
    }
    Exact::from_f64(a).div(Exact::from_f64(b)).to_f64(rounding)
}

/// `rcp.rnd.f64`.
pub fn rcp(a: f64, rounding: Rounding) -> f64 {
    div(1.0, a, rounding)
}

/// `sqrt.rnd.f64`.
pub fn sqrt(a: f64, rounding: Rounding) -> f64 {
    if rounding == Rounding::NearestEven || !a.is_finite() || a <= 0.0 {
        return finish(a.sqrt(), &[a]);
    }
    Exact::from_f64(a).sqrt().to_f64(rounding)
}

/// `neg.f64`.
pub fn neg(a: f64) -> f64 {
    -a
}

/// `abs.f64`.
pub fn abs(a: f64) -> f64 {
    a.abs()
}

/// `copysign.f64 d, a, b`: the magnitude of `b` with the sign of `a`.
pub fn copysign(a: f64, b: f64) -> f64 {
    b.copysign(a)
}

/// `min.f64` and `max.f64`. Of two NaNs the first one is the result, made quiet.
pub fn min_max(which: Extremum, a: f64, b: f64) -> f64 {
    extremum(which, a, b, MinMaxMode::default()).unwrap_or_else(|| finish(f64::NAN, &[a, b]))
}

/// `testp.op.f64`.
pub fn testp(op: Property, a: f64) -> bool {
    match op {
        Property::Finite => a.is_finite(),
        Property::Infinite => a.is_infinite(),
        Property::Number => !a.is_nan(),
        Property::NotANumber => a.is_nan(),
        Property::Normal => a.is_normal() || a == 0.0,
        Property::Subnormal => a.is_subnormal(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directed_results_enclose_the_nearest_one() {
        let mut state = 7u64;
        for _ in 0..20_000 {
            let mut next = || {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                f64::from_bits((state >> 12) | (1000 + (state >> 57)) << 52) * if state & 1 == 0 { 1.0 } else { -1.0 }
            };
            let (a, b, c) = (next(), next(), next());
            type Op = fn(f64, f64, f64, Rounding) -> f64;
            let ops: [Op; 4] = [
                |a, b, _, r| add(a, b, r),
                |a, b, _, r| mul(a, b, r),
                |a, b, _, r| div(a, b, r),
                fma,
            ];
            for op in ops {
                let [near, down, up, zero] = [
                    Rounding::NearestEven,
                    Rounding::Down,
                    Rounding::Up,
                    Rounding::TowardZero,
                ]
                .map(|rounding| op(a, b, c, rounding));
                assert!(near == down || near == up, "{a:e} {b:e} {c:e}");
                assert!(down == up || down.next_up() == up, "{a:e} {b:e} {c:e}");
                assert_eq!(zero, if near < 0.0 { up } else { down });
            }
        }
    }

    #[test]
    fn known_directed_values() {
        assert_eq!(add(1.0, 1e-30, Rounding::Up), 1.0f64.next_up());
        assert_eq!(add(1.0, 1e-30, Rounding::Down), 1.0);
        assert_eq!(add(1.0, -1e-30, Rounding::TowardZero), 1.0f64.next_down());
        assert_eq!(
            mul(1.0f64.next_up(), 1.0f64.next_up(), Rounding::Up),
            1.0f64.next_up().next_up().next_up()
        );
        assert_eq!(
            sqrt(2.0, Rounding::Down).powi(2) < 2.0,
            sqrt(2.0, Rounding::Up).powi(2) > 2.0
        );
        assert_eq!(sqrt(2.0, Rounding::Up), sqrt(2.0, Rounding::Down).next_up());
        assert_eq!(sqrt(4.0, Rounding::Up), 2.0);
        assert_eq!(add(1.0, -1.0, Rounding::Down).to_bits(), 1 << 63);
        assert_eq!(fma(1.0, 1.0, -1.0, Rounding::Down).to_bits(), 1 << 63);
        assert_eq!(rcp(0.0, Rounding::Up), f64::INFINITY);
        assert_eq!(mul(f64::MAX, 2.0, Rounding::TowardZero), f64::MAX);
    }

    #[test]
    fn nans() {
        let payload = f64::from_bits(0x7ff0_0000_0000_1234);
        assert_eq!(add(1.0, payload, Rounding::Up).to_bits(), 0x7ff8_0000_0000_1234);
        assert_eq!(sub(1.0, payload, Rounding::Up).to_bits(), 0x7ff8_0000_0000_1234);
        assert_eq!(sqrt(-1.0, Rounding::Down).to_bits(), F64_NAN_BITS);
        assert_eq!(min_max(Extremum::Min, payload, 2.0), 2.0);
    }
}
