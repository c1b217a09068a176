//! [`Expression`]: a program's operations as an acyclic graph without duplicates.
//!
//! Each node comes after its operands, so an evaluator is one loop over them. Two equal operations on equal operands
//! are one node. Numbers of the user are parameters, not contents of nodes: two expressions that differ only in such
//! numbers are equal, and so is the code made from them.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::BitOr;

use super::node::{Coordinate, Node, NodeId, Type, Unary};
use crate::element::DataType;

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

impl Coordinate {
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
    /// Number of axes, 1 to [`MAX_RANK`](super::MAX_RANK).
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
    use super::super::{Binary, Indices};
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
