//! The path of tiles where a program has its say between scores and exponentials. Tiles of keys that no query sees
//! are not loaded, and of the others only the strips of queries that see something are multiplied.

use std::ops::Range;

use super::scratch::Scratch;
use super::state::State;
use super::tiled::Lanes;
use super::{Forward, Tile};
use crate::device::cpu::program::{Cell, Dropped, Machine, ScoreProgram, Walk};

/// What a thread runs a program in.
pub(super) struct Machines {
    score: Option<Machine>,
    mask: Option<Machine>,
    dropped: Option<Dropped>,
}

impl Machines {
    pub(super) fn new(forward: &Forward<'_>) -> Option<Self> {
        let program = forward.program.as_ref()?;
        let (queries, keys) = (forward.lanes(), forward.tiles.block_n as usize);
        let machine = |code: &Option<_>| {
            let code = code.as_ref()?;
            Some(Machine::new(code, forward.kernels, queries, keys))
        };
        Some(Self {
            score: machine(&program.score),
            mask: machine(&program.mask),
            dropped: Dropped::new(program, forward.kernels, keys),
        })
    }

    /// Turns to a tile of queries.
    pub(super) fn set_tile(&mut self, forward: &Forward<'_>, program: &ScoreProgram, tile: &Tile) {
        let kernels = forward.kernels;
        let codes = [(&mut self.score, &program.score), (&mut self.mask, &program.mask)];
        for (machine, code) in codes {
            if let (Some(machine), Some(code)) = (machine, code) {
                machine.set_head(code, kernels, program, tile.batch, tile.head);
                machine.set_queries(code, kernels, program, tile.first_row);
            }
        }
        if let Some(dropped) = &mut self.dropped {
            dropped.set_head(tile.batch, tile.head);
        }
    }

    /// Turns to a tile of keys.
    fn set_keys(&mut self, forward: &Forward<'_>, program: &ScoreProgram, first: u32, masked: bool) {
        if let (Some(machine), Some(code)) = (&mut self.score, &program.score) {
            machine.set_keys(code, forward.kernels, program, first);
        }
        if let (Some(machine), Some(code), true) = (&mut self.mask, &program.mask, masked) {
            machine.set_keys(code, forward.kernels, program, first);
        }
    }
}

impl Scratch {
    /// Turns to a tile of queries.
    pub(super) fn begin_program(&mut self, forward: &Forward<'_>, program: &ScoreProgram, tile: &Tile) {
        let machines = self.machines.as_mut().expect("where there is a program");
        machines.set_tile(forward, program, tile);
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
        tile: &Tile,
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
        tile: &Tile,
        ((n, cells), next): ((u32, &[Cell]), Option<u32>),
        state: &mut State,
    ) {
        let (block_n, width) = (forward.tiles.block_n, forward.kernels.strip_lanes);
        let first_key = n * block_n;
        let keys = block_n.min(forward.problem.seqlen_k() - first_key) as usize;
        let masked = cells.contains(&Cell::Partial);
        machines.set_keys(forward, program, first_key, masked);
        let block = self.load_block(forward, tile, first_key as usize, keys, masked);
        let panels = tile.rows.div_ceil(forward.panels.lanes);
        for (index, (panel, count)) in forward.panels(tile.rows).enumerate() {
            if let Some(next) = next {
                forward.prefetch(tile, next, index, panels);
            }
            let of_panel = &cells[panel / width..(panel + count).div_ceil(width)];
            let mut first = 0;
            for cells in of_panel.chunk_by(|x, y| (*x == Cell::Empty) == (*y == Cell::Empty)) {
                let lanes = Lanes {
                    panel,
                    first,
                    count: (cells.len() * width).min(count - first),
                };
                first += cells.len() * width;
                if cells[0] == Cell::Empty {
                    continue;
                }
                // SAFETY: the lanes are among the tile's, tiles are as large as the plan says, and keys and values
                // are either rows in memory, all of which exist, or the tiles they were loaded to.
                unsafe {
                    self.scores_of(forward, lanes, &block);
                    self.score(forward, (program, machines), lanes, cells, [keys, block.count]);
                    self.exponentials_of(forward, lanes, &block, state);
                    if let Some(dropped) = &mut machines.dropped {
                        let first = [tile.first_row as usize + lanes.in_tile(), first_key as usize];
                        self.drop_weights(forward, dropped, lanes, first, keys);
                    }
                    self.add_values(forward, lanes, &block, state);
                    if !block.finite {
                        self.add_visible_values(forward, (program, machines), lanes, cells, keys, state);
                    }
                }
            }
        }
    }

