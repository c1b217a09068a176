//! One launch of a compiled kernel: its grid and its parameters.

use std::convert::Infallible;
use std::num::NonZeroU32;
use std::sync::Arc;

use flash_attention_kernels::abi::{
    BackwardParams, Exponents, ForwardParams, ForwardRows, HopperBackwardParams, HopperForwardParams, Layout, Params,
    QuerySums, QuerySumsParams, StridedTensor, TensorMap, WorkList,
};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use flash_attention_kernels::entries::Dtype;
use flash_attention_kernels::entries::{Entry, Pass};
use flash_attention_kernels::shape::{DELTA_ROWS, HOPPER_ROWS, panel_columns};

use super::MAX_BLOCKS;
use super::tile_map::{self, TileMap};
use crate::error::Error;
use crate::problem::{BackwardProblem, BackwardTensors, Problem, Scale};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use crate::program::{self, Gradients, NotSpliced, Slot};
use crate::program::{Code, MAX_TABLES, Numbers, Program};

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
}

/// A score program as a launch takes it.
#[derive(Clone, Debug)]
pub struct ScoreProgram {
    code: Arc<Code>,
    numbers: Numbers,
}

impl ScoreProgram {
    /// The program of a problem, with its causal mask, as forward kernels for programs take it; `None` if it has none.
    fn forward(problem: &Problem) -> Option<Self> {
        let code = |program: &Program| Ok::<_, Infallible>(Code::new(program, problem.softmax_scale()));
        match Self::of(problem, code) {
            Ok(program) => program,
            Err(never) => match never {},
        }
    }

    /// The program of a problem as backward kernels take it.
    fn backward(problem: &BackwardProblem) -> Result<Option<Self>, Error> {
        let (forward, table_gradients) = (problem.forward(), problem.table_gradients());
        let code = |program: &Program| Ok(Code::backward(program, forward.softmax_scale(), table_gradients)?);
        Self::of(forward, code)
    }

    fn of<E>(problem: &Problem, code: impl FnOnce(&Program) -> Result<Code, E>) -> Result<Option<Self>, E> {
        let Some(program) = problem.program() else {
            return Ok(None);
        };
        let program = if problem.causal() {
            Arc::new(program.with_causal_mask())
        } else {
            program.clone()
        };
        Ok(Some(Self {
            code: Arc::new(code(&program)?),
            numbers: Numbers {
                program,
                softmax_scale: problem.softmax_scale(),
                seqlen_q: problem.seqlen_q(),
                seqlen_k: problem.seqlen_k(),
                heads_q_per_kv: (problem.heads_q() / problem.heads_kv()) as u32,
            },
        }))
    }

    /// What scores are multiplied by in the exponent to base 2.
    fn scale_log2(&self) -> f32 {
        self.code.scale_log2(self.numbers.softmax_scale)
    }
}

/// A kernel as a device loads it: two launches of equal keys run one module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    not(any(feature = "cuda", feature = "emulator")),
    expect(dead_code, reason = "no device loads any")
)]
pub(crate) struct ModuleKey {
    entry: &'static str,
    code: Option<Arc<Code>>,
}

/// The text of a kernel.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(crate) struct ModuleText {
    /// The module.
    pub ptx: String,
    /// What its second parameter holds, if it has one.
    pub slots: Vec<Slot>,
}

/// Parameters of a kernel, by the struct that it takes.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "a launch holds one, and copies it once")]
pub enum Parameters {
    /// Parameters of the portable forward kernel.
    Forward(ForwardParams),
    /// Parameters of a portable backward kernel.
    Backward(BackwardParams),
    /// Parameters of Hopper's forward kernel, with the descriptions of its tensor maps in their order.
    HopperForward(HopperForwardParams, [TileMap; 4]),
    /// Parameters of Hopper's backward kernels, with the descriptions of their tensor maps in their order.
    HopperBackward(HopperBackwardParams, [TileMap; 7]),
    /// Parameters of Hopper's preprocess and postprocess kernels.
    QuerySums(QuerySumsParams),
}

