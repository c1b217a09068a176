//! Lists of [`work`](crate::work) as a block reads them.

use crate::abi::WorkLists;
use crate::ptx::memory;
use crate::work::{SequenceRows, TileRun, TileWork};

/// Work of a block, from the list or from its place in the grid.
#[derive(Clone, Copy)]
pub struct Work {
    /// Number of the sequence.
    pub number: u32,
    /// Place of the sequence.
    pub sequence: SequenceRows,
    /// Head, counting packed heads as one.
    pub head: u32,
    /// First row that the block owns.
    pub first_row: u32,
    /// Runs of streamed tiles.
    pub runs: Runs,
    /// `None` if the block writes results, else the index of its partial results, which counts heads.
    pub partial: Option<u32>,
    /// True for the first split of its rows.
    pub is_first: bool,
}

impl Work {
    /// Reads the work of block number `block` from the list.
    ///
    /// # Safety
    /// The lists hold that work, its sequence and its runs, and are readable.
    #[inline(always)]
    pub unsafe fn listed(lists: &WorkLists, block: u32) -> Self {
        let (number, head) = (block / lists.heads, block % lists.heads);
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let work: TileWork = memory::ld_global_struct(lists.tiles, number);
            let sequence: SequenceRows = memory::ld_global_struct(lists.sequences, work.sequence);
            Self {
                // A program sees entry 0 where there is nothing to see, as of rows that belong to no sequence.
                number: if sequence.seqlen_q == 0 || sequence.seqlen_k == 0 {
                    0
                } else {
                    work.sequence
                },
                sequence,
                head: work.head + head,
                first_row: work.first_row,
                runs: Runs {
                    list: lists.runs,
                    first: work.first_run,
                    count: work.runs,
                    end: 0,
                },
                partial: (work.partial != 0).then(|| (work.partial - 1) * lists.heads.get() + head),
                is_first: work.split == 0,
            }
        }
    }

    /// Reads the work of block number `block` of the combine kernel, the index of its first partial results, and the number of
    /// splits. Those of split `n` come `n` times the heads of the lists later.
    ///
    /// # Safety
    /// The contract of [`listed`](Self::listed).
    #[inline(always)]
    pub unsafe fn combined(lists: &WorkLists, block: u32) -> (Self, u32, u32) {
        // SAFETY: the caller's contract.
        let work = unsafe { Self::listed(lists, block) };
        (work, work.partial.unwrap_or(0), work.runs.count)
    }
}

/// Runs of the tiles that a block streams.
#[derive(Clone, Copy)]
pub struct Runs {
    /// Device address of all runs; 0 for all tiles of a sequence.
    list: u64,
    /// Index of the first run, or number of the tiles before those that are masked.
    first: u32,
    /// Number of runs.
    pub count: u32,
    /// Number of all tiles of a sequence.
    end: u32,
}

/// Runs `$body` for each tile of some [`Runs`], in order: with its index among all of them, its place in the sequence, and `$masked` as
/// a constant, so that the loop of a run without a mask has no code of it. Called in an unsafe block, with readable runs.
macro_rules! for_tiles {
    ($runs:expr, |$index:ident, $n:ident, $masked:ident| $body:expr) => {{
        let runs: $crate::lists::Runs = $runs;
        let mut $index = 0;
        for run in 0..runs.count {
            let run = runs.get(run);
            if run.masked != 0 {
                for $n in run.begin..run.end {
                    const $masked: bool = true;
                    $body;
                    $index += 1;
                }
            } else {
                for $n in run.begin..run.end {
                    const $masked: bool = false;
                    $body;
                    $index += 1;
                }
            }
        }
    }};
}
pub(crate) use for_tiles;

impl Runs {
    /// Returns all tiles of `columns` rows of a sequence, all `masked` or else the one that holds its end. There are no lists.
    #[inline(always)]
    pub fn of_all(lists: &WorkLists, seqlen: u32, columns: u32, masked: bool) -> Self {
        Self {
            // It is 0. As a parameter that both kinds of runs share it occupies no register.
            list: lists.runs,
            first: if masked { 0 } else { seqlen / columns },
            count: 2,
            end: seqlen.div_ceil(columns),
        }
    }

    /// Returns the places of the runs in the list, if there is one.
    #[inline(always)]
    pub fn listed(&self) -> core::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// Returns run `index`, which may be empty.
    ///
    /// # Safety
    /// `index < count`; a list is readable.
    #[inline(always)]
    pub unsafe fn get(&self, index: u32) -> TileRun {
        match (self.list, index) {
            (0, 0) => TileRun {
                begin: 0,
                end: self.first,
                masked: 0,
            },
            (0, _) => TileRun {
                begin: self.first,
                end: self.end,
                masked: 1,
            },
            // SAFETY: the caller's contract.
            _ => unsafe { memory::ld_global_struct(self.list, self.first + index) },
        }
    }
}
