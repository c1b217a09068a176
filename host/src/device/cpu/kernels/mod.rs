//! The inner loops, written once over [`Vector`](super::vector::Vector) and compiled once for each instruction set.
//!
//! Queries are lanes: a panel holds one quantity for `Kernels::panel` queries side by side, so that a softmax is
//! arithmetic between whole registers and a row of keys or values enters a product as scalars, in the order in which
//! memory has it. Every element of a product is one sum in order of its inner index: results depend neither on how
//! rows are grouped nor on which lane a query has.
//!
//! Here is the table of them; each family of loops has a file, and so have the instruction sets they are compiled for.

mod backward;
mod convert;
mod few;
mod isa;
mod product;
mod softmax;
#[cfg(test)]
mod tests;

use flash_attention_kernels::entries::Dtype;

pub(super) use backward::Backpropagate;
pub(super) use few::One;
pub(super) use isa::Isa;
pub(super) use product::{PairProduct, Pairs, Product, ROWS, SIDE};
pub(super) use softmax::{Merge, Softmax};

/// Lanes of the widest register: rows of tiles that are read in whole registers are a multiple of this.
pub(super) const MAX_LANES: usize = 16;

/// The inner loops of one instruction set. Each is unsafe: the processor must have the instructions, and pointers must
/// point to as many elements as the sizes beside them say.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// What people call the instruction set.
    pub name: &'static str,
    /// f32 in a register.
    pub lanes: usize,
    /// Queries of a panel.
    pub panel: usize,
    /// Whether a product is rounded once, together with the sum it is added to.
    pub fused: bool,
    pub product: unsafe fn(&Product),
    /// For bf16, where that is faster than widening to f32.
    pub pairs: Option<&'static Pairs>,
    /// (from, stride, pairs of rows, columns, to, stride): words of two neighbours of a column, as bf16. Columns are a
    /// multiple of `lanes`.
    pub pair_rows: unsafe fn(*const f32, usize, usize, usize, *mut u32, usize),
    pub softmax: unsafe fn(&Softmax),
    pub one: unsafe fn(&One),
    pub merge: unsafe fn(&Merge),
    pub backpropagate: unsafe fn(&Backpropagate),
    /// (dtype, elements, how many, widened).
    pub widen: unsafe fn(Dtype, *const u8, usize, *mut f32),
    /// (dtype, elements, how many, rounded).
    pub narrow: unsafe fn(Dtype, *const f32, usize, *mut u8),
    /// (from, stride, rows, to, stride, columns): writes the transpose. Whole registers are read, and written: what is past
    /// the columns of `from`, up to a multiple of [`MAX_LANES`], must exist; so must what is past the rows in `to`.
    pub transpose: unsafe fn(*const f32, usize, usize, *mut f32, usize, usize),
    /// (x, y, count, in order, sums): of `lanes` columns of two tiles, `lanes` wide, the sums of products of so many rows, a
    /// multiple of 8; either in the order of `product`, or as eight sums that are then added up, which is more exact.
    pub dot: unsafe fn(*const f32, *const f32, usize, bool, *mut f32),
    #[cfg(test)]
    exp2: unsafe fn(*mut f32, usize),
}

impl Kernels {
    /// `x * y + sum`, rounded as in the sums of `product`.
    pub(super) fn multiply_add(&self, x: f32, y: f32, sum: f32) -> f32 {
        if self.fused { x.mul_add(y, sum) } else { x * y + sum }
    }
}
