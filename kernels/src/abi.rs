//! Kernel parameters: the structs that a kernel takes by value.
//!
//! Host and kernels both compile this file, so a field cannot mean one thing to the host and another to the kernel.
//! Every struct is `repr(C)`, holds only 4- and 8-byte scalars, and has no padding: its bytes are the parameter
//! buffer.

use core::num::NonZeroU32;

use crate::work::{Divisor, SequenceRows, TileRun, TileWork, TokenMove};

/// A `[batch, heads, seqlen, head_dim]` tensor in device memory, its last axis contiguous.
///
/// Strides count elements and have 64 bits: a tensor may have more than 2^31 elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StridedTensor {
    /// Device address of element `[0, 0, 0, 0]`.
    pub address: u64,
    /// Stride of the batch axis, in elements.
    pub batch_stride: u64,
    /// Stride of the heads axis, in elements.
    pub head_stride: u64,
    /// Stride of the seqlen axis, in elements.
    pub row_stride: u64,
}

impl StridedTensor {
    /// Tells if the rows begin at the elements at which those of `other` do. The values of latent attention have the rows of their keys,
    /// and their kernel loads both at once.
    #[inline(always)]
    pub fn has_rows_of(&self, other: &Self) -> bool {
        self == other
    }
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
    /// Device address of each query's largest q.k, with the layout of lse; 0 if it is not wanted.
    pub row_max: u64,
    /// Device address of each query's sum of weights relative to that of the largest q.k, with the layout of lse.
    /// Used only if `row_max` is.
    pub row_sum: u64,
    /// Number of query heads.
    pub heads_q: NonZeroU32,
    /// Number of query heads that share one key/value head.
    pub heads_q_per_kv: NonZeroU32,
    /// Length of the query sequence.
    pub seqlen_q: u32,
    /// Length of the key sequence.
    pub seqlen_k: u32,
    /// Number of query tiles of a head, `ceil(seqlen_q / block_m)`.
    pub query_tiles: NonZeroU32,
    /// `|softmax_scale| * log2(e)`, or 1 where the scale is 0.
    pub scale_log2: f32,
    /// Sign of `softmax_scale`: -1, 0 or 1. The kernel multiplies Q by it, so that the running maximum stays a
    /// maximum.
    pub scale_sign: f32,
    /// head_dim and alignment of all tensors.
    pub layout: Layout,
    /// `|softmax_scale|`, or 1 where the scale is 0. For standard attention, which scales before the softmax.
    pub scale: f32,
}

/// Lists of [`work`](crate::work), as device addresses, 4-byte aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WorkLists {
    /// A [`TileWork`] for every `heads` blocks: block `b` takes number `b / heads`, and of its heads number
    /// `b % heads`. 0 if there is no list: the grid is tiles, heads and batch entries, fastest first.
    pub tiles: u64,
    /// The [`SequenceRows`] of each sequence.
    pub sequences: u64,
    /// The [`TileRun`]s of all work.
    pub runs: u64,
    /// Number of neighbouring heads that share an entry of `tiles`: all of them, or 1 where heads have runs of their own.
    pub heads: NonZeroU32,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

impl WorkLists {
    /// No list.
    pub const NONE: Self = Self {
        tiles: 0,
        sequences: 0,
        runs: 0,
        heads: NonZeroU32::MIN,
        reserved: 0,
    };
}

/// Pages of a cache: key `n` of an entry is row `n % size` of page `table[entry * entries + n / size]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PageTable {
    /// Device address of the block table, i32 `[batch, entries]`; 0 if the cache has no pages.
    pub table: u64,
    /// Number of pages of a sequence's row in the table.
    pub entries: u32,
    /// Number of rows of a page.
    pub size: Divisor,
}

