//! `cvt` and `cvt.pack` (manual sections "cvt", "cvt.pack").
//!
//! Every scalar conversion takes one path: read the source exactly (an integer as i128, a float as f64), round once,
//! write the destination. Registers are passed in a `u64`. The low bits are the source. The result is sign-extended
//! for signed integers and zero-extended for all other types, as a wider destination needs it.

use super::float16::Half;
use super::format::{BF16, E4M3, E5M2, F16, F32_NAN_BITS, Format, HALF_NAN, TF32, flush_f32};
use super::integer::IntType;
use super::round::{Exact, IntegerRounding, Rounding, f32_from_f64};

/// Scalar types of `cvt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's types")]
pub enum Scalar {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F32,
    F64,
}

impl Scalar {
    /// Returns the integer type, if it is one.
    pub const fn int(self) -> Option<IntType> {
        Some(match self {
            Scalar::U8 => IntType::U8,
            Scalar::S8 => IntType::S8,
            Scalar::U16 => IntType::U16,
            Scalar::S16 => IntType::S16,
            Scalar::U32 => IntType::U32,
            Scalar::S32 => IntType::S32,
            Scalar::U64 => IntType::U64,
            Scalar::S64 => IntType::S64,
            Scalar::F16 | Scalar::Bf16 | Scalar::F32 | Scalar::F64 => return None,
        })
    }

    /// Returns the width in bits.
    pub const fn bits(self) -> u32 {
        match self {
            Scalar::U8 | Scalar::S8 => 8,
            Scalar::U16 | Scalar::S16 | Scalar::F16 | Scalar::Bf16 => 16,
            Scalar::U32 | Scalar::S32 | Scalar::F32 => 32,
            Scalar::U64 | Scalar::S64 | Scalar::F64 => 64,
        }
    }
}

/// Rounding modifier of a `cvt`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CvtRounding {
    /// No modifier: the conversion is exact, or integer to integer.
    #[default]
    Exact,
    /// `.rn .rna .rz .rm .rp`.
    Float(Rounding),
    /// `.rni .rzi .rmi .rpi`.
    Integer(IntegerRounding),
}

/// Modifiers of a scalar `cvt`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CvtMode {
    /// Rounding modifier.
    pub rounding: CvtRounding,
    /// `.ftz`: subnormal f32 inputs and results become zero.
    pub ftz: bool,
    /// `.sat`: integers clamp to the destination's range, floats to [0, 1] with NaN to +0.
    pub sat: bool,
    /// `.relu`: negative results become +0.
    pub relu: bool,
    /// `.satfinite`: an overflow becomes the largest finite value.
    pub satfinite: bool,
}

/// `cvt{.rounding}{.ftz}{.sat}{.relu}{.satfinite}.to.from`.
pub fn cvt(to: Scalar, from: Scalar, bits: u64, mode: CvtMode) -> u64 {
    match (from.int(), to.int()) {
        (Some(source), Some(target)) => int_to_int(source.value(bits), target, mode.sat),
        (Some(source), None) => int_to_float(source.value(bits), to, mode),
        (None, Some(target)) => float_to_int(read_float(from, bits, mode.ftz), from, target, mode.rounding),
        (None, None) => float_to_float(to, from, bits, mode),
    }
}

/// Reads the value of a float register, exactly.
fn read_float(from: Scalar, bits: u64, ftz: bool) -> f64 {
    match from {
        Scalar::F16 => f64::from(Half::F16.decode(bits as u16)),
        Scalar::Bf16 => f64::from(Half::Bf16.decode(bits as u16)),
        Scalar::F32 => {
            let x = f32::from_bits(bits as u32);
            f64::from(if ftz { flush_f32(x) } else { x })
        }
        _ => f64::from_bits(bits),
    }
}

fn int_to_int(value: i128, target: IntType, sat: bool) -> u64 {
    let value = if sat {
        value.clamp(target.min_value(), target.max_value())
    } else {
        value
    };
    target.extend(value as u64)
}

