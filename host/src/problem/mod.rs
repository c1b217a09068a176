//! A validated attention problem; all validation happens here.
//!
//! Everything after [`Problem::new`] relies on it: plans compute without overflow, and devices index without checks.

mod backward;
mod check;
mod quantized;
mod scale;
mod sequences;

use std::sync::Arc;

pub(crate) use backward::BackwardTensors;
pub use backward::{BackwardInputs, BackwardProblem, GradientOutputs};
use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::{Arch, Dtype};
pub use flash_attention_kernels::mask::MAX_SEQLEN;
pub use quantized::{FP8_SCALE_ROWS, QuantizedInfo, ScaleBlocks};
pub(crate) use quantized::{check_scales, scale_blocks};
pub use scale::Scale;

use self::check::*;
pub(crate) use self::check::{Named, ROWS, check_last_axis, check_written};
pub use crate::element::DataType;
use crate::error::Error;
pub use crate::layout::TensorInfo;
use crate::options::Attention;
use crate::program::interval::Ranges;
use crate::program::{Coordinate, Program};
use crate::sequences::{Pages, Placed};

/// Largest head_dim that all kernels are compiled for.
pub const MAX_HEAD_DIM: usize = 256;

/// Largest head_dim of q and k, and of v, in latent attention: its values are a part of its keys, so that head_dim of v is the
/// smaller one. Absorbed decoding of DeepSeek's models has these sizes. The CPU serves it in every dtype, forward and backward; GPUs
/// serve the forward pass in f16 and bf16.
pub const LATENT_HEAD_DIMS: [usize; 2] = [576, 512];

/// Number that head_dim must be a multiple of: 16 bytes of f16, one copy instruction.
pub const HEAD_DIM_MULTIPLE: usize = 8;

/// A valid attention problem: sizes, options, and the location of its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    batch: usize,
    heads_q: usize,
    heads_kv: usize,
    seqlen_q: u32,
    seqlen_k: u32,
    head_dim: u32,
    head_dim_v: u32,
    dtype: Dtype,
    causal: bool,
    scale: Scale,
    arch: Option<Arch>,
    q: StridedTensor,
    k: StridedTensor,
    v: StridedTensor,
    out: StridedTensor,
    lse: StridedTensor,
    statistics: Option<[StridedTensor; 2]>,
    program: Option<Arc<Program>>,
    pages: Option<Pages>,
    placed: Option<Arc<Placed>>,
    batch_invariant: bool,
    scales: Option<[ScaleBlocks; 3]>,
}

/// Element types of a problem.
#[derive(Clone, Copy)]
enum Elements {
    /// Inputs and out have the type of q.
    Plain,
    /// Inputs are quantised, and out has this type.
    Quantized(Dtype),
}

/// The caller's memory for the results of a forward pass.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Outputs<'a> {
    /// `[batch, heads_q, seqlen_q, head_dim_v]`, any strides that do not overlap, contiguous last axis.
    pub out: &'a TensorInfo,
    /// f32 `[batch, heads_q, seqlen_q]`, any strides that do not overlap. On a GPU a launch copies it from the workspace unless it is
    /// contiguous.
    pub lse: &'a TensorInfo,
    /// row_max and row_sum, as lse; `None` if they are not wanted.
    pub statistics: Option<[&'a TensorInfo; 2]>,
}

impl<'a> Outputs<'a> {
    /// Collects memory for out and lse.
    pub fn new(out: &'a TensorInfo, lse: &'a TensorInfo) -> Self {
        Self {
            out,
            lse,
            statistics: None,
        }
    }
}

