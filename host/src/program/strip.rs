//! [`Code`]: an [`Expression`] as instructions for a machine whose registers are strips of scores.
//!
//! A strip is a part of a tile of scores, `keys x queries`, with a few queries. Each line is one operation on whole
//! registers, so the cost of decoding it is spread over about a thousand scores. Values that do not depend on both
//! query and key are computed before: once per head, once for the queries of a tile, once for the keys of a tile.

use super::{Binary, Comparison, Coordinate, Dependence, Expression, Node, NodeId, Type, Unary};

/// Frequency with which a value is computed, which determines where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Given from the start: one number.
    Given,
    /// Computed once per head: one number.
    Head,
    /// Computed once for each query of a tile.
    Query,
    /// Computed once for each key of a tile.
    Key,
    /// Computed for each pair.
    Strip,
    /// The tile of products of query and key, which become scores.
    Score,
}

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) space: Space,
    pub(crate) index: u16,
}

impl Slot {
    /// Tells if the value is one number for all pairs of a head.
    pub(crate) fn is_of_head(&self) -> bool {
        matches!(self.space, Space::Given | Space::Head)
    }
}

/// An operation on registers. It is on f32 unless its name says otherwise; words are i32, bits are both or truths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Copy,
    Negate,
    Abs,
    Exp,
    Log,
    Tanh,
    Sqrt,
    Reciprocal,
    Floor,
    Add,
    Subtract,
    Multiply,
    Divide,
    Min,
    Max,
    /// `a * b + c`.
    MultiplyAdd,
    /// `c - a * b`.
    SubtractProduct,
    /// `a * b`, and 0 where a is 0.
    Slope,
    Less,
    LessOrEqual,
    Equal,
    ToScore,
    ToIndex,
    NegateWord,
    AbsWord,
    AddWords,
    SubtractWords,
    MultiplyWords,
    Quotient,
    Remainder,
    MinWords,
    MaxWords,
    ShiftLeft,
    ShiftRight,
    LessWords,
    LessOrEqualWords,
    EqualWords,
    Not,
    And,
    Or,
    Xor,
    /// The bits of the second operand if the first, a truth, is true, else those of the third.
    Select,
    /// An element of a table, by the index on each axis, clamped to the table.
    Load {
        table: u32,
    },
}

/// An instruction: one operation with the registers of its result and operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) operation: Operation,
    pub(crate) to: Slot,
    pub(crate) operands: [Slot; 4],
    count: u8,
}

/// A number that is given from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// A constant of the operations, as bits.
    Bits(u32),
    /// A parameter, by its place.
    Parameter(u32),
    /// A coordinate other than query and key.
    Coordinate(Coordinate),
    /// The factor that turns products of query and key into [`Node::Score`].
    Scale,
}

/// Instructions for some values of an expression.
#[derive(Clone, Debug)]
pub(crate) struct Code {
    /// Registers of [`Space::Given`].
    pub(crate) given: Vec<Given>,
    /// Instructions whose results depend on the head alone.
    pub(crate) of_head: Stage,
    /// Instructions whose results depend on the query. The first register is the query's position.
    pub(crate) of_queries: Stage,
    /// Instructions whose results depend on the key. The first register is the key's position.
    pub(crate) of_keys: Stage,
    /// Instructions whose results depend on both.
    pub(crate) of_pairs: Stage,
    /// Registers of the values that were asked for.
    pub(crate) roots: Vec<Slot>,
}

/// Instructions that are run together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage {
    /// Instructions in order.
    pub(crate) lines: Vec<Line>,
    /// Number of registers in their space.
    pub(crate) registers: usize,
}

/// The query's position in its sequence.
const QUERY: Slot = Slot {
    space: Space::Query,
    index: 0,
};

/// The key's position.
const KEY: Slot = Slot {
    space: Space::Key,
    index: 0,
};

const SCORE: Slot = Slot {
    space: Space::Score,
    index: 0,
};

