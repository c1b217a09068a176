//! Attention of the Flex backend: the library's CPU device, on Flex's own memory.

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{Bytes, DType, Shape};
use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Device, Element, Error, Gradients, Output, Statistics, Tensor};

use crate::backend::{FlashBackend, Forward, QkvGradients};

/// An element type that both libraries have.
trait Scalar: Element + burn::tensor::Element + bytemuck::Pod {}
impl Scalar for f32 {}
impl Scalar for f16 {}
impl Scalar for bf16 {}

/// Runs `$body` with `$T` as the element type that a dtype names.
macro_rules! with_scalar {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            other => panic!("flash-attention takes f32, f16 and bf16, not {other:?}"),
        }
    };
}

impl FlashBackend for Flex {
    fn flash_forward(q: FlexTensor, k: FlexTensor, v: FlexTensor, attention: Attention) -> Forward<Self> {
        with_scalar!(q.dtype(), T => forward::<T>([q, k, v], &attention)).unwrap_or_else(|error| panic!("{error}"))
    }

    fn flash_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        forward: Forward<Self>,
        dout: FlexTensor,
        attention: Attention,
    ) -> QkvGradients<Self> {
        with_scalar!(q.dtype(), T => backward::<T>([q, k, v, dout], &forward, &attention))
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

fn forward<T: Scalar>(inputs: [FlexTensor; 3], attention: &Attention) -> Result<Forward<Flex>, Error> {
    let inputs = inputs.map(rows);
    let shape = inputs[0].shape();
    let mut out = New::<T>::zeros(shape.clone());
    let of_rows = Shape::from(shape.to_vec()[..3].to_vec());
    let [mut lse, mut row_max, mut row_sum] = [0; 3].map(|_| New::<f32>::zeros(of_rows.clone()));
    let [q, k, v] = inputs.each_ref().map(read::<T>);
    let mut output = Output::new(out.tensor()?, lse.tensor()?);
    output.statistics = Some(Statistics {
        row_max: row_max.tensor()?,
        row_sum: row_sum.tensor()?,
    });
    attention.forward_into_output(&q?, &k?, &v?, &mut output)?;
    Ok(Forward {
        out: out.into_flex(),
        lse: lse.into_flex(),
        row_max: row_max.into_flex(),
        row_sum: row_sum.into_flex(),
    })
}

fn backward<T: Scalar>(
    inputs: [FlexTensor; 4],
    forward: &Forward<Flex>,
    attention: &Attention,
) -> Result<QkvGradients<Flex>, Error> {
    let inputs = inputs.map(rows);
    let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|input: usize| New::<T>::zeros(inputs[input].shape()));
    let [q, k, v, dout] = inputs.each_ref().map(read::<T>);
    let mut output = Output::new(read::<T>(&forward.out)?, read::<f32>(&forward.lse)?);
    output.statistics = Some(Statistics {
        row_max: read(&forward.row_max)?,
        row_sum: read(&forward.row_sum)?,
    });
    let mut gradients = Gradients::new(dq.tensor()?, dk.tensor()?, dv.tensor()?);
    attention.backward_into(&q?, &k?, &v?, &output, &dout?, &mut gradients)?;
    Ok(QkvGradients {
        dq: dq.into_flex(),
        dk: dk.into_flex(),
        dv: dv.into_flex(),
    })
}

/// A tensor without negative strides and with a contiguous last axis: itself where it is one.
fn rows(tensor: FlexTensor) -> FlexTensor {
    match tensor.layout().has_contiguous_inner() && tensor.layout().has_positive_strides() {
        true => tensor,
        false => tensor.to_contiguous(),
    }
}

/// A tensor's memory, read in place.
fn read<T: Scalar>(tensor: &FlexTensor) -> Result<Tensor<T>, Error> {
    let layout = tensor.layout();
    let storage = tensor.storage::<T>();
    let shape = layout.shape().to_vec();
    let strides: Vec<usize> = layout.strides().iter().map(|stride| stride.unsigned_abs()).collect();
    let last: usize = shape
        .iter()
        .zip(&strides)
        .map(|(size, stride)| size.saturating_sub(1) * stride)
        .sum();
    assert!(
        shape.contains(&0) || layout.start_offset() + last < storage.len(),
        "{layout:?} ends within its storage"
    );
    let first = storage[layout.start_offset()..].as_ptr().expose_provenance();
    // SAFETY: the elements lie in the tensor's storage, as was just checked, which outlives the call that reads them; Flex writes
    // no storage that is shared.
    unsafe { Tensor::from_raw_parts(&Device::cpu(), first as u64, shape, strides, None) }
}

/// Memory of a result, to be one of Flex's tensors once it is written.
struct New<T> {
    elements: Vec<T>,
    shape: Shape,
}

impl<T: Scalar> New<T> {
    fn zeros(shape: Shape) -> Self {
        Self {
            elements: vec![T::default(); shape.num_elements()],
            shape,
        }
    }

    /// The memory as a tensor that a call writes.
    fn tensor(&mut self) -> Result<Tensor<T>, Error> {
        let shape = self.shape.to_vec();
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let address = self.elements.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: as many elements as the shape has, and the call that writes them returns before they are used again.
        unsafe { Tensor::from_raw_parts(&Device::cpu(), address, shape, strides, None) }
    }

    fn into_flex(self) -> FlexTensor {
        FlexTensor::new(
            Bytes::from_elems(self.elements),
            Layout::contiguous(self.shape),
            <T as burn::tensor::Element>::dtype(),
        )
    }
}