impl Problem {
    /// Checks a forward problem; `outputs` are the caller's tensors, or `None` for new contiguous ones.
    ///
    /// q is `[batch, heads_q, seqlen_q, head_dim]`, k is `[batch, heads_kv, seqlen_k, head_dim]`, v is `[batch, heads_kv,
    /// seqlen_k, head_dim_v]`.
    ///
    /// # Errors
    /// In this order: [`Error::Rank`]; [`Error::ShapeMismatch`]; [`Error::DtypeMismatch`];
    /// [`Error::DeviceMismatch`]; [`Error::HeadsNotDivisible`]; [`Error::HeadDim`]; [`Error::LastAxisStride`];
    /// [`Error::SequenceTooLong`]; [`Error::OverlappingStrides`] and
    /// [`Error::Aliased`] or [`Error::Interleaved`] for outputs; [`Error::SoftmaxScale`]; [`Error::Program`]. Sizes that
    /// overflow are refused earlier, where a [`TensorInfo`] or a tensor is made.
    pub fn new(
        attention: &Attention,
        q: &TensorInfo,
        k: &TensorInfo,
        v: &TensorInfo,
        outputs: Option<Outputs<'_>>,
    ) -> Result<Self, Error> {
        Self::placed_or_not(attention, [q, k, v], outputs, None, Elements::Plain)
    }

    /// Checks the problem of a batch whose sequences lie anywhere in q and in k and v. Only kernels of GPUs for listed work take it.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new), except those of the batch axis of k.
    pub(crate) fn of_sequences(
        attention: &Attention,
        [q, k, v]: [&TensorInfo; 3],
        outputs: Option<Outputs<'_>>,
        placed: Placed,
    ) -> Result<Self, Error> {
        Self::placed_or_not(attention, [q, k, v], outputs, Some(placed), Elements::Plain)
    }

    fn placed_or_not(
        attention: &Attention,
        [q, k, v]: [&TensorInfo; 3],
        outputs: Option<Outputs<'_>>,
        placed: Option<Placed>,
        elements: Elements,
    ) -> Result<Self, Error> {
        let inputs = [("q", q), ("k", k), ("v", v)];
        let out = outputs.map(|outputs| ("out", outputs.out));
        let of_rows = outputs.map_or(Vec::new(), |outputs| of_rows(outputs.lse, outputs.statistics));
        let all: Vec<Named<'_>> = inputs.into_iter().chain(out).chain(of_rows.iter().copied()).collect();
        let rows: Vec<Named<'_>> = inputs.into_iter().chain(out).collect(); // tensors with a head_dim

        check_rank(&all)?;
        check_shapes_agree(&inputs, out, &of_rows, placed.is_none())?;
        let dtype = match elements {
            Elements::Plain => check_dtypes(&all)?,
            Elements::Quantized(dtype) => check_dtypes_of(&all[3..], dtype)?,
        };
        check_devices(&all)?;
        check_heads(q, k)?;
        check_head_dims(("q", q), ("v", v), elements)?;
        rows.iter().try_for_each(|&tensor| check_last_axis(tensor))?;
        inputs.iter().try_for_each(|&tensor| check_seqlen(tensor))?;
        placed.as_ref().map_or(Ok(()), Placed::check)?;
        let new_out = TensorInfo::contiguous(q.device(), dtype, out_shape(q.shape(), v.shape()), 0)?;
        let new_rows = TensorInfo::contiguous(q.device(), Dtype::F32, &q.shape()[..3], 0)?;
        let written: Vec<Named<'_>> = out.into_iter().chain(of_rows).collect();
        check_written(&inputs, &written)?;
        let softmax_scale = attention.scale_for(q.shape()[3]);
        if !softmax_scale.is_finite() {
            return Err(Error::SoftmaxScale { value: softmax_scale });
        }
        let program = attention.program()?.cloned();
        if let Some(program) = &program {
            let pairs = match &placed {
                Some(placed) => placed.pairs_of_each([inputs[0], inputs[1]]),
                None => vec![all_pairs(q, k)],
            };
            pairs.iter().try_for_each(|pairs| program.check(q.device(), pairs))?;
            check_tables_apart(program, &written)?;
        }

        Ok(Self {
            batch: q.shape()[0],
            heads_q: q.shape()[1],
            heads_kv: k.shape()[1],
            seqlen_q: q.shape()[2] as u32,
            seqlen_k: k.shape()[2] as u32,
            head_dim: q.shape()[3] as u32,
            head_dim_v: v.shape()[3] as u32,
            dtype,
            causal: attention.is_causal(),
            scale: Scale::new(softmax_scale),
            arch: attention.forced_arch(),
            q: strided(q),
            k: strided(k),
            v: strided(v),
            out: strided(out.map_or(&new_out, |(_, out)| out)),
            lse: strided(outputs.map_or(&new_rows, |outputs| outputs.lse)),
            statistics: outputs
                .map_or(Some([&new_rows; 2]), |outputs| outputs.statistics)
                .map(|tensors| tensors.map(strided)),
            program,
            pages: None,
            placed: placed.map(Arc::new),
            batch_invariant: attention.is_batch_invariant(),
            scales: None,
        })
    }

