//! Evaluation of programs on scalars in f64, for the oracle: slow, and by the definition.

use std::sync::Arc;

use super::{Binary, Comparison, Constant, Coordinate, Expression, Indices, Node, NodeId, Program, Unary};

/// Place of a pair, in the coordinates that programs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the coordinates of `At`")]
pub struct Pair {
    pub batch: i32,
    pub head: i32,
    pub kv_head: i32,
    pub query: i32,
    pub key: i32,
    pub seqlen_q: i32,
    pub seqlen_k: i32,
}

impl Pair {
    fn coordinate(&self, which: Coordinate) -> i32 {
        match which {
            Coordinate::Batch => self.batch,
            Coordinate::Head => self.head,
            Coordinate::KvHead => self.kv_head,
            Coordinate::Query => self.query,
            Coordinate::Key => self.key,
            Coordinate::SeqlenQ => self.seqlen_q,
            Coordinate::SeqlenK => self.seqlen_k,
        }
    }
}

/// A program with the contents of its tables in host memory.
#[derive(Clone, Debug)]
pub struct Evaluator {
    program: Arc<Program>,
    tables: Vec<HostTable>,
    sinks: Option<Vec<f64>>,
    /// Nodes that the score needs, and nodes that the mask needs.
    needed: [Vec<bool>; 2],
}

/// Content of a table.
#[derive(Clone, Debug)]
pub struct HostTable {
    /// Size along each axis.
    pub shape: Vec<usize>,
    /// Elements in row-major order. Integers are exact.
    pub values: Vec<f64>,
}

/// Value of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Value of a score.
    Score(f64),
    /// Value of an index.
    Index(i32),
    /// Value of a truth.
    Truth(bool),
}

impl Value {
    /// Returns the number of a score.
    ///
    /// # Panics
    /// If the value is not a score.
    pub fn score(self) -> f64 {
        match self {
            Self::Score(x) => x,
            other => unreachable!("a score is expected, this is {other:?}"),
        }
    }

    /// Returns the number of an index.
    ///
    /// # Panics
    /// If the value is not an index.
    pub fn index(self) -> i32 {
        match self {
            Self::Index(x) => x,
            other => unreachable!("an index is expected, this is {other:?}"),
        }
    }

    /// Returns a truth.
    ///
    /// # Panics
    /// If the value is not a truth.
    pub fn truth(self) -> bool {
        match self {
            Self::Truth(x) => x,
            other => unreachable!("a truth is expected, this is {other:?}"),
        }
    }
}

impl Evaluator {
    /// Combines a program with the contents of its tables, in the order of [`Program::tables`], and of its sinks.
    ///
    /// # Panics
    /// If there are more or fewer tables than the program reads.
    pub fn new(program: Arc<Program>, tables: Vec<HostTable>, sinks: Option<Vec<f64>>) -> Self {
        assert_eq!(program.tables().len(), tables.len(), "contents of each table");
        assert_eq!(program.sinks().is_some(), sinks.is_some(), "contents of the sinks");
        let expression = program.expression();
        let needed = [expression.needed([program.score()]), expression.needed(program.mask())];
        Self {
            program,
            tables,
            sinks,
            needed,
        }
    }

    /// Returns the program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Returns the learned logit of a query head, if there is one.
    pub fn sink(&self, head: usize) -> Option<f64> {
        self.sinks.as_ref().map(|sinks| sinks[head])
    }

    /// Contents of the tables.
    pub fn tables(&self) -> &[HostTable] {
        &self.tables
    }

    /// Returns true if a pair is visible by the program's mask.
    pub fn sees(&self, pair: &Pair) -> bool {
        let Some(mask) = self.program.mask() else { return true };
        self.run(self.program.expression(), &self.needed[1], pair, 0.0, |x| x)[mask.index()].truth()
    }

    /// Computes the program's score of a visible pair; each intermediate number passes through `round`.
    pub fn score(&self, pair: &Pair, score: f64, round: impl Fn(f64) -> f64) -> f64 {
        let values = self.run(self.program.expression(), &self.needed[0], pair, score, round);
        values[self.program.score().index()].score()
    }

    /// Evaluates the needed nodes of an expression; every score passes through `round`. The expression is that of the
    /// program or of its derivative. The values of other nodes have no meaning.
    ///
    /// # Panics
    /// If an index is outside of its table.
    pub fn run(
        &self,
        expression: &Expression,
        needed: &[bool],
        pair: &Pair,
        score: f64,
        round: impl Fn(f64) -> f64,
    ) -> Vec<Value> {
        let mut values: Vec<Value> = Vec::with_capacity(expression.nodes().len());
        for (id, node) in expression.iter() {
            let value = match needed[id.index()] {
                true => self.value(node, &values, pair, score),
                false => Value::Truth(false),
            };
            values.push(match value {
                Value::Score(x) => Value::Score(round(x)),
                other => other,
            });
        }
        values
    }

