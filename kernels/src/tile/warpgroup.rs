//! Register tiles of a warpgroup: each warp holds 16 of 64 rows, laid out as accumulators of `mma.sync` are.

use super::fragments::{Fragments, Packed};
use super::panels::Panels;
use super::register::{Accumulator, ScoreTile};
use crate::ptx::{matrix::Half, memory, wgmma, wgmma::WarpgroupMma};
use crate::tile::fragment;
use core::marker::PhantomData;

/// Scores of 64 rows, from two tiles in shared memory.
pub trait WarpgroupScores: ScoreTile {
    /// Issues `a b^T`, over the whole of their rows.
    ///
    /// # Safety
    /// See [`WarpgroupMma::product`].
    unsafe fn product(a: Panels, b: Panels) -> Self;

    /// See [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// The scores as the left operand of a product: rounded here, not after the fence that comes before the product.
    fn pinned_operand(&self) -> Self::Operand;
}

/// Outputs of 64 rows: what products of probabilities with values are summed in.
pub trait WarpgroupOutput<Operand>: Accumulator {
    /// Issues `self += a b`.
    ///
    /// # Safety
    /// See [`WarpgroupMma::product`].
    unsafe fn add_product(&mut self, a: &Operand, b: Panels);

    /// See [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// Writes this lane's part, rounded to the element type, to `target`; `first_row` is the warp's.
    ///
    /// # Safety
    /// `target` is this warpgroup's alone.
    unsafe fn write(&self, target: Panels, first_row: u32, lane: u32);
}

impl<T: Half, const N: usize> WarpgroupScores for Fragments<T, 1, N>
where
    [[f32; 4]; N]: WarpgroupMma<T>,
{
    #[inline(always)]
    unsafe fn product(a: Panels, b: Panels) -> Self {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let mut sum = <[[f32; 4]; N]>::product(a.along_rows(0), b.along_rows(0));
            for k in 1..a.k_steps() {
                sum.add_product(a.along_rows(k), b.along_rows(k));
            }
            Self([sum], PhantomData)
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        self.0[0].pin();
    }

    #[inline(always)]
    fn pinned_operand(&self) -> Packed<1, N> {
        let mut packed = self.operand();
        for n in 0..N {
            wgmma::pin_words(&mut packed.0[0][n]);
        }
        packed
    }
}

impl<T: Half, const N: usize, const K: usize> WarpgroupOutput<Packed<1, K>> for Fragments<T, 1, N>
where
    [[f32; 4]; N]: WarpgroupMma<T>,
{
    #[inline(always)]
    unsafe fn add_product(&mut self, a: &Packed<1, K>, b: Panels) {
        for k in 0..K / 2 {
            // SAFETY: the caller's contract.
            unsafe { self.0[0].add_registers(a.fragment(0, k), b.down_rows(k as u32)) }
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        self.0[0].pin();
    }

    #[inline(always)]
    unsafe fn write(&self, target: Panels, first_row: u32, lane: u32) {
        let packed = self.operand();
        for n in 0..N {
            for half in 0..2 {
                let (row, column) = fragment::accumulator(lane, half as u32 * 2);
                let address = target.pair(first_row + row, n as u32 * 8 + column);
                // SAFETY: the caller's contract.
                unsafe { memory::st_shared_word(address, packed.0[0][n][half]) }
            }
        }
    }
}
