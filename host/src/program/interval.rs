//! Bounds of values over ranges of coordinates. They prove that a tile of pairs is all visible or all hidden, and
//! that an index stays in its table.
//!
//! Bounds hold on every device: bounds of scores are tracked only through operations that do not round.

#[cfg(doc)]
use super::Coordinate;
use super::{Binary, Comparison, Constant, Expression, Node, NodeId, Type, Unary};

/// Bounds of a value, both included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bounds {
    /// Bounds of a score that is not NaN.
    Score(f32, f32),
    /// A score without bounds, which may be NaN.
    AnyScore,
    /// Bounds of an index.
    Index(i32, i32),
    /// Possible values of a truth: may it be false, may it be true.
    Truth(bool, bool),
}

/// First and last value of each coordinate, in the order of [`Coordinate::ALL`].
pub type Ranges = [(i32, i32); 7];

/// Values of an expression whose bounds are computed repeatedly.
#[derive(Clone, Debug)]
pub struct Intervals {
    /// Operations that are needed, with the places of their values.
    nodes: Vec<(NodeId, Node)>,
    bounds: Vec<Bounds>,
}

impl Intervals {
    /// Prepares the computation of the bounds of `roots`.
    pub fn new(expression: &Expression, roots: impl IntoIterator<Item = NodeId>) -> Self {
        let needed = expression.needed(roots);
        Self {
            nodes: expression.iter().filter(|(id, _)| needed[id.index()]).collect(),
            bounds: vec![Bounds::AnyScore; needed.len()],
        }
    }

    /// Computes all bounds. `of_load` returns those of a table's content, from the table's place and the bounds of
    /// each index.
    pub fn evaluate(
        &mut self,
        ranges: &Ranges,
        constants: &[Constant],
        mut of_load: impl FnMut(u32, &[(i32, i32)]) -> Bounds,
    ) {
        for &(id, node) in &self.nodes {
            let of = |id: NodeId| self.bounds[id.index()];
            let index = |id: NodeId| match of(id) {
                Bounds::Index(low, high) => (low, high),
                _ => (i32::MIN, i32::MAX),
            };
            let bounds = match node {
                Node::Score => Bounds::AnyScore,
                Node::Coordinate(coordinate) => {
                    let (first, last) = ranges[coordinate as usize];
                    Bounds::Index(first, last)
                }
                Node::Real(bits) => of_number(f32::from_bits(bits)),
                Node::Integer(value) => Bounds::Index(value, value),
                Node::Truth(holds) => Bounds::Truth(!holds, holds),
                Node::Parameter(place, _) => match constants[place as usize] {
                    Constant::Score(value) => of_number(value),
                    Constant::Index(value) => Bounds::Index(value, value),
                },
                Node::Unary(operation, x) => of_one(operation, of(x)),
                Node::Binary(operation, x, y) => of_two(operation, of(x), of(y)),
                Node::Compare(comparison, x, y) => compare(comparison, of(x), of(y)),
                Node::Select(condition, x, y) => match of(condition) {
                    Bounds::Truth(false, _) => of(x),
                    Bounds::Truth(_, false) => of(y),
                    _ => either(of(x), of(y)),
                },
                Node::Load { table, indices, .. } => {
                    let mut ranges = [(0, 0); super::MAX_RANK];
                    for (range, &of_axis) in ranges.iter_mut().zip(indices.iter()) {
                        *range = index(of_axis);
                    }
                    of_load(table, &ranges[..indices.len()])
                }
            };
            self.bounds[id.index()] = bounds;
        }
    }

    /// Returns the bounds of a root or of one of its operands, as computed last.
    pub fn of(&self, node: NodeId) -> Bounds {
        self.bounds[node.index()]
    }
}

impl Bounds {
    /// Returns the bounds that hold for any value of a type.
    pub fn any(of: Type) -> Self {
        match of {
            Type::Score => Self::AnyScore,
            Type::Index => Self::Index(i32::MIN, i32::MAX),
            Type::Truth => Self::Truth(true, true),
        }
    }
}

fn of_number(value: f32) -> Bounds {
    if value.is_nan() {
        Bounds::AnyScore
    } else {
        Bounds::Score(value, value)
    }
}

/// Converts exact bounds to those of an index. If they leave the range of i32, arithmetic has wrapped, and there are
/// no bounds.
fn wrapped(low: i64, high: i64) -> Bounds {
    match (i32::try_from(low), i32::try_from(high)) {
        (Ok(low), Ok(high)) => Bounds::Index(low, high),
        _ => Bounds::any(Type::Index),
    }
}