    fn value(&self, node: Node, values: &[Value], pair: &Pair, score: f64) -> Value {
        let of = |id: NodeId| values[id.index()];
        match node {
            Node::Score => Value::Score(score),
            Node::Coordinate(which) => Value::Index(pair.coordinate(which)),
            Node::Real(bits) => Value::Score(f32::from_bits(bits).into()),
            Node::Integer(x) => Value::Index(x),
            Node::Truth(x) => Value::Truth(x),
            Node::Parameter(slot, _) => match self.program.constants()[slot as usize] {
                Constant::Score(x) => Value::Score(x.into()),
                Constant::Index(x) => Value::Index(x),
            },
            Node::Unary(op, x) => unary(op, of(x)),
            Node::Binary(op, x, y) => match (of(x), of(y)) {
                (Value::Score(x), Value::Score(y)) => Value::Score(of_scores(op, x, y)),
                (Value::Index(x), Value::Index(y)) => Value::Index(of_indices(op, x, y)),
                (x, y) => Value::Truth(of_truths(op, x.truth(), y.truth())),
            },
            Node::Compare(op, x, y) => Value::Truth(match (of(x), of(y)) {
                (Value::Score(x), Value::Score(y)) => compare(op, x, y),
                (x, y) => compare(op, x.index(), y.index()),
            }),
            Node::Select(condition, x, y) => of(if of(condition).truth() { x } else { y }),
            Node::Load {
                table,
                indices,
                clamped,
            } => {
                let value = self.load(table as usize, indices, clamped, &of);
                match self.program.expression().tables()[table as usize].element.is_float() {
                    true => Value::Score(value),
                    false => Value::Index(value as i64 as i32),
                }
            }
        }
    }

    /// Returns the element of a table that a read with these indices takes.
    ///
    /// # Panics
    /// If an index is outside of the table.
    fn load(&self, table: usize, indices: Indices, clamped: bool, of: &impl Fn(NodeId) -> Value) -> f64 {
        let HostTable { shape, values } = &self.tables[table];
        values[offset(shape, indices, clamped, of)]
    }

    /// Returns the table and the element, in row-major order, that a read takes for a pair whose values
    /// [`run`](Self::run) computed.
    pub fn element(&self, node: Node, values: &[Value]) -> (usize, usize) {
        let Node::Load {
            table,
            indices,
            clamped,
        } = node
        else {
            unreachable!("only a read has an element")
        };
        let shape = &self.tables[table as usize].shape;
        let of = |id: NodeId| values[id.index()];
        (table as usize, offset(shape, indices, clamped, &of))
    }
}

fn offset(shape: &[usize], indices: Indices, clamped: bool, of: &impl Fn(NodeId) -> Value) -> usize {
    shape.iter().zip(indices.iter()).fold(0, |offset, (&size, &index)| {
        let index = of(index).index();
        let inside = i64::from(index).clamp(0, size as i64 - 1);
        assert!(
            clamped || inside == i64::from(index),
            "index {index} of an axis of {size}"
        );
        offset * size + inside as usize
    })
}

fn unary(op: Unary, x: Value) -> Value {
    match (op, x) {
        (Unary::Negate, Value::Index(x)) => Value::Index(x.wrapping_neg()),
        (Unary::Abs, Value::Index(x)) => Value::Index(x.wrapping_abs()),
        (Unary::ToScore, x) => Value::Score(x.index().into()),
        (Unary::Not, Value::Index(x)) => Value::Index(!x),
        (Unary::Not, x) => Value::Truth(!x.truth()),
        (Unary::Negate, x) => Value::Score(-x.score()),
        (Unary::Abs, x) => Value::Score(x.score().abs()),
        (Unary::Exp, x) => Value::Score(x.score().exp()),
        (Unary::Log, x) => Value::Score(x.score().ln()),
        (Unary::Tanh, x) => Value::Score(x.score().tanh()),
        (Unary::Sqrt, x) => Value::Score(x.score().sqrt()),
        (Unary::Reciprocal, x) => Value::Score(1.0 / x.score()),
        (Unary::Floor, x) => Value::Score(x.score().floor()),
        (Unary::ToIndex, x) => Value::Index(x.score().floor() as i32),
    }
}

fn of_scores(op: Binary, x: f64, y: f64) -> f64 {
    match op {
        Binary::Add => x + y,
        Binary::Subtract => x - y,
        Binary::Multiply => x * y,
        Binary::Divide => x / y,
        Binary::Min => x.min(y),
        Binary::Max => x.max(y),
        other => unreachable!("{other:?} of scores"),
    }
}

fn of_indices(op: Binary, x: i32, y: i32) -> i32 {
    match op {
        Binary::Add => x.wrapping_add(y),
        Binary::Subtract => x.wrapping_sub(y),
        Binary::Multiply => x.wrapping_mul(y),
        Binary::Divide => x.div_euclid(y),
        Binary::Remainder => x.rem_euclid(y),
        Binary::Min => x.min(y),
        Binary::Max => x.max(y),
        Binary::And => x & y,
        Binary::Or => x | y,
        Binary::Xor => x ^ y,
        Binary::ShiftLeft => x.wrapping_shl(y as u32),
        Binary::ShiftRight => x.wrapping_shr(y as u32),
    }
}

fn of_truths(op: Binary, x: bool, y: bool) -> bool {
    match op {
        Binary::And => x & y,
        Binary::Or => x | y,
        Binary::Xor => x ^ y,
        other => unreachable!("{other:?} of truths"),
    }
}

fn compare<T: PartialOrd>(op: Comparison, x: T, y: T) -> bool {
    match op {
        Comparison::Less => x < y,
        Comparison::LessOrEqual => x <= y,
        Comparison::Equal => x == y,
    }
}
