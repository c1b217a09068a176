//! Comparisons and selections: `setp`, `set`, `selp`, `slct`.

use super::integer::int_ty;
use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{FloatTy, PRED_SINK, Pred, Ty};
use crate::isa::{Alu, BoolOp, Cmp, CmpTy, Op};
use crate::parse::ast::{Instruction, Operand};

const COMPARISONS: &[(&str, Cmp)] = &[
    ("eq", Cmp::Eq),
    ("ne", Cmp::Ne),
    ("lt", Cmp::Lt),
    ("le", Cmp::Le),
    ("gt", Cmp::Gt),
    ("ge", Cmp::Ge),
    ("lo", Cmp::Lt),
    ("ls", Cmp::Le),
    ("hi", Cmp::Gt),
    ("hs", Cmp::Ge),
    ("equ", Cmp::Equ),
    ("neu", Cmp::Neu),
    ("ltu", Cmp::Ltu),
    ("leu", Cmp::Leu),
    ("gtu", Cmp::Gtu),
    ("geu", Cmp::Geu),
    ("num", Cmp::Num),
    ("nan", Cmp::Nan),
];

const BOOLEANS: &[(&str, BoolOp)] = &[("and", BoolOp::And), ("or", BoolOp::Or), ("xor", BoolOp::Xor)];

impl<'a> Decoder<'_, 'a> {
    /// Decodes the comparison, its optional boolean combination, and its type.
    fn comparison(
        &mut self,
        i: &Instruction<'a>,
        m: &mut Modifiers<'a>,
    ) -> Result<(Cmp, Option<(BoolOp, Pred)>), Failure> {
        let cmp = m.need("the comparison", COMPARISONS)?;
        let combine = match m.one_of(BOOLEANS) {
            Some(op) => Some((op, self.pred(operand(i, 3)?)?)),
            None => None,
        };
        let n = if combine.is_some() { 4 } else { 3 };
        count(i, n..=n)?;
        Ok((cmp, combine))
    }

    fn compare_ty(&self, ty: Ty, ftz: bool, cmp: Cmp) -> Result<CmpTy, Failure> {
        if let Some(float) = ty.float() {
            return Ok(CmpTy::Float(float, ftz));
        }
        let float_only = matches!(
            cmp,
            Cmp::Equ | Cmp::Neu | Cmp::Ltu | Cmp::Leu | Cmp::Gtu | Cmp::Geu | Cmp::Num | Cmp::Nan
        );
        if ftz || float_only {
            return fail("this comparison needs a floating-point type");
        }
        Ok(CmpTy::Int(int_ty(ty)?))
    }

    pub(super) fn setp(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let (cmp, combine) = self.comparison(i, m)?;
        let ftz = m.take("ftz");
        let ty = m.ty()?;
        let (p, q) = match operand(i, 0)? {
            Operand::Pair(p, q) => (self.pred_dst(p)?, self.pred_dst(q)?),
            p => (self.pred_dst(p)?, PRED_SINK),
        };
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        Ok(Op::Alu(Alu::Setp {
            cmp,
            ty: self.compare_ty(ty, ftz, cmp)?,
            p,
            q,
            a,
            b,
            combine,
        }))
    }

    pub(super) fn set(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let (cmp, combine) = self.comparison(i, m)?;
        let ftz = m.take("ftz");
        let to = m.ty()?;
        let ty = m.ty()?;
        let packed = matches!(ty.float(), Some(FloatTy::F16x2 | FloatTy::Bf16x2));
        let one = match to {
            Ty::U32 | Ty::S32 => 0xffff_ffff,
            Ty::U16 | Ty::S16 => 0xffff,
            Ty::F32 => u64::from(1f32.to_bits()),
            Ty::F16 | Ty::F16x2 => 0x3c00,
            Ty::Bf16 | Ty::Bf16x2 => 0x3f80,
            _ => return fail("this destination type is not known"),
        };
        let one = if packed { one & 0xffff } else { one };
        let dst = self.dst_of(operand(i, 0)?, to)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        Ok(Op::Alu(Alu::Set {
            cmp,
            ty: self.compare_ty(ty, ftz, cmp)?,
            one,
            dst,
            a,
            b,
            combine,
        }))
    }

    pub(super) fn selp(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 4..=4)?;
        Ok(Op::Alu(Alu::Selp {
            dst: self.dst_of(operand(i, 0)?, ty)?,
            a: self.src(operand(i, 1)?, ty)?,
            b: self.src(operand(i, 2)?, ty)?,
            p: self.pred(operand(i, 3)?)?,
        }))
    }

    pub(super) fn slct(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let ftz = m.take("ftz");
        let ty = m.ty()?;
        let selector = m.ty()?;
        count(i, 4..=4)?;
        let float = match selector {
            Ty::F32 => true,
            Ty::S32 if !ftz => false,
            _ => return fail("the selector is s32 or f32"),
        };
        Ok(Op::Alu(Alu::Slct {
            float,
            ftz,
            dst: self.dst_of(operand(i, 0)?, ty)?,
            a: self.src(operand(i, 1)?, ty)?,
            b: self.src(operand(i, 2)?, ty)?,
            c: self.src(operand(i, 3)?, selector)?,
        }))
    }
}