    /// Products of some lanes become what the program makes of them; those it hides, and those of keys that are not
    /// there, minus infinity.
    ///
    /// # Safety
    /// As for [`scores_of`](Self::scores_of).
    unsafe fn score(
        &mut self,
        forward: &Forward<'_>,
        (program, machines): (&ScoreProgram, &mut Machines),
        lanes: Lanes,
        cells: &[Cell],
        [keys, padded]: [usize; 2],
    ) {
        let (kernels, stride) = (forward.kernels, forward.panels.lanes);
        for (strip, cell) in cells.iter().enumerate() {
            let in_run = strip * kernels.strip_lanes;
            let scores = self.scores.as_mut_ptr().wrapping_add(lanes.first + in_run);
            let first = lanes.in_tile() + in_run;
            // SAFETY: passed on to the caller; the strip is one of the panel's.
            unsafe {
                if let (Some(machine), Some(code)) = (&mut machines.score, &program.score) {
                    machine.run(&code.of_pairs.lines, (kernels, program), first, keys, (scores, stride));
                }
                if let (Some(machine), Some(code), Cell::Partial) = (&mut machines.mask, &program.mask, cell) {
                    machine.run(&code.of_pairs.lines, (kernels, program), first, keys, (scores, stride));
                }
            }
        }
        for row in self.scores.as_mut_slice()[..padded * stride]
            .chunks_mut(stride)
            .skip(keys)
        {
            row[lanes.first..lanes.first + lanes.count].fill(f32::NEG_INFINITY);
        }
    }

    /// Zeroes the exponentials that dropout drops, of lanes that start at a query and a key.
    ///
    /// # Safety
    /// As for [`scores_of`](Self::scores_of).
    unsafe fn drop_weights(
        &mut self,
        forward: &Forward<'_>,
        dropped: &mut Dropped,
        lanes: Lanes,
        [query, key]: [usize; 2],
        keys: usize,
    ) {
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
    /// As for [`scores_of`](Self::scores_of).
    unsafe fn add_visible_values(
        &mut self,
        forward: &Forward<'_>,
        (program, machines): (&ScoreProgram, &mut Machines),
        lanes: Lanes,
        cells: &[Cell],
        keys: usize,
        state: &mut State,
    ) {
        let (kernels, head_dim, stride) = (forward.kernels, forward.head_dim(), forward.panels.lanes);
        let width = kernels.strip_lanes;
        let (scores, values) = (self.scores.as_slice(), self.values.as_slice());
        let output = &mut state.output.as_mut_slice()[lanes.panel * forward.panels.depth..];
        for (strip, cell) in cells.iter().enumerate() {
            let first = lanes.first + strip * width;
            let mut visible = vec![true; keys * width];
            if let (Some(machine), Some(code), Cell::Partial) = (&mut machines.mask, &program.mask, cell) {
                // SAFETY: passed on to the caller.
                visible = unsafe { machine.visible(code, (kernels, program), lanes.panel + first, keys) };
            }
            for lane in 0..width.min(lanes.first + lanes.count - first) {
                for d in 0..head_dim {
                    let sum = &mut output[d * stride + first + lane];
                    for key in (0..keys).filter(|key| visible[key * width + lane]) {
                        let (weight, value) = (scores[key * stride + first + lane], values[key * head_dim + d]);
                        *sum = kernels.multiply_add(weight, value, *sum);
                    }
                }
            }
        }
    }
}
