//! The inner loops: a small matrix product and one row of the online softmax, for any width of vector.
//!
//! Every function is `inline(always)`: it is compiled into a function that `pulp` compiles for each instruction set, and
//! only there do its vectors become registers.

use pulp::{NullaryFnOnce, Simd};

/// Rows are padded to a multiple of this, the widest vector there is.
pub(super) const MAX_LANES: usize = 16;

/// A matrix in row-major order: a slice and the elements from one row to the next.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// `c += a b` with `a` of `rows x inner`, `b` of `inner x columns`; columns are a multiple of [`MAX_LANES`].
///
/// Every element of `c` is one sum in order of `inner`, so that results do not depend on how rows are grouped.
///
/// The one function here that is called, not inlined: it is large, has many callers, and works long enough. Inlined, it
/// made most of the time that this crate takes to compile.
#[inline(always)]
pub(super) fn multiply_add<S: Simd>(
    simd: S,
    size: (usize, usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    simd.vectorize(MultiplyAdd {
        simd,
        size,
        a,
        b,
        c,
        c_stride,
    });
}

/// The arguments of [`multiply_add`], and its body, of which there is one for each instruction set.
struct MultiplyAdd<'a, S> {
    simd: S,
    size: (usize, usize, usize),
    a: Matrix<'a>,
    b: Matrix<'a>,
    c: &'a mut [f32],
    c_stride: usize,
}

impl<S: Simd> NullaryFnOnce for MultiplyAdd<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            simd,
            size: (rows, inner, columns),
            a,
            b,
            c,
            c_stride,
        } = self;
        let mut row = 0;
        while row < rows {
            let a = Matrix {
                data: &a.data[row * a.stride..],
                ..a
            };
            let c = &mut c[row * c_stride..];
            // Sums take two registers a row, and need enough rows to hide the latency of an addition.
            if S::REGISTER_COUNT >= 32 && row + 8 <= rows {
                row_panel::<S, 8>(simd, inner, columns, a, b, c, c_stride);
                row += 8;
            } else if row + 4 <= rows {
                row_panel::<S, 4>(simd, inner, columns, a, b, c, c_stride);
                row += 4;
            } else {
                row_panel::<S, 1>(simd, inner, columns, a, b, c, c_stride);
                row += 1;
            }
        }
    }
}

/// [`multiply_add`] for `M` rows: two vectors of columns at a time, one where only one is left.
#[inline(always)]
fn row_panel<S: Simd, const M: usize>(
    simd: S,
    inner: usize,
    columns: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    let lanes = S::F32_LANES;
    let mut column = 0;
    while column < columns {
        let b = Matrix {
            data: &b.data[column..],
            ..b
        };
        let c = &mut c[column..];
        if column + 2 * lanes <= columns {
            register_tile::<S, M, 2>(simd, inner, a, b, c, c_stride);
            column += 2 * lanes;
        } else {
            register_tile::<S, M, 1>(simd, inner, a, b, c, c_stride);
            column += lanes;
        }
    }
}

/// [`multiply_add`] for `M` rows by `N` vectors, which stay in registers for the whole sum.
#[inline(always)]
fn register_tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    inner: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    let width = N * S::F32_LANES;
    let a_rows: [&[f32]; M] = std::array::from_fn(|m| &a.data[m * a.stride..][..inner]);
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    for (m, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(S::as_simd_f32s(&c[m * c_stride..][..width]).0);
    }
    for (i, b_row) in b.data.chunks(b.stride).enumerate().take(inner) {
        let b_row = S::as_simd_f32s(&b_row[..width]).0;
        for (sums, a_row) in sums.iter_mut().zip(a_rows) {
            let factor = simd.splat_f32s(a_row[i]);
            for (sum, &b) in sums.iter_mut().zip(b_row) {
                *sum = simd.mul_add_e_f32s(factor, b, *sum);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        S::as_mut_simd_f32s(&mut c[m * c_stride..][..width])
            .0
            .copy_from_slice(sums);
    }
}

/// The backward pass of a run of scores, which become probabilities, and of dP, which becomes dS:
/// `p = exp(scale * s - lse)` and `ds = p * (dp - delta)`.
///
/// lse and delta are those of each score's query: one for the run, or with `COLUMNS` as many as there are scores. An lse
/// of plus infinity makes every probability 0.
#[inline(always)]
pub(super) fn backpropagate<S: Simd, const COLUMNS: bool>(
    simd: S,
    scale: f32,
    (lse, delta): (&[f32], &[f32]),
    (scores, dp): (&mut [f32], &mut [f32]),
) {
    let of = |statistic: &[f32], i: usize| {
        if COLUMNS {
            S::as_simd_f32s(statistic).0[i]
        } else {
            simd.splat_f32s(statistic[0])
        }
    };
    let (scale, log2_e) = (simd.splat_f32s(scale), simd.splat_f32s(std::f32::consts::LOG2_E));
    let (scores, dp) = (S::as_mut_simd_f32s(scores).0, S::as_mut_simd_f32s(dp).0);
    for (i, (p, ds)) in scores.iter_mut().zip(dp).enumerate() {
        // The difference first, rounded once: near 0, where probabilities are large, it keeps all its bits.
        let exponent = simd.mul_add_e_f32s(*p, scale, simd.neg_f32s(of(lse, i)));
        *p = exp2(simd, simd.mul_f32s(exponent, log2_e));
        *ds = simd.mul_f32s(*p, simd.sub_f32s(*ds, of(delta, i)));
    }
}

/// The sum of products of two runs of one length, a multiple of [`MAX_LANES`].
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    let mut sums = simd.splat_f32s(0.0);
    for (&x, &y) in S::as_simd_f32s(x).0.iter().zip(S::as_simd_f32s(y).0) {
        sums = simd.mul_add_e_f32s(x, y, sums);
    }
    simd.reduce_sum_f32s(sums)
}

