//! Parameters of the backward kernels.

use flash_attention_kernels::abi::{
    BackwardParams, DELTA_OF_KEYS, DELTA_OF_KEYS_AND_SINK, Exponents, ForwardRows, HopperBackwardParams,
    ListedBackwardParams, Params, QuerySums, QuerySumsParams, RotaryParams, TensorMap,
};
use flash_attention_kernels::entries::{Dtype, Entry, Pass};
use flash_attention_kernels::shape::{HOPPER_ROWS, key_box_rows};

use super::program::ScoreProgram;
use super::workspace::{exponents_at, placed};
use super::{Launch, Template, UNKNOWN_MAP, aligned, count, grid, unknown_alignment, work_list};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use super::{TableGradients, lists};
use crate::error::Error;
use crate::plan::lists::Owner;
use crate::plan::pass::{Backward, BackwardResults};
use crate::plan::rows::RowCopies;
use crate::plan::tile_map::{self, TileMap};
use crate::problem::{BackwardProblem, BackwardTensors, Problem};

/// Parameters of a backward kernel, by the struct that it takes.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "a launch holds one, and copies it once")]
pub enum BackwardParameters {
    /// Parameters of a portable kernel.
    Portable(BackwardParams),
    /// Parameters of a portable kernel for score programs and listed work.
    Listed(ListedBackwardParams),
    /// Parameters of Hopper's kernels, with the descriptions of their tensor maps.
    Hopper(HopperBackwardParams, BackwardMaps),
    /// Parameters of Hopper's preprocess and postprocess kernels.
    QuerySums(QuerySumsParams),
    /// Parameters of the kernel that copies one f32 per query to the workspace from the caller's tensor, which has gaps or another order.
    Rows(RotaryParams),
}

/// Descriptions of the tensor maps of Hopper's backward kernels.
#[derive(Clone, Copy, Debug)]
pub struct BackwardMaps {
    /// Map of q.
    pub q: TileMap,
    /// Map of k.
    pub k: TileMap,
    /// Map of v.
    pub v: TileMap,
    /// Map of the gradient of the output.
    pub dout: TileMap,
    /// Map of the gradient of k.
    pub dk: TileMap,
    /// Map of the gradient of v.
    pub dv: TileMap,
}

impl BackwardParameters {
    /// Returns the parameter buffer.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Portable(params) => params.as_bytes(),
            Self::Listed(params) => params.as_bytes(),
            Self::Hopper(params, _) => params.as_bytes(),
            Self::QuerySums(params) => params.as_bytes(),
            Self::Rows(params) => params.as_bytes(),
        }
    }
}

impl Template<BackwardResults> for BackwardParameters {
    fn placed<E>(
        mut self,
        results: &BackwardResults,
        rows: RowCopies,
        element_bytes: u64,
        encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
    ) -> Result<Self, E> {
        match &mut self {
            Self::Portable(params) => place_portable(params, results, rows, element_bytes),
            Self::Listed(params) => {
                place_portable(&mut params.backward, results, rows, element_bytes);
                params.values.aligned = params.backward.layout.aligned;
            }
            Self::Hopper(params, maps) => place_hopper(params, maps, results, encode)?,
            Self::QuerySums(params) => {
                params.dq.address = results.dq;
                params.rows = rows.read(params.rows, results.workspace);
                params.sums = placed(params.sums, results.workspace);
                params.layout.aligned = aligned(&[params.out, params.dout, params.dq], element_bytes);
            }
            Self::Rows(params) => params.to += results.workspace,
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
            (Self::Listed(params), [lists, ..]) => params.work = lists::placed(params.work, *lists),
            (Self::Rows(params), _) => *params = params.with_lists(addresses),
            _ => {}
        }
        self
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn tables(results: &BackwardResults) -> TableGradients {
        results.tables
    }
}

fn place_portable(params: &mut BackwardParams, results: &BackwardResults, rows: RowCopies, element_bytes: u64) {
    params.rows = rows.read(params.rows, results.workspace);
    params.dq.address = results.dq;
    params.dk.address = results.dk;
    params.dv.address = results.dv;
    params.exponents = exponents_at(params.exponents, results.workspace);
    let inputs = [params.q, params.k, params.v, params.out, params.dout];
    let gradients = [params.dq, params.dk, params.dv];
    params.layout.aligned = aligned(&inputs, element_bytes) & aligned(&gradients, element_bytes);
}

fn place_hopper<E>(
    params: &mut HopperBackwardParams,
    maps: &mut BackwardMaps,
    results: &BackwardResults,
    encode: impl Fn(&TileMap) -> Result<TensorMap, E>,
) -> Result<(), E> {
    maps.dk.address = results.dk;
    maps.dv.address = results.dv;
    params.q = encode(&maps.q)?;
    params.k = encode(&maps.k)?;
    params.v = encode(&maps.v)?;
    params.dout = encode(&maps.dout)?;
    params.dk = encode(&maps.dk)?;
    params.dv = encode(&maps.dv)?;
    params.sums = placed(params.sums, results.workspace);
    Ok(())
}

impl Launch<Backward> {
    /// Returns the workspace of the backward kernels for Hopper, as offsets.
    pub(in crate::plan) fn kept_sums(&self) -> Option<&QuerySums> {
        match &self.params {
            BackwardParameters::Hopper(params, _) => Some(&params.sums),
            BackwardParameters::QuerySums(params) => Some(&params.sums),
            BackwardParameters::Portable(_) | BackwardParameters::Listed(_) | BackwardParameters::Rows(..) => None,
        }
    }

