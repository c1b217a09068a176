//! The forward pass on the CPU: the loop of the GPU kernels, one task for each tile of queries of each head.
//!
//! Scores are computed as K Q^T and the output as V^T P^T, so that queries are lanes (see `kernels/`). Keys are
//! processed in segments (splits). Each is summed from nothing and then merged by largest score, in order. So the
//! result is the same bits if one task computes all segments of a tile or each segment is a task of its own.
//!
//! This file has the problem and its tasks. `scratch.rs` computes one tile of queries from memory to memory, with
//! tiles of keys as in `tiled.rs` or, for few queries, `few.rs`. `state.rs` is the state between two tiles of keys.

mod few;
mod pairs;
mod program;
mod scratch;
mod state;
mod tiled;

use std::ops::Range;
use std::sync::OnceLock;

use flash_attention_kernels::abi::StridedTensor;

use super::kernels::{Kernels, Pairs, SIDE};
use super::program::{ScoreProgram, Walk};
use super::team::Team;
use super::tensor::{Head, Panels, QueryRows, Visibility};
use super::{is_few, pairs_of};
use crate::plan::{Plan, Tiles};
use crate::problem::Problem;
use crate::progress::Reporter;
use scratch::Scratch;
use state::State;

/// Least number of keys of a segment.
const SEGMENT: u32 = 2048;

/// Segments of a sequence at most.
const MAX_SEGMENTS: u32 = 16;

/// Most cells, strips of queries by tiles of keys, whose coverage is kept for all heads: a megabyte, and 32768 x 32768
/// pairs.
const KEPT_CELLS: usize = 1 << 20;

/// Bytes of half of the L1 cache of the processors that have AMX.
const HALF_L1: usize = 24 << 10;

/// A forward problem being computed.
struct Forward<'a> {
    kernels: &'static Kernels,
    problem: &'a Problem,
    /// Products of bf16 pairs, if this problem uses them.
    pairs: Option<&'static Pairs>,
    /// Number of bf16 parts that an element is split into for them; 0 if it is not.
    parts: usize,
    /// True for the decode path: queries are computed one by one. Tiles of q and the output then hold rows of
    /// `panels.depth`.
    few: bool,
    /// Number of query heads per tile. It is more than 1 only if queries are few and heads share keys, which are then
    /// read from memory once for all of them.
    together: usize,
    panels: Panels,
    tiles: Tiles,
    visibility: Visibility,
    /// Score program, if there is one. Its mask includes the causal mask, and `visibility` then has none.
    program: Option<ScoreProgram>,
    /// Walk of each tile of queries, once it is known, if all heads have one mask and it fits [`KEPT_CELLS`].
    walks: Vec<OnceLock<Walk>>,
    scale: Units,
    out: StridedTensor,
    lse: QueryRows,
    /// row_max and row_sum, if they are wanted.
    statistics: Option<[QueryRows; 2]>,
    reporter: &'a Reporter<'a>,
}

/// The units of scores, as the softmax takes them.
#[derive(Clone, Copy)]
struct Units {
    /// Factors that turn a score into an exponent of e, and of 2.
    natural: f32,
    log2: f32,
    /// Factor that turns a score into the one that backward recomputes.
    sign: f32,
}

/// A tile of queries of one head.
#[derive(Clone, Copy)]
struct Tile {
    batch: usize,
    head: usize,
    q: Head,
    k: Head,
    v: Head,
    out: Head,
    /// Index of the first query in lse.
    first: usize,
    first_row: u32,
    /// Number of queries, head after head.
    rows: usize,
    /// Bytes from one head to the next in q and in out.
    head_steps: [usize; 2],
    /// Number of key tiles that any of the queries sees.
    blocks: u32,
    /// Number of key tiles that all queries see whole.
    whole_blocks: u32,
}

