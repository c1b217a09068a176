//! Cost of a plan, counted from the tiles and the mask that the kernels use.

use flash_attention_kernels::entries::{Arch, Pass};
use flash_attention_kernels::mask::{Blocks, Mask};
use flash_attention_kernels::shape::DELTA_ROWS;

use super::launch::OfSequences;
use super::pass::Backward;
use super::{Launch, Tiles};
use crate::problem::Problem;

/// Cost of a plan. The counts are exact, but leave out:
///
/// - the lists of copies of lse, row_max and row_sum that are not contiguous;
/// - reads of semaphores by blocks that wait for their turn, which depend on timing;
/// - scales of quantised inputs;
/// - in f32 backward with statistics, delta from the keys of queries that few keys share, which depends on the numbers;
/// - a score program's operations, and its reads of tables and of the lists. Tiles that a GPU's plan leaves out of its lists move no
///   bytes. Other pairs that only the program's mask hides count as visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that kernels load from device memory. Forward reads Q once, and K and V once for every query tile that
    /// sees them, or for every [cluster](super::Tiles::cluster) of tiles. Latent attention on a GPU reads values that are the
    /// first columns of their keys together with the keys. Backward on a GPU reads like that twice, for tiles of queries and for
    /// tiles of keys, or once, for tiles of keys. Backward on the CPU reads K and V once; Q, dO and their statistics once for
    /// every run of keys that sees them; and the f32 dQ for every such run but the first.
    pub bytes_read: u128,
    /// Bytes that kernels store to device memory: each result once, and in backward the workspace with the additions
    /// to the dQ accumulator. On the CPU also the f32 dQ, as often as it is read.
    pub bytes_written: u128,
    /// Multiplications and additions of the products over visible pairs: two products in forward, five in backward,
    /// even where some are computed twice.
    pub flops: u128,
}

/// Bytes of lse, or of another f32 per query.
const STATISTIC: u128 = size_of::<f32>() as u128;

/// Bytes of the statistics per query of backward on a GPU: lse in base 2, delta and a shift.
const EXPONENT: u128 = 3 * STATISTIC;

impl Cost {
    /// Counts a forward pass that writes `statistics` f32 per query.
    pub(super) fn forward(problem: &Problem, tiles: Tiles, launches: &[Launch], statistics: u32) -> Self {
        if !problem.has_queries() {
            return Self::NOTHING;
        }
        let walked = Walked::new(problem);
        let heads = problem.batch() as u128 * problem.heads_q() as u128;
        let packs = heads / u128::from(tiles.packed_heads);
        let seqlen_q = u128::from(problem.seqlen_q());
        let [head_dim, head_dim_v] = head_dims(problem);
        let row = head_dim * problem.input_type().bytes() as u128;
        let out_row = head_dim_v * problem.dtype().bytes() as u128;
        let pair = pair_bytes(problem, launches);
        let listed = launches.first().and_then(Launch::streamed_rows);
        let keys = listed.unwrap_or_else(|| packs * (walked.keys)(problem, tiles));
        Self {
            bytes_read: heads * seqlen_q * row + keys * pair,
            bytes_written: heads * seqlen_q * (out_row + u128::from(statistics) * STATISTIC),
            flops: 2 * heads * walked.visible_pairs * (head_dim + head_dim_v),
        }
    }

    /// Counts a forward pass over sequences that writes `statistics` f32 per query.
    pub(super) fn of_sequences(problem: &Problem, sequences: &OfSequences, statistics: u32) -> Self {
        if !problem.has_queries() {
            return Self::NOTHING;
        }
        let heads = problem.batch() as u128 * problem.heads_q() as u128;
        let seqlen_q = u128::from(problem.seqlen_q());
        let [row, row_v] = row_bytes(problem);
        let [head_dim, head_dim_v] = head_dims(problem);
        let pair = pair_bytes(problem, &sequences.launches);
        let keys = sequences.launches.first().and_then(Launch::streamed_rows).unwrap_or(0);
        let partial = u128::from(sequences.partial_bytes);
        Self {
            bytes_read: heads * seqlen_q * row + keys * pair + partial,
            bytes_written: heads * seqlen_q * (row_v + u128::from(statistics) * STATISTIC) + partial,
            flops: 2 * problem.heads_q() as u128 * sequences.pairs * (head_dim + head_dim_v),
        }
    }

