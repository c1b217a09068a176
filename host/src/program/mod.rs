//! Score programs: what happens to a score between the product of query and key and the softmax, as a small value.
//!
//! A [`Program`] says of each (query, key) pair what its score becomes, `y = f(softmax_scale * (q . k), coordinates,
//! tables)`, and if it is visible. The softmax is over y, with the natural exponent; an invisible pair weighs exactly 0 and
//! is not read. Then there are a learned logit a head that takes part in the softmax and has no value (sinks), and dropout of
//! weights after normalisation.
//!
//! A program knows no device and no kernel: the CPU evaluates its [`Expression`] over strips of scores, for a GPU it is
//! printed as PTX, and the oracle evaluates it by scalars in f64.

mod closure;
mod compose;
mod derive;
mod evaluate;
mod expression;
pub mod interval;
pub(crate) mod named;
pub(crate) mod strip;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

pub use closure::{At, Index, Operand, Score, Truth};
pub(crate) use compose::{Fragment, Parts};
pub use compose::{MAX_CONSTANTS, MAX_NODES};
pub use derive::{Derivative, LoadDerivative};
pub use evaluate::{Evaluator, HostTable, Pair, Value};
pub use expression::{
    Binary, Comparison, Coordinate, Dependence, Expression, Indices, MAX_RANK, Node, NodeId, TableType, Type, Unary,
    read_as,
};

pub use crate::error::ProgramError;
pub use crate::layout::DataType;
use crate::layout::DeviceId;

/// A finished program. Where it has neither score nor mask, sinks nor dropout, there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    expression: Expression,
    score: NodeId,
    mask: Option<NodeId>,
    constants: Vec<Constant>,
    tables: Vec<TableSource>,
    sinks: Option<TableSource>,
    dropout: Option<Dropout>,
}

/// The value of a parameter: a number that may change from call to call without new code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Constant {
    /// Of a parameter that is a score.
    Score(f32),
    /// Of a parameter that is an index.
    Index(i32),
}

/// Dropout of weights: each is 0 with a probability p, else divided by 1 - p, after normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// p, in `0 .. 1`.
    pub probability: f32,
    /// The key of the generator.
    pub seed: u64,
}

/// The memory of a table, kept alive by its owner.
#[derive(Clone)]
pub struct TableSource {
    /// The device it is on.
    pub device: DeviceId,
    /// Element type.
    pub element: DataType,
    /// Its size along each axis, none of them 0.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each axis; 0 repeats one entry.
    pub strides: Vec<usize>,
    /// Device address of its first element; a pointer on the CPU.
    pub address: u64,
    /// Who keeps the memory allocated.
    pub owner: Arc<dyn Any + Send + Sync>,
}

impl Program {
    /// The operations of score and mask, in one graph.
    pub fn expression(&self) -> &Expression {
        &self.expression
    }

    /// The score that the softmax takes, y. [`Node::Score`] where the program leaves it as it comes.
    pub fn score(&self) -> NodeId {
        self.score
    }

    /// Tells if y is the score that comes in.
    pub fn keeps_score(&self) -> bool {
        self.expression.node(self.score) == Node::Score
    }

    /// The truth that says if a pair is visible; `None` if all are. Causal masks are not in it.
    pub fn mask(&self) -> Option<NodeId> {
        self.mask
    }

    /// The values of the parameters, by the places that [`Node::Parameter`] holds.
    pub fn constants(&self) -> &[Constant] {
        &self.constants
    }

    /// The tables that are read, in the order of [`Expression::tables`].
    pub fn tables(&self) -> &[TableSource] {
        &self.tables
    }

    /// A logit for each query head, f32 `[heads_q]`, that takes part in the softmax and has no value.
    pub fn sinks(&self) -> Option<&TableSource> {
        self.sinks.as_ref()
    }

    /// Dropout of weights.
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout
    }

    /// The same program with a causal mask in its mask: a query sees key j only if
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
    /// Its 32 bits.
    pub fn to_bits(self) -> u32 {
        match self {
            Self::Score(value) => value.to_bits(),
            Self::Index(value) => value as u32,
        }
    }
}

/// Equal where they lie at one place of one device and are read alike; owners are not compared.
impl PartialEq for TableSource {
    fn eq(&self, other: &Self) -> bool {
        self.device == other.device
            && self.element == other.element
            && self.shape == other.shape
            && self.strides == other.strides
            && self.address == other.address
    }
}

impl fmt::Debug for TableSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {} {:?} on {}", self.element.name(), self.shape, self.device)?;
        write!(f, ", strides {:?}, at {:#x}", self.strides, self.address)
    }
}
