//! [`F8E4M3`]: an 8-bit float.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A float of 8 bits: the sign, 4 bits of exponent with bias 7, 3 bits of fraction. It is E4M3 of the OCP specification of
/// 8-bit floats, PyTorch's `float8_e4m3fn`: there is no infinity, and the codes 0x7f and 0xff are NaN.
///
/// Finite values reach from -448 to 448. Below 2^-6 they are multiples of 2^-9; above, each has four significant bits. Tensors
/// of it hold the quantised inputs of [`Attention::forward_fp8`](crate::Attention::forward_fp8), and are no inputs of
/// [`Attention::forward`](crate::Attention::forward):
///
/// ```compile_fail
/// use flash_attention::{Attention, Device, F8E4M3, Tensor};
///
/// let x = Tensor::from_slice(&Device::cpu(), [1, 1, 1, 8], &[F8E4M3::MAX; 8])?;
/// Attention::new().forward(&x, &x, &x)?; // it is no `Element`: does not compile
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable)]
#[repr(transparent)]
pub struct F8E4M3(u8);

/// Bits of a fraction of f32 that this type has not.
const LOST_BITS: u32 = 23 - 3;

/// Difference of the two exponents' biases.
const BIAS_STEP: u32 = 127 - 7;

impl F8E4M3 {
    /// The largest number, 448.
    pub const MAX: Self = Self(0x7e);
    /// The smallest number, -448.
    pub const MIN: Self = Self(0xfe);
    /// The smallest positive number, 2^-9.
    pub const MIN_POSITIVE: Self = Self(0x01);
    /// Not a number, as conversions write it.
    pub const NAN: Self = Self(0x7f);

    /// Makes the number with this code.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Returns the code of the number.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// Rounds to the nearest number, ties to even. What is larger than [`MAX`](Self::MAX), infinity included, becomes MAX, and
    /// what is smaller than [`MIN`](Self::MIN) becomes MIN. NaN becomes [`NAN`](Self::NAN). `cvt.rn.satfinite.e4m3x2.f32` of
    /// GPUs does the same.
    #[inline]
    pub const fn from_f32(value: f32) -> Self {
        const MAX: f32 = 448.0;
        const LEAST_NORMAL: f32 = 1.0 / 64.0;
        // An f32 from here to the next power of two has a last bit of 2^-9.
        const GRID: f32 = 16384.0;
        let magnitude = value.abs();
        let code = if value.is_nan() {
            return Self::NAN;
        } else if magnitude >= MAX {
            Self::MAX.0
        } else if magnitude < LEAST_NORMAL {
            ((magnitude + GRID).to_bits() - GRID.to_bits()) as u8
        } else {
            let bits = magnitude.to_bits() - (BIAS_STEP << 23);
            let is_odd = bits >> LOST_BITS & 1;
            // A carry out of the fraction moves to the next exponent, where the fraction is 0.
            ((bits + (1 << (LOST_BITS - 1)) - 1 + is_odd) >> LOST_BITS) as u8
        };
        Self(code | if value.is_sign_negative() { 0x80 } else { 0 })
    }

    /// Converts to f32, exactly.
    #[inline]
    pub const fn to_f32(self) -> f32 {
        // The code's fields at the place of those of f32 are a number with another bias. A subnormal one remains exact.
        const UNBIAS: f32 = f32::from_bits((127 + BIAS_STEP) << 23);
        let magnitude = if self.is_nan() {
            f32::NAN
        } else {
            f32::from_bits(((self.0 & 0x7f) as u32) << LOST_BITS) * UNBIAS
        };
        if self.0 & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// Tells if this is not a number.
    pub const fn is_nan(self) -> bool {
        self.0 & 0x7f == 0x7f
    }
}

impl From<F8E4M3> for f32 {
    fn from(x: F8E4M3) -> Self {
        x.to_f32()
    }
}

impl From<F8E4M3> for f64 {
    fn from(x: F8E4M3) -> Self {
        x.to_f32().into()
    }
}

/// Compares numbers, not bits: the two zeros are equal, and NaN equals nothing.
impl PartialEq for F8E4M3 {
    fn eq(&self, other: &Self) -> bool {
        self.to_f32() == other.to_f32()
    }
}

impl PartialOrd for F8E4M3 {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.to_f32().partial_cmp(&other.to_f32())
    }
}

