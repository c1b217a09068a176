//! Decodes operands to rows: registers, immediates, special registers, symbols, vectors, addresses.

use super::scope::{Entity, Register};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Addr, PRED_SINK, Pred, SINK, Slot, Space, Ty};
use crate::isa::{Preload, Special};
use crate::parse::ast::{Instruction, Operand};

/// A destination: its row and the width of its register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dst {
    pub slot: Slot,
    pub bits: u32,
}

pub(super) fn operand<'i, 'a>(i: &'i Instruction<'a>, index: usize) -> Result<&'i Operand<'a>, Failure> {
    match i.operands.get(index) {
        Some(operand) => Ok(operand),
        None => fail(format!("operand {} is missing", index + 1)),
    }
}

/// Checks the number of operands.
pub(super) fn count(i: &Instruction<'_>, range: std::ops::RangeInclusive<usize>) -> Result<(), Failure> {
    if range.contains(&i.operands.len()) {
        return Ok(());
    }
    fail(format!(
        "{} operands where {} to {} are known",
        i.operands.len(),
        range.start(),
        range.end()
    ))
}

fn mask_to(bits: u32, value: u64) -> u64 {
    if bits >= 64 { value } else { value & ((1 << bits) - 1) }
}

impl<'a> Decoder<'_, 'a> {
    /// Looks up a register by name; `v.x` names an element of a vector register.
    fn named_register(&mut self, name: &'a str) -> Option<Register> {
        if let Some(register) = self.register(name) {
            return Some(register);
        }
        let (base, element) = name.rsplit_once('.')?;
        let index = match element {
            "x" | "r" => 0,
            "y" | "g" => 1,
            "z" | "b" => 2,
            "w" | "a" => 3,
            _ => return None,
        };
        let vector = self.register(base)?;
        (index < vector.vector).then_some(Register {
            slot: vector.slot + index * vector.bits.div_ceil(64),
            vector: 1,
            ..vector
        })
    }

    pub(super) fn pred_register(&mut self, name: &'a str) -> Result<Slot, Failure> {
        match self.named_register(name) {
            Some(Register {
                is_pred: true, slot, ..
            }) => Ok(slot),
            Some(_) => fail(format!("`{name}` is not a predicate")),
            None => fail(format!("`{name}` is not declared")),
        }
    }

    /// Decodes a predicate operand, which may be negated.
    pub(super) fn pred(&mut self, operand: &Operand<'a>) -> Result<Pred, Failure> {
        match operand {
            Operand::Name(name) => Ok(Pred {
                slot: self.pred_register(name)?,
                negated: false,
            }),
            Operand::Not(inner) => {
                let inner = self.pred(inner)?;
                Ok(Pred {
                    negated: !inner.negated,
                    ..inner
                })
            }
            Operand::Int(value) => Ok(Pred {
                negated: *value == 0,
                ..self.always()
            }),
            _ => fail("expected a predicate"),
        }
    }

    pub(super) fn pred_dst(&mut self, operand: &Operand<'a>) -> Result<Slot, Failure> {
        match operand {
            Operand::Name("_") => Ok(PRED_SINK),
            Operand::Name(name) => self.pred_register(name),
            _ => fail("expected a predicate destination"),
        }
    }

    pub(super) fn is_pred(&mut self, operand: &Operand<'a>) -> bool {
        match operand {
            Operand::Name(name) => self.named_register(name).is_some_and(|r| r.is_pred),
            Operand::Not(_) => true,
            _ => false,
        }
    }

    /// Decodes a destination register.
    pub(super) fn dst(&mut self, operand: &Operand<'a>) -> Result<Dst, Failure> {
        let Operand::Name(name) = operand else {
            return fail("expected a destination register");
        };
        if *name == "_" {
            return Ok(Dst { slot: SINK, bits: 64 });
        }
        match self.named_register(name) {
            Some(register) if register.is_pred => fail(format!("`{name}` is a predicate, expected a value")),
            Some(register) => {
                for row in 0..register.bits.div_ceil(64) {
                    self.writes.push(register.slot + row);
                }
                Ok(Dst {
                    slot: register.slot,
                    bits: register.bits,
                })
            }
            None => fail(format!("`{name}` is not declared")),
        }
    }

    /// Decodes a destination that must be at least as wide as `ty`.
    pub(super) fn dst_of(&mut self, operand: &Operand<'a>, ty: Ty) -> Result<Slot, Failure> {
        let dst = self.dst(operand)?;
        if dst.bits < ty.bits() {
            return fail("the destination register is narrower than the type");
        }
        Ok(dst.slot)
    }

    /// Decodes a source that is read as `ty`.
    pub(super) fn src(&mut self, operand: &Operand<'a>, ty: Ty) -> Result<Slot, Failure> {
        match operand {
            Operand::Name(name) => self.named_source(name, ty),
            Operand::Sum(name, offset) => self.symbol_address(name, *offset),
            Operand::Int(_) | Operand::F32(_) | Operand::F64(_) => {
                let bits = immediate(operand, ty)?;
                Ok(self.constant(bits))
            }
            _ => fail("expected a register or a constant"),
        }
    }

    fn named_source(&mut self, name: &'a str, ty: Ty) -> Result<Slot, Failure> {
        if let Some(register) = self.named_register(name) {
            if register.is_pred {
                return fail(format!("`{name}` is a predicate, expected a value"));
            }
            if register.bits < ty.bits() {
                return fail(format!("`{name}` is narrower than the type"));
            }
            for row in 0..register.bits.div_ceil(64) {
                self.reads.push(register.slot + row);
            }
            return Ok(register.slot);
        }
        if name == "WARP_SZ" {
            return Ok(self.constant(32));
        }
        if let Some(special) = Special::parse(name) {
            return Ok(self.preload(Preload::Special(special)));
        }
        if name.starts_with('%') {
            return fail(format!(
                "`{name}` is not declared, or a special register that is not known"
            ));
        }
        self.symbol_address(name, 0)
    }

    /// Decodes an integer immediate.
    pub(super) fn literal(&self, operand: &Operand<'a>) -> Result<u64, Failure> {
        match operand {
            Operand::Int(value) => Ok(*value),
            _ => fail("expected an integer constant"),
        }
    }

    /// Decodes `{a, b, …}`, a vector register, or one register to source rows.
    pub(super) fn srcs(&mut self, operand: &Operand<'a>, ty: Ty) -> Result<Vec<Slot>, Failure> {
        match operand {
            Operand::Vector(list) => list.iter().map(|o| self.src(o, ty)).collect(),
            Operand::Name(name) => {
                let vector = self.named_register(name).map_or(1, |r| r.vector);
                let first = self.src(operand, ty)?;
                Ok((0..vector).map(|at| first + at).collect())
            }
            _ => Ok(vec![self.src(operand, ty)?]),
        }
    }

    /// Decodes `{a, b, …}`, a vector register, or one register to destinations.
    pub(super) fn dsts(&mut self, operand: &Operand<'a>) -> Result<Vec<Dst>, Failure> {
        match operand {
            Operand::Vector(list) => list.iter().map(|o| self.dst(o)).collect(),
            Operand::Name(name) => {
                let vector = self.named_register(name).map_or(1, |r| r.vector);
                let first = self.dst(operand)?;
                Ok((0..vector)
                    .map(|at| Dst {
                        slot: first.slot + at,
                        ..first
                    })
                    .collect())
            }
            _ => Ok(vec![self.dst(operand)?]),
        }
    }

    /// Decodes destinations that must be at least as wide as `ty`.
    pub(super) fn dst_rows(&mut self, operand: &Operand<'a>, ty: Ty) -> Result<Box<[Slot]>, Failure> {
        let dsts = self.dsts(operand)?;
        if dsts.iter().any(|d| d.bits < ty.bits()) {
            return fail("a destination register is narrower than the type");
        }
        Ok(dsts.iter().map(|d| d.slot).collect())
    }

    /// Decodes `[base + offset]` in `space`.
    pub(super) fn addr(&mut self, operand: &Operand<'a>, space: Space) -> Result<Addr, Failure> {
        let Operand::Address {
            base,
            offset,
            coordinates: None,
        } = operand
        else {
            return fail("expected an address in brackets");
        };
        self.address(base, *offset, space)
    }

    pub(super) fn address(&mut self, base: &Operand<'a>, offset: i64, space: Space) -> Result<Addr, Failure> {
        let mut space = space;
        let base = match base {
            Operand::Name(name) => {
                let in_frame = matches!(self.lookup(name), Some(Entity::Frame { .. }));
                if space == Space::Param && (in_frame || !self.is_entry) {
                    space = Space::Local;
                }
                let wide = match space {
                    Space::Shared | Space::SharedCluster | Space::Local | Space::Param => Ty::B32,
                    Space::Generic | Space::Global | Space::Const => Ty::B64,
                };
                self.named_source(name, wide)?
            }
            Operand::Int(value) => self.constant(*value),
            _ => return fail("expected a register or symbol as address"),
        };
        Ok(Addr { base, offset, space })
    }

    /// Decodes an operand of a call: a `.param` variable of the frame, a register or a constant.
    pub(super) fn passed(&mut self, operand: &Operand<'a>) -> Result<crate::isa::Passed, Failure> {
        use crate::isa::Passed;
        if let Operand::Name(name) = operand {
            if let Some(Entity::Frame { offset, size }) = self.lookup(name) {
                return Ok(Passed::Bytes {
                    offset: *offset,
                    size: *size,
                });
            }
            if let Some(register) = self.named_register(name) {
                self.reads.push(register.slot);
                self.writes.push(register.slot);
                return Ok(Passed::Register { slot: register.slot });
            }
        }
        let slot = self.src(operand, Ty::B32)?;
        Ok(Passed::Register { slot })
    }
}

/// Returns the bits of a constant read as `ty`.
fn immediate(operand: &Operand<'_>, ty: Ty) -> Result<u64, Failure> {
    let bits = match (operand, ty) {
        (Operand::Int(value), Ty::F32) => {
            // Some generators write small integers where a float is meant; PTX does not allow it.
            return fail(format!("integer constant {value} where an f32 is needed"));
        }
        (Operand::Int(value), _) => *value,
        (Operand::F32(b), Ty::F64) => f64::from(f32::from_bits(*b)).to_bits(),
        (Operand::F32(b), _) => u64::from(*b),
        (Operand::F64(b), Ty::F32) => u64::from((f64::from_bits(*b) as f32).to_bits()),
        (Operand::F64(b), _) => *b,
        _ => return fail("expected a constant"),
    };
    Ok(mask_to(ty.bits(), bits))
}
