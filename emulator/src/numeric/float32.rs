//! Single-precision arithmetic (manual section "Floating Point Instructions") and the mixed-precision forms.
//!
//! For round-to-nearest-even the host's own instruction is used. The directed modes compute in f64 rounded to odd and
//! round once more (see [`super::round`]). Every NaN result is the canonical 0x7fffffff.

use super::Rounding;
use super::format::{F32_NAN, flush_f32};
use super::minmax::{Extremum, MinMaxMode, extremum};
use super::round::{f32_from_f64, sum_to_odd, to_odd};

/// Modifiers of an f32 arithmetic instruction; the default is `.rn` without flushing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode {
    /// `.rn .rz .rm .rp`.
    pub rounding: Rounding,
    /// `.ftz`: subnormal inputs and results become zero, keeping their sign.
    pub ftz: bool,
    /// `.sat`: the result is clamped to [0, 1], NaN becomes +0.
    pub sat: bool,
}

impl Mode {
    #[inline]
    fn input(self, x: f32) -> f32 {
        if self.ftz { flush_f32(x) } else { x }
    }

    #[inline]
    fn finish(self, x: f32) -> f32 {
        let x = if self.sat { saturate(x) } else { canonical(x) };
        if self.ftz { flush_f32(x) } else { x }
    }

    #[inline]
    fn is_nearest(self) -> bool {
        self.rounding == Rounding::NearestEven
    }

    /// Rounds an f64 that is exact or rounded to odd.
    fn round(self, x: f64) -> f32 {
        f32_from_f64(x, self.rounding)
    }
}

/// `.sat`: clamps to [0, 1]; NaN and -0 become +0.
#[inline]
pub fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// Replaces any NaN by the canonical NaN.
#[inline]
pub fn canonical(x: f32) -> f32 {
    if x.is_nan() { F32_NAN } else { x }
}

/// Adds in a directed mode. An exact zero from operands of opposite sign is -0 when rounding down, +0 otherwise.
fn directed_sum(x: f64, y: f64, mode: Mode) -> f32 {
    let sum = sum_to_odd(x, y);
    if sum == 0.0 && x.is_sign_negative() != y.is_sign_negative() {
        return if mode.rounding == Rounding::Down { -0.0 } else { 0.0 };
    }
    mode.round(sum)
}

/// `add{.rnd}{.ftz}{.sat}.f32`.
#[inline]
pub fn add(a: f32, b: f32, mode: Mode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    mode.finish(if mode.is_nearest() {
        a + b
    } else {
        directed_sum(f64::from(a), f64::from(b), mode)
    })
}

/// `sub{.rnd}{.ftz}{.sat}.f32`.
#[inline]
pub fn sub(a: f32, b: f32, mode: Mode) -> f32 {
    add(a, -b, mode)
}

/// `mul{.rnd}{.ftz}{.sat}.f32`.
#[inline]
pub fn mul(a: f32, b: f32, mode: Mode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    mode.finish(if mode.is_nearest() {
        a * b
    } else {
        mode.round(f64::from(a) * f64::from(b))
    })
}

/// `fma.rnd{.ftz}{.sat}.f32` and `mad.rnd.f32`: one rounding.
#[inline]
pub fn fma(a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    let (a, b, c) = (mode.input(a), mode.input(b), mode.input(c));
    mode.finish(if mode.is_nearest() {
        fused(a, b, c)
    } else {
        directed_sum(f64::from(a) * f64::from(b), f64::from(c), mode)
    })
}

/// Fused multiply-add to nearest even. It avoids `mul_add`, which is a slow library call on hosts compiled without an
/// fma instruction.
#[inline]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        return a.mul_add(b, c);
    }
    // The product is exact in f64. Rounding the f64 sum again is wrong only if the sum was inexact and lies exactly
    // half-way between two f32, or in the subnormal range, where the half-way points differ; the low bits of the sum
    // show both.
    let product = f64::from(a) * f64::from(b);
    let sum = product + f64::from(c);
    let bits = sum.to_bits();
    let suspicious = bits & 0x1fff_ffff == 0x1000_0000 || sum.abs() < 2.4e-38;
    if suspicious {
        return sum_to_odd_or_special(product, f64::from(c), sum) as f32;
    }
    sum as f32
}

#[cold]
fn sum_to_odd_or_special(product: f64, c: f64, sum: f64) -> f64 {
    if sum == 0.0 || !sum.is_finite() {
        sum
    } else {
        sum_to_odd(product, c)
    }
}

/// `div.rnd{.ftz}.f32`.
pub fn div(a: f32, b: f32, mode: Mode) -> f32 {
    let (a, b) = (mode.input(a), mode.input(b));
    mode.finish(if mode.is_nearest() {
        a / b
    } else {
        let (x, y) = (f64::from(a), f64::from(b));
        let quotient = x / y;
        // The error has the sign of (x - quotient * y) / y; a non-finite or zero quotient has no error.
        let rest = if quotient.is_finite() && quotient != 0.0 {
            (-quotient).mul_add(y, x) * y.signum()
        } else {
            0.0
        };
        mode.round(to_odd(quotient, rest))
    })
}