impl Code {
    /// Lines for the values of `roots`. If `replaces_scores`, the first root replaces the tile of scores.
    pub(crate) fn new(expression: &Expression, roots: &[NodeId], replaces_scores: bool) -> Self {
        let mut writer = Writer::new(expression, roots);
        writer.write_all();
        let mut results: Vec<Slot> = roots.iter().map(|&root| writer.slot(root)).collect();
        if replaces_scores {
            results[0] = writer.replace_scores(results[0]);
        }
        writer.finish(results)
    }

    /// Lines for a mask: the scores that it hides become minus infinity.
    pub(crate) fn hiding(expression: &Expression, mask: NodeId) -> Self {
        let mut writer = Writer::new(expression, &[mask]);
        writer.write_all();
        let visible = writer.slot(mask);
        let hidden = writer.give(Given::Bits(f32::NEG_INFINITY.to_bits()));
        let zero = writer.give(Given::Bits(0));
        let select = Line::new(Operation::Select, SCORE, &[visible, SCORE, hidden]);
        writer.code.of_pairs.lines.push(select);
        writer.finish(vec![visible, zero])
    }

    /// After a mask's own lines: what it hides of a tile of anything becomes 0.
    pub(crate) fn clear(&self) -> Line {
        Line::new(Operation::Select, SCORE, &[self.roots[0], SCORE, self.roots[1]])
    }
}

/// A value on its way into lines.
#[derive(Clone, Copy)]
enum Value {
    In(Slot),
    /// A product that is written when it is needed as such, not as a part of a sum.
    Product(Slot, Slot),
}

struct Writer<'a> {
    expression: &'a Expression,
    /// Number of operations that take each value; a root counts as two.
    uses: Vec<u32>,
    values: Vec<Option<Value>>,
    code: Code,
}

impl<'a> Writer<'a> {
    fn new(expression: &'a Expression, roots: &[NodeId]) -> Self {
        // A root counts as two: its value is written even if one operation alone takes it.
        let uses = expression.uses(roots.iter().chain(roots).copied());
        let with_position = || Stage {
            lines: Vec::new(),
            registers: 1,
        };
        Self {
            expression,
            values: vec![None; uses.len()],
            uses,
            code: Code {
                given: Vec::new(),
                of_head: Stage::default(),
                of_queries: with_position(),
                of_keys: with_position(),
                of_pairs: Stage::default(),
                roots: Vec::new(),
            },
        }
    }

    fn space_of(&self, id: NodeId) -> Space {
        let dependence = self.expression.dependence(id);
        let of_head = Dependence::BATCH | Dependence::HEAD;
        if dependence.within(of_head) {
            Space::Head
        } else if dependence.within(of_head | Dependence::QUERY) {
            Space::Query
        } else if dependence.within(of_head | Dependence::KEY) {
            Space::Key
        } else {
            Space::Strip
        }
    }

    fn give(&mut self, given: Given) -> Slot {
        let all = &mut self.code.given;
        let index = all.iter().position(|&known| known == given).unwrap_or(all.len());
        if index == all.len() {
            all.push(given);
        }
        Slot {
            space: Space::Given,
            index: index as u16,
        }
    }

    fn line(&mut self, space: Space, operation: Operation, operands: &[Slot]) -> Slot {
        let stage = match space {
            Space::Head => &mut self.code.of_head,
            Space::Query => &mut self.code.of_queries,
            Space::Key => &mut self.code.of_keys,
            Space::Strip => &mut self.code.of_pairs,
            Space::Given | Space::Score => unreachable!("nothing is worked out there"),
        };
        let to = Slot {
            space,
            index: stage.registers as u16,
        };
        stage.registers += 1;
        stage.lines.push(Line::new(operation, to, operands));
        to
    }

    /// Writes everything that is needed.
    fn write_all(&mut self) {
        for (id, node) in self.expression.iter() {
            if self.uses[id.index()] > 0 {
                self.write(id, node);
            }
        }
    }

    fn finish(self, mut roots: Vec<Slot>) -> Code {
        let mut code = self.code;
        code.of_pairs = reuse_registers(code.of_pairs, &mut roots);
        code.roots = roots;
        code
    }

    /// The register that holds a value, written now if it is not there yet.
    fn slot(&mut self, id: NodeId) -> Slot {
        match self.values[id.index()].expect("operands come first") {
            Value::In(slot) => slot,
            Value::Product(x, y) => {
                let slot = self.line(Space::Strip, Operation::Multiply, &[x, y]);
                self.values[id.index()] = Some(Value::In(slot));
                slot
            }
        }
    }