    const NOTHING: Self = Self {
        bytes_read: 0,
        bytes_written: 0,
        flops: 0,
    };

    /// A backward pass on the CPU over queries alone or keys alone, which writes zeros.
    fn cpu_backward_of_nothing(problem: &Problem) -> Self {
        let queries = problem.heads_q() as u128 * u128::from(problem.seqlen_q());
        let keys = problem.heads_kv() as u128 * u128::from(problem.seqlen_k());
        let [row, row_v] = row_bytes(problem);
        Self {
            bytes_written: problem.batch() as u128 * (queries * row + keys * (row + row_v)),
            ..Self::NOTHING
        }
    }

    /// Counts a backward pass on the CPU that reads `statistics` f32 per query from forward.
    pub(super) fn cpu_backward(problem: &Problem, tiles: Tiles, statistics: u32) -> Self {
        if !problem.has_pairs() {
            return Self::cpu_backward_of_nothing(problem);
        }
        let walked = Walked::new(problem);
        let batch = problem.batch() as u128;
        let (heads_q, heads_kv) = (batch * problem.heads_q() as u128, batch * problem.heads_kv() as u128);
        let (seqlen_q, seqlen_k) = (u128::from(problem.seqlen_q()), u128::from(problem.seqlen_k()));
        let ([row, row_v], row_of_sums) = (row_bytes(problem), 4 * u128::from(problem.head_dim()));
        let streamed = (walked.queries)(problem, tiles.block_m, tiles.block_n);
        let added = heads_q * (streamed - (walked.seeing_queries)(problem, tiles.block_m)) * row_of_sums;
        let delta = heads_q * seqlen_q * STATISTIC;
        Self {
            bytes_read: heads_q * seqlen_q * 2 * row_v
                + heads_kv * seqlen_k * (row + row_v)
                + heads_q * streamed * (row + row_v + (u128::from(statistics) + 1) * STATISTIC)
                + added,
            bytes_written: delta + added + heads_q * seqlen_q * row + heads_kv * seqlen_k * (row + row_v),
            flops: heads_q * walked.visible_pairs * backward_flops(problem),
        }
    }

    /// Returns this cost with copies of so many bytes, which are read once and written once.
    pub(super) fn with_copies(self, bytes: u128) -> Self {
        Self {
            bytes_read: self.bytes_read + bytes,
            bytes_written: self.bytes_written + bytes,
            ..self
        }
    }

    /// Counts a backward pass on a GPU that reads `statistics` f32 per query from forward.
    pub(super) fn backward(problem: &Problem, launches: &[Launch<Backward>], statistics: u32) -> Self {
        let walked = Walked::new(problem);
        let heads = problem.batch() as u128 * problem.heads_q() as u128;
        let pairs = problem.placed().map(|placed| placed.pairs(problem.causal()));
        let flops = heads * pairs.unwrap_or(walked.visible_pairs) * backward_flops(problem);
        let zero = Self { flops, ..Self::NOTHING };
        launches.iter().fold(zero, |total, launch| {
            let (read, written) = backward_bytes(problem, &walked, launch, statistics.into());
            Self {
                bytes_read: total.bytes_read + read,
                bytes_written: total.bytes_written + written,
                flops,
            }
        })
    }
}

