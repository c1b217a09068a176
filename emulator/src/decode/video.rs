//! Scalar video instructions.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{IntTy, Slot, Ty};
use crate::isa::{Alu, Int3, Op};
use crate::numeric::video::{Comparison, Operation, Part, ScalarVideo, Second};
use crate::parse::ast::{Instruction, Operand};

/// Returns true for the opcode of a scalar video instruction.
pub(super) fn is_scalar_video(opcode: &str) -> bool {
    matches!(
        opcode,
        "vadd" | "vsub" | "vabsdiff" | "vmin" | "vmax" | "vset" | "vshl" | "vshr" | "vmad"
    )
}

/// Splits a register name into the name and the part that its suffix selects.
fn selected(name: &str) -> (&str, Part) {
    let part = |suffix: &str| {
        Some(match suffix {
            "b0" => Part::Byte(0),
            "b1" => Part::Byte(1),
            "b2" => Part::Byte(2),
            "b3" => Part::Byte(3),
            "h0" => Part::Half(0),
            "h1" => Part::Half(1),
            _ => return None,
        })
    };
    let split = name.rsplit_once('.');
    match split.and_then(|(base, suffix)| Some((base, part(suffix)?))) {
        Some(found) => found,
        None => (name, Part::Word),
    }
}

/// Splits off an operand's minus sign; true if it has one.
fn sign<'i, 'a>(operand: &'i Operand<'a>) -> (&'i Operand<'a>, bool) {
    match operand {
        Operand::Negative(inner) => (inner, true),
        other => (other, false),
    }
}

impl<'a> Decoder<'_, 'a> {
    /// Decodes a source: its row, the part of it that is read, and true if it is negated.
    fn video_source(&mut self, of: &Operand<'a>) -> Result<(Slot, Part, bool), Failure> {
        let (of, negated) = sign(of);
        match of {
            Operand::Name(name) => {
                let (base, part) = selected(name);
                Ok((self.src(&Operand::Name(base), Ty::B32)?, part, negated))
            }
            other => Ok((self.src(other, Ty::B32)?, Part::Word, negated)),
        }
    }

    fn video_signs<const N: usize>(m: &mut Modifiers<'a>) -> Result<[bool; N], Failure> {
        let mut signed = [false; N];
        for signed in &mut signed {
            *signed = match m.ty()? {
                Ty::U32 => false,
                Ty::S32 => true,
                _ => return fail("the types are u32 or s32"),
            };
        }
        Ok(signed)
    }

    pub(super) fn scalar_video(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let signed = if i.opcode == "vset" {
            let [a, b] = Self::video_signs(m)?;
            [false, a, b]
        } else {
            Self::video_signs::<3>(m)?
        };
        let mut operation = match i.opcode {
            "vadd" => Operation::Add,
            "vsub" => Operation::Sub,
            "vabsdiff" => Operation::AbsDiff,
            "vmin" => Operation::Min,
            "vmax" => Operation::Max,
            "vset" => Operation::Set(m.need(
                "the comparison",
                &[
                    ("eq", Comparison::Eq),
                    ("ne", Comparison::Ne),
                    ("lt", Comparison::Lt),
                    ("le", Comparison::Le),
                    ("gt", Comparison::Gt),
                    ("ge", Comparison::Ge),
                ],
            )?),
            "vshl" | "vshr" => Operation::Shift {
                right: i.opcode == "vshr",
                wrap: m.need("`.clamp` or `.wrap`", &[("clamp", false), ("wrap", true)])?,
            },
            _ => Operation::Mad {
                negate: [false; 2],
                plus_one: m.take("po"),
                scale: m.one_of(&[("shr7", 7), ("shr15", 15)]).unwrap_or(0),
            },
        };
        if matches!(operation, Operation::Shift { .. }) && signed[2] {
            return fail("the amount of a shift is u32");
        }
        let saturate = !matches!(operation, Operation::Set(_)) && m.take("sat");
        let multiplies = matches!(operation, Operation::Mad { .. });
        let seconds = [("add", Second::Add), ("min", Second::Min), ("max", Second::Max)];
        let second = if multiplies { None } else { m.one_of(&seconds) };
        let Operand::Name(name) = operand(i, 0)? else {
            return fail("expected a destination register");
        };
        let (base, to) = selected(name);
        let dst = self.dst_of(&Operand::Name(base), Ty::B32)?;
        let (a, a_part, a_negated) = self.video_source(operand(i, 1)?)?;
        let (b, b_part, b_negated) = self.video_source(operand(i, 2)?)?;
        let merges = to != Part::Word;
        if merges && (second.is_some() || multiplies) {
            return fail("a part of the destination is written, and `c` is used otherwise");
        }
        let (c, c_negated) = if merges || second.is_some() || multiplies {
            count(i, 4..=4)?;
            let (c, c_negated) = sign(operand(i, 3)?);
            (self.src(c, Ty::B32)?, c_negated)
        } else {
            count(i, 3..=3)?;
            (self.constant(0), false)
        };
        let negates = [a_negated != b_negated, c_negated];
        if let Operation::Mad { negate, plus_one, .. } = &mut operation {
            if *plus_one && (a_negated || b_negated || c_negated) || negates == [true; 2] {
                return fail("one of the product and `c` is negated at most, and neither with `.po`");
            }
            *negate = negates;
        } else if a_negated || b_negated || c_negated {
            return fail("only `vmad` negates its operands");
        }
        let video = ScalarVideo {
            operation,
            signed,
            parts: [to, a_part, b_part],
            saturate,
            second,
        };
        Ok(Op::Alu(Alu::Int3 {
            op: Int3::ScalarVideo(video),
            ty: IntTy::U32,
            dst,
            a,
            b,
            c,
        }))
    }
}