fn int_to_float(value: i128, to: Scalar, mode: CvtMode) -> u64 {
    let rounding = float_rounding(mode.rounding);
    if value.unsigned_abs() < 1 << 53 {
        return write_float(to, value as i64 as f64, rounding, mode);
    }
    let exact = Exact::from_int(value);
    if to == Scalar::F64 {
        let x = exact.to_f64(rounding);
        return (if mode.sat { saturate(x) } else { x }).to_bits();
    }
    // Rounds to odd in f64, so that the second rounding is the only one.
    let down = exact.to_f64(Rounding::TowardZero);
    let inexact = down as i128 != value;
    write_float(
        to,
        if inexact {
            f64::from_bits(down.to_bits() | 1)
        } else {
            down
        },
        rounding,
        mode,
    )
}

fn float_to_int(x: f64, from: Scalar, target: IntType, rounding: CvtRounding) -> u64 {
    if x.is_nan() {
        let wide = from == Scalar::F64 || target.bits() == 64;
        return if wide {
            target.extend(1 << (target.bits() - 1))
        } else {
            0
        };
    }
    let rounded = match rounding {
        CvtRounding::Integer(rounding) => rounding.apply(x),
        CvtRounding::Exact | CvtRounding::Float(_) => x.trunc(),
    };
    // Casts from float saturate.
    if target.signed() {
        let (min, max) = (target.min_value() as i64, target.max_value() as i64);
        (rounded as i64).clamp(min, max) as u64
    } else {
        (rounded as u64).min(target.max_value() as u64)
    }
}

fn float_to_float(to: Scalar, from: Scalar, bits: u64, mode: CvtMode) -> u64 {
    let x = read_float(from, bits, mode.ftz);
    match mode.rounding {
        CvtRounding::Integer(rounding) => write_float(to, rounding.apply(x), Rounding::NearestEven, mode),
        CvtRounding::Exact => write_float(to, x, Rounding::NearestEven, mode),
        CvtRounding::Float(rounding) => write_float(to, x, rounding, mode),
    }
}

fn float_rounding(rounding: CvtRounding) -> Rounding {
    match rounding {
        CvtRounding::Float(rounding) => rounding,
        CvtRounding::Exact | CvtRounding::Integer(_) => Rounding::NearestEven,
    }
}

fn saturate(x: f64) -> f64 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// Rounds a value (exact, or rounded to odd in f64) to a float register.
#[inline]
fn write_float(to: Scalar, x: f64, rounding: Rounding, mode: CvtMode) -> u64 {
    let x = if mode.sat {
        saturate(x)
    } else if mode.relu && x <= 0.0 {
        0.0
    } else {
        x
    };
    match to {
        Scalar::F16 => u64::from(F16.encode(x, rounding, mode.satfinite)),
        Scalar::Bf16 => u64::from(BF16.encode(x, rounding, mode.satfinite)),
        Scalar::F32 if x.is_nan() => u64::from(F32_NAN_BITS),
        Scalar::F32 => {
            let y = f32_from_f64(x, rounding);
            u64::from((if mode.ftz { flush_f32(y) } else { y }).to_bits())
        }
        _ => x.to_bits(),
    }
}

/// Modifiers of a conversion from f32 to a 16-bit or smaller float.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NarrowMode {
    /// `.rn .rz`, and `.rna` for tf32.
    pub rounding: Rounding,
    /// `.relu`: negative becomes +0, NaN the canonical NaN.
    pub relu: bool,
    /// `.satfinite`: an overflow becomes the largest finite value.
    pub satfinite: bool,
}

#[inline]
fn narrow(format: Format, x: f32, mode: NarrowMode) -> u32 {
    let x = if mode.relu && x <= 0.0 { 0.0 } else { x };
    format.encode(f64::from(x), mode.rounding, mode.satfinite)
}

