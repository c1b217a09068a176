//! [`TileLists`]: the streamed tiles that each owned tile visits under a mask, as runs.
//!
//! A kernel owns tiles of one sequence, queries or keys, and streams tiles of the other past them. Tiles that the mask leaves empty
//! are in no run, so they are neither loaded nor multiplied; a run that is not masked shows every pair, and every row
//! of its tiles exists.

use std::ops::Range;

use flash_attention_kernels::work::TileRun;

use crate::program::{Coverage, Covers, Program, Sizes};

/// Sequence whose tiles a kernel owns; it streams the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Forward and dQ.
    Queries,
    /// dK and dV.
    Keys,
}

/// Runs of streamed tiles of each owned tile. Batch entries and heads whose masks are alike share theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TileLists {
    /// Batch entries and query heads with runs of their own; 1 where all are alike.
    own: [usize; 2],
    /// Owned tiles of a head.
    tiles: usize,
    /// Number of the first run of each owned tile of each head and batch entry, and the number of all runs.
    first: Vec<usize>,
    runs: Vec<TileRun>,
    /// Rows of a streamed tile, and of the streamed sequence.
    streamed: [usize; 2],
}

impl TileLists {
    /// Makes the lists of a program's mask, with tiles of `owned` and `streamed` rows. A program's tables count only where their
    /// content is known: a mask that reads another is taken to cut every tile.
    ///
    /// Each list is found by halving: a list of r runs takes `O(r * log(tiles))` evaluations of the mask's bounds.
    pub fn new(program: &Program, sizes: Sizes, owner: Owner, tiles: [u32; 2]) -> Self {
        Self::from_entry(program, 0, sizes, owner, tiles)
    }

    /// Makes the lists of one sequence of a batch, which is batch entry `number` for the program. Sizes are those of the sequence alone,
    /// with a batch of 1.
    pub fn of_sequence(program: &Program, number: usize, sizes: Sizes, owner: Owner, tiles: [u32; 2]) -> Self {
        Self::from_entry(program, number, sizes, owner, tiles)
    }

    fn from_entry(
        program: &Program,
        first_entry: usize,
        sizes: Sizes,
        owner: Owner,
        [owned, streamed]: [u32; 2],
    ) -> Self {
        let tables = program.tables().iter().map(|table| table.content.as_deref()).collect();
        let own = program.masks_that_differ(sizes).map(|own| own.max(1));
        let (owned_rows, streamed_rows) = match owner {
            Owner::Queries => (sizes.seqlen_q, sizes.seqlen_k),
            Owner::Keys => (sizes.seqlen_k, sizes.seqlen_q),
        };
        let mut lists = Self {
            own,
            tiles: owned_rows.div_ceil(owned as usize),
            first: vec![0],
            runs: Vec::new(),
            streamed: [streamed as usize, streamed_rows],
        };
        let mut split = Split {
            covers: Covers::new(program, tables, sizes),
            owner,
            streamed: lists.streamed,
        };
        let all = 0..streamed_rows.div_ceil(streamed as usize);
        let entries = first_entry..first_entry + own[0];
        for of_head in entries.flat_map(|batch| (0..own[1]).map(move |head| [batch, head])) {
            for tile in 0..lists.tiles {
                let begin = tile * owned as usize;
                let rows = begin..(begin + owned as usize).min(owned_rows);
                let first = lists.runs.len();
                if !all.is_empty() {
                    split.find(of_head, &rows, all.clone(), first, &mut lists.runs);
                }
                lists.first.push(lists.runs.len());
            }
        }
        lists
    }

    /// Returns the number of batch entries and of query heads with runs of their own; 1 where all are alike.
    pub fn own(&self) -> [usize; 2] {
        self.own
    }

    /// Returns the runs of all owned tiles.
    pub fn runs(&self) -> &[TileRun] {
        &self.runs
    }

    /// Returns the number of owned tiles of a head.
    pub fn tiles(&self) -> usize {
        self.tiles
    }

    /// Returns the places in [`runs`](Self::runs) of an owned tile of a batch entry and query head.
    pub fn places(&self, [batch, head]: [usize; 2], tile: usize) -> Range<usize> {
        let of = |x: usize, own: usize| if own == 1 { 0 } else { x };
        let head = of(batch, self.own[0]) * self.own[1] + of(head, self.own[1]);
        let place = head * self.tiles + tile;
        self.first[place]..self.first[place + 1]
    }

