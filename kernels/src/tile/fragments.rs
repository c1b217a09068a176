//! Register tiles of the tensor cores: m16n8 accumulators of `mma.sync`.

use super::register::{Accumulator, OutputTile, RowValues, Rows, ScoreTile};
use super::{
    fragment,
    global::{GlobalTile, Places},
    shared::SharedTile,
};
use crate::mask::Span;
use crate::ptx::program::{self, Shown};
use crate::ptx::{matrix::Half, memory, optimizer, sreg, sync};
use core::marker::PhantomData;
use core::ops::Range;

/// `M` x `N` accumulators of m16n8: `16 M` rows, `8 N` columns; operands are `T`.
#[derive(Clone, Copy)]
pub struct Fragments<T, const M: usize, const N: usize>(pub(super) [[[f32; 4]; N]; M], pub(super) PhantomData<T>);

/// `16 M` x `8 N` elements of 16 bits. The accumulators of two neighbouring m16n8 have the layout of one A operand.
#[derive(Clone, Copy)]
pub struct Packed<const M: usize, const N: usize>(pub(super) [[[u32; 2]; N]; M]);

impl<const M: usize, const N: usize> Packed<M, N> {
    /// Returns the A operand of rows `16 m`, k block `k`.
    #[inline(always)]
    pub(super) fn fragment(&self, m: usize, k: usize) -> [u32; 4] {
        let (left, right) = (self.0[m][k * 2], self.0[m][k * 2 + 1]);
        [left[0], left[1], right[0], right[1]]
    }

    /// Loads an operand from the top of a tile in shared memory, from k block `first` of its rows on.
    ///
    /// # Safety
    /// The tile is initialised and visible to the whole warp, which calls this together.
    #[inline(always)]
    pub unsafe fn load(tile: SharedTile, first: u32) -> Self {
        let mut packed = [[[0; 2]; N]; M];
        for m in 0..M {
            for k in 0..N / 2 {
                // SAFETY: the caller's contract.
                let [a, b, c, d] = unsafe { tile.operand_a(m as u32 * 16, first + k as u32) };
                (packed[m][k * 2], packed[m][k * 2 + 1]) = ([a, b], [c, d]);
            }
        }
        Self(packed)
    }

    /// Multiplies each element by a factor, rounded to nearest even.
    #[inline(always)]
    pub fn scale<T: Half>(&mut self, factor: f32) {
        let factor = T::pack(factor, factor);
        for m in 0..M {
            for n in 0..N {
                self.0[m][n] = self.0[m][n].map(|pair| T::scale(pair, factor));
            }
        }
    }
}

impl<T: Half, const M: usize, const N: usize> Fragments<T, M, N> {
    /// Computes `self += a b^T` along a part of the rows of b: as many k blocks as a has, from block `first` on.
    ///
    /// # Safety
    /// `b` is initialised and visible to the whole warp, which calls this together.
    #[inline(always)]
    pub unsafe fn add_part_of_abt<const K: usize>(&mut self, a: &Packed<M, K>, b: SharedTile, first: u32) {
        for k in 0..K / 2 {
            for n in 0..N / 2 {
                // SAFETY: the caller's contract.
                let columns = unsafe { b.operand_b_transposed(n as u32 * 16, first + k as u32) };
                for m in 0..M {
                    T::mma(&mut self.0[m][n * 2], a.fragment(m, k), columns[0]);
                    T::mma(&mut self.0[m][n * 2 + 1], a.fragment(m, k), columns[1]);
                }
            }
        }
    }

    /// Calls `f(row, column, elements)` for each two neighbouring elements of a row.
    #[inline(always)]
    pub fn for_each_pair(&self, f: impl Fn(u32, u32, [f32; 2])) {
        for m in 0..M {
            for n in 0..N {
                for half in 0..2 {
                    let (row, column) = fragment::accumulator(sreg::lane_id(), half as u32 * 2);
                    let [x, y] = [0, 1].map(|e| self.0[m][n][half * 2 + e]);
                    f(m as u32 * 16 + row, n as u32 * 8 + column, [x, y]);
                }
            }
        }
    }
}

impl<T: Half, const M: usize, const N: usize> ScoreTile for Fragments<T, M, N> {
    type Element = T;
    type Operand = Packed<M, N>;

