//! Quantised inputs: e4m3 with scales.

use super::check::{Named, agree, check_contiguous, check_rank_of};
use super::*;

pub use flash_attention_kernels::abi::FP8_SCALE_ROWS;

/// Number that head_dim of quantised inputs must be a multiple of on a GPU: 16 bytes, one copy instruction.
pub(super) const FP8_HEAD_DIM_MULTIPLE: usize = 16;

/// A quantised tensor: its elements and their scales, without memory.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QuantizedInfo<'a> {
    /// [`F8E4M3`](crate::F8E4M3) `[batch, heads, seqlen, head_dim]`, contiguous last axis, any other strides.
    pub data: &'a TensorInfo,
    /// f32, contiguous `[batch, heads, blocks]`.
    pub scales: &'a TensorInfo,
}

impl<'a> QuantizedInfo<'a> {
    /// Collects elements and scales.
    pub fn new(data: &'a TensorInfo, scales: &'a TensorInfo) -> Self {
        Self { data, scales }
    }
}

/// The scales of a quantised tensor in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleBlocks {
    /// Address of the first scale of f32, contiguous `[batch, heads, blocks]`.
    pub address: u64,
    /// Number of scales of a head: 1, or one for each [`FP8_SCALE_ROWS`] rows.
    pub blocks: u32,
}

impl ScaleBlocks {
    /// Describes scales that [`check_scales`] let pass.
    fn new(scales: &TensorInfo) -> Self {
        Self {
            address: scales.address(),
            blocks: scales.shape()[2] as u32,
        }
    }
}

impl Problem {
    /// Checks a forward problem of quantised inputs with results of `dtype`, f16 or bf16; `outputs` are the caller's tensors, or
    /// `None` for new contiguous ones.
    ///
    /// Shapes are those of [`new`](Self::new), where head_dim of v is that of k. On a GPU head_dim is a multiple of 16, the
    /// bytes of a copy.
    ///
    /// # Errors
    /// The errors of [`Quantized::from_parts`](crate::Quantized::from_parts) for each input; those of [`new`](Self::new) in
    /// their order; [`Error::DtypeMismatch`] if `dtype` is f32; [`Error::Unsupported`] if the attention has a score program.
    pub fn of_quantized(
        attention: &Attention,
        q: QuantizedInfo<'_>,
        k: QuantizedInfo<'_>,
        v: QuantizedInfo<'_>,
        dtype: Dtype,
        outputs: Option<Outputs<'_>>,
    ) -> Result<Self, Error> {
        let inputs = [q, k, v];
        let names = [("q", "scales of q"), ("k", "scales of k"), ("v", "scales of v")];
        for ((data, scales), input) in names.into_iter().zip(inputs) {
            check_scales((data, input.data), (scales, input.scales))?;
        }
        if dtype == Dtype::F32 {
            return Err(Error::DtypeMismatch {
                argument: "out",
                got: dtype.into(),
                expected: DataType::F16,
            });
        }
        let data = inputs.map(|input| input.data);
        agree(("v", data[2]), ("k", data[1]), &[3])?;
        let problem = Self::placed_or_not(attention, data, outputs, None, Elements::Quantized(dtype))?;
        let written = outputs.iter().flat_map(|outputs| {
            let out = [("out", outputs.out)];
            out.into_iter().chain(of_rows(outputs.lse, outputs.statistics))
        });
        let scales: Vec<Named<'_>> = names
            .iter()
            .zip(inputs)
            .map(|(names, input)| (names.1, input.scales))
            .collect();
        check_written(&scales, &written.collect::<Vec<_>>())?;
        if problem.program.is_some() {
            return Err(Error::Unsupported {
                feature: "FP8 attention with a score program".to_owned(),
                device: data[0].device().to_string(),
                reason: "its kernels take no features but a causal mask and softmax_scale; attend in f16 or bf16",
            });
        }
        Ok(Self {
            scales: Some(inputs.map(|input| ScaleBlocks::new(input.scales))),
            ..problem
        })
    }

    /// Returns the scales of q, k and v if they are quantised. [`dtype`](Self::dtype) is then that of out.
    pub fn scales(&self) -> Option<[ScaleBlocks; 3]> {
        self.scales
    }

    /// Returns the element type of q, k and v.
    pub fn input_type(&self) -> DataType {
        match self.scales {
            Some(_) => DataType::F8E4M3,
            None => self.dtype.into(),
        }
    }
}

/// Returns the number of blocks of so many rows that a sequence has.
pub(crate) fn scale_blocks(seqlen: usize, rows: usize) -> usize {
    seqlen.div_ceil(rows).max(1)
}

/// Checks the scales of a quantised tensor.
pub(crate) fn check_scales(data: Named<'_>, scales: Named<'_>) -> Result<(), Error> {
    check_rank_of(data, 4)?;
    check_rank_of(scales, 3)?;
    agree(scales, data, &[0, 1])?;
    let (seqlen, blocks) = (data.1.shape()[2], scales.1.shape()[2]);
    let expected = scale_blocks(seqlen, FP8_SCALE_ROWS as usize);
    if blocks != 1 && blocks != expected {
        return Err(Error::ScaleBlocks {
            argument: scales.0,
            blocks,
            expected,
            seqlen,
        });
    }
    for ((argument, tensor), expected) in [(data, DataType::F8E4M3), (scales, DataType::F32)] {
        if tensor.dtype() != expected {
            return Err(Error::DtypeMismatch {
                argument,
                got: tensor.dtype(),
                expected,
            });
        }
    }
    if scales.1.device() != data.1.device() {
        return Err(Error::DeviceMismatch {
            argument: scales.0,
            got: scales.1.device().to_string(),
            other: data.0,
            expected: data.1.device().to_string(),
        });
    }
    check_contiguous(scales)
}
