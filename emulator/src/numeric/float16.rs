//! Half-precision arithmetic: f16, bf16 and their packed pairs (manual section "Half Precision Floating Point
//! Instructions").
//!
//! Operands are widened exactly, the operation is computed in f64 rounded to odd, and the result is rounded once to
//! the format. bf16 needs this: it has the range of f32, so an fma can put a tie-breaking bit 2^-100 below the sum,
//! where plain f64 loses it. Packed forms apply the scalar ones through [`map1`], [`map2`], [`map3`].

use super::format::{BF16, F16, Format, HALF_NAN, bf16_to_f32, f16_to_f32};
use super::minmax::{Extremum, MinMaxMode, extremum};
use super::round::{Rounding, sum_to_odd};

/// Pattern that a tensor copy with the NaN fill writes outside of the tensor, and that `fma.oob` recognises (manual
/// section "Tensors", "Out of Boundary Access"). The manual does not define the value; this is the hardware's.
pub const OOB_NAN: u16 = 0x7ff7;

/// 16-bit format of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// `.f16`.
    F16,
    /// `.bf16`.
    Bf16,
}

/// Clamping of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Clamp {
    /// No clamping.
    #[default]
    None,
    /// `.sat`: to [0, 1], NaN becomes +0.
    Saturate,
    /// `.relu`: negative becomes +0, NaN the canonical NaN.
    Relu,
}

/// Modifiers of a half-precision instruction. Rounding is always `.rn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HalfMode {
    /// `.ftz`: subnormal inputs and results become zero.
    pub ftz: bool,
    /// `.sat` or `.relu`.
    pub clamp: Clamp,
}

impl Half {
    /// Returns the description of the format.
    #[inline]
    pub const fn format(self) -> Format {
        match self {
            Half::F16 => F16,
            Half::Bf16 => BF16,
        }
    }

    /// Returns the value, exactly.
    #[inline]
    pub const fn decode(self, bits: u16) -> f32 {
        match self {
            Half::F16 => f16_to_f32(bits),
            Half::Bf16 => bf16_to_f32(bits),
        }
    }

    /// Rounds `x` to nearest even; NaN becomes [`HALF_NAN`].
    #[inline]
    pub const fn encode(self, x: f64) -> u16 {
        match self {
            Half::F16 => F16.encode(x, Rounding::NearestEven, false) as u16,
            Half::Bf16 => BF16.encode(x, Rounding::NearestEven, false) as u16,
        }
    }

    #[inline]
    fn flush(self, bits: u16, ftz: bool) -> u16 {
        if ftz {
            self.format().flush(u32::from(bits)) as u16
        } else {
            bits
        }
    }

    #[inline]
    fn input(self, bits: u16, ftz: bool) -> f64 {
        f64::from(self.decode(self.flush(bits, ftz)))
    }

    #[inline]
    fn finish(self, x: f64, mode: HalfMode) -> u16 {
        match mode.clamp {
            Clamp::Saturate => self.flush(self.encode(if x > 0.0 { x.min(1.0) } else { 0.0 }), mode.ftz),
            Clamp::Relu if x.is_nan() => HALF_NAN,
            Clamp::Relu if x <= 0.0 => 0,
            Clamp::Relu | Clamp::None => self.flush(self.encode(x), mode.ftz),
        }
    }

    /// `add{.ftz}{.sat}.f16`, `add.bf16`.
    #[inline]
    pub fn add(self, a: u16, b: u16, mode: HalfMode) -> u16 {
        self.finish(exact_sum(self.input(a, mode.ftz), self.input(b, mode.ftz)), mode)
    }

    /// `sub{.ftz}{.sat}.f16`, `sub.bf16`.
    #[inline]
    pub fn sub(self, a: u16, b: u16, mode: HalfMode) -> u16 {
        self.finish(exact_sum(self.input(a, mode.ftz), -self.input(b, mode.ftz)), mode)
    }

    /// `mul{.ftz}{.sat}.f16`, `mul.bf16`.
    #[inline]
    pub fn mul(self, a: u16, b: u16, mode: HalfMode) -> u16 {
        self.finish(self.input(a, mode.ftz) * self.input(b, mode.ftz), mode)
    }

