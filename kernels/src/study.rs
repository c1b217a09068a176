//! Kernels of the study of memory traffic, which measures FlashAttention's claim: the fused kernel with several
//! amounts of SRAM, and standard attention. They are not needed to run attention. They have their own table and
//! archive, behind the feature `study`.

#[cfg(target_arch = "nvptx64")]
mod standard;

use crate::abi::{ForwardParams, Params, params};
use crate::entries::{Arch, Dtype, Entry};
use crate::shape::{ForwardF32D64, PORTABLE_SHARED_BYTES, TileShape, TileSizes, loads_evenly, simt_shape};
#[cfg(target_arch = "nvptx64")]
use crate::tile::lanes::LaneRows;
use core::num::NonZeroU32;

/// Result that a kernel of the study computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// Attention: forward with another amount of SRAM than the regular kernel.
    Flash,
    /// Standard attention, first kernel: S = scale * Q K^T.
    StandardScores,
    /// Standard attention, second kernel: P = softmax(S).
    StandardSoftmax,
    /// Standard attention, third kernel: O = P V.
    StandardOutput,
}

/// Parameters of the three kernels of standard attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StandardParams {
    /// Parameters of attention.
    pub forward: ForwardParams,
    /// Device address of the scores, then probabilities: f32, contiguous `[batch, heads_q, seqlen_q, seqlen_k]`.
    pub scores: u64,
    /// Number of key tiles of a head, `ceil(seqlen_k / block_n)`.
    pub key_tiles: NonZeroU32,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

params!(StandardParams);

const _: () = assert!(size_of::<StandardParams>() == size_of::<ForwardParams>() + 8 + 2 * 4);

// One head_dim, with more and more queries per block, so more SRAM and less traffic.
simt_shape!(StudyM16, FORWARD_BYTES: 16 x 64, head_dim 64, warps 2, stages 2);
simt_shape!(StudyM32, FORWARD_BYTES: 32 x 64, head_dim 64, warps 4, stages 2);
simt_shape!(StudyM64, FORWARD_BYTES: 64 x 64, head_dim 64, warps 8, stages 2);
simt_shape!(StudyM128, FORWARD_BYTES: 128 x 64, head_dim 64, warps 16, stages 2);

/// Dynamic shared memory of a block of the fused kernel, in bytes.
const fn flash_bytes<S: TileShape>() -> u32 {
    S::FORWARD_BYTES
}

/// Dynamic shared memory of a block of standard attention, in bytes: one tile of each side.
const fn standard_bytes<S: TileShape>() -> u32 {
    S::OWNED_BYTES + S::STREAMED_BYTES
}

const fn entry<S: TileShape>(name: &'static str, step: Step, shared_bytes: u32, causal: bool) -> Entry<Step> {
    Entry {
        name,
        pass: step,
        arch: Arch::Sm80,
        dtype: Dtype::F32,
        causal,
        program: false,
        quantized: false,
        head_dim: S::HEAD_DIM,
        block_m: S::ROWS,
        block_n: S::COLUMNS,
        threads: S::THREADS,
        min_blocks: 1,
        shared_bytes,
        two_walks: false,
        cluster: 1,
    }
}

macro_rules! kernels {
    ($($name:literal: $step:ident, $shape:ty, $bytes:ident, $($function:ident)::+($params:ident);)*) => {
        /// All kernels of the study, full and causal.
        pub const KERNELS: &[Entry<Step>] = &[$(
            entry::<$shape>($name, Step::$step, $bytes::<$shape>(), false),
            entry::<$shape>(concat!($name, "_causal"), Step::$step, $bytes::<$shape>(), true),
        )*];
        $(
            #[cfg(target_arch = "nvptx64")]
            crate::entries::kernel!($name, $($function)::+, $params, $shape, false);
            #[cfg(target_arch = "nvptx64")]
            crate::entries::kernel!(concat!($name, "_causal"), $($function)::+, $params, $shape, true);
        )*
    };
}

kernels! {
    "study_f32_d64_m16": Flash, StudyM16, flash_bytes, forward::forward(ForwardParams);
    "study_f32_d64_m32": Flash, StudyM32, flash_bytes, forward::forward(ForwardParams);
    "study_f32_d64_m64": Flash, StudyM64, flash_bytes, forward::forward(ForwardParams);
    "study_f32_d64_m128": Flash, StudyM128, flash_bytes, forward::forward(ForwardParams);
    "standard_scores_f32_d64": StandardScores, ForwardF32D64, standard_bytes, study::standard::scores(StandardParams);
    "standard_softmax_f32_d64": StandardSoftmax, ForwardF32D64, standard_bytes, study::standard::softmax(StandardParams);
    "standard_output_f32_d64": StandardOutput, ForwardF32D64, standard_bytes, study::standard::output(StandardParams);
}
