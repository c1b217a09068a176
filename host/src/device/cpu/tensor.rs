//! Rows of one head of a tensor in memory, of any dtype. `keys.rs` has those that may lie in pages.

mod keys;

use std::ops::Range;

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;
pub(super) use keys::KeyRows;

use super::kernels::{Kernels, MAX_LANES};
use super::pointer_mut;
use super::team::Lines;
use super::vector::prefetch_l2;
use crate::problem::{FP8_SCALE_ROWS, ScaleBlocks};

/// Elements of the rows of a head.
#[derive(Clone, Copy)]
enum Elements {
    /// Numbers.
    Floats(Dtype),
    /// Codes of e4m3 with scales. They are only read.
    Codes(Scales),
}

/// The scales of a head, one for each so many rows.
#[derive(Clone, Copy)]
struct Scales {
    first: *const f32,
    rows: usize,
}

/// The rows of one head.
#[derive(Clone, Copy)]
pub(super) struct Head {
    first: *mut u8,
    stride_bytes: usize,
    elements: Elements,
    pub head_dim: usize,
}

impl Head {
    /// # Safety
    /// `tensor` describes memory of the CPU with elements of `dtype`, which stays allocated while the head is in use.
    /// No other thread writes what is read, or accesses what is written, meanwhile.
    pub(super) unsafe fn new(tensor: StridedTensor, dtype: Dtype, batch: usize, head: usize, head_dim: usize) -> Self {
        let offset = batch * tensor.batch_stride as usize + head * tensor.head_stride as usize;
        Self {
            // SAFETY: the element is one of the tensor's.
            first: unsafe { pointer_mut::<u8>(tensor.address).add(offset * dtype.bytes()) },
            stride_bytes: tensor.row_stride as usize * dtype.bytes(),
            elements: Elements::Floats(dtype),
            head_dim,
        }
    }

    /// The rows of a head of a quantised tensor with so many heads.
    ///
    /// # Safety
    /// The contract of [`new`](Self::new), for codes of e4m3 and for their scales.
    pub(super) unsafe fn of_codes(
        tensor: StridedTensor,
        scales: ScaleBlocks,
        [batch, head, heads]: [usize; 3],
        head_dim: usize,
    ) -> Self {
        let offset = batch * tensor.batch_stride as usize + head * tensor.head_stride as usize;
        let scale = (batch * heads + head) * scales.blocks as usize;
        Self {
            // SAFETY: the element is one of the tensor's.
            first: unsafe { pointer_mut::<u8>(tensor.address).add(offset) },
            stride_bytes: tensor.row_stride as usize,
            elements: Elements::Codes(Scales {
                // SAFETY: the head has scales.
                first: unsafe { pointer_mut::<f32>(scales.address).add(scale) },
                rows: match scales.blocks {
                    1 => usize::MAX,
                    _ => FP8_SCALE_ROWS as usize,
                },
            }),
            head_dim,
        }
    }

    /// Returns the bytes of a row.
    fn row_bytes(&self) -> usize {
        self.head_dim
            * match self.elements {
                Elements::Floats(dtype) => dtype.bytes(),
                Elements::Codes(_) => 1,
            }
    }

    /// Returns the type of numbers.
    fn dtype(&self) -> Dtype {
        match self.elements {
            Elements::Floats(dtype) => dtype,
            Elements::Codes(_) => unreachable!("codes are only read, and widened then"),
        }
    }

    /// Returns the rows of another head of this tensor, which exists and lies `bytes` bytes later.
    pub(super) fn later(&self, bytes: usize) -> Self {
        debug_assert!(matches!(self.elements, Elements::Floats(_)), "scales lie elsewhere");
        Self {
            first: self.first.wrapping_add(bytes),
            ..*self
        }
    }

    /// Widens row `row`, which exists, to the head_dim elements of `to`.
    pub(super) fn load(&self, kernels: &Kernels, row: usize, to: &mut [f32]) {
        assert!(to.len() >= self.head_dim);
        // SAFETY: the problem proved that the last axis is contiguous.
        unsafe { self.widen_run(kernels, row, 1, to.as_mut_ptr()) }
    }

    /// Widens `count` rows, between which there are no gaps.
    ///
    /// # Safety
    /// The contract of [`new`](Self::new). The rows exist, and `to` has room for them.
    unsafe fn widen_run(&self, kernels: &Kernels, first: usize, count: usize, to: *mut f32) {
        let head_dim = self.head_dim;
        // SAFETY: passed on to the caller; each row has a scale.
        unsafe {
            match self.elements {
                Elements::Floats(dtype) => (kernels.widen)(dtype, self.row(first).0, count * head_dim, to),
                Elements::Codes(scales) => {
                    let mut done = 0;
                    while done < count {
                        let (block, place) = ((first + done) / scales.rows, (first + done) % scales.rows);
                        let rows = (count - done).min(scales.rows - place);
                        let (from, to) = (self.row(first + done).0, to.add(done * head_dim));
                        (kernels.widen_codes)(from, rows * head_dim, *scales.first.add(block), to);
                        done += rows;
                    }
                }
            }
        }
    }

