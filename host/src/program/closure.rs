//! Closures over [`Score`], [`Index`] and [`Truth`], which run once and are recorded.
//!
//! A value is a node of the graph being recorded. Its lifetime belongs to that graph alone, so a value that is kept
//! for another closure, or mixed with the values of another one, does not compile:
//!
//! ```compile_fail
//! # use flash_attention::Attention;
//! let mut kept = None;
//! let attention = Attention::new().score(|s, _| { kept = Some(s); s }); // outlives its closure: does not compile
//! ```
//!
//! Numbers combined with values become parameters. Rust's `<` and `==` return a `bool`, so comparisons are methods.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use super::compose::Fragment;
use super::table::TableSource;
use super::{Binary, Comparison, Constant, Coordinate, Indices, Node, NodeId, ProgramError, Type, Unary};
use crate::element::Scalar;

/// A score in a recorded closure; f32 on devices.
#[derive(Clone, Copy)]
pub struct Score<'g>(Traced<'g>);

/// A coordinate, or a number computed from coordinates: i32 with wrapping arithmetic.
#[derive(Clone, Copy)]
pub struct Index<'g>(Traced<'g>);

/// A condition. The result of a mask is true for visible pairs.
#[derive(Clone, Copy)]
pub struct Truth<'g>(Traced<'g>);

/// Coordinates of the pair that a closure is asked about. Positions count from the first query and key of their own sequence.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct At<'g> {
    /// Index of the sequence in its batch.
    pub batch: Index<'g>,
    /// Index of the query head.
    pub head: Index<'g>,
    /// Index of the key/value head, `head / (heads_q / heads_kv)`.
    pub kv_head: Index<'g>,
    /// Index of the query.
    pub query: Index<'g>,
    /// Index of the key.
    pub key: Index<'g>,
    /// Number of queries of the sequence.
    pub seqlen_q: Index<'g>,
    /// Number of keys of the sequence.
    pub seqlen_k: Index<'g>,
}

impl<'g> At<'g> {
    /// Returns the query's position among the keys, where the last query is at the last key: `query + seqlen_k -
    /// seqlen_q`.
    pub fn position(&self) -> Index<'g> {
        self.query + (self.seqlen_k - self.seqlen_q)
    }

    /// Returns the number of keys from this key to the query's [`position`](Self::position); negative for keys after
    /// it (bottom-right alignment).
    pub fn distance(&self) -> Index<'g> {
        self.position() - self.key
    }

    /// 0, which is no parameter: the index of an axis that has one entry.
    pub(crate) fn first(&self) -> Index<'g> {
        Index(Traced::new(self.batch.0.graph, Node::Integer(0)))
    }

    /// A number as an index, a parameter: for reads of tables.
    pub fn constant(&self, number: i32) -> Index<'g> {
        Index(number.trace(self.batch.0.graph))
    }

    /// Returns `query - key`: the distance with the first query at the first key (top-left alignment).
    pub fn distance_top_left(&self) -> Index<'g> {
        self.query - self.key
    }
}

/// A node of a graph being recorded. The lifetime is invariant: values of two graphs have different types.
#[derive(Clone, Copy)]
pub struct Traced<'g> {
    graph: &'g RefCell<Fragment>,
    node: NodeId,
    of_one_graph: PhantomData<fn(&'g ()) -> &'g ()>,
}

impl<'g> Traced<'g> {
    fn new(graph: &'g RefCell<Fragment>, node: Node) -> Self {
        Self {
            graph,
            node: graph.borrow_mut().add(node),
            of_one_graph: PhantomData,
        }
    }

    fn unary(self, op: Unary) -> Self {
        Self::new(self.graph, Node::Unary(op, self.node))
    }

    fn binary(self, op: Binary, other: Self) -> Self {
        Self::new(self.graph, Node::Binary(op, self.node, other.node))
    }

    fn load(source: &TableSource, indices: &[Index<'g>], clamped: bool) -> Self {
        let graph = indices[0].0.graph;
        let table = graph.borrow_mut().table(source);
        let indices = Indices::new(&indices.iter().map(|index| index.0.node).collect::<Vec<_>>());
        Self::new(
            graph,
            Node::Load {
                table,
                indices,
                clamped,
            },
        )
    }

    fn compare(self, op: Comparison, other: Self) -> Truth<'g> {
        Truth(Self::new(self.graph, Node::Compare(op, self.node, other.node)))
    }
}

