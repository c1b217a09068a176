//! The path by which the CPU computes a plan: tiles, products, and the walk over the keys.

use flash_attention_kernels::entries::Dtype;

use super::Tiles;
use crate::problem::Problem;
use crate::target::Instructions;

/// At most this many queries take the decode path in forward, where lanes are elements of a head: as lanes they would
/// leave most of a register idle.
const FEW: u32 = 4;

/// Least number of keys of a split.
const SPLIT: u32 = 2048;

/// Splits of a sequence at most.
const MAX_SPLITS: u32 = 16;

/// Bytes of half of the L1 cache of the processors that have AMX.
const HALF_L1: usize = 24 << 10;

/// Bytes of half of the smallest L2 cache of the processors that have AVX2.
const HALF_L2: usize = 128 << 10;

/// Path by which the CPU computes a plan: a function of the problem and the [`Instructions`] of the plan's device. The number of threads
/// that share the work, and the number of heads of few queries that a task takes, are chosen for all plans of a batch together; no result
/// depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CpuPath {
    /// True for the decode path, on which queries are computed one by one, and lanes are elements of a head.
    pub few: bool,
    /// Number of bf16 parts of each number in products of pairs of bf16; 0 where products are of f32.
    pub parts: usize,
    /// Number of tiles of keys of a split, each of which is summed from nothing and then merged. Backward has no splits.
    pub split_blocks: u32,
}

impl CpuPath {
    /// The path and the tiles of a forward pass.
    ///
    /// A panel of queries (48 on AVX-512, 16 on AVX2, 8 in portable code; `block_m` is a multiple of each) with its part
    /// of the output and the scores, and a tile of keys and values, stay in the L1 and L2 caches of a core. Each tile
    /// of keys is loaded and widened once for all queries of a task. A task has 384 queries if there are enough tasks to
    /// keep every thread busy to the end, fewer if not, and not twice those of the sequence. Results do not depend on this number.
    pub(super) fn forward(problem: &Problem, instructions: Instructions, threads: usize) -> (Self, Tiles) {
        let few = is_few(problem);
        let parts = parts(problem, instructions);
        let heads = problem.batch() * problem.heads_q();
        let enough = |block_m: &u32| {
            let tasks = heads * problem.seqlen_q().div_ceil(*block_m) as usize;
            tasks >= 16 * threads && *block_m < 2 * problem.seqlen_q()
        };
        let tiles = Tiles {
            block_m: [384, 192, 96].into_iter().find(enough).unwrap_or(48),
            block_n: if few {
                few_block_n(problem.widest_head_dim() as usize * problem.dtype().bytes())
            } else {
                forward_block_n(problem, instructions, parts)
            },
            packed_heads: 1,
            cluster: 1,
        };
        let split = problem.seqlen_k().div_ceil(MAX_SPLITS).max(SPLIT);
        let path = Self {
            few,
            parts,
            split_blocks: split.div_ceil(tiles.block_n),
        };
        (path, tiles)
    }

    /// The path and the tiles of a backward pass, where a task owns keys and streams queries.
    ///
    /// The keys of a task and their gradients stay in L2, and each tile of queries is widened and transposed once for all
    /// of them. A long sequence gets more keys per task, a short one fewer, so that it still has tasks for every thread.
    /// Gradients are sums of what tasks add, so this depends on sizes alone, never on threads.
    pub(super) fn backward(problem: &Problem, instructions: Instructions) -> (Self, Tiles) {
        let long = problem.seqlen_k() >= 4096 && problem.widest_head_dim() <= 128;
        let tiles = Tiles {
            block_m: 96,
            block_n: if long { 512 } else { 256 },
            packed_heads: 1,
            cluster: 1,
        };
        let path = Self {
            few: false,
            parts: parts(problem, instructions),
            split_blocks: problem.seqlen_k().div_ceil(tiles.block_n).max(1),
        };
        (path, tiles)
    }

    /// Returns a description of the products for the printed plan.
    pub(super) fn products(&self, dtype: Dtype) -> String {
        match (self.parts, dtype) {
            (0, _) => "products of f32".to_owned(),
            (1, _) => "products of pairs of bf16".to_owned(),
            (parts, dtype) => format!("products of pairs of bf16, {parts} to each {}", dtype.name()),
        }
    }
}

/// Returns true if a forward pass takes the decode path. With a program, and with quantised inputs, it does not.
fn is_few(problem: &Problem) -> bool {
    problem.seqlen_q() <= FEW && problem.program().is_none() && problem.scales().is_none()
}

/// Number of bf16 parts of the numbers of a problem. Forward and backward agree, so that a score that backward computes again is the
/// same number.
fn parts(problem: &Problem, instructions: Instructions) -> usize {
    // With one key, dP - delta has to be 0. delta is summed in the order of an f32 product, so dP has to be one (see
    // `device/cpu/backward/delta.rs`).
    if is_few(problem) || problem.seqlen_k() == 1 {
        0
    } else {
        // A code times its scale has the bits of an f32.
        let dtype = problem.scales().map_or(problem.dtype(), |_| Dtype::F32);
        instructions.bf16_parts(dtype)
    }
}

/// Keys of a tile of few queries, whose rows have so many bytes: 64, and more of short rows, of which a tile is done before what
/// begins and ends it is paid for.
fn few_block_n(row_bytes: usize) -> u32 {
    match row_bytes {
        ..=64 => 256,
        65..=128 => 128,
        _ => 64,
    }
}

/// Keys of a tile: 64.
///
/// - 128 with AVX2, whose panels are narrow, if keys and values take at most [`HALF_L2`] as f32: the output is loaded and stored half as
///   often. Measured on Zen 4, that is 1 to 2.5 % faster. 256 keys are up to 1 % faster still, but more of them are then summed before they
///   are added to the rest: a real layer's output was then off by 2.4e-6, more than its test allows. Programs skip tiles of 64.
/// - 32 where only then the parts of keys and values take at most half of the L1 cache. Measured, that is 2 to 7 % faster, and 10 % slower
///   where even then they take more.
fn forward_block_n(problem: &Problem, instructions: Instructions, parts: usize) -> u32 {
    let both_head_dims = problem.head_dim() + problem.head_dim_v();
    let bytes = |keys: u32, of_element: usize| of_element * (keys * both_head_dims) as usize;
    if instructions == Instructions::Avx2 && problem.program().is_none() {
        let suits = problem.seqlen_k() > 64 && bytes(128, 4) <= HALF_L2;
        return if suits { 128 } else { 64 };
    }
    let fits = |keys: u32| bytes(keys, 2 * parts) <= HALF_L1;
    if parts > 1 && fits(32) && !fits(64) { 32 } else { 64 }
}
