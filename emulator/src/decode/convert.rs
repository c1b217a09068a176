//! Moves, conversions between types, and conversions between address spaces.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Space, Ty};
use crate::isa::{Alu, Counter, Op};
use crate::numeric::Rounding;
use crate::numeric::cvt::{CvtMode, CvtRounding, Fp8, NarrowMode, PackType, Scalar};
use crate::numeric::float16::Half;
use crate::parse::ast::{Instruction, Operand};

type Decoded = Result<Option<Op>, Failure>;

/// State-space modifiers of addresses.
pub(super) const SPACES: &[(&str, Space)] = &[
    ("global", Space::Global),
    ("shared", Space::Shared),
    ("shared::cta", Space::Shared),
    ("shared::cluster", Space::SharedCluster),
    ("local", Space::Local),
    ("param", Space::Param),
    ("param::entry", Space::Param),
    ("param::func", Space::Param),
    ("const", Space::Const),
];

fn scalar(ty: Ty) -> Option<Scalar> {
    Some(match ty {
        Ty::U8 => Scalar::U8,
        Ty::S8 => Scalar::S8,
        Ty::U16 => Scalar::U16,
        Ty::S16 => Scalar::S16,
        Ty::U32 => Scalar::U32,
        Ty::S32 => Scalar::S32,
        Ty::U64 => Scalar::U64,
        Ty::S64 => Scalar::S64,
        Ty::F16 => Scalar::F16,
        Ty::Bf16 => Scalar::Bf16,
        Ty::F32 => Scalar::F32,
        Ty::F64 => Scalar::F64,
        _ => return None,
    })
}

fn fp8(ty: Ty) -> Option<Fp8> {
    match ty {
        Ty::E4m3x2 => Some(Fp8::E4m3),
        Ty::E5m2x2 => Some(Fp8::E5m2),
        _ => None,
    }
}

