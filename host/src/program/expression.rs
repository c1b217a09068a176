//! [`Expression`]: a program's operations as an acyclic graph without duplicates.
//!
//! Each node comes after its operands, so an evaluator is one loop over them. Two equal operations on equal operands
//! are one node. Numbers of the user are parameters, not contents of nodes: two expressions that differ only in such
//! numbers are equal, and so is the code made from them.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::{BitOr, Deref};

use crate::element::DataType;

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
pub struct NodeId(u32);

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

    /// Returns the set of coordinates that it depends on.
    fn dependence(self) -> Dependence {
        match self {
            Self::Batch | Self::SeqlenQ | Self::SeqlenK => Dependence::BATCH,
            Self::Head | Self::KvHead => Dependence::HEAD,
            Self::Query => Dependence::QUERY,
            Self::Key => Dependence::KEY,
        }
    }
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

/// Set of the coordinates that a value depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dependence(u8);

impl Dependence {
    /// No dependence: one value for all pairs of a call.
    pub const NONE: Self = Self(0);
    /// Depends on the sequence, including its lengths.
    pub const BATCH: Self = Self(1);
    /// Depends on the head.
    pub const HEAD: Self = Self(2);
    /// Depends on the query.
    pub const QUERY: Self = Self(4);
    /// Depends on the key.
    pub const KEY: Self = Self(8);
    /// Depends on the incoming score.
    pub const SCORE: Self = Self(16);

    /// Returns true if this set includes all of `other`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns true if `other` includes all of this set.
    pub const fn within(self, other: Self) -> bool {
        other.contains(self)
    }
}

impl BitOr for Dependence {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Returns the type of a table's elements in a program: floats are scores, i32 is an index, and u32 the index with
/// these bits.
pub const fn read_as(element: DataType) -> Type {
    if element.is_float() { Type::Score } else { Type::Index }
}

/// Type of a table in operations. Its address, sizes and strides belong to the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableType {
    /// Element type.
    pub element: DataType,
    /// Number of axes, 1 to [`MAX_RANK`].
    pub rank: usize,
}

/// Operations in an order in which each comes after its operands, each once.
#[derive(Clone, Default)]
pub struct Expression {
    nodes: Vec<Node>,
    types: Vec<Type>,
    dependences: Vec<Dependence>,
    tables: Vec<TableType>,
    places: HashMap<Node, NodeId>,
}

impl Expression {
    /// Returns the operations in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Iterates over the operations in order, with their names.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, Node)> + '_ {
        (0..).map(NodeId).zip(self.nodes.iter().copied())
    }

    /// Iterates over the names of the current nodes, in order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// Returns the operation of a node.
    pub fn node(&self, id: NodeId) -> Node {
        self.nodes[id.index()]
    }

    /// Returns the type of a node's value.
    pub fn type_of(&self, id: NodeId) -> Type {
        self.types[id.index()]
    }

    /// Returns the coordinates that a node's value depends on.
    pub fn dependence(&self, id: NodeId) -> Dependence {
        self.dependences[id.index()]
    }

    /// Returns the tables that are read.
    pub fn tables(&self) -> &[TableType] {
        &self.tables
    }

    /// Returns for each node if one of `roots` needs its value.
    pub fn needed(&self, roots: impl IntoIterator<Item = NodeId>) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        for root in roots {
            needed[root.index()] = true;
        }
        for place in (0..self.nodes.len()).rev() {
            if needed[place] {
                for operand in self.nodes[place].operands() {
                    needed[operand.index()] = true;
                }
            }
        }
        needed
    }

    /// Returns how many of the operations that `roots` need take each node's value, plus 1 for each time it is a root.
    pub(super) fn uses(&self, roots: impl IntoIterator<Item = NodeId>) -> Vec<u32> {
        let roots: Vec<NodeId> = roots.into_iter().collect();
        let needed = self.needed(roots.iter().copied());
        let nodes = self.iter().filter(|(id, _)| needed[id.index()]);
        let operands = nodes.flat_map(|(_, node)| node.operands());
        let mut uses = vec![0; self.nodes.len()];
        for taken in operands.chain(roots) {
            uses[taken.index()] += 1;
        }
        uses
    }

    /// Adds a table and returns its place.
    pub(super) fn add_table(&mut self, table: TableType) -> u32 {
        self.tables.push(table);
        self.tables.len() as u32 - 1
    }

    /// Returns the node of an operation, which is added if it does not exist. The operands are nodes of this
    /// expression, with the types that the operation takes.
    pub(super) fn add(&mut self, node: Node) -> NodeId {
        if let Some(&id) = self.places.get(&node) {
            return id;
        }
        let of_operands = node
            .operands()
            .map(|operand| self.dependence(operand))
            .fold(Dependence::NONE, BitOr::bitor);
        let own = match node {
            Node::Score => Dependence::SCORE,
            Node::Coordinate(coordinate) => coordinate.dependence(),
            _ => Dependence::NONE,
        };
        let id = NodeId(self.nodes.len() as u32);
        self.types.push(self.type_of_new(&node));
        self.dependences.push(own | of_operands);
        self.nodes.push(node);
        self.places.insert(node, id);
        id
    }

    fn type_of_new(&self, node: &Node) -> Type {
        match *node {
            Node::Score | Node::Real(_) => Type::Score,
            Node::Coordinate(_) | Node::Integer(_) => Type::Index,
            Node::Truth(_) | Node::Compare(..) => Type::Truth,
            Node::Parameter(_, type_) => type_,
            Node::Unary(Unary::ToScore, _) => Type::Score,
            Node::Unary(Unary::ToIndex, _) => Type::Index,
            Node::Unary(_, x) | Node::Binary(_, x, _) | Node::Select(_, x, _) => self.type_of(x),
            Node::Load { table, .. } => read_as(self.tables[table as usize].element),
        }
    }
}