impl Parameters {
    /// Returns the parameter buffer.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Forward(params) => params.as_bytes(),
            Self::Backward(params) => params.as_bytes(),
            Self::HopperForward(params, _) => params.as_bytes(),
            Self::HopperBackward(params, _) => params.as_bytes(),
            Self::QuerySums(params) => params.as_bytes(),
        }
    }
}

/// Device addresses of a call's results and workspace.
#[derive(Clone, Copy, Debug)]
pub enum Results {
    /// Results of a forward pass.
    Forward {
        /// Address of the output.
        out: u64,
        /// Address of the log-sum-exp.
        lse: u64,
        /// Addresses of row_max and row_sum, if they are wanted.
        statistics: Option<[u64; 2]>,
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
    /// Of the sinks.
    pub sinks: u64,
}

impl Launch {
    pub(super) fn forward(problem: &Problem, entry: &'static Entry) -> Result<Self, Error> {
        let (grid, query_tiles) = grid(problem.batch(), problem.heads_q(), problem.seqlen_q(), entry.block_m)?;
        let Scale {
            magnitude,
            magnitude_log2,
            sign,
            ..
        } = problem.scale();
        // A program multiplies by the scale itself.
        let program = ScoreProgram::forward(problem);
        let (scale_log2, scale_sign) =
            (program.as_ref()).map_or((magnitude_log2, sign), |program| (program.scale_log2(), 1.0));
        let params = ForwardParams {
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
            layout: unknown_alignment(problem),
            scale: magnitude,
        };
        Ok(Self {
            program,
            ..Self::new(entry, grid, Parameters::Forward(params))
        })
    }

    /// Makes the launch of Hopper's forward kernel. It is persistent: at most one block per multiprocessor, and the
    /// blocks share the tiles of work.
    pub(super) fn hopper_forward(
        problem: &Problem,
        entry: &'static Entry,
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        let program = ScoreProgram::forward(problem);
        let packed = if program.is_some() {
            1
        } else {
            packed_heads(problem, entry)
        };
        let heads = problem.heads_q() / packed as usize;
        let rows = problem.seqlen_q() * packed;
        let work = work_list(grid(problem.batch(), heads, rows, entry.block_m)?, multiprocessors);
        let heads_per_kv = count(heads / problem.heads_kv())?;
        let params = HopperForwardParams {
            q: UNKNOWN_MAP,
            k: UNKNOWN_MAP,
            v: UNKNOWN_MAP,
            out: UNKNOWN_MAP,
            lse: 0,
            row_max: 0,
            row_sum: 0,
            values: problem.v(),
            layout: unknown_alignment(problem),
            heads: count(heads)?,
            heads_per_kv,
            seqlen_q: problem.seqlen_q(),
            seqlen_k: problem.seqlen_k(),
            work,
            scale_log2: (program.as_ref()).map_or(problem.scale().magnitude_log2, ScoreProgram::scale_log2),
            packed_log2: packed.ilog2(),
            reserved: [0; 7],
        };
        let (q, k) = tile_map::dims(problem);
        let query = |tensor| TileMap::packed(tensor, q, problem.dtype(), HOPPER_ROWS, packed);
        let key = |tensor| TileMap::new(tensor, k, problem.dtype(), entry.block_n);
        let maps = [
            query(&problem.q()),
            key(&problem.k()),
            key(&problem.v()),
            query(&problem.out()),
        ];
        let grid = [work.blocks, 1, 1];
        Ok(Self {
            program,
            ..Self::new(entry, grid, Parameters::HopperForward(params, maps))
        })
    }

