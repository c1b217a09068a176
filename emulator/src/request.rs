//! A launch request: kernel, grid, parameters and options.

use crate::check::Checks;

/// A kernel with its grid and parameters.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Name of the kernel.
    pub entry: &'a str,
    /// Number of blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads per block in x, y, z.
    pub block: [u32; 3],
    /// Blocks per cluster in x, y, z; `[1, 1, 1]` without clusters.
    pub cluster: [u32; 3],
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// Parameter buffer, with each parameter at its offset (see [`Entry::params`](crate::Entry::params)).
    pub params: &'a [u8],
}

/// Options of a launch.
#[derive(Debug, Clone)]
pub struct Options {
    /// Seed of the order of warps and of the times at which asynchronous work lands.
    pub seed: u64,
    /// Selection of checks.
    pub checks: Checks,
    /// Number of thread instructions after which the launch is stopped with
    /// [`Error::Runaway`](crate::error::Error::Runaway).
    pub max_instructions: Option<u64>,
    /// Number of host threads; `None` for all cores. Results do not depend on it.
    pub threads: Option<usize>,
    /// Number of findings that are kept; the others are only counted.
    pub max_findings: usize,
    /// Largest shared memory of a block, in bytes. `None` for that of the module's target: 163 KiB for sm_80, 227 KiB
    /// for sm_90.
    pub max_shared_bytes: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            checks: Checks::all(),
            max_instructions: Some(1 << 36),
            threads: None,
            max_findings: 64,
            max_shared_bytes: None,
        }
    }
}
