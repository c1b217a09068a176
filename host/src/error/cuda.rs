//! [`CudaUnavailable`]: what a machine or a build lacks for CUDA.

use std::fmt;

/// The part of CUDA that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// The program was built without the feature `cuda`.
    NotBuilt,
    /// The driver's library is not installed.
    NoDriver,
    /// The driver is installed, but there is no GPU.
    NoGpu,
    /// The driver is older than the kernels need.
    DriverTooOld {
        /// CUDA version of the driver: major, minor.
        found: (u32, u32),
        /// Oldest CUDA version that is supported: major, minor.
        needed: (u32, u32),
    },
    /// The GPU is older than the kernels need.
    GpuTooOld {
        /// Name of the GPU.
        name: String,
        /// Compute capability of the GPU: major, minor.
        found: (u32, u32),
        /// Oldest compute capability that is supported: major, minor.
        needed: (u32, u32),
    },
    /// The driver is installed but does not start; the text is its error.
    Broken(String),
}

/// Writes the part that is missing.
impl fmt::Display for CudaUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => write!(f, "this build leaves out the feature `cuda` of flash-attention"),
            Self::NoDriver => write!(f, "no NVIDIA driver is installed (libcuda was not found)"),
            Self::NoGpu => write!(f, "the NVIDIA driver finds no GPU"),
            Self::DriverTooOld { found, needed } => write!(
                f,
                "the NVIDIA driver supports CUDA {}.{}, {}.{} or newer is needed",
                found.0, found.1, needed.0, needed.1
            ),
            Self::GpuTooOld { name, found, needed } => write!(
                f,
                "{name} has compute capability {}.{}, {}.{} or newer is needed",
                found.0, found.1, needed.0, needed.1
            ),
            Self::Broken(reason) => write!(f, "the NVIDIA driver does not start: {reason}"),
        }
    }
}

impl std::error::Error for CudaUnavailable {}
