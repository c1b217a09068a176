//! [`Code`], the part of a program that decides its text, and [`Slot`]s, the numbers that the text reads.
//!
//! Two calls of equal code run one module, whatever numbers, tables and lengths they have. The host computes the number of each
//! slot for a call from its [`Numbers`].

use std::sync::Arc;

use super::dropout::WEYL;
use super::{
    Dropout, Evaluator, Expression, HostTable, LoadDerivative, NodeId, Pair, Program, ProgramError, TableSource, Value,
};
use crate::layout::contiguous_strides;

/// Part of a program that decides the text of a kernel that runs it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Code {
    pub(super) expression: Expression,
    /// The score that the softmax takes; `None` leaves products as they come, without their scale.
    pub(super) score: Option<NodeId>,
    pub(super) mask: Option<NodeId>,
    /// Layout of each table's axes.
    pub(super) axes: Vec<Vec<Axis>>,
    pub(super) sinks: bool,
    pub(super) dropout: bool,
    /// True if each sequence has lengths of its own.
    pub(super) of_sequences: bool,
    /// In backward, the derivative of the score by the one that comes in.
    pub(super) derivative: Option<NodeId>,
    /// The reads of tables whose gradients are asked for, with the derivatives by them.
    pub(super) loads: Vec<LoadDerivative>,
    /// Layout of the axes of each table's gradient.
    pub(super) gradient_axes: Vec<Vec<Axis>>,
    /// True if the gradient of the sinks is asked for.
    pub(super) sinks_gradient: bool,
}

/// Layout of a table's axis in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// One entry, or the same for each index.
    Repeated,
    /// One element after the other.
    Adjacent,
    /// An index's offset fits 32 bits.
    Near,
    /// It does not.
    Far,
}

impl Code {
    /// The code of a program. Scores keep the scale of products, which is cheaper, where the program only hides them and the
    /// largest product is the largest score.
    pub fn new(program: &Program, softmax_scale: f32) -> Self {
        let raw = program.keeps_score() && softmax_scale > 0.0;
        let axes = (program.tables().iter()).map(|table| axes(&table.shape, &table.strides, table.element.bytes()));
        Self {
            expression: program.expression().clone(),
            score: (!raw).then(|| program.score()),
            mask: program.mask(),
            axes: axes.collect(),
            sinks: program.sinks().is_some(),
            dropout: program.dropout().is_some(),
            of_sequences: false,
            derivative: None,
            loads: Vec::new(),
            gradient_axes: Vec::new(),
            sinks_gradient: false,
        }
    }

    /// The code of a program in backward, with gradients of its tables if they are asked for.
    ///
    /// # Errors
    /// [`ProgramError::NotDifferentiable`].
    pub fn backward(program: &Program, softmax_scale: f32, table_gradients: bool) -> Result<Self, ProgramError> {
        let derivative = program.derivative(table_gradients)?;
        let gradient = |table: &TableSource| axes(&table.shape, &contiguous_strides(&table.shape), size_of::<f32>());
        Ok(Self {
            expression: derivative.expression().clone(),
            derivative: Some(derivative.score()),
            loads: derivative.loads().to_vec(),
            gradient_axes: program.tables().iter().map(gradient).collect(),
            sinks_gradient: table_gradients && program.sinks().is_some(),
            ..Self::new(program, softmax_scale)
        })
    }

    /// The operations of the program, and in backward those of its derivatives.
    pub fn expression(&self) -> &Expression {
        &self.expression
    }

    /// The code for a batch of sequences in one launch. Lengths come with the head, and dropout draws with a seed that is larger by
    /// the number of the sequence, in batch entry 0, as in a call with that sequence alone.
    #[must_use]
    pub fn of_sequences(self) -> Self {
        Self {
            of_sequences: true,
            ..self
        }
    }

    /// Factor of products in the exponent to base 2 after the code ran.
    pub fn scale_log2(&self, softmax_scale: f32) -> f32 {
        match self.score {
            None => (f64::from(softmax_scale) * std::f64::consts::LOG2_E) as f32,
            Some(_) => std::f32::consts::LOG2_E,
        }
    }
}

/// Returns the layout of a table's axes.
fn axes(shape: &[usize], strides: &[usize], bytes: usize) -> Vec<Axis> {
    let axis = |(&size, &stride): (&usize, &usize)| match (size as u64 - 1).checked_mul((stride * bytes) as u64) {
        Some(0) => Axis::Repeated,
        Some(_) if stride == 1 => Axis::Adjacent,
        Some(last) if last < 1 << 32 => Axis::Near,
        _ => Axis::Far,
    };
    shape.iter().zip(strides).map(axis).collect()
}

/// Memory that belongs to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Memory {
    /// Elements of the table.
    Elements,
    /// Gradient of the elements, f32 and contiguous.
    Gradient,
}

/// A factor of a product that is the same for every pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factor {
    /// A value.
    Value(NodeId),
    /// One over it.
    Inverse(NodeId),
    /// Minus one.
    Minus,
}

impl Factor {
    fn node(self) -> Option<NodeId> {
        match self {
            Self::Value(node) | Self::Inverse(node) => Some(node),
            Self::Minus => None,
        }
    }

    fn value(self, values: &[Value]) -> f64 {
        match self {
            Self::Value(node) => values[node.index()].score(),
            Self::Inverse(node) => 1.0 / values[node.index()].score(),
            Self::Minus => -1.0,
        }
    }
}

