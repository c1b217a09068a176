//! The memory that a thread runs a program in.

use super::ScoreProgram;
use super::dropped::Dropped;
use crate::device::cpu::kernels::{Kernels, Registers};
use crate::device::cpu::team::Lines;
use crate::program::strip::{Code, Line, Slot, Space};

/// Memory in which one thread runs a program.
pub(in crate::device::cpu) struct Machines {
    score: Option<Machine>,
    mask: Option<Machine>,
    pub(in crate::device::cpu) dropped: Option<Dropped>,
}

impl Machines {
    /// Makes room for tiles of at most this many queries and keys.
    pub(in crate::device::cpu) fn new(program: &ScoreProgram, queries: usize, keys: usize) -> Self {
        let machine = |code: &Option<Code>| Some(Machine::new(code.as_ref()?, program.kernels, queries, keys));
        Self {
            score: machine(&program.score),
            mask: machine(&program.mask),
            dropped: Dropped::new(program, keys),
        }
    }

    /// Turns to the queries of a head from `first` on.
    pub(in crate::device::cpu) fn set_queries(
        &mut self,
        program: &ScoreProgram,
        (batch, head): (usize, usize),
        first: u32,
    ) {
        for (machine, code) in [(&mut self.score, &program.score), (&mut self.mask, &program.mask)] {
            if let (Some(machine), Some(code)) = (machine, code) {
                machine.set_head(code, program, batch, head);
                machine.set_queries(code, program, first);
            }
        }
        if let Some(dropped) = &mut self.dropped {
            dropped.set_head(batch, head);
        }
    }

    /// Turns to a tile of keys, whose mask is used only if some pair of it is hidden.
    pub(in crate::device::cpu) fn set_keys(&mut self, program: &ScoreProgram, first: u32, masked: bool) {
        if let (Some(machine), Some(code)) = (&mut self.score, &program.score) {
            machine.set_keys(code, program, first);
        }
        if let (Some(machine), Some(code), true) = (&mut self.mask, &program.mask, masked) {
            machine.set_keys(code, program, first);
        }
    }

    /// Turns products of a strip into y, and those that the mask hides, if it hides any, into minus infinity.
    ///
    /// # Safety
    /// The contract of [`Machine::run`].
    pub(in crate::device::cpu) unsafe fn score(
        &mut self,
        program: &ScoreProgram,
        masked: bool,
        [first, keys]: [usize; 2],
        scores: (*mut f32, usize),
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            if let (Some(machine), Some(code)) = (&mut self.score, &program.score) {
                machine.run(&code.of_pairs.lines, program, first, keys, scores);
            }
            if let (Some(machine), Some(code), true) = (&mut self.mask, &program.mask, masked) {
                machine.run(&code.of_pairs.lines, program, first, keys, scores);
            }
        }
    }

    /// Zeroes the hidden numbers of a strip.
    ///
    /// # Safety
    /// The contract of [`Machine::run`]; [`score`](Self::score) was run for this strip with its mask.
    pub(in crate::device::cpu) unsafe fn clear_hidden(
        &mut self,
        program: &ScoreProgram,
        [first, keys]: [usize; 2],
        numbers: (*mut f32, usize),
    ) {
        if let (Some(machine), Some(code)) = (&mut self.mask, &program.mask) {
            // SAFETY: passed on to the caller.
            unsafe { machine.run(&[code.clear()], program, first, keys, numbers) };
        }
    }

    /// Returns for each pair of a strip, keys by lanes, whether the mask shows it.
    ///
    /// # Safety
    /// The contract of [`Machine::run`].
    pub(in crate::device::cpu) unsafe fn visible(
        &mut self,
        program: &ScoreProgram,
        masked: bool,
        [first, keys]: [usize; 2],
    ) -> Vec<bool> {
        let width = program.kernels.strip_lanes;
        let mut scores = vec![0.0_f32; keys * width];
        if let (Some(machine), Some(code), true) = (&mut self.mask, &program.mask, masked) {
            let strip = (scores.as_mut_ptr(), width);
            // SAFETY: passed on to the caller.
            unsafe { machine.run(&code.of_pairs.lines, program, first, keys, strip) };
        }
        scores.iter().map(|&score| score == 0.0).collect()
    }

    /// Returns the machine of scores, unless the program leaves them as they come.
    pub(in crate::device::cpu) fn of_scores(&mut self) -> Option<&mut Machine> {
        self.score.as_mut()
    }
}

/// Memory in which one thread runs a [`Code`].
pub(in crate::device::cpu) struct Machine {
    /// Lanes of a strip.
    width: usize,
    /// Queries and keys of a tile, rounded up to whole strips.
    queries: usize,
    keys: usize,
    given: Lines,
    head: Lines,
    query: Lines,
    key: Lines,
    /// The registers of keys, each number in all the lanes of a row.
    key_rows: Lines,
    strip: Lines,
}

