//! Where in candle's memory the tensors of an op lie.

use candle_core::{Layout, Result};
use flash_attention::{Device, Element, Error, Sequences, Tensor};

/// How the tensors of an op hold their sequences.
#[derive(Clone, Debug)]
pub(crate) enum Batch {
    /// `[batch, seqlen, heads, head_dim]`, candle-flash-attn's order.
    SeqlenHeads,
    /// `[batch, heads, seqlen, head_dim]`, candle_nn's order.
    HeadsSeqlen,
    /// `[total, heads, head_dim]`, sequences end to end.
    Ragged(Sequences),
}

impl Batch {
    /// The tensor that a layout shows of a memory, with the axes of the host's calls.
    ///
    /// # Errors
    /// The tensor does not have the axes of the batch, or ends past the memory's end.
    ///
    /// # Safety
    /// The contract of [`Memory::tensor`].
    pub(crate) unsafe fn tensor<T: Element>(
        &self,
        device: &Device,
        (memory, layout): (Memory, &Layout),
    ) -> Result<Tensor<T>> {
        // SAFETY: passed on to the caller.
        let tensor = unsafe { memory.tensor(device, layout)? };
        match self {
            Self::SeqlenHeads => {
                layout.shape().dims4()?;
                tensor.transpose(1, 2).map_err(wrap)
            }
            Self::HeadsSeqlen => {
                layout.shape().dims4()?;
                Ok(tensor)
            }
            Self::Ragged(_) => {
                layout.shape().dims3()?;
                Ok(tensor)
            }
        }
    }
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

    /// The tensor that a layout shows of this memory.
    ///
    /// # Errors
    /// The layout ends past the memory's end; then those of [`Tensor::from_raw_parts`].
    ///
    /// # Safety
    /// This is initialised memory of `device` of elements of type `T`, which stays allocated while the tensor and work launched on
    /// it exist. Meanwhile nothing else writes it, or reads it if the tensor is written.
    pub(crate) unsafe fn tensor<T: Element>(&self, device: &Device, layout: &Layout) -> Result<Tensor<T>> {
        let (offset, shape, strides) = (layout.start_offset(), layout.dims(), layout.stride());
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
