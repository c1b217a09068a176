//! What tasks share: the rows of a head, where they lie.

use flash_attention_kernels::abi::StridedTensor;

use super::pointer_mut;
use crate::Element;

/// The rows of one head of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<T> {
    first: *const T,
    stride: usize,
    pub head_dim: usize,
}

impl<T> Rows<T> {
    /// # Safety
    /// `tensor` lies where it says, in memory of the CPU, and stays there unwritten while rows are in use.
    pub(super) unsafe fn new(tensor: StridedTensor, batch: usize, head: usize, head_dim: usize) -> Self {
        let offset = batch * tensor.batch_stride as usize + head * tensor.head_stride as usize;
        // SAFETY: the element is one of the tensor's.
        let first = unsafe { pointer_mut::<T>(tensor.address).add(offset) };
        Self {
            first,
            stride: tensor.row_stride as usize,
            head_dim,
        }
    }

    /// Row `row`, which must exist.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &[T] {
        // SAFETY: by the contract of `new`; the last axis is contiguous, which the problem proved.
        unsafe { std::slice::from_raw_parts(self.first.add(row * self.stride), self.head_dim) }
    }
}

impl<T: Element> Rows<T> {
    /// Copies `count` rows to a tile, whose rows are `width` apart. Says whether all of them are finite.
    #[inline(always)]
    pub(super) fn load(&self, first: usize, count: usize, tile: &mut [f32], width: usize) -> bool {
        let mut finite = true;
        for row in 0..count {
            let target = &mut tile[row * width..][..self.head_dim];
            T::widen(self.row(first + row), target);
            finite &= target.iter().fold(true, |all, x| all & x.is_finite());
        }
        finite
    }
}

/// The rows of one head of a tensor, to be written.
pub(super) struct RowsMut<T>(pub Rows<T>);

impl<T> RowsMut<T> {
    /// Row `row`, which must exist and be this task's.
    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> &mut [T] {
        // SAFETY: as for `Rows::row`, made from a mutable pointer; rows do not overlap and this task alone has this one.
        unsafe { std::slice::from_raw_parts_mut(self.0.first.cast_mut().add(row * self.0.stride), self.0.head_dim) }
    }
}
