//! Undefined values on their way between memory and registers. [`definedness`](crate::check::definedness) determines
//! the effect of instructions on them and the findings.

use super::Cluster;
use super::access::Target;
use super::bulk::End;
use super::warp::{Frame, Lanes, Warp};
use crate::check::definedness::{Registers, Shadow};
use crate::check::event::Actor;
use crate::isa::Instr;
use crate::isa::types::{Pred, Slot};
use crate::memory::origin::{Origin, bits_of_bytes, bytes_of_bits};
use crate::report::FindingKind;
use crate::tensor::matrix::{self, Matrix};

impl Registers for Frame {
    fn value(&self, slot: Slot) -> &Lanes {
        self.row(slot)
    }

    fn predicate(&self, slot: Slot) -> u32 {
        self.pred(Pred { slot, negated: false })
    }
}

impl Frame {
    /// Returns the undefined bits among the lowest bytes of a register in one lane, if there are any.
    #[inline]
    pub fn undefined(&self, slot: Slot, lane: usize, bytes: usize) -> Option<(u64, Origin)> {
        let row = self.shadow.as_ref()?.row(slot);
        let bits = row.bits[lane] & u64::MAX >> (64 - 8 * bytes);
        (bits != 0).then_some((bits, row.origin[lane]))
    }

    /// Returns the undefined bits of an 8x8 matrix of 16-bit elements that the warp holds in a register, if there are
    /// any.
    pub fn undefined_tile(&self, slot: Slot, trans: bool) -> Option<(Matrix, Origin)> {
        let row = self.shadow.as_ref()?.row(slot);
        let lane = row.bits.iter().position(|bits| *bits != 0)?;
        let tile = matrix::collect(&row.bits.map(|bits| bits as u32), trans);
        Some((tile, row.origin[lane]))
    }

    /// Makes these bits of a register undefined in one lane.
    #[cold]
    pub fn set_undefined(&mut self, slot: Slot, lane: usize, bits: u64, origin: Origin) {
        let shadow = self.shadow.get_or_insert_with(Box::default);
        shadow.set(slot, lane, bits, origin);
    }
}

impl<'m> Cluster<'m> {
    /// Tracks the undefined registers of the current frame through an instruction that is about to be executed.
    #[cold]
    pub(super) fn follow(&mut self, warp: &mut Warp, instr: &Instr) {
        let group = warp.group().mask;
        let frame = warp.frame_mut();
        let Some(mut shadow) = frame.shadow.take() else {
            return;
        };
        let mut found = Vec::new();
        Shadow::execute(&mut shadow, frame, instr, group, &mut found);
        if !shadow.is_clear() {
            frame.shadow = Some(shadow);
        }
        let actor = self.actor(warp);
        for used in found {
            self.report_undefined(actor, instr.line, used.lane, used.origin, used.what);
        }
    }

    pub(super) fn report_undefined(&mut self, actor: Actor, line: u32, lane: usize, origin: Origin, what: &str) {
        let from = if origin.computed {
            "was computed from"
        } else {
            "comes from"
        };
        self.report(FindingKind::Uninitialized, line, actor, (Some(lane), None), || {
            let read = origin.line;
            format!("a value that {what} {from} bytes that were never written, read at line {read}")
        });
    }

    /// Returns true if the check is on and any byte of a range is undefined.
    #[inline]
    pub(super) fn lacks(&self, warp: &Warp, lane: usize, target: Target, bytes: usize) -> bool {
        self.ctx.checks.uninitialized && self.first_undefined(warp, lane, target, 0, bytes).is_some()
    }

    #[inline]
    fn first_undefined(&self, warp: &Warp, lane: usize, target: Target, offset: usize, bytes: usize) -> Option<usize> {
        let first = match target {
            Target::Global { allocation, at } => {
                let memory = &self.ctx.view.allocations[allocation];
                memory.first_uninitialized(at + offset, bytes).map(|m| m - at)
            }
            Target::Shared { cta, at } => {
                let memory = &self.ctas[cta].shared;
                memory.first_uninitialized(at + offset, bytes).map(|m| m - at)
            }
            Target::Local { at } => {
                let memory = &warp.local;
                memory.first_uninitialized(lane, at + offset, bytes).map(|m| m - at)
            }
            Target::Param { .. } => None,
        };
        first.map(|first| first - offset)
    }

