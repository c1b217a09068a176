//! Tiles in registers: the operations of the algorithm, for any arithmetic unit.
//!
//! [`fragments`](super::fragments) implements them for the tensor cores, [`lanes`](super::lanes) for plain FMA. Every
//! loop has a constant trip count and is unrolled: an index that is not a constant would move the array to local
//! memory.

use super::{
    element::Element,
    global::{GlobalTile, Places},
    shared::SharedTile,
};
use crate::mask::Span;
use crate::ptx::program::{self, Shown};
use crate::ptx::{memory, sreg, sync};
use core::ops::Range;

/// One f32 for each row that a lane holds part of: `A` groups of `B` rows.
#[derive(Clone, Copy)]
pub struct Rows<const A: usize, const B: usize>(pub [[f32; B]; A]);

/// Operations of softmax on a lane's rows.
pub trait RowValues: Copy {
    /// Makes rows with one value in all of them.
    fn splat(value: f32) -> Self;
    /// Applies `f` to each row.
    fn map(self, f: impl Fn(f32) -> f32) -> Self;
    /// Applies `f` to each row of two.
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self;
    /// Returns true if `holds` returns true for any row.
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

/// A run of a tile's columns, from one eighth of them to another.
#[derive(Clone, Copy)]
pub struct Part(usize, usize);

impl Part {
    /// All columns.
    pub const WHOLE: Self = Self(0, 8);

    /// The columns from one eighth of them on, to before another.
    #[inline(always)]
    pub const fn eighths(begin: usize, end: usize) -> Self {
        Self(begin, end)
    }

    /// The columns before an eighth, and those from it on.
    #[inline(always)]
    pub const fn split(eighth: usize) -> [Self; 2] {
        [Self::eighths(0, eighth), Self::eighths(eighth, 8)]
    }

    /// Tells if item `index` of `count`, side by side along the columns, belongs to the part.
    #[inline(always)]
    pub const fn contains(self, index: usize, count: usize) -> bool {
        index >= count * self.0 / 8 && index < count * self.1 / 8
    }
}

/// A matrix of f32 spread over a warp, some columns of some rows in each lane.
pub trait Accumulator: Copy {
    /// One value for each row that a lane holds part of.
    type Rows: RowValues;
    /// Number of neighbouring lanes that share a row.
    const ROW_LANES: u32;

    /// Makes a tile of zeros.
    fn zero() -> Self;

    /// Each element with its row's value: `x = f(row value, x)`.
    fn map_rows(&mut self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32);

    /// Each element with its column's value, an f32 in shared memory: `x = f(column value, x)`.
    ///
    /// # Safety
    /// `columns` is an 8-byte aligned shared-window address of one initialised f32 a column of the tile.
    unsafe fn map_columns(&mut self, columns: u32, f: impl Fn(f32, f32) -> f32);

    /// Combines each element with its coordinates in the warp's tile: `x = f(row, column, x)`.
    fn map_coordinates(&mut self, f: impl Fn(u32, u32, f32) -> f32);

    /// Replaces each element whose column lies outside of its row's span by `hidden`. Column 0 of the tile is
    /// position `first`.
    #[inline(always)]
    fn hide(&mut self, first: u32, span: impl Fn(u32) -> Span, hidden: f32) {
        self.hide_pairs(|row, column| span(row).contains(first + column), hidden);
    }

    /// Replaces each element by `hidden` where (row, column) is not `visible`.
    #[inline(always)]
    fn hide_pairs(&mut self, visible: impl Fn(u32, u32) -> bool, hidden: f32) {
        self.map_coordinates(|row, column, x| if visible(row, column) { x } else { hidden });
    }

    /// Combines each element with that of another tile: `x = f(other, x)`.
    fn zip(&mut self, other: &Self, f: impl Fn(f32, f32) -> f32);

    /// Folds this lane's part of each row into `rows`.
    fn fold_rows(&self, rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows;

    /// The largest of `rows` and this lane's part of each.
    #[inline(always)]
    fn max_rows(&self, rows: Self::Rows) -> Self::Rows {
        self.fold_rows(rows, f32::max)
    }

    /// A value for each row, from its index in the warp's tile.
    fn rows_from(f: impl Fn(u32) -> f32) -> Self::Rows;

    /// Loads a value for each row from f32s in global memory; it is 0 for rows from `rows` on. Each is read once and
    /// passed to the lanes that share the row.
    ///
    /// # Safety
    /// `address` is readable and 4-byte aligned for `rows` values; the whole warp calls this together.
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
    /// `address` is writable and 4-byte aligned for `rows` values that no other warp accesses.
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

    /// Combines the values of the lanes that share a row; afterwards all of them hold the result.
    #[inline(always)]
    fn reduce_rows(rows: Self::Rows, f: impl Fn(f32, f32) -> f32) -> Self::Rows {
        rows.map(|value| Self::reduce_row(value, &f))
    }

    /// Folds the parts of one row; every one of its lanes gets the result. The whole warp calls it together.
    #[inline(always)]
    fn reduce_row(mut value: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut distance = 1;
        while distance < Self::ROW_LANES {
            value = f(value, sync::shuffle_xor(value, distance));
            distance *= 2;
        }
        value
    }
}

/// Scores and similar tiles: the product of two tiles in shared memory, and the left operand of the next product.
pub trait ScoreTile: Accumulator {
    /// Element type of the tiles that it multiplies.
    type Element: Element;
    /// The tile, rounded to the element type, as the left operand of a product.
    type Operand: Copy;

    /// Computes `self += a b^T`, both stored row by row, over the whole length of their rows.
    ///
    /// # Safety
    /// `a` (the warp's rows) and `b` are initialised and visible to the whole warp, which calls this together.
    unsafe fn add_abt(&mut self, a: SharedTile, b: SharedTile);

    /// Computes `self += a b^T` in some blocks of 16 columns, of which `b` has the rows.
    ///
    /// # Safety
    /// The contract of [`add_abt`](Self::add_abt).
    unsafe fn add_abt_in(&mut self, blocks: Range<usize>, a: SharedTile, b: SharedTile);

    /// The tile as the left operand of a product, in the registers it is in.
    fn operand(&self) -> Self::Operand;

    /// Marks that the scores of a tile come whose first row and column are these, for a score program.
    fn announce<T: program::Tile>(row: u32, column: u32);

    /// Marks the scores, in the registers they are in.
    fn splice<K: Shown, T: program::Tile>(&mut self);
}

/// Outputs and gradients: accumulators of products with streamed tiles.
pub trait OutputTile<Operand>: Accumulator {
    /// Computes `self += a b`, with `b` stored row by row.
    ///
    /// # Safety
    /// `b` is initialised and visible to the whole warp, which calls this together.
    unsafe fn add_ab(&mut self, a: &Operand, b: SharedTile);

    /// Computes `self += a b` along some blocks of 16 columns of `a`, of which `b` has the rows.
    ///
    /// # Safety
    /// The contract of [`add_ab`](Self::add_ab).
    unsafe fn add_ab_in(&mut self, blocks: Range<usize>, a: &Operand, b: SharedTile);

    /// Writes the tile, rounded to the element type, to `target`; rows and columns that do not exist are dropped.
    /// `staging` has room for the warp's rows.
    ///
    /// # Safety
    /// `target` is writable, and no other warp accesses these rows or those of `staging`.
    unsafe fn store(&self, staging: SharedTile, target: &GlobalTile<impl Places>);
}
