//! One launch of a compiled kernel: its grid and its parameters.

mod backward;
mod forward;
mod kept;
mod lists;
mod program;
mod rotary;
mod rows;
mod sequences;
mod workspace;

use std::num::NonZeroU32;
use std::sync::Arc;

use flash_attention_kernels::abi::{Layout, StridedTensor, TensorMap, WorkList};
use flash_attention_kernels::entries::Entry;

pub use backward::{BackwardMaps, BackwardParameters};
pub use forward::{ForwardMaps, ForwardParameters};
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(crate) use program::{ModuleKey, ModuleText};
pub(crate) use rotary::Rotary;
pub(super) use rows::{Axis, moves};
pub(super) use sequences::{KeySplits, LEAST_KEYS, OfSequences};
pub(super) use workspace::{exponents, portable_exponents, query_sums};

use super::MAX_BLOCKS;
use super::pass::{Forward, PassType};
use super::rows::RowCopies;
use super::tile_map::TileMap;
use crate::error::Error;
use crate::program::MAX_TABLES;
use lists::Listed;
use program::ScoreProgram;

/// One launch of a compiled kernel, in a pass.
#[derive(Clone, Debug)]
pub struct Launch<P: PassType = Forward> {
    /// The kernel.
    pub entry: &'static Entry,
    /// Number of blocks along x, y and z. All are along x, because y and z are limited to 65535.
    pub grid: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// Blocks of a cluster, along x; the grid is a multiple. 1 without clusters.
    pub cluster: u32,
    /// Tensor that the kernel copies, to or from a contiguous copy in the workspace: `lse`, `row_max` or `row_sum`; `None` of a kernel
    /// of attention.
    pub copied: Option<&'static str>,
    /// The parameters, except the addresses of the results, which are unknown until they are allocated.
    params: P::Parameters,
    /// Copies of lse, row_max and row_sum that the kernel takes in place of the caller's tensors.
    pub(super) rows: RowCopies,
    /// The score program that is written into the kernel.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulator")),
        expect(dead_code, reason = "no device loads it")
    )]
    program: Option<ScoreProgram>,
    /// The work of the blocks, where it is no grid.
    listed: Option<Listed>,
}

/// Parameters of a pass's kernels without the addresses that only a call knows. For each kernel one function makes the
/// parameters, and one beside it fills in the addresses.
pub trait Template<Results>: Sized {
    /// Returns the parameters for results at these addresses, with `rows` in the workspace. `element_bytes` is the size of an element of
    /// the tensors, and `encode` makes the device's tensor maps.
    ///
    /// # Errors
    /// The errors of `encode`.
    fn placed<E>(
        self,
        results: &Results,
        rows: RowCopies,
        element_bytes: u64,
        encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
    ) -> Result<Self, E>;

    /// Returns the parameter buffer.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn bytes(&self) -> &[u8];

    /// Returns the parameters with the launch's [lists](Launch::lists) at these addresses; those of a kernel without
    /// lists are the same.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn with_lists(self, addresses: &[u64]) -> Self;

    /// Returns the addresses of the gradients of a score program's tables.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn tables(_results: &Results) -> TableGradients {
        TableGradients::default()
    }
}

/// Device addresses of the gradients of a score program's tables, each f32, contiguous, of its table's shape, and
/// zero when the call begins. 0 for a table without a gradient: one of integers, or one whose gradient is not
/// requested.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableGradients {
    /// In the order of [`Program::tables`](crate::program::Program::tables).
    pub tables: [u64; MAX_TABLES],
    /// Gradient of the sinks.
    pub sinks: u64,
}

impl<P: PassType> Launch<P> {
    fn new(entry: &'static Entry, grid: [u32; 3], params: P::Parameters) -> Self {
        Self {
            entry,
            grid,
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            cluster: entry.cluster,
            copied: None,
            params,
            rows: RowCopies::default(),
            program: None,
            listed: None,
        }
    }

    /// Returns the kernel's parameters for results at these addresses. `encode` makes the device's tensor maps.
    ///
    /// # Errors
    /// The errors of `encode`.
    pub fn params<E>(
        &self,
        results: P::Results,
        encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
    ) -> Result<P::Parameters, E> {
        let element_bytes = self.entry.dtype.bytes() as u64;
        self.params.placed(&results, self.rows, element_bytes, encode)
    }

    /// Returns the lists that the kernel reads, for [`Template::with_lists`]: its work, and the block table of paged keys or the angles
    /// of a rotary embedding. There are none if its blocks find their work by their place in the grid.
    pub(crate) fn lists(&self) -> impl Iterator<Item = &Arc<[u8]>> {
        let listed = self.listed.iter();
        listed.flat_map(|listed| [&listed.content].into_iter().chain(&listed.table))
    }

    /// Returns the number of rows that blocks stream, once for each head that streams them, of a launch with lists.
    pub(super) fn streamed_rows(&self) -> Option<u128> {
        self.listed.as_ref().map(|listed| listed.streamed_rows)
    }

    /// The error of a launch that a device refused or could not finish.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn error(&self, device: String, message: impl std::fmt::Display) -> Error {
        Error::Launch {
            device,
            kernel: self.entry.name,
            message: message.to_string(),
        }
    }
}

/// Returns the grid of a kernel whose blocks each own `tile` of `seqlen` rows of one head, and the number of tiles of
/// a head.
fn grid(batch: usize, heads: usize, seqlen: u32, tile: u32) -> Result<([u32; 3], NonZeroU32), Error> {
    let tiles = seqlen.div_ceil(tile);
    let blocks = u128::from(tiles) * heads as u128 * batch as u128;
    let limit = MAX_BLOCKS;
    match (u32::try_from(blocks), NonZeroU32::new(tiles)) {
        (Ok(x), Some(tiles)) if x <= limit => Ok(([x, 1, 1], tiles)),
        _ => Err(Error::GridTooLarge { blocks, limit }),
    }
}

/// Placeholder of a tensor map, which a device makes once the results have addresses.
const UNKNOWN_MAP: TensorMap = TensorMap([0; 16]);

/// Returns the work that persistent blocks share, in place of a grid with one block per tile.
fn work_list(([tiles, ..], tiles_per_head): ([u32; 3], NonZeroU32), multiprocessors: u32) -> WorkList {
    WorkList::new(tiles_per_head, tiles / tiles_per_head, tiles.min(multiprocessors))
}

/// Converts a number of heads. It is not 0, and a number beyond the launch limit was refused with the grid.
fn count(n: usize) -> Result<NonZeroU32, Error> {
    u32::try_from(n)
        .ok()
        .and_then(NonZeroU32::new)
        .ok_or(Error::GridTooLarge {
            blocks: n as u128,
            limit: MAX_BLOCKS,
        })
}

/// Returns the layout of a kernel's tensors that it reads and writes row by row, whose results have no address yet.
fn unknown_alignment(head_dim: u32) -> Layout {
    Layout { head_dim, aligned: 0 }
}

/// Returns 1 if every row of these tensors starts at a multiple of 16 bytes, else 0.
fn aligned(tensors: &[StridedTensor], element_bytes: u64) -> u32 {
    let is_aligned = |tensor: &StridedTensor| {
        let strides = [tensor.batch_stride, tensor.head_stride, tensor.row_stride];
        let whole = |stride: &u64| (stride * element_bytes).is_multiple_of(16);
        tensor.address.is_multiple_of(16) && strides.iter().all(whole)
    };
    tensors.iter().all(is_aligned).into()
}
