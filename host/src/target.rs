//! [`DeviceInfo`]: what a plan depends on of a device. A plan can be made for a device that does not exist.

use std::fmt;

use flash_attention_kernels::entries::Dtype;

/// Oldest compute capability that kernels are compiled for: major, minor.
pub(crate) const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

/// Properties of a device that plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceInfo {
    /// A CPU, which runs native code.
    Cpu {
        /// Number of threads that share the work, at most.
        threads: usize,
        /// Instructions of the inner loops.
        instructions: Instructions,
    },
    /// A GPU, real or emulated, which runs compiled kernels.
    Gpu {
        /// Compute capability: major, minor.
        compute_capability: (u32, u32),
        /// Number of streaming multiprocessors.
        multiprocessors: u32,
        /// Largest shared memory of one block, in bytes.
        shared_bytes_per_block: u32,
    },
}

impl DeviceInfo {
    /// Describes a CPU whose calls use up to this number of threads, and these instructions.
    pub const fn cpu(threads: usize, instructions: Instructions) -> Self {
        Self::Cpu { threads, instructions }
    }

    /// Describes a GPU of this compute capability, with this number of multiprocessors and bytes of shared memory per
    /// block.
    pub const fn gpu(compute_capability: (u32, u32), multiprocessors: u32, shared_bytes_per_block: u32) -> Self {
        Self::Gpu {
            compute_capability,
            multiprocessors,
            shared_bytes_per_block,
        }
    }
}

/// Instructions that the CPU's inner loops are compiled for, those of aarch64 and x86-64 alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Instructions {
    /// Those of every processor of the architecture.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512F.
    Avx512,
    /// AVX-512F, and dot products of bf16.
    Avx512Bf16,
    /// AVX-512F, and matrix products of bf16.
    Amx,
    /// NEON.
    Neon,
    /// NEON, and matrix products of bf16.
    NeonBf16,
}

impl Instructions {
    /// Name in `FLASH_ATTENTION_CPU` and in a device's text, as in `cpu:avx2`.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonBf16 => "neonbf16",
        }
    }

    /// Number of bf16 parts that an element is split into where products of pairs of bf16 are faster than those of f32; 0 where they
    /// are not. f32 is the sum of three parts, f16 of two.
    pub(crate) const fn bf16_parts(self, dtype: Dtype) -> usize {
        match (self, dtype) {
            (Self::Amx, Dtype::F32) => 3,
            (Self::Amx, Dtype::F16) => 2,
            // Products of parts of f16 take as long as one of f32 there, mostly for arranging the operands.
            (Self::Amx | Self::Avx512Bf16 | Self::NeonBf16, Dtype::Bf16) => 1,
            _ => 0,
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
            Self::Avx512Bf16 => "AVX-512 and AVX512-BF16",
            Self::Amx => "AVX-512 and AMX",
            Self::Neon => "NEON",
            Self::NeonBf16 => "NEON and BF16",
        })
    }
}
