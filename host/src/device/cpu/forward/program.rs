//! The path of tiles with a program, which is applied between scores and exponentials. Tiles of keys that no query sees
//! are not loaded, and of the others only the strips of queries that see something are multiplied.

use std::ops::Range;

use super::scratch::Scratch;
use super::state::State;
use super::tiled::Lanes;
use super::{Forward, Tile};
use crate::device::cpu::program::{Machines, ScoreProgram, Walk};
use crate::program::Coverage;

impl Scratch {
    /// Turns to a tile of queries.
    pub(super) fn begin_program(&mut self, forward: &Forward<'_>, program: &ScoreProgram, tile: &Tile<'_>) {
        let machines = self.machines.as_mut().expect("where there is a program");
        machines.set_queries(program, (tile.batch, tile.head), tile.first_row);
        let set = |walk: &mut Walk| {
            let queries = tile.first_row..tile.first_row + tile.rows as u32;
            let sizes = [forward.kernels.strip_lanes as u32, forward.tiles.block_n];
            let keys = 0..forward.problem.seqlen_k();
            walk.set(program, (tile.batch, tile.head), [queries, keys], sizes);
        };
        match forward.walks.get((tile.first_row / forward.tiles.block_m) as usize) {
            None => set(&mut self.walk),
            Some(walk) => self.walk.copy(walk.get_or_init(|| {
                let mut walk = Walk::default();
                set(&mut walk);
                walk
            })),
        }
    }

    /// Attention of the tile's queries to the keys of some tiles, as far as they see any.
    pub(super) fn attend_scored(
        &mut self,
        forward: &Forward<'_>,
        program: &ScoreProgram,
        tile: &Tile<'_>,
        blocks: Range<u32>,
        state: &mut State,
    ) {
        let walk = std::mem::take(&mut self.walk);
        let mut machines = self.machines.take().expect("where there is a program");
        let mut walked = walk.within(blocks).peekable();
        while let Some(cells) = walked.next() {
            let next = walked.peek().map(|&(n, _)| n);
            self.attend_cells(forward, (program, &mut machines), tile, (cells, next), state);
        }
        drop(walked);
        (self.walk, self.machines) = (walk, Some(machines));
    }

    /// Takes in the keys and values of tile `n`, and asks for those of the next.
    fn attend_cells(
        &mut self,
        forward: &Forward<'_>,
        (program, machines): (&ScoreProgram, &mut Machines),
        tile: &Tile<'_>,
        ((n, cells), next): ((u32, &[Coverage]), Option<u32>),
        state: &mut State,
    ) {
        let (block_n, width) = (forward.tiles.block_n, forward.kernels.strip_lanes);
        let first_key = n * block_n;
        let keys = block_n.min(forward.problem.seqlen_k() - first_key) as usize;
        let masked = cells.contains(&Coverage::Partial);
        machines.set_keys(program, first_key, masked);
        let block = self.load_block(forward, tile, first_key as usize, keys, masked);
        let panels = tile.rows.div_ceil(forward.panels.lanes);
        for (index, (panel, count)) in forward.panels(tile.rows).enumerate() {
            if let Some(next) = next {
                forward.prefetch(tile, next, index, panels);
            }
            let of_panel = &cells[panel / width..(panel + count).div_ceil(width)];
            let mut first = 0;
            for cells in of_panel.chunk_by(|x, y| (*x == Coverage::Empty) == (*y == Coverage::Empty)) {
                let lanes = Lanes {
                    panel,
                    first,
                    count: (cells.len() * width).min(count - first),
                };
                first += cells.len() * width;
                if cells[0] == Coverage::Empty {
                    continue;
                }
                // SAFETY: the lanes are among the tile's, tiles are as large as the plan says, and keys and values
                // are either rows in memory, all of which exist, or the tiles they were loaded to.
                unsafe {
                    self.scores_of(forward, lanes, &block);
                    self.score(forward, (program, machines), lanes, cells, [keys, block.count]);
                    self.exponentials_of(forward, lanes, &block, state);
                    let first = [tile.first_row as usize + lanes.in_tile(), first_key as usize];
                    self.drop_weights(forward, machines, lanes, first, keys);
                    self.add_values(forward, lanes, &block, state);
                    if !block.finite {
                        self.add_visible_values(forward, (program, machines), lanes, cells, keys, state);
                    }
                }
            }
        }
    }

    /// Applies the program to the products of some lanes. Those that its mask hides, and those of keys past the end, become
    /// minus infinity.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    unsafe fn score(
        &mut self,
        forward: &Forward<'_>,
        (program, machines): (&ScoreProgram, &mut Machines),
        lanes: Lanes,
        cells: &[Coverage],
        [keys, padded]: [usize; 2],
    ) {
        let (width, stride) = (forward.kernels.strip_lanes, forward.panels.lanes);
        for (strip, cell) in cells.iter().enumerate() {
            let scores = self.scores.as_mut_ptr().wrapping_add(lanes.first + strip * width);
            let place = [lanes.in_tile() + strip * width, keys];
            // SAFETY: passed on to the caller; the strip is one of the panel's.
            unsafe { machines.score(program, *cell == Coverage::Partial, place, (scores, stride)) };
        }
        for row in self.scores.as_mut_slice()[..padded * stride]
            .chunks_mut(stride)
            .skip(keys)
        {
            row[lanes.first..lanes.first + lanes.count].fill(f32::NEG_INFINITY);
        }
    }

    /// Zeroes the exponentials that dropout drops, if there is dropout, of lanes that start at a query and a key.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    unsafe fn drop_weights(
        &mut self,
        forward: &Forward<'_>,
        machines: &mut Machines,
        lanes: Lanes,
        [query, key]: [usize; 2],
        keys: usize,
    ) {
        let Some(dropped) = &mut machines.dropped else { return };
        let (kernels, stride) = (forward.kernels, forward.panels.lanes);
        for strip in (0..lanes.count).step_by(kernels.strip_lanes) {
            let first = lanes.first + strip;
            let scores = (self.scores.as_mut_ptr().wrapping_add(first), stride);
            // SAFETY: passed on to the caller; the strip is one of the panel's.
            unsafe {
                dropped.draw(kernels, [query + strip, key], keys);
                dropped.apply(kernels, keys, scores, false);
            }
            for part in 0..forward.parts {
                let words = &mut self.words.scores.as_mut_slice()[part * forward.scores_part() + first..];
                dropped.apply_to_pairs(keys, words, stride);
            }
        }
    }

    /// Adds exponentials times values where a value is not finite and may be hidden: 0 times infinity is NaN, so what
    /// is hidden must not even be multiplied by 0.
    ///
    /// # Safety
    /// The contract of [`scores_of`](Self::scores_of).
    unsafe fn add_visible_values(
        &mut self,
        forward: &Forward<'_>,
        (program, machines): (&ScoreProgram, &mut Machines),
        lanes: Lanes,
        cells: &[Coverage],
        keys: usize,
        state: &mut State,
    ) {
        let width = forward.kernels.strip_lanes;
        for (strip, cell) in cells.iter().enumerate() {
            let first = lanes.first + strip * width;
            let masked = *cell == Coverage::Partial;
            // SAFETY: passed on to the caller.
            let visible = unsafe { machines.visible(program, masked, [lanes.panel + first, keys]) };
            let end = (first + width).min(lanes.first + lanes.count);
            let sees = |lane: usize, key: usize| visible[key * width + lane - first];
            self.add_values_where(forward, lanes.panel, first..end, keys, sees, state);
        }
    }
}
