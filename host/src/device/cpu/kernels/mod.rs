//! The inner loops, written once over [`Vector`](super::vector::Vector) and compiled once for each instruction set.
//!
//! Queries are lanes: a panel holds one quantity for `Kernels::panel` queries side by side, so that a softmax is
//! arithmetic between whole registers and a row of keys or values enters a product as scalars, in the order in which
//! memory has it. Every element of a product is one sum in order of its inner index, added to what was there: results
//! depend neither on how rows are grouped nor on which lane a query has.
//!
//! This file has the table of loops. Each family of loops has a file, and so have the instruction sets.

mod backward;
mod convert;
mod dropout;
mod few;
mod isa;
mod parts;
mod product;
mod softmax;
mod strip;
#[cfg(test)]
mod tests;

use flash_attention_kernels::entries::Dtype;

pub(super) use backward::Backpropagate;
pub(super) use dropout::Keep;
pub(super) use few::{Few, Listed, Query, Rows, Strided, TOGETHER, rows_ahead};
pub(super) use isa::{available, kernels};
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
pub(super) use parts::terms;
pub(super) use parts::{Pairing, Terms};
pub(super) use product::{PairProduct, Pairs, Product, ROWS, SIDE};
pub(super) use softmax::{Hide, Merge, Softmax};
pub(super) use strip::{Registers, Strip, Table};

/// Number of lanes of the widest register: tiles that are read in whole registers have rows of a multiple of this.
pub(super) const MAX_LANES: usize = 16;

/// Inner loops of one instruction set. Each is unsafe: the processor must support the instructions, and pointers must
/// point to as many elements as the sizes beside them say.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// Number of f32 in a register.
    pub lanes: usize,
    /// Number of queries of a panel.
    pub panel: usize,
    /// True if a product is rounded once, together with the sum that it is added to.
    pub fused: bool,
    pub product: unsafe fn(&Product),
    /// Products of bf16 pairs, if they are faster than widening to f32; see [`pairs_of`](Self::pairs_of).
    pub pairs: Option<&'static Pairs>,
    /// Packs two rows, whose columns are a multiple of `lanes`, into bf16x2 words. `pair_columns` packs two columns
    /// of a row.
    pub pair_rows: unsafe fn(&Pairing),
    pub pair_columns: unsafe fn(&Pairing),
    /// Determines if all of these numbers may be split into parts.
    pub may_be_split: unsafe fn(*const f32, usize) -> bool,
    pub hide: unsafe fn(&Hide),
    pub softmax: unsafe fn(&Softmax),
    pub few: unsafe fn(&Few<'_>),
    pub merge: unsafe fn(&Merge),
    pub backpropagate: unsafe fn(&Backpropagate),
    /// Number of queries of a strip; it divides the panel.
    pub strip_lanes: usize,
    pub strip: unsafe fn(&Strip<'_>),
    /// Draws for a strip.
    pub keep: unsafe fn(&Keep),
    /// (dtype, elements, how many, widened).
    pub widen: unsafe fn(Dtype, *const u8, usize, *mut f32),
    /// (codes of e4m3, how many, their scale, widened).
    pub widen_codes: unsafe fn(*const u8, usize, f32, *mut f32),
    /// (dtype, elements, how many, rounded).
    pub narrow: unsafe fn(Dtype, *const f32, usize, *mut u8),
    /// (from, stride, rows, to, stride, columns): writes the transpose. Whole registers are read, and written: what
    /// is past the columns of `from`, up to a multiple of [`MAX_LANES`], must exist; so must what is past the rows in
    /// `to`.
    pub transpose: unsafe fn(*const f32, usize, usize, *mut f32, usize, usize),
    /// (x, y, count, in order, sums): of `lanes` columns of two tiles, `lanes` wide, the sums of products of so many
    /// rows, a multiple of 8; either in the order of `product`, or as eight sums that are then added up, which is
    /// more exact.
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
