//! Score programs: what happens to a score between the product of query and key and the softmax, as a small value.
//!
//! A [`Program`] says of each (query, key) pair what its score becomes, `y = f(softmax_scale * (q . k), coordinates,
//! tables)`, and if it is visible. The softmax is over y, with the natural exponent; an invisible pair weighs exactly 0 and
//! is not read. Then there are a learned logit a head that takes part in the softmax and has no value (sinks), and dropout of
//! weights after normalisation.
//!
//! A program knows no device and no kernel: the CPU evaluates its [`Expression`] over strips of scores, for a GPU it is
//! printed as PTX, and the oracle evaluates it by scalars in f64.

mod blocks;
mod closure;
mod compose;
mod cover;
mod derive;
pub mod dropout;
mod evaluate;
mod expression;
#[cfg(feature = "emulator")]
mod formula;
mod generator;
pub mod interval;
mod mask_key;
pub(crate) mod named;
mod node;
mod print;
mod scope;
mod splice;
pub(crate) mod strip;
mod table;
mod text;

pub use blocks::{BlockMask, Coverage, Sizes};
pub use closure::{At, Index, Operand, Readable, Score, Truth};
pub(crate) use compose::{Fragment, Parts};
pub use compose::{MAX_CONSTANTS, MAX_NODES, MAX_TABLES};
pub(crate) use cover::Covers;
pub use derive::{Derivative, LoadDerivative};
pub use dropout::Dropout;
pub use evaluate::{Evaluator, HostTable, Pair, Value};
pub use expression::{Dependence, Expression, TableType, read_as};
use interval::{Bounds, Intervals, Ranges};
pub(crate) use mask_key::MaskKey;
pub use node::{Binary, Comparison, Coordinate, Indices, MAX_RANK, Node, NodeId, Type, Unary};
pub use table::{Table, TableSource};

pub use splice::{NotSpliced, Spliced, splice};
pub use text::{Axis, Code, Factor, Gradients, Memory, Numbers, Slot};

pub use crate::element::DataType;
use crate::error::Error;
pub use crate::error::ProgramError;
use crate::layout::DeviceId;

/// A finished program. It has at least one of score, mask, sinks and dropout.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    expression: Expression,
    score: NodeId,
    mask: Option<NodeId>,
    constants: Vec<Constant>,
    tables: Vec<TableSource>,
    /// The place of [`Attention::bias`](crate::Attention::bias)'s table, if there is one.
    bias: Option<usize>,
    /// The place of [`Attention::alibi`](crate::Attention::alibi)'s table, if there is one.
    alibi_slopes: Option<usize>,
    sinks: Option<TableSource>,
    dropout: Option<Dropout>,
}

/// Value of a parameter: a number that may change from call to call without new code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Constant {
    /// Value of a parameter that is a score.
    Score(f32),
    /// Value of a parameter that is an index.
    Index(i32),
}

impl Program {
    /// The program that leaves scores as they are and shows every pair.
    pub(crate) fn identity() -> Self {
        let mut expression = Expression::default();
        Self {
            score: expression.add(Node::Score),
            expression,
            mask: None,
            constants: Vec::new(),
            tables: Vec::new(),
            bias: None,
            alibi_slopes: None,
            sinks: None,
            dropout: None,
        }
    }

    /// The operations of score and mask, in one graph.
    pub fn expression(&self) -> &Expression {
        &self.expression
    }

    /// Returns the node of the softmax's score y. It is [`Node::Score`] if the program does not change scores.
    pub fn score(&self) -> NodeId {
        self.score
    }

    /// Returns true if y is the incoming score.
    pub fn keeps_score(&self) -> bool {
        self.expression.node(self.score) == Node::Score
    }

    /// Returns the node that tells if a pair is visible; `None` if all are. Causal masks are not part of it.
    pub fn mask(&self) -> Option<NodeId> {
        self.mask
    }

    /// Returns true if the mask depends on one of these coordinates.
    pub(crate) fn mask_reads(&self, coordinates: &[Coordinate]) -> bool {
        let needed = self.expression.needed(self.mask);
        let mut nodes = self.expression.iter().filter(|(id, _)| needed[id.index()]);
        nodes.any(|(_, node)| coordinates.iter().any(|&which| node == Node::Coordinate(which)))
    }

    /// Returns the numbers of batch entries and query heads whose masks may differ; 1 where all are alike.
    pub(crate) fn masks_that_differ(&self, sizes: Sizes) -> [usize; 2] {
        let count = |coordinates: &[Coordinate], all| if self.mask_reads(coordinates) { all } else { 1 };
        [
            count(&[Coordinate::Batch], sizes.batch),
            count(&[Coordinate::Head, Coordinate::KvHead], sizes.heads_q),
        ]
    }

    /// Returns the values of the parameters, by the places in [`Node::Parameter`].
    pub fn constants(&self) -> &[Constant] {
        &self.constants
    }

    /// Returns the tables that are read, in the order of [`Expression::tables`].
    pub fn tables(&self) -> &[TableSource] {
        &self.tables
    }

