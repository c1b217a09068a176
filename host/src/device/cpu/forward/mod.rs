//! The forward pass on the CPU: the loop of the GPU kernels, one task for each tile of queries of each head.
//!
//! Scores are computed as K Q^T and the output as V^T P^T, so that queries are lanes (see `kernels/`). Keys are
//! processed in segments (splits). Each is summed from nothing and then merged by largest score, in order. So the
//! result is the same bits if one task computes all segments of a tile or each segment is a task of its own.
//!
//! A batch of problems, such as sequences of different lengths, is one pass over the tasks of all of them. No result depends on
//! the other problems.
//!
//! This file has the problems and their tasks. `scratch.rs` computes one tile of queries from memory to memory, with
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

use super::kernels::{Kernels, Pairs, ROWS, SIDE};
use super::nanoseconds;
use super::program::{ScoreProgram, Walk};
use super::team::Team;
use super::tensor::{Head, KeyRows, Panels, QueryRows, Visibility};
use super::vector::prefers_l1;
use crate::plan::{CpuPath, Plan, Tiles};
use crate::problem::Problem;
use crate::progress::Reporter;
use scratch::Scratch;
use state::State;

/// Most cells, strips of queries by tiles of keys, whose coverage is kept for all heads: a megabyte, and 32768 x 32768
/// pairs.
const KEPT_CELLS: usize = 1 << 20;

/// A forward problem being computed.
struct Forward<'a> {
    kernels: &'static Kernels,
    problem: &'a Problem,
    /// Products of bf16 pairs, if this problem uses them.
    pairs: Option<&'static Pairs>,
    /// Number of bf16 parts that an element is split into for them; 0 if it is not.
    parts: usize,
    /// True for the decode path: tiles of q then hold rows of `panels.depth`, those of the output rows of `output_panels.depth`.
    few: bool,
    /// True if the decode path asks for later rows of K as far as the L1 cache.
    into_l1: bool,
    /// Number of tiles of keys of a segment.
    segment_blocks: u32,
    /// Number of key heads per tile. It is more than 1 only if queries are few and memory has the rows of several key heads side by
    /// side.
    key_heads: usize,
    /// Number of query heads per tile for each key head. It is more than 1 only if queries are few and heads share keys, which are then
    /// read from memory once for all of them.
    sharing: usize,
    panels: Panels,
    output_panels: Panels,
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

/// A forward pass to carry out: a plan, and where its results go.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) plan: &'a Plan,
    pub(super) out: StridedTensor,
    pub(super) lse: StridedTensor,
    /// row_max and row_sum, if they are wanted.
    pub(super) statistics: Option<[StridedTensor; 2]>,
}

/// A tile of queries of one head.
#[derive(Clone, Copy)]
struct Tile<'a> {
    batch: usize,
    head: usize,
    q: Head,
    k: KeyRows<'a>,
    v: KeyRows<'a>,
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

/// The work of one task.
#[derive(Clone, Copy)]
struct Task {
    /// Number of the problem.
    problem: usize,
    /// Number of the tile of queries in it.
    tile: usize,
    /// Segment of the keys; `None` for all of them.
    segment: Option<usize>,
}

/// Computes out, lse and, where their addresses are given, row_max and row_sum of problems with pairs, in the order given.
///
/// # Safety
/// The contract of [`Backend::run`](crate::device::Backend::run) for each call; no two write the same memory.
pub(super) unsafe fn forward(team: &Team<'_>, calls: &[Call<'_>], reporter: &Reporter<'_>) {
    let mut forwards: Vec<Forward<'_>> = calls.iter().map(|call| Forward::new(team, call, reporter)).collect();
    let least_tasks: Vec<usize> = forwards.iter().map(Forward::least_tasks).collect();
    let others = least_tasks.iter().sum::<usize>();
    for (forward, least) in forwards.iter_mut().zip(least_tasks) {
        [forward.key_heads, forward.sharing] = forward.heads_together(team.threads, others - least);
    }
    reporter.begin(|| forwards.iter().map(Forward::units).sum());
    let costs: Vec<u128> = calls.iter().map(|call| nanoseconds(&call.plan.cost())).collect();
    let total: u128 = costs.iter().sum();
    let tasks = || forwards.iter().zip(&costs).enumerate();
    let tasks = tasks().flat_map(|(problem, (forward, cost))| {
        let (tiles, segments) = (forward.tasks(), forward.segment_count());
        // A tile is split where it would be more than half of a thread's share of all work.
        let split = segments > 1 && cost * 2 * team.threads as u128 > total * tiles as u128;
        (0..tiles).flat_map(move |tile| {
            let segments = (0..segments).filter(move |_| split).map(Some);
            let whole = Some(None).filter(|_| !split);
            segments
                .chain(whole)
                .map(move |segment| Task { problem, tile, segment })
        })
    });
    attend(team, &forwards, &tasks.collect::<Vec<_>>());
}

