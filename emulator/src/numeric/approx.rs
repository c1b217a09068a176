//! Approximate functions: `ex2 lg2 sin cos tanh rcp rsqrt sqrt div` with `.approx` or `.full`.
//!
//! The manual bounds the error and defines the special values, but not the bits. Here each function is computed in
//! f64 and rounded once to f32, so the error is at most half an ulp plus that of f64, below every bound of the
//! manual. Hardware differs from these results in the last bits; a test that compares with hardware must allow the
//! manual's bound.

use super::format::{F32_NAN, flush_f32};

/// Unary approximate functions of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Function {
    /// `ex2.approx`: 2^a; the manual allows 2 ulp.
    Ex2,
    /// `lg2.approx`: log2(a); the manual allows 2^-22.
    Lg2,
    /// `sin.approx`; the manual allows 2^-20.5 within two periods.
    Sin,
    /// `cos.approx`; the manual allows 2^-20.5 within two periods.
    Cos,
    /// `tanh.approx`; the manual allows 2^-11 relative. Has no `.ftz` form.
    Tanh,
    /// `rcp.approx`: 1/a; the manual allows 1 ulp.
    Rcp,
    /// `rsqrt.approx`: 1/sqrt(a); the manual allows 2^-22.9 relative.
    Rsqrt,
    /// `sqrt.approx`; the manual allows 2^-23 relative.
    Sqrt,
}

