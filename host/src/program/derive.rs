//! The derivative of a program's score with respect to the incoming score and to the elements of tables.
//!
//! Derivatives are computed forward, from one input to the resulting score. They share common parts, because equal
//! operations are one node. Backward through a [`Node::Select`] the value not taken would be multiplied by 0, and 0
//! times infinity is NaN. Forward, a value not taken has no influence.

use super::{Binary, Comparison, Coordinate, Expression, Indices, Node, NodeId, Program, ProgramError, Type, Unary};

/// Derivatives of a program.
#[derive(Clone, Debug, PartialEq)]
pub struct Derivative {
    expression: Expression,
    score: NodeId,
    loads: Vec<LoadDerivative>,
}

/// The derivative of the score that comes out by an element of a table, as one node reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoadDerivative {
    /// The node that reads.
    pub load: NodeId,
    /// Node of the derivative.
    pub derivative: NodeId,
}

impl Derivative {
    /// Returns the program's operations, under their names in the program, followed by those of the derivatives.
    pub fn expression(&self) -> &Expression {
        &self.expression
    }

    /// Returns `dy / ds`. It is the literal 1.0, [`Node::Real`], if the program only adds to the score.
    pub fn score(&self) -> NodeId {
        self.score
    }

    /// Returns true if `dy / ds` is 1 everywhere.
    pub fn is_one(&self) -> bool {
        self.expression.node(self.score) == ONE
    }

    /// Returns the derivative for each read of a float table that the score depends on, in the program's order.
    /// Several may read one table.
    pub fn loads(&self) -> &[LoadDerivative] {
        &self.loads
    }
}

const ONE: Node = Node::Real(0x3f80_0000);
const ZERO: Node = Node::Real(0);

impl Program {
    /// Computes the derivatives of the score; those with respect to tables only if asked for.
    ///
    /// # Errors
    /// [`ProgramError::NotDifferentiable`] if a score, or a float table whose gradient is asked for, is rounded to a
    /// whole number.
    pub fn derivative(&self, of_tables: bool) -> Result<Derivative, ProgramError> {
        let mut expression = self.expression().clone();
        let score_in = expression.add(Node::Score);
        let mut by = |input| -> Result<Option<NodeId>, ProgramError> {
            Tangents {
                expression: &mut expression,
                input,
            }
            .of(self.score())
        };
        let score = by(score_in)?;
        let needed = self.expression().needed([self.score()]);
        let mut loads = Vec::new();
        for (load, node) in self
            .expression()
            .iter()
            .filter(|(id, _)| of_tables && needed[id.index()])
        {
            let is_float = self.expression().type_of(load) == Type::Score;
            if matches!(node, Node::Load { .. })
                && is_float
                && let Some(derivative) = by(load)?
            {
                loads.push(LoadDerivative { load, derivative });
            }
        }
        let score = score.unwrap_or_else(|| expression.add(ZERO));
        Ok(Derivative {
            expression,
            score,
            loads,
        })
    }
}

impl Program {
    /// Returns the name of a table, or of the sinks, to whose gradient several pairs of a problem add at one element; `None` if each
    /// element is the sum of at most one pair. `sizes` are those of the coordinates of a pair.
    pub(crate) fn shared_gradient(
        &self,
        derivative: &Derivative,
        sizes: [(Coordinate, usize); 4],
    ) -> Option<&'static str> {
        let tables = derivative
            .loads()
            .iter()
            .map(|load| match self.expression().node(load.load) {
                Node::Load { table, indices, .. } => (table, indices),
                other => unreachable!("{other:?} reads no table"),
            });
        let tables: Vec<(u32, Indices)> = tables.collect();
        let is_shared = |&(table, indices): &(u32, Indices)| {
            let reads = tables.iter().filter(|(other, _)| *other == table).count();
            let has = |which| {
                indices
                    .iter()
                    .any(|&index| self.expression().node(index) == Node::Coordinate(which))
            };
            reads > 1 || !sizes.iter().all(|&(which, size)| size <= 1 || has(which))
        };
        let shared = tables.iter().copied().find(is_shared);
        let name = shared.map(|(table, _)| self.tables()[table as usize].name);
        name.or_else(|| self.sinks().map(|sinks| sinks.name))
    }
}

/// Derivatives of nodes with respect to one input.
struct Tangents<'a> {
    expression: &'a mut Expression,
    input: NodeId,
}