    #[inline(always)]
    unsafe fn add_abt(&mut self, a: SharedTile, b: SharedTile) {
        // SAFETY: the caller's contract.
        unsafe { self.add_abt_in(0..N / 2, a, b) }
    }

    #[inline(always)]
    unsafe fn add_abt_in(&mut self, blocks: Range<usize>, a: SharedTile, b: SharedTile) {
        for k in 0..a.k_blocks() {
            let mut rows = [[0; 4]; M];
            for m in 0..M {
                // SAFETY: the caller's contract.
                rows[m] = unsafe { a.operand_a(m as u32 * 16, k) };
            }
            for n in blocks.clone() {
                // SAFETY: the caller's contract.
                let columns = unsafe { b.operand_b_transposed((n - blocks.start) as u32 * 16, k) };
                for m in 0..M {
                    T::mma(&mut self.0[m][n * 2], rows[m], columns[0]);
                    T::mma(&mut self.0[m][n * 2 + 1], rows[m], columns[1]);
                }
            }
        }
    }

    #[inline(always)]
    fn operand(&self) -> Packed<M, N> {
        let mut packed = [[[0; 2]; N]; M];
        for m in 0..M {
            for n in 0..N {
                let x = self.0[m][n];
                packed[m][n] = [T::pack(x[0], x[1]), T::pack(x[2], x[3])];
            }
        }
        Packed(packed)
    }

    #[inline(always)]
    fn announce<S: program::Tile>(row: u32, column: u32) {
        let (r, c) = fragment::accumulator(sreg::lane_id(), 0);
        for m in 0..M {
            program::fragment_tile::<S>(row + r, column + c, m);
        }
    }

    #[inline(always)]
    fn splice<K: Shown, S: program::Tile>(&mut self) {
        for m in 0..M {
            for n in 0..N / 2 {
                let [left, right] = &mut self.0[m].as_chunks_mut::<2>().0[n];
                K::fragment::<S>(left, right, m, n);
            }
        }
    }
}

impl<T: Half, const M: usize, const N: usize, const K: usize> OutputTile<Packed<M, K>> for Fragments<T, M, N> {
    #[inline(always)]
    unsafe fn add_ab(&mut self, a: &Packed<M, K>, b: SharedTile) {
        // SAFETY: the caller's contract.
        unsafe { self.add_ab_in(0..K / 2, a, b) }
    }

    #[inline(always)]
    unsafe fn add_ab_in(&mut self, blocks: Range<usize>, a: &Packed<M, K>, b: SharedTile) {
        for k in blocks.clone() {
            for n in 0..N / 2 {
                // SAFETY: the caller's contract.
                let columns = unsafe { b.operand_b((k - blocks.start) as u32, n as u32) };
                for m in 0..M {
                    T::mma(&mut self.0[m][n * 2], a.fragment(m, k), columns[0]);
                    T::mma(&mut self.0[m][n * 2 + 1], a.fragment(m, k), columns[1]);
                }
            }
        }
    }

    /// Stores through shared memory, so that global memory is written in whole 16-byte chunks and rows of 64 or 128
    /// bytes.
    #[inline(always)]
    unsafe fn store(&self, staging: SharedTile, target: &GlobalTile<impl Places>) {
        let packed = self.operand();
        for m in 0..M {
            for n in 0..N {
                for half in 0..2 {
                    let (row, column) = fragment::accumulator(sreg::lane_id(), half as u32 * 2);
                    let address = staging.address(m as u32 * 16 + row, n as u32) + column * 2;
                    // SAFETY: the caller's contract; chunk n holds the 8 columns of fragment n.
                    unsafe { memory::st_shared_word(address, packed.0[m][n][half]) }
                }
            }
        }
        sync::sync_warp();
        // SAFETY: the caller's contract; the warp wrote the whole chunk.
        unsafe { staging.store(target, M as u32 * 16) }
    }
}

impl<T, const M: usize, const N: usize> Fragments<T, M, N> {
    /// The largest of `value` and this lane's part of one of the first two rows. It is found in two chains, of even and odd columns, which
    /// fill the time that a comparison takes. Tiles of more than 160 columns have no register to spare.
    #[inline(always)]
    pub fn max_row(&self, half: usize, value: f32) -> f32 {
        let [x, y] = [half * 2, half * 2 + 1];
        let tiles = &self.0[0];
        if N > 20 {
            return tiles.iter().fold(value, |max, tile| max.max(tile[x]).max(tile[y]));
        }
        let (mut even, mut odd) = (value, tiles[0][y]);
        for n in 0..N {
            even = even.max(tiles[n][x]);
            odd = odd.max(tiles[n][y]);
        }
        even.max(odd)
    }
}

