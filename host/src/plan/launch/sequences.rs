//! Launches over the sequences of a batch that is no rectangle: ragged batches and caches.
//!
//! One launch computes all sequences. Its list has the tiles of queries that exist, those with most keys first. Where these are too few
//! to fill the card, or one has far more keys than its share, tiles are split over their keys, and a second launch combines the splits.

use std::cmp::Reverse;
use std::num::NonZeroU32;
use std::sync::Arc;

use flash_attention_kernels::abi::{ListedForwardParams, PageTable, WorkLists};
use flash_attention_kernels::entries::{self, Arch, Entry, Pass};
use flash_attention_kernels::mask::Mask;
use flash_attention_kernels::work::{Divisor, SequenceRows, TileRun, TileWork};

use super::forward::{forward_params, unlisted};
use super::lists::{self, Listed};
use super::program::ScoreProgram;
use super::{ForwardParameters, Launch, MAX_BLOCKS, count};
use crate::error::Error;
use crate::plan::lists::{Owner, TileLists};
use crate::problem::Problem;
use crate::program::Sizes;
use crate::sequences::Placed;

/// Fewest keys of a split. With fewer, writing and reading partial results costs more than a shorter walk saves.
pub(in crate::plan) const LEAST_KEYS: u32 = 256;

/// Keys of a split of a batch-invariant call.
const INVARIANT_KEYS: u32 = 1024;

/// Launches of a forward pass over sequences.
#[derive(Default)]
pub(in crate::plan) struct OfSequences {
    /// The forward kernel and, if there are splits, the kernel that combines them.
    pub launches: Vec<Launch>,
    /// The splits of keys, if there are any.
    pub splits: Option<KeySplits>,
    /// Bytes of partial results.
    pub workspace_bytes: u64,
    /// Bytes of partial results that are written once and read once.
    pub partial_bytes: u64,
    /// Visible pairs of a query and a key of one head, as far as lengths and a causal mask say.
    pub pairs: u128,
}

/// Parts of the keys of tiles, each of a block of its own for every head, or for every pack of heads.
#[derive(Clone, Copy, Debug)]
pub(in crate::plan) struct KeySplits {
    /// Number of parts of all tiles together.
    pub parts: u32,
    /// Most keys of a part.
    pub most_keys: u32,
}

/// Rows that one block owns for each head.
struct Tile {
    work: TileWork,
    rows: u32,
    runs: Vec<TileRun>,
}

impl Tile {
    fn tiles(&self) -> u32 {
        self.runs.iter().map(|run| run.end - run.begin).sum()
    }
}

impl OfSequences {
    /// Makes the launches of a problem of placed sequences, or of a rectangle as such.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub fn new(problem: &Problem, placed: &Placed, entry: &'static Entry, multiprocessors: u32) -> Result<Self, Error> {
        let program = ScoreProgram::forward(problem);
        let sharing = count(problem.heads_q() / problem.heads_kv())?.get();
        let packed = match &program {
            Some(_) => 1,
            None => packed_heads(&placed.sequences, sharing, entry.block_m),
        };
        let all_heads = count(problem.heads_q())?.get() / packed;
        let (owned, heads) = match &program {
            Some(program) => tiles_of_program(problem, placed, program, entry),
            None => (tiles_of_lengths(problem, placed, packed, entry), all_heads),
        };
        let most = most_tiles(&owned, heads, entry, multiprocessors, problem.batch_invariant());
        let split = Splits::new(owned, most, problem.batch_invariant());

