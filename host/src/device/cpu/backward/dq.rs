//! dQ, to which several tasks add: each element is one sum in the order of the keys, for any assignment of tasks to
//! threads.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use flash_attention_kernels::entries::Dtype;

use super::Backward;
use super::scratch::Scratch;
use crate::device::cpu::program::{ScoreProgram, Walk};
use crate::device::cpu::team::Lines;
use crate::device::cpu::tensor::Head;
use crate::program::Coverage;

/// State that the tasks of one head share.
pub(super) struct SharedHead {
    /// Number of tasks that have added their part of dQ, for each tile of queries of each query head.
    pub(super) added: Vec<AtomicU32>,
    /// f32 dQ accumulator, `queries x head_dim`, if dq itself cannot hold f32; freed when the last task has taken it.
    /// Beside it the number of tasks that have taken it.
    sums: Mutex<(Option<Arc<Sums>>, usize)>,
    /// Turns at the dQ of each of its query heads by the program, if there is one.
    walks: Option<Vec<Arc<Turns>>>,
}

/// Runs of keys that the tiles of queries of a head see.
struct Turns {
    /// Runs that each tile sees, in order.
    seen: Vec<Vec<u32>>,
}

/// Turn of a run of keys to add to a tile's dQ.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    /// Number of runs that add before it.
    pub(super) place: u32,
    /// True if no run adds after it.
    pub(super) is_last: bool,
    /// True if the tile sees any key of the run. If it sees none of any run, the first run writes zeros.
    pub(super) sees_any: bool,
}

impl Turns {
    fn new(backward: &Backward<'_>, program: &ScoreProgram, batch: usize, head: usize) -> Self {
        let (seqlen_q, seqlen_k) = (backward.problem.seqlen_q(), backward.problem.seqlen_k());
        let mut walk = Walk::default();
        let sizes = [backward.tiles.block_m, backward.tiles.block_n];
        walk.set(program, (batch, head), [0..seqlen_q, 0..seqlen_k], sizes);
        let mut seen = vec![Vec::new(); backward.query_tiles()];
        for (run, cells) in walk.within(0..u32::MAX) {
            for (runs, cell) in seen.iter_mut().zip(cells) {
                if *cell != Coverage::Empty {
                    runs.push(run);
                }
            }
        }
        Self { seen }
    }

    /// Returns the turn of a run at a tile; `None` if it has none.
    fn turn(&self, tile: usize, run: usize) -> Option<Turn> {
        let runs = &self.seen[tile];
        if runs.is_empty() && run == 0 {
            return Some(Turn {
                place: 0,
                is_last: true,
                sees_any: false,
            });
        }
        let place = runs.binary_search(&(run as u32)).ok()?;
        Some(Turn {
            place: place as u32,
            is_last: place + 1 == runs.len(),
            sees_any: true,
        })
    }
}

/// Memory that tasks write in turn.
pub(super) struct Sums(
    pub(super) *mut f32,
    #[allow(dead_code, reason = "what the pointer points to")] Lines,
);

// SAFETY: the tasks take turns, in the order of `SharedHead::added`.
unsafe impl Send for Sums {}
// SAFETY: the reason given for `Send`.
unsafe impl Sync for Sums {}

impl SharedHead {
    /// Makes the states of all key heads of all batch entries. Where the program's mask is one for all heads, so are
    /// its turns.
    pub(super) fn all(backward: &Backward<'_>) -> Vec<Self> {
        let program = backward.program.as_ref().map(|program| &program.scores);
        let turns = |program, batch, head| Arc::new(Turns::new(backward, program, batch, head));
        let one = program.filter(|program| program.has_one_mask());
        let one = one.map(|program| turns(program, 0, 0));
        let of_head = |program, batch, head| one.clone().unwrap_or_else(|| turns(program, batch, head));
        let (heads_kv, group) = (backward.problem.heads_kv(), backward.group());
        let new = |head: usize| {
            let (batch, kv_head) = (head / heads_kv, head % heads_kv);
            let heads = kv_head * group..(kv_head + 1) * group;
            let walks = program.map(|program| heads.map(|head| of_head(program, batch, head)).collect());
            Self::new(backward, walks)
        };
        (0..backward.problem.batch() * heads_kv).map(new).collect()
    }

    fn new(backward: &Backward<'_>, walks: Option<Vec<Arc<Turns>>>) -> Self {
        let tiles = backward.group() * backward.query_tiles();
        Self {
            walks,
            added: (0..tiles).map(|_| AtomicU32::new(0)).collect(),
            sums: Mutex::new((None, 0)),
        }
    }

