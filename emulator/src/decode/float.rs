//! Floating-point arithmetic.

use super::integer::is_float;
use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{FloatMode, FloatTy, Slot, Ty};
use crate::isa::{Alu, Float1, Float2, MinMax, Op};
use crate::numeric::Rounding;
use crate::numeric::float32::Property;
use crate::parse::ast::Instruction;

type Decoded = Result<Option<Op>, Failure>;

/// Counts the floating-point operations of `op` per lane, without tensor cores; an fma counts two.
pub(super) fn flops(op: &Op) -> u32 {
    let packed = |ty: FloatTy| 1 + u32::from(matches!(ty, FloatTy::F16x2 | FloatTy::Bf16x2));
    match op {
        Op::Alu(Alu::Fma { ty, .. }) => 2 * packed(*ty),
        Op::Alu(Alu::MixedFma { .. }) => 2,
        Op::Alu(Alu::MinMax3 { .. } | Alu::MixedAdd { .. }) => 1,
        Op::Alu(Alu::Float2 { op, ty, .. }) if *op != Float2::Copysign => packed(*ty),
        Op::Alu(Alu::Float1 { op, ty, .. }) if !matches!(op, Float1::Abs | Float1::Neg) => packed(*ty),
        _ => 0,
    }
}

fn float_ty(ty: Ty) -> Result<FloatTy, Failure> {
    match ty.float() {
        Some(float) => Ok(float),
        None => fail("the type is not a floating-point type"),
    }
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn float(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let op = match i.opcode {
            "add" | "sub" | "mul" | "min" | "max" | "neg" | "abs" | "div" | "mad" if !is_float(i) => {
                return Ok(None);
            }
            "add" | "sub" | "fma" if mixed(i) => self.mixed(i, m)?,
            "add" => self.float2(i, m, Float2::Add)?,
            "sub" => self.float2(i, m, Float2::Sub)?,
            "mul" => self.float2(i, m, Float2::Mul)?,
            "div" => {
                let op = m.one_of(&[("approx", Float2::DivApprox), ("full", Float2::DivFull)]);
                self.float2(i, m, op.unwrap_or(Float2::Div))?
            }
            "min" | "max" => self.min_max(i, m)?,
            "copysign" => self.float2(i, m, Float2::Copysign)?,
            "fma" | "mad" => self.fma(i, m)?,
            "neg" => self.float1(i, m, Float1::Neg)?,
            "abs" => self.float1(i, m, Float1::Abs)?,
            "rcp" => {
                let op = if m.take("approx") {
                    Float1::RcpApprox
                } else {
                    Float1::Rcp
                };
                self.float1(i, m, op)?
            }
            "sqrt" => {
                let op = if m.take("approx") {
                    Float1::SqrtApprox
                } else {
                    Float1::Sqrt
                };
                self.float1(i, m, op)?
            }
            "rsqrt" => self.approx(i, m, Float1::RsqrtApprox)?,
            "sin" => self.approx(i, m, Float1::SinApprox)?,
            "cos" => self.approx(i, m, Float1::CosApprox)?,
            "lg2" => self.approx(i, m, Float1::Lg2Approx)?,
            "ex2" => self.approx(i, m, Float1::Ex2Approx)?,
            "tanh" => self.approx(i, m, Float1::TanhApprox)?,
            "testp" => self.testp(i, m)?,
            _ => return Ok(None),
        };
        Ok(Some(op))
    }

    fn float_mode(&self, m: &mut Modifiers<'a>) -> FloatMode {
        FloatMode {
            rounding: m.rounding().unwrap_or(Rounding::NearestEven),
            ftz: m.take("ftz"),
            sat: m.take("sat"),
        }
    }

    fn approx(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Float1) -> Result<Op, Failure> {
        if !m.take("approx") {
            return fail("`.approx` is missing");
        }
        self.float1(i, m, op)
    }

    fn float1(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Float1) -> Result<Op, Failure> {
        let rounded = m.rounding();
        if matches!(op, Float1::Rcp | Float1::Sqrt) && rounded.is_none() {
            return fail("a rounding modifier or `.approx` is missing");
        }
        let mut mode = self.float_mode(m);
        mode.rounding = rounded.unwrap_or(Rounding::NearestEven);
        let ty = m.ty()?;
        count(i, 2..=2)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let ty = float_ty(ty)?;
        let half = matches!(ty, FloatTy::F16 | FloatTy::F16x2 | FloatTy::Bf16 | FloatTy::Bf16x2);
        let known = match op {
            Float1::Abs | Float1::Neg => true,
            Float1::Ex2Approx | Float1::TanhApprox => ty != FloatTy::F64,
            Float1::RcpApprox | Float1::RsqrtApprox => !half,
            Float1::Rcp | Float1::Sqrt => !half,
            _ => ty == FloatTy::F32,
        };
        if !known {
            return fail("this function does not exist for the type");
        }
        Ok(Op::Alu(Alu::Float1 { op, ty, mode, dst, a }))
    }

    fn float2(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, op: Float2) -> Result<Op, Failure> {
        let mode = self.float_mode(m);
        let ty = m.ty()?;
        count(i, 3..=3)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let b = self.src(operand(i, 2)?, ty)?;
        let ty = float_ty(ty)?;
        let known = match op {
            Float2::Div | Float2::Copysign => matches!(ty, FloatTy::F32 | FloatTy::F64),
            Float2::DivApprox | Float2::DivFull => ty == FloatTy::F32,
            _ => true,
        };
        if !known {
            return fail("this operation does not exist for the type");
        }
        Ok(Op::Alu(Alu::Float2 {
            op,
            ty,
            mode,
            dst,
            a,
            b,
        }))
    }

    fn min_max(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let max = i.opcode == "max";
        let kind = MinMax {
            nan: m.take("NaN"),
            xorsign_abs: m.take("xorsign") && m.take("abs"),
        };
        if i.operands.len() == 4 {
            let abs = m.take("abs");
            let mode = self.float_mode(m);
            if m.ty()? != Ty::F32 {
                return fail("three inputs exist for f32 only");
            }
            return Ok(Op::Alu(Alu::MinMax3 {
                max,
                abs,
                kind,
                mode,
                dst: self.dst_of(operand(i, 0)?, Ty::F32)?,
                a: self.src(operand(i, 1)?, Ty::F32)?,
                b: self.src(operand(i, 2)?, Ty::F32)?,
                c: self.src(operand(i, 3)?, Ty::F32)?,
            }));
        }
        let op = if max { Float2::Max(kind) } else { Float2::Min(kind) };
        self.float2(i, m, op)
    }

    fn fma(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let relu = m.take("relu");
        let oob = m.take("oob");
        let mode = self.float_mode(m);
        let ty = m.ty()?;
        count(i, 4..=4)?;
        let dst = self.dst_of(operand(i, 0)?, ty)?;
        let [a, b, c] = self.three(i, ty)?;
        let ty = float_ty(ty)?;
        if (relu || oob) && matches!(ty, FloatTy::F32 | FloatTy::F64) {
            return fail("`.relu` and `.oob` exist for f16 and bf16 only");
        }
        Ok(Op::Alu(Alu::Fma {
            ty,
            mode,
            relu,
            oob,
            dst,
            a,
            b,
            c,
        }))
    }

    fn three(&mut self, i: &Instruction<'a>, ty: Ty) -> Result<[Slot; 3], Failure> {
        Ok([
            self.src(operand(i, 1)?, ty)?,
            self.src(operand(i, 2)?, ty)?,
            self.src(operand(i, 3)?, ty)?,
        ])
    }

    /// Decodes `add.f32.f16 d, a, c` and `fma.rn.f32.bf16 d, a, b, c`: f32 arithmetic on half-precision inputs.
    fn mixed(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let mode = self.float_mode(m);
        let (to, from) = (m.ty()?, m.ty()?);
        if to != Ty::F32 || !matches!(from, Ty::F16 | Ty::Bf16) {
            return fail("mixed precision exists for f32 with f16 or bf16");
        }
        let bf16 = from == Ty::Bf16;
        let dst = self.dst_of(operand(i, 0)?, Ty::F32)?;
        let a = self.src(operand(i, 1)?, from)?;
        if i.opcode == "fma" {
            count(i, 4..=4)?;
            return Ok(Op::Alu(Alu::MixedFma {
                bf16,
                mode,
                dst,
                a,
                b: self.src(operand(i, 2)?, from)?,
                c: self.src(operand(i, 3)?, Ty::F32)?,
            }));
        }
        count(i, 3..=3)?;
        Ok(Op::Alu(Alu::MixedAdd {
            bf16,
            subtract: i.opcode == "sub",
            mode,
            dst,
            a,
            c: self.src(operand(i, 2)?, Ty::F32)?,
        }))
    }

    fn testp(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let op = m.need(
            "the property",
            &[
                ("finite", Property::Finite),
                ("infinite", Property::Infinite),
                ("number", Property::Number),
                ("notanumber", Property::NotANumber),
                ("normal", Property::Normal),
                ("subnormal", Property::Subnormal),
            ],
        )?;
        let ty = m.ty()?;
        count(i, 2..=2)?;
        if !matches!(ty, Ty::F32 | Ty::F64) {
            return fail("`testp` exists for f32 and f64");
        }
        Ok(Op::Alu(Alu::TestP {
            op,
            ty: float_ty(ty)?,
            dst: self.pred_dst(operand(i, 0)?)?,
            a: self.src(operand(i, 1)?, ty)?,
        }))
    }
}

fn mixed(i: &Instruction<'_>) -> bool {
    let types = i.modifiers.iter().filter(|w| Ty::parse(w).is_some());
    types.count() == 2
}