/// `rcp.rnd{.ftz}.f32`.
pub fn rcp(a: f32, mode: Mode) -> f32 {
    div(1.0, a, mode)
}

/// `sqrt.rnd{.ftz}.f32`: -0 stays -0, negative numbers give NaN.
pub fn sqrt(a: f32, mode: Mode) -> f32 {
    let a = mode.input(a);
    mode.finish(if mode.is_nearest() {
        a.sqrt()
    } else {
        let x = f64::from(a);
        let root = x.sqrt();
        let rest = if root.is_finite() && root != 0.0 {
            (-root).mul_add(root, x)
        } else {
            0.0
        };
        mode.round(to_odd(root, rest))
    })
}

/// `neg{.ftz}.f32`: flips the sign, of NaN too.
#[inline]
pub fn neg(a: f32, ftz: bool) -> f32 {
    -(if ftz { flush_f32(a) } else { a })
}

/// `abs{.ftz}.f32`: clears the sign, of NaN too.
#[inline]
pub fn abs(a: f32, ftz: bool) -> f32 {
    (if ftz { flush_f32(a) } else { a }).abs()
}

/// `copysign.f32 d, a, b`: the magnitude of `b` with the sign of `a`.
#[inline]
pub fn copysign(a: f32, b: f32) -> f32 {
    b.copysign(a)
}

/// `min{.ftz}{.NaN}{.xorsign.abs}.f32` and `max`.
#[inline]
pub fn min_max(which: Extremum, a: f32, b: f32, mode: MinMaxMode) -> f32 {
    let (a, b) = if mode.ftz { (flush_f32(a), flush_f32(b)) } else { (a, b) };
    match extremum(which, f64::from(a), f64::from(b), mode) {
        Some(x) => x as f32,
        None => F32_NAN,
    }
}

/// Mixed-precision operations: `add.f32.f16`, `fma.f32.bf16`, … (manual section "Mixed Precision Floating Point
/// Instructions"). The 16-bit operands are widened exactly, and [`add`], [`sub`] or [`fma`] does the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mixed {
    /// `add{.rnd}{.sat}.f32.atype d, a, c`.
    Add,
    /// `sub{.rnd}{.sat}.f32.atype d, a, c`.
    Sub,
    /// `fma.rnd{.sat}.f32.abtype d, a, b, c`.
    Fma,
}

/// Applies a mixed-precision operation to widened operands; only [`Mixed::Fma`] uses `b`.
pub fn mixed(op: Mixed, a: f32, b: f32, c: f32, mode: Mode) -> f32 {
    match op {
        Mixed::Add => add(a, c, mode),
        Mixed::Sub => sub(a, c, mode),
        Mixed::Fma => fma(a, b, c, mode),
    }
}

/// Properties that `testp` tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// Neither infinite nor NaN.
    Finite,
    /// Positive or negative infinity.
    Infinite,
    /// Not NaN.
    Number,
    /// NaN.
    NotANumber,
    /// Finite and not subnormal; zeros count as normal.
    Normal,
    /// Subnormal, not zero.
    Subnormal,
}

