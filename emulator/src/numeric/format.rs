//! Small floating-point formats of the PTX manual ("Fundamental Types", "Alternate Floating-Point Data Formats").
//!
//! Each of them fits exactly in an f32, so decoding is exact and encoding is one rounding of an f64. A format is a
//! value ([`Format`]), not a type: its field widths, and one algorithm for all.
//!
//! | format | sign, exponent, fraction | largest | infinity | NaN written |
//! | --- | --- | --- | --- | --- |
//! | [`F16`] | 1, 5, 10 | 65504 | yes | 0x7fff |
//! | [`BF16`] | 1, 8, 7 | 3.39e38 | yes | 0x7fff |
//! | [`TF32`] | 1, 8, 10 | 3.40e38 | yes | 0x3ffff, 0x7fffffff in a register |
//! | [`E4M3`] | 1, 4, 3 | 448 | no | 0x7f |
//! | [`E5M2`] | 1, 5, 2 | 57344 | yes | 0x7f |
//! | [`F32`] | 1, 8, 23 | 3.40e38 | yes | 0x7fffffff |

use super::round::Rounding;

/// NaN that PTX f32 arithmetic writes.
pub const F32_NAN_BITS: u32 = 0x7fff_ffff;
/// [`F32_NAN_BITS`] as a value.
pub const F32_NAN: f32 = f32::from_bits(F32_NAN_BITS);
/// NaN that f16 and bf16 arithmetic write.
pub const HALF_NAN: u16 = 0x7fff;

/// A binary floating-point format of at most 32 bits: sign, exponent, fraction, from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Width of the exponent field in bits; the bias is `2^(n-1) - 1`.
    pub exponent_bits: u32,
    /// Width of the fraction field in bits.
    pub fraction_bits: u32,
    /// True if the top exponent means infinity and NaN. If false, only the all-ones pattern is NaN (e4m3).
    pub has_infinity: bool,
}

/// IEEE half precision.
pub const F16: Format = Format {
    exponent_bits: 5,
    fraction_bits: 10,
    has_infinity: true,
};
/// bfloat16: the upper half of an f32.
pub const BF16: Format = Format {
    exponent_bits: 8,
    fraction_bits: 7,
    has_infinity: true,
};
/// TensorFloat-32 as 19 bits; in a register it is an f32 whose 13 low bits are zero.
pub const TF32: Format = Format {
    exponent_bits: 8,
    fraction_bits: 10,
    has_infinity: true,
};
/// FP8 with four exponent bits, no infinity.
pub const E4M3: Format = Format {
    exponent_bits: 4,
    fraction_bits: 3,
    has_infinity: false,
};
/// FP8 with five exponent bits: the upper half of an f16.
pub const E5M2: Format = Format {
    exponent_bits: 5,
    fraction_bits: 2,
    has_infinity: true,
};
/// IEEE single precision, for rounding modes without a host instruction.
pub const F32: Format = Format {
    exponent_bits: 8,
    fraction_bits: 23,
    has_infinity: true,
};

