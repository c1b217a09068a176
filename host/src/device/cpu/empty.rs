//! Problems without a (query, key) pair, because one of the sequences, or the batch, is empty: results are zeros, and
//! lse -inf or that of a sink.

use flash_attention_kernels::abi::StridedTensor;

use super::kernels::Kernels;
use super::program::sink;
use super::tensor::{Head, QueryRows};
use crate::problem::{BackwardTensors, Problem};

/// Writes out, lse and, where their addresses are given, row_max and row_sum of queries that see no key.
///
/// # Safety
/// The contract of [`forward`](super::forward::forward).
pub(super) unsafe fn forward(
    kernels: &Kernels,
    problem: &Problem,
    out: StridedTensor,
    lse: StridedTensor,
    statistics: Option<[StridedTensor; 2]>,
) {
    if !problem.has_queries() {
        return;
    }
    let queries = problem.batch() * problem.heads_q() * problem.seqlen_q() as usize;
    let nothing = f32::NEG_INFINITY;
    let write = |tensor, value: &dyn Fn(usize) -> f32| {
        let rows = QueryRows::new(tensor, problem);
        // SAFETY: each of these tensors has an f32 a query, says the caller.
        (0..queries).for_each(|query| unsafe { rows.at(query).write(value(query)) });
    };
    let sink_of = |query: usize| {
        let head = query / problem.seqlen_q() as usize % problem.heads_q();
        problem.program().and_then(|program| sink(program, head))
    };
    write(lse, &|query| sink_of(query).unwrap_or(nothing));
    if let Some([row_max, row_sum]) = statistics {
        write(row_max, &|_| nothing);
        write(row_sum, &|_| 0.0);
    }
    // SAFETY: passed on to the caller.
    unsafe {
        zero(
            kernels,
            problem,
            out,
            (problem.heads_q(), problem.seqlen_q()),
            problem.head_dim_v(),
        )
    };
}

/// Writes dq where there are queries, dk and dv where there are keys.
///
/// # Safety
/// The contract of [`backward`](super::backward::backward).
pub(super) unsafe fn backward(kernels: &Kernels, problem: &Problem, tensors: &BackwardTensors) {
    let queries = (problem.heads_q(), problem.seqlen_q());
    let keys = (problem.heads_kv(), problem.seqlen_k());
    // SAFETY: passed on to the caller.
    unsafe {
        if problem.has_queries() {
            zero(kernels, problem, tensors.dq, queries, problem.head_dim());
        }
        if problem.has_keys() {
            zero(kernels, problem, tensors.dk, keys, problem.head_dim());
            zero(kernels, problem, tensors.dv, keys, problem.head_dim_v());
        }
    }
}

/// Writes zeros to every row of a tensor.
///
/// # Safety
/// The tensor has this many heads and rows of `head_dim`, and no other thread accesses it.
unsafe fn zero(
    kernels: &Kernels,
    problem: &Problem,
    tensor: StridedTensor,
    (heads, seqlen): (usize, u32),
    head_dim: u32,
) {
    let head_dim = head_dim as usize;
    let zeros = vec![0.0; head_dim];
    for head in 0..problem.batch() * heads {
        // SAFETY: passed on to the caller.
        let rows = unsafe { Head::new(tensor, problem.dtype(), head / heads, head % heads, head_dim) };
        (0..seqlen as usize).for_each(|row| rows.store(kernels, row, &zeros));
    }
}