/// Returns (bytes read, bytes written) of one kernel of the backward pass.
fn backward_bytes(problem: &Problem, walked: &Walked, launch: &Launch<Backward>, statistics: u128) -> (u128, u128) {
    let entry = launch.entry;
    let batch = problem.batch() as u128;
    let (heads_q, heads_kv) = (batch * problem.heads_q() as u128, batch * problem.heads_kv() as u128);
    let (seqlen_q, seqlen_k) = (u128::from(problem.seqlen_q()), u128::from(problem.seqlen_k()));
    let [row, row_v] = row_bytes(problem);
    let pair = row + row_v; // of K and V, or of Q and dO
    let queries = || (walked.queries)(problem, entry.block_m, entry.block_n);
    // Queries with their dO and statistics, which on Hopper are read in whole tiles, and in 16 bits their flags.
    let flags = |rows: u128| {
        if problem.dtype().bytes() == 2 {
            rows / u128::from(DELTA_ROWS)
        } else {
            0
        }
    };
    let streamed = |rows: u128, whole: u128| heads_q * (queries() * pair + rows * EXPONENT + flags(whole) * STATISTIC);
    let keys = heads_kv * seqlen_k * pair;
    let sums = launch.kept_sums();
    let padded_q = sums.map_or(seqlen_q, |sums| sums.padded_q.get().into());
    let dq_row = sums.map_or(0, |sums| u128::from(sums.dq_columns) * STATISTIC);
    match entry.pass {
        Pass::BackwardPreprocess if entry.arch == Arch::Sm90a => (
            heads_q * seqlen_q * (2 * row_v + statistics * STATISTIC),
            heads_q * (padded_q * (EXPONENT + dq_row) + padded_q / u128::from(DELTA_ROWS) * STATISTIC),
        ),
        Pass::BackwardPreprocess => (
            heads_q * seqlen_q * (2 * row_v + statistics * STATISTIC),
            heads_q * (seqlen_q * EXPONENT + seqlen_q.div_ceil(DELTA_ROWS.into()) * STATISTIC),
        ),
        Pass::BackwardDq => {
            let keys = || heads_q * (walked.keys)(problem, Tiles::of(entry));
            let read = heads_q * seqlen_q * (pair + EXPONENT) + launch.streamed_rows().unwrap_or_else(keys) * pair;
            (read, heads_q * seqlen_q * row)
        }
        // Kernels for score programs read no flags.
        Pass::BackwardDkv if entry.program => {
            let walks = if entry.two_walks { 2 } else { 1 };
            let rows = launch.streamed_rows().unwrap_or_else(|| heads_q * queries());
            (keys + walks * rows * (pair + EXPONENT), keys)
        }
        Pass::BackwardDkv if entry.arch == Arch::Sm80 => {
            let walks = if entry.two_walks { 2 } else { 1 };
            let runs = (walked.query_runs)(problem, entry.block_m, entry.block_n);
            (keys + walks * streamed(queries(), runs), keys)
        }
        Pass::BackwardDkv | Pass::BackwardDqkv => {
            let walks = if entry.two_walks { 2 } else { 1 };
            let whole = (walked.whole_queries)(problem, entry.block_m, entry.block_n);
            (keys + walks * streamed(whole, whole), keys + heads_q * whole * dq_row)
        }
        Pass::BackwardPostprocess => (heads_q * padded_q * dq_row, heads_q * seqlen_q * row),
        Pass::Forward | Pass::Combine | Pass::Rotary => (0, 0),
    }
}

/// Returns head_dim of q and k, and of v and out.
fn head_dims(problem: &Problem) -> [u128; 2] {
    [problem.head_dim(), problem.head_dim_v()].map(u128::from)
}

/// Returns the bytes of a row of q and k, and of v and out.
fn row_bytes(problem: &Problem) -> [u128; 2] {
    head_dims(problem).map(|head_dim| head_dim * problem.input_type().bytes() as u128)
}

/// Returns the bytes that these launches of a forward pass load for a key and its value.
fn pair_bytes(problem: &Problem, launches: &[Launch]) -> u128 {
    let [row, row_v] = row_bytes(problem);
    let is_latent = launches.first().is_some_and(|launch| launch.entry.is_latent());
    if is_latent && problem.v().has_rows_of(&problem.k()) {
        row
    } else {
        row + row_v
    }
}

/// Returns the operations of the five products of backward for a pair: Q K^T, dQ and dK over head_dim of q, dO V^T and
/// dV over that of v.
fn backward_flops(problem: &Problem) -> u128 {
    let [head_dim, head_dim_v] = head_dims(problem);
    2 * (3 * head_dim + 2 * head_dim_v)
}