/// Computes out, lse and, where their addresses are given, row_max and row_sum.
///
/// # Safety
/// The contract of [`Backend::run`](crate::device::Backend::run).
pub(super) unsafe fn forward(
    team: &Team<'_>,
    plan: &Plan,
    out: StridedTensor,
    lse: StridedTensor,
    statistics: Option<[StridedTensor; 2]>,
    reporter: &Reporter<'_>,
) {
    let (problem, tiles) = (plan.problem(), plan.tiles());
    let program = problem.program().and_then(|of| {
        let program = ScoreProgram::new(team.kernels, problem, problem.scale().magnitude)?;
        Some(program.with_scores(of.expression(), &[of.score()]))
    });
    let few = is_few(problem);
    let (pairs, parts) = pairs_of(team.kernels, problem).unzip();
    let parts = parts.unwrap_or(0);
    let tiles = Tiles {
        block_n: block_n(tiles, parts, problem.head_dim()),
        ..tiles
    };
    let mut forward = Forward {
        kernels: team.kernels,
        pairs,
        parts,
        few,
        together: 1,
        panels: Panels {
            lanes: if pairs.is_some() { 2 * SIDE } else { team.kernels.panel },
            depth: (problem.head_dim() as usize).next_multiple_of(SIDE),
        },
        problem,
        tiles,
        visibility: Visibility::new(problem, program.is_none() && problem.causal()),
        scale: match &program {
            Some(program) if program.score.is_some() => Units {
                natural: 1.0,
                log2: std::f32::consts::LOG2_E,
                sign: 1.0,
            },
            _ => Units {
                natural: problem.softmax_scale().abs(),
                log2: problem.scale().magnitude_log2,
                sign: problem.scale().sign,
            },
        },
        walks: walks(problem, program.as_ref(), tiles),
        program,
        out,
        lse: QueryRows::new(lse, problem),
        statistics: statistics.map(|tensors| tensors.map(|tensor| QueryRows::new(tensor, problem))),
        reporter,
    };
    let segments = forward.segments(problem.seqlen_k().div_ceil(tiles.block_n)).count();
    forward.together = forward.heads_together(team.threads, segments);
    let query_tiles = problem.seqlen_q().div_ceil(tiles.block_m) as usize;
    let heads = problem.batch() * problem.heads_q() / forward.together;
    let tasks = heads * query_tiles;
    // Large tiles first: under a causal mask the last ones see the most keys.
    let tile = |task: usize| forward.tile(task / query_tiles, query_tiles - 1 - task % query_tiles);
    // A unit of progress is a tile of keys for a tile of queries, and one more for the tile itself.
    let units = |task| u64::from(tile(task).blocks) + 1;
    reporter.begin(|| heads as u64 * (0..query_tiles).map(units).sum::<u64>());
    if tasks >= 2 * team.threads || segments == 1 {
        forward.by_tiles(team, tasks, tile);
    } else {
        forward.by_segments(team, tasks, segments, tile);
    }
}

/// Makes room for the walk of each tile of queries; none where heads differ, or cells are too many to keep.
fn walks(problem: &Problem, program: Option<&ScoreProgram>, tiles: Tiles) -> Vec<OnceLock<Walk>> {
    let key_tiles = problem.seqlen_k().div_ceil(tiles.block_n) as usize;
    let cells = |width: usize| (problem.seqlen_q() as usize).div_ceil(width) * key_tiles;
    let are_kept = |program: &ScoreProgram| program.has_one_mask() && cells(program.kernels.strip_lanes) <= KEPT_CELLS;
    let query_tiles = problem.seqlen_q().div_ceil(tiles.block_m);
    let count = if program.is_some_and(are_kept) { query_tiles } else { 0 };
    (0..count).map(|_| OnceLock::new()).collect()
}

/// Keys of a tile: those of the plan; half of them where they have parts of which, with those of the values, only then half of
/// the L1 cache is enough. Measured, that is 2 to 7 % faster, and 10 % slower where even then it is not.
fn block_n(tiles: Tiles, parts: usize, head_dim: u32) -> u32 {
    let fits = |keys: u32| 2 * 2 * parts * (keys * head_dim) as usize <= HALF_L1;
    let half = tiles.block_n / 2;
    if parts > 1 && fits(half) && !fits(tiles.block_n) {
        half
    } else {
        tiles.block_n
    }
}