    /// Returns this problem of one sequence with keys and values in pages, from one page to the next and from one key to the next
    /// so many elements apart, in k and in v.
    pub(crate) fn with_pages(mut self, pages: Pages, strides: [[usize; 2]; 2]) -> Self {
        for (tensor, [page, key]) in [&mut self.k, &mut self.v].into_iter().zip(strides) {
            (tensor.batch_stride, tensor.row_stride) = (page as u64, key as u64);
        }
        self.pages = Some(pages);
        self
    }

    /// The pages in which keys and values lie; `None` if they lie at one distance from each other. The batch strides of k and v
    /// are then those of pages.
    pub(crate) fn pages(&self) -> Option<&Pages> {
        self.pages.as_ref()
    }

    /// Returns the places of the sequences of a batch that is no rectangle; `None` of a rectangle.
    pub(crate) fn placed(&self) -> Option<&Placed> {
        self.placed.as_deref()
    }

    /// Returns true if a sequence's results must not depend on the rest of the batch.
    pub(crate) fn batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// Returns the number of independent sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Returns the number of query heads.
    pub fn heads_q(&self) -> usize {
        self.heads_q
    }

    /// Returns the number of key/value heads; each serves `heads_q / heads_kv` query heads.
    pub fn heads_kv(&self) -> usize {
        self.heads_kv
    }

    /// Returns the length of the query sequence.
    pub fn seqlen_q(&self) -> u32 {
        self.seqlen_q
    }

    /// Returns the length of the key sequence.
    pub fn seqlen_k(&self) -> u32 {
        self.seqlen_k
    }

    /// Returns the elements of a head of q and k.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }

    /// Returns the elements of a head of v and out.
    pub fn head_dim_v(&self) -> u32 {
        self.head_dim_v
    }

    /// Returns the head_dim of the tile that the problem needs: the larger of both.
    pub fn widest_head_dim(&self) -> u32 {
        self.head_dim.max(self.head_dim_v)
    }

    /// Returns the element type of q, k, v and out; of out alone if the others are quantised.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Returns true for a causal mask: query i sees only the keys up to `i + seqlen_k - seqlen_q`.
    pub fn causal(&self) -> bool {
        self.causal
    }

    /// Returns the factor of the scores before the softmax.
    pub fn softmax_scale(&self) -> f32 {
        self.scale.value
    }

    /// Returns the softmax scale in the forms that kernels take.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Returns the architecture whose kernels are forced; `None` leaves the choice to the plan.
    pub fn arch(&self) -> Option<Arch> {
        self.arch
    }

    /// Returns the layout of the queries.
    pub fn q(&self) -> StridedTensor {
        self.q
    }

    /// Returns the layout of the keys.
    pub fn k(&self) -> StridedTensor {
        self.k
    }

    /// Returns the layout of the values.
    pub fn v(&self) -> StridedTensor {
        self.v
    }

    /// Tells if there are queries; without them out, lse and dq have no elements.
    pub fn has_queries(&self) -> bool {
        self.batch > 0 && self.heads_q > 0 && self.seqlen_q > 0
    }

    /// Tells if there are keys; without them dk and dv have no elements, out is 0 and lse -inf.
    pub fn has_keys(&self) -> bool {
        self.batch > 0 && self.heads_kv > 0 && self.seqlen_k > 0
    }

    /// Tells if any query sees any key.
    pub fn has_pairs(&self) -> bool {
        self.has_queries() && self.has_keys()
    }