    /// Makes a persistent launch like [`hopper_forward`](Launch::hopper_forward) for a backward kernel between
    /// preprocess and postprocess.
    pub(in crate::plan) fn hopper_backward(
        problem: &BackwardProblem,
        entry: &'static Entry,
        sums: QuerySums,
        multiprocessors: u32,
    ) -> Result<Self, Error> {
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let (heads_kv, heads_q_per_kv) = (problem.heads_kv(), count(problem.heads_q() / problem.heads_kv())?);
        let tiles = grid(problem.batch(), heads_kv, problem.seqlen_k(), entry.block_n)?;
        let work = work_list(tiles, multiprocessors);
        let params = HopperBackwardParams {
            q: UNKNOWN_MAP,
            k: UNKNOWN_MAP,
            v: UNKNOWN_MAP,
            dout: UNKNOWN_MAP,
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
            layout: unknown_alignment(problem.head_dim_v()),
            reserved: [0; 10],
        };
        let [q, k, v, out] = tile_map::dims(problem);
        let query = |tensor, dims| TileMap::new(tensor, dims, problem.input_type(), entry.block_m);
        let key_rows = key_box_rows(entry.block_n);
        let key = |tensor, dims| TileMap::new(tensor, dims, problem.input_type(), key_rows);
        let maps = BackwardMaps {
            q: query(&problem.q(), q),
            k: key(&problem.k(), k),
            v: key(&problem.v(), v),
            dout: query(&tensors.dout, out),
            dk: key(&tensors.dk, k),
            dv: key(&tensors.dv, v),
        };
        let grid = [work.blocks, 1, 1];
        Ok(Self::new(entry, grid, BackwardParameters::Hopper(params, maps)))
    }

    /// Makes the launch of Hopper's preprocess or postprocess kernel.
    pub(in crate::plan) fn query_sums(
        problem: &BackwardProblem,
        entry: &'static Entry,
        sums: QuerySums,
    ) -> Result<Self, Error> {
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let mut tiles = sums.padded_q.get() / entry.block_m;
        if entry.pass == Pass::BackwardPostprocess {
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
            // The first kernel reads rows of out and dout, the last writes rows of dq.
            layout: unknown_alignment(match entry.pass {
                Pass::BackwardPostprocess => problem.head_dim(),
                _ => problem.head_dim_v(),
            }),
            reserved: 0,
        };
        Ok(Self::new(entry, grid, BackwardParameters::QuerySums(params)))
    }

    /// Makes the launch of a portable backward kernel.
    pub(in crate::plan) fn backward(
        problem: &BackwardProblem,
        entry: &'static Entry,
        exponents: Exponents,
    ) -> Result<Self, Error> {
        let program = match entry.program {
            true => Some(ScoreProgram::backward(problem)?),
            false => None,
        };
        let (tensors, problem) = (problem.tensors(), problem.forward());
        let (grid, tiles) = if entry.pass == Pass::BackwardDkv {
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
            scale_log2: match &program {
                Some(program) if problem.program().is_some() => program.scale_log2(),
                _ => problem.scale().log2,
            },
            // The preprocess kernel reads rows of out and dout.
            layout: unknown_alignment(match entry.pass {
                Pass::BackwardPreprocess => problem.head_dim_v(),
                _ => problem.head_dim(),
            }),
            delta: delta_of_few(problem, tensors),
            reserved: 0,
        };
        let owner = match entry.pass {
            Pass::BackwardDq => Owner::Queries,
            Pass::BackwardDkv => Owner::Keys,
            _ => {
                return Ok(Self {
                    program,
                    ..Self::new(entry, grid, BackwardParameters::Portable(params))
                });
            }
        };
        let Some(program) = program else {
            return Ok(Self::new(entry, grid, BackwardParameters::Portable(params)));
        };
        let listed = program.listed(problem, owner, entry)?;
        let params = ListedBackwardParams {
            backward: params,
            values: unknown_alignment(problem.head_dim_v()),
            work: listed.work,
            lists_of_block: listed.lists_of_block,
            reserved: 0,
        };
        let launch = Self::new(entry, [listed.blocks, 1, 1], BackwardParameters::Listed(params));
        Ok(Self {
            program: Some(program),
            listed: Some(listed),
            ..launch
        })
    }
}

/// Returns the source of delta of queries that few keys share. In 16 bits `out` has lost more than delta, and from lse alone no query is
/// known to be one.
fn delta_of_few(problem: &Problem, tensors: &BackwardTensors) -> u32 {
    let has_sinks = problem.program().is_some_and(|program| program.sinks().is_some());
    match (problem.dtype(), tensors.statistics) {
        (Dtype::F32, Some(_)) if has_sinks => DELTA_OF_KEYS_AND_SINK,
        (Dtype::F32, Some(_)) => DELTA_OF_KEYS,
        _ => 0,
    }
}

/// Returns the addresses of the statistics that forward left for each query.
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
