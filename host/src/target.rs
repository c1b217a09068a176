//! [`DeviceInfo`]: the numbers of a device that a plan depends on. A plan can be made for a device that does not
//! exist.

/// Oldest compute capability that kernels are compiled for: major, minor.
pub(crate) const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

/// Numbers of a device that plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceInfo {
    /// A CPU, which runs native code.
    Cpu {
        /// Number of threads that share the work.
        threads: usize,
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