impl Tangents<'_> {
    /// Returns the derivative of a node; `None` is 0.
    fn of(&mut self, root: NodeId) -> Result<Option<NodeId>, ProgramError> {
        let needed = self.expression.needed([root]);
        let mut tangents = vec![None; root.index() + 1];
        for id in self.expression.ids().filter(|id| needed[id.index()]) {
            tangents[id.index()] = if id == self.input {
                Some(self.expression.add(ONE))
            } else {
                self.of_node(id, &tangents)?
            };
        }
        Ok(tangents[root.index()])
    }

    fn of_node(&mut self, y: NodeId, known: &[Option<NodeId>]) -> Result<Option<NodeId>, ProgramError> {
        let of = |x: NodeId| known[x.index()];
        Ok(match self.expression.node(y) {
            Node::Unary(op, x) => match of(x) {
                Some(dx) => Some(self.of_unary(op, x, y, dx)?),
                None => None,
            },
            Node::Binary(op, a, b) => self.of_binary(op, [a, b], y, [of(a), of(b)]),
            Node::Select(condition, a, b) => self.select(condition, of(a), of(b)),
            _ => None,
        })
    }

    fn of_unary(&mut self, op: Unary, x: NodeId, y: NodeId, dx: NodeId) -> Result<NodeId, ProgramError> {
        Ok(match op {
            Unary::Negate => self.negate(dx),
            Unary::Abs => {
                let zero = self.expression.add(ZERO);
                let negative = self.expression.add(Node::Compare(Comparison::Less, x, zero));
                let minus = self.negate(dx);
                self.expression.add(Node::Select(negative, minus, dx))
            }
            Unary::Exp => self.multiply(dx, y),
            Unary::Log => self.binary(Binary::Divide, dx, x),
            Unary::Tanh => {
                let one = self.expression.add(ONE);
                let square = self.binary(Binary::Multiply, y, y);
                let slope = self.binary(Binary::Subtract, one, square);
                self.multiply(dx, slope)
            }
            Unary::Sqrt => {
                let half = self.expression.add(Node::Real(0.5_f32.to_bits()));
                let slope = self.binary(Binary::Divide, half, y);
                self.multiply(dx, slope)
            }
            Unary::Reciprocal => {
                let square = self.binary(Binary::Multiply, y, y);
                let minus = self.negate(square);
                self.multiply(dx, minus)
            }
            Unary::Floor => return Err(ProgramError::NotDifferentiable { operation: "floor" }),
            Unary::ToIndex => return Err(ProgramError::NotDifferentiable { operation: "to_index" }),
            Unary::ToScore | Unary::Not => unreachable!("an index has no derivative"),
        })
    }

    fn of_binary(
        &mut self,
        op: Binary,
        [a, b]: [NodeId; 2],
        y: NodeId,
        [da, db]: [Option<NodeId>; 2],
    ) -> Option<NodeId> {
        if da.is_none() && db.is_none() {
            return None;
        }
        match op {
            Binary::Add => self.sum(da, db),
            Binary::Subtract => match (da, db) {
                (Some(da), Some(db)) => Some(self.binary(Binary::Subtract, da, db)),
                (da, db) => da.or_else(|| db.map(|db| self.negate(db))),
            },
            Binary::Multiply => {
                let left = da.map(|da| self.multiply(da, b));
                let right = db.map(|db| self.multiply(db, a));
                self.sum(left, right)
            }
            Binary::Divide => {
                let above = da.map(|da| self.binary(Binary::Divide, da, b));
                let below = db.map(|db| {
                    let slope = self.binary(Binary::Divide, y, b);
                    let minus = self.negate(slope);
                    self.multiply(db, minus)
                });
                self.sum(above, below)
            }
            Binary::Min => {
                let first = self.expression.add(Node::Compare(Comparison::LessOrEqual, a, b));
                self.select(first, da, db)
            }
            Binary::Max => {
                let first = self.expression.add(Node::Compare(Comparison::LessOrEqual, b, a));
                self.select(first, da, db)
            }
            Binary::Remainder | Binary::And | Binary::Or | Binary::Xor | Binary::ShiftLeft | Binary::ShiftRight => {
                unreachable!("an index has no derivative")
            }
        }
    }

    fn binary(&mut self, op: Binary, a: NodeId, b: NodeId) -> NodeId {
        self.expression.add(Node::Binary(op, a, b))
    }

    fn negate(&mut self, x: NodeId) -> NodeId {
        self.expression.add(Node::Unary(Unary::Negate, x))
    }

    /// Multiplies a derivative by a value; a factor of 1 is left out.
    fn multiply(&mut self, derivative: NodeId, value: NodeId) -> NodeId {
        if self.expression.node(derivative) == ONE {
            return value;
        }
        self.binary(Binary::Multiply, derivative, value)
    }

    fn sum(&mut self, a: Option<NodeId>, b: Option<NodeId>) -> Option<NodeId> {
        match (a, b) {
            (Some(a), Some(b)) => Some(self.binary(Binary::Add, a, b)),
            (a, b) => a.or(b),
        }
    }

    fn select(&mut self, condition: NodeId, a: Option<NodeId>, b: Option<NodeId>) -> Option<NodeId> {
        if a == b {
            return a;
        }
        let zero = self.expression.add(ZERO);
        let node = Node::Select(condition, a.unwrap_or(zero), b.unwrap_or(zero));
        Some(self.expression.add(node))
    }
}