impl<T: Half, const M: usize, const N: usize> Accumulator for Fragments<T, M, N> {
    type Rows = Rows<M, 2>;
    const ROW_LANES: u32 = 4;

    #[inline(always)]
    fn zero() -> Self {
        Self([[[0.0; 4]; N]; M], PhantomData)
    }

    #[inline(always)]
    fn map_rows(&mut self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) {
        for m in 0..M {
            for n in 0..N {
                for e in 0..4 {
                    self.0[m][n][e] = f(rows.0[m][e / 2], self.0[m][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn map_columns(&mut self, columns: u32, f: impl Fn(f32, f32) -> f32) {
        let (_, first) = fragment::accumulator(sreg::lane_id(), 0);
        for n in 0..N {
            // SAFETY: the caller's contract; columns are in pairs.
            let values = unsafe { memory::ld_shared_v2(columns + (n as u32 * 8 + first) * 4) };
            for m in 0..M {
                for e in 0..4 {
                    self.0[m][n][e] = f(values[e % 2], self.0[m][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    fn map_coordinates(&mut self, f: impl Fn(u32, u32, f32) -> f32) {
        let lane = sreg::lane_id();
        for m in 0..M {
            for n in 0..N {
                for e in 0..4 {
                    let (row, column) = fragment::accumulator(lane, e as u32);
                    self.0[m][n][e] = f(m as u32 * 16 + row, n as u32 * 8 + column, self.0[m][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    fn zip(&mut self, other: &Self, f: impl Fn(f32, f32) -> f32) {
        for m in 0..M {
            for n in 0..N {
                for e in 0..4 {
                    self.0[m][n][e] = f(other.0[m][n][e], self.0[m][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    fn fold_rows(&self, mut rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows {
        for m in 0..M {
            for n in 0..N {
                for e in 0..4 {
                    rows.0[m][e / 2] = f(rows.0[m][e / 2], self.0[m][n][e]);
                }
            }
        }
        rows
    }

    /// Row by row where there are two, since with more the rows themselves fill the time that a comparison takes.
    #[inline(always)]
    fn max_rows(&self, mut rows: Self::Rows) -> Self::Rows {
        if M > 1 {
            return self.fold_rows(rows, f32::max);
        }
        for half in 0..2 {
            rows.0[0][half] = self.max_row(half, rows.0[0][half]);
        }
        rows
    }

    /// One bound a row, less the lane's first column, and comparisons with constants: left to itself, the compiler tests each end of a
    /// span in two parts.
    #[inline(always)]
    fn hide(&mut self, first: u32, span: impl Fn(u32) -> Span, hidden: f32) {
        for m in 0..M {
            for half in 0..2 {
                let (row, lane_column) = fragment::accumulator(sreg::lane_id(), half as u32 * 2);
                let Span { begin, end } = span(m as u32 * 16 + row);
                let bound = |position: u32| optimizer::opaque(position.wrapping_sub(first + lane_column)) as i32;
                let begin = if begin == 0 { i32::MIN } else { bound(begin) };
                let end = if end == Span::OPEN { i32::MAX } else { bound(end) };
                for n in 0..N {
                    for e in 0..2 {
                        let column = n as i32 * 8 + e as i32;
                        if column < begin || column >= end {
                            self.0[m][n][half * 2 + e] = hidden;
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn rows_from(f: impl Fn(u32) -> f32) -> Self::Rows {
        let mut rows = Self::Rows::splat(0.0);
        for m in 0..M {
            for half in 0..2 {
                rows.0[m][half] = f(m as u32 * 16 + fragment::accumulator(sreg::lane_id(), half as u32 * 2).0);
            }
        }
        rows
    }

    #[inline(always)]
    fn for_each_row(values: Self::Rows, f: impl Fn(u32, f32)) {
        for m in 0..M {
            for half in 0..2 {
                let (row, column) = fragment::accumulator(sreg::lane_id(), half as u32 * 2);
                if column == 0 {
                    f(m as u32 * 16 + row, values.0[m][half]);
                }
            }
        }
    }
}
