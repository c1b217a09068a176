//! Lists of [work](flash_attention_kernels::work), as a launch takes them.

use std::cmp::Reverse;
use std::sync::Arc;

use flash_attention_kernels::abi::{Params, WorkLists};
use flash_attention_kernels::work::{SequenceRows, TileRun, TileWork};

use super::{MAX_BLOCKS, count};
use crate::error::Error;
use crate::plan::lists::TileLists;

/// Lists of work for the blocks of a launch.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    /// Content of the lists: tiles, sequences and runs, one after the other; or the tokens that are moved.
    pub content: Arc<[u8]>,
    /// Block table of paged keys, or angles of a rotary embedding.
    pub table: Option<Arc<[u8]>>,
    /// Places of the lists in the content, in bytes.
    pub work: WorkLists,
    /// Entries of the list of tiles that each block has.
    pub lists_of_block: u32,
    /// Number of blocks of the launch.
    pub blocks: u32,
    /// Number of rows that all blocks stream, once for each head that streams them.
    pub streamed_rows: u128,
}

/// Heads of a launch, and the tile that a block owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    /// Heads of a sequence.
    pub heads: u32,
    /// Query heads that stream past an owned tile: more than 1 where keys are owned and shared.
    pub sharing: u32,
    /// Rows of an owned tile.
    pub rows: u32,
}

/// A sequence of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence<'a> {
    /// Rows of the sequence in the tensors.
    pub rows: SequenceRows,
    /// Runs of the sequence's tiles.
    pub lists: &'a TileLists,
    /// Index of the sequence's batch entry in the lists.
    pub entry: usize,
}

impl Listed {
    /// Lists the tiles of sequences, those that stream most first. Sequences with the same lists share the runs.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub fn new(sequences: &[Sequence<'_>], owned: Owned) -> Result<Self, Error> {
        let alike = sequences.iter().all(|sequence| sequence.lists.own()[1] == 1);
        // Heads with runs of their own have blocks with an entry for each of them.
        let (heads, lists_of_block) = if alike { (owned.heads, 1) } else { (1, owned.sharing) };
        let (mut runs, mut known): (Vec<TileRun>, Option<&TileLists>) = (Vec::new(), None);
        let (mut first_run, mut streamed_rows) = (0, 0);
        let mut blocks: Vec<(u64, Vec<TileWork>)> = Vec::new();
        for (number, sequence) in sequences.iter().enumerate() {
            let lists = sequence.lists;
            if !known.is_some_and(|known| std::ptr::eq(known, lists)) {
                (known, first_run) = (Some(lists), runs.len());
                runs.extend_from_slice(lists.runs());
            }
            for head in (0..owned.heads).step_by(heads as usize) {
                for tile in 0..lists.tiles() {
                    let (mut tiles, mut entries) = (0, Vec::with_capacity(lists_of_block as usize));
                    for shared in 0..lists_of_block {
                        let of_head = [sequence.entry, (head * lists_of_block + shared) as usize];
                        let places = lists.places(of_head, tile);
                        let [streamed, rows] = lists.streamed(places.clone());
                        tiles += streamed;
                        streamed_rows += u128::from(rows) * u128::from(heads * owned.sharing / lists_of_block);
                        entries.push(TileWork {
                            sequence: number as u32,
                            head,
                            first_row: tile as u32 * owned.rows,
                            first_run: (first_run + places.start) as u32,
                            runs: places.len() as u32,
                            ..TileWork::default()
                        });
                    }
                    blocks.push((tiles, entries));
                }
            }
        }
        // The sort keeps the order of equals, which are neighbours in memory.
        blocks.sort_by_key(|(tiles, _)| Reverse(*tiles));
        let number = blocks.len() as u128 * u128::from(heads);
        let limit = MAX_BLOCKS;
        let tiles: Vec<TileWork> = blocks.into_iter().flat_map(|(_, entries)| entries).collect();
        match u32::try_from(number) {
            Ok(blocks) if blocks <= limit && u32::try_from(runs.len()).is_ok() => {
                let rows: Vec<SequenceRows> = sequences.iter().map(|sequence| sequence.rows).collect();
                let lists = [bytes(&tiles), bytes(&rows), bytes(&runs)];
                Ok(Self {
                    work: WorkLists {
                        tiles: 0,
                        sequences: lists[0].len() as u64,
                        runs: (lists[0].len() + lists[1].len()) as u64,
                        heads: count(heads as usize)?,
                        reserved: 0,
                    },
                    content: lists.concat().into(),
                    table: None,
                    lists_of_block,
                    blocks,
                    streamed_rows,
                })
            }
            _ => Err(Error::GridTooLarge { blocks: number, limit }),
        }
    }
}

/// Returns a list as bytes.
pub(super) fn bytes<T: Params>(list: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(list));
    list.iter().for_each(|entry| bytes.extend_from_slice(entry.as_bytes()));
    bytes
}

/// Returns the lists at this address.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(super) fn placed(work: WorkLists, address: u64) -> WorkLists {
    WorkLists {
        tiles: address + work.tiles,
        sequences: address + work.sequences,
        runs: address + work.runs,
        ..work
    }
}