    /// Returns the number of tiles that some runs stream, and of their rows that exist.
    pub fn streamed(&self, places: Range<usize>) -> [u64; 2] {
        let [tile, rows] = self.streamed;
        let row = |tiles: u32| (tiles as usize * tile).min(rows) as u64;
        let runs = || self.runs[places.clone()].iter();
        [
            runs().map(|run| u64::from(run.end - run.begin)).sum(),
            runs().map(|run| row(run.end) - row(run.begin)).sum(),
        ]
    }
}

/// Search for the runs of owned rows.
struct Split<'a> {
    covers: Covers<'a>,
    owner: Owner,
    /// Rows of a streamed tile, and of the streamed sequence.
    streamed: [usize; 2],
}

impl Split<'_> {
    /// Appends the runs of streamed `tiles` to `runs`, those of the same owned rows from `first` on; halves the tiles where their
    /// pairs do not agree.
    fn find(
        &mut self,
        of_head: [usize; 2],
        owned: &Range<usize>,
        tiles: Range<usize>,
        first: usize,
        runs: &mut Vec<TileRun>,
    ) {
        let [tile, rows] = self.streamed;
        let streamed = tiles.start * tile..(tiles.end * tile).min(rows);
        let (queries, keys) = match self.owner {
            Owner::Queries => (owned.clone(), streamed),
            Owner::Keys => (streamed, owned.clone()),
        };
        match self.covers.of(of_head, queries, keys) {
            Coverage::Empty => {}
            Coverage::Partial if tiles.len() > 1 => {
                let middle = tiles.start + tiles.len() / 2;
                self.find(of_head, owned, tiles.start..middle, first, runs);
                self.find(of_head, owned, middle..tiles.end, first, runs);
            }
            Coverage::Partial => append(tiles, true, first, runs),
            Coverage::Full => {
                let whole = tiles.end.min(rows / tile).max(tiles.start);
                append(tiles.start..whole, false, first, runs);
                append(whole..tiles.end, true, first, runs);
            }
        }
    }
}