impl Fragment {
    /// Traces a closure that changes a score.
    pub(crate) fn score(f: impl for<'g> FnOnce(Score<'g>, At<'g>) -> Score<'g>) -> Self {
        let graph = RefCell::default();
        let root = f(Score(Traced::new(&graph, Node::Score)), at(&graph)).0.node;
        graph.into_inner().finish(root)
    }

    /// Traces a closure that says if a pair is visible.
    pub(crate) fn mask(f: impl for<'g> FnOnce(At<'g>) -> Truth<'g>) -> Self {
        let graph = RefCell::default();
        let root = f(at(&graph)).0.node;
        graph.into_inner().finish(root)
    }
}

fn at(graph: &RefCell<Fragment>) -> At<'_> {
    let coordinate = |which| Index(Traced::new(graph, Node::Coordinate(which)));
    At {
        batch: coordinate(Coordinate::Batch),
        head: coordinate(Coordinate::Head),
        kv_head: coordinate(Coordinate::KvHead),
        query: coordinate(Coordinate::Query),
        key: coordinate(Coordinate::Key),
        seqlen_q: coordinate(Coordinate::SeqlenQ),
        seqlen_k: coordinate(Coordinate::SeqlenK),
    }
}

/// Elements of tables, and what they are read as: f32, f16 and bf16 as [`Score`]s, i32 and u32 as [`Index`]es.
pub trait Readable: Scalar {
    /// Type of the value that an element is read as.
    type Value<'g>;

    #[doc(hidden)]
    fn read<'g>(source: &TableSource, indices: &[Index<'g>], clamped: bool) -> Self::Value<'g>;
}

mod sealed {
    use super::*;

    /// A value, or a number that becomes a value of a graph.
    pub trait Traceable<'g>: Copy {
        /// The value's type.
        type Value: Wrapped<'g>;
        /// Node of the value.
        fn trace(self, graph: &'g RefCell<Fragment>) -> Traced<'g>;
    }

    /// Types of values.
    pub trait Wrapped<'g>: Sized {
        /// Makes the value of a node; an index is converted where a score is needed.
        fn wrap(traced: Traced<'g>) -> Self;
    }
}

use sealed::{Traceable, Wrapped};

/// Operand that stands for a value of a graph: [`Score`], [`Index`] or [`Truth`] itself, or a number (f32 for a score, i32 for an
/// index), which becomes a parameter.
pub trait Operand<'g>: Traceable<'g> {}

impl<'g, T: Traceable<'g>> Operand<'g> for T {}

impl<'g> Wrapped<'g> for Score<'g> {
    fn wrap(traced: Traced<'g>) -> Self {
        match traced.graph.borrow().type_of(traced.node) {
            Type::Score => return Self(traced),
            Type::Index | Type::Truth => {}
        }
        Self(traced.unary(Unary::ToScore))
    }
}

impl<'g> Wrapped<'g> for Index<'g> {
    fn wrap(traced: Traced<'g>) -> Self {
        Self(traced)
    }
}

impl<'g> Wrapped<'g> for Truth<'g> {
    fn wrap(traced: Traced<'g>) -> Self {
        Self(traced)
    }
}

impl<'g> Traceable<'g> for Score<'g> {
    type Value = Self;

    fn trace(self, _graph: &'g RefCell<Fragment>) -> Traced<'g> {
        self.0
    }
}

impl<'g> Traceable<'g> for Index<'g> {
    type Value = Self;

    fn trace(self, _graph: &'g RefCell<Fragment>) -> Traced<'g> {
        self.0
    }
}

impl<'g> Traceable<'g> for Truth<'g> {
    type Value = Self;

    fn trace(self, _graph: &'g RefCell<Fragment>) -> Traced<'g> {
        self.0
    }
}

impl<'g> Traceable<'g> for f32 {
    type Value = Score<'g>;