    /// The place in [`tables`](Self::tables) of the table that [`Attention::bias`](crate::Attention::bias) gave.
    pub fn bias(&self) -> Option<usize> {
        self.bias
    }

    /// The place in [`tables`](Self::tables) of the table that [`Attention::alibi`](crate::Attention::alibi) gave.
    pub fn alibi_slopes(&self) -> Option<usize> {
        self.alibi_slopes
    }

    /// Returns the sinks: one logit for each query head, f32 `[heads_q]`, that takes part in the softmax without a
    /// value.
    pub fn sinks(&self) -> Option<&TableSource> {
        self.sinks.as_ref()
    }

    /// Returns the dropout of weights.
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout
    }

    /// Checks that tables are on a device, and that no read leaves its table for the pairs within ranges.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`], [`ProgramError::Index`], [`ProgramError::Sinks`].
    pub(crate) fn check(&self, device: &DeviceId, ranges: &Ranges) -> Result<(), Error> {
        if let Some(table) = self
            .tables
            .iter()
            .chain(&self.sinks)
            .find(|table| table.device != *device)
        {
            return Err(Error::DeviceMismatch {
                argument: table.name,
                got: table.device.to_string(),
                other: "q",
                expected: device.to_string(),
            });
        }
        let heads = ranges[Coordinate::Head as usize].1 as usize + 1;
        if let Some(sinks) = &self.sinks
            && sinks.shape != [heads]
        {
            let shape = sinks.shape.clone();
            return Err(ProgramError::Sinks { shape, heads }.into());
        }
        if ranges.iter().any(|(first, last)| first > last) {
            return Ok(()); // no pairs, no reads
        }
        let reads = || (self.expression.nodes().iter()).filter_map(Node::unproven_read);
        let roots = reads().flat_map(|(_, indices)| indices.to_vec());
        let mut bounds = Intervals::new(&self.expression, roots);
        bounds.evaluate(ranges, &self.constants, |table, _| {
            Bounds::any(read_as(self.tables[table as usize].element))
        });
        for (table, indices) in reads() {
            let table = &self.tables[table as usize];
            for (axis, (&index, &size)) in indices.iter().zip(&table.shape).enumerate() {
                let Bounds::Index(low, high) = bounds.of(index) else {
                    unreachable!("an index has bounds of an index")
                };
                if low < 0 || i64::from(high) >= size as i64 {
                    return Err(ProgramError::Index {
                        table: table.name,
                        axis,
                        size,
                        low,
                        high,
                    }
                    .into());
                }
            }
        }
        Ok(())
    }

    /// The program of one sequence of a ragged batch, which is a problem of its own: the batch coordinate becomes a parameter
    /// that holds the sequence's number, so that the code is the same for all sequences. Dropout draws with a seed that is
    /// larger by this number.
    #[must_use]
    pub fn of_sequence(&self, sequence: usize) -> Self {
        let mut program = self.clone();
        program.constants.push(Constant::Index(sequence as i32));
        let number = Node::Parameter(self.constants.len() as u32, Type::Index);
        program.expression = Expression::default();
        for &table in self.expression.tables() {
            program.expression.add_table(table);
        }
        let mut places: Vec<NodeId> = Vec::new();
        for (_, node) in self.expression.iter() {
            let node = match node.map(|operand| places[operand.index()]) {
                Node::Coordinate(Coordinate::Batch) => number,
                node => node,
            };
            places.push(program.expression.add(node));
        }
        program.score = places[self.score.index()];
        program.mask = self.mask.map(|mask| places[mask.index()]);
        if let Some(dropout) = &mut program.dropout {
            dropout.seed = dropout.seed.wrapping_add(sequence as u64);
        }
        program
    }

    /// Adds a causal mask to the program's mask: a query sees key j only if
    /// `j <= query + seqlen_k - seqlen_q`. For devices that have one kind of mask.
    #[must_use]
    pub fn with_causal_mask(&self) -> Self {
        let mut program = self.clone();
        let graph = &mut program.expression;
        let mut coordinate = |which| graph.add(Node::Coordinate(which));
        let [query, key, seqlen_q, seqlen_k] = [
            Coordinate::Query,
            Coordinate::Key,
            Coordinate::SeqlenQ,
            Coordinate::SeqlenK,
        ]
        .map(&mut coordinate);
        let ahead = graph.add(Node::Binary(Binary::Subtract, seqlen_k, seqlen_q));
        let position = graph.add(Node::Binary(Binary::Add, query, ahead));
        let causal = graph.add(Node::Compare(Comparison::LessOrEqual, key, position));
        program.mask = Some(match program.mask {
            Some(mask) => graph.add(Node::Binary(Binary::And, mask, causal)),
            None => causal,
        });
        program
    }
}

impl Constant {
    /// Returns the 32 bits of the value.
    pub fn to_bits(self) -> u32 {
        match self {
            Self::Score(value) => value.to_bits(),
            Self::Index(value) => value as u32,
        }
    }
}