/// Appends tiles as a run, or to the last run from `first` on if they continue it.
fn append(tiles: Range<usize>, masked: bool, first: usize, runs: &mut Vec<TileRun>) {
    let ([begin, end], masked) = ([tiles.start, tiles.end].map(|tile| tile as u32), masked.into());
    match runs[first..].last_mut() {
        _ if tiles.is_empty() => {}
        Some(last) if last.end == begin && last.masked == masked => last.end = end,
        _ => runs.push(TileRun { begin, end, masked }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::options::Attention;
    use crate::program::{BlockMask, HostTable, TableSource};
    use crate::tensor::Tensor;

    const SIZES: Sizes = Sizes {
        batch: 2,
        heads_q: 4,
        heads_kv: 2,
        seqlen_q: 150,
        seqlen_k: 203,
    };

    fn program(attention: Attention) -> Program {
        let program = attention.program().expect("a valid program").expect("a program");
        (**program).clone()
    }

    /// Tests the lists of both owners against the coverage of each tile, from the same intervals.
    fn check(program: &Program, sizes: Sizes, block: [u32; 2]) {
        let zeros = |shape: &[usize]| HostTable {
            shape: shape.to_vec(),
            values: vec![0.0; shape.iter().product()],
        };
        // No mask here reads a table of unknown content.
        let content = |table: &TableSource| table.content.as_deref().cloned().unwrap_or_else(|| zeros(&table.shape));
        let tables: Vec<HostTable> = program.tables().iter().map(content).collect();
        let tiles = BlockMask::of(program, &tables, sizes, block.map(|size| size as usize)).expect("valid sizes");
        let [block_m, block_n] = block;
        let [rows, columns] = tiles.counts();
        for (owner, [owned, streamed], [of_owned, of_streamed], seqlen) in [
            (Owner::Queries, [block_m, block_n], [rows, columns], sizes.seqlen_k),
            (Owner::Keys, [block_n, block_m], [columns, rows], sizes.seqlen_q),
        ] {
            let lists = TileLists::new(program, sizes, owner, [owned, streamed]);
            assert_eq!(lists.own(), tiles.batch_and_heads());
            for (batch, head) in (0..sizes.batch).flat_map(|batch| (0..sizes.heads_q).map(move |head| (batch, head))) {
                for tile in 0..of_owned {
                    let runs = &lists.runs()[lists.places([batch, head], tile)];
                    let listed: Vec<(usize, bool)> = runs
                        .iter()
                        .flat_map(|run| (run.begin..run.end).map(|n| (n as usize, run.masked == 1)))
                        .collect();
                    let seen: Vec<(usize, Coverage)> = match owner {
                        Owner::Queries => tiles.keys_of(batch, head, tile).collect(),
                        Owner::Keys => tiles.queries_of(batch, head, tile).collect(),
                    };
                    let cut = |n: usize| n + 1 == of_streamed && !seqlen.is_multiple_of(streamed as usize);
                    let expected: Vec<(usize, bool)> = seen
                        .into_iter()
                        .map(|(n, coverage)| (n, coverage == Coverage::Partial || cut(n)))
                        .collect();
                    assert_eq!(listed, expected, "{owner:?} {block:?} tile {tile} of [{batch}, {head}]");
                    let joined = |pair: &[TileRun]| pair[0].end == pair[1].begin && pair[0].masked == pair[1].masked;
                    assert!(runs.iter().all(|run| run.begin < run.end) && !runs.windows(2).any(joined));
                }
            }
        }
    }

    /// A block mask in which a share of tiles is visible, of a head's own.
    fn sparse([batch, heads]: [usize; 2], block: [usize; 2], every: usize) -> Program {
        let counts = [SIZES.seqlen_q.div_ceil(block[0]), SIZES.seqlen_k.div_ceil(block[1])];
        let visible: Vec<bool> = (0..batch * heads * counts[0] * counts[1])
            .map(|i| i * 7 % every == 0)
            .collect();
        let blocks = BlockMask::from_dense([batch, heads], [SIZES.seqlen_q, SIZES.seqlen_k], block, &visible);
        let attention = Attention::new().block_mask(&blocks.expect("valid sizes"), &Device::cpu());
        program(attention.expect("a small table"))
    }

    #[test]
    fn lists_have_the_tiles_that_are_not_empty() {
        let masks = [
            Attention::new().alibi(&Tensor::from_slice(&Device::cpu(), [4], &[0.5; 4]).expect("small")),
            Attention::new().window(20, 3),
            Attention::new().prefix(37),
            Attention::new().dilated(3),
            Attention::new().mask(|at| at.query.less_than(0)),
            Attention::new().mask(|at| at.key.less_than(at.head * 60 + at.batch * 16)),
        ];
        for attention in masks {
            let program = program(attention);
            for block in [[16, 16], [64, 32], [32, 64], [128, 16]] {
                check(&program.with_causal_mask(), SIZES, block);
                check(&program, SIZES, block);
            }
        }
    }

    #[test]
    fn a_block_mask_is_refined_and_coarsened_to_the_tiles_of_a_kernel() {
        for (own, block, every) in [
            ([1, 1], [64, 64], 8),
            ([2, 4], [24, 40], 2),
            ([1, 4], [16, 8], 3),
            ([2, 1], [150, 50], 2),
        ] {
            let program = sparse(own, block, every);
            for block in [[16, 16], [64, 32], [32, 64], [128, 16]] {
                check(&program, SIZES, block);
                check(&program.with_causal_mask(), SIZES, block);
            }
        }
    }

    #[test]
    fn a_table_of_unknown_content_may_cut_any_tile() {
        let ids = Tensor::from_slice(&Device::cpu(), [1, 203], &[0; 203]).expect("small");
        let program = program(Attention::new().documents(&ids, &ids)).with_causal_mask();
        let lists = TileLists::new(&program, SIZES, Owner::Queries, [50, 50]);
        let of = |of_head, tile| &lists.runs()[lists.places(of_head, tile)];
        let masked = |begin, end| TileRun { begin, end, masked: 1 };
        assert_eq!(of([1, 3], 0), [masked(0, 3)]);
        assert_eq!(of([0, 0], 2), [masked(0, 5)]);
        assert_eq!(lists.streamed(lists.places([0, 0], 2)), [5, 203]);
    }

    #[test]
    fn a_sequence_has_the_lists_of_its_batch_entry() {
        let program = program(Attention::new().mask(|at| at.key.less_than(at.head * 60 + at.batch * 16)));
        let all = TileLists::new(&program, SIZES, Owner::Queries, [32, 16]);
        let alone = Sizes { batch: 1, ..SIZES };
        for number in 0..SIZES.batch {
            let of_sequence = TileLists::of_sequence(&program, number, alone, Owner::Queries, [32, 16]);
            for head in 0..SIZES.heads_q {
                let of = |lists: &TileLists, entry| lists.runs()[lists.places([entry, head], 3)].to_vec();
                assert_eq!(of(&of_sequence, 0), of(&all, number), "sequence {number}, head {head}");
            }
        }
    }

    #[test]
    fn long_sequences_are_planned_by_halves() {
        let sizes = Sizes {
            seqlen_q: 1 << 20,
            seqlen_k: 1 << 20,
            ..SIZES
        };
        let window = program(Attention::new().window(4096, 0));
        let lists = TileLists::new(&window, sizes, Owner::Queries, [128, 64]);
        assert_eq!(lists.runs.len(), 3 * (1 << 13) - 33, "three runs but at the beginning");
    }
}
