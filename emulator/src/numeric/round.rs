//! Rounding modes, and two ways to carry an inexact result to the point where it is rounded once.
//!
//! *Round to odd.* Truncate a result that has at least two bits more than the target needs, and set its last bit if
//! any non-zero bit was cut off. Rounding it again in any mode then equals rounding the exact value. f64 has 53 bits
//! and f32 needs 24 + 2, so every f32, f16 and bf16 operation is one f64 operation, its error term (which an fma or
//! Knuth's two-sum gives exactly), and [`to_odd`].
//!
//! *Exact.* f64 has no wider type to compute in, so its directed modes use [`Exact`]: a sign, a 128-bit significand
//! whose last bit is sticky, and an exponent.

/// Rounding of a real result to a floating-point format (PTX `.rn .rna .rz .rm .rp`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// `.rn`: to nearest, ties to even.
    #[default]
    NearestEven,
    /// `.rna`: to nearest, ties away from zero.
    NearestAway,
    /// `.rz`: toward zero.
    TowardZero,
    /// `.rm`: toward negative infinity.
    Down,
    /// `.rp`: toward positive infinity.
    Up,
}

impl Rounding {
    /// Returns true if a magnitude is increased by one unit in the last place, given its parity, the first bit cut
    /// off, and whether any later bit is non-zero.
    #[inline]
    pub const fn increments(self, negative: bool, odd: bool, half: bool, sticky: bool) -> bool {
        match self {
            Rounding::NearestEven => half && (sticky || odd),
            Rounding::NearestAway => half,
            Rounding::TowardZero => false,
            Rounding::Down => negative && (half || sticky),
            Rounding::Up => !negative && (half || sticky),
        }
    }

    /// Returns true if a magnitude too large for the format becomes infinity, false for the largest finite value.
    #[inline]
    pub const fn overflows_to_infinity(self, negative: bool) -> bool {
        match self {
            Rounding::NearestEven | Rounding::NearestAway => true,
            Rounding::TowardZero => false,
            Rounding::Down => negative,
            Rounding::Up => !negative,
        }
    }
}

/// Rounding of a real value to an integer (PTX `.rni .rzi .rmi .rpi`, section "cvt").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntegerRounding {
    /// `.rni`: to nearest, ties to even.
    NearestEven,
    /// `.rzi`: toward zero.
    TowardZero,
    /// `.rmi`: toward negative infinity.
    Down,
    /// `.rpi`: toward positive infinity.
    Up,
}

impl IntegerRounding {
    /// Rounds `x` to an integral value; NaN and infinities pass, the sign of zero is kept.
    #[inline]
    pub fn apply(self, x: f64) -> f64 {
        match self {
            IntegerRounding::NearestEven => x.round_ties_even(),
            IntegerRounding::TowardZero => x.trunc(),
            IntegerRounding::Down => x.floor(),
            IntegerRounding::Up => x.ceil(),
        }
    }
}

/// Rounds `sum + error` to odd, where `sum` is the nearest f64 and `error` the small remainder.
#[inline]
pub fn to_odd(sum: f64, error: f64) -> f64 {
    let bits = sum.to_bits();
    if error == 0.0 || bits & 1 == 1 || !sum.is_finite() {
        return sum;
    }
    let away = (error > 0.0) == (sum > 0.0);
    f64::from_bits(if away { bits + 1 } else { bits - 1 })
}

/// Rounds `a + b` to odd. Knuth's two-sum gives the error exactly; neither operand may overflow f64.
#[inline]
pub fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    to_odd(sum, error)
}

/// Rounds `x` to f32 in the given mode; NaN stays NaN.
#[inline]
pub fn f32_from_f64(x: f64, rounding: Rounding) -> f32 {
    let nearest = x as f32;
    let toward = match rounding {
        Rounding::NearestEven => return nearest,
        Rounding::NearestAway => {
            return f32::from_bits(super::format::F32.encode(x, rounding, false));
        }
        Rounding::TowardZero if x > 0.0 => Rounding::Down,
        Rounding::TowardZero => Rounding::Up,
        other => other,
    };
    let wide = f64::from(nearest);
    if toward == Rounding::Down && wide > x {
        nearest.next_down()
    } else if toward == Rounding::Up && wide < x {
        nearest.next_up()
    } else {
        nearest
    }
}

/// A finite real number `(-1)^negative * significand * 2^exponent`. If bits had to be cut off, the lowest bit of the
/// significand is set, and at least 60 bits lie above it: enough to round to f64 in any mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exact {
    /// True for a negative number.
    pub negative: bool,
    /// Bits of the magnitude, the lowest one sticky.
    pub significand: u128,
    /// Weight of the lowest bit, as a power of 2.
    pub exponent: i32,
}