impl Format {
    /// Returns the exponent bias.
    pub const fn bias(self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    /// Returns the mask of the sign bit.
    pub const fn sign_mask(self) -> u32 {
        1 << (self.exponent_bits + self.fraction_bits)
    }

    /// Returns the canonical NaN: all bits set but the sign.
    pub const fn nan(self) -> u32 {
        self.sign_mask() - 1
    }

    /// Returns positive infinity, or NaN if the format has no infinity.
    pub const fn infinity(self) -> u32 {
        if self.has_infinity {
            ((1 << self.exponent_bits) - 1) << self.fraction_bits
        } else {
            self.nan()
        }
    }

    /// Returns the largest finite magnitude.
    pub const fn max_finite(self) -> u32 {
        self.infinity() - 1
    }

    /// Returns true if the bits are a NaN.
    pub const fn is_nan(self, bits: u32) -> bool {
        let magnitude = bits & (self.sign_mask() - 1);
        if self.has_infinity {
            magnitude > self.infinity()
        } else {
            magnitude == self.nan()
        }
    }

    /// Returns true if the bits are a subnormal number (not zero).
    pub const fn is_subnormal(self, bits: u32) -> bool {
        let magnitude = bits & (self.sign_mask() - 1);
        magnitude != 0 && magnitude < 1 << self.fraction_bits
    }

    /// Replaces a subnormal by a zero of the same sign.
    pub const fn flush(self, bits: u32) -> u32 {
        if self.is_subnormal(bits) {
            bits & self.sign_mask()
        } else {
            bits
        }
    }

    /// Returns the value, exactly; NaN stays NaN.
    #[inline]
    pub const fn decode(self, bits: u32) -> f32 {
        let sign = (bits & self.sign_mask()) << (31 - self.exponent_bits - self.fraction_bits);
        let magnitude = bits & (self.sign_mask() - 1);
        if self.is_nan(bits) {
            return f32::from_bits(sign | 0x7fc0_0000);
        }
        if self.has_infinity && magnitude == self.infinity() {
            return f32::from_bits(sign | 0x7f80_0000);
        }
        // Read as an f32, the exponent field is too small by the difference of the biases. Multiplying by a power of
        // two corrects this, for subnormals as well.
        let raw = f32::from_bits(sign | magnitude << (23 - self.fraction_bits));
        let scale = f32::from_bits(((127 + (127 - self.bias())) as u32) << 23);
        if self.bias() == 127 { raw } else { raw * scale }
    }

    /// Rounds `x` once to the format. An overflow becomes infinity or the largest finite value, as `rounding`
    /// determines. With `satfinite`, or in a format without infinity, overflows and infinities always become the
    /// largest finite value. NaN becomes the canonical NaN. The sign of zero is kept.
    #[inline]
    pub const fn encode(self, x: f64, rounding: Rounding, satfinite: bool) -> u32 {
        let bits = x.to_bits();
        let negative = bits >> 63 == 1;
        let sign = if negative { self.sign_mask() } else { 0 };
        let magnitude = bits & !(1 << 63);
        let finite_only = satfinite || !self.has_infinity;
        if magnitude >= 0x7ff << 52 {
            return if magnitude > 0x7ff << 52 {
                self.nan()
            } else if finite_only {
                sign | self.max_finite()
            } else {
                sign | self.infinity()
            };
        }
        if magnitude == 0 {
            return sign;
        }
        let field = (magnitude >> 52) as i32;
        // f64 subnormals lie below half of every smallest subnormal here, so their exponent's offset may be ignored.
        let significand = magnitude & ((1 << 52) - 1) | 1 << 52;
        let exponent = field - 1023;
        let below = 1 - self.bias() - exponent;
        let cut = 52 - self.fraction_bits + if below > 0 { below as u32 } else { 0 };
        let (kept, half, sticky) = if cut > 54 {
            (0, false, true)
        } else {
            let rest = significand & ((1 << cut) - 1);
            let half = 1 << (cut - 1);
            (significand >> cut, rest & half != 0, rest & (half - 1) != 0)
        };
        let up = rounding.increments(negative, kept & 1 == 1, half, sticky) as u64;
        // The implicit bit of a normal number adds one to the exponent field below it; so does a carry from rounding.
        let base = if below > 0 {
            0
        } else {
            ((exponent + self.bias() - 1) as u64) << self.fraction_bits
        };
        let rounded = base + kept + up;
        if rounded > self.max_finite() as u64 {
            if finite_only || !rounding.overflows_to_infinity(negative) {
                return sign | self.max_finite();
            }
            return sign | self.infinity();
        }
        sign | rounded as u32
    }
}

/// Returns the value of an f16, exactly; NaN stays NaN. Without branches, so loops over it vectorise.
#[inline]
pub const fn f16_to_f32(bits: u16) -> f32 {
    let sign = (bits as u32 & 0x8000) << 16;
    let magnitude = (bits as u32 & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x7c00 << 13 {
        special
    } else {
        scaled.to_bits()
    };
    f32::from_bits(sign | value)
}

/// Returns the value of a bf16, exactly.
#[inline]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Rounds `x` to f16, to nearest even.
#[inline]
pub const fn f32_to_f16(x: f32) -> u16 {
    F16.encode(x as f64, Rounding::NearestEven, false) as u16
}

/// Rounds `x` to bf16, to nearest even; NaN becomes [`HALF_NAN`].
#[inline]
pub const fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return HALF_NAN;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Returns the value that a tensor core reads from a `.tf32` register: the 13 low bits are ignored.
#[inline]
pub const fn tf32_to_f32(bits: u32) -> f32 {
    f32::from_bits(bits & 0xffff_e000)
}

const E4M3_VALUES: [f32; 256] = table(E4M3);
const E5M2_VALUES: [f32; 256] = table(E5M2);

const fn table(format: Format) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        values[bits] = format.decode(bits as u32);
        bits += 1;
    }
    values
}