impl fmt::Debug for F8E4M3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_f32(), f)
    }
}

impl fmt::Display for F8E4M3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_f32(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code, by the definition of the format.
    fn defined(code: u8) -> f64 {
        let (exponent, fraction) = (i32::from(code >> 3 & 0xf), f64::from(code & 7));
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => fraction / 8.0 * 2_f64.powi(-6),
            _ => (1.0 + fraction / 8.0) * 2_f64.powi(exponent - 7),
        };
        if code < 128 { magnitude } else { -magnitude }
    }

    /// The nearest code, by search; of two as near the one with an even fraction.
    fn nearest(value: f32) -> u8 {
        let magnitude = value.abs().min(448.0);
        let distance = |code: &u8| (defined(*code) - f64::from(magnitude)).abs();
        let code = (0..=0x7e_u8)
            .min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))))
            .expect("codes");
        code | u8::from(value.is_sign_negative()) << 7
    }

    #[test]
    fn every_code_has_its_value_and_comes_back() {
        for code in 0..=255 {
            let (x, want) = (F8E4M3::from_bits(code), defined(code));
            assert_eq!(x.is_nan(), want.is_nan(), "{code:#x}");
            if want.is_nan() {
                assert!(x.to_f32().is_nan() && F8E4M3::from_f32(x.to_f32()).to_bits() == 0x7f);
                continue;
            }
            assert_eq!(f64::from(x.to_f32()), want, "{code:#x}");
            assert_eq!(x.to_f32().is_sign_negative(), code >= 128, "{code:#x}");
            assert_eq!(F8E4M3::from_f32(x.to_f32()).to_bits(), code);
        }
        let values = [F8E4M3::MAX, F8E4M3::MIN, F8E4M3::MIN_POSITIVE].map(F8E4M3::to_f32);
        assert_eq!(values, [448.0, -448.0, 1.0 / 512.0]);
    }

    #[test]
    fn ties_go_to_even_and_their_neighbours_to_the_nearer() {
        for code in 0..0x7e_u8 {
            let middle = ((defined(code) + defined(code + 1)) / 2.0) as f32;
            let even = code + (code & 1);
            for sign in [0, 0x80] {
                let signed = |x: f32| if sign == 0 { x } else { -x };
                let rounded = |x: f32| F8E4M3::from_f32(signed(x)).to_bits();
                assert_eq!(rounded(middle), even | sign, "{middle}");
                assert_eq!(rounded(middle.next_down()), code | sign, "below {middle}");
                assert_eq!(rounded(middle.next_up()), (code + 1) | sign, "above {middle}");
            }
        }
    }

    #[test]
    fn what_is_out_of_range_saturates() {
        for (value, code) in [
            (448.0, 0x7e),
            (449.0, 0x7e),
            (464.0, 0x7e),
            (f32::MAX, 0x7e),
            (f32::INFINITY, 0x7e),
            (0.0, 0),
            (f32::MIN_POSITIVE, 0),
            (f32::from_bits(1), 0),
            (1.0 / 1024.0, 0),
            ((1.0_f32 / 1024.0).next_up(), 1),
        ] {
            assert_eq!(F8E4M3::from_f32(value).to_bits(), code, "{value:e}");
            assert_eq!(F8E4M3::from_f32(-value).to_bits(), code | 0x80, "-{value:e}");
        }
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)] {
            assert_eq!(F8E4M3::from_f32(nan).to_bits(), 0x7f);
        }
    }

    #[test]
    fn random_bits_round_to_the_nearest() {
        let mut state = 1_u64;
        for _ in 0..200_000 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            // Half of all exponents are near those of the type.
            let bits = (state >> 32) as u32;
            let near = bits & 0x807f_ffff | (110 + bits / 8 % 32) << 23;
            for value in [bits, near].map(f32::from_bits) {
                let want = if value.is_nan() { 0x7f } else { nearest(value) };
                assert_eq!(F8E4M3::from_f32(value).to_bits(), want, "{value:e}");
            }
        }
    }
}