    /// Tells if forward writes row_max and row_sum beside lse.
    pub fn keeps_statistics(&self) -> bool {
        self.statistics.is_some()
    }

    /// The log-sum-exp, whose last axis is the sequence; its address is 0 until it is allocated.
    pub(crate) fn lse(&self) -> StridedTensor {
        self.lse
    }

    /// row_max and row_sum, as lse, if they are wanted.
    pub(crate) fn statistics(&self) -> Option<[StridedTensor; 2]> {
        self.statistics
    }

    /// Returns the shape of lse, row_max and row_sum: `[batch, heads_q, seqlen_q]`.
    pub(crate) fn row_sizes(&self) -> [usize; 3] {
        [self.batch, self.heads_q, self.seqlen_q as usize]
    }

    /// Returns the bytes of one f32 per query.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.row_sizes().iter().product::<usize>() as u64 * size_of::<f32>() as u64
    }

    /// Returns the layout of contiguous f32 of queries, at address 0.
    pub(crate) fn contiguous_rows(&self) -> StridedTensor {
        let [_, heads, seqlen] = self.row_sizes().map(|size| size as u64);
        StridedTensor {
            address: 0,
            batch_stride: heads * seqlen,
            head_stride: seqlen,
            row_stride: 1,
        }
    }

    /// Tells if f32 of queries have neither gaps nor another order than `[batch, heads_q, seqlen_q]`.
    pub(crate) fn has_contiguous_rows(&self, tensor: StridedTensor) -> bool {
        if !self.has_queries() {
            return true;
        }
        let strides = |tensor: StridedTensor| [tensor.batch_stride, tensor.head_stride, tensor.row_stride];
        let axes = strides(tensor).into_iter().zip(strides(self.contiguous_rows()));
        let mut axes = self.row_sizes().into_iter().zip(axes);
        axes.all(|(size, (stride, expected))| size == 1 || stride == expected)
    }

    /// Returns the program that changes scores and hides pairs beside a causal mask, or `None`.
    pub fn program(&self) -> Option<&Arc<Program>> {
        self.program.as_ref()
    }

    /// Returns the layout of the output, whose address is 0 until it is allocated.
    pub fn out(&self) -> StridedTensor {
        self.out
    }
}

/// The first and last coordinates of a problem's pairs.
fn all_pairs(q: &TensorInfo, k: &TensorInfo) -> Ranges {
    let size = |tensor: &TensorInfo, axis: usize| i32::try_from(tensor.shape()[axis]).unwrap_or(i32::MAX);
    Coordinate::ALL.map(|coordinate| match coordinate {
        Coordinate::Batch => (0, size(q, 0) - 1),
        Coordinate::Head => (0, size(q, 1) - 1),
        Coordinate::KvHead => (0, size(k, 1) - 1),
        Coordinate::Query => (0, size(q, 2) - 1),
        Coordinate::Key => (0, size(k, 2) - 1),
        Coordinate::SeqlenQ => (size(q, 2), size(q, 2)),
        Coordinate::SeqlenK => (size(k, 2), size(k, 2)),
    })
}

/// Returns the shape of the output for q and v of these shapes.
pub(crate) fn out_shape(q: &[usize], v: &[usize]) -> Vec<usize> {
    let rows = q.iter().take(q.len().saturating_sub(1));
    rows.chain(v.last()).copied().collect()
}

/// A `[batch, heads, seqlen, head_dim]` or `[batch, heads, seqlen]` tensor as kernels take it. Strides of an axis of one
/// entry, or of a tensor of none, are never used, and are set to 0 so that they cannot spoil the alignment.
fn strided(tensor: &TensorInfo) -> StridedTensor {
    let stride = |axis: usize| {
        if tensor.shape()[axis] == 1 || tensor.is_empty() {
            0
        } else {
            tensor.strides()[axis] as u64
        }
    };
    StridedTensor {
        address: tensor.address(),
        batch_stride: stride(0),
        head_stride: stride(1),
        row_stride: stride(2),
    }
}