/// Returns bounds that include both arguments.
fn either(x: Bounds, y: Bounds) -> Bounds {
    match (x, y) {
        (Bounds::Score(a, b), Bounds::Score(c, d)) => Bounds::Score(a.min(c), b.max(d)),
        (Bounds::Index(a, b), Bounds::Index(c, d)) => Bounds::Index(a.min(c), b.max(d)),
        (Bounds::Truth(a, b), Bounds::Truth(c, d)) => Bounds::Truth(a || c, b || d),
        _ => Bounds::AnyScore,
    }
}

fn of_one(operation: Unary, x: Bounds) -> Bounds {
    match (operation, x) {
        (Unary::Not, Bounds::Truth(may_not, may)) => Bounds::Truth(may, may_not),
        (Unary::Not, Bounds::Index(low, high)) => Bounds::Index(!high, !low),
        (Unary::Negate, Bounds::Index(low, high)) => wrapped(-i64::from(high), -i64::from(low)),
        (Unary::Negate, Bounds::Score(low, high)) => Bounds::Score(-high, -low),
        (Unary::Abs, Bounds::Index(low, high)) => {
            let (low, high) = (i64::from(low), i64::from(high));
            let least = if low <= 0 && high >= 0 {
                0
            } else {
                low.abs().min(high.abs())
            };
            wrapped(least, low.abs().max(high.abs()))
        }
        (Unary::Abs, Bounds::Score(low, high)) => {
            let least = if low <= 0.0 && high >= 0.0 {
                0.0
            } else {
                low.abs().min(high.abs())
            };
            Bounds::Score(least, low.abs().max(high.abs()))
        }
        (Unary::Floor, Bounds::Score(low, high)) => Bounds::Score(low.floor(), high.floor()),
        // Rounding to nearest preserves the order.
        (Unary::ToScore, Bounds::Index(low, high)) => Bounds::Score(low as f32, high as f32),
        (Unary::ToIndex, Bounds::Score(low, high)) => Bounds::Index(low.floor() as i32, high.floor() as i32),
        (Unary::ToIndex, _) => Bounds::any(Type::Index),
        _ => Bounds::AnyScore,
    }
}

fn of_two(operation: Binary, x: Bounds, y: Bounds) -> Bounds {
    match (x, y) {
        (Bounds::Index(a, b), Bounds::Index(c, d)) => {
            of_indices(operation, [a, b].map(i64::from), [c, d].map(i64::from))
        }
        (Bounds::Truth(..), Bounds::Truth(..)) => {
            let holds = |x: Bounds, wanted: bool| match x {
                Bounds::Truth(may_not, may) => {
                    if wanted {
                        may
                    } else {
                        may_not
                    }
                }
                _ => true,
            };
            let results = [(false, false), (false, true), (true, false), (true, true)].map(|(p, q)| {
                let result = match operation {
                    Binary::And => p & q,
                    Binary::Or => p | q,
                    _ => p ^ q,
                };
                (holds(x, p) && holds(y, q), result)
            });
            let some = |wanted: bool| results.iter().any(|&(possible, result)| possible && result == wanted);
            Bounds::Truth(some(false), some(true))
        }
        (Bounds::Score(a, b), Bounds::Score(c, d)) => match operation {
            Binary::Min => Bounds::Score(a.min(c), b.min(d)),
            Binary::Max => Bounds::Score(a.max(c), b.max(d)),
            _ => Bounds::AnyScore,
        },
        _ => Bounds::AnyScore,
    }
}

fn of_indices(operation: Binary, [a, b]: [i64; 2], [c, d]: [i64; 2]) -> Bounds {
    let corners = |f: fn(i64, i64) -> i64| {
        let corners = [f(a, c), f(a, d), f(b, c), f(b, d)];
        let least = corners.iter().copied().fold(i64::MAX, i64::min);
        wrapped(least, corners.into_iter().fold(i64::MIN, i64::max))
    };
    match operation {
        Binary::Add => wrapped(a + c, b + d),
        Binary::Subtract => wrapped(a - d, b - c),
        Binary::Multiply => corners(|x, y| x * y),
        Binary::Divide if c > 0 => corners(i64::div_euclid),
        Binary::Remainder if c > 0 && c == d && a.div_euclid(c) == b.div_euclid(c) => {
            wrapped(a.rem_euclid(c), b.rem_euclid(c))
        }
        Binary::Remainder if c > 0 => wrapped(0, if a >= 0 { b.min(d - 1) } else { d - 1 }),
        Binary::Min => wrapped(a.min(c), b.min(d)),
        Binary::Max => wrapped(a.max(c), b.max(d)),
        Binary::And if a >= 0 && c >= 0 => wrapped(0, b.min(d)),
        Binary::And if a >= 0 => wrapped(0, b),
        Binary::And if c >= 0 => wrapped(0, d),
        Binary::Or | Binary::Xor if a >= 0 && c >= 0 => {
            let bits = 64 - (b | d).leading_zeros();
            wrapped(0, (1 << bits) - 1)
        }
        Binary::ShiftLeft if c == d => wrapped(a << (c & 31), b << (c & 31)),
        Binary::ShiftRight if c == d => wrapped(a >> (c & 31), b >> (c & 31)),
        _ => Bounds::any(Type::Index),
    }
}