/// Parameters of the forward kernels that take score programs and listed work, and of the kernel that combines their partial
/// results.
///
/// With a list, q and the results are `[entries, heads_q, rows, head_dim]` and [`seqlen_q`](ForwardParams::seqlen_q) is their number
/// of rows, so that lse of ragged batches is `[heads_q, total_q]`. k and v are `[entries, heads_kv, rows, head_dim]`, or
/// `[pages, heads_kv, page_size, head_dim]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ListedForwardParams {
    /// Tensors and sizes; v and out have a head_dim of their own.
    pub forward: ForwardParams,
    /// head_dim and alignment of v and out.
    pub values: Layout,
    /// Work of the blocks.
    pub work: WorkLists,
    /// Pages of k and v.
    pub pages: PageTable,
    /// Device address of partial results: for each place and head `block_m` rows of f32 outputs, then `block_m` row_max and
    /// `block_m` row_sum, of this split's keys.
    pub partial: u64,
    /// Rows of a place of partial results, at most those of a tile.
    pub block_m: u32,
    /// Number of query heads packed into the rows of a tile, all with the same keys; a head of the work is that many.
    pub packed: Divisor,
    /// 1 for a causal mask that no score program has, else 0.
    pub causal: u32,
    /// 1 if no score program changes or hides scores, so that a row of visible scores that are all minus infinity is NaN.
    pub plain: u32,
}

/// Parameters of every backward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BackwardParams {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: StridedTensor,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]`.
    pub k: StridedTensor,
    /// Values, `[batch, heads_kv, seqlen_k, head_dim_v]`.
    pub v: StridedTensor,
    /// Forward output, `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: StridedTensor,
    /// Gradient of the output, with the shape of out.
    pub dout: StridedTensor,
    /// Gradient of q, with the shape of q.
    pub dq: StridedTensor,
    /// Gradient of k, with the shape of k.
    pub dk: StridedTensor,
    /// Gradient of v, with the shape of v.
    pub dv: StridedTensor,
    /// Statistics of each query, from forward.
    pub rows: ForwardRows,
    /// Workspace that the preprocess kernel fills from these statistics.
    pub exponents: Exponents,
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
    /// Number of tiles of a head in the sequence that a block owns: keys in `backward_dkv`, else queries.
    pub tiles: NonZeroU32,
    /// `softmax_scale`, of either sign: backward takes no maximum.
    pub softmax_scale: f32,
    /// `softmax_scale * log2(e)`.
    pub scale_log2: f32,
    /// head_dim and alignment of all tensors.
    pub layout: Layout,
    /// Source of delta of queries that few keys share: rowsum(dO * O) as for others, [`DELTA_OF_KEYS`] or
    /// [`DELTA_OF_KEYS_AND_SINK`].
    pub delta: u32,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

/// delta is the sum of P * dP over the keys, relative to that of P. In f32, with statistics of each query.
pub const DELTA_OF_KEYS: u32 = 1;

/// delta is the sum of P * dP over the keys, where a sink has a part of the weight.
pub const DELTA_OF_KEYS_AND_SINK: u32 = 2;

/// Parameters of the backward kernels that take score programs and listed work.
///
/// Tensors are `[entries, heads, rows, head_dim]`: [`seqlen_q`](BackwardParams::seqlen_q) and
/// [`seqlen_k`](BackwardParams::seqlen_k) are the rows of an entry, of one sequence or of several end to end, and statistics are
/// `[entries, heads_q, rows]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ListedBackwardParams {
    /// Tensors and sizes; v, out and their gradients have a head_dim of their own.
    pub backward: BackwardParams,
    /// head_dim and alignment of v, out and their gradients.
    pub values: Layout,
    /// Work of the blocks. Its heads are those of keys where a block owns keys.
    pub work: WorkLists,
    /// Number of entries of the list that a block has: 1, or one for each of the query heads that share its keys where these
    /// have runs of their own.
    pub lists_of_block: u32,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

/// Statistics of each query, from forward: device addresses of f32, contiguous `[batch, heads_q, seqlen_q]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardRows {
    /// Log-sum-exp, natural logarithm.
    pub lse: u64,
    /// Largest q.k, or 0 if only lse is given.
    pub row_max: u64,
    /// Sum of weights relative to that of the largest q.k; used only if `row_max` is.
    pub row_sum: u64,
}

