//! Parameters of the forward kernels.

use std::num::NonZeroU32;

use flash_attention_kernels::abi::{
    ForwardParams, Fp8ForwardParams, HopperForwardParams, ListedForwardParams, PageTable, Params, RotaryParams, Scales,
    TensorMap, WorkLists,
};
use flash_attention_kernels::entries::Entry;
use flash_attention_kernels::shape::HOPPER_ROWS;
use flash_attention_kernels::work::Divisor;

#[cfg(any(feature = "cuda", feature = "emulator"))]
use super::lists;
use super::program::ScoreProgram;
use super::{Launch, Template, UNKNOWN_MAP, aligned, count, grid, unknown_alignment, work_list};
use crate::error::Error;
use crate::plan::lists::Owner;
use crate::plan::pass::ForwardResults;
use crate::plan::rows::RowCopies;
use crate::plan::tile_map::{self, TileMap};
use crate::problem::{Problem, Scale, ScaleBlocks};

/// Parameters of a forward kernel, by the struct that it takes.
#[derive(Clone, Copy, Debug)]
pub enum ForwardParameters {
    /// Parameters of the portable kernel.
    Portable(ForwardParams),
    /// Parameters of the portable kernel for score programs and listed work, and of the one that combines splits.
    Listed(ListedForwardParams),
    /// Parameters of Hopper's kernel, with the descriptions of its tensor maps.
    Hopper(HopperForwardParams, ForwardMaps),
    /// Parameters of Hopper's kernel over e4m3 inputs, with the descriptions of its tensor maps.
    Fp8(Fp8ForwardParams, ForwardMaps),
    /// Parameters of the kernel that copies one f32 per query from the workspace to the caller's tensor, which has gaps or another
    /// order: 0 is lse, 1 is row_max, 2 is row_sum.
    Rows(RotaryParams, usize),
}

/// Descriptions of the tensor maps of Hopper's forward kernel.
#[derive(Clone, Copy, Debug)]
pub struct ForwardMaps {
    /// Map of q.
    pub q: TileMap,
    /// Map of k.
    pub k: TileMap,
    /// Map of v.
    pub v: TileMap,
    /// Map of the output.
    pub out: TileMap,
}

impl ForwardParameters {
    /// Returns the parameter buffer.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Portable(params) => params.as_bytes(),
            Self::Listed(params) => params.as_bytes(),
            Self::Hopper(params, _) => params.as_bytes(),
            Self::Fp8(params, _) => params.as_bytes(),
            Self::Rows(params, _) => params.as_bytes(),
        }
    }
}

impl Template<ForwardResults> for ForwardParameters {
    fn placed<E>(
        mut self,
        results: &ForwardResults,
        rows: RowCopies,
        element_bytes: u64,
        encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
    ) -> Result<Self, E> {
        let of_caller = results;
        let results = &rows.written(results);
        match &mut self {
            Self::Portable(params) => place_portable(params, results, element_bytes),
            Self::Listed(params) => {
                place_portable(&mut params.forward, results, element_bytes);
                params.values.aligned = params.forward.layout.aligned;
                params.partial = results.workspace;
            }
            Self::Hopper(params, maps) => place_hopper(params, maps, results, encode)?,
            Self::Fp8(params, maps) => place_hopper(&mut params.forward, maps, results, encode)?,
            Self::Rows(params, row) => {
                params.from += results.workspace;
                params.to = of_caller.rows()[*row];
            }
        }
        Ok(self)
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn with_lists(mut self, addresses: &[u64]) -> Self {
        match (&mut self, addresses) {
            (Self::Listed(params), [lists, block_table @ ..]) => {
                params.work = lists::placed(params.work, *lists);
                params.pages.table = block_table.first().copied().unwrap_or(0);
            }
            (Self::Rows(params, _), _) => *params = params.with_lists(addresses),
            _ => {}
        }
        self
    }
}

fn place_portable(params: &mut ForwardParams, results: &ForwardResults, element_bytes: u64) {
    params.out.address = results.out;
    params.lse = results.lse;
    [params.row_max, params.row_sum] = results.statistics.unwrap_or_default();
    params.layout.aligned = aligned(&[params.q, params.k, params.v, params.out], element_bytes);
}

fn place_hopper<E>(
    params: &mut HopperForwardParams,
    maps: &mut ForwardMaps,
    results: &ForwardResults,
    encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
) -> Result<(), E> {
    maps.out.address = results.out;
    params.q = encode(&maps.q)?;
    params.k = encode(&maps.k)?;
    params.v = encode(&maps.v)?;
    params.out = encode(&maps.out)?;
    params.lse = results.lse;
    [params.row_max, params.row_sum] = results.statistics.unwrap_or_default();
    Ok(())
}

impl Launch {
    /// Returns the number of query heads that share a tile.
    pub(in crate::plan) fn packed_heads(&self) -> u32 {
        match &self.params {
            ForwardParameters::Hopper(params, _) => 1 << params.packed_log2,
            ForwardParameters::Fp8(params, _) => 1 << params.forward.packed_log2,
            ForwardParameters::Listed(params) => params.packed.value,
            ForwardParameters::Portable(_) | ForwardParameters::Rows(..) => 1,
        }
    }

