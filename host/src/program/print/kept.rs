//! [`Kept`], the values that pass from marker to marker in registers, and the code that works them out.

use crate::program::generator::Word;
use crate::program::scope::{Class, Scope};
use crate::program::text::{Memory, Slot};
use crate::program::{Coordinate, NodeId};

use super::{At, Point, Printer};

/// A value that a marker finds in a register because an earlier one put it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::program) enum Kept {
    /// A value of the head.
    Head(NodeId),
    /// Address of a table's element at index 0 of the axes that the head does not give.
    HeadAddress(NodeId, Memory),
    /// The logit of the head's sink.
    Sink,
    /// Word of the counter, or of the key, of dropout's generator.
    Drawn(Word),
    /// Queries of the sequence.
    SeqlenQ,
    /// A value of a row.
    Row(NodeId, u32),
    /// Value of a row, or of the tile, at the tile's first column.
    First(NodeId, Option<u32>),
    /// An index of a row, or of the tile, at the tile's first column, as a score.
    FirstReal(NodeId, Option<u32>),
    /// Address of a table's element for a row, at index 0 of the axes that the column gives.
    RowAddress(NodeId, Memory, u32),
    /// Address of a table's element at the tile's first column, for a row or for the tile.
    FirstAddress(NodeId, Memory, Option<u32>),
    /// True if the query of a row exists.
    Exists(u32),
    /// A value of a pair, kept from its score to its gradient.
    Pair(NodeId, u32, u32),
}

impl Kept {
    /// Row, for those of one.
    pub(super) fn row(self) -> Option<u32> {
        match self {
            Self::Row(_, row) | Self::RowAddress(_, _, row) | Self::Exists(row) => Some(row),
            Self::First(_, row) | Self::FirstReal(_, row) | Self::FirstAddress(_, _, row) => row,
            Self::Drawn(word) => word.row(),
            Self::Head(_) | Self::HeadAddress(..) | Self::Sink | Self::SeqlenQ | Self::Pair(..) => None,
        }
    }

    pub(super) fn is_of_head(self) -> bool {
        match self {
            Self::Head(_) | Self::HeadAddress(..) | Self::Sink | Self::SeqlenQ => true,
            Self::Drawn(word) => word.is_of_head(),
            _ => false,
        }
    }

    pub(super) fn is_of_tile(self) -> bool {
        !self.is_of_head() && !matches!(self, Self::Pair(..))
    }

    pub(super) fn name(self) -> String {
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
            Self::SeqlenQ => "%score_seqlen_q".to_owned(),
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

impl Printer<'_> {
    /// Works out what a later marker finds.
    pub(super) fn print_kept(&mut self, kept: Kept, point: Point<'_>, scope: &mut Scope) {
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
            Kept::Drawn(word) => (self.drawn(word, point, scope), Class::B32),
            Kept::SeqlenQ => match point.at {
                At::Head { seqlen_q, .. } => (seqlen_q.to_owned(), Class::B32),
                at => unreachable!("lengths are not given at {at:?}"),
            },
            Kept::Exists(_) => {
                let query = self.coordinate(Coordinate::Query, point, scope);
                let queries = if self.of_sequences() {
                    self.keep(Kept::SeqlenQ)
                } else {
                    self.slot(Slot::SeqlenQ, Class::B32, scope)
                };
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
        let sink = self.load_sink(head, scope);
        if self.code.score.is_some() {
            return sink;
        }
        let inverse = self.slot(Slot::InverseScale, Class::B32, scope);
        scope.result(Class::B32, "mul.rn.f32", &[&sink, &inverse])
    }

    /// A word of the generator, from the coordinates of a marker.
    fn drawn(&mut self, word: Word, point: Point<'_>, scope: &mut Scope) -> String {
        let coordinates = match point.at {
            At::Head { head, batch, .. } => [head, batch, "", ""],
            At::Tile { row, column } => ["", "", row, column],
            at => unreachable!("{word:?} is not worked out at {at:?}"),
        };
        word.print(coordinates, self, scope)
    }
}
