//! An expression as PTX, for one marker at a time.
//!
//! Work is done where it is done least often. What is the same for every pair, the host works out: a [`Slot`] of the kernel's
//! second parameter. What depends on the head is worked out at `head`; what depends on the row of a tile, at `tile`, once for each
//! of the lane's rows. What is affine in the column is worked out there for the first column, and each score adds a literal. The
//! rest is worked out a score, or a column where it depends on that alone. Rows are queries and columns are keys, or the other way
//! round in a kernel that owns keys. Values pass from marker to marker in registers that are declared at the top of the kernel;
//! each marker has a scope for its own.
//!
//! Queries and keys that do not exist reach a program too: indices into tables are moved inside.

use std::collections::BTreeSet;

use flash_attention_kernels::program::{Kind, Marker, Tile};

use super::generator::{self, Word};
use super::scope::{Class, Place, Scope};
use super::splice::load_slot;
use super::text::{Axis, Code, Factor, Memory, Slot};
use super::{Binary, Comparison, Coordinate, DataType, Dependence, Indices, LoadDerivative, Node, NodeId, Type, Unary};

/// Where a value is worked out, from the rarest to the most frequent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
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
    /// Of a value that needs both.
    fn with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Row, Self::Column) | (Self::Column, Self::Row) => Self::Pair,
            _ => self.max(other),
        }
    }
}

/// A value that grows with the column by `step * by`, `by` a value that no column changes, or 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Affine {
    step: i32,
    by: Option<NodeId>,
}

/// A value that a marker finds in a register because an earlier one put it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kept {
    /// A value of the head.
    Head(NodeId),
    /// Address of a table's element at index 0 of the axes that the head does not give.
    HeadAddress(NodeId, Memory),
    /// The logit of the head's sink.
    Sink,
    /// What the generator of dropout counts.
    Drawn(Word),
    /// A value of a row.
    Row(NodeId, u32),
    /// Value of a row, or of the tile, at the tile's first column.
    First(NodeId, Option<u32>),
    /// The same of an index, as a score.
    FirstReal(NodeId, Option<u32>),
    /// Address of a table's element for a row, at index 0 of the axes that the column gives.
    RowAddress(NodeId, Memory, u32),
    /// Address of a table's element at the tile's first column, for a row or for the tile.
    FirstAddress(NodeId, Memory, Option<u32>),
    /// Whether the query of a row exists.
    Exists(u32),
    /// A value of a pair, kept from its score to its gradient.
    Pair(NodeId, u32, u32),
}

impl Kept {
    /// Row, for those of one.
    fn row(self) -> Option<u32> {
        match self {
            Self::Row(_, row) | Self::RowAddress(_, _, row) | Self::Exists(row) => Some(row),
            Self::First(_, row) | Self::FirstReal(_, row) | Self::FirstAddress(_, _, row) => row,
            Self::Drawn(word) => word.row(),
            Self::Head(_) | Self::HeadAddress(..) | Self::Sink | Self::Pair(..) => None,
        }
    }

    fn is_of_head(self) -> bool {
        match self {
            Self::Head(_) | Self::HeadAddress(..) | Self::Sink => true,
            Self::Drawn(word) => word.is_of_head(),
            _ => false,
        }
    }

    fn is_of_tile(self) -> bool {
        !self.is_of_head() && !matches!(self, Self::Pair(..))
    }

    fn name(self) -> String {
        let of_row = |letter: char, node: NodeId, row: Option<u32>| match row {
            Some(row) => format!("%score_{letter}{}_{row}", node.index()),
            None => format!("%score_{letter}{}", node.index()),
        };
        let letter = |letter: char, memory| match memory {
            Memory::Elements => letter,
            Memory::Gradient => letter.to_ascii_uppercase(),
        };
        match self {
            Self::Head(node) => of_row('h', node, None),
            Self::HeadAddress(node, memory) => of_row(letter('a', memory), node, None),
            Self::Sink => "%score_sink".to_owned(),
            Self::Drawn(word) => word.name(),
            Self::Row(node, row) => of_row('r', node, Some(row)),
            Self::Exists(row) => format!("%score_exists{row}"),
            Self::First(node, row) => of_row('f', node, row),
            Self::FirstReal(node, row) => of_row('x', node, row),
            Self::RowAddress(node, memory, row) => of_row(letter('b', memory), node, Some(row)),
            Self::FirstAddress(node, memory, row) => of_row(letter('c', memory), node, row),
            Self::Pair(node, row, column) => format!("%score_d{}_{row}_{column}", node.index()),
        }
    }
}

