//! Tiles in registers: what the algorithm asks of them, whichever unit multiplies.
//!
//! [`fragments`](super::fragments) holds them as the tensor cores do, [`lanes`](super::lanes) as plain FMA likes them.
//! Every loop there has a trip count known when compiled and is unrolled: an index that is not a constant would send the
//! array to local memory.

use super::{element::Element, global::GlobalTile, shared::SharedTile};
use crate::mask::Span;
use crate::ptx::{memory, sreg, sync};

/// One f32 for each row a lane holds part of: `A` groups of `B` rows.
#[derive(Clone, Copy)]
pub struct Rows<const A: usize, const B: usize>(pub [[f32; B]; A]);

/// What softmax needs of a lane's rows.
pub trait RowValues: Copy {
    /// The same value for every row.
    fn splat(value: f32) -> Self;
    /// Row by row.
    fn map(self, f: impl Fn(f32) -> f32) -> Self;
    /// Row by row, of two.
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self;
    /// Whether it holds for any row.
    fn any(self, holds: impl Fn(f32) -> bool) -> bool;
}

impl<const A: usize, const B: usize> RowValues for Rows<A, B> {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([[value; B]; A])
    }

    #[inline(always)]
    fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        for a in 0..A {
            for b in 0..B {
                self.0[a][b] = f(self.0[a][b]);
            }
        }
        self
    }

    #[inline(always)]
    fn zip(mut self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        for a in 0..A {
            for b in 0..B {
                self.0[a][b] = f(self.0[a][b], other.0[a][b]);
            }
        }
        self
    }

    #[inline(always)]
    fn any(self, holds: impl Fn(f32) -> bool) -> bool {
        let mut any = false;
        for a in 0..A {
            for b in 0..B {
                any |= holds(self.0[a][b]);
            }
        }
        any
    }
}

/// A matrix of f32 spread over a warp, some columns of some rows in each lane.
pub trait Accumulator: Copy {
    /// One value for each row a lane holds part of.
    type Rows: RowValues;
    /// Neighbouring lanes that share a row.
    const ROW_LANES: u32;

    /// All zeros.
    fn zero() -> Self;

    /// Each element with its row's value: `x = f(row value, x)`.
    fn map_rows(&mut self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32);

    /// Each element with its column's value, an f32 in shared memory: `x = f(column value, x)`.
    ///
    /// # Safety
    /// `columns` is an 8-byte aligned shared-window address of one initialised f32 a column of the tile.
    unsafe fn map_columns(&mut self, columns: u32, f: impl Fn(f32, f32) -> f32);

    /// Each element with its coordinates in the warp's tile: `x = f(row, column, x)`.
    fn map_coordinates(&mut self, f: impl Fn(u32, u32, f32) -> f32);

    /// Hides what a row does not see: each element whose column lies outside its row's span becomes `hidden`. Column 0 of the
    /// tile is position `first`.
    #[inline(always)]
    fn hide(&mut self, first: u32, span: impl Fn(u32) -> Span, hidden: f32) {
        self.hide_pairs(|row, column| span(row).contains(first + column), hidden);
    }

    /// Each element becomes `hidden` where (row, column) is not `visible`.
    #[inline(always)]
    fn hide_pairs(&mut self, visible: impl Fn(u32, u32) -> bool, hidden: f32) {
        self.map_coordinates(|row, column, x| if visible(row, column) { x } else { hidden });
    }

    /// Each element with its counterpart: `x = f(other, x)`.
    fn zip(&mut self, other: &Self, f: impl Fn(f32, f32) -> f32);

    /// Folds this lane's part of each row into `rows`.
    fn fold_rows(&self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;

    /// A value for each row, from its index in the warp's tile.
    fn rows_from(f: impl Fn(u32) -> f32) -> Self::Rows;

    /// A value for each row, from f32s in global memory; zero for rows from `rows` on. Each is read once and passed on to
    /// the lanes that share the row.
    ///
    /// # Safety
    /// `address` is readable and 4-byte aligned, for `rows` values; the whole warp calls this together.
    #[inline(always)]
    unsafe fn load_rows(address: u64, rows: u32) -> Self::Rows {
        let lane = sreg::lane_id();
        let first = lane & !(Self::ROW_LANES - 1);
        Self::rows_from(|row| {
            let mut value = 0.0;
            if lane == first && row < rows {
                // SAFETY: the caller's contract.
                value = f32::from_bits(unsafe { memory::ld_global_u32(address + row as u64 * 4) });
            }
            sync::shuffle(value, first)
        })
    }

    /// Stores a value for each of the first `rows` rows to global memory.
    ///
    /// # Safety
    /// `address` is writable and 4-byte aligned, for `rows` values that no other warp touches.
    #[inline(always)]
    unsafe fn store_rows(values: Self::Rows, address: u64, rows: u32) {
        Self::for_each_row(values, |row, value| {
            if row < rows {
                // SAFETY: the caller's contract.
                unsafe { memory::st_global_u32(address + row as u64 * 4, value.to_bits()) }
            }
        });
    }

    /// Calls `f(row, value)` for each row, in one of the lanes that share it.
    fn for_each_row(values: Self::Rows, f: impl Fn(u32, f32));

    /// Combines the lanes that share a row; afterwards all of them hold the result.
    #[inline(always)]
    fn reduce_rows(rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows {
        let f = &f;
        rows.map(|mut value| {
            let mut distance = 1;
            while distance < Self::ROW_LANES {
                value = f(value, sync::shuffle_xor(value, distance));
                distance *= 2;
            }
            value
        })
    }
}

/// Scores and their like: the product of two tiles that lie in shared memory, itself the left operand of the next.
pub trait ScoreTile: Accumulator {
    /// The element type of the tiles it multiplies.
    type Element: Element;
    /// The tile, rounded to the element type, as the left operand of a product.
    type Operand: Copy;

    /// `self += a b^T`, both stored row by row, over the whole of their rows.
    ///
    /// # Safety
    /// `a` (the warp's rows) and `b` are initialised and visible to the whole warp, which calls this together.
    unsafe fn add_abt(&mut self, a: SharedTile, b: SharedTile);

    /// The tile as the left operand of a product, in the registers it is in.
    fn operand(&self) -> Self::Operand;
}

/// Outputs and gradients: what products with streamed tiles are summed in.
pub trait OutputTile<Operand>: Accumulator {
    /// `self += a b`, `b` stored row by row.
    ///
    /// # Safety
    /// `b` is initialised and visible to the whole warp, which calls this together.
    unsafe fn add_ab(&mut self, a: &Operand, b: SharedTile);

    /// Writes the tile, rounded to the element type, to `target`; rows and columns that do not exist are dropped.
    /// `staging` is room for the warp's rows.
    ///
    /// # Safety
    /// `target` is writable and no other warp touches these rows, nor those of `staging`.
    unsafe fn store(&self, staging: SharedTile, target: &GlobalTile);
}