/// Shifts right; the lowest bit is set if a non-zero bit was shifted out.
const fn shift_right_jam(x: u128, by: u32) -> u128 {
    if by == 0 {
        x
    } else if by >= 128 {
        (x != 0) as u128
    } else {
        (x >> by) | ((x << (128 - by)) != 0) as u128
    }
}

impl Exact {
    /// Converts a finite f64.
    pub fn from_f64(x: f64) -> Exact {
        let bits = x.to_bits();
        let field = (bits >> 52) as i32 & 0x7ff;
        let fraction = u128::from(bits & ((1 << 52) - 1));
        Exact {
            negative: bits >> 63 == 1,
            significand: if field == 0 { fraction } else { fraction | 1 << 52 },
            exponent: field.max(1) - 1075,
        }
    }

    /// Converts an integer.
    pub const fn from_int(x: i128) -> Exact {
        Exact {
            negative: x < 0,
            significand: x.unsigned_abs(),
            exponent: 0,
        }
    }

    /// Returns this value with the highest set bit at position 125, two below the top, where sums have room.
    const fn normalised(self) -> Exact {
        if self.significand == 0 {
            return self;
        }
        let up = self.significand.leading_zeros() as i32 - 2;
        let significand = if up >= 0 {
            self.significand << up
        } else {
            shift_right_jam(self.significand, up.unsigned_abs())
        };
        Exact {
            negative: self.negative,
            significand,
            exponent: self.exponent - up,
        }
    }

    /// Multiplies; both significands must have at most 64 bits.
    pub const fn mul(self, other: Exact) -> Exact {
        Exact {
            negative: self.negative != other.negative,
            significand: self.significand * other.significand,
            exponent: self.exponent + other.exponent,
        }
    }

    /// Adds; neither operand may be sticky. A zero sum of non-zero operands has `negative == false`.
    pub const fn add(self, other: Exact) -> Exact {
        if self.significand == 0 || other.significand == 0 {
            return if self.significand == 0 { other } else { self };
        }
        let (a, b) = (self.normalised(), other.normalised());
        let (big, small) = if a.exponent >= b.exponent { (a, b) } else { (b, a) };
        let aligned = shift_right_jam(small.significand, (big.exponent - small.exponent) as u32);
        if big.negative == small.negative {
            return Exact {
                significand: big.significand + aligned,
                ..big
            };
        }
        if big.significand >= aligned {
            let significand = big.significand - aligned;
            Exact {
                negative: big.negative && significand != 0,
                significand,
                ..big
            }
        } else {
            Exact {
                negative: small.negative,
                significand: aligned - big.significand,
                ..big
            }
        }
    }

    /// Divides, sticky in the last of about 72 bits; both operands come from f64, the divisor is not zero.
    pub const fn div(self, divisor: Exact) -> Exact {
        let numerator = self.normalised();
        let down = 53 - (128 - divisor.significand.leading_zeros());
        let denominator = divisor.significand << down;
        let quotient = numerator.significand / denominator;
        let rest = numerator.significand % denominator;
        Exact {
            negative: self.negative != divisor.negative,
            significand: quotient | (rest != 0) as u128,
            exponent: numerator.exponent - (divisor.exponent - down as i32),
        }
    }

    /// Takes the square root of a non-negative value, sticky in the last of 63 bits.
    pub const fn sqrt(self) -> Exact {
        let mut x = self.normalised();
        if x.exponent & 1 != 0 {
            x.significand >>= 1;
            x.exponent += 1;
        }
        let root = x.significand.isqrt();
        let inexact = root * root != x.significand;
        Exact {
            negative: false,
            significand: root | inexact as u128,
            exponent: x.exponent / 2,
        }
    }

    /// Rounds to f64 in the given mode. Zero keeps its sign.
    pub fn to_f64(self, rounding: Rounding) -> f64 {
        let sign = u64::from(self.negative) << 63;
        if self.significand == 0 {
            return f64::from_bits(sign);
        }
        let bits = 128 - self.significand.leading_zeros() as i32;
        let lowest = (self.exponent + bits - 53).max(-1074);
        let cut = lowest - self.exponent;
        let (kept, half, sticky) = if cut <= 0 {
            ((self.significand << -cut) as u64, false, false)
        } else if cut > 128 {
            (0, false, true)
        } else {
            let kept = if cut == 128 {
                0
            } else {
                (self.significand >> cut) as u64
            };
            let half = self.significand >> (cut - 1) & 1 == 1;
            (kept, half, self.significand & ((1 << (cut - 1)) - 1) != 0)
        };
        let up = rounding.increments(self.negative, kept & 1 == 1, half, sticky);
        let kept = kept + u64::from(up);
        // `kept` includes the implicit bit, which adds one to the exponent field; the field is one too low for that.
        let field = (lowest + 1074) as u64;
        let magnitude = if field >= 2046 || kept + (field << 52) >= 0x7ff << 52 {
            (0x7ff << 52) - u64::from(!rounding.overflows_to_infinity(self.negative))
        } else {
            kept + (field << 52)
        };
        f64::from_bits(sign | magnitude)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Rounding; 4] = [
        Rounding::NearestEven,
        Rounding::TowardZero,
        Rounding::Down,
        Rounding::Up,
    ];

