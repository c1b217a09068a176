//! What crosses the bus: the structs a kernel takes by value.
//!
//! Both sides compile this file, so a field can not mean one thing to the host and another to the kernel. Every
//! struct is `repr(C)`, holds only 4- and 8-byte scalars, and has no padding: its bytes are the parameter buffer.

use core::num::NonZeroU32;

/// A `[batch, heads, seqlen, head_dim]` tensor in device memory, its last axis contiguous.
///
/// Strides count elements and are 64-bit: a tensor may pass 2^31 elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StridedTensor {
    /// Device address of element `[0, 0, 0, 0]`.
    pub address: u64,
    /// Elements from one batch entry to the next.
    pub batch_stride: u64,
    /// Elements from one head to the next.
    pub head_stride: u64,
    /// Elements from one position of the sequence to the next.
    pub row_stride: u64,
}

/// Parameters of every forward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ForwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: StridedTensor,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub k: StridedTensor,
    /// Values, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub v: StridedTensor,
    /// Output, `[batch, heads_q, seqlen_q, head_dim]`.
    pub out: StridedTensor,
    /// Device address of the log-sum-exp, f32, contiguous `[batch, heads_q, seqlen_q]`, natural logarithm.
    pub lse: u64,
    /// Device address of each query's largest q.k, as lse, or 0 if it is not wanted.
    pub row_max: u64,
    /// Device address of each query's sum of weights relative to that key's, as lse; used if `row_max` is.
    pub row_sum: u64,
    /// Query heads.
    pub heads_q: NonZeroU32,
    /// Query heads that share one key/value head.
    pub heads_q_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// Query tiles a head has, `ceil(seqlen_q / block_m)`.
    pub query_tiles: NonZeroU32,
    /// `|softmax_scale| * log2(e)`, or 1 where the scale is 0.
    pub scale_log2: f32,
    /// Sign of `softmax_scale`: -1, 0 or 1. The kernel multiplies Q by it, so that the running maximum stays a maximum.
    pub scale_sign: f32,
    /// What the tensors have in common.
    pub layout: Layout,
    /// `|softmax_scale|`, or 1 where the scale is 0: for standard attention, which scales before the softmax.
    pub scale: f32,
}

/// Parameters of every backward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: StridedTensor,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub k: StridedTensor,
    /// Values, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub v: StridedTensor,
    /// Forward's output, as q.
    pub out: StridedTensor,
    /// Gradient of the output, as q.
    pub dout: StridedTensor,
    /// Gradient of q, as q.
    pub dq: StridedTensor,
    /// Gradient of k, as k.
    pub dk: StridedTensor,
    /// Gradient of v, as v.
    pub dv: StridedTensor,
    /// What forward left of each query.
    pub rows: ForwardRows,
    /// What the first kernel makes of it.
    pub exponents: Exponents,
    /// Query heads.
    pub heads_q: NonZeroU32,
    /// Key/value heads.
    pub heads_kv: NonZeroU32,
    /// Query heads that share one key/value head.
    pub heads_q_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// Tiles that the sequence which a block of the kernel owns has: queries, or keys in `backward_keys`.
    pub tiles: NonZeroU32,
    /// `softmax_scale`, of either sign: no maximum is taken here.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// What the tensors have in common.
    pub layout: Layout,
}

/// What forward leaves of each query: device addresses of f32, contiguous `[batch, heads_q, seqlen_q]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardRows {
    /// Log-sum-exp, natural logarithm.
    pub lse: u64,
    /// Largest q.k, or 0 if lse is all there is.
    pub row_max: u64,
    /// Sum of weights relative to that key's; used if `row_max` is.
    pub row_sum: u64,
}

/// How backward recomputes weights: P = exp2((s - shift) * scale_log2 - lse_log2), with delta = rowsum(dO * O) beside it. Device
/// addresses of f32, one a query.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exponents {
    /// Logarithm to base 2 of the sum of weights relative to `shift`.
    pub lse_log2: u64,
    /// rowsum(dO * O).
    pub delta: u64,
    /// Score that is subtracted before others are scaled; 0 where that changes nothing in 16 bits.
    pub shift: u64,
    /// A u32 for each `DELTA_ROWS` queries of a head: 1 if any of them has a shift, or an exponent so large that a weight may
    /// come out above 1.
    pub far: u64,
}

