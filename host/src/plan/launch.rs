//! One launch of a compiled kernel: its grid and its parameters.

mod backward;
mod forward;
mod kept;
mod lists;
mod program;
mod rotary;
mod sequences;
mod workspace;

use std::num::NonZeroU32;
use std::sync::Arc;

use flash_attention_kernels::abi::{
    BackwardParams, ForwardParams, HopperBackwardParams, HopperForwardParams, Layout, ListedBackwardParams,
    ListedForwardParams, Params, QuerySums, QuerySumsParams, RotaryParams, StridedTensor, TensorMap, WorkList,
};
use flash_attention_kernels::entries::Entry;

#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(crate) use program::{ModuleKey, ModuleText};
pub(super) use sequences::OfSequences;
pub(super) use workspace::{exponents, portable_exponents, query_sums};

use super::MAX_BLOCKS;
use super::tile_map::TileMap;
use crate::error::Error;
use crate::program::MAX_TABLES;
use lists::Listed;
use program::ScoreProgram;
use workspace::{exponents_at, placed};

/// One launch of a compiled kernel.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The kernel.
    pub entry: &'static Entry,
    /// Number of blocks along x, y and z. All are along x, because y and z are limited to 65535.
    pub grid: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// The parameters, but for the addresses of the results, which are unknown until they are allocated.
    params: Parameters,
    /// The score program that is written into the kernel.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulator")),
        expect(dead_code, reason = "no device loads it")
    )]
    program: Option<ScoreProgram>,
    /// The work of the blocks, where it is no grid.
    listed: Option<Listed>,
}

/// Parameters of a kernel, by the struct that it takes.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "a launch holds one, and copies it once")]
pub enum Parameters {
    /// Parameters of the portable forward kernel.
    Forward(ForwardParams),
    /// Parameters of the portable forward kernel for score programs and listed work, and of the one that combines splits.
    Listed(ListedForwardParams),
    /// Parameters of a portable backward kernel.
    Backward(BackwardParams),
    /// Parameters of a portable backward kernel for score programs and listed work.
    ListedBackward(ListedBackwardParams),
    /// Parameters of Hopper's forward kernel, with the descriptions of its tensor maps in their order.
    HopperForward(HopperForwardParams, [TileMap; 4]),
    /// Parameters of Hopper's backward kernels, with the descriptions of their tensor maps in their order.
    HopperBackward(HopperBackwardParams, [TileMap; 7]),
    /// Parameters of Hopper's preprocess and postprocess kernels.
    QuerySums(QuerySumsParams),
    /// Parameters of the kernel that turns and moves rows.
    Rotary(RotaryParams),
}

impl Parameters {
    /// Returns the parameter buffer.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Forward(params) => params.as_bytes(),
            Self::Listed(params) => params.as_bytes(),
            Self::Backward(params) => params.as_bytes(),
            Self::ListedBackward(params) => params.as_bytes(),
            Self::HopperForward(params, _) => params.as_bytes(),
            Self::HopperBackward(params, _) => params.as_bytes(),
            Self::QuerySums(params) => params.as_bytes(),
            Self::Rotary(params) => params.as_bytes(),
        }
    }

    /// Returns the parameters with the launch's [lists](Launch::lists) at these addresses; those of a kernel without lists are the
    /// same.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn with_lists(mut self, addresses: &[u64]) -> Self {
        match (&mut self, addresses) {
            (Self::Listed(params), [lists, block_table @ ..]) => {
                params.work = lists::placed(params.work, *lists);
                params.pages.table = block_table.first().copied().unwrap_or(0);
            }
            (Self::ListedBackward(params), [lists, ..]) => params.work = lists::placed(params.work, *lists),
            (Self::Rotary(params), [tokens, angles @ ..]) => {
                params.tokens = *tokens;
                params.angles = angles.first().copied().unwrap_or(0);
            }
            _ => {}
        }
        self
    }
}

/// Device addresses of a call's results and workspace.
#[derive(Clone, Copy, Debug)]
pub enum Results {
    /// Rows that are moved to where the parameters say.
    Moved,
    /// Results of a forward pass.
    Forward {
        /// Address of the output.
        out: u64,
        /// Address of the log-sum-exp.
        lse: u64,
        /// Addresses of row_max and row_sum, if they are wanted.
        statistics: Option<[u64; 2]>,
        /// Address of the workspace, [`Plan::workspace_bytes`](super::Plan::workspace_bytes) large.
        workspace: u64,
    },
    /// Results of a backward pass.
    Backward {
        /// Gradient of q.
        dq: u64,
        /// Gradient of k.
        dk: u64,
        /// Gradient of v.
        dv: u64,
        /// Address of the workspace, [`Plan::workspace_bytes`](super::Plan::workspace_bytes) large.
        workspace: u64,
        /// Gradients of the score program's tables.
        tables: TableGradients,
    },
}

/// Device addresses of the gradients of a score program's tables, each f32, contiguous, of its table's shape, and
/// zero when the call begins. 0 for a table that has none: one of integers, or one that nobody asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableGradients {
    /// In the order of [`Program::tables`](crate::program::Program::tables).
    pub tables: [u64; MAX_TABLES],
    /// Gradient of the sinks.
    pub sinks: u64,
}

impl Launch {
    fn new(entry: &'static Entry, grid: [u32; 3], params: Parameters) -> Self {
        Self {
            entry,
            grid,
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            params,
            program: None,
            listed: None,
        }
    }