/// Returns the value of an e4m3, exactly.
#[inline]
pub const fn e4m3_to_f32(bits: u8) -> f32 {
    E4M3_VALUES[bits as usize]
}

/// Returns the value of an e5m2, exactly.
#[inline]
pub const fn e5m2_to_f32(bits: u8) -> f32 {
    E5M2_VALUES[bits as usize]
}

/// Replaces an f32 subnormal by a zero of the same sign (`.ftz`).
#[inline]
pub fn flush_f32(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        0f32.copysign(x)
    } else {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Rounding; 5] = [
        Rounding::NearestEven,
        Rounding::NearestAway,
        Rounding::TowardZero,
        Rounding::Down,
        Rounding::Up,
    ];

    /// Evaluates the textbook formula in f64.
    fn textbook(format: Format, bits: u32) -> f64 {
        let sign = if bits & format.sign_mask() != 0 { -1.0 } else { 1.0 };
        let exponent = (bits & (format.sign_mask() - 1)) >> format.fraction_bits;
        let fraction = bits & ((1 << format.fraction_bits) - 1);
        let unit = f64::from(fraction) / f64::from(1u32 << format.fraction_bits);
        let top = (1 << format.exponent_bits) - 1;
        if format.has_infinity && exponent == top {
            return if fraction == 0 { sign * f64::INFINITY } else { f64::NAN };
        }
        if !format.has_infinity && exponent == top && fraction + 1 == 1 << format.fraction_bits {
            return f64::NAN;
        }
        if exponent == 0 {
            sign * unit * 2f64.powi(1 - format.bias())
        } else {
            sign * (1.0 + unit) * 2f64.powi(exponent as i32 - format.bias())
        }
    }

    #[test]
    fn every_pattern_decodes_to_the_textbook_value_and_encodes_back() {
        for (format, count) in [
            (F16, 1 << 16),
            (BF16, 1 << 16),
            (TF32, 1 << 19),
            (E4M3, 256),
            (E5M2, 256),
        ] {
            for bits in 0..count {
                let want = textbook(format, bits);
                let got = format.decode(bits);
                if want.is_nan() {
                    assert!(got.is_nan() && format.is_nan(bits));
                    assert_eq!(format.encode(want, Rounding::NearestEven, false), format.nan());
                    continue;
                }
                assert_eq!(f64::from(got).to_bits(), want.to_bits(), "{format:?} {bits:#x}");
                for mode in MODES {
                    let back = format.encode(want, mode, false);
                    assert_eq!(back, bits, "{format:?} {mode:?}");
                }
            }
        }
    }

    #[test]
    fn values_between_neighbours_round_as_the_mode_says() {
        for (format, count) in [(F16, 0x7c00u32), (BF16, 0x7f80), (E4M3, 0x7f), (E5M2, 0x7c)] {
            for low in 0..count - 1 {
                let (a, b) = (textbook(format, low), textbook(format, low + 1));
                let middle = (a + b) / 2.0;
                for (x, nearest) in [(middle.next_down(), low), (middle.next_up(), low + 1)] {
                    assert_eq!(format.encode(x, Rounding::NearestEven, false), nearest);
                    assert_eq!(format.encode(x, Rounding::NearestAway, false), nearest);
                    assert_eq!(format.encode(x, Rounding::TowardZero, false), low);
                    assert_eq!(format.encode(x, Rounding::Down, false), low);
                    assert_eq!(format.encode(x, Rounding::Up, false), low + 1);
                    assert_eq!(format.encode(-x, Rounding::Down, false), (low + 1) | format.sign_mask());
                    assert_eq!(format.encode(-x, Rounding::Up, false), low | format.sign_mask());
                }
                let even = if low % 2 == 0 { low } else { low + 1 };
                assert_eq!(format.encode(middle, Rounding::NearestEven, false), even);
                assert_eq!(format.encode(middle, Rounding::NearestAway, false), low + 1);
            }
        }
    }

    #[test]
    fn overflow_and_saturation() {
        assert_eq!(F16.encode(65519.0, Rounding::NearestEven, false), 0x7bff);
        assert_eq!(F16.encode(65520.0, Rounding::NearestEven, false), 0x7c00);
        assert_eq!(F16.encode(65520.0, Rounding::NearestEven, true), 0x7bff);
        assert_eq!(F16.encode(-1e9, Rounding::TowardZero, false), 0xfbff);
        assert_eq!(F16.encode(-1e9, Rounding::Up, false), 0xfbff);
        assert_eq!(F16.encode(-1e9, Rounding::Down, false), 0xfc00);
        assert_eq!(F16.encode(f64::INFINITY, Rounding::TowardZero, false), 0x7c00);
        assert_eq!(E4M3.encode(f64::NEG_INFINITY, Rounding::NearestEven, true), 0xfe);
        assert_eq!(E4M3.encode(449.0, Rounding::NearestEven, true), 0x7e);
        assert_eq!(E5M2.encode(1e6, Rounding::NearestEven, true), 0x7b);
        assert_eq!(E4M3.decode(0x7e), 448.0);
        assert_eq!(E5M2.decode(0x7b), 57344.0);
        assert_eq!(F16.encode(5e-324, Rounding::Up, false), 1);
    }

    #[test]
    fn quick_paths_agree_with_the_general_ones() {
        for bits in 0..=u16::MAX {
            let (fast, slow) = (f16_to_f32(bits), F16.decode(u32::from(bits)));
            assert!(
                fast.to_bits() == slow.to_bits() || fast.is_nan() && slow.is_nan(),
                "{bits:#x}"
            );
            let (fast, slow) = (bf16_to_f32(bits), BF16.decode(u32::from(bits)));
            assert!(
                fast.to_bits() == slow.to_bits() || fast.is_nan() && slow.is_nan(),
                "{bits:#x}"
            );
        }
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1664525).wrapping_add(1013904223);
            let x = f32::from_bits(bits);
            let want = BF16.encode(f64::from(x), Rounding::NearestEven, false);
            assert_eq!(u32::from(f32_to_bf16(x)), want, "{x:e}");
        }
    }

    #[test]
    fn flushing_keeps_the_sign() {
        assert_eq!(F16.flush(0x83ff), 0x8000);
        assert_eq!(F16.flush(0x0400), 0x0400);
        assert_eq!(flush_f32(-1e-40).to_bits(), 1 << 31);
        assert_eq!(flush_f32(f32::MIN_POSITIVE), f32::MIN_POSITIVE);
        assert!(flush_f32(f32::NAN).is_nan());
    }
}