    fn trace(self, graph: &'g RefCell<Fragment>) -> Traced<'g> {
        let slot = graph.borrow_mut().parameter(Constant::Score(self));
        Traced::new(graph, Node::Parameter(slot, Type::Score))
    }
}

impl<'g> Traceable<'g> for i32 {
    type Value = Index<'g>;

    fn trace(self, graph: &'g RefCell<Fragment>) -> Traced<'g> {
        let slot = graph.borrow_mut().parameter(Constant::Index(self));
        Traced::new(graph, Node::Parameter(slot, Type::Index))
    }
}

impl<'g> Traceable<'g> for bool {
    type Value = Truth<'g>;

    fn trace(self, graph: &'g RefCell<Fragment>) -> Traced<'g> {
        Traced::new(graph, Node::Truth(self))
    }
}

/// Implements operators of two values of one type, and of a value and a number.
macro_rules! operators {
    ($($value:ident: $($trait:ident $method:ident $op:ident),*; also with $other:ty;)*) => {$($(
        impl<'g> $trait for $value<'g> {
            type Output = $value<'g>;

            fn $method(self, other: Self) -> $value<'g> {
                $value(self.0.binary(Binary::$op, other.0))
            }
        }
    )* operators! { $value, $other: $($trait $method $op),* })*};
    ($value:ident, $other:ty: $($trait:ident $method:ident $op:ident),*) => {$(
        impl<'g> $trait<$other> for $value<'g> {
            type Output = $value<'g>;

            fn $method(self, other: $other) -> $value<'g> {
                self.$method($value::wrap(other.trace(self.0.graph)))
            }
        }

        impl<'g> $trait<$value<'g>> for $other {
            type Output = $value<'g>;

            fn $method(self, other: $value<'g>) -> $value<'g> {
                $value::wrap(self.trace(other.0.graph)).$method(other)
            }
        }
    )*};
}

operators! {
    Score: Add add Add, Sub sub Subtract, Mul mul Multiply, Div div Divide; also with f32;
    Index: Add add Add, Sub sub Subtract, Mul mul Multiply, BitAnd bitand And, BitOr bitor Or, BitXor bitxor Xor,
        Shl shl ShiftLeft, Shr shr ShiftRight; also with i32;
    Truth: BitAnd bitand And, BitOr bitor Or, BitXor bitxor Xor; also with bool;
}
operators! { Score, Index<'g>: Add add Add, Sub sub Subtract, Mul mul Multiply, Div div Divide }

/// Implements operators of an index and an f32, which give a score.
macro_rules! mixed {
    ($($trait:ident $method:ident),*) => {$(
        impl<'g> $trait<f32> for Index<'g> {
            type Output = Score<'g>;

            fn $method(self, other: f32) -> Score<'g> {
                self.to_score().$method(other)
            }
        }

        impl<'g> $trait<Index<'g>> for f32 {
            type Output = Score<'g>;

            fn $method(self, other: Index<'g>) -> Score<'g> {
                self.$method(other.to_score())
            }
        }
    )*};
}

mixed! { Add add, Sub sub, Mul mul, Div div }

/// Divides and rounds down. The divisor must be positive, otherwise the program is invalid.
impl<'g> Div<i32> for Index<'g> {
    type Output = Self;

    fn div(self, divisor: i32) -> Self {
        self.divided(Binary::Divide, divisor)
    }
}

/// Returns the remainder in `0 .. divisor`, also for a negative index. The divisor must be positive, otherwise the
/// program is invalid.
impl<'g> Rem<i32> for Index<'g> {
    type Output = Self;

    fn rem(self, divisor: i32) -> Self {
        self.divided(Binary::Remainder, divisor)
    }
}

impl Neg for Score<'_> {
    type Output = Self;

    fn neg(self) -> Self {
        Self(self.0.unary(Unary::Negate))
    }
}

impl Neg for Index<'_> {
    type Output = Self;

    fn neg(self) -> Self {
        Self(self.0.unary(Unary::Negate))
    }
}

impl Not for Index<'_> {
    type Output = Self;

    fn not(self) -> Self {
        Self(self.0.unary(Unary::Not))
    }
}

impl Not for Truth<'_> {
    type Output = Self;

    fn not(self) -> Self {
        Self(self.0.unary(Unary::Not))
    }
}