    /// Makes the launch of a portable forward kernel.
    pub(in crate::plan) fn forward(problem: &Problem, entry: &'static Entry) -> Result<Self, Error> {
        let (grid, query_tiles) = grid(problem.batch(), problem.heads_q(), problem.seqlen_q(), entry.block_m)?;
        let program = entry.program.then(|| ScoreProgram::forward_or_identity(problem));
        let is_plain = problem.program().is_none();
        let params = forward_params(problem, program.as_ref().filter(|_| !is_plain), query_tiles)?;
        let Some(program) = program else {
            return Ok(Self::new(entry, grid, ForwardParameters::Portable(params)));
        };
        let mut params = ListedForwardParams {
            causal: (is_plain && problem.causal()).into(),
            plain: is_plain.into(),
            ..unlisted(params, problem.head_dim_v())
        };
        // Without a mask blocks find all tiles by themselves.
        let listed = match program.has_mask() {
            true => Some(program.listed(problem, Owner::Queries, entry)?),
            false => None,
        };
        let grid = listed.as_ref().map_or(grid, |listed| [listed.blocks, 1, 1]);
        params.work = listed.as_ref().map_or(WorkLists::NONE, |listed| listed.work);
        Ok(Self {
            program: Some(program),
            listed,
            ..Self::new(entry, grid, ForwardParameters::Listed(params))
        })
    }

    /// Makes the launch of Hopper's forward kernel `entry`, or of the one that does the same in [clusters](in_clusters). It is
    /// persistent: at most one block per multiprocessor, and the blocks share the tiles of work.
    pub(in crate::plan) fn hopper_forward(
        problem: &Problem,
        entry: &'static Entry,
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        let program = ScoreProgram::forward(problem);
        let (params, maps, entry) = hopper_params(problem, entry, program.as_ref(), multiprocessors)?;
        let grid = hopper_grid(&params, entry);
        Ok(Self {
            program,
            ..Self::new(entry, grid, ForwardParameters::Hopper(params, maps))
        })
    }

    /// Makes the launch of Hopper's forward kernel over e4m3 inputs with these scales of q, k and v.
    pub(in crate::plan) fn fp8_forward(
        problem: &Problem,
        entry: &'static Entry,
        scales: [ScaleBlocks; 3],
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        let (forward, maps, entry) = hopper_params(problem, entry, None, multiprocessors)?;
        let grid = hopper_grid(&forward, entry);
        let [q, k, v] = scales.map(|ScaleBlocks { address, blocks }| Scales {
            address,
            blocks,
            reserved: 0,
        });
        let params = Fp8ForwardParams {
            forward,
            q,
            k,
            v,
            reserved: [0; 4],
        };
        Ok(Self::new(entry, grid, ForwardParameters::Fp8(params, maps)))
    }
}

/// Returns the grid of a forward kernel for Hopper, whose clusters, or blocks, share the work.
fn hopper_grid(params: &HopperForwardParams, entry: &Entry) -> [u32; 3] {
    [params.work.blocks * entry.cluster, 1, 1]
}

/// The parameters of Hopper's forward kernels, their tensor maps, and the kernel: `entry`, or the one that does the same in clusters.
fn hopper_params(
    problem: &Problem,
    entry: &'static Entry,
    program: Option<&ScoreProgram>,
    multiprocessors: u32,
) -> Result<(HopperForwardParams, ForwardMaps, &'static Entry), Error> {
    let packed = match program {
        Some(_) => 1,
        None => packed_heads(problem, entry),
    };
    let heads = problem.heads_q() / packed as usize;
    let rows = problem.seqlen_q() * packed;
    let tiles = grid(problem.batch(), heads, rows, entry.block_m)?;
    let clusters = in_clusters(entry, tiles.1, multiprocessors).filter(|_| program.is_none());
    let entry = clusters.unwrap_or(entry);
    let params = HopperForwardParams {
        q: UNKNOWN_MAP,
        k: UNKNOWN_MAP,
        v: UNKNOWN_MAP,
        out: UNKNOWN_MAP,
        lse: 0,
        row_max: 0,
        row_sum: 0,
        values: problem.v(),
        layout: unknown_alignment(problem.head_dim_v()),
        heads: count(heads)?,
        heads_per_kv: count(heads / problem.heads_kv())?,
        seqlen_q: problem.seqlen_q(),
        seqlen_k: problem.seqlen_k(),
        work: work_list(of_clusters(tiles, entry.cluster), multiprocessors / entry.cluster),
        scale_log2: program.map_or(problem.scale().magnitude_log2, ScoreProgram::scale_log2),
        packed_log2: packed.ilog2(),
        reserved: [0; 3],
    };
    let [q, k, v, out] = tile_map::dims(problem);
    let (inputs, results) = (problem.input_type(), problem.dtype().into());
    let query = |tensor, dims, dtype| TileMap::packed(&tensor, dims, dtype, HOPPER_ROWS, packed);
    let key = |tensor, dims| TileMap::new(&tensor, dims, inputs, entry.block_n / entry.cluster);
    let q = query(problem.q(), q, inputs);
    // Without keys no map of them is used, and none could describe them.
    let [k, v] = match problem.has_keys() {
        true => [key(problem.k(), k), key(problem.v(), v)],
        false => [q; 2],
    };
    let out = query(problem.out(), out, results);
    Ok((params, ForwardMaps { q, k, v, out }, entry))
}

/// Returns the kernel that does what `entry` does in clusters of blocks, if there is one and it serves a head of so many tiles.
///
/// Blocks of a cluster load each tile of keys and values once for all of them. That halves the reads from the L2 cache, which limits the
/// widest heads in `benches/results/hopper_model.md`, and costs nothing where the tiles of every head fill its clusters. Otherwise a
/// block of each head's last cluster computes a tile that does not exist. Where that adds up to a 32nd to the work the cluster is still
/// worth it; the reads of a long sequence should not double because it is a few queries longer.
fn in_clusters(entry: &Entry, tiles_per_head: NonZeroU32, multiprocessors: u32) -> Option<&'static Entry> {
    let found = entry.in_clusters()?;
    let wasted = tiles_per_head.get().next_multiple_of(found.cluster) - tiles_per_head.get();
    (found.cluster <= multiprocessors && 32 * wasted <= tiles_per_head.get()).then_some(found)
}