/// Writes the transpose of the first `columns` columns of `from` to `to`, whose rows are `rows` long, a multiple of
/// [`MAX_LANES`].
#[inline(always)]
pub(super) fn transpose(from: Matrix<'_>, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) {
    for first in (0..rows).step_by(MAX_LANES) {
        let sources: [&[f32]; MAX_LANES] =
            std::array::from_fn(|row| &from.data[(first + row) * from.stride..][..columns]);
        for (column, target) in to.chunks_mut(to_stride).enumerate().take(columns) {
            for (element, source) in target[first..][..MAX_LANES].iter_mut().zip(sources) {
                *element = source[column];
            }
        }
    }
}

/// 2^x for x <= 0 or NaN, to about one unit in the last place; below 2^-126 it is 0. A small positive x is as good.
///
/// x = n + f with n whole and |f| <= 1/2. 2^f is its Taylor series, whose term after the last is below 1e-8; 2^n is made
/// by writing n into the exponent.
#[inline(always)]
fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Added to a float of less than 2^22, rounds it to a whole number and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    // ln(2)^k / k!
    const TAYLOR: [f32; 8] = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
        0.000_015_252_734,
    ];
    let too_small = simd.less_than_f32s(x, simd.splat_f32s(-126.0)); // not so for NaN
    let x = simd.select_f32s(too_small, simd.splat_f32s(-126.0), x);
    let rounded = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let fraction = simd.sub_f32s(x, simd.sub_f32s(rounded, simd.splat_f32s(ROUND)));
    let mut power = simd.splat_f32s(TAYLOR[7]);
    for k in (0..7).rev() {
        power = simd.mul_add_e_f32s(power, fraction, simd.splat_f32s(TAYLOR[k]));
    }
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    let two_to_n = simd.transmute_f32s_u32s(simd.add_u32s(exponent, simd.splat_u32s(1.0_f32.to_bits())));
    simd.select_f32s(too_small, simd.splat_f32s(0.0), simd.mul_f32s(power, two_to_n))
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;

    struct Exp2Of<'a>(&'a mut [f32]);

    impl pulp::WithSimd for Exp2Of<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for x in S::as_mut_simd_f32s(self.0).0 {
                *x = exp2(simd, *x);
            }
        }
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        let inputs: Vec<f32> = (0..1 << 16).map(|i| -126.0 * i as f32 / 65535.0).collect();
        let mut outputs = inputs.clone();
        Arch::new().dispatch(Exp2Of(&mut outputs));
        for (x, got) in inputs.into_iter().zip(outputs) {
            let want = f64::from(x).exp2();
            assert!(
                (f64::from(got) - want).abs() <= 1.5 * f64::from(f32::EPSILON) * want,
                "2^{x} = {want}, got {got}"
            );
        }
    }

    #[test]
    fn exp2_of_the_special_values() {
        let mut values = [0.0, -0.0, -1.0, -126.0, -127.0, -1e30, f32::NEG_INFINITY, f32::NAN].repeat(2);
        Arch::new().dispatch(Exp2Of(&mut values));
        assert_eq!(values[..7], [1.0, 1.0, 0.5, f32::MIN_POSITIVE, 0.0, 0.0, 0.0]);
        assert!(values[7].is_nan());
    }

    struct Product<'a>(usize, usize, usize, &'a [f32], &'a [f32], &'a mut [f32]);

    impl pulp::WithSimd for Product<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(rows, inner, columns, a, b, c) = self;
            let (a, b) = (
                Matrix { data: a, stride: inner },
                Matrix {
                    data: b,
                    stride: columns,
                },
            );
            multiply_add(simd, (rows, inner, columns), a, b, c, columns);
        }
    }

    #[test]
    fn products_are_the_sums_of_their_definition() {
        for (rows, inner, columns) in [(1, 1, 16), (4, 3, 32), (7, 8, 48), (9, 5, 80)] {
            let value = |i: usize| (i * 7 % 11) as f32 - 5.0; // small whole numbers: every sum is exact
            let a: Vec<f32> = (0..rows * inner).map(value).collect();
            let b: Vec<f32> = (0..inner * columns).map(value).collect();
            let mut c: Vec<f32> = (0..rows * columns).map(value).collect();
            Arch::new().dispatch(Product(rows, inner, columns, &a, &b, &mut c));
            for (index, got) in c.into_iter().enumerate() {
                let (row, column) = (index / columns, index % columns);
                let sum: f32 = (0..inner).map(|i| a[row * inner + i] * b[i * columns + column]).sum();
                assert_eq!(
                    got,
                    value(index) + sum,
                    "element ({row}, {column}) of {rows} x {inner} x {columns}"
                );
            }
        }
    }

    #[test]
    fn transposes_are_those_of_their_definition() {
        for (rows, columns, stride, to_stride) in [(16, 1, 16, 16), (32, 8, 16, 64), (64, 40, 48, 64)] {
            let data: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            let mut to = vec![-1.0; columns * to_stride];
            transpose(Matrix { data: &data, stride }, rows, columns, &mut to, to_stride);
            for (index, got) in to.into_iter().enumerate() {
                let (column, row) = (index / to_stride, index % to_stride);
                let want = if row < rows { data[row * stride + column] } else { -1.0 };
                assert_eq!(got, want, "element ({row}, {column}) of {rows} x {columns}");
            }
        }
    }

    struct Backpropagate<'a, const COLUMNS: bool>(&'a [f32], &'a [f32], &'a mut [f32], &'a mut [f32]);

    impl<const COLUMNS: bool> pulp::WithSimd for Backpropagate<'_, COLUMNS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(lse, delta, scores, dp) = self;
            backpropagate::<S, COLUMNS>(simd, 0.5, (lse, delta), (scores, dp));
        }
    }

    #[test]
    fn scores_become_probabilities_and_their_gradients() {
        let scores: Vec<f32> = (0..32).map(|i| i as f32 / 4.0 - 3.0).collect();
        let dp: Vec<f32> = (0..32).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let lse: Vec<f32> = (0..32).map(|i| 5.0 + i as f32 / 8.0).collect();
        let delta: Vec<f32> = (0..32).map(|i| i as f32 / 3.0).collect();
        let check = |query_of: fn(usize) -> usize, p: &[f32], ds: &[f32]| {
            for i in 0..32 {
                let of = query_of(i);
                let want_p = (0.5 * f64::from(scores[i]) - f64::from(lse[of])).exp();
                let want_ds = want_p * (f64::from(dp[i]) - f64::from(delta[of]));
                assert!((f64::from(p[i]) - want_p).abs() <= 1e-6 * want_p, "p {i}");
                assert!((f64::from(ds[i]) - want_ds).abs() <= 1e-5 * want_p, "ds {i}");
            }
        };
        let (mut p, mut ds) = (scores.clone(), dp.clone());
        Arch::new().dispatch(Backpropagate::<true>(&lse, &delta, &mut p, &mut ds));
        check(|i| i, &p, &ds);
        let (mut p, mut ds) = (scores.clone(), dp.clone());
        Arch::new().dispatch(Backpropagate::<false>(&lse[3..4], &delta[3..4], &mut p, &mut ds));
        check(|_| 3, &p, &ds);
        // A query that saw nothing.
        let (mut p, mut ds) = (scores.clone(), dp.clone());
        Arch::new().dispatch(Backpropagate::<false>(&[f32::INFINITY], &[0.0], &mut p, &mut ds));
        assert!(p.iter().chain(&ds).all(|&x| x == 0.0));
    }
}