/// Compares operations, their order and the types of tables.
impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.nodes == other.nodes && self.tables == other.tables
    }
}

impl Eq for Expression {}

/// The operations in order.
impl std::fmt::Debug for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.nodes).finish()
    }
}

impl Hash for Expression {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.nodes.hash(state);
        self.tables.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_operations_are_one_node_and_operands_come_first() {
        let mut expression = Expression::default();
        let score = expression.add(Node::Score);
        let key = expression.add(Node::Coordinate(Coordinate::Key));
        let query = expression.add(Node::Coordinate(Coordinate::Query));
        let distance = expression.add(Node::Binary(Binary::Subtract, key, query));
        let real = expression.add(Node::Unary(Unary::ToScore, distance));
        let sum = expression.add(Node::Binary(Binary::Add, score, real));
        assert_eq!(expression.add(Node::Binary(Binary::Subtract, key, query)), distance);
        assert_ne!(expression.add(Node::Binary(Binary::Subtract, query, key)), distance);
        for (id, node) in expression.iter() {
            assert!(node.operands().all(|operand| operand < id));
        }
        let types = [score, distance, real, sum].map(|id| expression.type_of(id));
        assert_eq!(types, [Type::Score, Type::Index, Type::Score, Type::Score]);
        assert_eq!(expression.dependence(distance), Dependence::QUERY | Dependence::KEY);
        assert!(expression.dependence(sum).contains(Dependence::SCORE));
        assert_eq!(
            expression.needed([distance]),
            [false, true, true, true, false, false, false]
        );
    }

    #[test]
    fn expressions_that_differ_in_a_number_only_are_equal() {
        let with = |slot| {
            let mut expression = Expression::default();
            let score = expression.add(Node::Score);
            let cap = expression.add(Node::Parameter(slot, Type::Score));
            expression.add(Node::Binary(Binary::Multiply, score, cap));
            expression
        };
        assert_eq!(with(0), with(0));
        assert_ne!(with(0), with(1));
    }

    #[test]
    fn a_read_has_the_type_of_its_table_and_depends_on_its_indices() {
        let mut expression = Expression::default();
        let batch = expression.add(Node::Coordinate(Coordinate::Batch));
        let key = expression.add(Node::Coordinate(Coordinate::Key));
        for (element, type_) in [(DataType::Bf16, Type::Score), (DataType::U32, Type::Index)] {
            let table = expression.add_table(TableType { element, rank: 2 });
            let indices = Indices::new(&[batch, key]);
            let load = expression.add(Node::Load {
                table,
                indices,
                clamped: false,
            });
            assert_eq!(expression.type_of(load), type_);
            assert_eq!(expression.dependence(load), Dependence::BATCH | Dependence::KEY);
        }
    }
}
