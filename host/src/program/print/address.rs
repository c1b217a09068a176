//! Addresses of the elements of tables and of their gradients.

use crate::program::scope::{Class, Scope};
use crate::program::text::{Axis, Memory, Slot};
use crate::program::{DataType, Indices, Node, NodeId};

use super::kept::Kept;
use super::stage::{Affine, Stage};
use super::value::place_of;
use super::{At, Point, Printer};

impl<'a> Printer<'a> {
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

    /// Layout of a table's axes.
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
    pub(super) fn address(&mut self, load: NodeId, memory: Memory, point: Point<'_>, scope: &mut Scope) -> String {
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
    pub(super) fn base(&mut self, load: NodeId, memory: Memory, point: Point<'_>, scope: &mut Scope) -> String {
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

/// Reads an element.
pub(super) fn load(element: DataType, address: &str, scope: &mut Scope) -> String {
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
        DataType::F8E4M3 => unreachable!("no `Readable` has this type"),
    }
}
