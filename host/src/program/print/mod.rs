//! An expression as PTX, for one marker at a time.
//!
//! Each value is computed where that happens least often. The host computes a value that is the same for every pair, a [`Slot`] of the
//! kernel's second parameter. A value that depends on the head is computed at `head`; one that depends on the row of a tile at `tile`,
//! once for each of the lane's rows. One that is affine in the column is computed there for the first column, and each score adds a
//! literal. All others are computed for each score, or for each column if they depend on that alone. Rows are queries and columns are
//! keys, or the other way round in a kernel that owns keys. Values pass from marker to marker in registers that are declared at the top
//! of the kernel; each marker has a scope for its own.
//!
//! Queries and keys that do not exist reach a program too: indices into tables are moved inside.

mod address;
mod gradient;
mod kept;
mod operation;
mod stage;
mod value;

use std::collections::BTreeSet;

use flash_attention_kernels::program::{Kind, Marker, Tile};

use super::scope::{Class, Scope};
use super::splice::load_slot;
use super::text::{Code, Slot};
use super::{Dependence, NodeId, Type, generator};

pub(super) use kept::Kept;
use stage::{Affine, Stage, affine_of, stage_of};

/// Pair, or place of a marker, that a value is computed for.
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

impl<'a> Point<'a> {
    /// The first pair of a place, without a product.
    fn first(at: At<'a>) -> Self {
        Self {
            at,
            row: 0,
            column: 0,
            product: "",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum At<'a> {
    Head {
        head: &'a str,
        batch: &'a str,
        seqlen_q: &'a str,
        seqlen_k: &'a str,
    },
    /// The first pair of the lane's part of a tile.
    Tile { row: &'a str, column: &'a str },
    /// `edge` if columns may lie past the end.
    Scores { edge: bool },
    /// One pair. Only values of its head are kept for it.
    Single { query: &'a str, key: &'a str },
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
            let stage = stage_of(node, &stages, transposed, code.of_sequences);
            stages.push(stage);
            affine.push(affine_of(
                node,
                code.expression.type_of(id),
                &stages,
                &affine,
                transposed,
            ));
        }
        let of_loads = code.loads.iter().flat_map(|load| [load.load, load.derivative]);
        let roots = [code.score, code.mask, code.derivative].into_iter().flatten();
        let uses = code.expression.uses(roots.chain(of_loads));
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

    /// True if each sequence has lengths of its own, which come with the head.
    pub fn of_sequences(&self) -> bool {
        self.code.of_sequences
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
            Kept::FirstReal(..) | Kept::Sink | Kept::Drawn(_) | Kept::SeqlenQ => Class::B32,
            Kept::HeadAddress(..) | Kept::RowAddress(..) | Kept::FirstAddress(..) => Class::B64,
            Kept::Exists(_) => Class::Predicate,
        };
        let declare = |kept: &Kept| format!("\t.reg .{} {};", class(kept).spelled().0, kept.name());
        self.kept.iter().map(declare).collect()
    }

    /// Prints the code in place of a marker, if it needs any. Markers of scores come first, markers of heads last.
    pub fn print(&mut self, marker: &Marker<'_>) -> Option<Scope> {
        let mut scope = Scope::default();
        match *marker {
            Marker::Scores {
                kind: Kind::Weight,
                tile,
                ref registers,
                m,
                n,
            } if self.code.dropout => generator::print(self, tile, registers, [m, n], &mut scope),
            Marker::Scores {
                kind,
                tile,
                ref registers,
                m,
                n,
            } => self.print_scores(kind, tile, registers, [m, n], &mut scope),
            Marker::Hides { flag } if self.code.mask.is_some() => scope.put(format!("mov.b32 {flag}, 1;")),
            Marker::Visible { flag, query, key } => self.print_visible([flag, query, key], &mut scope),
            Marker::Start { row_max, row_sum } if self.code.sinks => self.print_start([row_max, row_sum], &mut scope),
            Marker::Tile { tile, row, column, m } => self.print_tile(tile, [row, column], m, &mut scope),
            Marker::Head {
                head,
                batch,
                seqlen_q,
                seqlen_k,
            } => {
                let point = Point::first(At::Head {
                    head,
                    batch,
                    seqlen_q,
                    seqlen_k,
                });
                for kept in self.kept.clone().into_iter().filter(|kept| kept.is_of_head()) {
                    self.print_kept(kept, point, &mut scope);
                }
            }
            Marker::Row { head, lse, delta } if self.code.sinks_gradient => {
                self.print_sink_gradient([head, lse, delta], &mut scope);
            }
            Marker::Hides { .. } | Marker::Start { .. } | Marker::Row { .. } => {}
        }
        (!scope.lines.is_empty()).then_some(scope)
    }

