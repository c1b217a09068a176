//! BFMMLA of aarch64, which adds the products of two rows and two columns of four bf16 to a matrix of 2 x 2.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use crate::device::cpu::arm::multiply_bf16;
use crate::device::cpu::kernels::{PairProduct, Pairs, terms};

pub(in crate::device::cpu) static NEON_BF16: Pairs = Pairs {
    begin: nothing,
    end: nothing,
    product,
};

unsafe fn nothing() {}

/// Returns true if the processor has BFMMLA.
pub(in crate::device::cpu) fn has_neon_bf16() -> bool {
    is_aarch64_feature_detected!("bf16")
}

/// Number of rows and columns of a block, whose sums take sixteen of 32 registers.
const BLOCK: usize = 8;

/// Number of columns of a register.
const LANES: usize = 4;

/// Number of words of a row that one step of the inner loop takes: two products.
const STEP: usize = 4;

/// Runs [`PairProduct`] with BFMMLA.
#[target_feature(enable = "neon,bf16")]
unsafe fn product(p: &PairProduct) {
    for column in (0..p.columns).step_by(BLOCK) {
        for row in (0..p.rows).step_by(BLOCK) {
            // SAFETY: passed on to the caller.
            unsafe {
                if p.columns - column < BLOCK {
                    block::<1>(p, row, column);
                } else {
                    block::<2>(p, row, column);
                }
            }
        }
    }
}

/// Computes eight rows by `N` registers of columns. A sum is a matrix of two rows by two columns.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn block<const N: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        let (a, b, c) = (
            p.a.add(row * p.a_stride),
            p.b.add(column),
            p.c.add(row * p.c_stride + column),
        );
        let mut sums = [[[vdupq_n_f32(0.0); 2]; N]; BLOCK / 2];
        if p.accumulate {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sums) in sums.iter_mut().enumerate() {
                    let c = c.add(2 * m * p.c_stride + n * LANES);
                    *sums = of_two_rows(vld1q_f32(c), vld1q_f32(c.add(p.c_stride)));
                }
            }
        }
        for &(of_a, of_b) in terms(p.terms as usize) {
            let (a, b) = (a.add(of_a * p.a_part), b.add(of_b * p.b_part));
            for i in (0..p.inner).step_by(STEP) {
                let mut rows = [[vdupq_n_u32(0); 2]; BLOCK / 2];
                for (m, rows) in rows.iter_mut().enumerate() {
                    let a = a.add(2 * m * p.a_stride + i);
                    let (first, second) = (vld1q_u32(a), vld1q_u32(a.add(p.a_stride)));
                    let [first, second] = of_two_rows(vreinterpretq_f32_u32(first), vreinterpretq_f32_u32(second));
                    *rows = [vreinterpretq_u32_f32(first), vreinterpretq_u32_f32(second)];
                }
                for half in 0..2 {
                    let b = b.add((i + 2 * half) * p.b_stride);
                    for n in 0..N {
                        let b = b.add(n * LANES);
                        let (first, second) = (vld1q_u32(b), vld1q_u32(b.add(p.b_stride)));
                        let columns = [vzip1q_u32(first, second), vzip2q_u32(first, second)];
                        for (sums, rows) in sums.iter_mut().zip(&rows) {
                            for (sum, columns) in sums[n].iter_mut().zip(columns) {
                                *sum = multiply_bf16(*sum, rows[half], columns);
                            }
                        }
                    }
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sums) in sums.iter().enumerate() {
                let c = c.add(2 * m * p.c_stride + n * LANES);
                let [first, second] = of_two_rows(sums[0], sums[1]);
                vst1q_f32(c, first);
                vst1q_f32(c.add(p.c_stride), second);
            }
        }
    }
}

/// Interleaves the first halves and the second halves of two registers: turns two rows into two 2 x 2 matrices, and
/// back.
#[inline(always)]
#[allow(
    unused_unsafe,
    reason = "these functions are unsafe to the oldest compilers that build this crate"
)]
fn of_two_rows(first: float32x4_t, second: float32x4_t) -> [float32x4_t; 2] {
    // SAFETY: every aarch64 processor has NEON.
    unsafe {
        let (first, second) = (vreinterpretq_f64_f32(first), vreinterpretq_f64_f32(second));
        [vzip1q_f64(first, second), vzip2q_f64(first, second)].map(|x| vreinterpretq_f32_f64(x))
    }
}