        let row_bytes = (u64::from(problem.head_dim_v()) + 2) * size_of::<f32>() as u64;
        let partial = u64::from(split.places) * u64::from(heads) * u64::from(split.rows);
        let params = forward_params(problem, program.as_ref(), NonZeroU32::MIN)?;
        let params = ListedForwardParams {
            packed: Divisor::new(packed),
            block_m: split.rows,
            causal: (program.is_none() && problem.causal()).into(),
            plain: program.is_none().into(),
            ..unlisted(params, problem.head_dim_v())
        };
        let heads = count(heads as usize)?;
        let content = split.content(placed, heads)?;
        let streamed_rows = split.streamed_rows(placed, entry.block_n) * u128::from(heads.get());
        let launch = |entry, work, tiles: usize, streamed_rows, program| {
            let blocks = tiles as u128 * u128::from(heads.get());
            let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks <= MAX_BLOCKS);
            let blocks = blocks.ok_or(Error::GridTooLarge {
                blocks: tiles as u128 * u128::from(heads.get()),
                limit: MAX_BLOCKS,
            })?;
            let listed = Listed {
                content: content.bytes.clone(),
                table: (placed.pages.as_ref())
                    .filter(|pages| pages.entries > 0)
                    .map(|pages| pages.bytes.clone()),
                work,
                lists_of_block: 1,
                blocks,
                streamed_rows,
            };
            let params = ForwardParameters::Listed(ListedForwardParams {
                work,
                pages: content.pages,
                ..params
            });
            Ok::<_, Error>(Launch {
                program,
                listed: Some(listed),
                ..<Launch>::new(entry, [blocks, 1, 1], params)
            })
        };
        let mut launches = vec![launch(
            entry,
            content.forward,
            split.tiles.len(),
            streamed_rows,
            program,
        )?];
        if split.places > 0 {
            let combine = entries::find(Pass::Combine, Arch::Sm80, problem.dtype(), false, problem.head_dim_v());
            let combine = combine.expect("compiled for every dtype and head_dim");
            launches.push(launch(combine, content.combine, split.combined.len(), 0, None)?);
        }
        Ok(Self {
            launches,
            splits: split.of_keys(entry.block_n),
            workspace_bytes: partial * row_bytes,
            partial_bytes: split.partial_rows() * u64::from(heads.get()) * row_bytes,
            pairs: placed.pairs(problem.causal()),
        })
    }
}

/// Returns the number of query heads whose rows are packed into a tile: all that share keys if tiles of single heads would be filled
/// less than nine tenths as much, else 1. A decoding step then reads the cache once for all of them.
fn packed_heads(sequences: &[SequenceRows], sharing: u32, block_m: u32) -> u32 {
    let rows = |packed: u32| {
        let tiles =
            |sequence: &SequenceRows| (u64::from(sequence.seqlen_q) * u64::from(packed)).div_ceil(block_m.into());
        let rows = sequences
            .iter()
            .map(|sequence| tiles(sequence) * u64::from(sequence.seqlen_k.max(1)));
        rows.sum::<u64>() * u64::from(sharing / packed)
    };
    let fits = |sequence: &SequenceRows| {
        sequence
            .seqlen_q
            .checked_mul(sharing)
            .is_some_and(|rows| rows <= i32::MAX as u32)
    };
    if sequences.iter().all(fits) && 10 * u128::from(rows(sharing)) < 9 * u128::from(rows(1)) {
        sharing
    } else {
        1
    }
}

/// Tiles of queries with the keys that lengths and a causal mask leave.
fn tiles_of_lengths(problem: &Problem, placed: &Placed, packed: u32, entry: &Entry) -> Vec<Tile> {
    let mut owned = Vec::new();
    for (number, sequence) in placed.sequences.iter().enumerate() {
        let SequenceRows { seqlen_q, seqlen_k, .. } = *sequence;
        let all = seqlen_q * packed;
        for first_row in (0..all).step_by(entry.block_m as usize) {
            let rows = (all - first_row).min(entry.block_m);
            let (first, last) = (first_row / packed, (first_row + rows - 1) / packed);
            let blocks = if problem.causal() {
                Mask::<true>::new(seqlen_q, seqlen_k).key_blocks(first, last - first + 1, entry.block_n)
            } else {
                Mask::<false>::new(seqlen_q, seqlen_k).key_blocks(first, last - first + 1, entry.block_n)
            };
            owned.push(Tile {
                work: TileWork {
                    sequence: number as u32,
                    first_row,
                    ..TileWork::default()
                },
                rows,
                runs: TileRun::of(blocks).collect(),
            });
        }
    }
    owned
}

/// Tiles of queries with the keys that a score program's mask leaves, and the heads that share each.
fn tiles_of_program(problem: &Problem, placed: &Placed, program: &ScoreProgram, entry: &Entry) -> (Vec<Tile>, u32) {
    let (heads_q, heads_kv) = (problem.heads_q(), problem.heads_kv());
    let of_sequence = |(number, sequence): (usize, &SequenceRows)| {
        let sizes = Sizes {
            batch: 1,
            heads_q,
            heads_kv,
            seqlen_q: sequence.seqlen_q as usize,
            seqlen_k: sequence.seqlen_k as usize,
        };
        TileLists::of_sequence(
            program.program(),
            number,
            sizes,
            Owner::Queries,
            [entry.block_m, entry.block_n],
        )
    };
    let lists: Vec<TileLists> = placed.sequences.iter().enumerate().map(of_sequence).collect();
    let alike = lists.iter().all(|lists| lists.own()[1] == 1);
    let heads = if alike { heads_q } else { 1 };
    let mut owned = Vec::new();
    for (number, (lists, sequence)) in lists.iter().zip(&placed.sequences).enumerate() {
        for head in (0..heads_q).step_by(heads) {
            for tile in 0..lists.tiles() {
                let first_row = tile as u32 * entry.block_m;
                owned.push(Tile {
                    work: TileWork {
                        sequence: number as u32,
                        head: head as u32,
                        first_row,
                        ..TileWork::default()
                    },
                    rows: (sequence.seqlen_q - first_row).min(entry.block_m),
                    runs: lists.runs()[lists.places([0, head], tile)].to_vec(),
                });
            }
        }
    }
    (owned, heads as u32)
}

