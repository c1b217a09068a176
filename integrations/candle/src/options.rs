//! The options of candle-flash-attn's functions, and the [`Attention`] that they are on a device.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use flash_attention::{Attention, Device};

use crate::op::{Scalar, with_scalar};
use crate::views::wrap;

/// Options of a call, as candle-flash-attn's functions take them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options<'a> {
    pub softmax_scale: f32,
    pub alibi_slopes: Option<&'a Tensor>,
    pub window_size_left: Option<usize>,
    pub window_size_right: Option<usize>,
    pub softcap: Option<f32>,
}

impl<'a> Options<'a> {
    /// A full or causal mask.
    pub(crate) fn new(softmax_scale: f32, causal: bool) -> Self {
        Self::windowed(softmax_scale, None, causal.then_some(0))
    }

    /// A window: query i sees the keys from `i - left` to `i + right`, counted from the last query and the last key.
    pub(crate) fn windowed(softmax_scale: f32, left: Option<usize>, right: Option<usize>) -> Self {
        Self {
            softmax_scale,
            alibi_slopes: None,
            window_size_left: left,
            window_size_right: right,
            softcap: None,
        }
    }

    /// Adds a bias by distance.
    pub(crate) fn alibi(self, slopes: Option<&'a Tensor>) -> Self {
        Self {
            alibi_slopes: slopes,
            ..self
        }
    }

    /// Caps the scores; 0 is no cap.
    pub(crate) fn softcap(self, softcap: Option<f32>) -> Self {
        Self { softcap, ..self }
    }

    /// These options over at most so many keys, where a window as wide is none.
    pub(crate) fn recipe(&self, max_seqlen_k: usize) -> Recipe {
        let narrow = |window: Option<usize>| window.filter(|&window| window < max_seqlen_k);
        let attention = Attention::new().softmax_scale(self.softmax_scale);
        let attention = match (narrow(self.window_size_left), narrow(self.window_size_right)) {
            (None, Some(0)) => attention.causal(),
            (left, right) => attention.window(left, right),
        };
        let attention = match self.softcap.filter(|&softcap| softcap != 0.0) {
            Some(softcap) => attention.softcap(softcap),
            None => attention,
        };
        Recipe {
            alibi_slopes: self.alibi_slopes.cloned(),
            ..Recipe::from(attention)
        }
    }
}

/// An attention whose tables are candle's tensors; it is made on a device once that is known.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    attention: Attention,
    alibi_slopes: Option<Tensor>,
    bias: Option<Tensor>,
}

impl From<Attention> for Recipe {
    fn from(attention: Attention) -> Self {
        Self {
            attention,
            alibi_slopes: None,
            bias: None,
        }
    }
}

impl Recipe {
    /// Adds a tensor to the scores, `[batch, heads, seqlen_q, seqlen_k]`, where an axis of 1 repeats and leading axes
    /// may be left out.
    ///
    /// # Errors
    /// The bias has more than four axes.
    pub(crate) fn bias(self, bias: &Tensor) -> Result<Self> {
        let Some(missing) = 4_usize.checked_sub(bias.rank()) else {
            candle_core::bail!("mask has {} axes, four at most are added to scores", bias.rank())
        };
        let shape = [&[1, 1, 1, 1][..missing], bias.dims()].concat();
        let bias = Some(bias.detach().reshape(shape)?);
        Ok(Self { bias, ..self })
    }

    /// The attention on a device, its tables in place on the CPU and copied through the host on a GPU.
    ///
    /// # Errors
    /// A table is of a dtype that it cannot have, or what the host says of its memory.
    pub(crate) fn on(&self, device: &Device) -> Result<Attention> {
        let mut attention = self.attention.clone();
        if let Some(slopes) = &self.alibi_slopes {
            if slopes.dtype() != DType::F32 {
                candle_core::bail!("alibi_slopes is {:?}; it must be F32", slopes.dtype())
            }
            attention = attention.alibi(&table::<f32>(slopes, device)?);
        }
        if let Some(bias) = &self.bias {
            attention = with_scalar!(bias.dtype(), T => attention.bias(&table::<T>(bias, device)?));
        }
        Ok(attention)
    }
}

/// A tensor of candle's as one of the device.
fn table<T: Scalar>(tensor: &Tensor, device: &Device) -> Result<flash_attention::Tensor<T>> {
    let (storage, layout) = tensor.storage_and_layout();
    if let Storage::Cpu(storage) = &*storage {
        let elements = CpuStorage::as_slice::<T>(storage)?;
        let first = &elements[layout.start_offset()..];
        let address = first.as_ptr().expose_provenance() as u64;
        let owner = Some(Arc::new(tensor.clone()) as Arc<_>);
        // SAFETY: the elements lie in the tensor's storage, whose memory stays where it is while the owner, a clone of the tensor, is
        // there; candle writes it in no op of a graph.
        return unsafe {
            flash_attention::Tensor::from_raw_parts(device, address, layout.dims(), layout.stride(), owner)
        }
        .map_err(wrap);
    }
    drop(storage);
    let elements = tensor.flatten_all()?.to_vec1::<T>()?;
    flash_attention::Tensor::from_slice(device, tensor.dims(), &elements).map_err(wrap)
}