    /// Returns the undefined bits of up to 8 bytes at an offset from the location of an access, read at `line`.
    #[cold]
    pub(super) fn undefined(
        &self,
        warp: &Warp,
        lane: usize,
        target: Target,
        range: (usize, usize),
        line: u32,
    ) -> (u64, Origin) {
        let (offset, bytes) = range;
        let missing = (0..bytes).filter(|i| self.first_undefined(warp, lane, target, offset + i, 1).is_some());
        let missing = missing.fold(0, |m: u8, i| m | 1 << i);
        let origin = match target {
            Target::Shared { cta, at } => self.ctas[cta].shared.origin(at + offset, bytes),
            Target::Local { at } => warp.local.origin(lane, at + offset, bytes),
            Target::Global { .. } | Target::Param { .. } => None,
        };
        let fresh = Origin { line, computed: false };
        (bits_of_bytes(missing), origin.unwrap_or(fresh))
    }

    /// Marks these bits of a value that was just stored, at an offset from the location of an access, as undefined.
    /// In global memory this is a finding unless the value was only moved.
    #[cold]
    pub(super) fn stain(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        target: Target,
        offset: usize,
        undefined: (u64, Origin),
    ) {
        let (bits, origin) = undefined;
        if bits == 0 {
            return;
        }
        let bytes = bytes_of_bits(bits);
        for index in (0..8).filter(|i| bytes >> i & 1 != 0) {
            match target {
                Target::Global { allocation, at } if !origin.computed => {
                    self.ctx.view.allocations[allocation].unmark(at + offset + index);
                }
                Target::Shared { cta, at } => self.ctas[cta].shared.unmark(at + offset + index, origin),
                Target::Local { at } => warp.local.unmark(lane, at + offset + index, origin),
                Target::Global { .. } | Target::Param { .. } => {}
            }
        }
        if origin.computed && matches!(target, Target::Global { .. }) {
            let what = "is stored in global memory";
            self.report_undefined(self.actor(warp), instr.line, lane, origin, what);
        }
    }

    /// Copies the definedness of bytes that an asynchronous copy has moved.
    pub(super) fn copy_undefined(&mut self, from: End, to: End, bytes: usize, line: u32) {
        for index in self.undefined_bytes(from, bytes) {
            let fresh = Origin { line, computed: false };
            let origin = match from {
                End::Shared(cta, at) => self.ctas[cta].shared.origin(at + index, 1),
                _ => None,
            };
            self.unmark(to, index, origin.unwrap_or(fresh));
        }
    }

    /// Makes a byte at an offset from one end of a copy undefined.
    pub(super) fn unmark(&mut self, end: End, index: usize, origin: Origin) {
        match end {
            End::Global(allocation, at) => self.ctx.view.allocations[allocation].unmark(at + index),
            End::Shared(cta, at) => self.ctas[cta].shared.unmark(at + index, origin),
            End::Fill(_) | End::Value(_) => {}
        }
    }

    /// Returns the offsets of the undefined bytes at one end of a copy, if the check is on.
    pub(super) fn undefined_bytes(&self, end: End, bytes: usize) -> Vec<usize> {
        let first = |offset: usize, bytes: usize| match end {
            End::Global(allocation, at) => {
                self.ctx.view.allocations[allocation].first_uninitialized(at + offset, bytes)
            }
            End::Shared(cta, at) => self.ctas[cta].shared.first_uninitialized(at + offset, bytes),
            End::Fill(_) | End::Value(_) => None,
        };
        if !self.ctx.checks.uninitialized || first(0, bytes).is_none() {
            return Vec::new();
        }
        (0..bytes).filter(|index| first(*index, 1).is_some()).collect()
    }
}