impl Forward<'_> {
    /// Runs one task for each tile, which computes all its segments in order.
    fn by_tiles(&self, team: &Team<'_>, tasks: usize, tile: impl Fn(usize) -> Tile + Sync) {
        let scratch = || (Scratch::new(self), State::new(self), State::new(self));
        team.share(tasks, scratch, |(scratch, state, partial), task| {
            let tile = tile(task);
            scratch.load_query(self, &tile);
            for (index, blocks) in self.segments(tile.blocks).enumerate() {
                let units = blocks.len() as u64;
                if index == 0 {
                    scratch.attend(self, &tile, blocks, state);
                } else if self.program.is_none() || scratch.walk.within(blocks.clone()).next().is_some() {
                    scratch.attend(self, &tile, blocks, partial);
                    state.merge(self, tile.rows, partial);
                }
                self.reporter.add(units);
            }
            scratch.store(self, &tile, state);
            self.reporter.add(1);
        });
    }

    /// Runs one task for each segment of a tile, if there are too few tiles for the threads, and merges the segments
    /// afterwards.
    fn by_segments(&self, team: &Team<'_>, tasks: usize, segments: usize, tile: impl Fn(usize) -> Tile + Sync) {
        let partials: Vec<OnceLock<State>> = (0..tasks * segments).map(|_| OnceLock::new()).collect();
        team.share(
            tasks * segments,
            || Scratch::new(self),
            |scratch, task| {
                let tile = tile(task / segments);
                if let Some(blocks) = self.segments(tile.blocks).nth(task % segments) {
                    let mut state = State::new(self);
                    let units = blocks.len() as u64;
                    scratch.load_query(self, &tile);
                    scratch.attend(self, &tile, blocks, &mut state);
                    let _ = partials[task].set(state); // nobody else has this task
                    self.reporter.add(units);
                }
            },
        );
        let scratch = || (Scratch::new(self), State::new(self));
        team.share(tasks, scratch, |(scratch, state), task| {
            let mut parts = partials[task * segments..][..segments].iter().filter_map(OnceLock::get);
            if let Some(first) = parts.next() {
                state.copy(first);
                parts.for_each(|part| state.merge(self, tile(task).rows, part));
            }
            scratch.store(self, &tile(task), state);
            self.reporter.add(1);
        });
    }

    fn head_dim(&self) -> usize {
        self.problem.head_dim() as usize
    }

    /// Returns the segments of the first `blocks` tiles of keys; at least one, which may be empty. Their length
    /// depends only on seqlen_k.
    fn segments(&self, blocks: u32) -> impl Iterator<Item = Range<u32>> {
        let longest = self.problem.seqlen_k().div_ceil(MAX_SEGMENTS).max(SEGMENT);
        let length = longest.div_ceil(self.tiles.block_n);
        (0..blocks.div_ceil(length).max(1)).map(move |i| i * length..((i + 1) * length).min(blocks))
    }

    /// Returns the number of heads per tile: as many as fit, share keys, and leave tasks for every thread.
    fn heads_together(&self, threads: usize, segments: usize) -> usize {
        let (problem, queries) = (self.problem, self.problem.seqlen_q() as usize);
        let shared = problem.heads_q() / problem.heads_kv();
        let suits = |heads: &usize| {
            let tasks = problem.batch() * problem.heads_q() / heads * segments;
            shared.is_multiple_of(*heads) && heads * queries <= self.lanes() && tasks >= 2 * threads
        };
        let most = if self.few { shared } else { 1 };
        (1..=most).rev().find(suits).unwrap_or(1)
    }

    /// Returns the position of query `row` of a tile in its sequence.
    fn position(&self, tile: &Tile, row: usize) -> u32 {
        tile.first_row
            + if self.few {
                row as u32 % self.problem.seqlen_q()
            } else {
                row as u32
            }
    }

    /// Returns tile `tile` of head group `heads`, counted over all batch entries.
    fn tile(&self, heads: usize, tile: usize) -> Tile {
        let (problem, Tiles { block_m, block_n, .. }) = (self.problem, self.tiles);
        let heads = heads * self.together;
        let (batch, head) = (heads / problem.heads_q(), heads % problem.heads_q());
        let kv_head = head / (problem.heads_q() / problem.heads_kv());
        let first_row = tile as u32 * block_m;
        let rows = block_m.min(problem.seqlen_q() - first_row);
        let first = heads * problem.seqlen_q() as usize + first_row as usize;
        let (blocks, whole_blocks) = self.visibility.key_blocks(first_row, rows, block_n);
        // SAFETY: the caller of `forward` vouches for the four tensors and lse; batch, head and kv_head are within them.
        // Rows of out do not overlap and no two tasks have one in common, so each is written by one thread only.
        unsafe {
            let rows_of = |tensor, head| Head::new(tensor, problem.dtype(), batch, head, self.head_dim());
            Tile {
                batch,
                head,
                q: rows_of(problem.q(), head),
                k: rows_of(problem.k(), kv_head),
                v: rows_of(problem.v(), kv_head),
                out: rows_of(self.out, head),
                first,
                first_row,
                rows: self.together * rows as usize,
                head_steps: [problem.q(), problem.out()]
                    .map(|tensor| tensor.head_stride as usize * problem.dtype().bytes()),
                blocks,
                whole_blocks,
            }
        }
    }

    /// Prefetches the part for panel `index` of `panels` of the next tile of keys and values.
    fn prefetch(&self, tile: &Tile, n: u32, index: usize, panels: usize) {
        let block_n = self.tiles.block_n as usize;
        let (first, end) = (n as usize * block_n, self.problem.seqlen_k() as usize);
        let rows = first + block_n * index / panels..(first + block_n * (index + 1) / panels).min(end);
        tile.k.prefetch(rows.clone());
        tile.v.prefetch(rows);
    }

    /// Returns the words of a row of keys as pairs, in whole tiles.
    fn words(&self) -> usize {
        self.head_dim().next_multiple_of(2 * SIDE) / 2
    }

    /// Returns the number of queries of a tile, rounded up to whole panels.
    fn lanes(&self) -> usize {
        (self.tiles.block_m as usize).next_multiple_of(self.panels.lanes)
    }

    /// Iterates over (first lane, lanes in use) of the panels that hold `rows` queries.
    fn panels(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (panel, lanes) = (self.panels.lanes, self.kernels.lanes);
        (0..rows)
            .step_by(panel)
            .map(move |first| (first, (rows - first).min(panel).next_multiple_of(lanes)))
    }
}