    /// `fma.rn{.ftz}{.sat}.f16`, `fma.rn{.relu}.bf16` and similar: one rounding.
    #[inline]
    pub fn fma(self, a: u16, b: u16, c: u16, mode: HalfMode) -> u16 {
        let product = self.input(a, mode.ftz) * self.input(b, mode.ftz);
        self.finish(exact_sum(product, self.input(c, mode.ftz)), mode)
    }

    /// `fma.rn.oob`: +0 if a multiplicand is the out-of-bounds NaN ([`OOB_NAN`], either sign), else [`Half::fma`].
    #[inline]
    pub fn fma_oob(self, a: u16, b: u16, c: u16, mode: HalfMode) -> u16 {
        if a & 0x7fff == OOB_NAN || b & 0x7fff == OOB_NAN {
            0
        } else {
            self.fma(a, b, c, mode)
        }
    }

    /// `min`, `max` with `{.ftz}{.NaN}{.xorsign.abs}`.
    #[inline]
    pub fn min_max(self, which: Extremum, a: u16, b: u16, mode: MinMaxMode) -> u16 {
        match extremum(which, self.input(a, mode.ftz), self.input(b, mode.ftz), mode) {
            Some(x) => self.encode(x),
            None => HALF_NAN,
        }
    }

    /// `neg{.ftz}`: flips the sign bit.
    #[inline]
    pub fn neg(self, a: u16, ftz: bool) -> u16 {
        self.flush(a, ftz) ^ 0x8000
    }

    /// `abs{.ftz}`: clears the sign bit.
    #[inline]
    pub fn abs(self, a: u16, ftz: bool) -> u16 {
        self.flush(a, ftz) & 0x7fff
    }

    /// `tanh.approx`, here the correctly rounded value (the manual allows 2^-10.987 for f16, 2^-8 for bf16).
    pub fn tanh(self, a: u16) -> u16 {
        self.encode(f64::from(self.decode(a)).tanh())
    }

    /// `ex2.approx.f16`, `ex2.approx.ftz.bf16`, here the correctly rounded value (the manual allows 2^-9.9 and 2^-7).
    pub fn ex2(self, a: u16, ftz: bool) -> u16 {
        self.flush(self.encode(self.input(a, ftz).exp2()), ftz)
    }
}

/// Adds two f64 that are finite or special, rounded to odd.
#[inline]
fn exact_sum(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if sum.is_finite() && sum != 0.0 {
        sum_to_odd(a, b)
    } else {
        sum
    }
}

/// Applies a function to both halves of a packed register.
#[inline]
pub fn map1(a: u32, f: impl Fn(u16) -> u16) -> u32 {
    u32::from(f(a as u16)) | u32::from(f((a >> 16) as u16)) << 16
}