fn compare(comparison: Comparison, x: Bounds, y: Bounds) -> Bounds {
    // Every i32 is an f64, and so is every f32.
    let ends = |bounds: Bounds| match bounds {
        Bounds::Score(low, high) => Some((f64::from(low), f64::from(high))),
        Bounds::Index(low, high) => Some((f64::from(low), f64::from(high))),
        _ => None,
    };
    let (Some((a, b)), Some((c, d))) = (ends(x), ends(y)) else {
        return Bounds::Truth(true, true);
    };
    match comparison {
        Comparison::Less => Bounds::Truth(b >= c, a < d),
        Comparison::LessOrEqual => Bounds::Truth(b > c, a <= d),
        Comparison::Equal => Bounds::Truth(!(a == b && c == d && a == c), a <= d && c <= b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests every operation of two indices on every pair of small ranges against all values in them.
    #[test]
    fn bounds_of_indices_hold_every_value() {
        use Binary::*;
        let mut tight = 0;
        for operation in [
            Add, Subtract, Multiply, Divide, Remainder, Min, Max, And, Or, Xor, ShiftLeft, ShiftRight,
        ] {
            for (a, b, c, d) in ranges() {
                if matches!(operation, Divide | Remainder) && c < 1 {
                    continue;
                }
                let Bounds::Index(low, high) = of_two(operation, Bounds::Index(a, b), Bounds::Index(c, d)) else {
                    panic!("bounds of an index");
                };
                let values = (a..=b).flat_map(|x| (c..=d).map(move |y| (x, y)));
                let (mut least, mut most) = (i32::MAX, i32::MIN);
                for (x, y) in values {
                    let value = match operation {
                        Add => x + y,
                        Subtract => x - y,
                        Multiply => x * y,
                        Divide => x.div_euclid(y),
                        Remainder => x.rem_euclid(y),
                        Min => x.min(y),
                        Max => x.max(y),
                        And => x & y,
                        Or => x | y,
                        Xor => x ^ y,
                        ShiftLeft => x.wrapping_shl(y as u32),
                        ShiftRight => x.wrapping_shr(y as u32),
                    };
                    (least, most) = (least.min(value), most.max(value));
                }
                assert!(low <= least && most <= high, "{operation:?} of {a}..={b} and {c}..={d}");
                tight += u32::from(low == least && most == high);
            }
        }
        assert!(tight > 3000, "{tight}");
    }

    #[test]
    fn truths_are_known_where_every_pair_agrees() {
        for comparison in [Comparison::Less, Comparison::LessOrEqual, Comparison::Equal] {
            for (a, b, c, d) in ranges() {
                let holds = |x: i32, y: i32| match comparison {
                    Comparison::Less => x < y,
                    Comparison::LessOrEqual => x <= y,
                    Comparison::Equal => x == y,
                };
                let all = || (a..=b).flat_map(|x| (c..=d).map(move |y| (x, y)));
                let expected = Bounds::Truth(all().any(|(x, y)| !holds(x, y)), all().any(|(x, y)| holds(x, y)));
                let got = compare(comparison, Bounds::Index(a, b), Bounds::Index(c, d));
                assert_eq!(got, expected, "{comparison:?} of {a}..={b} and {c}..={d}");
            }
        }
        let [no, yes, may] = [(true, false), (false, true), (true, true)].map(|(p, q)| Bounds::Truth(p, q));
        assert_eq!(of_two(Binary::And, no, may), no);
        assert_eq!(of_two(Binary::Or, yes, may), yes);
        assert_eq!(of_two(Binary::And, yes, may), may);
        assert_eq!(of_two(Binary::Xor, yes, yes), no);
        assert_eq!(of_one(Unary::Not, no), yes);
    }

    fn ranges() -> impl Iterator<Item = (i32, i32, i32, i32)> {
        let ends = [-5, -1, 0, 1, 3, 6];
        let of_one = move || {
            ends.into_iter().flat_map(move |low| {
                ends.into_iter()
                    .filter(move |&high| low <= high)
                    .map(move |high| (low, high))
            })
        };
        of_one().flat_map(move |(a, b)| of_one().map(move |(c, d)| (a, b, c, d)))
    }

    #[test]
    fn what_wraps_has_no_bounds() {
        let any = Bounds::any(Type::Index);
        let large = Bounds::Index(0, i32::MAX);
        assert_eq!(of_two(Binary::Add, large, Bounds::Index(0, 1)), any);
        assert_eq!(of_one(Unary::Abs, any), any);
    }
}
