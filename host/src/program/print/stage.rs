//! [`Stage`], where a value is worked out, and [`Affine`], how it grows with the column.

use crate::program::{Binary, Coordinate, Node, NodeId, Type, Unary};

/// Frequency with which a value is computed, rarest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// By the host.
    Call,
    /// Once a head.
    Head,
    /// Once a row of a tile.
    Row,
    /// Once a column.
    Column,
    /// Once a pair.
    Pair,
}

impl Stage {
    /// Returns the stage of a value that needs values of both.
    fn with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Row, Self::Column) | (Self::Column, Self::Row) => Self::Pair,
            _ => self.max(other),
        }
    }
}

/// A value that grows with the column by `step * by`, `by` a value that no column changes, or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Affine {
    /// Growth from one column to the next, in units of `by`.
    pub step: i32,
    /// The unit; `None` is 1.
    pub by: Option<NodeId>,
}

const QUERY: Node = Node::Coordinate(Coordinate::Query);

/// Returns the stage of a node, from the stages of the nodes before it.
pub(super) fn stage_of(node: Node, stages: &[Stage], transposed: bool, of_sequences: bool) -> Stage {
    let operands = node
        .operands()
        .map(|operand| stages[operand.index()])
        .fold(Stage::Call, Stage::with);
    match node {
        Node::Score => Stage::Pair,
        Node::Coordinate(Coordinate::SeqlenQ | Coordinate::SeqlenK) if !of_sequences => Stage::Call,
        Node::Coordinate(Coordinate::Query | Coordinate::Key) if (node == QUERY) != transposed => Stage::Row,
        Node::Coordinate(Coordinate::Query | Coordinate::Key) => Stage::Column,
        Node::Coordinate(_) => Stage::Head,
        Node::Load { .. } => operands.with(Stage::Head),
        _ => operands,
    }
}

/// Returns the growth of a node with the column, if it is even.
pub(super) fn affine_of(
    node: Node,
    type_: Type,
    stages: &[Stage],
    affine: &[Option<Affine>],
    transposed: bool,
) -> Option<Affine> {
    const STILL: Affine = Affine { step: 0, by: None };
    let of = |id: NodeId| affine[id.index()];
    if stages.last().is_some_and(|&stage| stage <= Stage::Row) {
        return Some(STILL);
    }
    match node {
        Node::Coordinate(which) if (which == Coordinate::Key) != transposed => Some(Affine { step: 1, by: None }),
        Node::Unary(Unary::ToScore, x) => of(x),
        Node::Unary(Unary::Negate, x) => of(x).map(|affine| Affine {
            step: affine.step.wrapping_neg(),
            ..affine
        }),
        Node::Binary(operation @ (Binary::Add | Binary::Subtract), x, y) => {
            let (x, y) = (of(x)?, of(y)?);
            let y = Affine {
                step: if operation == Binary::Add {
                    y.step
                } else {
                    y.step.wrapping_neg()
                },
                ..y
            };
            match (x.step, y.step) {
                (_, 0) => Some(x),
                (0, _) => Some(y),
                _ if type_ == Type::Index => Some(Affine {
                    step: x.step.wrapping_add(y.step),
                    by: None,
                }),
                _ => None,
            }
        }
        Node::Binary(Binary::Multiply, x, y) if type_ == Type::Score => match (of(x)?, of(y)?) {
            (x, Affine { step: 0, .. }) if x.by.is_none() => Some(Affine { by: Some(y), ..x }),
            (Affine { step: 0, .. }, affine) if affine.by.is_none() => Some(Affine { by: Some(x), ..affine }),
            _ => None,
        },
        _ => None,
    }
}
