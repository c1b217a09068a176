//! Register tiles of plain FMA: true f32, no tensor cores, no TF32.
//!
//! A warp owns 8 rows, a lane 4 of them. In `a b^T` a lane multiplies 4 rows of `a` by every 16th row of `b`: 16 FMA for
//! each vector load of `b`. In `a b` the left operand's element sits in one lane of each half warp and is shuffled to the
//! other 15: one shuffle feeds as many FMA as a lane has columns, and no shared memory is spent on it.

use super::register::{Accumulator, OutputTile, RowValues, Rows, ScoreTile};
use super::{
    fragment,
    global::{GlobalTile, Places},
    shared::SharedTile,
};
use crate::element::F32;
use crate::ptx::program::{self, Shown};
use crate::ptx::{math::fma, memory, optimizer, sreg, sync};
use core::ops::Range;

/// Four rows by `N` columns in each lane; 16 lanes share a row and take turns of `RUN` columns.
#[derive(Clone, Copy)]
pub struct LaneRows<const N: usize, const RUN: usize>([[f32; N]; 4]);

impl<const N: usize> ScoreTile for LaneRows<N, 1> {
    type Element = F32;
    type Operand = Self;

    #[inline(always)]
    unsafe fn add_abt(&mut self, a: SharedTile, b: SharedTile) {
        // SAFETY: the caller's contract.
        unsafe { self.add_abt_in(0..N, a, b) }
    }