/// A tensor as the tensor memory accelerator knows it: 128 opaque bytes that the driver makes (`cuTensorMapEncodeTiled`).
///
/// Dimensions are head_dim, packed heads, seqlen, heads, batch, innermost first. The box is 64 columns of as many rows as
/// the kernel copies at once, swizzled in rows of 128 bytes; what lies outside the tensor reads as zeros. Heads are packed
/// where several of them follow each other in a tile, position by position; else there is one.
///
/// The hardware wants it at a multiple of 64 bytes, which is where the compiled kernels' parameters start (rustc takes no
/// more than 16 from a struct, so `cargo xtask ptx` says it).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// Parameters of the forward kernels for Hopper.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperForwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`, in boxes of 64 rows.
    pub q: TensorMap,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`, in boxes of `block_n` rows.
    pub k: TensorMap,
    /// Values, as k.
    pub v: TensorMap,
    /// Output, as q.
    pub out: TensorMap,
    /// Device address of the log-sum-exp, f32, contiguous `[batch, heads_q, seqlen_q]`, natural logarithm.
    pub lse: u64,
    /// Device address of each query's largest q.k, as lse, or 0 if it is not wanted.
    pub row_max: u64,
    /// Device address of each query's sum of weights relative to that key's, as lse; used if `row_max` is.
    pub row_sum: u64,
    /// Values once more, for the few that are read one by one.
    pub values: StridedTensor,
    /// What the tensors have in common.
    pub layout: Layout,
    /// Heads of a batch entry: query heads, or what they are packed into.
    pub heads: NonZeroU32,
    /// Such heads that share one key/value head.
    pub heads_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// The query tiles of all heads.
    pub work: WorkList,
    /// `softmax_scale * log2(e)`; the scale is positive.
    pub scale_log2: f32,
    /// `1 << packed_log2` query heads are packed: row `r` of a head is query `r >> packed_log2`.
    pub packed_log2: u32,
    /// Fills the struct up to a multiple of 64 bytes.
    pub reserved: [u32; 7],
}

/// Tiles of work that blocks which stay for the whole launch share out between them, as [`deal`](crate::deal) says.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WorkList {
    /// Tiles a head has.
    pub tiles_per_head: NonZeroU32,
    /// Heads of all batch entries.
    pub heads: u32,
    /// Blocks of the launch.
    pub blocks: u32,
}

/// Parameters of the backward kernels for Hopper. The tensors that a block owns are in boxes of 64 rows, those that it
/// streams in boxes of `block_n` or `block_m`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperBackwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: TensorMap,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub k: TensorMap,
    /// Values, as k.
    pub v: TensorMap,
    /// Gradient of the output, as q.
    pub dout: TensorMap,
    /// Gradient of q, as q.
    pub dq: TensorMap,
    /// Gradient of k, as k.
    pub dk: TensorMap,
    /// Gradient of v, as k.
    pub dv: TensorMap,
    /// What the first kernel left.
    pub sums: QuerySums,
    /// Query heads.
    pub heads_q: NonZeroU32,
    /// Key/value heads.
    pub heads_kv: NonZeroU32,
    /// Query heads that share one key/value head.
    pub heads_q_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// `softmax_scale`, of either sign.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// The tiles of all heads: of queries, or of keys where a block owns keys.
    pub work: WorkList,
    /// Gradient of the output once more, for the few elements that are read one by one.
    pub dout_rows: StridedTensor,
    /// What the tensors have in common.
    pub layout: Layout,
    /// Fills the struct up to a multiple of 64 bytes.
    pub reserved: [u32; 14],
}

/// What the backward kernels for Hopper keep of each query beside the tensors: workspace, `[batch, heads_q, padded_q]` with
/// a line of each sum a query, 16-byte aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QuerySums {
    /// How weights are recomputed; all 0 from `seqlen_q` on.
    pub exponents: Exponents,
    /// Device address of dQ before it is scaled, f32, `dq_columns` a query: by squares of 64 queries and 64 columns, in those
    /// in the order of a warpgroup's registers.
    pub dq: u64,
    /// Device address of a u32 for each of those squares: how many tiles of keys have been added to it. 0 if they are added in
    /// any order.
    pub turns: u64,
    /// Queries of a head, padded to whole tiles of the kernel that streams them.
    pub padded_q: NonZeroU32,
    /// 64 or 128, or 0 if dQ is not added up.
    pub dq_columns: u32,
}

/// Parameters of the kernels for Hopper that come before and after the others of a backward pass: of the first, which makes
/// `sums`, and of the last, which makes dQ of them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QuerySumsParams {
    /// Forward's output, `[batch, heads_q, seqlen_q, head_dim]`.
    pub out: StridedTensor,
    /// Gradient of the output, as out.
    pub dout: StridedTensor,
    /// Gradient of q, as out.
    pub dq: StridedTensor,
    /// What forward left of each query.
    pub rows: ForwardRows,
    /// Where the sums are.
    pub sums: QuerySums,
    /// Query heads.
    pub heads_q: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Tiles of a head.
    pub tiles: NonZeroU32,
    /// `softmax_scale`, of either sign.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// What the tensors have in common.
    pub layout: Layout,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// What the tensors of a call have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Elements of a head that exist; the compiled tile may be wider.
    pub head_dim: u32,
    /// 1 if every address and every stride of every `StridedTensor` of the call is a multiple of 16 bytes, so that
    /// 16-byte accesses are legal.
    pub aligned: u32,
}

/// The bytes of a parameter struct, as a launch takes them.
///
/// # Safety of implementors
/// `repr(C)`, no padding, no pointers that the host must keep alive: upheld by `const` assertions below.
pub trait Params: Copy {
    /// The struct as bytes.
    fn as_bytes(&self) -> &[u8];
}

macro_rules! params {
    ($type:ident) => {
        impl Params for $type {
            fn as_bytes(&self) -> &[u8] {
                // SAFETY: repr(C) without padding (asserted below), so every byte is initialised; the slice borrows self.
                unsafe { core::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
            }
        }
    };
}
#[cfg(feature = "study")]
pub(crate) use params;

params!(ForwardParams);
params!(BackwardParams);
params!(HopperForwardParams);
params!(HopperBackwardParams);
params!(QuerySumsParams);

const _: () = {
    assert!(size_of::<StridedTensor>() == 4 * 8);
    assert!(size_of::<ForwardParams>() == 4 * 32 + 3 * 8 + 10 * 4);
    assert!(size_of::<HopperForwardParams>() == 4 * 128 + 3 * 8 + 32 + 18 * 4);
    assert!(size_of::<QuerySums>() == 7 * 8);
    assert!(size_of::<HopperBackwardParams>() == 7 * 128 + 56 + 32 + 26 * 4);
    assert!(size_of::<QuerySumsParams>() == 3 * 32 + 24 + 56 + 8 * 4);
    assert!(size_of::<BackwardParams>() == 8 * 32 + 7 * 8 + 10 * 4);
};
