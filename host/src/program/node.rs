//! [`Node`]: an operation of a program on values of other nodes.

use std::ops::Deref;

#[cfg(doc)]
use super::Expression;

/// Largest number of axes of a table.
pub const MAX_RANK: usize = 4;

/// Type of a node's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// A score: f32 on devices, f64 in the oracle.
    Score,
    /// A coordinate or a number computed from coordinates: i32 with wrapping arithmetic.
    Index,
    /// True or false.
    Truth,
}

/// Name of a node of an [`Expression`]: its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(super) u32);

impl NodeId {
    /// Returns the node's place; operands have smaller ones.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Coordinate of a (query, key) pair. Positions count from the first query and key of their own sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coordinate {
    /// Index of the sequence in its batch.
    Batch,
    /// Index of the query head.
    Head,
    /// Index of the key/value head, `head / (heads_q / heads_kv)`.
    KvHead,
    /// Index of the query.
    Query,
    /// Index of the key.
    Key,
    /// Number of queries of the sequence.
    SeqlenQ,
    /// Number of keys of the sequence.
    SeqlenK,
}

impl Coordinate {
    /// All coordinates.
    pub const ALL: [Self; 7] = [
        Self::Batch,
        Self::Head,
        Self::KvHead,
        Self::Query,
        Self::Key,
        Self::SeqlenQ,
        Self::SeqlenK,
    ];
}

/// An operation on one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unary {
    /// `-x`, of a score or an index.
    Negate,
    /// The absolute value of a score or an index; that of `i32::MIN` is `i32::MIN`.
    Abs,
    /// `e^x` of a score.
    Exp,
    /// The natural logarithm of a score.
    Log,
    /// The hyperbolic tangent of a score.
    Tanh,
    /// The square root of a score.
    Sqrt,
    /// `1 / x` of a score.
    Reciprocal,
    /// A score rounded down to a whole number, as a score. Its derivative is 0.
    Floor,
    /// An index as a score, rounded to the nearest.
    ToScore,
    /// A score rounded down to a whole number, as an index: the nearest i32 if out of range, 0 for NaN.
    ToIndex,
    /// Each bit of an index inverted, or a truth negated.
    Not,
}

/// An operation on two values of one type; the result has that type too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binary {
    /// The sum of scores or indices.
    Add,
    /// The difference of scores or indices.
    Subtract,
    /// The product of scores or indices.
    Multiply,
    /// The quotient of scores, or the Euclidean one of indices: `floor(x / y)`, for `y > 0`.
    Divide,
    /// The Euclidean remainder of indices, in `0 .. y`, for `y > 0`.
    Remainder,
    /// The smaller of scores or indices; the other one where a score is NaN.
    Min,
    /// The larger of scores or indices; the other one where a score is NaN.
    Max,
    /// Bits of both indices, or both truths.
    And,
    /// Bits of either index, or either truth.
    Or,
    /// Bits of one index only, or one truth only.
    Xor,
    /// An index shifted to the left by another, modulo 32.
    ShiftLeft,
    /// An index shifted to the right by another, modulo 32, with sign extension.
    ShiftRight,
}

/// A comparison of two scores, or two indices. False if a score is NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    /// `x < y`.
    Less,
    /// `x <= y`.
    LessOrEqual,
    /// `x == y`.
    Equal,
}

/// Indices of a read, one for each axis of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Indices {
    rank: u8,
    nodes: [NodeId; MAX_RANK],
}

impl Indices {
    /// Collects the indices of a read, one for each axis.
    ///
    /// # Panics
    /// For more than [`MAX_RANK`] indices.
    pub fn new(indices: &[NodeId]) -> Self {
        let mut nodes = [NodeId(0); MAX_RANK];
        nodes[..indices.len()].copy_from_slice(indices);
        Self {
            rank: indices.len() as u8,
            nodes,
        }
    }
}

impl Deref for Indices {
    type Target = [NodeId];

    fn deref(&self) -> &[NodeId] {
        &self.nodes[..usize::from(self.rank)]
    }
}

impl std::fmt::Debug for Indices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The incoming score: `softmax_scale * (q . k)`.
    Score,
    /// A coordinate, which is an index.
    Coordinate(Coordinate),
    /// A constant of the operations, not of the user, that is a score: the bits of an f32.
    Real(u32),
    /// A constant that is an index.
    Integer(i32),
    /// A constant that is a truth.
    Truth(bool),
    /// A number of the user: the place of its value in [`Program::constants`](super::Program::constants), and its
    /// type, a score or an index.
    Parameter(u32, Type),
    /// An operation on one value.
    Unary(Unary, NodeId),
    /// An operation on two values.
    Binary(Binary, NodeId, NodeId),
    /// A comparison of two values.
    Compare(Comparison, NodeId, NodeId),
    /// The second value if the first, a truth, is true, else the third. The value not taken has no influence.
    Select(NodeId, NodeId, NodeId),
    /// An element of a table, given by the table's place in [`Expression::tables`] and an index for each of its axes.
    Load {
        /// Place of the table.
        table: u32,
        /// One index for each axis.
        indices: Indices,
        /// True to clamp indices to the table. If false, all are proven to be inside for every pair of the problem.
        clamped: bool,
    },
}

impl Node {
    /// Returns the operands of the operation.
    pub fn operands(&self) -> impl Iterator<Item = NodeId> + use<> {
        let [a, b, c, d] = match *self {
            Self::Score
            | Self::Coordinate(_)
            | Self::Real(_)
            | Self::Integer(_)
            | Self::Truth(_)
            | Self::Parameter(..) => [None; 4],
            Self::Unary(_, x) => [Some(x), None, None, None],
            Self::Binary(_, x, y) | Self::Compare(_, x, y) => [Some(x), Some(y), None, None],
            Self::Select(x, y, z) => [Some(x), Some(y), Some(z), None],
            Self::Load { indices, .. } => std::array::from_fn(|axis| indices.get(axis).copied()),
        };
        [a, b, c, d].into_iter().flatten()
    }

    /// The table and the indices of a read that has to be proven to stay within it.
    pub(super) fn unproven_read(&self) -> Option<(u32, Indices)> {
        match *self {
            Self::Load {
                table,
                indices,
                clamped: false,
            } => Some((table, indices)),
            _ => None,
        }
    }

    /// Returns this operation on other operands.
    pub(super) fn map(self, mut f: impl FnMut(NodeId) -> NodeId) -> Self {
        match self {
            Self::Score
            | Self::Coordinate(_)
            | Self::Real(_)
            | Self::Integer(_)
            | Self::Truth(_)
            | Self::Parameter(..) => self,
            Self::Unary(op, x) => Self::Unary(op, f(x)),
            Self::Binary(op, x, y) => Self::Binary(op, f(x), f(y)),
            Self::Compare(op, x, y) => Self::Compare(op, f(x), f(y)),
            Self::Select(x, y, z) => Self::Select(f(x), f(y), f(z)),
            Self::Load {
                table,
                indices,
                clamped,
            } => Self::Load {
                table,
                indices: Indices::new(&indices.iter().map(|&index| f(index)).collect::<Vec<_>>()),
                clamped,
            },
        }
    }
}