    /// Returns the address of row `row`, which exists or is one past the last, and the bytes from one row to the
    /// next.
    pub(super) fn row(&self, row: usize) -> (*const u8, usize) {
        // SAFETY: the contract of `new`.
        (unsafe { self.first.add(row * self.stride_bytes) }, self.stride_bytes)
    }

    /// Returns the rows from `first` on in place, if they are f32 and contiguous. With other strides a tile is better
    /// copied: rows a power of two apart would share a few sets of L1.
    pub(super) fn in_place(&self, first: usize) -> Option<*const f32> {
        let is_f32 = matches!(self.elements, Elements::Floats(Dtype::F32));
        let is_a_run = is_f32 && self.stride_bytes == self.row_bytes();
        is_a_run.then(|| self.row(first).0.cast())
    }

    /// Prefetches rows to L2 that will be read soon.
    pub(super) fn prefetch(&self, rows: Range<usize>) {
        for row in rows {
            let (row, _) = self.row(row);
            for byte in (0..self.row_bytes()).step_by(64) {
                prefetch_l2(row.wrapping_add(byte));
            }
        }
    }

    /// Copies `count` rows of 16-bit elements to the first halves of words, `stride` words apart, and zeroes the rows
    /// up to `padded`.
    pub(super) fn copy_halves(&self, first: usize, [count, padded]: [usize; 2], words: &mut [f32], stride: usize) {
        assert!(self.dtype().bytes() == 2 && self.head_dim <= 2 * stride && words.len() >= padded * stride);
        for row in 0..count {
            // SAFETY: the reasons given in `load`; a row fits in `stride` words, and there are `padded` such rows.
            unsafe {
                let (from, to) = (
                    self.first.add((first + row) * self.stride_bytes),
                    words.as_mut_ptr().add(row * stride),
                );
                std::ptr::copy_nonoverlapping(from, to.cast::<u8>(), 2 * self.head_dim);
            }
        }
        words[count * stride..padded * stride].fill(0.0);
    }

    /// Rounds the head_dim elements of `from` to row `row`, which exists and belongs to this task.
    pub(super) fn store(&self, kernels: &Kernels, row: usize, from: &[f32]) {
        assert!(from.len() >= self.head_dim);
        // SAFETY: the reasons given in `load`.
        unsafe {
            (kernels.narrow)(
                self.dtype(),
                from.as_ptr(),
                self.head_dim,
                self.first.add(row * self.stride_bytes),
            )
        }
    }

    /// Widens `count` rows to a tile, whose rows are `width` apart, and zeroes the rows up to `padded`.
    pub(super) fn load_tile(
        &self,
        kernels: &Kernels,
        first: usize,
        [count, padded]: [usize; 2],
        tile: &mut [f32],
        width: usize,
    ) {
        if width == self.head_dim && self.stride_bytes == self.row_bytes() {
            assert!(tile.len() >= count * width);
            // SAFETY: the reasons given in `load`; the rows are contiguous.
            unsafe { self.widen_run(kernels, first, count, tile.as_mut_ptr()) }
        } else {
            for row in 0..count {
                self.load(kernels, first + row, &mut tile[row * width..][..width]);
            }
        }
        tile[count * width..padded * width].fill(0.0);
    }

    /// Widens the rows `queries` times `factor` to panels: in each, a row of lanes for each element of a head.
    /// `tile` has room for [`MAX_LANES`] rows of `head_dim` rounded up to registers.
    pub(super) fn load_panels(
        &self,
        kernels: &Kernels,
        queries: Range<usize>,
        factor: f32,
        shape: Panels,
        panels: &mut Lines,
        tile: &mut Lines,
    ) {
        let head_dim = self.head_dim;
        let width = head_dim.next_multiple_of(MAX_LANES);
        let tile = tile.as_mut_slice();
        for row in (0..queries.len()).step_by(kernels.lanes) {
            let rows = kernels.lanes.min(queries.len() - row);
            self.load_tile(kernels, queries.start + row, [rows, rows], tile, width);
            if factor != 1.0 {
                tile[..rows * width].iter_mut().for_each(|x| *x *= factor);
            }
            let place = shape.place(row);
            assert!(panels.as_slice().len() >= place + (head_dim - 1) * shape.lanes + kernels.lanes);
            // SAFETY: the processor has the instructions; the tile's rows are whole registers, the panel has the
            // lanes.
            unsafe {
                let to = panels.as_mut_ptr().add(place);
                (kernels.transpose)(tile.as_ptr(), width, rows, to, shape.lanes, head_dim);
            }
        }
    }

