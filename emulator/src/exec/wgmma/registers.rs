//! Ownership of registers while products are in flight: a register of a product must not be accessed before its wait.

use super::Cluster;
use crate::error::Error;
use crate::exec::warp::Warp;
use crate::isa::types::Slot;
use crate::isa::{Alu, Instr, Int2, Int3, Op, Wgmma, WgmmaA};
use crate::report::FindingKind;

/// Rows of registers that a product owns.
#[derive(Debug, Clone)]
pub(super) struct Owned {
    pub(super) frame: u32,
    pub(super) rows: Box<[Slot]>,
    pub(super) role: Role,
    pub(super) step: u32,
    pub(super) line: u32,
}

/// Role of a register in a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Accumulator: must be neither read nor written.
    Accumulator,
    /// Operand: must not be written.
    Operand,
    /// Copy of an accumulator, made before the wait: must not be read.
    Copy,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Accumulator => "an accumulator",
            Role::Operand => "an operand register",
            Role::Copy => "a copy of an accumulator",
        }
    }
}

/// Returns true if an instruction only moves registers, whole or in parts.
fn moves_registers(instr: &Instr) -> bool {
    let moves = matches!(
        &instr.op,
        Op::Alu(Alu::Mov { .. } | Alu::Pack { .. } | Alu::Unpack { .. })
    );
    moves && !instr.reads.is_empty()
}

/// Returns true if an instruction only moves bits, for example takes halves out of words or puts them together.
fn moves_bits(instr: &Instr) -> bool {
    match &instr.op {
        Op::Alu(Alu::Cvt { to, from, .. }) => to.int().is_some() && from.int().is_some(),
        Op::Alu(Alu::Int2 { op, .. }) => matches!(op, Int2::Shl | Int2::Shr | Int2::And | Int2::Or),
        Op::Alu(Alu::Int3 { op, .. }) => matches!(op, Int3::Prmt(_) | Int3::Bfe | Int3::Lop3(_)),
        Op::Alu(Alu::Bfi { .. }) => true,
        _ => moves_registers(instr),
    }
}

impl<'m> Cluster<'m> {
    /// Records the times of register writes, and checks instructions that access registers of a product in flight.
    pub(in crate::exec) fn track_registers(&mut self, warp: &mut Warp, instr: &Instr) -> Result<(), Error> {
        warp.wgmma.now += 1;
        if matches!(&instr.op, Op::Wgmma(_)) {
            return Ok(());
        }
        let now = warp.wgmma.now;
        let frame = warp.frame_mut();
        let renames = moves_registers(instr);
        let when = instr.reads.iter().map(|row| frame.written[*row as usize]).max();
        for row in &instr.writes {
            frame.written[*row as usize] = if renames { when.unwrap_or(now) } else { now };
        }
        if warp.wgmma.owned.is_empty() {
            return Ok(());
        }
        if moves_bits(instr) {
            return self.track_move(warp, instr);
        }
        self.check_owned(warp, instr, 0);
        Ok(())
    }

    /// Tracks a move of an accumulator. Compilers put moves between a product and its wait, and assemblers remove
    /// them, so a move only renames. The copy holds the product's result, which must not be used before the wait.
    fn track_move(&mut self, warp: &mut Warp, instr: &Instr) -> Result<(), Error> {
        let frame = warp.group().frame;
        let moved = |o: &&Owned| {
            o.frame == frame && o.role != Role::Operand && instr.reads.iter().any(|row| o.rows.contains(row))
        };
        let source = warp.wgmma.owned.iter().filter(moved).max_by_key(|o| o.step);
        let copy = source.map(|source| Owned {
            frame,
            rows: instr.writes.clone(),
            role: Role::Copy,
            step: source.step,
            line: source.line,
        });
        let Some(copy) = copy else {
            self.check_owned(warp, instr, 0);
            return Ok(());
        };
        while warp.wgmma.flying.front().is_some_and(|p| p.step <= copy.step) {
            self.land_first(warp)?;
        }
        let only_writes = Instr {
            reads: Box::default(),
            ..instr.clone()
        };
        self.check_owned(warp, &only_writes, copy.step);
        warp.wgmma.owned.push(copy);
        Ok(())
    }

    /// Checks accesses to owned registers. Accumulators of products up to step `landed` may be written, with the
    /// values that were moved out of them.
    fn check_owned(&mut self, warp: &mut Warp, instr: &Instr, landed: u32) {
        let frame = warp.group().frame;
        let touched = warp.wgmma.owned.iter().find_map(|owned| {
            let mine = |row: &Slot| owned.frame == frame && owned.rows.contains(row);
            let given_back = owned.role == Role::Accumulator && owned.step <= landed;
            let written = owned.role != Role::Copy && !given_back && instr.writes.iter().any(mine);
            let read = owned.role != Role::Operand && instr.reads.iter().any(mine);
            (written || read).then_some((owned.role, owned.line, written))
        });
        // A copy that is overwritten is no copy any more.
        warp.wgmma.owned.retain_mut(|owned| {
            if owned.role == Role::Copy && owned.frame == frame {
                let stays = |row: &&Slot| !instr.writes.contains(row);
                owned.rows = owned.rows.iter().filter(stays).copied().collect();
            }
            !owned.rows.is_empty()
        });
        if let Some((role, line, written)) = touched {
            self.report_register(warp, instr, || {
                let verb = if written { "writes" } else { "reads" };
                format!(
                    "{verb} {} of the wgmma at line {line}, which was not waited for",
                    role.name()
                )
            });
        }
    }

    /// Checks that no register of the product was written since the last `wgmma.fence`.
    pub(super) fn check_fence(&mut self, warp: &mut Warp, instr: &Instr, op: &Wgmma) {
        let fenced = warp.wgmma.fenced_at;
        let frame = warp.frame();
        let operands: &[Slot] = match &op.a {
            WgmmaA::Registers(rows) => rows,
            WgmmaA::Descriptor(_) => &[],
        };
        let late = |row: &&Slot| frame.written[**row as usize] > fenced;
        if op.d.iter().chain(operands).find(late).is_some() {
            self.report_register(warp, instr, || {
                "uses registers that were written after the last wgmma.fence".to_owned()
            });
        }
    }

    /// Reports a finding about a register, if the check is on.
    fn report_register(&mut self, warp: &Warp, instr: &Instr, message: impl FnOnce() -> String) {
        if self.ctx.checks.registers {
            let actor = self.actor(warp);
            self.report(FindingKind::UnawaitedAsync, instr.line, actor, (None, None), message);
        }
    }
}
