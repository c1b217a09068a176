//! Score programs on the CPU: code made ready for a problem, and the memory it runs in.
//!
//! What a program says of a tile of scores is worked out strip by strip, by the lines that `kernels/strip.rs` runs. A
//! [`ScoreProgram`] is made once a call, a [`Machine`] once for each thread and [`Code`].

mod cells;
mod dropped;

pub(super) use cells::{Cell, Walk};
pub(super) use dropped::Dropped;

pub(super) use super::kernels::Table;
use super::kernels::{Kernels, Registers, Strip};
use super::pointer_mut;
use super::team::Lines;
use crate::problem::Problem;
use crate::program::strip::{Code, Given, Line, Slot, Space};
use crate::program::{Coordinate, Node, Program};

/// A program made ready for a problem.
pub(super) struct ScoreProgram {
    pub(super) program: Program,
    /// Scores become y; `None` where the program leaves them as they come.
    pub(super) score: Option<Code>,
    /// Hidden scores become minus infinity; `None` where none is hidden.
    pub(super) mask: Option<Code>,
    pub(super) tables: Vec<Table>,
    /// What turns products into scores.
    scale: f32,
    heads_of_kv: usize,
    seqlen_q: u32,
    seqlen_k: u32,
}

impl ScoreProgram {
    /// The program of a problem, if it has one, for products of query and key that are scores once they are
    /// multiplied by `scale`.
    pub(super) fn new(problem: &Problem, scale: f32) -> Option<Self> {
        let program = problem.program()?;
        let program = if problem.causal() {
            program.with_causal_mask()
        } else {
            Program::clone(program)
        };
        let graph = program.expression();
        let score = (!program.keeps_score()).then(|| Code::new(graph, &[program.score()], true));
        let mask = program.mask().map(|mask| Code::hiding(graph, mask));
        let tables = program.tables().iter().map(|table| {
            let (mut last, mut strides) = ([0; 4], [0; 4]);
            for (axis, (&size, &stride)) in table.shape.iter().zip(&table.strides).enumerate() {
                (last[axis], strides[axis]) = (i32::try_from(size - 1).unwrap_or(i32::MAX), stride);
            }
            Table {
                first: pointer_mut(table.address),
                element: table.element,
                rank: table.shape.len(),
                last,
                strides,
            }
        });
        Some(Self {
            score,
            mask,
            tables: tables.collect(),
            scale,
            heads_of_kv: problem.heads_q() / problem.heads_kv(),
            seqlen_q: problem.seqlen_q(),
            seqlen_k: problem.seqlen_k(),
            program,
        })
    }

    /// The logit of a query head that has no value.
    pub(super) fn sink(&self, head: usize) -> Option<f32> {
        sink(&self.program, head)
    }

    /// What weights that are not dropped are multiplied by.
    pub(super) fn kept_factor(&self) -> f32 {
        self.program
            .dropout()
            .map_or(1.0, |dropout| 1.0 / (1.0 - dropout.probability))
    }

    /// Tells if all heads and sequences see the same.
    pub(super) fn has_one_mask(&self) -> bool {
        let graph = self.program.expression();
        let needed = graph.needed(self.program.mask());
        let differs = |node| {
            let of_heads = [Coordinate::Batch, Coordinate::Head, Coordinate::KvHead];
            of_heads
                .into_iter()
                .any(|coordinate| node == Node::Coordinate(coordinate))
        };
        !graph.iter().any(|(id, node)| needed[id.index()] && differs(node))
    }

    /// Runs lines.
    ///
    /// # Safety
    /// The processor has the instructions, and the registers of `spaces` have as many rows.
    unsafe fn run(&self, kernels: &Kernels, lines: &[Line], rows: usize, spaces: [Registers; 6]) {
        // SAFETY: passed on to the caller; tables are of the problem, which keeps them.
        unsafe {
            (kernels.strip)(&Strip {
                lines,
                rows,
                spaces,
                tables: &self.tables,
            });
        }
    }

