//! Score programs on the CPU: code made ready for a problem, and the memory it runs in.
//!
//! A program is applied to a tile of scores strip by strip, by the lines that `kernels/strip.rs` runs. A [`ScoreProgram`]
//! is made once a call, [`Machines`] once for each thread.

mod cells;
mod dropped;
mod machine;

pub(super) use cells::Walk;
pub(super) use machine::{Machine, Machines};

pub(super) use super::kernels::Table;
use super::kernels::{Kernels, Registers, Strip};
use super::pointer_mut;
use crate::problem::Problem;
use crate::program::strip::{Code, Given, Line};
use crate::program::{Coordinate, Expression, NodeId, Program};

/// A program made ready for a problem.
pub(super) struct ScoreProgram {
    pub(super) kernels: &'static Kernels,
    pub(super) program: Program,
    /// Scores become y; `None` where the program leaves them as they come.
    pub(super) score: Option<Code>,
    /// Hidden scores become minus infinity; `None` where none is hidden.
    mask: Option<Code>,
    pub(super) tables: Vec<Table>,
    /// Factor that turns products into scores.
    scale: f32,
    heads_of_kv: usize,
    seqlen_q: u32,
    seqlen_k: u32,
}

impl ScoreProgram {
    /// Returns the program of a problem, if it has one, for products of query and key that are scores once they are
    /// multiplied by `scale`. Until [`with_scores`](Self::with_scores) it leaves scores as they come.
    pub(super) fn new(kernels: &'static Kernels, problem: &Problem, scale: f32) -> Option<Self> {
        let program = problem.program()?;
        let program = if problem.causal() {
            program.with_causal_mask()
        } else {
            Program::clone(program)
        };
        let mask = program.mask().map(|mask| Code::hiding(program.expression(), mask));
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
            kernels,
            score: None,
            mask,
            tables: tables.collect(),
            scale,
            heads_of_kv: problem.heads_q() / problem.heads_kv(),
            seqlen_q: problem.seqlen_q(),
            seqlen_k: problem.seqlen_k(),
            program,
        })
    }

    /// Makes scores y: the first root of an expression, whose other roots are computed as well. Without effect where the
    /// program leaves scores as they come.
    pub(super) fn with_scores(mut self, expression: &Expression, roots: &[NodeId]) -> Self {
        self.score = (!self.program.keeps_score()).then(|| Code::new(expression, roots, true));
        self
    }

    /// Returns the sink of a query head: a logit without a value.
    pub(super) fn sink(&self, head: usize) -> Option<f32> {
        sink(&self.program, head)
    }

    /// Factor of the weights that dropout keeps; 1 without dropout.
    pub(super) fn kept_factor(&self) -> f32 {
        self.program.dropout().map_or(1.0, |dropout| dropout.factor())
    }

    /// Returns true if the mask is the same for all heads and batch entries.
    pub(super) fn has_one_mask(&self) -> bool {
        let of_heads = [Coordinate::Batch, Coordinate::Head, Coordinate::KvHead];
        !self.program.mask_reads(&of_heads)
    }

    /// Runs lines.
    ///
    /// # Safety
    /// The processor has the instructions, and the registers of `spaces` have as many rows.
    unsafe fn run(&self, lines: &[Line], rows: usize, spaces: [Registers; 6]) {
        // SAFETY: passed on to the caller; tables are of the problem, which keeps them.
        unsafe {
            (self.kernels.strip)(&Strip {
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

/// Returns the sink of a query head of a program: a logit without a value.
pub(super) fn sink(program: &Program, head: usize) -> Option<f32> {
    let sinks = program.sinks()?;
    let first: *const f32 = pointer_mut(sinks.address);
    // SAFETY: there is one for each query head, in memory of the CPU that the program keeps.
    Some(unsafe { *first.add(head * sinks.strides[0]) })
}

// SAFETY: tables are memory that no thread writes during a call.
unsafe impl Send for ScoreProgram {}
// SAFETY: as above.
unsafe impl Sync for ScoreProgram {}