/// Applies a unary approximate function of f32; `ftz` flushes subnormal inputs and results.
#[inline]
pub fn apply(function: Function, a: f32, ftz: bool) -> f32 {
    let a = if ftz { flush_f32(a) } else { a };
    let x = f64::from(a);
    let result = match function {
        Function::Ex2 => x.exp2(),
        // The host's log of -0 is -inf and that of a negative number NaN, as in the manual's table.
        Function::Lg2 => x.log2(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
        Function::Tanh => x.tanh(),
        Function::Rcp => 1.0 / x,
        Function::Rsqrt => 1.0 / x.sqrt(),
        Function::Sqrt => x.sqrt(),
    } as f32;
    if result.is_nan() {
        return F32_NAN;
    }
    if ftz { flush_f32(result) } else { result }
}

/// `div.approx{.ftz}.f32`: a * (1/b). For 2^126 < |b| < 2^128 the reciprocal underflows on hardware, so the manual
/// defines the result as zero (NaN if `a` is infinite), and so it is here.
pub fn div_approx(a: f32, b: f32, ftz: bool) -> f32 {
    let (a, b) = if ftz { (flush_f32(a), flush_f32(b)) } else { (a, b) };
    let beyond = b.is_finite() && b.abs() > 2f32.powi(126);
    if beyond && !a.is_nan() {
        return if a.is_infinite() {
            F32_NAN
        } else {
            0f32.copysign(a) * 1f32.copysign(b)
        };
    }
    div_full(a, b, ftz)
}

/// `div.full{.ftz}.f32`: the manual allows 2 ulp over the full range; here the result is the nearest value.
pub fn div_full(a: f32, b: f32, ftz: bool) -> f32 {
    let (a, b) = if ftz { (flush_f32(a), flush_f32(b)) } else { (a, b) };
    let result = a / b;
    if result.is_nan() {
        return F32_NAN;
    }
    if ftz { flush_f32(result) } else { result }
}

const F64_NAN: f64 = f64::from_bits(0x7fff_ffff_0000_0000);

/// Keeps the upper 32 bits of an f64 and flushes subnormals: the input of the `.approx.ftz.f64` instructions.
fn upper_word(a: f64) -> f64 {
    let x = f64::from_bits(a.to_bits() & 0xffff_ffff_0000_0000);
    if x.is_subnormal() { 0f64.copysign(x) } else { x }
}

fn upper_result(x: f64) -> f64 {
    if x.is_nan() { F64_NAN } else { upper_word(x) }
}

/// `rcp.approx.ftz.f64`: reads and writes only the upper 32 bits; NaN becomes 0x7fffffff00000000.
pub fn rcp_f64(a: f64) -> f64 {
    if a.is_nan() {
        F64_NAN
    } else {
        upper_result(1.0 / upper_word(a))
    }
}

/// `rsqrt.approx.ftz.f64`: reads and writes only the upper 32 bits; NaN becomes 0x7fffffff00000000.
pub fn rsqrt_ftz_f64(a: f64) -> f64 {
    if a.is_nan() {
        F64_NAN
    } else {
        upper_result(1.0 / upper_word(a).sqrt())
    }
}

/// `rsqrt.approx.f64`: full precision, subnormals kept.
pub fn rsqrt_f64(a: f64) -> f64 {
    let result = 1.0 / a.sqrt();
    if result.is_nan() {
        f64::from_bits(super::float64::F64_NAN_BITS)
    } else {
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const INF: f32 = f32::INFINITY;
    const NAN_BITS: u32 = 0x7fff_ffff;

    #[test]
    fn special_values_are_those_of_the_manuals_tables() {
        let table: [(Function, [f32; 4], bool); 8] = [
            // Results for -inf, -0, +0, +inf; true if a negative normal number gives NaN.
            (Function::Ex2, [0.0, 1.0, 1.0, INF], false),
            (Function::Lg2, [f32::NAN, -INF, -INF, INF], true),
            (Function::Sin, [f32::NAN, -0.0, 0.0, f32::NAN], false),
            (Function::Cos, [f32::NAN, 1.0, 1.0, f32::NAN], false),
            (Function::Tanh, [-1.0, -0.0, 0.0, 1.0], false),
            (Function::Rcp, [-0.0, -INF, INF, 0.0], false),
            (Function::Rsqrt, [f32::NAN, -INF, INF, 0.0], true),
            (Function::Sqrt, [f32::NAN, -0.0, 0.0, INF], true),
        ];
        for (function, results, negative_is_nan) in table {
            for (input, want) in [-INF, -0.0, 0.0, INF].into_iter().zip(results) {
                let got = apply(function, input, false).to_bits();
                let want = if want.is_nan() { NAN_BITS } else { want.to_bits() };
                assert_eq!(got, want, "{function:?}({input})");
            }
            assert_eq!(apply(function, f32::NAN, true).to_bits(), NAN_BITS);
            assert_eq!(apply(function, -2.0, false).is_nan(), negative_is_nan, "{function:?}");
        }
    }

    #[test]
    fn flushing() {
        assert_eq!(apply(Function::Ex2, -126.5, true), 0.0);
        assert!(apply(Function::Ex2, -126.5, false) > 0.0);
        assert_eq!(apply(Function::Lg2, 1e-40, true), -INF);
        assert_eq!(apply(Function::Rcp, 1e-40, true), INF);
        assert_eq!(apply(Function::Rcp, 2f32.powi(127), true), 0.0);
        assert_eq!(apply(Function::Ex2, 3.0, false), 8.0);
        assert_eq!(apply(Function::Lg2, 0.125, false), -3.0);
    }

    #[test]
    fn division_beyond_the_reciprocals_range() {
        assert_eq!(div_approx(6.0, 3.0, false), 2.0);
        assert_eq!(div_approx(2f32.powi(127), -(2f32.powi(127)), false).to_bits(), 1 << 31);
        assert!(div_approx(INF, 2f32.powi(127), false).is_nan());
        assert_eq!(div_full(2f32.powi(127), 2f32.powi(127), false), 1.0);
        assert_eq!(div_approx(1.0, INF, false), 0.0);
    }

    #[test]
    fn half_wide_doubles() {
        assert_eq!(rcp_f64(4.0), 0.25);
        assert_eq!(rcp_f64(3.0).to_bits() as u32, 0);
        assert!((rcp_f64(3.0) * 3.0 - 1.0).abs() < 2f64.powi(-19));
        assert_eq!(rcp_f64(-5e-324), f64::NEG_INFINITY);
        assert_eq!(rcp_f64(f64::NAN).to_bits(), 0x7fff_ffff_0000_0000);
        assert_eq!(rsqrt_ftz_f64(-1.0).to_bits(), 0x7fff_ffff_0000_0000);
        assert_eq!(rsqrt_ftz_f64(-0.0), f64::NEG_INFINITY);
        assert_eq!(rsqrt_f64(0.25), 2.0);
    }
}