/// Returns the most tiles of keys that one block walks.
///
/// Every block gets about its share of all tiles, if as many blocks run as fit on the card at once. A split pays once its share is
/// shorter by a fifth, and has at least [`LEAST_KEYS`]. Where results must not depend on the batch, the share is [`INVARIANT_KEYS`].
fn most_tiles(owned: &[Tile], heads: u32, entry: &Entry, multiprocessors: u32, invariant: bool) -> u32 {
    if invariant {
        return (INVARIANT_KEYS / entry.block_n).max(1);
    }
    let resident = u64::from(multiprocessors) * u64::from(entry.min_blocks.max(1));
    let all: u64 = owned.iter().map(|tile| u64::from(tile.tiles())).sum();
    let share = (all * u64::from(heads)).div_ceil(resident);
    u32::try_from(share)
        .unwrap_or(u32::MAX)
        .max(LEAST_KEYS.div_ceil(entry.block_n))
}

/// Content of the lists, and the places in it.
struct Content {
    bytes: Arc<[u8]>,
    /// Lists of the forward kernel, and of the one that combines splits.
    forward: WorkLists,
    combine: WorkLists,
    /// Block table.
    pages: PageTable,
}

/// Tiles with their splits.
struct Splits {
    /// Work of all blocks, longest first.
    tiles: Vec<Tile>,
    /// Rows that have splits, each with the number of them in `runs`.
    combined: Vec<(TileWork, u32)>,
    /// Number of places of partial results.
    places: u32,
    /// Rows of a place.
    rows: u32,
}

impl Splits {
    fn new(owned: Vec<Tile>, most: u32, invariant: bool) -> Self {
        let mut splits = Self {
            tiles: Vec::with_capacity(owned.len()),
            combined: Vec::new(),
            places: 0,
            rows: 0,
        };
        for tile in owned {
            let tiles = tile.tiles();
            // Equal parts, or parts that begin at multiples of a number of keys.
            let parts = if invariant {
                split(&tile.runs, |_, n| n / most, most)
            } else if u64::from(tiles) * 4 > u64::from(most) * 5 {
                let part = tiles.div_ceil(tiles.div_ceil(most));
                split(&tile.runs, |index, _| index / part, part)
            } else {
                vec![tile.runs.clone()]
            };
            if parts.len() < 2 {
                splits.tiles.push(tile);
                continue;
            }
            splits.rows = splits.rows.max(tile.rows);
            let combined = TileWork {
                partial: 1 + splits.places,
                runs: parts.len() as u32,
                ..tile.work
            };
            splits.combined.push((combined, tile.rows));
            for (number, runs) in parts.into_iter().enumerate() {
                let work = TileWork {
                    partial: 1 + splits.places,
                    split: number as u32,
                    ..tile.work
                };
                splits.places += 1;
                let rows = tile.rows;
                splits.tiles.push(Tile { work, rows, runs });
            }
        }
        // The sort keeps the order of equals, which are neighbours in memory.
        splits.tiles.sort_by_key(|tile| Reverse(tile.tiles()));
        splits
    }

    /// Describes the splits, if there are any.
    fn of_keys(&self, block_n: u32) -> Option<KeySplits> {
        let parts = self.tiles.iter().filter(|tile| tile.work.partial > 0);
        let most = parts.map(Tile::tiles).max()?;
        Some(KeySplits {
            parts: self.places,
            most_keys: most * block_n,
        })
    }

    /// Rows of partial results that are written and read, of one head.
    fn partial_rows(&self) -> u64 {
        let of = |(work, rows): &(TileWork, u32)| u64::from(work.runs) * u64::from(*rows);
        self.combined.iter().map(of).sum()
    }