    /// Makes a persistent launch like [`hopper_forward`](Self::hopper_forward) for a backward kernel between
    /// preprocess and postprocess.
    pub(super) fn hopper_backward(
        problem: &BackwardProblem,
        entry: &'static Entry,
        sums: QuerySums,
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let (heads_kv, heads_q_per_kv) = (problem.heads_kv(), count(problem.heads_q() / problem.heads_kv())?);
        let owns_keys = entry.pass != Pass::BackwardQueries;
        let tiles = if owns_keys {
            grid(problem.batch(), heads_kv, problem.seqlen_k(), entry.block_n)?
        } else {
            grid(problem.batch(), problem.heads_q(), problem.seqlen_q(), entry.block_m)?
        };
        let work = work_list(tiles, multiprocessors);
        let params = HopperBackwardParams {
            q: UNKNOWN_MAP,
            k: UNKNOWN_MAP,
            v: UNKNOWN_MAP,
            dout: UNKNOWN_MAP,
            dq: UNKNOWN_MAP,
            dk: UNKNOWN_MAP,
            dv: UNKNOWN_MAP,
            sums,
            heads_q: count(problem.heads_q())?,
            heads_kv: count(heads_kv)?,
            heads_q_per_kv,
            seqlen_q: problem.seqlen_q(),
            seqlen_k: problem.seqlen_k(),
            softmax_scale: problem.softmax_scale(),
            scale_log2: problem.scale().log2,
            work,
            dout_rows: tensors.dout,
            layout: unknown_alignment(problem),
            reserved: [0; 14],
        };
        let (of_queries, of_keys) = tile_map::dims(problem);
        let (q_rows, k_rows) = if owns_keys {
            (entry.block_m, HOPPER_ROWS)
        } else {
            (HOPPER_ROWS, entry.block_n)
        };
        let query = |tensor| TileMap::new(tensor, of_queries, problem.dtype(), q_rows);
        let key = |tensor| TileMap::new(tensor, of_keys, problem.dtype(), k_rows);
        let maps = [
            query(&problem.q()),
            key(&problem.k()),
            key(&problem.v()),
            query(&tensors.dout),
            query(&tensors.dq),
            key(&tensors.dk),
            key(&tensors.dv),
        ];
        let grid = [work.blocks, 1, 1];
        Ok(Self::new(entry, grid, Parameters::HopperBackward(params, maps)))
    }

    /// Makes the launch of Hopper's preprocess or postprocess kernel.
    pub(super) fn query_sums(problem: &BackwardProblem, entry: &'static Entry, sums: QuerySums) -> Result<Self, Error> {
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let mut tiles = sums.padded_q.get() / entry.block_m;
        if entry.pass == Pass::BackwardFinish {
            tiles *= sums.dq_columns / HOPPER_ROWS;
        }
        let (grid, tiles) = grid(problem.batch(), problem.heads_q(), tiles, 1)?;
        let params = QuerySumsParams {
            out: problem.out(),
            dout: tensors.dout,
            dq: tensors.dq,
            rows: forward_rows(tensors),
            sums,
            heads_q: count(problem.heads_q())?,
            seqlen_q: problem.seqlen_q(),
            tiles,
            softmax_scale: problem.softmax_scale(),
            scale_log2: problem.scale().log2,
            layout: unknown_alignment(problem),
            reserved: 0,
        };
        Ok(Self::new(entry, grid, Parameters::QuerySums(params)))
    }