    fn write(&mut self, id: NodeId, node: Node) {
        let once = self.uses[id.index()] == 1;
        let value = match node {
            Node::Score => {
                let scale = self.give(Given::Scale);
                Value::Product(SCORE, scale)
            }
            Node::Binary(Binary::Multiply, x, y)
                if once && self.expression.type_of(id) == Type::Score && self.space_of(id) == Space::Strip =>
            {
                Value::Product(self.slot(x), self.slot(y))
            }
            Node::Coordinate(Coordinate::Query) => Value::In(QUERY),
            Node::Coordinate(Coordinate::Key) => Value::In(KEY),
            Node::Coordinate(coordinate) => Value::In(self.give(Given::Coordinate(coordinate))),
            Node::Real(bits) => Value::In(self.give(Given::Bits(bits))),
            Node::Integer(value) => Value::In(self.give(Given::Bits(value as u32))),
            Node::Truth(holds) => Value::In(self.give(Given::Bits(if holds { u32::MAX } else { 0 }))),
            Node::Parameter(place, _) => Value::In(self.give(Given::Parameter(place))),
            _ => Value::In(self.operation(id, node)),
        };
        self.values[id.index()] = Some(value);
        if matches!(node, Node::Score) && !once {
            self.slot(id);
        }
    }

    /// Writes an operation.
    fn operation(&mut self, id: NodeId, node: Node) -> Slot {
        if let Some(slot) = self.sum_with_product(node) {
            return slot;
        }
        let operation = match node {
            Node::Unary(unary, x) => of_one(unary, self.expression.type_of(x)),
            Node::Binary(binary, x, _) => of_two(binary, self.expression.type_of(x)),
            Node::Compare(comparison, x, _) => compare(comparison, self.expression.type_of(x)),
            Node::Select(..) => Operation::Select,
            Node::Load { table, .. } => Operation::Load { table },
            _ => unreachable!("what has no operands is no operation"),
        };
        let operands: Vec<Slot> = node.operands().map(|operand| self.slot(operand)).collect();
        self.line(self.space_of(id), operation, &operands)
    }

    /// Writes a sum or difference whose one part is a product that nothing else takes.
    fn sum_with_product(&mut self, node: Node) -> Option<Slot> {
        let (operation, product, other) = match node {
            Node::Binary(Binary::Add, x, y) if self.product(y).is_some() => (Operation::MultiplyAdd, y, x),
            Node::Binary(Binary::Add, x, y) => (Operation::MultiplyAdd, x, y),
            Node::Binary(Binary::Subtract, x, y) => (Operation::SubtractProduct, y, x),
            _ => return None,
        };
        let (x, y) = self.product(product)?;
        let other = self.slot(other);
        Some(self.line(Space::Strip, operation, &[x, y, other]))
    }

    fn product(&self, id: NodeId) -> Option<(Slot, Slot)> {
        match self.values[id.index()] {
            Some(Value::Product(x, y)) => Some((x, y)),
            _ => None,
        }
    }

    /// Writes `root` to the tile of scores: by its own line, if none reads scores after it.
    fn replace_scores(&mut self, root: Slot) -> Slot {
        let lines = &mut self.code.of_pairs.lines;
        match lines.iter().position(|line| line.to == root) {
            Some(own) if !lines[own + 1..].iter().any(|line| line.reads(SCORE)) => {
                lines[own].to = SCORE;
                for operand in lines[own + 1..].iter_mut().flat_map(|line| &mut line.operands) {
                    if *operand == root {
                        *operand = SCORE;
                    }
                }
            }
            _ => lines.push(Line::new(Operation::Copy, SCORE, &[root])),
        }
        SCORE
    }
}

impl Line {
    /// An operation on as many operands as it has.
    pub(crate) fn new(operation: Operation, to: Slot, operands: &[Slot]) -> Self {
        let mut all = [to; 4]; // those that are not there are never read
        all[..operands.len()].copy_from_slice(operands);
        Self {
            operation,
            to,
            operands: all,
            count: operands.len() as u8,
        }
    }

