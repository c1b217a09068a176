//! Quantised tensors: [`Quantized`], 8-bit floats with scales, and [`Hadamard`], which prepares q and k for them.

mod hadamard;

pub use hadamard::Hadamard;

use crate::device::Device;
use crate::element::{Element, F8E4M3};
use crate::error::Error;
use crate::problem::{FP8_SCALE_ROWS, QuantizedInfo, check_scales, scale_blocks};
use crate::tensor::Tensor;

/// A `[batch, heads, seqlen, head_dim]` tensor of [`F8E4M3`] with f32 scales: an element is its code's value times the scale
/// of its rows.
///
/// Scales are contiguous `[batch, heads, blocks]`. A head has one scale (`blocks` is 1), or one for each
/// [`FP8_SCALE_ROWS`] rows (`blocks` is the number of rows divided by that, rounded up).
///
/// ```
/// use flash_attention::half::bf16;
/// use flash_attention::{Attention, Device, Hadamard, Quantized, Tensor};
///
/// let data: Vec<f32> = (0..2 * 128 * 64).map(|i| (i as f32).sin()).collect();
/// let q = Tensor::from_slice(&Device::cpu(), [1, 2, 128, 64], &data)?;
/// let (k, v) = (q.clone(), q.clone());
///
/// let turn = Hadamard::new(64, 1)?; // spreads outliers over head_dim; scores stay the same
/// let q = Quantized::by_blocks(&turn.apply(&q)?)?;
/// let k = Quantized::by_blocks(&turn.apply(&k)?)?;
/// let v = Quantized::by_blocks(&v)?;
/// let output = Attention::new().causal().forward_fp8::<bf16>(&q, &k, &v)?;
/// assert_eq!(output.out.shape(), [1, 2, 128, 64]);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Quantized {
    data: Tensor<F8E4M3>,
    scales: Tensor<f32>,
}

impl Quantized {
    /// Quantises with one scale for each head of each batch entry.
    ///
    /// A scale is the largest magnitude divided by 448, so that this number becomes the largest of [`F8E4M3`]; it is 1 where
    /// there are only zeros. Numbers are rounded to nearest, ties to even. A NaN stays one, and an infinity becomes NaN; neither
    /// counts for the scale.
    ///
    /// The work is done on the host: elements of a GPU are copied there and back.
    ///
    /// # Errors
    /// [`Error::Rank`] if the tensor has not four axes, and the errors of [`Tensor::to_vec`] and [`Tensor::from_slice`].
    pub fn by_heads<T: Element>(tensor: &Tensor<T>) -> Result<Self, Error> {
        Self::quantize(tensor, |seqlen| seqlen)
    }

    /// Quantises as [`by_heads`](Self::by_heads) does, with one scale for each [`FP8_SCALE_ROWS`] rows of a head.
    ///
    /// # Errors
    /// The errors of [`by_heads`](Self::by_heads).
    pub fn by_blocks<T: Element>(tensor: &Tensor<T>) -> Result<Self, Error> {
        Self::quantize(tensor, |_| FP8_SCALE_ROWS as usize)
    }