macro_rules! functions {
    ($($value:ident { $($(#[$doc:meta])* $name:ident $op:ident,)* })*) => {$(
        impl<'g> $value<'g> {
            $($(#[$doc])*
            pub fn $name(self) -> Self {
                Self(self.0.unary(Unary::$op))
            })*
        }
    )*};
}

functions! {
    Score {
        /// Returns the absolute value. Its derivative at 0 is 1.
        abs Abs,
        /// Returns `e^x`.
        exp Exp,
        /// Returns the natural logarithm.
        log Log,
        /// Returns the hyperbolic tangent.
        tanh Tanh,
        /// Returns the square root.
        sqrt Sqrt,
        /// Returns `1 / x`.
        reciprocal Reciprocal,
        /// Rounds down to a whole number. It has no derivative: backward refuses it where x depends on the score.
        floor Floor,
    }
    Index {
        /// Returns the absolute value.
        abs Abs,
    }
}

/// Methods that scores and indices share.
macro_rules! ordered {
    ($($value:ident)*) => {$(
        impl<'g> $value<'g> {
            /// Returns the smaller value.
            pub fn min(self, other: impl Operand<'g, Value = Self>) -> Self {
                Self(self.0.binary(Binary::Min, other.trace(self.0.graph)))
            }

            /// Returns the larger value.
            pub fn max(self, other: impl Operand<'g, Value = Self>) -> Self {
                Self(self.0.binary(Binary::Max, other.trace(self.0.graph)))
            }

            /// `self < other`.
            pub fn less_than(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                self.0.compare(Comparison::Less, other.trace(self.0.graph))
            }

            /// `self <= other`.
            pub fn at_most(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                self.0.compare(Comparison::LessOrEqual, other.trace(self.0.graph))
            }

            /// `self > other`.
            pub fn greater_than(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                other.trace(self.0.graph).compare(Comparison::Less, self.0)
            }

            /// `self >= other`.
            pub fn at_least(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                other.trace(self.0.graph).compare(Comparison::LessOrEqual, self.0)
            }

            /// `self == other`.
            pub fn equals(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                self.0.compare(Comparison::Equal, other.trace(self.0.graph))
            }

            /// `self != other`.
            pub fn differs_from(self, other: impl Operand<'g, Value = Self>) -> Truth<'g> {
                !self.equals(other)
            }
        }
    )*};
}

ordered! { Score Index }

impl<'g> Score<'g> {
    /// Reads an element of a table, with one index per axis.
    pub(crate) fn load(source: &TableSource, indices: &[Index<'g>], clamped: bool) -> Self {
        Self(Traced::load(source, indices, clamped))
    }

    /// Rounds down to an index: the nearest i32 if out of range, 0 for NaN. It has no derivative.
    pub fn to_index(self) -> Index<'g> {
        Index(self.0.unary(Unary::ToIndex))
    }
}

impl<'g> Index<'g> {
    /// Reads an element of a table, with one index per axis.
    pub(crate) fn load(source: &TableSource, indices: &[Index<'g>], clamped: bool) -> Self {
        Self(Traced::load(source, indices, clamped))
    }

    /// Number as a score, rounded to the nearest f32 beyond 24 bits.
    pub fn to_score(self) -> Score<'g> {
        Score(self.0.unary(Unary::ToScore))
    }

    fn divided(self, op: Binary, divisor: i32) -> Self {
        let graph = self.0.graph;
        if divisor <= 0 {
            graph.borrow_mut().refuse(ProgramError::Divisor { value: divisor });
        }
        Self(self.0.binary(op, divisor.trace(graph)))
    }
}

impl<'g> Truth<'g> {
    /// Returns `then` where this condition is true, else `otherwise`. The other value has no influence, not even as
    /// NaN.
    pub fn select<T: Operand<'g>>(self, then: T, otherwise: impl Operand<'g, Value = T::Value>) -> T::Value {
        let graph = self.0.graph;
        let (then, otherwise) = (then.trace(graph).node, otherwise.trace(graph).node);
        T::Value::wrap(Traced::new(graph, Node::Select(self.0.node, then, otherwise)))
    }
}