impl Machine {
    /// Makes room for tiles of at most this many queries and keys.
    fn new(code: &Code, kernels: &Kernels, queries: usize, keys: usize) -> Self {
        let width = kernels.strip_lanes;
        let (queries, keys) = (queries.next_multiple_of(width), keys.next_multiple_of(width));
        Self {
            width,
            queries,
            keys,
            given: Lines::new(code.given.len() * width),
            head: Lines::new(code.of_head.registers * width),
            query: Lines::new(code.of_queries.registers * queries),
            key: Lines::new(code.of_keys.registers * keys),
            key_rows: Lines::new(code.of_keys.registers * keys * width),
            strip: Lines::new(code.of_pairs.registers * keys * width),
        }
    }

    /// Turns to a head.
    fn set_head(&mut self, code: &Code, program: &ScoreProgram, batch: usize, head: usize) {
        for (numbers, &given) in self.given.as_mut_slice().chunks_mut(self.width).zip(&code.given) {
            numbers.fill(f32::from_bits(program.given(given, batch, head)));
        }
        let spaces = self.spaces();
        // SAFETY: every space has a row for every register.
        unsafe { program.run(&code.of_head.lines, 1, spaces) };
    }

    /// Turns to the queries of a tile, from `first` on. Past the last query of the sequence it is repeated.
    fn set_queries(&mut self, code: &Code, program: &ScoreProgram, first: u32) {
        count_up(&mut self.query.as_mut_slice()[..self.queries], first, program.seqlen_q);
        let (rows, spaces) = (self.queries / self.width, self.spaces());
        // SAFETY: the registers of queries are as many rows.
        unsafe { program.run(&code.of_queries.lines, rows, spaces) };
    }

    /// Turns to the keys of a tile, from `first` on. Past the last key of the sequence it is repeated.
    fn set_keys(&mut self, code: &Code, program: &ScoreProgram, first: u32) {
        count_up(&mut self.key.as_mut_slice()[..self.keys], first, program.seqlen_k);
        let (rows, spaces) = (self.keys / self.width, self.spaces());
        // SAFETY: the registers of keys are as many rows.
        unsafe { program.run(&code.of_keys.lines, rows, spaces) };
        let numbers = &self.key.as_slice()[..code.of_keys.registers * self.keys];
        let rows = self.key_rows.as_mut_slice().chunks_exact_mut(self.width);
        rows.zip(numbers).for_each(|(row, number)| row.fill(*number));
    }

    /// Runs lines of pairs over a strip: the queries of the tile from lane `first` on by its first `keys` keys. The
    /// scores of the strip are at `scores`, rows `stride` apart.
    ///
    /// # Safety
    /// The processor has the instructions. Head, queries and keys are set, the lane is the first of a strip, and the
    /// strip lies in memory that this thread alone uses.
    pub(in crate::device::cpu) unsafe fn run(
        &mut self,
        lines: &[Line],
        program: &ScoreProgram,
        first: usize,
        keys: usize,
        (scores, stride): (*mut f32, usize),
    ) {
        debug_assert!(keys <= self.keys && first.is_multiple_of(self.width) && first < self.queries);
        let mut spaces = self.spaces_of_strip(first);
        spaces[Space::Score as usize] = Registers {
            first: scores,
            register: 0,
            row: stride,
        };
        // SAFETY: registers of strips are as many rows, and so are the scores, says the caller.
        unsafe { program.run(lines, keys, spaces) };
    }

    /// Returns the first row of a register of the strip that starts at lane `first`, and the elements from one row to the
    /// next.
    pub(in crate::device::cpu) fn register(&mut self, slot: Slot, first: usize) -> (*const f32, usize) {
        let space = self.spaces_of_strip(first)[slot.space as usize];
        (
            space.first.wrapping_add(usize::from(slot.index) * space.register),
            space.row,
        )
    }

    /// Returns the spaces as lines of pairs see them, for the strip that starts at lane `first`.
    fn spaces_of_strip(&mut self, first: usize) -> [Registers; 6] {
        let mut spaces = self.spaces();
        spaces[Space::Query as usize].first = self.query.as_mut_ptr().wrapping_add(first);
        spaces[Space::Query as usize].row = 0;
        spaces[Space::Key as usize] = Registers {
            first: self.key_rows.as_mut_ptr(),
            register: self.keys * self.width,
            row: self.width,
        };
        spaces
    }

    /// Returns the spaces as the stages before that of pairs see them.
    fn spaces(&mut self) -> [Registers; 6] {
        let registers = |memory: &mut Lines, register: usize, row: usize| Registers {
            first: memory.as_mut_ptr(),
            register,
            row,
        };
        [
            registers(&mut self.given, self.width, 0),
            registers(&mut self.head, self.width, 0),
            registers(&mut self.query, self.queries, self.width),
            registers(&mut self.key, self.keys, self.width),
            registers(&mut self.strip, self.keys * self.width, self.width),
            Registers {
                first: std::ptr::null_mut(), // no score is read before
                register: 0,
                row: 0,
            },
        ]
    }
}

/// Writes the integers from `first` on, below `end`, and then its last again.
fn count_up(positions: &mut [f32], first: u32, end: u32) {
    for (position, x) in positions.iter_mut().enumerate() {
        *x = f32::from_bits((first + position as u32).min(end - 1));
    }
}
