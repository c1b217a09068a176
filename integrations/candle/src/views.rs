//! Where in candle's memory the tensors of each attention call lie.

use std::ops::Range;

use candle_core::{Layout, Result};
use flash_attention::{Device, Element, Error, Tensor};

/// How the tensors of an op hold their sequences.
#[derive(Clone, Debug)]
pub(crate) enum Batch {
    /// `[batch, seqlen, heads, head_dim]`, candle-flash-attn's order.
    SeqlenHeads,
    /// `[batch, heads, seqlen, head_dim]`, candle_nn's order.
    HeadsSeqlen,
    /// `[total, heads, head_dim]`: sequence i has the queries `q[i]` and the keys `k[i]`.
    Ragged { q: Vec<Range<usize>>, k: Vec<Range<usize>> },
}

/// A `[batch, heads, seqlen, head_dim]` tensor inside a storage; offset and strides count elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    offset: usize,
    shape: [usize; 4],
    strides: [usize; 4],
}

/// The views of one attention call: of q, and of tensors shaped as q; of k, of v, and of tensors shaped as them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<const Q: usize, const K: usize> {
    pub q: [View; Q],
    pub k: [View; K],
}

impl Batch {
    /// The attention calls of the op, over these layouts. Sequences without queries or without keys have no call: their
    /// results are zeros.
    ///
    /// # Errors
    /// A tensor does not have the axes of the batch.
    pub(crate) fn calls<const Q: usize, const K: usize>(
        &self,
        like_q: [&Layout; Q],
        like_k: [&Layout; K],
    ) -> Result<Vec<Call<Q, K>>> {
        let (q_ranges, k_ranges) = match self {
            Self::SeqlenHeads | Self::HeadsSeqlen => {
                let call = Call {
                    q: views(like_q, |layout| self.whole(layout))?,
                    k: views(like_k, |layout| self.whole(layout))?,
                };
                return Ok(vec![call]);
            }
            Self::Ragged { q, k } => (q, k),
        };
        q_ranges
            .iter()
            .zip(k_ranges)
            .filter(|(q, k)| !q.is_empty() && !k.is_empty())
            .map(|(q, k)| {
                Ok(Call {
                    q: views(like_q, |layout| sequence(layout, q))?,
                    k: views(like_k, |layout| sequence(layout, k))?,
                })
            })
            .collect()
    }

    fn whole(&self, layout: &Layout) -> Result<View> {
        let (batch, second, third, head_dim) = layout.shape().dims4()?;
        let &[of_batch, of_second, of_third, of_head_dim] = layout.stride() else {
            unreachable!("candle's layouts have a stride for each axis")
        };
        let (shape, strides) = match self {
            Self::SeqlenHeads => (
                [batch, third, second, head_dim],
                [of_batch, of_third, of_second, of_head_dim],
            ),
            _ => (
                [batch, second, third, head_dim],
                [of_batch, of_second, of_third, of_head_dim],
            ),
        };
        Ok(View {
            offset: layout.start_offset(),
            shape,
            strides,
        })
    }
}

fn sequence(layout: &Layout, range: &Range<usize>) -> Result<View> {
    let (total, heads, head_dim) = layout.shape().dims3()?;
    let &[of_token, of_head, of_head_dim] = layout.stride() else {
        unreachable!("candle's layouts have a stride for each axis")
    };
    if range.end > total {
        candle_core::bail!(
            "sequence {range:?} ends past the {total} tokens of {:?}",
            layout.shape()
        )
    }
    Ok(View {
        offset: layout.start_offset() + range.start * of_token,
        shape: [1, heads, range.len(), head_dim],
        strides: [of_token * total, of_head, of_token, of_head_dim],
    })
}

fn views<const N: usize>(layouts: [&Layout; N], view: impl Fn(&Layout) -> Result<View>) -> Result<[View; N]> {
    let mut views = [View {
        offset: 0,
        shape: [0; 4],
        strides: [0; 4],
    }; N];
    for (slot, layout) in views.iter_mut().zip(layouts) {
        *slot = view(layout)?;
    }
    Ok(views)
}

/// Memory of one storage of candle's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    address: u64,
    elements: usize,
}

impl Memory {
    /// Memory at an address of the device, of so many elements.
    #[cfg(feature = "cuda")]
    pub(crate) fn new(address: u64, elements: usize) -> Self {
        Self { address, elements }
    }

    /// Host memory that is read.
    pub(crate) fn read<T>(slice: &[T]) -> Self {
        Self {
            address: slice.as_ptr().expose_provenance() as u64,
            elements: slice.len(),
        }
    }

    /// Host memory that is written.
    pub(crate) fn written<T>(slice: &mut [T]) -> Self {
        Self {
            address: slice.as_mut_ptr().expose_provenance() as u64,
            elements: slice.len(),
        }
    }

    /// The tensor that a view shows of this memory.
    ///
    /// # Errors
    /// The view ends past the memory's end; then those of [`Tensor::from_raw_parts`].
    ///
    /// # Safety
    /// This is initialised memory of `device` of elements of type `T`, which stays allocated while the tensor and work launched on
    /// it exist, and which nobody else writes, or reads where the tensor is written, meanwhile.
    pub(crate) unsafe fn tensor<T: Element>(&self, device: &Device, view: &View) -> Result<Tensor<T>> {
        let View { offset, shape, strides } = view;
        // SAFETY: passed on to the caller.
        unsafe { self.at(device, *offset, shape, strides) }
    }

    /// The tensor that a layout shows of this memory.
    ///
    /// # Errors
    /// The errors of [`tensor`](Self::tensor).
    ///
    /// # Safety
    /// The contract of [`tensor`](Self::tensor).
    pub(crate) unsafe fn whole<T: Element>(&self, device: &Device, layout: &Layout) -> Result<Tensor<T>> {
        // SAFETY: passed on to the caller.
        unsafe { self.at(device, layout.start_offset(), layout.dims(), layout.stride()) }
    }

    /// # Safety
    /// The contract of [`tensor`](Self::tensor).
    unsafe fn at<T: Element>(
        &self,
        device: &Device,
        offset: usize,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Tensor<T>> {
        let last: usize = shape
            .iter()
            .zip(strides)
            .map(|(size, stride)| size.saturating_sub(1) * stride)
            .sum();
        if !shape.contains(&0) && offset + last >= self.elements {
            candle_core::bail!(
                "a tensor {shape:?} with strides {strides:?} from element {offset} ends past its storage of {} elements",
                self.elements
            )
        }
        let address = self.address + (offset * size_of::<T>()) as u64;
        // SAFETY: the tensor's elements lie within this memory, as was just checked; the rest is the caller's to see to.
        unsafe { Tensor::from_raw_parts(device, address, shape, strides, None) }.map_err(wrap)
    }
}

/// candle's form of an error of ours; its text names argument, value and limit.
pub(crate) fn wrap(error: Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