/// Applies a function to the halves of two packed registers.
#[inline]
pub fn map2(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

/// Applies a function to the halves of three packed registers.
#[inline]
pub fn map3(a: u32, b: u32, c: u32, f: impl Fn(u16, u16, u16) -> u16) -> u32 {
    let high = f((a >> 16) as u16, (b >> 16) as u16, (c >> 16) as u16);
    u32::from(f(a as u16, b as u16, c as u16)) | u32::from(high) << 16
}

#[cfg(test)]
mod tests {
    use super::super::round::Exact;
    use super::*;

    fn oracle(half: Half, exact: Exact) -> u16 {
        let down = exact.to_f64(Rounding::TowardZero);
        let inexact = exact.to_f64(Rounding::Up) != exact.to_f64(Rounding::Down);
        half.encode(if inexact {
            f64::from_bits(down.to_bits() | 1)
        } else {
            down
        })
    }

    #[test]
    fn arithmetic_matches_128_bit_arithmetic() {
        let mut state = 99u32;
        let mode = HalfMode::default();
        for half in [Half::F16, Half::Bf16] {
            for _ in 0..200_000 {
                let mut next = || {
                    state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                    (state >> 13) as u16
                };
                let (a, b, c) = (next(), next(), next());
                let finite = |bits| half.decode(bits).is_finite();
                if !(finite(a) && finite(b) && finite(c)) {
                    continue;
                }
                let [x, y, z] = [a, b, c].map(|bits| Exact::from_f64(f64::from(half.decode(bits))));
                let same = |got: u16, want: u16| got == want || (got | want) & 0x7fff == 0;
                assert!(
                    same(half.add(a, b, mode), oracle(half, x.add(y))),
                    "{half:?} {a:#x}+{b:#x}"
                );
                assert!(
                    same(half.mul(a, b, mode), oracle(half, x.mul(y))),
                    "{half:?} {a:#x}*{b:#x}"
                );
                let fused = oracle(half, x.mul(y).add(z));
                assert!(same(half.fma(a, b, c, mode), fused), "{half:?} {a:#x}*{b:#x}+{c:#x}");
            }
        }
    }

    #[test]
    fn a_tie_broken_far_below_is_seen() {
        // (1 + 2^-7) * 1.5 = 1.5 + 2^-7 + 2^-8: half-way between 1.5 + 2^-7 and 1.5 + 2^-6. An addend of 2^-120
        // decides.
        let (a, b) = (0x3f81, 0x3fc0);
        let crumb = ((127 - 120) << 7) as u16;
        let mode = HalfMode::default();
        let low = Half::Bf16.fma(a, b, crumb | 0x8000, mode);
        let high = Half::Bf16.fma(a, b, crumb, mode);
        assert_eq!((low, high), (0x3fc1, 0x3fc2));
    }

    #[test]
    fn modifiers() {
        let none = HalfMode::default();
        let ftz = HalfMode { ftz: true, ..none };
        assert_eq!(Half::F16.add(0x0001, 0x0001, none), 0x0002);
        assert_eq!(Half::F16.add(0x0001, 0x0001, ftz), 0x0000);
        assert_eq!(Half::F16.mul(0x8400, 0x3800, ftz), 0x8000);
        let sat = HalfMode {
            clamp: Clamp::Saturate,
            ..none
        };
        assert_eq!(Half::F16.add(0x3c00, 0x3c00, sat), 0x3c00);
        assert_eq!(Half::F16.add(0x7e00, 0x3c00, sat), 0);
        let relu = HalfMode {
            clamp: Clamp::Relu,
            ..none
        };
        assert_eq!(Half::F16.fma(0xbc00, 0x3c00, 0, relu), 0);
        assert_eq!(Half::Bf16.fma(0x7fc0, 0x3f80, 0, relu), 0x7fff);
        assert_eq!(Half::F16.sub(0x7c00, 0x7c00, none), HALF_NAN);
        assert_eq!(Half::F16.fma_oob(0xfff7, 0x3c00, 0x3c00, none), 0);
        assert_eq!(Half::F16.neg(0x8001, true), 0x0000);
        assert_eq!(Half::F16.abs(0xbc00, false), 0x3c00);
        assert_eq!(
            Half::F16.min_max(Extremum::Max, 0x7e00, 0x8000, MinMaxMode::default()),
            0x8000
        );
        assert_eq!(
            map2(0x3c00_4000, 0x3c00_3c00, |a, b| Half::F16.add(a, b, none)),
            0x4000_4200
        );
    }

    #[test]
    fn approximations_at_the_corners() {
        assert_eq!(Half::F16.ex2(0xfc00, false), 0);
        assert_eq!(Half::F16.ex2(0x8000, false), 0x3c00);
        assert_eq!(Half::F16.ex2(0x7c00, false), 0x7c00);
        assert_eq!(Half::Bf16.ex2(0x3f80, true), 0x4000);
        assert_eq!(Half::Bf16.ex2(0xc300, true), 0);
        assert_eq!(Half::F16.tanh(0xfc00), 0xbc00);
        assert_eq!(Half::F16.tanh(0x8000), 0x8000);
        assert_eq!(Half::F16.tanh(0x7e00), HALF_NAN);
    }
}