/// Counts of rows that the kernels load under a mask.
struct Walked {
    /// Visible pairs of a query and a key, in one head.
    visible_pairs: u128,
    /// Rows of K that all query tiles of one head, or of packed heads, load; tiles of a cluster load them once.
    keys: fn(&Problem, Tiles) -> u128,
    /// Rows of Q that all key tiles of one head load.
    queries: fn(&Problem, u32, u32) -> u128,
    /// These rows of Q in whole runs of [`DELTA_ROWS`].
    query_runs: fn(&Problem, u32, u32) -> u128,
    /// These rows of Q, including the rows past the end of the last tile.
    whole_queries: fn(&Problem, u32, u32) -> u128,
    /// Rows of Q in the query tiles of one head that see any key.
    seeing_queries: fn(&Problem, u32) -> u128,
}

impl Walked {
    fn new(problem: &Problem) -> Self {
        let (seqlen_q, seqlen_k) = (problem.seqlen_q(), problem.seqlen_k());
        if problem.causal() {
            Self {
                visible_pairs: Mask::<true>::new(seqlen_q, seqlen_k).pairs(),
                keys: keys::<true>,
                queries: queries::<true>,
                query_runs: query_runs::<true>,
                whole_queries: whole_queries::<true>,
                seeing_queries: seeing_queries::<true>,
            }
        } else {
            Self {
                visible_pairs: Mask::<false>::new(seqlen_q, seqlen_k).pairs(),
                keys: keys::<false>,
                queries: queries::<false>,
                query_runs: query_runs::<false>,
                whole_queries: whole_queries::<false>,
                seeing_queries: seeing_queries::<false>,
            }
        }
    }
}

/// Counts whole blocks of keys for each query tile, or for the tiles of each cluster, up to the end of the sequence.
fn keys<const CAUSAL: bool>(problem: &Problem, of: Tiles) -> u128 {
    let packed = of.packed_heads;
    let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
    tiles(problem.seqlen_q() * packed, of.block_m * of.cluster)
        .map(|(first, rows)| (first / packed, (first + rows - 1) / packed))
        .map(|(first, last)| mask.key_blocks(first, last - first + 1, of.block_n))
        .map(|blocks| rows_of(blocks, of.block_n, problem.seqlen_k()))
        .sum()
}

/// Counts whole blocks of queries for each key tile, up to the end of the sequence.
fn queries<const CAUSAL: bool>(problem: &Problem, block_m: u32, block_n: u32) -> u128 {
    let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
    tiles(problem.seqlen_k(), block_n)
        .map(|(first, rows)| rows_of(mask.query_blocks(first, rows, block_m), block_m, problem.seqlen_q()))
        .sum()
}

fn query_runs<const CAUSAL: bool>(problem: &Problem, block_m: u32, block_n: u32) -> u128 {
    let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
    tiles(problem.seqlen_k(), block_n)
        .map(|(first, rows)| rows_of(mask.query_blocks(first, rows, block_m), block_m, problem.seqlen_q()))
        .map(|rows| rows.next_multiple_of(DELTA_ROWS.into()))
        .sum()
}

fn whole_queries<const CAUSAL: bool>(problem: &Problem, block_m: u32, block_n: u32) -> u128 {
    let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
    tiles(problem.seqlen_k(), block_n)
        .map(|(first, rows)| mask.query_blocks(first, rows, block_m))
        .map(|blocks| u128::from(blocks.end - blocks.begin) * u128::from(block_m))
        .sum()
}

fn seeing_queries<const CAUSAL: bool>(problem: &Problem, block_m: u32) -> u128 {
    let mask = Mask::<CAUSAL>::new(problem.seqlen_q(), problem.seqlen_k());
    rows_of(
        mask.query_blocks(0, problem.seqlen_k(), block_m),
        block_m,
        problem.seqlen_q(),
    )
}

/// Iterates over (first row, rows) of each tile of a sequence.
fn tiles(seqlen: u32, tile: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..seqlen.div_ceil(tile)).map(move |index| (index * tile, tile.min(seqlen - index * tile)))
}

/// Returns the number of rows of a run of blocks that exist.
fn rows_of(blocks: Blocks, block: u32, seqlen: u32) -> u128 {
    let row = |index: u32| (u128::from(index) * u128::from(block)).min(seqlen.into());
    row(blocks.end) - row(blocks.begin)
}