    /// A tile of gradients times a derivative; what is 0 stays 0, whatever the derivative is.
    pub(crate) fn slope(derivative: Slot) -> Self {
        Self::new(Operation::Slope, SCORE, &[SCORE, derivative])
    }

    fn reads(&self, slot: Slot) -> bool {
        self.operands[..usize::from(self.count)].contains(&slot)
    }
}

/// Numbers the registers of strips anew: one is used again after it was read for the last time. The line that reads
/// it last may write to it: lines go element by element.
fn reuse_registers(stage: Stage, roots: &mut [Slot]) -> Stage {
    let last_read = |slot: Slot| stage.lines.iter().rposition(|line| line.reads(slot));
    let (mut numbers, mut free, mut registers) = (vec![0; stage.registers], Vec::new(), 0);
    let mut lines = stage.lines.clone();
    let renumber = |numbers: &[u16], slot: &mut Slot| {
        if slot.space == Space::Strip {
            slot.index = numbers[usize::from(slot.index)];
        }
    };
    for (place, line) in lines.iter_mut().enumerate() {
        let old = *line;
        line.operands.iter_mut().for_each(|operand| renumber(&numbers, operand));
        for (i, operand) in old.operands[..usize::from(old.count)].iter().enumerate() {
            let read_last = last_read(*operand) == Some(place) && !old.operands[..i].contains(operand);
            if operand.space == Space::Strip && read_last && !roots.contains(operand) {
                free.push(line.operands[i].index);
            }
        }
        if old.to.space == Space::Strip {
            line.to.index = free.pop().unwrap_or_else(|| {
                registers += 1;
                registers as u16 - 1
            });
            numbers[usize::from(old.to.index)] = line.to.index;
        }
    }
    roots.iter_mut().for_each(|root| renumber(&numbers, root));
    Stage { lines, registers }
}

fn of_one(operation: Unary, of: Type) -> Operation {
    match (operation, of) {
        (Unary::Negate, Type::Index) => Operation::NegateWord,
        (Unary::Negate, _) => Operation::Negate,
        (Unary::Abs, Type::Index) => Operation::AbsWord,
        (Unary::Abs, _) => Operation::Abs,
        (Unary::Exp, _) => Operation::Exp,
        (Unary::Log, _) => Operation::Log,
        (Unary::Tanh, _) => Operation::Tanh,
        (Unary::Sqrt, _) => Operation::Sqrt,
        (Unary::Reciprocal, _) => Operation::Reciprocal,
        (Unary::Floor, _) => Operation::Floor,
        (Unary::ToScore, _) => Operation::ToScore,
        (Unary::ToIndex, _) => Operation::ToIndex,
        (Unary::Not, _) => Operation::Not,
    }
}

fn of_two(operation: Binary, of: Type) -> Operation {
    let is_index = of == Type::Index;
    let either = |word, number| if is_index { word } else { number };
    match operation {
        Binary::Add => either(Operation::AddWords, Operation::Add),
        Binary::Subtract => either(Operation::SubtractWords, Operation::Subtract),
        Binary::Multiply => either(Operation::MultiplyWords, Operation::Multiply),
        Binary::Divide => either(Operation::Quotient, Operation::Divide),
        Binary::Remainder => Operation::Remainder,
        Binary::Min => either(Operation::MinWords, Operation::Min),
        Binary::Max => either(Operation::MaxWords, Operation::Max),
        Binary::And => Operation::And,
        Binary::Or => Operation::Or,
        Binary::Xor => Operation::Xor,
        Binary::ShiftLeft => Operation::ShiftLeft,
        Binary::ShiftRight => Operation::ShiftRight,
    }
}

fn compare(comparison: Comparison, of: Type) -> Operation {
    match (comparison, of) {
        (Comparison::Less, Type::Index) => Operation::LessWords,
        (Comparison::Less, _) => Operation::Less,
        (Comparison::LessOrEqual, Type::Index) => Operation::LessOrEqualWords,
        (Comparison::LessOrEqual, _) => Operation::LessOrEqual,
        (Comparison::Equal, Type::Index) => Operation::EqualWords,
        (Comparison::Equal, _) => Operation::Equal,
    }
}