    /// Makes the launch of a portable backward kernel.
    pub(super) fn backward(
        problem: &BackwardProblem,
        entry: &'static Entry,
        exponents: Exponents,
    ) -> Result<Self, Error> {
        let program = ScoreProgram::backward(problem)?;
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let (grid, tiles) = if entry.pass == Pass::BackwardKeys {
            grid(problem.batch(), problem.heads_kv(), problem.seqlen_k(), entry.block_n)?
        } else {
            grid(problem.batch(), problem.heads_q(), problem.seqlen_q(), entry.block_m)?
        };
        // Where there are no queries, not even a head of them, each key head has an empty one.
        let (heads_q, seqlen_q) = if problem.has_queries() {
            (problem.heads_q(), problem.seqlen_q())
        } else {
            (problem.heads_kv(), 0)
        };
        let params = BackwardParams {
            q: problem.q(),
            k: problem.k(),
            v: problem.v(),
            out: problem.out(),
            dout: tensors.dout,
            dq: tensors.dq,
            dk: tensors.dk,
            dv: tensors.dv,
            rows: forward_rows(tensors),
            exponents,
            heads_q: count(heads_q)?,
            heads_kv: count(problem.heads_kv())?,
            heads_q_per_kv: count(heads_q / problem.heads_kv())?,
            seqlen_q,
            seqlen_k: problem.seqlen_k(),
            tiles,
            softmax_scale: problem.softmax_scale(),
            scale_log2: (program.as_ref()).map_or(problem.scale().log2, ScoreProgram::scale_log2),
            layout: unknown_alignment(problem),
        };
        Ok(Self {
            program,
            ..Self::new(entry, grid, Parameters::Backward(params))
        })
    }

    fn new(entry: &'static Entry, grid: [u32; 3], params: Parameters) -> Self {
        Self {
            entry,
            grid,
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            params,
            program: None,
        }
    }

    /// What tells the launch's module from others.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn module_key(&self) -> ModuleKey {
        ModuleKey {
            entry: self.entry.name,
            code: self.program.as_ref().map(|program| program.code.clone()),
        }
    }