    /// Rounds `count` rows of panels, each times its factor, to rows that exist and belong to this task. A factor of
    /// 0 makes a row of zeros from any content.
    pub(super) fn store_panels(
        &self,
        kernels: &Kernels,
        first: usize,
        factors: impl ExactSizeIterator<Item = f32>,
        shape: Panels,
        panels: &Lines,
        tile: &mut Lines,
    ) {
        let (head_dim, count) = (self.head_dim, factors.len());
        let width = head_dim.next_multiple_of(MAX_LANES);
        for (row, factor) in factors.enumerate() {
            let in_tile = row % kernels.lanes;
            if in_tile == 0 {
                let place = shape.place(row);
                assert!(panels.as_slice().len() >= place + (head_dim - 1) * shape.lanes + kernels.lanes);
                // SAFETY: the reasons given in `load_panels`, in the other direction.
                unsafe {
                    let rows = kernels.lanes.min(count - row);
                    let from = panels.as_ptr().add(place);
                    (kernels.transpose)(from, shape.lanes, head_dim, tile.as_mut_ptr(), width, rows);
                }
            }
            let output = &mut tile.as_mut_slice()[in_tile * width..][..head_dim];
            if factor == 0.0 {
                output.fill(0.0);
            } else if factor != 1.0 {
                output.iter_mut().for_each(|x| *x *= factor);
            }
            self.store(kernels, first + row, output);
        }
    }
}

/// An f32 of each query, `[batch, heads, seqlen]` with any strides.
#[derive(Clone, Copy)]
pub(super) struct QueryRows {
    tensor: StridedTensor,
    heads: usize,
    seqlen: usize,
}

impl QueryRows {
    pub(super) fn new(tensor: StridedTensor, problem: &crate::problem::Problem) -> Self {
        Self {
            tensor,
            heads: problem.heads_q(),
            seqlen: problem.seqlen_q() as usize,
        }
    }

    /// The number of query `index`, all heads of all batch entries counted in order.
    pub(super) fn at(&self, index: usize) -> *mut f32 {
        let (heads, row) = (index / self.seqlen, index % self.seqlen);
        let (batch, head) = (heads / self.heads, heads % self.heads);
        let StridedTensor {
            batch_stride,
            head_stride,
            row_stride,
            ..
        } = self.tensor;
        let offset = batch * batch_stride as usize + head * head_stride as usize + row * row_stride as usize;
        pointer_mut::<f32>(self.tensor.address).wrapping_add(offset)
    }
}

/// Layout of a tile's queries in panels: side by side in each, one panel after the other.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    /// Number of queries of a panel.
    pub lanes: usize,
    /// Number of rows of a panel: head_dim, or more.
    pub depth: usize,
}

impl Panels {
    /// Returns the index of a query's first element.
    pub(super) fn place(&self, query: usize) -> usize {
        query / self.lanes * self.lanes * self.depth + query % self.lanes
    }
}

/// A mask that is chosen at run time.
#[derive(Clone, Copy)]
pub(super) enum Visibility {
    Full(flash_attention_kernels::mask::Mask<false>),
    Causal(flash_attention_kernels::mask::Mask<true>),
}

impl Visibility {
    pub(super) fn new(problem: &crate::problem::Problem, causal: bool) -> Self {
        use flash_attention_kernels::mask::Mask;
        let (seqlen_q, seqlen_k) = (problem.seqlen_q(), problem.seqlen_k());
        if causal {
            Self::Causal(Mask::new(seqlen_q, seqlen_k))
        } else {
            Self::Full(Mask::new(seqlen_q, seqlen_k))
        }
    }

    /// Returns the number of tiles of `block_n` keys that any of the queries `first .. first + rows` sees, and the
    /// number that all of them see whole.
    pub(super) fn key_blocks(&self, first: u32, rows: u32, block_n: u32) -> (u32, u32) {
        let blocks = match self {
            Self::Full(mask) => mask.key_blocks(first, rows, block_n),
            Self::Causal(mask) => mask.key_blocks(first, rows, block_n),
        };
        (blocks.end, blocks.whole_end)
    }

    /// Returns the number of keys that query `row` sees, from the first key.
    pub(super) fn visible_end(&self, row: u32) -> u32 {
        match self {
            Self::Full(mask) => mask.keys_of(row).end,
            Self::Causal(mask) => mask.keys_of(row).end,
        }
    }
}
