//! The way in: a function over tensors, and what it refuses.

use std::fmt;

use burn::backend::{Dispatch, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Tensor};
use flash_attention::problem::{Problem, TensorInfo};
use flash_attention::{Attention, Device, Dtype};

use crate::backend::{FlashBackend, Forward};

/// Reason for which a call was refused, before anything was computed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The library refuses the problem: shapes, head_dim, options. Its text names argument, value and limit.
    Attention(flash_attention::Error),
    /// A tensor has an element type that the library does not compute in.
    Dtype {
        /// The tensor.
        argument: &'static str,
        /// Element type of the tensor.
        got: DType,
    },
    /// A tensor is of another backend than Flex.
    Backend {
        /// The tensor.
        argument: &'static str,
        /// Device of the tensor.
        device: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attention(error) => error.fmt(f),
            Self::Dtype { argument, got } => write!(f, "{argument} is {got:?}; it must be F32, F16 or BF16"),
            Self::Backend { argument, device } => {
                write!(f, "{argument} is on {device}; attention runs on burn's Flex backend")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Attention(error) => Some(error),
            _ => None,
        }
    }
}

impl From<flash_attention::Error> for Error {
    fn from(error: flash_attention::Error) -> Self {
        Self::Attention(error)
    }
}

/// Attention of q, `[batch, heads_q, seqlen_q, head_dim]`, over k and v, `[batch, heads_kv, seqlen_k, head_dim]`, with gradients where
/// the tensors' device is an autodiff one.
///
/// heads_kv divides heads_q (grouped and multi-query attention). Tensors are read in place, whatever their strides, as long as the
/// last axis is contiguous: `swap_dims(1, 2)` of `[batch, seqlen, heads, head_dim]` tensors costs nothing. The result is contiguous, of
/// q's shape.
///
/// # Errors
/// [`Error::Attention`] for what [`Problem::new`] refuses, [`Error::Dtype`], [`Error::Backend`].
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, attention: &Attention) -> Result<Tensor<4>, Error> {
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    let [of_q, of_k, of_v] = [describe("q", &q)?, describe("k", &k)?, describe("v", &v)?];
    Problem::new(attention, &of_q, &of_k, &of_v, None)?;
    let Forward { out, .. } = Dispatch::flash_forward(q, k, v, attention.clone());
    Ok(Tensor::from_dispatch(out))
}

/// Shape and dtype of a tensor of Flex.
fn describe(argument: &'static str, tensor: &DispatchTensor) -> Result<TensorInfo, Error> {
    use burn::backend::TensorMetadata;
    let kind = match &tensor.kind {
        DispatchTensorKind::Autodiff(inner) => inner,
        kind => kind,
    };
    if !matches!(kind, DispatchTensorKind::Flex(_)) {
        let device = format!("{:?}", kind.device());
        return Err(Error::Backend { argument, device });
    }
    let dtype = match tensor.dtype() {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::Bf16,
        got => return Err(Error::Dtype { argument, got }),
    };
    Ok(TensorInfo::contiguous(
        Device::cpu().id(),
        dtype,
        tensor.shape().to_vec(),
        0,
    )?)
}
