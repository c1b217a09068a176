//! Descriptions of tensors for the tensor memory accelerator.

use flash_attention_kernels::abi::StridedTensor;

use crate::element::DataType;
use crate::problem::Problem;

/// Limit of a tensor map's strides in bytes; they are also multiples of 16.
const STRIDE_LIMIT: u64 = 1 << 40;

/// Bytes of a row of a box.
const ROW_BYTES: usize = 128;

/// A `[batch, heads, seqlen, head_dim]` tensor, and the box in which a kernel copies it: the
/// arguments of `cuTensorMapEncodeTiled`, from which a device makes a tensor map.
///
/// The box is swizzled in rows of 128 bytes; elements outside of the tensor read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileMap {
    /// Element type of the tensor.
    pub dtype: DataType,
    /// Device address of element `[0, 0, 0, 0]`.
    pub address: u64,
    /// Sizes of head_dim, packed heads, seqlen, heads, batch.
    pub dims: [u64; 5],
    /// Strides of the dimensions after head_dim, in bytes.
    pub strides: [u64; 4],
    /// Sizes of the box, in the order of `dims`.
    pub box_dims: [u32; 5],
}

impl TileMap {
    /// Describes a tensor that [fits](fit), with these sizes, copied `rows` rows at a time.
    pub(super) fn new(tensor: &StridedTensor, dims: [u64; 4], dtype: DataType, rows: u32) -> Self {
        Self::packed(tensor, dims, dtype, rows, 1)
    }

    /// Describes a tensor with `packed` neighbouring heads, a divisor of `rows`, in each box: a row of each head,
    /// then the next row.
    pub(super) fn packed(tensor: &StridedTensor, dims: [u64; 4], dtype: DataType, rows: u32, packed: u32) -> Self {
        let [head_dim, seqlen, heads, batch] = dims;
        let dims = [head_dim, packed.into(), seqlen, heads / u64::from(packed), batch];
        let strides = [
            tensor.head_stride,
            tensor.row_stride,
            tensor.head_stride * u64::from(packed),
            tensor.batch_stride,
        ];
        let bytes = |(stride, size): (u64, &u64)| stride * dtype.bytes() as u64 * u64::from(*size > 1);
        let mut strides = strides.into_iter().zip(&dims[1..]).map(bytes);
        Self {
            dtype,
            address: tensor.address,
            dims,
            // The stride of an axis of size 1 is never used, but a driver may refuse 0.
            strides: std::array::from_fn(|_| strides.next().unwrap_or(0).max(16)),
            box_dims: [(ROW_BYTES / dtype.bytes()) as u32, packed, rows / packed, 1, 1],
        }
    }
}

/// Returns true if tensor maps can describe tensors of this type with the rows of q and with those of k: 16-byte aligned
/// rows, no broadcast axis, strides in range.
pub(super) fn fit(problem: &Problem, dtype: DataType, like_q: &[StridedTensor], like_k: &[StridedTensor]) -> bool {
    let bytes = dtype.bytes() as u64;
    let fits = |tensor: &StridedTensor, dims: [u64; 4]| {
        let strides = [tensor.row_stride, tensor.head_stride, tensor.batch_stride];
        let one_fits = |(&stride, &size): (&u64, &u64)| {
            size == 1 || (stride > 0 && stride < STRIDE_LIMIT / bytes && (stride * bytes).is_multiple_of(16))
        };
        tensor.address.is_multiple_of(16) && strides.iter().zip(&dims[1..]).all(one_fits)
    };
    let [q, k, ..] = dims(problem);
    like_q.iter().all(|tensor| fits(tensor, q)) && like_k.iter().all(|tensor| fits(tensor, k))
}

/// Returns the sizes of q, k, v and out, in this order: head_dim, seqlen, heads, batch of each.
pub(super) fn dims(problem: &Problem) -> [[u64; 4]; 4] {
    let dims = |head_dim: u32, seqlen: u32, heads: usize| {
        [head_dim.into(), seqlen.into(), heads as u64, problem.batch() as u64]
    };
    let queries = |head_dim| dims(head_dim, problem.seqlen_q(), problem.heads_q());
    let keys = |head_dim| dims(head_dim, problem.seqlen_k(), problem.heads_kv());
    let (head_dim, head_dim_v) = (problem.head_dim(), problem.head_dim_v());
    [queries(head_dim), keys(head_dim), keys(head_dim_v), queries(head_dim_v)]
}