    /// Joins elements and scales that the caller has, from a cache or a quantiser of its own. Scales are positive and finite;
    /// results with others are meaningless.
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::ShapeMismatch`] or [`Error::NotContiguous`] if the scales are not contiguous `[batch, heads,
    /// blocks]`, [`Error::ScaleBlocks`] if `blocks` is another number than the two allowed, [`Error::DeviceMismatch`] if the two
    /// lie on different devices.
    pub fn from_parts(data: Tensor<F8E4M3>, scales: Tensor<f32>) -> Result<Self, Error> {
        check_scales(("data", data.info()), ("scales", scales.info()))?;
        Ok(Self { data, scales })
    }

    /// Returns the elements, `[batch, heads, seqlen, head_dim]`.
    pub fn data(&self) -> &Tensor<F8E4M3> {
        &self.data
    }

    /// Returns the scales, contiguous `[batch, heads, blocks]`.
    pub fn scales(&self) -> &Tensor<f32> {
        &self.scales
    }

    /// Returns the shape of the elements.
    pub fn shape(&self) -> &[usize] {
        self.data.shape()
    }

    /// Returns the device of both tensors.
    pub fn device(&self) -> &Device {
        self.data.device()
    }

    /// Returns the number of scales of each head.
    pub fn blocks(&self) -> usize {
        self.scales.shape()[2]
    }

    /// Returns the numbers that this stands for, each rounded once to f32 and then to `T`, in a new contiguous tensor.
    ///
    /// # Errors
    /// The errors of [`Tensor::to_vec`] and [`Tensor::from_slice`].
    pub fn dequantize<T: Element>(&self) -> Result<Tensor<T>, Error> {
        let [_, _, seqlen, head_dim] = sizes(&self.data)?;
        let (mut numbers, scales) = (self.data.to_vec()?, self.scales.to_vec()?);
        let (blocks, rows) = (self.blocks(), self.rows_of_scale());
        let mut values = Vec::with_capacity(numbers.len());
        for (row, numbers) in numbers.chunks_mut(head_dim.max(1)).enumerate() {
            let scale = scales[row / seqlen * blocks + row % seqlen / rows];
            values.extend(numbers.iter().map(|x| T::from_f32(x.to_f32() * scale)));
        }
        Tensor::from_slice(self.device(), self.shape(), &values)
    }

    /// Describes both tensors, for a [`Problem`](crate::problem::Problem).
    pub fn info(&self) -> QuantizedInfo<'_> {
        QuantizedInfo {
            data: self.data.info(),
            scales: self.scales.info(),
        }
    }

    /// Number of rows that a scale is of.
    fn rows_of_scale(&self) -> usize {
        if self.blocks() == 1 {
            self.shape()[2].max(1)
        } else {
            FP8_SCALE_ROWS as usize
        }
    }

    fn quantize<T: Element>(tensor: &Tensor<T>, rows: impl Fn(usize) -> usize) -> Result<Self, Error> {
        let [batch, heads, seqlen, head_dim] = sizes(tensor)?;
        let rows = rows(seqlen).max(1);
        let elements = tensor.to_vec()?;
        let mut numbers = Vec::with_capacity(elements.len());
        let mut scales = Vec::new();
        for head in elements.chunks((seqlen * head_dim).max(1)) {
            for block in head.chunks(rows * head_dim) {
                scales.push(quantize_block(block, &mut numbers));
            }
        }
        let blocks = scale_blocks(seqlen, rows);
        // If head_dim is 0, no block was quantised: every block gets scale 1.
        scales.resize(batch * heads * blocks, 1.0);
        Self::from_parts(
            Tensor::from_slice(tensor.device(), tensor.shape(), &numbers)?,
            Tensor::from_slice(tensor.device(), [batch, heads, blocks], &scales)?,
        )
    }
}

/// Appends the codes of a block, and returns its scale.
fn quantize_block<T: Element>(block: &[T], codes: &mut Vec<F8E4M3>) -> f32 {
    let finite = |x: f32| if x.is_finite() { x.abs() } else { 0.0 };
    let largest = block
        .iter()
        .fold(0.0, |largest: f32, x| largest.max(finite(x.to_f32())));
    let scale = scale_of(largest);
    codes.extend(block.iter().map(|x| {
        let x = x.to_f32();
        if x.is_infinite() {
            F8E4M3::NAN
        } else {
            F8E4M3::from_f32(x / scale)
        }
    }));
    scale
}

/// The scale of a block with this largest magnitude. It is a normal number, so that no quotient is infinite.
fn scale_of(largest: f32) -> f32 {
    if largest == 0.0 {
        1.0
    } else {
        (largest / F8E4M3::MAX.to_f32()).max(f32::MIN_POSITIVE)
    }
}

/// The four sizes of a tensor.
fn sizes<T: crate::element::Scalar>(tensor: &Tensor<T>) -> Result<[usize; 4], Error> {
    tensor.shape().try_into().map_err(|_| Error::Rank {
        argument: "tensor",
        shape: tensor.shape().to_vec(),
        rank: tensor.shape().len(),
        expected: 4,
    })
}