fn half2(ty: Ty) -> Option<Half> {
    match ty {
        Ty::F16x2 => Some(Half::F16),
        Ty::Bf16x2 => Some(Half::Bf16),
        _ => None,
    }
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn convert(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let op = match i.opcode {
            "mov" => self.mov(i, m)?,
            "cvt" if m.take("pack") => self.cvt_pack(i, m)?,
            "cvt" => self.cvt(i, m)?,
            "cvta" => self.cvta(i, m)?,
            "isspacep" => {
                let space = m.need("the state space", SPACES)?;
                count(i, 2..=2)?;
                Op::Alu(Alu::Isspacep {
                    space,
                    dst: self.pred_dst(operand(i, 0)?)?,
                    src: self.src(operand(i, 1)?, Ty::B64)?,
                })
            }
            "mapa" => {
                let generic = !m.take("shared::cluster");
                let ty = m.ty()?;
                count(i, 3..=3)?;
                Op::Alu(Alu::Mapa {
                    dst: self.dst_of(operand(i, 0)?, ty)?,
                    src: self.src(operand(i, 1)?, ty)?,
                    rank: self.src(operand(i, 2)?, Ty::B32)?,
                    generic,
                })
            }
            "getctarank" => {
                let generic = !m.take("shared::cluster");
                let ty = m.ty()?;
                count(i, 2..=2)?;
                Op::Alu(Alu::CtaRank {
                    dst: self.dst_of(operand(i, 0)?, Ty::B32)?,
                    src: self.src(operand(i, 1)?, ty)?,
                    generic,
                })
            }
            _ => return Ok(None),
        };
        Ok(Some(op))
    }

    fn mov(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let ty = m.ty()?;
        count(i, 2..=2)?;
        let (d, a) = (operand(i, 0)?, operand(i, 1)?);
        if ty == Ty::Pred {
            return Ok(Op::Alu(Alu::MovPred {
                dst: self.pred_dst(d)?,
                src: self.pred(a)?,
            }));
        }
        let counter = match a {
            Operand::Name("%clock" | "%clock_lo") => Some(Counter::Clock),
            Operand::Name("%clock_hi") => Some(Counter::ClockHi),
            Operand::Name("%clock64") => Some(Counter::Clock64),
            Operand::Name("%globaltimer") => Some(Counter::GlobalTimer),
            Operand::Name("%globaltimer_lo") => Some(Counter::GlobalTimerLo),
            Operand::Name("%globaltimer_hi") => Some(Counter::GlobalTimerHi),
            _ => None,
        };
        if let Some(counter) = counter {
            let dst = self.dst_of(d, ty)?;
            return Ok(Op::Alu(Alu::Clock { dst, counter }));
        }
        match (d, a) {
            (Operand::Vector(parts), source) => self.unpack(parts.len(), d, source, ty),
            (_, Operand::Vector(parts)) => self.pack(parts, d, ty),
            _ if ty == Ty::B128 => {
                let (dst, src) = (self.dst_of(d, ty)?, self.src(a, ty)?);
                Ok(Op::Alu(Alu::Pack {
                    dst,
                    parts: [src, src + 1].into(),
                    part_bits: 64,
                }))
            }
            _ => {
                let dst = self.dst_of(d, ty)?;
                let src = self.src(a, ty)?;
                Ok(Op::Alu(Alu::Mov {
                    dst,
                    src,
                    bits: ty.bits(),
                }))
            }
        }
    }

    fn part_ty(&self, ty: Ty, parts: usize) -> Result<Ty, Failure> {
        let bits = ty.bits() as usize;
        match bits.checked_div(parts) {
            Some(8) => Ok(Ty::B8),
            Some(16) => Ok(Ty::B16),
            Some(32) => Ok(Ty::B32),
            Some(64) => Ok(Ty::B64),
            _ => fail(format!("{parts} parts do not divide {bits} bits")),
        }
    }

    fn pack(&mut self, parts: &[Operand<'a>], d: &Operand<'a>, ty: Ty) -> Result<Op, Failure> {
        let part = self.part_ty(ty, parts.len())?;
        let dst = self.dst_of(d, ty)?;
        let parts: Result<Vec<_>, _> = parts.iter().map(|p| self.src(p, part)).collect();
        Ok(Op::Alu(Alu::Pack {
            dst,
            parts: parts?.into(),
            part_bits: part.bits(),
        }))
    }

    fn unpack(&mut self, parts: usize, d: &Operand<'a>, source: &Operand<'a>, ty: Ty) -> Result<Op, Failure> {
        let part = self.part_ty(ty, parts)?;
        let dsts = self.dst_rows(d, part)?;
        let src = self.src(source, ty)?;
        Ok(Op::Alu(Alu::Unpack {
            dsts,
            src,
            part_bits: part.bits(),
        }))
    }

    fn cvt(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let float_rounding = m.rounding();
        let integer_rounding = m.integer_rounding();
        let ftz = m.take("ftz");
        let sat = m.take("sat");
        let relu = m.take("relu");
        let satfinite = m.take("satfinite");
        let (to, from) = (m.ty()?, m.ty()?);
        if let (Some(to), Some(from)) = (scalar(to), scalar(from)) {
            let rounding = match (float_rounding, integer_rounding) {
                (Some(r), None) => CvtRounding::Float(r),
                (None, Some(r)) => CvtRounding::Integer(r),
                (None, None) => CvtRounding::Exact,
                (Some(_), Some(_)) => return fail("two rounding modifiers"),
            };
            count(i, 2..=2)?;
            let dst = self.dst(operand(i, 0)?)?;
            if dst.bits < to.bits() {
                return fail("the destination register is narrower than the type");
            }
            let a = self.src(operand(i, 1)?, m_ty(from))?;
            let mode = CvtMode {
                rounding,
                ftz,
                sat,
                relu,
                satfinite,
            };
            return Ok(Op::Alu(Alu::Cvt {
                to,
                from,
                mode,
                dst_bits: dst.bits,
                dst: dst.slot,
                a,
            }));
        }
        if ftz || sat || integer_rounding.is_some() {
            return fail("this modifier does not go with packed types");
        }
        let mode = NarrowMode {
            rounding: float_rounding.unwrap_or(Rounding::NearestEven),
            relu,
            satfinite,
        };
        self.cvt_packed(i, to, from, mode)
    }

    fn cvt_packed(&mut self, i: &Instruction<'a>, to: Ty, from: Ty, mode: NarrowMode) -> Result<Op, Failure> {
        let relu = mode.relu;
        let dst = self.dst_of(operand(i, 0)?, to)?;
        if from == Ty::F32 && to != Ty::Tf32 {
            count(i, 3..=3)?;
            let a = self.src(operand(i, 1)?, Ty::F32)?;
            let b = self.src(operand(i, 2)?, Ty::F32)?;
            return match (half2(to), fp8(to)) {
                (Some(half), _) => Ok(Op::Alu(Alu::CvtHalf2 { half, mode, dst, a, b })),
                (_, Some(kind)) if mode.satfinite => Ok(Op::Alu(Alu::CvtFp8FromF32 { kind, relu, dst, a, b })),
                _ => fail("this pair of types is not known"),
            };
        }
        count(i, 2..=2)?;
        let a = self.src(operand(i, 1)?, from)?;
        let alu = match (to, from) {
            (Ty::Tf32, Ty::F32) => Alu::CvtTf32 { mode, dst, a },
            _ => match (fp8(to), half2(from), half2(to), fp8(from)) {
                (Some(kind), Some(half), _, _) if mode.satfinite => Alu::CvtFp8FromHalf2 {
                    kind,
                    half,
                    relu,
                    dst,
                    a,
                },
                (_, _, Some(Half::F16), Some(kind)) => Alu::CvtHalf2FromFp8 { kind, relu, dst, a },
                _ => return fail("this pair of types is not known"),
            },
        };
        Ok(Op::Alu(alu))
    }

    fn cvt_pack(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        if !m.take("sat") {
            return fail("`.sat` is missing");
        }
        let to = m.need(
            "the packed type",
            &[
                ("u16", PackType::U16),
                ("s16", PackType::S16),
                ("u8", PackType::U8),
                ("s8", PackType::S8),
                ("u4", PackType::U4),
                ("s4", PackType::S4),
                ("u2", PackType::U2),
                ("s2", PackType::S2),
            ],
        )?;
        if m.ty()? != Ty::S32 {
            return fail("the source type is s32");
        }
        let wide = matches!(to, PackType::U16 | PackType::S16);
        let three = m.take("b32");
        if three == wide {
            return fail("`.b32` goes with types below 16 bits");
        }
        count(i, if three { 4..=4 } else { 3..=3 })?;
        Ok(Op::Alu(Alu::CvtPack {
            to,
            dst: self.dst_of(operand(i, 0)?, Ty::B32)?,
            a: self.src(operand(i, 1)?, Ty::B32)?,
            b: self.src(operand(i, 2)?, Ty::B32)?,
            c: if three {
                self.src(operand(i, 3)?, Ty::B32)?
            } else {
                self.constant(0)
            },
        }))
    }

    fn cvta(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let to_space = m.take("to");
        let space = m.need("the state space", SPACES)?;
        let ty = m.ty()?;
        count(i, 2..=2)?;
        Ok(Op::Alu(Alu::Cvta {
            dst: self.dst_of(operand(i, 0)?, ty)?,
            src: self.src(operand(i, 1)?, Ty::B32)?,
            space: if space == Space::Param && !self.is_entry {
                Space::Local
            } else {
                space
            },
            to_space,
            bits: ty.bits(),
        }))
    }
}

/// Returns the type that a scalar source's bits are read with.
fn m_ty(from: Scalar) -> Ty {
    match from.bits() {
        8 => Ty::B8,
        16 => Ty::B16,
        32 if from == Scalar::F32 => Ty::F32,
        32 => Ty::B32,
        _ if from == Scalar::F64 => Ty::F64,
        _ => Ty::B64,
    }
}
