//! Parameters of the kernels for Hopper.

use core::num::NonZeroU32;

use super::{Exponents, ForwardRows, Layout, Params, StridedTensor};

/// A tensor map for the tensor memory accelerator: 128 opaque bytes made by the driver (`cuTensorMapEncodeTiled`).
///
/// Dimensions are head_dim, packed heads, seqlen, heads, batch, innermost first. The box has 64 columns and as many
/// rows as the kernel copies at once, swizzled in rows of 128 bytes; elements outside of the tensor read as zeros. If
/// query heads are packed (PackGQA), the rows of a tile are position 0 of all these heads, then position 1, and so
/// on; otherwise there is one packed head.
///
/// The hardware requires an alignment of 64 bytes, and the parameters of the compiled kernels have it: `cargo xtask
/// ptx` writes the alignment, since rustc passes on at most 16 from a struct.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// Parameters of the forward kernels for Hopper.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperForwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`, in boxes of 64 rows.
    pub q: TensorMap,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`, in boxes of `block_n` rows; in clusters each block loads its part of them.
    pub k: TensorMap,
    /// Values, `[batch, heads_kv, seqlen_k, head_dim_v]`, in the boxes of k.
    pub v: TensorMap,
    /// Output, `[batch, heads_q, seqlen_q, head_dim_v]`, in the boxes of q.
    pub out: TensorMap,
    /// Device address of the log-sum-exp, f32, contiguous `[batch, heads_q, seqlen_q]`, natural logarithm.
    pub lse: u64,
    /// Device address of each query's largest q.k, with the layout of lse; 0 if it is not wanted.
    pub row_max: u64,
    /// Device address of each query's sum of weights relative to that of the largest q.k, with the layout of lse.
    /// Used only if `row_max` is.
    pub row_sum: u64,
    /// Values as a strided tensor, for the few elements that are read one by one.
    pub values: StridedTensor,
    /// head_dim of v and out, and alignment.
    pub layout: Layout,
    /// Number of heads of a batch entry, counting packed heads as one.
    pub heads: NonZeroU32,
    /// Number of these heads that share one key/value head.
    pub heads_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// Query tiles of all heads, one for each block of a cluster.
    pub work: WorkList,
    /// `softmax_scale * log2(e)`; the scale is positive.
    pub scale_log2: f32,
    /// Base-2 logarithm of the number of packed query heads: row `r` of a head is query `r >> packed_log2`.
    pub packed_log2: u32,
    /// Pads the struct to a multiple of 64 bytes.
    pub reserved: [u32; 3],
}

/// Tiles of work that persistent blocks share, as [`deal`](crate::deal) describes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WorkList {
    /// Number of tiles of a head. In clusters of blocks one counts for all tiles of a cluster.
    pub tiles_per_head: NonZeroU32,
    /// Number of heads of all batch entries.
    pub heads: u32,
    /// Number of blocks of the launch, or of its clusters.
    pub blocks: u32,
    /// Under a causal mask, number of rounds in which every block has a share. Single tiles come after them.
    pub rounds: u32,
    /// First head with single tiles.
    pub head: u32,
    /// Number of tiles at either end of this head that belong to shares.
    pub dealt: u32,
    /// Number of blocks that have no tile in the round of the shortest ones.
    pub missing: u32,
}

/// Parameters of the backward kernels for Hopper. Tensors of keys have boxes of
/// [`key_box_rows`](crate::shape::key_box_rows) rows, tensors of queries boxes of `block_m` rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperBackwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: TensorMap,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub k: TensorMap,
    /// Values, `[batch, heads_kv, seqlen_k, head_dim_v]`.
    pub v: TensorMap,
    /// Gradient of the output, `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub dout: TensorMap,
    /// Gradient of k, with the shape of k.
    pub dk: TensorMap,
    /// Gradient of v, with the shape of v.
    pub dv: TensorMap,
    /// Workspace filled by the preprocess kernel.
    pub sums: QuerySums,
    /// Number of query heads.
    pub heads_q: NonZeroU32,
    /// Number of key/value heads.
    pub heads_kv: NonZeroU32,
    /// Number of query heads that share one key/value head.
    pub heads_q_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// `softmax_scale`, of either sign.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// Tiles of keys of all heads.
    pub work: WorkList,
    /// Gradient of the output as a strided tensor, for the few elements that are read one by one.
    pub dout_rows: StridedTensor,
    /// head_dim of v and dout, and alignment.
    pub layout: Layout,
    /// Pads the struct to a multiple of 64 bytes.
    pub reserved: [u32; 10],
}

/// Workspace of the backward kernels for Hopper: per-query arrays of `[batch, heads_q, padded_q]`, 16-byte aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QuerySums {
    /// Statistics for recomputing weights; all are 0 from query `seqlen_q` on.
    pub exponents: Exponents,
    /// Device address of the dQ accumulator before scaling, f32, `dq_columns` per query. It consists of squares of 64
    /// queries and 64 columns, each in the order of a warpgroup's registers.
    pub dq: u64,
    /// Device address of the dQ semaphores, or 0 to accumulate in any order: one u32 for each square, the number of
    /// key tiles added to it so far. A warpgroup uses that of its first square.
    pub turns: u64,
    /// Number of queries of a head, padded to whole tiles of the kernel that streams them.
    pub padded_q: NonZeroU32,
    /// Columns of the dQ accumulator, a multiple of 64.
    pub dq_columns: u32,
}

/// Parameters of the preprocess and postprocess kernels for Hopper: the first fills `sums`, the last converts the
/// accumulator to dQ.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QuerySumsParams {
    /// Forward output, `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: StridedTensor,
    /// Gradient of the output, with the shape of out.
    pub dout: StridedTensor,
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`.
    pub dq: StridedTensor,
    /// Statistics of each query, from forward.
    pub rows: ForwardRows,
    /// Workspace.
    pub sums: QuerySums,
    /// Number of query heads.
    pub heads_q: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Number of tiles of a head.
    pub tiles: NonZeroU32,
    /// `softmax_scale`, of either sign.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// Alignment of all tensors, and head_dim: of dq for the kernel that finishes it, of out for the others.
    pub layout: Layout,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

params!(HopperForwardParams);
params!(HopperBackwardParams);
params!(QuerySumsParams);

const _: () = {
    assert!(size_of::<HopperForwardParams>() == 4 * 128 + 3 * 8 + 32 + 18 * 4);
    assert!(size_of::<QuerySums>() == 7 * 8);
    assert!(size_of::<HopperBackwardParams>() == 6 * 128 + 56 + 32 + 26 * 4);
    assert!(size_of::<QuerySumsParams>() == 3 * 32 + 24 + 56 + 8 * 4);
};