/// `testp.op.f32`; for f64 see [`super::float64::testp`].
pub fn testp(op: Property, a: f32) -> bool {
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
    use super::super::round::Exact;
    use super::*;

    const MODES: [Rounding; 4] = [
        Rounding::NearestEven,
        Rounding::TowardZero,
        Rounding::Down,
        Rounding::Up,
    ];

    fn mode(rounding: Rounding) -> Mode {
        Mode {
            rounding,
            ..Mode::default()
        }
    }

    fn samples() -> Vec<f32> {
        let mut out = vec![
            0.0,
            1.0,
            3.0,
            1.5,
            f32::MIN_POSITIVE,
            1e-45,
            f32::MAX,
            16777216.0,
            16777215.0,
            0.1,
        ];
        let mut state = 12345u32;
        while out.len() < 160 {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            let x = f32::from_bits(state ^ (state >> 15));
            if x.is_finite() {
                out.push(x);
                out.push(f32::from_bits((x.to_bits() & 0x007f_ffff) | (120 + state % 12) << 23));
            }
        }
        out.iter().flat_map(|&x| [x, -x]).collect()
    }

    /// Oracle: the 128-bit path rounded to odd in f64, then once to f32. It shares nothing with the two-sum under
    /// test.
    fn oracle(exact: Exact, rounding: Rounding) -> f32 {
        let down = exact.to_f64(Rounding::TowardZero);
        let inexact = exact.to_f64(Rounding::Up) != exact.to_f64(Rounding::Down);
        let odd = if inexact {
            f64::from_bits(down.to_bits() | 1)
        } else {
            down
        };
        f32::from_bits(super::super::format::F32.encode(odd, rounding, false))
    }

    #[test]
    fn add_mul_fma_div_sqrt_are_correctly_rounded_in_every_mode() {
        let xs = samples();
        for rounding in MODES {
            for (i, &a) in xs.iter().enumerate() {
                let x = Exact::from_f64(f64::from(a));
                if a >= 0.0 {
                    assert_eq!(
                        sqrt(a, mode(rounding)),
                        oracle(x.sqrt(), rounding),
                        "sqrt {a:e} {rounding:?}"
                    );
                }
                for (j, &b) in xs.iter().enumerate() {
                    let y = Exact::from_f64(f64::from(b));
                    assert_eq!(
                        add(a, b, mode(rounding)),
                        oracle(x.add(y), rounding),
                        "{a:e}+{b:e} {rounding:?}"
                    );
                    let product = oracle(x.mul(y), rounding);
                    assert_eq!(mul(a, b, mode(rounding)), product, "{a:e}*{b:e} {rounding:?}");
                    if b != 0.0 {
                        assert_eq!(
                            div(a, b, mode(rounding)),
                            oracle(x.div(y), rounding),
                            "{a:e}/{b:e} {rounding:?}"
                        );
                    }
                    for c in [xs[(i * 7 + j * 13) % xs.len()], -product, product.next_up()] {
                        if c.is_finite() {
                            let want = oracle(x.mul(y).add(Exact::from_f64(f64::from(c))), rounding);
                            let got = fma(a, b, c, mode(rounding));
                            assert_eq!(got, want, "{a:e}*{b:e}+{c:e} {rounding:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_portable_fma_is_the_library_fma() {
        let mut state = 1u64;
        for _ in 0..300_000 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            // Few significant bits make ties frequent.
            let field = |s: u64| f32::from_bits((s as u32 & 0x807f_0000) | ((90 + (s as u32 >> 8) % 70) << 23));
            let (a, b, c) = (field(state), field(state >> 16), field(state >> 32));
            assert_eq!(fused(a, b, c).to_bits(), a.mul_add(b, c).to_bits(), "{a:e}*{b:e}+{c:e}");
            let tiny = |x: f32| x * 2f32.powi(-70);
            let (a, b, c) = (tiny(a), tiny(b), tiny(tiny(c)));
            assert_eq!(fused(a, b, c).to_bits(), a.mul_add(b, c).to_bits(), "{a:e}*{b:e}+{c:e}");
        }
        assert!(fused(0.0, f32::INFINITY, 1.0).is_nan());
        assert_eq!(fused(1.0, -1.0, 1.0).to_bits(), 0);
        assert_eq!(fused(f32::MAX, 2.0, 0.0), f32::INFINITY);
        assert_eq!(fused(f32::MAX, 2.0, f32::NEG_INFINITY), f32::NEG_INFINITY);
    }

    #[test]
    fn zeros_flushes_saturation_and_nans() {
        assert_eq!(add(1.0, -1.0, mode(Rounding::Down)).to_bits(), 1 << 31);
        assert_eq!(add(1.0, -1.0, mode(Rounding::Up)).to_bits(), 0);
        assert_eq!(add(-0.0, -0.0, mode(Rounding::Up)).to_bits(), 1 << 31);
        assert_eq!(fma(1.0, 0.0, -0.0, mode(Rounding::Down)).to_bits(), 1 << 31);
        let ftz = Mode {
            ftz: true,
            ..Mode::default()
        };
        assert_eq!(add(1e-40, 1e-40, ftz), 0.0);
        assert_eq!(mul(-1e-30, 1e-10, ftz).to_bits(), 1 << 31);
        assert_eq!(rcp(-1e-40, ftz), f32::NEG_INFINITY);
        let sat = Mode {
            sat: true,
            ..Mode::default()
        };
        assert_eq!(add(0.75, 0.75, sat), 1.0);
        assert_eq!(add(f32::NAN, 0.0, sat).to_bits(), 0);
        let both = Mode { ftz: true, ..sat };
        assert_eq!(mul(1e-30, 1e-10, both).to_bits(), 0);
        assert_eq!(mul(-1.0, 0.0, sat).to_bits(), 0);
        let nan = add(f32::INFINITY, f32::NEG_INFINITY, Mode::default());
        assert_eq!(nan.to_bits(), 0x7fff_ffff);
        assert_eq!(sqrt(-1.0, mode(Rounding::Up)).to_bits(), 0x7fff_ffff);
        assert_eq!(sqrt(-0.0, mode(Rounding::Up)).to_bits(), 1 << 31);
        assert_eq!(add(f32::MAX, f32::MAX, mode(Rounding::TowardZero)), f32::MAX);
        assert_eq!(div(1.0, 0.0, mode(Rounding::TowardZero)), f32::INFINITY);
        assert_eq!(copysign(-1.0, 2.0), -2.0);
        assert!(testp(Property::Normal, 0.0) && testp(Property::Subnormal, 1e-40));
        let nan_bits = min_max(Extremum::Min, f32::NAN, f32::NAN, MinMaxMode::default()).to_bits();
        assert_eq!(nan_bits, 0x7fff_ffff);
        assert_eq!(mixed(Mixed::Fma, 2.0, 3.0, 4.0, Mode::default()), 10.0);
        assert_eq!(mixed(Mixed::Sub, 2.0, 0.0, 4.0, Mode::default()), -2.0);
    }
}