    /// Changes the scores of a marker, `m` rows and `n` columns beyond the tile's first pair.
    fn print_scores(&mut self, kind: Kind, tile: Tile, registers: &[&str; 8], [m, n]: [u32; 2], scope: &mut Scope) {
        let mut sums = Vec::new();
        for (&(row, column), product) in tile.layout.offsets().iter().zip(registers) {
            let point = Point {
                at: At::Scores { edge: tile.edge },
                row: m + row,
                column: n + column,
                product,
            };
            match kind {
                Kind::Score => self.print_score(point, scope),
                Kind::Mask => self.print_mask(f32::NEG_INFINITY, point, scope),
                Kind::Hide => self.print_mask(0.0, point, scope),
                Kind::Gradient => {
                    // Kernels that own keys work out the same gradients once more.
                    if !tile.transposed {
                        self.sum_table_gradients(point, &mut sums, scope);
                    }
                    self.print_gradient(point, scope);
                }
                Kind::Weight => {}
            }
        }
        self.add_table_gradients(sums, scope);
    }

    /// The score that the softmax takes, after what backward needs of the one that comes in.
    fn print_score(&mut self, point: Point<'_>, scope: &mut Scope) {
        let of_loads = self.code.loads.iter().map(|load| load.derivative);
        let derivatives: BTreeSet<NodeId> = self.code.derivative.into_iter().chain(of_loads).collect();
        for derivative in derivatives {
            if self.is_of_score(derivative) {
                let value = self.value(derivative, point, scope);
                let kept = self.keep(Kept::Pair(derivative, point.row, point.column));
                scope.put(format!("mov.f32 {kept}, {value};"));
            }
        }
        if let Some(score) = self.code.score {
            let value = self.value(score, point, scope);
            scope.put(format!("mov.f32 {}, {value};", point.product));
        }
    }

    /// Replaces what the mask hides.
    fn print_mask(&mut self, hidden: f32, point: Point<'_>, scope: &mut Scope) {
        let Some(mask) = self.code.mask else { return };
        let register = point.product;
        let visible = self.value(mask, point, scope);
        scope.put(format!("selp.f32 {register}, {register}, {}, {visible};", real(hidden)));
    }

    /// Sets a flag to 1 if a pair is visible, else to 0.
    fn print_visible(&mut self, [flag, query, key]: [&str; 3], scope: &mut Scope) {
        if let Some(mask) = self.code.mask {
            let visible = self.value(mask, Point::first(At::Single { query, key }), scope);
            scope.put(format!("selp.b32 {flag}, 1, 0, {visible};"));
        }
    }

    /// Starts a row with its head's sink. Each lane of a row has its part of the sink's weight, 1.
    fn print_start(&mut self, [row_max, row_sum]: [&str; 2], scope: &mut Scope) {
        let sink = self.keep(Kept::Sink);
        let lanes = self.tile.map_or(1, |tile| tile.layout.lanes_of_row());
        let part = 1.0 / lanes as f32;
        let is_none = scope.result(Class::Predicate, "setp.eq.f32", &[&sink, &real(f32::NEG_INFINITY)]);
        scope.put(format!("mov.b32 {row_max}, {sink};"));
        scope.put(format!("selp.f32 {row_sum}, {}, {}, {is_none};", real(0.0), real(part)));
    }

    /// Works out what later markers of a tile find: once, and once for each of the lane's rows, `m` beyond the tile's first.
    fn print_tile(&mut self, tile: Tile, [row, column]: [&str; 2], m: u32, scope: &mut Scope) {
        let rows: Vec<u32> = tile.layout.offsets().iter().map(|&(row, _)| m + row).collect();
        for kept in self.kept.clone().into_iter().filter(|kept| kept.is_of_tile()) {
            let of_row = kept.row().unwrap_or(rows[0]);
            if rows.contains(&of_row) {
                let point = Point {
                    row: of_row,
                    ..Point::first(At::Tile { row, column })
                };
                self.print_kept(kept, point, scope);
            }
        }
    }

    /// Tells if a value depends on the score that comes in.
    fn is_of_score(&self, node: NodeId) -> bool {
        self.code.expression.dependence(node).contains(Dependence::SCORE)
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
}

/// The literal of an f32.
pub(super) fn real(x: f32) -> String {
    format!("0f{:08X}", x.to_bits())
}
