//! Integer, logic, shift, compare and select instructions.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::video::is_scalar_video;
use super::{Decoder, Failure, fail};
use crate::isa::types::{IntTy, Pred, SINK, Slot, Ty};
use crate::isa::{Alu, BoolOp, Carry, Int1, Int2, Int3, Op, Packed};
use crate::numeric::integer::{Permute, Video, VideoMode};
use crate::parse::ast::{Instruction, Operand};

type Decoded = Result<Option<Op>, Failure>;

pub(super) fn int_ty(ty: Ty) -> Result<IntTy, Failure> {
    match ty.int() {
        Some(int) => Ok(int),
        None => fail("the type is not an integer type"),
    }
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn integer(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let op = match i.opcode {
            "add" | "sub" | "min" | "max" | "neg" | "abs" | "div" | "mul" | "mad" if is_float(i) => {
                return Ok(None);
            }
            "add" | "sub" if i.modifiers.contains(&"cc") => self.carry(i, m)?,
            "mad" if i.modifiers.contains(&"cc") => self.carry(i, m)?,
            "addc" | "subc" | "madc" => self.carry(i, m)?,
            "add" | "min" | "max" => self.add_min_max(i, m)?,
            "sub" => {
                let op = if m.take("sat") { Int2::SubSat } else { Int2::Sub };
                self.int2(i, m, op)?
            }
            "mul" => {
                let op = m.need(
                    "`.lo`, `.hi` or `.wide`",
                    &[("lo", Int2::MulLo), ("hi", Int2::MulHi), ("wide", Int2::MulWide)],
                )?;
                self.int2(i, m, op)?
            }
            "mul24" => {
                let op = m.need("`.lo`/`.hi`", &[("lo", Int2::Mul24Lo), ("hi", Int2::Mul24Hi)])?;
                self.int2(i, m, op)?
            }
            "div" => self.int2(i, m, Int2::Div)?,
            "rem" => self.int2(i, m, Int2::Rem)?,
            "shl" => self.shift(i, m, Int2::Shl)?,
            "shr" => self.shift(i, m, Int2::Shr)?,
            "and" => self.logic(i, m, Int2::And, BoolOp::And)?,
            "or" => self.logic(i, m, Int2::Or, BoolOp::Or)?,
            "xor" => self.logic(i, m, Int2::Xor, BoolOp::Xor)?,
            "not" => self.not(i, m)?,
            "neg" => self.int1(i, m, Int1::Neg)?,
            "abs" => self.int1(i, m, Int1::Abs)?,
            "cnot" => self.int1(i, m, Int1::Cnot)?,
            "popc" => self.int1(i, m, Int1::Popc)?,
            "clz" => self.int1(i, m, Int1::Clz)?,
            "brev" => self.int1(i, m, Int1::Brev)?,
            "bfind" => {
                let op = if m.take("shiftamt") {
                    Int1::BfindShift
                } else {
                    Int1::Bfind
                };
                self.int1(i, m, op)?
            }
            "mad" => self.mad(i, m)?,
            "mad24" => {
                let op = m.need("`.lo`/`.hi`", &[("lo", Int3::Mad24Lo), ("hi", Int3::Mad24Hi)])?;
                self.int3(i, m, op)?
            }
            "sad" => self.int3(i, m, Int3::Sad)?,
            "bfe" => self.bfe(i, m)?,
            "bfi" => self.bfi(i, m)?,
            "bmsk" => {
                let op = m.need(
                    "`.clamp`/`.wrap`",
                    &[("clamp", Int2::BmskClamp), ("wrap", Int2::BmskWrap)],
                )?;
                self.int2(i, m, op)?
            }
            "szext" => {
                let op = m.need(
                    "`.clamp`/`.wrap`",
                    &[("clamp", Int2::SzextClamp), ("wrap", Int2::SzextWrap)],
                )?;
                self.int2(i, m, op)?
            }
            "shf" => self.shf(i, m)?,
            "prmt" => self.prmt(i, m)?,
            "lop3" => self.lop3(i, m)?,
            "fns" => self.int3(i, m, Int3::Fns)?,
            "dp4a" | "dp2a" => self.dot(i, m)?,
            word if is_scalar_video(word) => return self.scalar_video(i, m).map(Some),
            word if word.starts_with('v') && word.ends_with(['2', '4']) => return self.video(i, m).map(Some),
            "setp" => self.setp(i, m)?,
            "set" => self.set(i, m)?,
            "selp" => self.selp(i, m)?,
            "slct" => self.slct(i, m)?,
            _ => return Ok(None),
        };
        Ok(Some(op))
    }

    fn int1(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Int1) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 2..=2)?;
        let wide = matches!(op, Int1::Popc | Int1::Clz | Int1::Bfind | Int1::BfindShift);
        let dst = self.dst_of(operand(i, 0)?, if wide { Ty::B32 } else { ty })?;
        let a = self.src(operand(i, 1)?, ty)?;
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Int1 { op, ty, dst, a }))
    }

    fn int2(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Int2) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 3..=3)?;
        if matches!(op, Int2::AddSat | Int2::SubSat) && ty != Ty::S32 {
            return fail("`.sat` exists for s32 only");
        }
        let dst = self.dst(operand(i, 0)?)?;
        let need = if op == Int2::MulWide { 2 } else { 1 };
        if dst.bits < ty.bits() * need {
            return fail("the destination register is narrower than the result");
        }
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Int2 {
            op,
            ty,
            dst: dst.slot,
            a,
            b,
        }))
    }

    fn int3(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Int3) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 4..=4)?;
        self.int3_of(i, op, ty, ty)
    }

    fn int3_of(&mut self, i: &Instruction<'a>, op: Int3, ty: Ty, wide: Ty) -> Result<Op, Failure> {
        let dst = self.dst_of(operand(i, 0)?, wide)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        let c = self.src(operand(i, 3)?, wide)?;
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Int3 { op, ty, dst, a, b, c }))
    }

    fn add_min_max(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let relu = m.take("relu");
        if let Some(signed) = m.one_of(&[("u16x2", false), ("s16x2", true)]) {
            let op = match i.opcode {
                "add" => Packed::Add,
                "min" => Packed::Min,
                _ => Packed::Max,
            };
            count(i, 3..=3)?;
            let dst = self.dst_of(operand(i, 0)?, Ty::B32)?;
            let a = self.src(operand(i, 1)?, Ty::B32)?;
            let b = self.src(operand(i, 2)?, Ty::B32)?;
            return Ok(Op::Alu(Alu::Packed16 {
                op,
                signed,
                relu,
                dst,
                a,
                b,
            }));
        }
        let op = match i.opcode {
            "add" if m.take("sat") => Int2::AddSat,
            "add" => Int2::Add,
            "min" => Int2::Min,
            _ => Int2::Max,
        };
        let plain = self.int2(i, m, op)?;
        if !relu {
            return Ok(plain);
        }
        // `max.relu.s32` is max(max(a, b), 0).
        let Op::Alu(Alu::Int2 {
            ty: IntTy::S32,
            dst,
            a,
            b,
            op,
        }) = plain
        else {
            return fail("`.relu` exists for s32 and s16x2 only");
        };
        Ok(Op::Alu(Alu::Relu32 {
            max: op == Int2::Max,
            dst,
            a,
            b,
        }))
    }

    fn shift(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Int2) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 3..=3)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, Ty::B32)?;
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Int2 { op, ty, dst, a, b }))
    }

    fn logic(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Int2, pred: BoolOp) -> Result<Op, Failure> {
        if m.take("pred") {
            count(i, 3..=3)?;
            let dst = self.pred_dst(operand(i, 0)?)?;
            let a = self.pred(operand(i, 1)?)?;
            let b = self.pred(operand(i, 2)?)?;
            return Ok(Op::Alu(Alu::PredLogic { op: pred, dst, a, b }));
        }
        self.int2(i, m, op)
    }

    fn not(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        if m.take("pred") {
            count(i, 2..=2)?;
            let dst = self.pred_dst(operand(i, 0)?)?;
            let src = self.pred(operand(i, 1)?)?;
            let src = Pred {
                negated: !src.negated,
                ..src
            };
            return Ok(Op::Alu(Alu::MovPred { dst, src }));
        }
        self.int1(i, m, Int1::Not)
    }

    fn mad(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let op = m.need(
            "`.lo`, `.hi` or `.wide`",
            &[("lo", Int3::MadLo), ("hi", Int3::MadHi), ("wide", Int3::MadWide)],
        )?;
        let sat = m.take("sat");
        let ty = m.ty()?;
        count(i, 4..=4)?;
        if sat && (op != Int3::MadHi || ty != Ty::S32) {
            return fail("`.sat` exists for `mad.hi.s32` only");
        }
        let op = if sat { Int3::MadHiSat } else { op };
        let wide = match (op, ty.bits()) {
            (Int3::MadWide, 16) => Ty::B32,
            (Int3::MadWide, _) => Ty::B64,
            _ => ty,
        };
        self.int3_of(i, op, ty, wide)
    }

    fn bfe(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 4..=4)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, Ty::B32)?;
        let c = self.src(operand(i, 3)?, Ty::B32)?;
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Int3 {
            op: Int3::Bfe,
            ty,
            dst,
            a,
            b,
            c,
        }))
    }

    fn bfi(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 5..=5)?;
        Ok(Op::Alu(Alu::Bfi {
            ty: int_ty(ty)?,
            dst: self.dst_of(operand(i, 0)?, ty)?,
            a: self.src(operand(i, 1)?, ty)?,
            b: self.src(operand(i, 2)?, ty)?,
            pos: self.src(operand(i, 3)?, Ty::B32)?,
            len: self.src(operand(i, 4)?, Ty::B32)?,
        }))
    }

    fn shf(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let left = m.need("`.l` or `.r`", &[("l", true), ("r", false)])?;
        let clamp = m.need("`.clamp` or `.wrap`", &[("clamp", true), ("wrap", false)])?;
        let op = match (left, clamp) {
            (true, true) => Int3::ShfLeftClamp,
            (true, false) => Int3::ShfLeftWrap,
            (false, true) => Int3::ShfRightClamp,
            (false, false) => Int3::ShfRightWrap,
        };
        self.int3(i, m, op)
    }

    fn prmt(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let mode = m.one_of(&[
            ("f4e", Permute::Forward4),
            ("b4e", Permute::Backward4),
            ("rc8", Permute::Replicate8),
            ("ecl", Permute::EdgeClampLeft),
            ("ecr", Permute::EdgeClampRight),
            ("rc16", Permute::Replicate16),
        ]);
        self.int3(i, m, Int3::Prmt(mode.unwrap_or(Permute::Generic)))
    }

    fn lop3(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let combine = m.one_of(&[("or", true), ("and", false)]);
        if m.ty()? != Ty::B32 {
            return fail("`lop3` exists for b32 only");
        }
        let lut = self.literal(operand(i, 4)?)?;
        let Ok(lut) = u8::try_from(lut) else {
            return fail("the lookup table does not fit in 8 bits");
        };
        let Some(or) = combine else {
            count(i, 5..=5)?;
            return self.int3_of(i, Int3::Lop3(lut), Ty::B32, Ty::B32);
        };
        count(i, 6..=6)?;
        let Operand::Pair(d, p) = operand(i, 0)? else {
            return fail("expected `d|p`");
        };
        Ok(Op::Alu(Alu::Lop3Pred {
            lut,
            or,
            dst: self.dst_of(d, Ty::B32)?,
            pred: self.pred_dst(p)?,
            a: self.src(operand(i, 1)?, Ty::B32)?,
            b: self.src(operand(i, 2)?, Ty::B32)?,
            c: self.src(operand(i, 3)?, Ty::B32)?,
            q: self.pred(operand(i, 5)?)?,
        }))
    }

    fn dot(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let four = i.opcode == "dp4a";
        let hi = !four && m.need("`.lo` or `.hi`", &[("lo", false), ("hi", true)])?;
        let mut signs = [false; 2];
        for sign in &mut signs {
            *sign = match m.ty()? {
                Ty::U32 => false,
                Ty::S32 => true,
                _ => return fail("only u32 and s32 are known"),
            };
        }
        count(i, 4..=4)?;
        let op = if four {
            Int3::Dp4a(signs[0], signs[1])
        } else {
            Int3::Dp2a(signs[0], signs[1], hi)
        };
        self.int3_of(i, op, Ty::B32, Ty::B32)
    }

    /// Decodes `vadd4.dtype.atype.btype{.sat}{.add} d, a, b, c` and the other SIMD video instructions on whole words.
    fn video(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let (name, parts) = i.opcode.split_at(i.opcode.len() - 1);
        let op = match name {
            "vadd" => Video::Add,
            "vsub" => Video::Sub,
            "vabsdiff" => Video::AbsDiff,
            "vmin" => Video::Min,
            "vmax" => Video::Max,
            _ => return fail(format!("opcode `{}` is not known", i.opcode)),
        };
        let mut signed = [false; 3];
        for signed in &mut signed {
            *signed = match m.ty()? {
                Ty::U32 => false,
                Ty::S32 => true,
                _ => return fail("the types are u32 or s32"),
            };
        }
        let mode = VideoMode {
            parts: if parts == "2" { 2 } else { 4 },
            signed,
            saturate: m.take("sat"),
            accumulate: m.take("add"),
        };
        count(i, 4..=4)?;
        self.int3_of(i, Int3::Video(op, mode), Ty::B32, Ty::B32)
    }

    fn carry(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let writes_carry = m.take("cc");
        let reads_carry = i.opcode.ends_with('c');
        let op = match i.opcode.trim_end_matches('c') {
            "add" => Carry::Add,
            "sub" => Carry::Sub,
            _ => m.need("`.lo`/`.hi`", &[("lo", Carry::MadLo), ("hi", Carry::MadHi)])?,
        };
        let ty = m.ty()?;
        let is_mad = matches!(op, Carry::MadLo | Carry::MadHi);
        let n = if is_mad { 4 } else { 3 };
        count(i, n..=n)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        let c: Slot = if is_mad { self.src(operand(i, 3)?, ty)? } else { SINK };
        let ty = int_ty(ty)?;
        Ok(Op::Alu(Alu::Carry {
            op,
            ty,
            reads_carry,
            writes_carry,
            dst,
            a,
            b,
            c,
        }))
    }
}

/// Returns true if the instruction's type is a floating-point type.
pub(super) fn is_float(i: &Instruction<'_>) -> bool {
    i.modifiers
        .iter()
        .any(|w| Ty::parse(w).is_some_and(|ty| ty.float().is_some()))
}