/// `cvt.rnd{.relu}{.satfinite}.f16x2.f32 d, a, b` and `.bf16x2`: `a` in the upper half, `b` in the lower.
#[inline]
pub fn cvt_half2_from_f32(half: Half, a: f32, b: f32, mode: NarrowMode) -> u32 {
    narrow(half.format(), a, mode) << 16 | narrow(half.format(), b, mode)
}

/// `cvt.rna.tf32.f32`, `cvt.{rn,rz}{.relu}{.satfinite}.tf32.f32`: an f32 whose 13 low bits are zero; NaN is
/// 0x7fffffff.
#[inline]
pub fn cvt_tf32_from_f32(a: f32, mode: NarrowMode) -> u32 {
    if a.is_nan() {
        return F32_NAN_BITS;
    }
    narrow(TF32, a, mode) << 13
}

/// 8-bit floating-point formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// `.e4m3`.
    E4m3,
    /// `.e5m2`.
    E5m2,
}

impl Fp8 {
    /// Returns the description of the format.
    pub const fn format(self) -> Format {
        match self {
            Fp8::E4m3 => E4M3,
            Fp8::E5m2 => E5M2,
        }
    }
}

/// `cvt.rn.satfinite{.relu}.e4m3x2.f32 d, a, b` and `.e5m2x2`: `a` in the upper byte, `b` in the lower.
pub fn cvt_fp8x2_from_f32(kind: Fp8, a: f32, b: f32, relu: bool) -> u16 {
    let mode = NarrowMode {
        relu,
        satfinite: true,
        ..NarrowMode::default()
    };
    (narrow(kind.format(), a, mode) << 8 | narrow(kind.format(), b, mode)) as u16
}

/// `cvt.rn.satfinite{.relu}.e4m3x2.f16x2 d, a`, and from `.bf16x2`: halves to bytes, in place.
pub fn cvt_fp8x2_from_half2(kind: Fp8, half: Half, a: u32, relu: bool) -> u16 {
    cvt_fp8x2_from_f32(kind, half.decode((a >> 16) as u16), half.decode(a as u16), relu)
}

/// `cvt.rn{.relu}.f16x2.e4m3x2 d, a`, and from `.e5m2x2`: bytes to halves, exact.
pub fn cvt_f16x2_from_fp8x2(kind: Fp8, a: u16, relu: bool) -> u32 {
    let widen = |bits: u16| {
        let x = kind.format().decode(u32::from(bits & 0xff));
        if x.is_nan() {
            return u32::from(HALF_NAN);
        }
        narrow(
            F16,
            x,
            NarrowMode {
                relu,
                ..NarrowMode::default()
            },
        )
    };
    widen(a >> 8) << 16 | widen(a)
}

/// Destination types of `cvt.pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's types")]
pub enum PackType {
    U16,
    S16,
    U8,
    S8,
    U4,
    S4,
    U2,
    S2,
}

/// `cvt.pack.sat.convertType.s32{.b32} d, a, b{, c}`: `a` above `b`, both saturated. For types below 16 bits, `c`
/// fills the bits above them; for the 16-bit types it is ignored.
pub fn cvt_pack(to: PackType, a: i32, b: i32, c: u32) -> u32 {
    let (bits, signed) = match to {
        PackType::U16 => (16, false),
        PackType::S16 => (16, true),
        PackType::U8 => (8, false),
        PackType::S8 => (8, true),
        PackType::U4 => (4, false),
        PackType::S4 => (4, true),
        PackType::U2 => (2, false),
        PackType::S2 => (2, true),
    };
    let (low, high) = if signed {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    };
    let field = |x: i32| (x.clamp(low, high) as u32) & ((1 << bits) - 1);
    let pair = field(a) << bits | field(b);
    if bits == 16 { pair } else { pair | c << (2 * bits) }
}

#[cfg(test)]
#[path = "cvt_tests.rs"]
mod tests;
