//! Workspace of the backward kernels: offsets while a plan is made, addresses once it is allocated.

use std::num::NonZeroU32;

use flash_attention_kernels::abi::{Exponents, QuerySums};
use flash_attention_kernels::entries::Entry;
use flash_attention_kernels::shape::{DELTA_ROWS, HOPPER_ROWS, panel_columns};

use crate::problem::BackwardProblem;

/// Returns the workspace of the backward kernels for Hopper, as offsets, and its bytes. `all` is the kernel between
/// preprocess and postprocess.
pub(in crate::plan) fn query_sums(problem: &BackwardProblem, all: &Entry) -> (QuerySums, u64) {
    let forward = problem.forward();
    let seqlen_q = NonZeroU32::new(forward.seqlen_q().next_multiple_of(all.block_m)).unwrap_or(NonZeroU32::MIN);
    let rows = forward.batch() as u64 * forward.heads_q() as u64 * u64::from(seqlen_q.get());
    let statistic = rows * size_of::<f32>() as u64;
    let dq_columns = panel_columns(all.head_dim);
    let is_ordered = problem.deterministic();
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
pub(in crate::plan) fn portable_exponents(problem: &BackwardProblem) -> (Exponents, u64) {
    let forward = problem.forward();
    let heads = forward.batch() as u64 * forward.heads_q() as u64;
    let flags = u64::from(forward.seqlen_q().div_ceil(DELTA_ROWS));
    exponents(heads * u64::from(forward.seqlen_q()), heads * flags)
}

/// Returns the offsets of the statistics of `rows` queries with `flags` flags, and their bytes, rounded up to a
/// multiple of 16.
pub(in crate::plan) fn exponents(rows: u64, flags: u64) -> (Exponents, u64) {
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
pub(super) fn exponents_at(offsets: Exponents, workspace: u64) -> Exponents {
    Exponents {
        lse_log2: workspace + offsets.lse_log2,
        delta: workspace + offsets.delta,
        shift: workspace + offsets.shift,
        far: workspace + offsets.far,
    }
}

/// Returns the workspace at this address.
pub(super) fn placed(sums: QuerySums, workspace: u64) -> QuerySums {
    QuerySums {
        exponents: exponents_at(sums.exponents, workspace),
        dq: workspace + sums.dq,
        turns: if sums.turns == 0 { 0 } else { workspace + sums.turns },
        ..sums
    }
}