/// Runs tasks in order, and then merges the segments of tiles that were split.
fn attend(team: &Team<'_>, forwards: &[Forward<'_>], tasks: &[Task]) {
    let merges: Vec<usize> = (0..tasks.len())
        .filter(|&index| tasks[index].segment == Some(0))
        .collect();
    // Without a split tile there are many tasks and no parts of results.
    let kept = if merges.is_empty() { 0 } else { tasks.len() };
    let partials: Vec<OnceLock<State>> = (0..kept).map(|_| OnceLock::new()).collect();
    let own = || None::<Own>;
    team.share(tasks.len(), own, |own, index| {
        let Task { problem, tile, segment } = tasks[index];
        let forward = &forwards[problem];
        let own = Own::of(own, forward, problem);
        match segment {
            None => own.attend(forward, &forward.tile(tile)),
            Some(segment) => {
                if let Some(state) = own.attend_segment(forward, &forward.tile(tile), segment) {
                    let _ = partials[index].set(state); // no other thread has this task
                }
            }
        }
    });
    team.share(merges.len(), own, |own, merge| {
        let first = merges[merge];
        let Task { problem, tile, .. } = tasks[first];
        let forward = &forwards[problem];
        let Own { scratch, state, .. } = Own::of(own, forward, problem);
        let mut parts = partials[first..][..forward.segment_count()]
            .iter()
            .filter_map(OnceLock::get);
        let tile = forward.tile(tile);
        if let Some(first) = parts.next() {
            state.copy(first);
            parts.for_each(|part| state.merge(forward, tile.rows, part));
        }
        scratch.store(forward, &tile, state);
        forward.reporter.add(1);
    });
}

/// The memory of a thread for problems of one kind.
struct Own {
    kind: Kind,
    scratch: Scratch,
    state: State,
    partial: State,
}

/// Parameters that determine the sizes of a thread's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    few: bool,
    room: usize,
    parts: usize,
    tiles: Tiles,
    head_dims: [u32; 2],
    /// Number of the problem whose program the machines are for.
    program: Option<usize>,
}

impl Own {
    /// Returns the memory for a problem: that of the problem before, if it is of the same kind.
    fn of<'a>(own: &'a mut Option<Self>, forward: &Forward<'_>, problem: usize) -> &'a mut Self {
        let kind = Kind {
            few: forward.few,
            room: forward.room(),
            parts: forward.parts,
            tiles: forward.tiles,
            head_dims: [forward.problem.head_dim(), forward.problem.head_dim_v()],
            program: forward.program.as_ref().map(|_| problem),
        };
        if own.as_ref().is_some_and(|own| own.kind != kind) {
            *own = None;
        }
        own.get_or_insert_with(|| Self {
            kind,
            scratch: Scratch::new(forward),
            state: State::new(forward),
            partial: State::new(forward),
        })
    }

    /// Computes all segments of a tile, in order, and stores its results.
    fn attend(&mut self, forward: &Forward<'_>, tile: &Tile<'_>) {
        let Self {
            scratch,
            state,
            partial,
            ..
        } = self;
        scratch.load_query(forward, tile);
        for (index, blocks) in forward.segments(tile.blocks).enumerate() {
            let units = blocks.len() as u64;
            if index == 0 {
                scratch.attend(forward, tile, blocks, state);
            } else if forward.program.is_none() || scratch.walk.within(blocks.clone()).next().is_some() {
                scratch.attend(forward, tile, blocks, partial);
                state.merge(forward, tile.rows, partial);
            }
            forward.reporter.add(units);
        }
        scratch.store(forward, tile, state);
        forward.reporter.add(1);
    }