    /// Returns the number of query heads that share a tile.
    pub(super) fn packed_heads(&self) -> u32 {
        match &self.params {
            Parameters::HopperForward(params, _) => 1 << params.packed_log2,
            Parameters::Listed(params) => params.packed.value,
            _ => 1,
        }
    }

    /// Returns the workspace of the backward kernels for Hopper, as offsets.
    pub(super) fn kept_sums(&self) -> Option<&QuerySums> {
        match &self.params {
            Parameters::HopperBackward(params, _) => Some(&params.sums),
            Parameters::QuerySums(params) => Some(&params.sums),
            _ => None,
        }
    }

    /// Returns the kernel's parameters for results at these addresses, or `None` if the results belong to the other
    /// pass. `encode` makes the device's tensor maps.
    ///
    /// # Errors
    /// The errors of `encode`.
    pub fn params<E>(
        &self,
        results: Results,
        encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
    ) -> Result<Option<Parameters>, E> {
        let bytes = self.entry.dtype.bytes() as u64;
        let aligned = |tensors: &[StridedTensor]| tensors.iter().all(|tensor| is_aligned(tensor, bytes)).into();
        let mut params = self.params;
        match (&mut params, results) {
            (
                Parameters::Forward(p),
                Results::Forward {
                    out, lse, statistics, ..
                },
            ) => {
                (p.out.address, p.lse) = (out, lse);
                [p.row_max, p.row_sum] = statistics.unwrap_or_default();
                p.layout.aligned = aligned(&[p.q, p.k, p.v, p.out]);
            }
            (
                Parameters::Listed(listed),
                Results::Forward {
                    out,
                    lse,
                    statistics,
                    workspace,
                },
            ) => {
                listed.partial = workspace;
                let p = &mut listed.forward;
                (p.out.address, p.lse) = (out, lse);
                [p.row_max, p.row_sum] = statistics.unwrap_or_default();
                p.layout.aligned = aligned(&[p.q, p.k, p.v, p.out]);
                listed.values.aligned = p.layout.aligned;
            }
            (
                Parameters::HopperForward(p, [q, k, v, o]),
                Results::Forward {
                    out, lse, statistics, ..
                },
            ) => {
                o.address = out;
                [p.q, p.k, p.v, p.out] = encode_all(&[*q, *k, *v, *o], encode)?;
                p.lse = lse;
                [p.row_max, p.row_sum] = statistics.unwrap_or_default();
            }
            (
                Parameters::HopperBackward(p, maps),
                Results::Backward {
                    dq, dk, dv, workspace, ..
                },
            ) => {
                let [.., dq_map, dk_map, dv_map] = maps;
                (dq_map.address, dk_map.address, dv_map.address) = (dq, dk, dv);
                [p.q, p.k, p.v, p.dout, p.dq, p.dk, p.dv] = encode_all(maps, encode)?;
                p.sums = placed(p.sums, workspace);
            }
            (Parameters::QuerySums(p), Results::Backward { dq, workspace, .. }) => {
                p.dq.address = dq;
                p.sums = placed(p.sums, workspace);
                p.layout.aligned = aligned(&[p.out, p.dout, p.dq]);
            }
            (
                Parameters::Backward(p) | Parameters::ListedBackward(ListedBackwardParams { backward: p, .. }),
                Results::Backward {
                    dq, dk, dv, workspace, ..
                },
            ) => {
                (p.dq.address, p.dk.address, p.dv.address) = (dq, dk, dv);
                p.exponents = exponents_at(p.exponents, workspace);
                p.layout.aligned = aligned(&[p.q, p.k, p.v, p.out, p.dout, p.dq, p.dk, p.dv]);
                if let Parameters::ListedBackward(listed) = &mut params {
                    listed.values.aligned = listed.backward.layout.aligned;
                }
            }
            (Parameters::Rotary(_), Results::Moved) => {}
            _ => return Ok(None),
        }
        Ok(Some(params))
    }

    /// Returns the lists that the kernel reads, for [`Parameters::with_lists`]: its work, and the block table of paged keys or the angles
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

    /// The error for results of the other pass.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn wrong_results(&self, device: String) -> Error {
        self.error(device, "the plan and the results are of different passes")
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

/// Encodes the tensor maps in their order.
fn encode_all<const N: usize, E>(
    tiles: &[TileMap; N],
    encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
) -> Result<[TensorMap; N], E> {
    let mut maps = [UNKNOWN_MAP; N];
    for (map, tile) in maps.iter_mut().zip(tiles) {
        *map = encode(tile)?;
    }
    Ok(maps)
}

/// Returns the work that persistent blocks share, in place of a grid with one block per tile.
fn work_list(([tiles, ..], tiles_per_head): ([u32; 3], NonZeroU32), multiprocessors: u32) -> WorkList {
    WorkList {
        tiles_per_head,
        heads: tiles / tiles_per_head,
        blocks: tiles.min(multiprocessors),
    }
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

/// Returns true if every row of a tensor starts at a multiple of 16 bytes.
fn is_aligned(tensor: &StridedTensor, element_bytes: u64) -> bool {
    let strides = [tensor.batch_stride, tensor.head_stride, tensor.row_stride];
    tensor.address.is_multiple_of(16) && strides.iter().all(|stride| (stride * element_bytes).is_multiple_of(16))
}