/// What a value is worked out for.
#[derive(Clone, Copy, Debug)]
struct Point<'a> {
    at: At<'a>,
    /// Added to the first row.
    row: u32,
    /// Added to the first column.
    column: u32,
    /// The register of the product, at `score`.
    product: &'a str,
}

#[derive(Clone, Copy, Debug)]
enum At<'a> {
    Head {
        head: &'a str,
        batch: &'a str,
    },
    /// The first pair of the lane's part of a tile.
    Tile {
        row: &'a str,
        column: &'a str,
    },
    /// `edge` if columns may lie past the end.
    Scores {
        edge: bool,
    },
    /// One pair, of which nothing is kept but what is of its head.
    Single {
        query: &'a str,
        key: &'a str,
    },
}

/// Prints the code of a program, and remembers what the markers want of each other.
pub(super) struct Printer<'a> {
    code: &'a Code,
    exact: bool,
    /// Scores of the kernel, if it has any.
    tile: Option<Tile>,
    stages: Vec<Stage>,
    affine: Vec<Option<Affine>>,
    uses: Vec<u32>,
    slots: Vec<Slot>,
    kept: BTreeSet<Kept>,
}

impl<'a> Printer<'a> {
    pub fn new(code: &'a Code, exact: bool, tile: Option<Tile>) -> Self {
        let transposed = tile.is_some_and(|tile| tile.transposed);
        let mut stages = Vec::with_capacity(code.expression.nodes().len());
        let mut affine = Vec::with_capacity(stages.capacity());
        for (id, node) in code.expression.iter() {
            let stage = stage_of(node, &stages, transposed);
            stages.push(stage);
            affine.push(affine_of(
                node,
                code.expression.type_of(id),
                &stages,
                &affine,
                transposed,
            ));
        }
        let mut uses = vec![0; stages.len()];
        let loads = code.loads.iter().flat_map(|load| [load.load, load.derivative]);
        let roots = || {
            code.score
                .into_iter()
                .chain(code.mask)
                .chain(code.derivative)
                .chain(loads.clone())
        };
        let needed = code.expression.needed(roots());
        for (id, node) in code.expression.iter().filter(|(id, _)| needed[id.index()]) {
            let _ = id;
            node.operands().for_each(|operand| uses[operand.index()] += 1);
        }
        for root in roots() {
            uses[root.index()] += 1;
        }
        Self {
            code,
            exact,
            tile,
            stages,
            affine,
            uses,
            slots: Vec::new(),
            kept: BTreeSet::new(),
        }
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub fn into_slots(self) -> Vec<Slot> {
        self.slots
    }

    /// The registers that pass values from marker to marker.
    pub fn declarations(&self) -> Vec<String> {
        let class = |kept: &Kept| match *kept {
            Kept::Head(node) | Kept::Row(node, _) | Kept::First(node, _) | Kept::Pair(node, ..) => {
                Class::of(self.type_of(node))
            }
            Kept::FirstReal(..) | Kept::Sink | Kept::Drawn(_) => Class::B32,
            Kept::HeadAddress(..) | Kept::RowAddress(..) | Kept::FirstAddress(..) => Class::B64,
            Kept::Exists(_) => Class::Predicate,
        };
        let declare = |kept: &Kept| format!("\t.reg .{} {};", class(kept).spelled().0, kept.name());
        self.kept.iter().map(declare).collect()
    }

    /// What stands in place of a marker, if anything. Markers of scores come first, those of heads last.
    pub fn print(&mut self, marker: &Marker<'_>) -> Option<Scope> {
        let mut scope = Scope::default();
        match *marker {
            Marker::Scores {
                kind,
                tile,
                ref registers,
                m,
                n,
            } => {
                let offsets = tile.layout.offsets().iter().map(|&(row, column)| (m + row, n + column));
                if kind == Kind::Weight {
                    if self.code.dropout {
                        generator::print(self, tile, registers, [m, n], &mut scope);
                    }
                    return (!scope.lines.is_empty()).then_some(scope);
                }
                let mut sums = Vec::new();
                for ((row, column), product) in offsets.zip(registers) {
                    let at = At::Scores { edge: tile.edge };
                    let point = Point {
                        at,
                        row,
                        column,
                        product,
                    };
                    // Kernels that own keys work out the same gradients once more.
                    if kind == Kind::Gradient && !tile.transposed {
                        self.sum_table_gradients(point, &mut sums, &mut scope);
                    }
                    self.print_scores(kind, point, &mut scope);
                }
                for (address, sum) in sums {
                    let is_some = scope.result(Class::Predicate, "setp.neu.f32", &[&sum, &real(0.0)]);
                    scope.put(format!("@{is_some} red.global.add.f32 [{address}], {sum};"));
                }
            }
            Marker::Hides { flag } if self.code.mask.is_some() => scope.put(format!("mov.b32 {flag}, 1;")),
            Marker::Visible { flag, query, key } => {
                if let Some(mask) = self.code.mask {
                    let at = At::Single { query, key };
                    let visible = self.value(
                        mask,
                        Point {
                            at,
                            row: 0,
                            column: 0,
                            product: "",
                        },
                        &mut scope,
                    );
                    scope.put(format!("selp.b32 {flag}, 1, 0, {visible};"));
                }
            }
            Marker::Start { row_max, row_sum } if self.code.sinks => {
                let sink = self.keep(Kept::Sink);
                let lanes = self.tile.map_or(1, |tile| tile.layout.lanes_of_row());
                let part = 1.0 / lanes as f32;
                let is_none = scope.result(Class::Predicate, "setp.eq.f32", &[&sink, &real(f32::NEG_INFINITY)]);
                scope.put(format!("mov.b32 {row_max}, {sink};"));
                scope.put(format!("selp.f32 {row_sum}, {}, {}, {is_none};", real(0.0), real(part)));
            }
            Marker::Tile { tile, row, column, m } => {
                let at = At::Tile { row, column };
                let rows: Vec<u32> = tile.layout.offsets().iter().map(|&(row, _)| m + row).collect();
                for kept in self.kept.clone() {
                    if kept.is_of_tile() && kept.row().is_none_or(|row| rows.contains(&row)) {
                        let row = kept.row().unwrap_or(rows[0]);
                        self.print_kept(
                            kept,
                            Point {
                                at,
                                row,
                                column: 0,
                                product: "",
                            },
                            &mut scope,
                        );
                    }
                }
            }
            Marker::Head { head, batch } => {
                let point = Point {
                    at: At::Head { head, batch },
                    row: 0,
                    column: 0,
                    product: "",
                };
                for kept in self.kept.clone() {
                    if kept.is_of_head() {
                        self.print_kept(kept, point, &mut scope);
                    }
                }
            }
            Marker::Row { head, lse, delta } if self.code.sinks_gradient => {
                self.print_sink_gradient([head, lse, delta], &mut scope);
            }
            Marker::Hides { .. } | Marker::Start { .. } | Marker::Row { .. } => {}
        }
        (!scope.lines.is_empty()).then_some(scope)
    }

    fn print_scores(&mut self, kind: Kind, point: Point<'_>, scope: &mut Scope) {
        let register = point.product;
        match kind {
            Kind::Score => {
                let of_loads: Vec<NodeId> = self.code.loads.iter().map(|load| load.derivative).collect();
                let kept: BTreeSet<NodeId> = self.code.derivative.into_iter().chain(of_loads).collect();
                for derivative in kept
                    .into_iter()
                    .filter(|&node| self.is_of_score(node))
                    .collect::<Vec<_>>()
                {
                    let value = self.value(derivative, point, scope);
                    let kept = self.keep(Kept::Pair(derivative, point.row, point.column));
                    scope.put(format!("mov.f32 {kept}, {value};"));
                }
                if let Some(score) = self.code.score {
                    let value = self.value(score, point, scope);
                    scope.put(format!("mov.f32 {register}, {value};"));
                }
            }
            Kind::Mask | Kind::Hide => {
                if let Some(mask) = self.code.mask {
                    let visible = self.value(mask, point, scope);
                    let hidden = real(if kind == Kind::Mask { f32::NEG_INFINITY } else { 0.0 });
                    scope.put(format!("selp.f32 {register}, {register}, {hidden}, {visible};"));
                }
            }
            Kind::Gradient => self.print_gradient(point, scope),
            Kind::Weight => {}
        }
    }

    /// The gradient of the score that comes in, from that of the one that comes out. Where the latter is 0, so is the former: the
    /// derivative at a hidden pair may be anything.
    fn print_gradient(&mut self, point: Point<'_>, scope: &mut Scope) {
        let Some(derivative) = self.code.derivative else { return };
        if self.code.expression.node(derivative) == Node::Real(1.0_f32.to_bits()) {
            return;
        }
        let gradient = point.product;
        let derivative = if self.is_of_score(derivative) {
            self.keep(Kept::Pair(derivative, point.row, point.column))
        } else {
            self.value(derivative, point, scope)
        };
        let is_zero = scope.result(Class::Predicate, "setp.eq.f32", &[gradient, &real(0.0)]);
        let product = scope.result(Class::B32, "mul.rn.f32", &[gradient, &derivative]);
        scope.put(format!("selp.f32 {gradient}, {gradient}, {product}, {is_zero};"));
    }

    /// Adds what a pair adds to the gradients of tables to the `sums` of a marker, one for each address.
    fn sum_table_gradients(&mut self, point: Point<'_>, sums: &mut Vec<(String, String)>, scope: &mut Scope) {
        for LoadDerivative { load, derivative } in self.code.loads.clone() {
            let gradient = point.product;
            let part = if self.code.expression.node(derivative) == Node::Real(1.0_f32.to_bits()) {
                gradient.to_owned()
            } else {
                let derivative = if self.is_of_score(derivative) {
                    self.keep(Kept::Pair(derivative, point.row, point.column))
                } else {
                    self.value(derivative, point, scope)
                };
                let is_zero = scope.result(Class::Predicate, "setp.eq.f32", &[gradient, &real(0.0)]);
                let product = scope.result(Class::B32, "mul.rn.f32", &[gradient, &derivative]);
                scope.result(Class::B32, "selp.f32", &[&real(0.0), &product, &is_zero])
            };
            // Of queries that do not exist nothing is known.
            let exists = self.keep(Kept::Exists(point.row));
            let part = scope.result(Class::B32, "selp.f32", &[&part, &real(0.0), &exists]);
            let address = self.address(load, Memory::Gradient, point, scope);
            match sums.iter_mut().find(|(known, _)| *known == address) {
                Some((_, sum)) => *sum = scope.result(Class::B32, "add.rn.f32", &[sum, &part]),
                None => sums.push((address, part)),
            }
        }
    }

    /// What a query adds to the gradient of its head's sink, `-exp(sink - lse) * delta`.
    fn print_sink_gradient(&mut self, [head, lse, delta]: [&str; 3], scope: &mut Scope) {
        let address = self.slot(Slot::SinksAddress, Class::B64, scope);
        let stride = self.slot(Slot::SinksStride, Class::B32, scope);
        let address = scope.result(Class::B64, "mad.wide.u32", &[head, &stride, &address]);
        let sink = scope.result(Class::B32, "ld.global.nc.b32", &[&format!("[{address}]")]);
        let is_none = scope.result(Class::Predicate, "setp.eq.f32", &[&sink, &real(f32::NEG_INFINITY)]);
        let exponent = scope.result(Class::B32, "sub.rn.f32", &[&sink, lse]);
        let weight = self.exp(&exponent, scope);
        let weight = scope.result(Class::B32, "selp.f32", &[&real(0.0), &weight, &is_none]);
        let weight = scope.result(Class::B32, "neg.f32", &[&weight]);
        let part = scope.result(Class::B32, "mul.rn.f32", &[&weight, delta]);
        let gradients = self.slot(Slot::SinksGradient, Class::B64, scope);
        let address = scope.result(Class::B64, "mad.wide.u32", &[head, "4", &gradients]);
        scope.put(format!("red.global.add.f32 [{address}], {part};"));
    }

    /// Tells if a value depends on the score that comes in.
    fn is_of_score(&self, node: NodeId) -> bool {
        self.code.expression.dependence(node).contains(Dependence::SCORE)
    }

    /// Works out what a later marker finds.
    fn print_kept(&mut self, kept: Kept, point: Point<'_>, scope: &mut Scope) {
        let (value, class) = match kept {
            Kept::Head(node) | Kept::Row(node, _) | Kept::First(node, _) => {
                (self.value(node, point, scope), Class::of(self.type_of(node)))
            }
            Kept::FirstReal(index, _) => {
                let index = self.value(index, point, scope);
                (scope.result(Class::B32, "cvt.rn.f32.s32", &[&index]), Class::B32)
            }
            Kept::HeadAddress(load, memory) | Kept::RowAddress(load, memory, _) => {
                (self.base(load, memory, point, scope), Class::B64)
            }
            Kept::FirstAddress(load, memory, _) => (self.address(load, memory, point, scope), Class::B64),
            Kept::Sink => (self.sink(point, scope), Class::B32),
            Kept::Drawn(word) => (drawn(word, point, scope), Class::B32),
            Kept::Exists(_) => {
                let query = self.coordinate(Coordinate::Query, point, scope);
                let queries = self.slot(Slot::SeqlenQ, Class::B32, scope);
                (
                    scope.result(Class::Predicate, "setp.lt.s32", &[&query, &queries]),
                    Class::Predicate,
                )
            }
            Kept::Pair(..) => return,
        };
        scope.put(format!("mov.{} {}, {value};", class.spelled().0, kept.name()));
    }

    /// The logit of a head's sink, in the unit of scores.
    fn sink(&mut self, point: Point<'_>, scope: &mut Scope) -> String {
        let At::Head { head, .. } = point.at else {
            unreachable!("sinks are read at the head")
        };
        let address = self.slot(Slot::SinksAddress, Class::B64, scope);
        let stride = self.slot(Slot::SinksStride, Class::B32, scope);
        let address = scope.result(Class::B64, "mad.wide.u32", &[head, &stride, &address]);
        let sink = scope.result(Class::B32, "ld.global.nc.b32", &[&format!("[{address}]")]);
        if self.code.score.is_some() {
            return sink;
        }
        let inverse = self.slot(Slot::InverseScale, Class::B32, scope);
        scope.result(Class::B32, "mul.rn.f32", &[&sink, &inverse])
    }

    fn type_of(&self, node: NodeId) -> Type {
        self.code.expression.type_of(node)
    }

    fn stage(&self, node: NodeId) -> Stage {
        self.stages[node.index()]
    }

    pub fn keep(&mut self, kept: Kept) -> String {
        self.kept.insert(kept);
        kept.name()
    }

    /// A register with a number of the second parameter.
    pub fn slot(&mut self, slot: Slot, class: Class, scope: &mut Scope) -> String {
        let place = self.slots.iter().position(|known| *known == slot).unwrap_or_else(|| {
            self.slots.push(slot);
            self.slots.len() - 1
        });
        if let Some(register) = scope.slots.get(&place) {
            return register.clone();
        }
        let wide = if class == Class::B64 { Class::B64 } else { Class::B32 };
        let mut register = scope.register(wide);
        scope.put(load_slot(wide.spelled().0, &register, place));
        if class == Class::Predicate {
            register = scope.result(class, "setp.ne.b32", &[&register, "0"]);
        }
        scope.slots.insert(place, register.clone());
        register
    }

    /// A register, or a literal, with the value of a node.
    fn value(&mut self, node: NodeId, point: Point<'_>, scope: &mut Scope) -> String {
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
    fn scaled_product(&self, node: NodeId) -> Option<Vec<Factor>> {
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

    fn coordinate(&mut self, coordinate: Coordinate, point: Point<'_>, scope: &mut Scope) -> String {
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
            (Coordinate::KvHead, At::Head { head, .. }) => {
                let group = self.slot(Slot::HeadsPerKv, Class::B32, scope);
                scope.result(Class::B32, "div.u32", &[head, &group])
            }
            (coordinate, at) => unreachable!("{coordinate:?} is kept, and not worked out at {at:?}"),
        }
    }

    fn unary(&self, operation: Unary, type_: Type, x: &str, scope: &mut Scope) -> String {
        let is_score = type_ == Type::Score;
        let plain = |name: &str, scope: &mut Scope| scope.result(Class::B32, name, &[x]);
        match operation {
            Unary::Negate => plain(if is_score { "neg.f32" } else { "neg.s32" }, scope),
            Unary::Abs => plain(if is_score { "abs.f32" } else { "abs.s32" }, scope),
            Unary::Exp => self.exp(x, scope),
            Unary::Log => {
                let log2 = plain("lg2.approx.f32", scope);
                scope.result(Class::B32, "mul.rn.f32", &[&log2, &real(std::f32::consts::LN_2)])
            }
            Unary::Tanh => self.tanh(x, scope),
            Unary::Sqrt => plain("sqrt.approx.f32", scope),
            Unary::Reciprocal => plain("rcp.approx.f32", scope),
            Unary::Floor => plain("cvt.rmi.f32.f32", scope),
            Unary::ToScore => plain("cvt.rn.f32.s32", scope),
            Unary::ToIndex => plain("cvt.rmi.s32.f32", scope),
            Unary::Not if type_ == Type::Truth => scope.result(Class::Predicate, "not.pred", &[x]),
            Unary::Not => plain("not.b32", scope),
        }
    }

    /// e^x. The rounding of `x * log2(e)` is made good where results are to be exact.
    fn exp(&self, x: &str, scope: &mut Scope) -> String {
        let log2_e = real(std::f32::consts::LOG2_E);
        let exponent = scope.result(Class::B32, "mul.rn.f32", &[x, &log2_e]);
        scope.result(Class::B32, "ex2.approx.f32", &[&exponent])
    }

    /// The hyperbolic tangent. `tanh.approx` is right to 2^-11, as 16-bit scores are; else `1 - 2 / (1 + e^2x)`.
    fn tanh(&self, x: &str, scope: &mut Scope) -> String {
        if !self.exact {
            return scope.result(Class::B32, "tanh.approx.f32", &[x]);
        }
        let exponent = scope.result(Class::B32, "mul.rn.f32", &[x, &real(2.0 * std::f32::consts::LOG2_E)]);
        let power = scope.result(Class::B32, "ex2.approx.f32", &[&exponent]);
        let sum = scope.result(Class::B32, "add.rn.f32", &[&power, &real(1.0)]);
        let inverse = scope.result(Class::B32, "rcp.approx.f32", &[&sum]);
        scope.result(Class::B32, "fma.rn.f32", &[&inverse, &real(-2.0), &real(1.0)])
    }

    fn binary(&mut self, operation: Binary, x: NodeId, y: NodeId, point: Point<'_>, scope: &mut Scope) -> String {
        match self.type_of(x) {
            Type::Score => self.binary_of_scores(operation, x, y, point, scope),
            Type::Index => {
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                binary_of_indices(operation, &x, &y, scope)
            }
            Type::Truth => {
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                let name = match operation {
                    Binary::And => "and.pred",
                    Binary::Or => "or.pred",
                    Binary::Xor => "xor.pred",
                    _ => unreachable!("{operation:?} of truths is not traced"),
                };
                scope.result(Class::Predicate, name, &[&x, &y])
            }
        }
    }

    fn binary_of_scores(
        &mut self,
        operation: Binary,
        x: NodeId,
        y: NodeId,
        point: Point<'_>,
        scope: &mut Scope,
    ) -> String {
        let name = match operation {
            Binary::Add | Binary::Subtract => {
                let signs = if operation == Binary::Add {
                    (false, false)
                } else {
                    (false, true)
                };
                for (product, other, minus, less) in [(x, y, signs.0, signs.1), (y, x, signs.1, signs.0)] {
                    if let Some([a, b]) = self.product(product, minus, point, scope) {
                        let mut other = self.value(other, point, scope);
                        if less {
                            other = scope.result(Class::B32, "neg.f32", &[&other]);
                        }
                        return scope.result(Class::B32, "fma.rn.f32", &[&a, &b, &other]);
                    }
                }
                if operation == Binary::Add {
                    "add.rn.f32"
                } else {
                    "sub.rn.f32"
                }
            }
            Binary::Multiply => "mul.rn.f32",
            Binary::Divide if self.stage(y) == Stage::Call => {
                let x = self.value(x, point, scope);
                let inverse = self.slot(Slot::Product(vec![Factor::Inverse(y)]), Class::B32, scope);
                return scope.result(Class::B32, "mul.rn.f32", &[&x, &inverse]);
            }
            Binary::Divide => "div.full.f32",
            Binary::Min => "min.f32",
            Binary::Max => "max.f32",
            _ => unreachable!("{operation:?} of scores is not traced"),
        };
        let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
        scope.result(Class::B32, name, &[&x, &y])
    }

    /// The factors of a value that is a product used once, worked out at this point, to be summed in the same instruction;
    /// the first negated if `minus`.
    fn product(&mut self, node: NodeId, minus: bool, point: Point<'_>, scope: &mut Scope) -> Option<[String; 2]> {
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

    fn indices(&self, load: NodeId) -> (u32, Indices, bool) {
        match self.code.expression.node(load) {
            Node::Load {
                table,
                indices,
                clamped,
            } => (table, indices, clamped),
            node => unreachable!("{node:?} is no load"),
        }
    }

    /// How the axes of a table lie.
    fn layout(&self, table: u32, memory: Memory) -> &'a [Axis] {
        match memory {
            Memory::Elements => &self.code.axes[table as usize],
            Memory::Gradient => &self.code.gradient_axes[table as usize],
        }
    }

    /// Bytes of an element.
    fn element_bytes(&self, table: u32, memory: Memory) -> usize {
        match memory {
            Memory::Elements => self.code.expression.tables()[table as usize].element.bytes(),
            Memory::Gradient => size_of::<f32>(),
        }
    }

    /// Axes of a load whose index is worked out at these stages, and matters.
    fn axes(&self, load: NodeId, memory: Memory, stages: &[Stage]) -> Vec<usize> {
        let (table, indices, _) = self.indices(load);
        let axes = self.layout(table, memory);
        let wanted = |&axis: &usize| axes[axis] != Axis::Repeated && stages.contains(&self.stage(indices[axis]));
        (0..indices.len()).filter(wanted).collect()
    }

    /// Address of the element that a load reads, as an operand without brackets; at the tile, that of its first key.
    fn address(&mut self, load: NodeId, memory: Memory, point: Point<'_>, scope: &mut Scope) -> String {
        let (table, indices, clamped) = self.indices(load);
        let axes = self.axes(load, memory, &[Stage::Column, Stage::Pair]);
        if let (At::Scores { edge: false }, &[axis], false) = (point.at, &axes[..], clamped)
            && self.layout(table, memory)[axis] == Axis::Adjacent
            && self.stage(indices[axis]) == Stage::Column
            && let Some(Affine { step, .. }) = self.affine[indices[axis].index()]
        {
            let of_row = !self.axes(load, memory, &[Stage::Row]).is_empty();
            let first = self.keep(Kept::FirstAddress(load, memory, of_row.then_some(point.row)));
            let bytes = self.element_bytes(table, memory) as i64;
            return format!("{first}+{}", i64::from(step) * i64::from(point.column) * bytes);
        }
        let place = place_of(self.stage(load), point);
        if let Some(address) = scope.addresses.get(&(load, memory, place)) {
            return address.clone();
        }
        let base = match point.at {
            At::Scores { .. } if !self.axes(load, memory, &[Stage::Row]).is_empty() => {
                self.keep(Kept::RowAddress(load, memory, point.row))
            }
            At::Scores { .. } | At::Tile { .. } if self.axes(load, memory, &[Stage::Row]).is_empty() => {
                self.keep(Kept::HeadAddress(load, memory))
            }
            _ => self.base(load, memory, point, scope),
        };
        let along = |base, axis| self.step_along((load, memory), axis, base, point, scope);
        let address = axes.into_iter().fold(base, along);
        scope.addresses.insert((load, memory, place), address.clone());
        address
    }

    /// Address of a table's element at index 0 of the axes that the key gives; at the head, of those that the query gives too.
    fn base(&mut self, load: NodeId, memory: Memory, point: Point<'_>, scope: &mut Scope) -> String {
        let (table, ..) = self.indices(load);
        let (base, stages): (_, &[_]) = if let At::Head { .. } = point.at {
            (
                self.slot(Slot::Address(table, memory), Class::B64, scope),
                &[Stage::Call, Stage::Head],
            )
        } else {
            (self.keep(Kept::HeadAddress(load, memory)), &[Stage::Row])
        };
        let axes = self.axes(load, memory, stages);
        let along = |base, axis| self.step_along((load, memory), axis, base, point, scope);
        axes.into_iter().fold(base, along)
    }

    /// An address moved to the index along an axis.
    fn step_along(
        &mut self,
        (load, memory): (NodeId, Memory),
        axis: usize,
        base: String,
        point: Point<'_>,
        scope: &mut Scope,
    ) -> String {
        let (table, ..) = self.indices(load);
        let index = self.index(load, axis, point, scope);
        let stride = Slot::Stride(table, axis as u32, memory);
        match self.layout(table, memory)[axis] {
            Axis::Repeated => base,
            Axis::Adjacent => {
                let bytes = self.element_bytes(table, memory).to_string();
                scope.result(Class::B64, "mad.wide.u32", &[&index, &bytes, &base])
            }
            Axis::Near => {
                let stride = self.slot(stride, Class::B32, scope);
                scope.result(Class::B64, "mad.wide.u32", &[&index, &stride, &base])
            }
            Axis::Far => {
                let stride = self.slot(stride, Class::B64, scope);
                let index = scope.result(Class::B64, "cvt.u64.u32", &[&index]);
                scope.result(Class::B64, "mad.lo.u64", &[&index, &stride, &base])
            }
        }
    }

    /// The index along an axis, inside the table. One that queries or keys past the end may move outside is moved back in.
    fn index(&mut self, load: NodeId, axis: usize, point: Point<'_>, scope: &mut Scope) -> String {
        let (table, indices, clamped) = self.indices(load);
        let stage = self.stage(indices[axis]);
        let index = self.value(indices[axis], point, scope);
        let last = Slot::LastIndex(table, axis as u32);
        if clamped {
            let last = self.slot(last, Class::B32, scope);
            let index = scope.result(Class::B32, "max.s32", &[&index, "0"]);
            return scope.result(Class::B32, "min.s32", &[&index, &last]);
        }
        let exists = match stage {
            Stage::Call | Stage::Head => true,
            Stage::Row | Stage::Pair => false,
            // At the tile, the first column of a whole tile; an edge does not use it.
            Stage::Column => !matches!(point.at, At::Scores { edge: true }),
        };
        if exists {
            return index;
        }
        let last = self.slot(last, Class::B32, scope);
        scope.result(Class::B32, "min.u32", &[&index, &last])
    }
}

/// The literal of an f32.
pub(super) fn real(x: f32) -> String {
    format!("0f{:08X}", x.to_bits())
}

/// A word that the generator counts, from the coordinates of a marker.
fn drawn(word: Word, point: Point<'_>, scope: &mut Scope) -> String {
    let coordinates = match point.at {
        At::Head { head, batch } => [head, batch, "", ""],
        At::Tile { row, column } => ["", "", row, column],
        at => unreachable!("{word:?} is not worked out at {at:?}"),
    };
    word.print(coordinates, scope)
}

fn place_of(stage: Stage, point: Point<'_>) -> Place {
    match stage {
        Stage::Call | Stage::Head => Place::All,
        Stage::Row => Place::Row(point.row),
        Stage::Column => Place::Column(point.column),
        Stage::Pair => Place::Pair(point.row, point.column),
    }
}

/// Where a node is worked out, from where those before it are.
fn stage_of(node: Node, stages: &[Stage], transposed: bool) -> Stage {
    let operands = node
        .operands()
        .map(|operand| stages[operand.index()])
        .fold(Stage::Call, Stage::with);
    match node {
        Node::Score => Stage::Pair,
        Node::Coordinate(Coordinate::SeqlenQ | Coordinate::SeqlenK) => Stage::Call,
        Node::Coordinate(Coordinate::Batch | Coordinate::Head | Coordinate::KvHead) => Stage::Head,
        Node::Coordinate(which) if (which == Coordinate::Query) != transposed => Stage::Row,
        Node::Coordinate(_) => Stage::Column,
        Node::Load { .. } => operands.with(Stage::Head),
        _ => operands,
    }
}

/// How a node grows with the column, if it does so evenly.
fn affine_of(node: Node, type_: Type, stages: &[Stage], affine: &[Option<Affine>], transposed: bool) -> Option<Affine> {
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

fn binary_of_indices(operation: Binary, x: &str, y: &str, scope: &mut Scope) -> String {
    let name = match operation {
        Binary::Add => "add.s32",
        Binary::Subtract => "sub.s32",
        Binary::Multiply => "mul.lo.s32",
        Binary::Min => "min.s32",
        Binary::Max => "max.s32",
        Binary::And => "and.b32",
        Binary::Or => "or.b32",
        Binary::Xor => "xor.b32",
        Binary::Divide | Binary::Remainder => return euclid(operation, x, y, scope),
        Binary::ShiftLeft | Binary::ShiftRight => {
            let by = scope.result(Class::B32, "and.b32", &[y, "31"]);
            let name = if operation == Binary::ShiftLeft {
                "shl.b32"
            } else {
                "shr.s32"
            };
            return scope.result(Class::B32, name, &[x, &by]);
        }
    };
    scope.result(Class::B32, name, &[x, y])
}

/// The Euclidean quotient or remainder, for a positive divisor.
fn euclid(operation: Binary, x: &str, y: &str, scope: &mut Scope) -> String {
    let quotient = scope.result(Class::B32, "div.s32", &[x, y]);
    let product = scope.result(Class::B32, "mul.lo.s32", &[&quotient, y]);
    let rest = scope.result(Class::B32, "sub.s32", &[x, &product]);
    let below = scope.result(Class::Predicate, "setp.lt.s32", &[&rest, "0"]);
    let (value, name, by) = match operation {
        Binary::Divide => (quotient, "sub.s32", "1"),
        _ => (rest, "add.s32", y),
    };
    let moved = scope.result(Class::B32, name, &[&value, by]);
    scope.result(Class::B32, "selp.b32", &[&moved, &value, &below])
}

/// Reads an element.
fn load(element: DataType, address: &str, scope: &mut Scope) -> String {
    let address = format!("[{address}]");
    match element {
        DataType::F32 | DataType::I32 | DataType::U32 => scope.result(Class::B32, "ld.global.nc.b32", &[&address]),
        DataType::F16 => {
            let half = scope.result(Class::B16, "ld.global.nc.b16", &[&address]);
            scope.result(Class::B32, "cvt.f32.f16", &[&half])
        }
        DataType::Bf16 => {
            let half = scope.result(Class::B32, "ld.global.nc.u16", &[&address]);
            scope.result(Class::B32, "shl.b32", &[&half, "16"])
        }
    }
}