    /// Computes one segment of a tile; `None` if the tile sees none of its keys.
    fn attend_segment(&mut self, forward: &Forward<'_>, tile: &Tile<'_>, segment: usize) -> Option<State> {
        let blocks = forward.segments(tile.blocks).nth(segment)?;
        let mut state = State::new(forward);
        let units = blocks.len() as u64;
        self.scratch.load_query(forward, tile);
        self.scratch.attend(forward, tile, blocks, &mut state);
        forward.reporter.add(units);
        Some(state)
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

impl<'a> Forward<'a> {
    fn new(team: &Team<'_>, call: &Call<'a>, reporter: &'a Reporter<'a>) -> Self {
        let (problem, tiles) = (call.plan.problem(), call.plan.tiles());
        let program = problem.program().and_then(|of| {
            let program = ScoreProgram::new(team.kernels, problem, problem.scale().magnitude)?;
            Some(program.with_scores(of.expression(), &[of.score()]))
        });
        let &CpuPath {
            few,
            parts,
            split_blocks,
            ..
        } = call.plan.cpu_path().expect("the plan is for the CPU");
        let pairs = team.kernels.pairs.filter(|_| parts > 0);
        let panels = |head_dim: u32| Panels {
            lanes: if pairs.is_some() { 2 * SIDE } else { team.kernels.panel },
            depth: (head_dim as usize).next_multiple_of(SIDE),
        };
        Self {
            kernels: team.kernels,
            pairs,
            parts,
            few,
            into_l1: prefers_l1(),
            segment_blocks: split_blocks,
            key_heads: 1,
            sharing: 1,
            panels: panels(problem.head_dim()),
            output_panels: panels(problem.head_dim_v()),
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
            out: call.out,
            lse: QueryRows::new(call.lse, problem),
            statistics: (call.statistics).map(|tensors| tensors.map(|tensor| QueryRows::new(tensor, problem))),
            reporter,
        }
    }

    /// Number of tiles of queries of a head.
    fn query_tiles(&self) -> usize {
        self.problem.seqlen_q().div_ceil(self.tiles.block_m) as usize
    }

    /// Number of query heads per tile.
    fn together(&self) -> usize {
        self.key_heads * self.sharing
    }

    /// Number of tiles of queries of all heads.
    fn tasks(&self) -> usize {
        self.problem.batch() * self.problem.heads_q() / self.together() * self.query_tiles()
    }

    /// Number of tasks if as many heads are together as can be, and every segment is a task.
    fn least_tasks(&self) -> usize {
        let (problem, [key_heads, sharing]) = (self.problem, self.heads_together(0, 0));
        problem.batch() * problem.heads_q() / (key_heads * sharing) * self.query_tiles() * self.segment_count()
    }

    /// Number of segments of all keys.
    fn segment_count(&self) -> usize {
        self.segments(self.problem.seqlen_k().div_ceil(self.tiles.block_n))
            .count()
    }

    /// Units of progress: a tile of keys for a tile of queries, and one more for the tile itself.
    fn units(&self) -> u64 {
        let heads = self.tasks() / self.query_tiles();
        let of_tile = |tile| u64::from(self.tile(tile).blocks) + 1;
        heads as u64 * (0..self.query_tiles()).map(of_tile).sum::<u64>()
    }

    fn head_dim(&self) -> usize {
        self.problem.head_dim() as usize
    }

    /// head_dim of values and of the output.
    fn head_dim_v(&self) -> usize {
        self.problem.head_dim_v() as usize
    }

    /// Returns the segments of the first `blocks` tiles of keys; at least one, which may be empty.
    fn segments(&self, blocks: u32) -> impl Iterator<Item = Range<u32>> {
        let length = self.segment_blocks;
        (0..blocks.div_ceil(length).max(1)).map(move |i| i * length..((i + 1) * length).min(blocks))
    }

    /// Returns the position of query `row` of a tile in its sequence.
    fn position(&self, tile: &Tile<'_>, row: usize) -> u32 {
        tile.first_row
            + if self.few {
                row as u32 % self.problem.seqlen_q()
            } else {
                row as u32
            }
    }

    /// Returns tile number `tile` of all heads. Large tiles come first: under a causal mask the last ones see the most keys.
    fn tile(&self, tile: usize) -> Tile<'a> {
        let (problem, Tiles { block_m, block_n, .. }) = (self.problem, self.tiles);
        let query_tiles = self.query_tiles();
        let (heads, tile) = (
            tile / query_tiles * self.together(),
            query_tiles - 1 - tile % query_tiles,
        );
        let (batch, head) = (heads / problem.heads_q(), heads % problem.heads_q());
        let kv_head = head / (problem.heads_q() / problem.heads_kv());
        let first_row = tile as u32 * block_m;
        let rows = block_m.min(problem.seqlen_q() - first_row);
        let first = heads * problem.seqlen_q() as usize + first_row as usize;
        let (blocks, whole_blocks) = self.visibility.key_blocks(first_row, rows, block_n);
        // SAFETY: the caller of `forward` vouches for the four tensors and lse; batch, head and kv_head are within them.
        // Rows of out do not overlap and no two tasks have one in common, so each is written by one thread only.
        unsafe {
            let rows_of = |tensor, head_dim| Head::new(tensor, problem.dtype(), batch, head, head_dim);
            let keys_of =
                |tensor, head_dim| KeyRows::new(tensor, problem.pages(), problem.dtype(), [batch, kv_head, head_dim]);
            let codes_of =
                |tensor, scales, head, heads| Head::of_codes(tensor, scales, [batch, head, heads], self.head_dim());
            let (q, k, v) = match problem.scales() {
                None => (
                    rows_of(problem.q(), self.head_dim()),
                    keys_of(problem.k(), self.head_dim()),
                    keys_of(problem.v(), self.head_dim_v()),
                ),
                Some([of_q, of_k, of_v]) => {
                    let keys =
                        |tensor, scales| KeyRows::of_one_run(codes_of(tensor, scales, kv_head, problem.heads_kv()));
                    let q = codes_of(problem.q(), of_q, head, problem.heads_q());
                    (q, keys(problem.k(), of_k), keys(problem.v(), of_v))
                }
            };
            Tile {
                batch,
                head,
                q,
                k,
                v,
                out: rows_of(self.out, self.head_dim_v()),
                first,
                first_row,
                rows: self.together() * rows as usize,
                head_steps: [problem.q(), problem.out()]
                    .map(|tensor| tensor.head_stride as usize * problem.dtype().bytes()),
                blocks,
                whole_blocks,
            }
        }
    }

    /// Prefetches the part for panel `index` of `panels` of the next tile of keys and values.
    fn prefetch(&self, tile: &Tile<'_>, n: u32, index: usize, panels: usize) {
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

    /// Returns a number of keys, rounded up to what products take.
    fn padded(&self, keys: usize) -> usize {
        keys.next_multiple_of(if self.pairs.is_some() { 2 * SIDE } else { ROWS })
    }

    /// Returns the number of queries of a tile, rounded up to whole panels.
    fn lanes(&self) -> usize {
        (self.tiles.block_m as usize).next_multiple_of(self.panels.lanes)
    }

    /// Returns the number of queries that a thread has room for: whole panels, or on the decode path those of a tile, since clearing
    /// whole panels takes a good part of a short call.
    fn room(&self) -> usize {
        if self.few {
            self.together() * self.problem.seqlen_q() as usize
        } else {
            self.lanes()
        }
    }

    /// Iterates over (first lane, lanes in use) of the panels that hold `rows` queries.
    fn panels(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (panel, lanes) = (self.panels.lanes, self.kernels.lanes);
        (0..rows)
            .step_by(panel)
            .map(move |first| (first, (rows - first).min(panel).next_multiple_of(lanes)))
    }
}