/// Statistics from which backward recomputes weights, as device addresses of one f32 per query: P = exp2((s - shift)
/// * scale_log2 - lse_log2), and delta = rowsum(dO * O).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exponents {
    /// Base-2 logarithm of the sum of weights relative to `shift`.
    pub lse_log2: u64,
    /// rowsum(dO * O).
    pub delta: u64,
    /// Score that is subtracted from others before they are scaled; 0 in 16 bits where that changes nothing.
    pub shift: u64,
    /// One u32 for each `DELTA_ROWS` queries of a head: 1 if any of them has a shift, or an exponent so large that a
    /// recomputed weight might exceed 1.
    pub far: u64,
}

/// Parameters of the kernels that turn and move the rows of tokens, `[heads, head_dim]` each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RotaryParams {
    /// Device address of the tensor that is read.
    pub from: u64,
    /// Stride of its heads, in elements.
    pub from_head_stride: u64,
    /// Stride of the elements of a head, in elements.
    pub from_column_stride: u64,
    /// Device address of the tensor that is written, with the elements of a head contiguous.
    pub to: u64,
    /// Stride of its heads, in elements.
    pub to_head_stride: u64,
    /// Device address of a [`TokenMove`] for each block, 8-byte aligned.
    pub tokens: u64,
    /// Device address of angles, 8-byte aligned: the phase of each pair at position 1, u64 `[pairs]`, or cosines and sines, f32
    /// `[positions, pairs, 2]`.
    pub angles: u64,
    /// 1 if the angles are cosines and sines, else 0.
    pub tables: u32,
    /// Number of heads.
    pub heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Number of pairs of a head that are turned; the elements behind them are copied.
    pub pairs: u32,
    /// 1 if pairs are neighbours, 0 if they are halves of the elements that are turned.
    pub interleaved: u32,
    /// 1, or -1 to turn back.
    pub sign: f32,
}

/// Properties that tensors of a call share.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Elements of a head; the compiled tile may be wider.
    pub head_dim: u32,
    /// 1 if every address and every stride of every `StridedTensor` of the call is a multiple of 16 bytes, so that
    /// 16-byte accesses are allowed; else 0.
    pub aligned: u32,
}

/// A parameter struct or an entry of a list, as bytes for a launch.
///
/// # Safety of implementors
/// `repr(C)`, no padding, no pointers that the host must keep alive; `const` assertions below check the first two.
pub trait Params: Copy {
    /// Returns the struct as bytes.
    fn as_bytes(&self) -> &[u8];
}

macro_rules! params {
    ($type:ident) => {
        impl Params for $type {
            fn as_bytes(&self) -> &[u8] {
                // SAFETY: repr(C) without padding (asserted below), so every byte is initialised; the slice borrows
                // self.
                unsafe { core::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
            }
        }
    };
}
#[cfg(feature = "study")]
pub(crate) use params;

mod fp8;
mod hopper;

pub use fp8::{FP8_SCALE_ROWS, Fp8ForwardParams, Scales};
pub use hopper::{HopperBackwardParams, HopperForwardParams, QuerySums, QuerySumsParams, TensorMap, WorkList};

params!(ForwardParams);
params!(ListedForwardParams);
params!(BackwardParams);
params!(ListedBackwardParams);
params!(TileWork);
params!(SequenceRows);
params!(TileRun);
params!(RotaryParams);
params!(TokenMove);

const _: () = {
    assert!(size_of::<StridedTensor>() == 4 * 8);
    assert!(size_of::<ForwardParams>() == 4 * 32 + 3 * 8 + 10 * 4);
    assert!(size_of::<ListedForwardParams>() == 192 + 8 + 32 + 24 + 8 + 6 * 4);
    assert!(size_of::<BackwardParams>() == 8 * 32 + 7 * 8 + 12 * 4);
    assert!(size_of::<ListedBackwardParams>() == 360 + 8 + 32 + 8);
    assert!(size_of::<RotaryParams>() == 7 * 8 + 6 * 4);
    assert!(size_of::<TokenMove>() == 3 * 8);
};