    fn given(&self, given: Given, batch: usize, head: usize) -> u32 {
        match given {
            Given::Bits(bits) => bits,
            Given::Parameter(place) => self.program.constants()[place as usize].to_bits(),
            Given::Scale => self.scale.to_bits(),
            Given::Coordinate(coordinate) => match coordinate {
                Coordinate::Batch => batch as u32,
                Coordinate::Head => head as u32,
                Coordinate::KvHead => (head / self.heads_of_kv) as u32,
                Coordinate::SeqlenQ => self.seqlen_q,
                Coordinate::SeqlenK => self.seqlen_k,
                Coordinate::Query | Coordinate::Key => unreachable!("these are no numbers of a head"),
            },
        }
    }
}

/// The logit of a query head that has no value.
pub(super) fn sink(program: &Program, head: usize) -> Option<f32> {
    let sinks = program.sinks()?;
    let first: *const f32 = pointer_mut(sinks.address);
    // SAFETY: there is one for each query head, in memory of the CPU that the program keeps.
    Some(unsafe { *first.add(head * sinks.strides[0]) })
}

// SAFETY: tables are memory that nobody writes during a call.
unsafe impl Send for ScoreProgram {}
// SAFETY: as above.
unsafe impl Sync for ScoreProgram {}

/// The memory that one thread runs a [`Code`] in.
pub(super) struct Machine {
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
    /// For tiles of so many queries and keys at most.
    pub(super) fn new(code: &Code, kernels: &Kernels, queries: usize, keys: usize) -> Self {
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
    pub(super) fn set_head(
        &mut self,
        code: &Code,
        kernels: &Kernels,
        program: &ScoreProgram,
        batch: usize,
        head: usize,
    ) {
        for (numbers, &given) in self.given.as_mut_slice().chunks_mut(self.width).zip(&code.given) {
            numbers.fill(f32::from_bits(program.given(given, batch, head)));
        }
        let spaces = self.spaces();
        // SAFETY: every space has a row for every register.
        unsafe { program.run(kernels, &code.of_head.lines, 1, spaces) };
    }

    /// Turns to the queries of a tile, from `first` on. Past the last query of the sequence are repetitions of it.
    pub(super) fn set_queries(&mut self, code: &Code, kernels: &Kernels, program: &ScoreProgram, first: u32) {
        count_up(&mut self.query.as_mut_slice()[..self.queries], first, program.seqlen_q);
        let (rows, spaces) = (self.queries / self.width, self.spaces());
        // SAFETY: the registers of queries are as many rows.
        unsafe { program.run(kernels, &code.of_queries.lines, rows, spaces) };
    }

    /// Turns to the keys of a tile, likewise.
    pub(super) fn set_keys(&mut self, code: &Code, kernels: &Kernels, program: &ScoreProgram, first: u32) {
        count_up(&mut self.key.as_mut_slice()[..self.keys], first, program.seqlen_k);
        let (rows, spaces) = (self.keys / self.width, self.spaces());
        // SAFETY: the registers of keys are as many rows.
        unsafe { program.run(kernels, &code.of_keys.lines, rows, spaces) };
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
    pub(super) unsafe fn run(
        &mut self,
        lines: &[Line],
        (kernels, program): (&Kernels, &ScoreProgram),
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
        unsafe { program.run(kernels, lines, keys, spaces) };
    }

    /// What a mask says of a strip, of which it hides scores: a truth for each pair, keys by lanes.
    ///
    /// # Safety
    /// As for [`run`](Self::run).
    pub(super) unsafe fn visible(
        &mut self,
        code: &Code,
        (kernels, program): (&Kernels, &ScoreProgram),
        first: usize,
        keys: usize,
    ) -> Vec<bool> {
        let mut scores = vec![0.0_f32; keys * self.width];
        let strip = (scores.as_mut_ptr(), self.width);
        // SAFETY: passed on to the caller.
        unsafe { self.run(&code.of_pairs.lines, (kernels, program), first, keys, strip) };
        scores.iter().map(|&score| score == 0.0).collect()
    }

    /// Where a register of the strip that starts at lane `first` is: its first row, and the elements from one row to
    /// the next.
    pub(super) fn register(&mut self, slot: Slot, first: usize) -> (*const f32, usize) {
        let space = self.spaces_of_strip(first)[slot.space as usize];
        (
            space.first.wrapping_add(usize::from(slot.index) * space.register),
            space.row,
        )
    }

    /// The spaces as lines of pairs see them, for the strip that starts at lane `first`.
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

    /// The spaces as stages before that of pairs see them.
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
