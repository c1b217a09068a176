//! Values of nodes: found in a register, or worked out from those of the operands.

use crate::program::scope::{Class, Place, Scope};
use crate::program::text::{Factor, Memory, Slot};
use crate::program::{Binary, Comparison, Coordinate, Node, NodeId, Type, Unary};

use super::address::load;
use super::kept::Kept;
use super::stage::{Affine, Stage};
use super::{At, Point, Printer, real};

impl Printer<'_> {
    /// A register, or a literal, with the value of a node.
    pub(super) fn value(&mut self, node: NodeId, point: Point<'_>, scope: &mut Scope) -> String {
        match self.code.expression.node(node) {
            Node::Real(bits) => return format!("0f{bits:08X}"),
            Node::Integer(value) => return value.to_string(),
            _ => {}
        }
        let stage = self.stage(node);
        if stage == Stage::Call {
            return self.slot(Slot::Value(node), Class::of(self.type_of(node)), scope);
        }
        let place = place_of(stage, point);
        if let Some(value) = scope.values.get(&(node, place)) {
            return value.clone();
        }
        let outer = scope.node.replace(node);
        let value = match point.at {
            At::Tile { .. } | At::Scores { .. } | At::Single { .. } if stage == Stage::Head => {
                self.keep(Kept::Head(node))
            }
            At::Scores { .. } if stage == Stage::Row => self.keep(Kept::Row(node, point.row)),
            At::Scores { .. } => match self.affine[node.index()].filter(|affine| affine.step != 0) {
                Some(affine) => self.affine_value(node, affine, point, scope),
                None => self.compute(node, point, scope),
            },
            _ => self.compute(node, point, scope),
        };
        scope.node = outer;
        scope.values.insert((node, place), value.clone());
        value
    }

    /// A value that grows with the key, from that of the tile's first key.
    fn affine_value(&mut self, node: NodeId, affine: Affine, point: Point<'_>, scope: &mut Scope) -> String {
        let row = (self.stage(node) == Stage::Pair).then_some(point.row);
        let first = self.keep(Kept::First(node, row));
        let more = affine.step.wrapping_mul(point.column as i32);
        if more == 0 {
            return first;
        }
        match (self.type_of(node), affine.by) {
            (Type::Index, _) => scope.result(Class::B32, "add.s32", &[&first, &more.to_string()]),
            (_, None) => scope.result(Class::B32, "add.rn.f32", &[&first, &real(more as f32)]),
            (_, Some(by)) => {
                let by = self.value(by, point, scope);
                scope.result(Class::B32, "fma.rn.f32", &[&by, &real(more as f32), &first])
            }
        }
    }

    /// Works a value out from those of its operands.
    fn compute(&mut self, node: NodeId, point: Point<'_>, scope: &mut Scope) -> String {
        if let Some(factors) = self.scaled_product(node) {
            let scale = self.slot(Slot::Scale(factors), Class::B32, scope);
            return scope.result(Class::B32, "mul.rn.f32", &[point.product, &scale]);
        }
        match self.code.expression.node(node) {
            Node::Coordinate(coordinate) => self.coordinate(coordinate, point, scope),
            Node::Unary(operation, x) => {
                if operation == Unary::ToScore
                    && let Some(distance) = self.distance(x, point)
                {
                    return self.real_distance(distance, point, scope);
                }
                let type_ = self.type_of(x);
                let x = self.value(x, point, scope);
                self.unary(operation, type_, &x, scope)
            }
            Node::Binary(operation, x, y) => self.binary(operation, x, y, point, scope),
            Node::Compare(comparison, x, y) => {
                let type_ = if self.type_of(x) == Type::Score { "f32" } else { "s32" };
                let comparison = match comparison {
                    Comparison::Less => "lt",
                    Comparison::LessOrEqual => "le",
                    Comparison::Equal => "eq",
                };
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                scope.result(Class::Predicate, &format!("setp.{comparison}.{type_}"), &[&x, &y])
            }
            Node::Select(condition, x, y) => {
                let (class, type_) = (Class::of(self.type_of(x)), self.type_of(x));
                let condition = self.value(condition, point, scope);
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                match type_ {
                    Type::Score => return scope.result(class, "selp.f32", &[&x, &y, &condition]),
                    Type::Index => return scope.result(class, "selp.b32", &[&x, &y, &condition]),
                    Type::Truth => {}
                }
                let taken = scope.result(class, "and.pred", &[&x, &condition]);
                let otherwise = scope.result(class, "not.pred", &[&condition]);
                let otherwise = scope.result(class, "and.pred", &[&y, &otherwise]);
                scope.result(class, "or.pred", &[&taken, &otherwise])
            }
            Node::Load { table, .. } => {
                let address = self.address(node, Memory::Elements, point, scope);
                load(self.code.expression.tables()[table as usize].element, &address, scope)
            }
            Node::Score | Node::Real(_) | Node::Integer(_) | Node::Truth(_) | Node::Parameter(..) => {
                unreachable!("a scaled product, a literal or a slot")
            }
        }
    }

    /// The index that grows with the column whose absolute value a node is.
    fn distance(&self, node: NodeId, point: Point<'_>) -> Option<NodeId> {
        match self.code.expression.node(node) {
            Node::Unary(Unary::Abs, x)
                if matches!(point.at, At::Scores { .. }) && self.affine[x.index()].is_some_and(|x| x.step != 0) =>
            {
                Some(x)
            }
            _ => None,
        }
    }

    /// The absolute value of an index that grows with the column, as a score: a conversion a row instead of one a pair.
    fn real_distance(&mut self, index: NodeId, point: Point<'_>, scope: &mut Scope) -> String {
        let step = self.affine[index.index()].map_or(0, |affine| affine.step);
        let row = (self.stage(index) == Stage::Pair).then_some(point.row);
        let first = self.keep(Kept::FirstReal(index, row));
        let more = real(step.wrapping_mul(point.column as i32) as f32);
        let value = scope.result(Class::B32, "add.rn.f32", &[&first, &more]);
        scope.result(Class::B32, "abs.f32", &[&value])
    }

    /// The factors of a value that is the score that comes in times values that are the same for every pair.
    pub(super) fn scaled_product(&self, node: NodeId) -> Option<Vec<Factor>> {
        let call = |id: NodeId| self.stage(id) == Stage::Call;
        let with = |x: NodeId, factor| {
            let mut factors = self.scaled_product(x)?;
            factors.push(factor);
            Some(factors)
        };
        match self.code.expression.node(node) {
            Node::Score => Some(Vec::new()),
            Node::Unary(Unary::Negate, x) => with(x, Factor::Minus),
            Node::Binary(Binary::Multiply, x, y) if call(y) => with(x, Factor::Value(y)),
            Node::Binary(Binary::Multiply, x, y) if call(x) => with(y, Factor::Value(x)),
            Node::Binary(Binary::Divide, x, y) if call(y) => with(x, Factor::Inverse(y)),
            _ => None,
        }
    }

    /// The factors of a value that is a product used once, worked out at this point, to be summed in the same instruction;
    /// the first negated if `minus`.
    pub(super) fn product(
        &mut self,
        node: NodeId,
        minus: bool,
        point: Point<'_>,
        scope: &mut Scope,
    ) -> Option<[String; 2]> {
        let is_kept = matches!(point.at, At::Scores { .. })
            && (self.stage(node) <= Stage::Row || self.affine[node.index()].is_some());
        if self.stage(node) == Stage::Call || is_kept {
            return None;
        }
        if let Some(mut factors) = self.scaled_product(node) {
            factors.extend(minus.then_some(Factor::Minus));
            let scale = self.slot(Slot::Scale(factors), Class::B32, scope);
            return Some([point.product.to_owned(), scale]);
        }
        let Node::Binary(Binary::Multiply, a, b) = self.code.expression.node(node) else {
            return None;
        };
        if self.uses[node.index()] > 1 {
            return None;
        }
        let mut a = self.value(a, point, scope);
        if minus {
            a = scope.result(Class::B32, "neg.f32", &[&a]);
        }
        Some([a, self.value(b, point, scope)])
    }

    pub(super) fn coordinate(&mut self, coordinate: Coordinate, point: Point<'_>, scope: &mut Scope) -> String {
        let moved = |first: &str, by: u32, scope: &mut Scope| match by {
            0 => first.to_owned(),
            by => scope.result(Class::B32, "add.s32", &[first, &by.to_string()]),
        };
        match (coordinate, point.at) {
            (Coordinate::Query, At::Single { query, .. }) => query.to_owned(),
            (Coordinate::Key, At::Single { key, .. }) => key.to_owned(),
            (Coordinate::Query | Coordinate::Key, At::Tile { row, column }) => {
                let transposed = self.tile.is_some_and(|tile| tile.transposed);
                if (coordinate == Coordinate::Query) == transposed {
                    moved(column, point.column, scope)
                } else {
                    moved(row, point.row, scope)
                }
            }
            (Coordinate::Head, At::Head { head, .. }) => head.to_owned(),
            (Coordinate::Batch, At::Head { batch, .. }) => batch.to_owned(),
            (Coordinate::SeqlenQ, At::Head { seqlen_q, .. }) => seqlen_q.to_owned(),
            (Coordinate::SeqlenK, At::Head { seqlen_k, .. }) => seqlen_k.to_owned(),
            (Coordinate::KvHead, At::Head { head, .. }) => {
                let group = self.slot(Slot::HeadsPerKv, Class::B32, scope);
                scope.result(Class::B32, "div.u32", &[head, &group])
            }
            (coordinate, at) => unreachable!("{coordinate:?} is kept, and not worked out at {at:?}"),
        }
    }
}

pub(super) fn place_of(stage: Stage, point: Point<'_>) -> Place {
    match stage {
        Stage::Call | Stage::Head => Place::All,
        Stage::Row => Place::Row(point.row),
        Stage::Column => Place::Column(point.column),
        Stage::Pair => Place::Pair(point.row, point.column),
    }
}
