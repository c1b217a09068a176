//! A launch: which kernel on how many blocks, and how it is run.

use crate::check::Checks;

/// A kernel with its grid and parameters.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Name of the kernel.
    pub entry: &'a str,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster in x, y, z; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// The parameter buffer, each parameter at its offset (see [`Entry::params`](crate::Entry::params)).
    pub params: &'a [u8],
}

impl Launch<'_> {
    /// Coordinates of a block by its number.
    pub(crate) fn block_coordinates(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.grid;
        [linear % x, linear / x % y, linear / x / y]
    }
}

/// How to run it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides the order of warps and the moments at which asynchronous work lands.
    pub seed: u64,
    /// Which checks are on.
    pub checks: Checks,
    /// Thread instructions after which the launch is stopped with [`Error::Runaway`](crate::error::Error::Runaway).
    pub max_instructions: Option<u64>,
    /// Host threads to use; all cores if `None`. Results do not depend on it.
    pub threads: Option<usize>,
    /// Findings that are kept; the rest are counted.
    pub max_findings: usize,
    /// Most bytes of shared memory a block may have; what the module's target has if `None` (163 KiB for sm_80, 227 KiB
    /// for sm_90).
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