    fn samples() -> Vec<f64> {
        let mut out = vec![
            0.0,
            1.0,
            f64::MIN_POSITIVE,
            f64::MAX,
            5e-324,
            1.5,
            3.0,
            1e308,
            1e-308,
            2f64.powi(53),
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        while out.len() < 300 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let x = f64::from_bits(state ^ (state >> 31));
            if x.is_finite() {
                out.push(x);
                out.push(f64::from_bits(
                    (x.to_bits() & !(0x7ff << 52)) | (1020 + (state >> 60)) << 52,
                ));
            }
        }
        out.iter().flat_map(|&x| [x, -x]).collect()
    }

    #[test]
    fn exact_agrees_with_the_machine_when_rounding_to_nearest() {
        let xs = samples();
        for &a in &xs {
            assert_eq!(Exact::from_f64(a).to_f64(Rounding::TowardZero).to_bits(), a.to_bits());
            if a >= 0.0 {
                assert_eq!(
                    Exact::from_f64(a).sqrt().to_f64(Rounding::NearestEven),
                    a.sqrt(),
                    "sqrt {a:e}"
                );
            }
            for &b in &xs {
                let (x, y) = (Exact::from_f64(a), Exact::from_f64(b));
                assert_eq!(x.mul(y).to_f64(Rounding::NearestEven), a * b, "{a:e} * {b:e}");
                assert_eq!(x.add(y).to_f64(Rounding::NearestEven), a + b, "{a:e} + {b:e}");
                if b != 0.0 {
                    assert_eq!(x.div(y).to_f64(Rounding::NearestEven), a / b, "{a:e} / {b:e}");
                }
            }
        }
    }

    #[test]
    fn exact_fma_agrees_with_the_machine() {
        let xs = samples();
        for (i, &a) in xs.iter().enumerate() {
            for (j, &b) in xs.iter().enumerate().step_by(7) {
                let c = xs[(i * 31 + j * 17) % xs.len()];
                for c in [c, -(a * b), -(a * b).next_up()] {
                    if c.is_finite() {
                        let got = Exact::from_f64(a).mul(Exact::from_f64(b)).add(Exact::from_f64(c));
                        assert_eq!(
                            got.to_f64(Rounding::NearestEven),
                            a.mul_add(b, c),
                            "{a:e} * {b:e} + {c:e}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn directed_modes_bracket_the_exact_value() {
        let third = Exact::from_f64(1.0).div(Exact::from_f64(3.0));
        let down = third.to_f64(Rounding::Down);
        assert_eq!(third.to_f64(Rounding::Up), down.next_up());
        assert_eq!(third.to_f64(Rounding::TowardZero), down);
        assert_eq!((1.0f64 / 3.0), down);
        let huge = Exact::from_f64(f64::MAX).mul(Exact::from_f64(2.0));
        assert_eq!(huge.to_f64(Rounding::Down), f64::MAX);
        assert_eq!(huge.to_f64(Rounding::Up), f64::INFINITY);
        let tiny = Exact::from_f64(-5e-324).mul(Exact::from_f64(0.25));
        assert_eq!(tiny.to_f64(Rounding::Down), -5e-324);
        assert_eq!(tiny.to_f64(Rounding::NearestEven).to_bits(), 1 << 63);
    }

    #[test]
    fn f32_rounding_agrees_with_the_generic_encoder() {
        for x in samples() {
            for scale in [1.0, 2f64.powi(-900), 2f64.powi(-140) / x.abs().max(1e-300)] {
                let x = x * scale;
                if !x.is_finite() {
                    continue;
                }
                for mode in MODES {
                    let want = super::super::format::F32.encode(x, mode, false);
                    assert_eq!(f32_from_f64(x, mode).to_bits(), want, "{x:e} {mode:?}");
                }
            }
        }
    }

    #[test]
    fn round_to_odd_keeps_a_tie_breaker_that_f64_loses() {
        // 1 + 2^-8 lies half-way between two bf16 values; 2^-100 above it must round up.
        let odd = sum_to_odd(1.0 + 2f64.powi(-8), 2f64.powi(-100));
        assert!(odd > 1.0 + 2f64.powi(-8));
        let odd = sum_to_odd(1.0 + 2f64.powi(-8), -2f64.powi(-100));
        assert!(odd < 1.0 + 2f64.powi(-8));
    }
}