/// Returns the grid of clusters of `cluster` blocks, each with a tile for every block, and the number of clusters of a head, for a grid
/// of tiles.
fn of_clusters(([tiles, ..], tiles_per_head): ([u32; 3], NonZeroU32), cluster: u32) -> ([u32; 3], NonZeroU32) {
    let clusters = NonZeroU32::MIN.saturating_add((tiles_per_head.get() - 1) / cluster);
    ([tiles / tiles_per_head * clusters.get(), 1, 1], clusters)
}

/// Tensors and sizes of a problem, and its scale unless its program has it.
pub(super) fn forward_params(
    problem: &Problem,
    program: Option<&ScoreProgram>,
    query_tiles: NonZeroU32,
) -> Result<ForwardParams, Error> {
    let Scale {
        magnitude,
        magnitude_log2,
        sign,
        ..
    } = problem.scale();
    // A program multiplies by the scale itself.
    let (scale_log2, scale_sign) = program.map_or((magnitude_log2, sign), |program| (program.scale_log2(), 1.0));
    Ok(ForwardParams {
        q: problem.q(),
        k: problem.k(),
        v: problem.v(),
        out: problem.out(),
        lse: 0,
        row_max: 0,
        row_sum: 0,
        heads_q: count(problem.heads_q())?,
        heads_q_per_kv: count(problem.heads_q() / problem.heads_kv())?,
        seqlen_q: problem.seqlen_q(),
        seqlen_k: problem.seqlen_k(),
        query_tiles,
        scale_log2,
        scale_sign,
        layout: unknown_alignment(problem.head_dim()),
        scale: magnitude,
    })
}

/// The parameters of a score program's kernel whose blocks find their work by their place in the grid.
pub(super) fn unlisted(forward: ForwardParams, head_dim_v: u32) -> ListedForwardParams {
    ListedForwardParams {
        forward,
        values: unknown_alignment(head_dim_v),
        work: WorkLists::NONE,
        pages: PageTable {
            table: 0,
            entries: 0,
            size: Divisor::ONE,
        },
        partial: 0,
        block_m: 0,
        packed: Divisor::ONE,
        causal: 0,
        plain: 0,
    }
}

/// Returns the number of query heads that Hopper's forward kernel packs into a tile: all heads that share keys if a
/// tile of one head would be filled less than nine tenths as much, and if their number divides a warpgroup's rows.
/// Otherwise 1. Heads are packed only if they have so few rows that the product fits.
fn packed_heads(problem: &Problem, entry: &Entry) -> u32 {
    let sharing = (problem.heads_q() / problem.heads_kv()) as u64;
    let (rows, tile) = (u64::from(problem.seqlen_q()), u64::from(entry.block_m));
    let (alone, packed) = (
        rows.next_multiple_of(tile) * sharing,
        (rows * sharing).next_multiple_of(tile),
    );
    if sharing.is_power_of_two() && sharing <= u64::from(HOPPER_ROWS) && 10 * packed < 9 * alone {
        sharing as u32
    } else {
        1
    }
}