    #[inline(always)]
    unsafe fn add_abt_in(&mut self, blocks: Range<usize>, a: SharedTile, b: SharedTile) {
        let lane = sreg::lane_id();
        for chunk in 0..optimizer::opaque(a.chunks()) {
            let mut x = [[0.0; 4]; 4];
            for r in 0..4 {
                let (row, _) = fragment::simt(lane, r as u32, 0, 1);
                // SAFETY: the caller's contract.
                x[r] = unsafe { memory::ld_shared_v4(a.address(row, chunk)) };
            }
            for i in blocks.clone() {
                let (_, column) = fragment::simt(lane, 0, (i - blocks.start) as u32, 1);
                // SAFETY: the caller's contract.
                let y = unsafe { memory::ld_shared_v4(b.address(column, chunk)) };
                for r in 0..4 {
                    for e in 0..4 {
                        self.0[r][i] = fma(x[r][e], y[e], self.0[r][i]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn operand(&self) -> Self {
        *self
    }

    #[inline(always)]
    fn announce<S: program::Tile>(row: u32, column: u32) {
        let (r, c) = fragment::simt(sreg::lane_id(), 0, 0, 1);
        program::lanes_tile::<S>(row + r, column + c);
    }

    #[inline(always)]
    fn splice<K: Shown, S: program::Tile>(&mut self) {
        for i in 0..N {
            K::lanes::<S>(self.0.each_mut().map(|row| &mut row[i]), i);
        }
    }
}

impl<const N: usize, const K: usize> OutputTile<LaneRows<K, 1>> for LaneRows<N, 2> {
    #[inline(always)]
    unsafe fn add_ab(&mut self, a: &LaneRows<K, 1>, b: SharedTile) {
        // SAFETY: the caller's contract.
        unsafe { self.add_ab_in(0..K, a, b) }
    }

    #[inline(always)]
    unsafe fn add_ab_in(&mut self, blocks: Range<usize>, a: &LaneRows<K, 1>, b: SharedTile) {
        let lane = sreg::lane_id();
        for k in blocks.clone() {
            for owner in 0..optimizer::opaque(16) {
                let mut x = [0.0; 4];
                for r in 0..4 {
                    x[r] = sync::shuffle(a.0[r][k], (lane & 16) + owner);
                }
                for i in 0..N / 2 {
                    let (_, column) = fragment::simt(lane, 0, i as u32 * 2, 2);
                    let address = b.address((k - blocks.start) as u32 * 16 + owner, column / 4) + column % 4 * 4;
                    // SAFETY: the caller's contract.
                    let y = unsafe { memory::ld_shared_v2(address) };
                    for r in 0..4 {
                        for e in 0..2 {
                            self.0[r][i * 2 + e] = fma(x[r], y[e], self.0[r][i * 2 + e]);
                        }
                    }
                }
            }
        }
    }

    /// Stores directly from the registers: 16 lanes write 128 contiguous bytes of a row.
    #[inline(always)]
    unsafe fn store(&self, _staging: SharedTile, target: &GlobalTile<impl Places>) {
        for r in 0..4 {
            for i in 0..N / 2 {
                let (row, column) = fragment::simt(sreg::lane_id(), r as u32, i as u32 * 2, 2);
                if target.contains(row, column / 4) {
                    let address = target.address(row, column / 4) + (column % 4 * 4) as u64;
                    let pair = [self.0[r][i * 2], self.0[r][i * 2 + 1]];
                    // SAFETY: the caller's contract, and the chunk exists; head_dim is a multiple of 8.
                    unsafe {
                        if target.aligned {
                            memory::st_global_v2(address, pair);
                        } else {
                            memory::st_global_u32(address, pair[0].to_bits());
                            memory::st_global_u32(address + 4, pair[1].to_bits());
                        }
                    }
                }
            }
        }
    }
}

impl<const N: usize, const RUN: usize> Accumulator for LaneRows<N, RUN> {
    type Rows = Rows<1, 4>;
    const ROW_LANES: u32 = 16;

    #[inline(always)]
    fn zero() -> Self {
        Self([[0.0; N]; 4])
    }

    #[inline(always)]
    fn map_rows(&mut self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) {
        for r in 0..4 {
            for i in 0..N {
                self.0[r][i] = f(rows.0[0][r], self.0[r][i]);
            }
        }
    }

    #[inline(always)]
    unsafe fn map_columns(&mut self, columns: u32, f: impl Fn(f32, f32) -> f32) {
        for i in 0..N {
            let (_, column) = fragment::simt(sreg::lane_id(), 0, i as u32, RUN as u32);
            // SAFETY: the caller's contract.
            let value = unsafe { memory::ld_shared(columns + column * 4) };
            for r in 0..4 {
                self.0[r][i] = f(value, self.0[r][i]);
            }
        }
    }

    #[inline(always)]
    fn map_coordinates(&mut self, f: impl Fn(u32, u32, f32) -> f32) {
        let lane = sreg::lane_id();
        for r in 0..4 {
            for i in 0..N {
                let (row, column) = fragment::simt(lane, r as u32, i as u32, RUN as u32);
                self.0[r][i] = f(row, column, self.0[r][i]);
            }
        }
    }

    #[inline(always)]
    fn zip(&mut self, other: &Self, f: impl Fn(f32, f32) -> f32) {
        for r in 0..4 {
            for i in 0..N {
                self.0[r][i] = f(other.0[r][i], self.0[r][i]);
            }
        }
    }

    #[inline(always)]
    fn fold_rows(&self, mut rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows {
        for r in 0..4 {
            for i in 0..N {
                rows.0[0][r] = f(rows.0[0][r], self.0[r][i]);
            }
        }
        rows
    }

    #[inline(always)]
    fn rows_from(f: impl Fn(u32) -> f32) -> Self::Rows {
        let mut rows = Self::Rows::splat(0.0);
        for r in 0..4 {
            rows.0[0][r] = f(fragment::simt(sreg::lane_id(), r as u32, 0, 1).0);
        }
        rows
    }

    #[inline(always)]
    fn for_each_row(values: Self::Rows, f: impl Fn(u32, f32)) {
        for r in 0..4 {
            let (row, column) = fragment::simt(sreg::lane_id(), r as u32, 0, 1);
            if column == 0 {
                f(row, values.0[0][r]);
            }
        }
    }
}