    /// Returns the turn of a run of keys at a tile of queries of the query head `in_group`; `None` if it has none.
    pub(super) fn turn(&self, backward: &Backward<'_>, in_group: usize, tile: usize, run: usize) -> Option<Turn> {
        match &self.walks {
            Some(walks) => walks[in_group].turn(tile, run),
            None => backward.turn(tile, run),
        }
    }

    /// Returns the number of turns of all runs of keys: the units of work.
    pub(super) fn turns(&self, backward: &Backward<'_>, runs: usize) -> u64 {
        let heads = 0..backward.group();
        let tiles = heads.flat_map(|head| (0..backward.query_tiles()).map(move |tile| (head, tile)));
        let of_tile = |(head, tile)| {
            (0..runs)
                .filter_map(move |run| self.turn(backward, head, tile, run))
                .count()
        };
        tiles.map(of_tile).sum::<usize>() as u64
    }

    /// Returns the accumulator for one of `chunks` runs of keys, each of which takes it once. `None` if dq itself is
    /// the accumulator, or nothing is accumulated.
    pub(super) fn sums(&self, backward: &Backward<'_>, chunks: usize) -> Option<Arc<Sums>> {
        if backward.problem.dtype() == Dtype::F32 || chunks == 1 {
            return None;
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let (memory, asked) = &mut *sums;
        let queries = backward.group() * backward.problem.seqlen_q() as usize;
        let new = || {
            let mut lines = Lines::new(queries * backward.problem.head_dim() as usize);
            Arc::new(Sums(lines.as_mut_ptr(), lines))
        };
        let of_task = memory.get_or_insert_with(new).clone();
        *asked += 1;
        if *asked == chunks {
            *memory = None; // freed by the last of them
        }
        Some(of_task)
    }
}

/// Accumulator rows of a tile of queries.
pub(super) struct GradientRows {
    pub(super) rows: Head,
    pub(super) sums: Option<*mut f32>,
    /// First row of the tile in the accumulator.
    pub(super) first_sum: usize,
    pub(super) first_row: usize,
    pub(super) count: usize,
    /// True if nothing has been added yet.
    pub(super) is_first: bool,
    /// True if nothing will be added afterwards.
    pub(super) is_last: bool,
}

/// Waits until `added` is `count`.
pub(super) fn wait_for(added: &AtomicU32, count: u32) {
    let mut spins = 0_u32;
    while added.load(Ordering::Acquire) != count {
        spins += 1;
        if spins < 1000 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

impl Scratch {
    /// Adds the dQ of a tile to what earlier tasks have added.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward), and it is this task's turn.
    pub(super) unsafe fn add_dq(&mut self, backward: &Backward<'_>, dq: &GradientRows) {
        let (kernels, [head_dim, _], [width, _]) = (backward.kernels, backward.head_dims(), backward.widths());
        let scale = backward.problem.softmax_scale();
        // The rows of q are not needed any more.
        let rows = &mut self.q;
        // SAFETY: the tile is `block_m` lanes, the rows are as many, of whole registers.
        unsafe {
            let from = self.dq_lanes.as_ptr();
            let stride = backward.tiles.block_m as usize;
            (kernels.transpose)(from, stride, head_dim, rows.as_mut_ptr(), width, dq.count);
        }
        for (i, row) in rows.as_mut_slice().chunks_mut(width).take(dq.count).enumerate() {
            let row = &mut row[..head_dim];
            row.iter_mut().for_each(|x| *x *= scale);
            let sums = dq.sums.map(|sums| {
                // SAFETY: one row of the sums, which are this task's for now.
                unsafe { std::slice::from_raw_parts_mut(sums.add((dq.first_sum + i) * head_dim), head_dim) }
            });
            if !dq.is_first {
                match &sums {
                    Some(sums) => row.iter_mut().zip(sums.iter()).for_each(|(x, sum)| *x += sum),
                    None => {
                        let before = &mut self.dout.as_mut_slice()[..head_dim]; // nor are those of dout
                        dq.rows.load(kernels, dq.first_row + i, before);
                        row.iter_mut().zip(before).for_each(|(x, sum)| *x += *sum);
                    }
                }
            }
            match sums {
                Some(sums) if !dq.is_last => sums.copy_from_slice(row),
                _ => dq.rows.store(kernels, dq.first_row + i, row),
            }
        }
    }
}
