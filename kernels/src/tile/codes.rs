//! Register tiles of a warpgroup that multiplies e4m3 codes.
//!
//! A tile of codes in shared memory is one of [`Panels`] whose columns are pairs of codes.
//!
//! The left operand of a product takes four neighbouring codes of a row from each lane, where accumulators have two. So that no lane
//! needs codes of another, keys are permuted: place `4 t + i` of each 16 is key `2 t + i % 2 + i / 2 * 8`. The transposed
//! values have the same order.

use super::fragments::Fragments;
use super::panels::Panels;
use super::register::{Accumulator, Part, RowValues, Rows};
use crate::abi::FP8_SCALE_ROWS;
use crate::ptx::{codes, matrix::Half, wgmma, wgmma::CodeMma};
use core::marker::PhantomData;

/// Fragments of 8 columns in a block of keys that share a scale.
const BLOCK: usize = FP8_SCALE_ROWS as usize / 8;

/// Scores of 64 rows, from two tiles of codes in shared memory.
pub trait CodeScores: Accumulator {
    /// The tile, rounded to codes, as the left operand of a product.
    type Codes: Copy;

    /// Issues `a b^T`, over the whole length of their rows.
    ///
    /// # Safety
    /// The contract of [`CodeMma::product`].
    unsafe fn product_of_codes(a: Panels, b: Panels) -> Self;

    /// The largest of this lane's part of each row in a block of keys.
    fn max_of_block(&self, block: usize) -> Self::Rows;

    /// The sum of this lane's part of each row in a block of keys.
    fn sum_of_block(&self, block: usize) -> Self::Rows;

    /// Each element of a block that belongs to `part`, with two values of its row: `x = f(factor, addend, x)`.
    fn map_block(&mut self, block: usize, part: Part, rows: [Self::Rows; 2], f: impl Fn(f32, f32, f32) -> f32);

    /// Converts the elements to codes, which are rounded here, not after the fence before the product.
    fn pinned_codes(&self) -> Self::Codes;
}

/// Outputs of 64 rows: accumulators of products of codes in registers with transposed values.
pub trait CodeOutput<Codes>: Accumulator {
    /// Issues `self += a b^T`.
    ///
    /// # Safety
    /// The contract of [`CodeMma::product`].
    unsafe fn add_codes(&mut self, a: &Codes, b: Panels);
}

/// 64 rows of `8 N` codes: a word for each two fragments and each of a lane's two rows.
#[derive(Clone, Copy)]
pub struct Codes<const N: usize>([u32; N]);

impl<T: Half, const N: usize> CodeScores for Fragments<T, 1, N>
where
    [[f32; 4]; N]: CodeMma,
{
    type Codes = Codes<N>;

    #[inline(always)]
    unsafe fn product_of_codes(a: Panels, b: Panels) -> Self {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let mut sum = <[[f32; 4]; N]>::product(a.along_rows(0), b.along_rows(0));
            for k in 1..a.k_steps() {
                sum.add_product(a.along_rows(k), b.along_rows(k));
            }
            Self([sum], PhantomData)
        }
    }

    /// In two chains a row, of even and odd columns.
    #[inline(always)]
    fn max_of_block(&self, block: usize) -> Rows<1, 2> {
        let nothing = Rows::splat(f32::NEG_INFINITY);
        let (mut even, mut odd) = (nothing, nothing);
        for n in block * BLOCK..(block + 1) * BLOCK {
            for half in 0..2 {
                let [x, y] = [0, 1].map(|e| self.0[0][n][half * 2 + e]);
                even.0[0][half] = even.0[0][half].max(x);
                odd.0[0][half] = odd.0[0][half].max(y);
            }
        }
        even.zip(odd, f32::max)
    }

    #[inline(always)]
    fn sum_of_block(&self, block: usize) -> Rows<1, 2> {
        let mut sum = Rows::splat(0.0);
        for n in block * BLOCK..(block + 1) * BLOCK {
            for e in 0..4 {
                let first = n == block * BLOCK && e % 2 == 0;
                let x = self.0[0][n][e];
                sum.0[0][e / 2] = if first { x } else { sum.0[0][e / 2] + x };
            }
        }
        sum
    }

    #[inline(always)]
    fn map_block(
        &mut self,
        block: usize,
        part: Part,
        [factor, addend]: [Rows<1, 2>; 2],
        f: impl Fn(f32, f32, f32) -> f32,
    ) {
        for n in block * BLOCK..(block + 1) * BLOCK {
            if part.contains(n, N) {
                for e in 0..4 {
                    self.0[0][n][e] = f(factor.0[0][e / 2], addend.0[0][e / 2], self.0[0][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    fn pinned_codes(&self) -> Codes<N> {
        let mut words = [0; N];
        for pair in 0..N / 2 {
            for half in 0..2 {
                let [left, right] = [0, 1].map(|n| self.0[0][pair * 2 + n]);
                let (x, y) = (half * 2, half * 2 + 1);
                words[pair * 2 + half] = codes::pack([left[x], left[y], right[x], right[y]]);
            }
        }
        let (pairs, _) = words.as_chunks_mut::<2>();
        for pair in 0..N / 2 {
            wgmma::pin_words(&mut pairs[pair]);
        }
        Codes(words)
    }
}

impl<T: Half, const N: usize, const K: usize> CodeOutput<Codes<K>> for Fragments<T, 1, N>
where
    [[f32; 4]; N]: CodeMma,
{
    #[inline(always)]
    unsafe fn add_codes(&mut self, a: &Codes<K>, b: Panels) {
        for k in 0..K / 4 {
            let words = [0, 1, 2, 3].map(|i| a.0[k * 4 + i]);
            // SAFETY: the caller's contract.
            unsafe { self.0[0].add_registers(words, b.along_rows(k as u32)) }
        }
    }
}