    /// Rows of keys that the blocks of one head stream.
    fn streamed_rows(&self, placed: &Placed, block_n: u32) -> u128 {
        let of_tile = |tile: &Tile| {
            let seqlen_k = placed.sequences[tile.work.sequence as usize].seqlen_k;
            let row = |n: u32| u128::from(n.saturating_mul(block_n).min(seqlen_k));
            tile.runs.iter().map(|run| row(run.end) - row(run.begin)).sum::<u128>()
        };
        self.tiles.iter().map(of_tile).sum()
    }

    /// Returns the content of the lists, the places of the lists of both kernels in it, and that of the block table.
    fn content(&self, placed: &Placed, heads: NonZeroU32) -> Result<Content, Error> {
        let (mut runs, mut tiles) = (Vec::new(), Vec::with_capacity(self.tiles.len()));
        for tile in &self.tiles {
            tiles.push(TileWork {
                first_run: runs.len() as u32,
                runs: tile.runs.len() as u32,
                ..tile.work
            });
            runs.extend_from_slice(&tile.runs);
        }
        if u32::try_from(runs.len()).is_err() {
            return Err(Error::GridTooLarge {
                blocks: runs.len() as u128,
                limit: u32::MAX,
            });
        }
        let combined: Vec<TileWork> = self.combined.iter().map(|(work, _)| *work).collect();
        let lists = [
            lists::bytes(&tiles),
            lists::bytes(&combined),
            lists::bytes(&placed.sequences),
            lists::bytes(&runs),
        ];
        let mut offsets = [0; 4];
        for i in 1..lists.len() {
            offsets[i] = offsets[i - 1] + lists[i - 1].len() as u64;
        }
        let work = |tiles| WorkLists {
            tiles,
            sequences: offsets[2],
            runs: offsets[3],
            heads,
            reserved: 0,
        };
        let (entries, page_size) = (placed.pages.as_ref()).map_or((0, 1), |pages| (pages.entries, pages.page_size));
        let pages = PageTable {
            table: 0,
            entries: entries as u32,
            size: Divisor::new(page_size as u32),
        };
        Ok(Content {
            bytes: lists.concat().into(),
            forward: work(offsets[0]),
            combine: work(offsets[1]),
            pages,
        })
    }
}

/// Divides runs into parts: `part_of` of a tile's place among the tiles and of its number is the part that it belongs to, and changes
/// at multiples of `part` alone.
fn split(runs: &[TileRun], part_of: impl Fn(u32, u32) -> u32, part: u32) -> Vec<Vec<TileRun>> {
    let mut parts: Vec<Vec<TileRun>> = Vec::new();
    let (mut index, mut last) = (0, None);
    for run in runs {
        let mut begin = run.begin;
        while begin < run.end {
            let number = part_of(index, begin);
            let mut end = begin + 1;
            while end < run.end && end - begin < part && part_of(index + (end - begin), end) == number {
                end += 1;
            }
            if last != Some(number) {
                parts.push(Vec::new());
                last = Some(number);
            }
            if let Some(part) = parts.last_mut() {
                part.push(TileRun { begin, end, ..*run });
            }
            index += end - begin;
            begin = end;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_the_runs_in_order_and_begin_where_they_may() {
        let run = |begin, end, masked| TileRun { begin, end, masked };
        let runs = [run(2, 7, 0), run(9, 10, 1), run(12, 31, 0), run(31, 32, 1)];
        let all: Vec<(u32, u32)> = runs
            .iter()
            .flat_map(|run| (run.begin..run.end).map(|n| (n, run.masked)))
            .collect();
        for part in 1..40 {
            for invariant in [false, true] {
                let parts = if invariant {
                    split(&runs, |_, n| n / part, part)
                } else {
                    split(&runs, |index, _| index / part, part)
                };
                let tiles = |runs: &Vec<TileRun>| -> Vec<(u32, u32)> {
                    runs.iter()
                        .flat_map(|run| (run.begin..run.end).map(|n| (n, run.masked)))
                        .collect()
                };
                assert_eq!(parts.iter().flat_map(tiles).collect::<Vec<_>>(), all);
                for tiles in parts.iter().map(tiles) {
                    assert!(!tiles.is_empty() && tiles.len() <= part as usize);
                    assert!(!invariant || tiles.iter().all(|(n, _)| n / part == tiles[0].0 / part));
                }
            }
        }
        assert!(split(&[], |index, _| index, 1).is_empty());
    }
}
