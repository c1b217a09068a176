//! Constants of 2^x.

/// Added to a float of less than 2^22, it rounds the float to a whole number n and leaves n + 127, the exponent of
/// 2^n, in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0 + 127.0; // 1.5 * 2^23

/// Polynomial of degree 6 that is 1 at 0 and has the least maximal relative error against 2^f for |f| <= 1/2: 2e-9,
/// before its coefficients and its arithmetic are rounded.
pub(super) const POWERS: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_48,
    0.055_503_324,
    0.009_618_437,
    0.001_339_887_5,
    0.000_153_533_62,
];

/// 2^x where a register holds 2^(i / `N`) for each i below `N`, or two registers do: x is n / N + f, and 2^f - 1 is f times a short
/// polynomial.
#[cfg(target_arch = "x86_64")]
pub(super) struct Roots<const N: usize, const TERMS: usize> {
    /// 2^(i / N).
    pub powers: [f32; N],
    /// The same, less i / N in the exponent's bits, so that adding n / N to them makes 2^(n / N) of entry n modulo N.
    pub without_exponent: [f32; N],
    /// Added to a float of a small magnitude, it rounds the float to n / N and leaves n in the low bits.
    pub round: f32,
    /// Polynomial with the least maximal relative error against (2^f - 1) / f for |f| <= 1 / 2N.
    pub polynomial: [f32; TERMS],
}

#[cfg(target_arch = "x86_64")]
impl<const N: usize, const TERMS: usize> Roots<N, TERMS> {
    const fn new(polynomial: [f32; TERMS]) -> Self {
        let bits = N.trailing_zeros();
        let (mut powers, mut without_exponent) = ([0.0; N], [0.0; N]);
        let mut i = 0;
        while i < N {
            powers[i] = power(i as f64 / N as f64) as f32;
            without_exponent[i] = f32::from_bits(powers[i].to_bits() - ((i as u32) << (23 - bits)));
            i += 1;
        }
        Self {
            powers,
            without_exponent,
            round: 12_582_912.0 / N as f32,
            polynomial,
        }
    }
}

/// Eight roots, for one register of AVX2: 2^f is within 2.7e-8.
#[cfg(target_arch = "x86_64")]
pub(super) static ROOTS_8: Roots<8, 3> = Roots::new([0.693_147_24, 0.240_257_64, 0.055_496_223]);

/// Thirty-two roots, for two registers of AVX-512: 2^f is within 5.4e-8.
#[cfg(target_arch = "x86_64")]
pub(super) static ROOTS_32: Roots<32, 2> = Roots::new([0.693_157_3, 0.240_226_5]);

/// 2^x for 0 <= x < 1, by the series of e^(x ln 2).
#[cfg(target_arch = "x86_64")]
const fn power(x: f64) -> f64 {
    let (mut sum, mut term, mut n) = (1.0, 1.0, 1.0);
    while n < 24.0 {
        term *= x * std::f64::consts::LN_2 / n;
        sum += term;
        n += 1.0;
    }
    sum
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn roots_are_nearest_to_powers() {
        for (i, root) in ROOTS_32.powers.into_iter().enumerate() {
            assert_eq!(root, (i as f64 / 32.0).exp2() as f32);
        }
        for (i, root) in ROOTS_8.without_exponent.into_iter().enumerate() {
            let with_exponent = f32::from_bits(root.to_bits() + (i as u32) * (1 << 20));
            assert_eq!(with_exponent, (i as f64 / 8.0).exp2() as f32);
        }
    }
}