/// A number that the text reads: 4 or 8 bytes at the start of 8.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// A value that is the same for every pair, 32 bits; a truth is 1 or 0.
    Value(NodeId),
    /// A product of such values.
    Product(Vec<Factor>),
    /// softmax_scale times such a product.
    Scale(Vec<Factor>),
    /// One over softmax_scale.
    InverseScale,
    /// Query heads that share one key/value head.
    HeadsPerKv,
    /// Queries.
    SeqlenQ,
    /// Address of a table, or of its gradient, 64 bits.
    Address(u32, Memory),
    /// The last index of an axis.
    LastIndex(u32, u32),
    /// Bytes from one index of an axis to the next, 64 bits.
    Stride(u32, u32, Memory),
    /// Address of the sinks, 64 bits.
    SinksAddress,
    /// Bytes from one sink to the next.
    SinksStride,
    /// Address of the sinks' gradient, 64 bits.
    SinksGradient,
    /// Random words below it drop their weight.
    DropThreshold,
    /// Factor of weights that are not dropped.
    KeepScale,
    /// A word of the generator's key in a round: the round, and 0 or 1.
    RoundKey(u32, u32),
}

/// Addresses of the gradients of tables, 0 where there is none.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<'a> {
    /// Addresses for the tables, in their order.
    pub tables: &'a [u64],
    /// Address for the sinks.
    pub sinks: u64,
}

/// Values of a call from which the numbers of slots are computed.
#[derive(Clone, Debug)]
pub struct Numbers {
    /// The program.
    pub program: Arc<Program>,
    /// The scale of products.
    pub softmax_scale: f32,
    /// Queries.
    pub seqlen_q: u32,
    /// Keys.
    pub seqlen_k: u32,
    /// Query heads that share one key/value head.
    pub heads_q_per_kv: u32,
}

impl Numbers {
    /// The bytes of a kernel's second parameter, which `code` was spliced into.
    pub fn bytes(&self, code: &Code, slots: &[Slot], gradients: Gradients<'_>) -> Vec<u8> {
        let values = self.values(&code.expression, slots);
        let number = |slot| self.number(slot, &values, gradients);
        slots.iter().flat_map(|slot| number(slot).to_le_bytes()).collect()
    }

    /// Values of the nodes that slots are made of, which are the same for every pair; of the others, anything.
    fn values(&self, expression: &Expression, slots: &[Slot]) -> Vec<Value> {
        let nodes = slots.iter().flat_map(|slot| match slot {
            Slot::Value(node) => vec![*node],
            Slot::Product(factors) | Slot::Scale(factors) => {
                factors.iter().filter_map(|factor| factor.node()).collect()
            }
            _ => Vec::new(),
        });
        let needed = expression.needed(nodes);
        // Nothing is read of tables: what is read of them is worked out by the kernel.
        let empty = HostTable {
            shape: Vec::new(),
            values: Vec::new(),
        };
        let tables = vec![empty; self.program.tables().len()];
        let sinks = self.program.sinks().map(|_| Vec::new());
        let any_pair = Pair {
            batch: 0,
            head: 0,
            kv_head: 0,
            query: 0,
            key: 0,
            seqlen_q: self.seqlen_q as i32,
            seqlen_k: self.seqlen_k as i32,
        };
        let evaluator = Evaluator::new(self.program.clone(), tables, sinks);
        evaluator.run(expression, &needed, &any_pair, 0.0, |x| f64::from(x as f32))
    }

    fn dropout(&self) -> Option<Dropout> {
        self.program.dropout()
    }

    fn number(&self, slot: &Slot, values: &[Value], gradients: Gradients<'_>) -> u64 {
        let float = |x: f64| u64::from((x as f32).to_bits());
        let table = |table: u32| &self.program.tables()[table as usize];
        let product = |factors: &[Factor]| factors.iter().map(|factor| factor.value(values)).product::<f64>();
        match *slot {
            Slot::Value(node) => match values[node.index()] {
                Value::Score(x) => float(x),
                Value::Index(x) => u64::from(x as u32),
                Value::Truth(x) => x.into(),
            },
            Slot::Product(ref factors) => float(product(factors)),
            Slot::Scale(ref factors) => float(f64::from(self.softmax_scale) * product(factors)),
            Slot::InverseScale => float(1.0 / f64::from(self.softmax_scale)),
            Slot::HeadsPerKv => self.heads_q_per_kv.into(),
            Slot::SeqlenQ => self.seqlen_q.into(),
            Slot::Address(index, Memory::Elements) => table(index).address,
            Slot::Address(index, Memory::Gradient) => gradients.tables[index as usize],
            Slot::LastIndex(index, axis) => table(index).shape[axis as usize] as u64 - 1,
            Slot::Stride(index, axis, Memory::Elements) => {
                (table(index).strides[axis as usize] * table(index).element.bytes()) as u64
            }
            Slot::Stride(index, axis, Memory::Gradient) => {
                (contiguous_strides(&table(index).shape)[axis as usize] * size_of::<f32>()) as u64
            }
            Slot::SinksGradient => gradients.sinks,
            Slot::SinksAddress => self.program.sinks().map_or(0, |sinks| sinks.address),
            Slot::DropThreshold => self.dropout().map_or(0, |dropout| dropout.threshold().into()),
            Slot::KeepScale => float(self.dropout().map_or(1.0, |dropout| dropout.factor().into())),
            Slot::RoundKey(round, word) => {
                let key = self.dropout().map_or([0; 2], |dropout| dropout.key())[word as usize];
                key.wrapping_add(round.wrapping_mul(WEYL[word as usize])).into()
            }
            Slot::SinksStride => self
                .program
                .sinks()
                .map_or(0, |sinks| (sinks.strides[0] * size_of::<f32>()) as u64),
        }
    }
}
