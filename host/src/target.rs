//! [`DeviceInfo`]: what a plan depends on, as plain numbers. A plan can be made for a device that is not there.

/// The oldest compute capability that kernels are compiled for: major, minor.
pub(crate) const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

/// The numbers of a device that plans depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceInfo {
    /// Native code.
    Cpu {
        /// Threads that share the work.
        threads: usize,
    },
    /// Compiled kernels, on a GPU or emulated.
    Gpu {
        /// Compute capability: major, minor.
        compute_capability: (u32, u32),
        /// Streaming multiprocessors.
        multiprocessors: u32,
        /// Shared memory that one block may have, in bytes.
        shared_bytes_per_block: u32,
    },
}

impl DeviceInfo {
    /// A GPU of this compute capability, with so many multiprocessors and bytes of shared memory a block.
    pub const fn gpu(compute_capability: (u32, u32), multiprocessors: u32, shared_bytes_per_block: u32) -> Self {
        Self::Gpu {
            compute_capability,
            multiprocessors,
            shared_bytes_per_block,
        }
    }
}