    /// The launch's module, with its score program in it.
    ///
    /// # Errors
    /// [`NotSpliced`] if the kernel takes no program.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn module_text(&self) -> Result<ModuleText, NotSpliced> {
        let ptx = self.entry.ptx();
        let Some(program) = &self.program else {
            return Ok(ModuleText { ptx, slots: Vec::new() });
        };
        let spliced = program::splice(&ptx, &program.code, self.entry.dtype == Dtype::F32)?;
        Ok(ModuleText {
            ptx: spliced.text,
            slots: spliced.slots,
        })
    }

    /// The kernel's second parameter, which holds the numbers of its score program; empty if it has none.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn numbers(&self, slots: &[Slot], results: &Results) -> Vec<u8> {
        let tables = match results {
            Results::Forward { .. } => TableGradients::default(),
            Results::Backward { tables, .. } => *tables,
        };
        let gradients = Gradients {
            tables: &tables.tables,
            sinks: tables.sinks,
        };
        match &self.program {
            Some(program) => program.numbers.bytes(&program.code, slots, gradients),
            None => Vec::new(),
        }
    }

    /// Returns the number of query heads that share a tile.
    pub(super) fn packed_heads(&self) -> u32 {
        match &self.params {
            Parameters::HopperForward(params, _) => 1 << params.packed_log2,
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
            (Parameters::Forward(p), Results::Forward { out, lse, statistics }) => {
                (p.out.address, p.lse) = (out, lse);
                [p.row_max, p.row_sum] = statistics.unwrap_or_default();
                p.layout.aligned = aligned(&[p.q, p.k, p.v, p.out]);
            }
            (Parameters::HopperForward(p, [q, k, v, o]), Results::Forward { out, lse, statistics }) => {
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
                Parameters::Backward(p),
                Results::Backward {
                    dq, dk, dv, workspace, ..
                },
            ) => {
                (p.dq.address, p.dk.address, p.dv.address) = (dq, dk, dv);
                p.exponents = exponents_at(p.exponents, workspace);
                p.layout.aligned = aligned(&[p.q, p.k, p.v, p.out, p.dout, p.dq, p.dk, p.dv]);
            }
            _ => return Ok(None),
        }
        Ok(Some(params))
    }

    /// Makes the error for results of the other pass.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn wrong_results(&self, device: String) -> Error {
        Error::Launch {
            device,
            kernel: self.entry.name,
            message: "the plan and the results are of different passes".to_owned(),
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

/// Returns the workspace of the backward kernels for Hopper, as offsets, and its bytes. `streams` is the kernel that
/// streams queries.
pub(super) fn query_sums(problem: &BackwardProblem, streams: &Entry) -> (QuerySums, u64) {
    let forward = problem.forward();
    let seqlen_q = NonZeroU32::new(forward.seqlen_q().next_multiple_of(streams.block_m)).unwrap_or(NonZeroU32::MIN);
    let rows = forward.batch() as u64 * forward.heads_q() as u64 * u64::from(seqlen_q.get());
    let statistic = rows * size_of::<f32>() as u64;
    let dq_columns = if streams.pass == Pass::BackwardAll {
        panel_columns(streams.head_dim)
    } else {
        0
    };
    let is_ordered = dq_columns > 0 && problem.deterministic();
    let (exponents, kept) = exponents(rows, rows / u64::from(DELTA_ROWS));
    let summed = kept + statistic * u64::from(dq_columns);
    let sums = QuerySums {
        exponents,
        dq: kept,
        turns: if is_ordered { summed } else { 0 },
        padded_q: seqlen_q,
        dq_columns,
    };
    let squares = rows * u64::from(dq_columns) / u64::from(HOPPER_ROWS * HOPPER_ROWS);
    let turns = if is_ordered {
        squares * size_of::<u32>() as u64
    } else {
        0
    };
    (sums, summed + turns)
}

/// Returns the workspace of the portable backward kernels, as offsets, and its bytes.
pub(super) fn portable_exponents(problem: &BackwardProblem) -> (Exponents, u64) {
    let forward = problem.forward();
    let heads = forward.batch() as u64 * forward.heads_q() as u64;
    let flags = u64::from(forward.seqlen_q().div_ceil(DELTA_ROWS));
    exponents(heads * u64::from(forward.seqlen_q()), heads * flags)
}

/// Returns the offsets of the statistics of `rows` queries with `flags` flags, and their bytes, rounded up to a
/// multiple of 16.
pub(super) fn exponents(rows: u64, flags: u64) -> (Exponents, u64) {
    let line = rows * size_of::<f32>() as u64;
    let exponents = Exponents {
        lse_log2: 0,
        delta: line,
        shift: 2 * line,
        far: 3 * line,
    };
    (
        exponents,
        (3 * line + flags * size_of::<u32>() as u64).next_multiple_of(16),
    )
}

/// Returns the statistics in the workspace at this address.
fn exponents_at(offsets: Exponents, workspace: u64) -> Exponents {
    Exponents {
        lse_log2: workspace + offsets.lse_log2,
        delta: workspace + offsets.delta,
        shift: workspace + offsets.shift,
        far: workspace + offsets.far,
    }
}

/// Where forward left what it knows of each query.
fn forward_rows(tensors: &BackwardTensors) -> ForwardRows {
    let [row_max, row_sum] = tensors
        .statistics
        .map_or([0; 2], |tensors| tensors.map(|tensor| tensor.address));
    ForwardRows {
        lse: tensors.lse.address,
        row_max,
        row_sum,
    }
}

/// Returns the workspace at this address.
fn placed(sums: QuerySums, workspace: u64) -> QuerySums {
    QuerySums {
        exponents: exponents_at(sums.exponents, workspace),
        dq: workspace + sums.dq,
        turns: if sums.turns == 0 { 0 } else { workspace + sums.turns },
        ..sums
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

/// Returns the layout of a problem whose results have no address yet.
fn unknown_alignment(problem: &Problem) -> Layout {
    Layout {
        head_dim: problem.head_dim(),
        aligned: 0,
    }
}

/// Returns true if every row of a tensor starts at a multiple of 16 bytes.
fn is_aligned(tensor: &StridedTensor, element_bytes: u64) -> bool {
    let strides = [tensor.batch_stride, tensor.head_stride, tensor.row_stride];
    tensor.address.is_multiple_of(16) && strides.iter().all(|stride| (stride * element_bytes).is_multiple_of(16))
}
