//! Tensor-core instructions: fragment moves, `mma.sync`, `wgmma`.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Slot, Ty};
use crate::isa::{Op, TensorOp, Wgmma, WgmmaA, WgmmaOp};
use crate::numeric::Rounding;
use crate::parse::ast::{Instruction, Operand};
use crate::tensor::mma::{Accumulator, BitOp, Element, Mma, Shape};

type Decoded = Result<Option<Op>, Failure>;

pub(super) const ACCUMULATORS: &[(&str, Accumulator)] = &[
    ("f16", Accumulator::F16),
    ("f32", Accumulator::F32),
    ("f64", Accumulator::F64),
    ("s32", Accumulator::S32),
];

pub(super) const ELEMENTS: &[(&str, Element)] = &[
    ("f16", Element::F16),
    ("bf16", Element::Bf16),
    ("tf32", Element::Tf32),
    ("f64", Element::F64),
    ("e4m3", Element::E4m3),
    ("e5m2", Element::E5m2),
    ("s8", Element::S8),
    ("u8", Element::U8),
    ("s4", Element::S4),
    ("u4", Element::U4),
    ("b1", Element::B1),
];

/// Takes the next word of the text and looks it up in a table.
pub(super) fn next_of<T: Copy>(m: &mut Modifiers<'_>, table: &[(&str, T)]) -> Result<T, Failure> {
    let word = m.next().unwrap_or("");
    match table.iter().find(|(name, _)| *name == word) {
        Some((_, value)) => Ok(*value),
        None => fail(format!("operand type `{word}` is not known")),
    }
}

/// Reads the three numbers of `m16n8k16`.
pub(super) fn shape(word: &str) -> Option<(u32, u32, u32)> {
    let (m, rest) = word.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k').unwrap_or((rest, "0"));
    Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn matrix(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        if i.opcode == "wmma" {
            return self.wmma(i, m).map(Some);
        }
        if !matches!(i.opcode, "mma" | "ldmatrix" | "stmatrix" | "movmatrix" | "wgmma") {
            return Ok(None);
        }
        let action = if i.opcode == "wgmma" { m.next() } else { None };
        if !m.take("sync") || !m.take("aligned") {
            return fail("`.sync.aligned` is missing");
        }
        let op = match (i.opcode, action) {
            ("mma", _) => Op::Tensor(self.mma(i, m)?),
            ("ldmatrix", _) => Op::Tensor(self.ldmatrix(i, m)?),
            ("stmatrix", _) => Op::Tensor(self.stmatrix(i, m)?),
            ("movmatrix", _) => Op::Tensor(self.movmatrix(i, m)?),
            (_, Some("fence")) => Op::Wgmma(WgmmaOp::Fence),
            (_, Some("commit_group")) => Op::Wgmma(WgmmaOp::Commit),
            (_, Some("wait_group")) => {
                count(i, 1..=1)?;
                let left = self.literal(operand(i, 0)?)?;
                if left > 7 {
                    return fail("the group count is at most 7");
                }
                Op::Wgmma(WgmmaOp::Wait { left: left as u32 })
            }
            (_, Some("mma_async")) => Op::Wgmma(self.wgmma(i, m)?),
            _ => return fail("this `wgmma` instruction is not known"),
        };
        Ok(Some(op))
    }

    fn matrices(&self, m: &mut Modifiers<'a>) -> Result<(usize, bool), Failure> {
        if !m.take("m8n8") {
            return fail("only `.m8n8` is known");
        }
        let n = m.need("`.x1`, `.x2` or `.x4`", &[("x1", 1), ("x2", 2), ("x4", 4)])?;
        Ok((n, m.take("trans")))
    }

    fn ldmatrix(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<TensorOp, Failure> {
        let (n, trans) = self.matrices(m)?;
        count(i, 2..=2)?;
        let dsts = self.dst_rows(operand(i, 0)?, Ty::B32)?;
        let addr = self.shared_addr(operand(i, 1)?, m)?;
        if m.ty()? != Ty::B16 || dsts.len() != n {
            return fail("the type is b16, with one destination a matrix");
        }
        Ok(TensorOp::Ldmatrix { addr, trans, dsts })
    }

    fn stmatrix(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<TensorOp, Failure> {
        let (n, trans) = self.matrices(m)?;
        count(i, 2..=2)?;
        let srcs: Box<[Slot]> = self.srcs(operand(i, 1)?, Ty::B32)?.into();
        let addr = self.shared_addr(operand(i, 0)?, m)?;
        if m.ty()? != Ty::B16 || srcs.len() != n {
            return fail("the type is b16, with one source a matrix");
        }
        Ok(TensorOp::Stmatrix { addr, trans, srcs })
    }

    fn movmatrix(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<TensorOp, Failure> {
        if !m.take("m8n8") || !m.take("trans") || m.ty()? != Ty::B16 {
            return fail("only `.m8n8.trans.b16` is known");
        }
        Ok(TensorOp::Movmatrix {
            dst: self.dst_of(operand(i, 0)?, Ty::B32)?,
            src: self.src(operand(i, 1)?, Ty::B32)?,
        })
    }

    fn mma(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<TensorOp, Failure> {
        let Some((rows, columns, k)) = m.find(shape) else {
            return fail("the shape is missing");
        };
        let major = |word: Option<&str>| match word {
            Some("row") => Ok(false),
            Some("col") => Ok(true),
            _ => fail("the layouts are missing"),
        };
        let (a_column_major, b_column_major) = (major(m.next())?, major(m.next())?);
        let rounding = m.rounding().unwrap_or(Rounding::NearestEven);
        let satfinite = m.take("satfinite");
        let bit_op = m.one_of(&[("xor", BitOp::Xor), ("and", BitOp::And)]);
        m.take("popc");
        let d = next_of(m, ACCUMULATORS)?;
        let a = next_of(m, ELEMENTS)?;
        let b = next_of(m, ELEMENTS)?;
        let c = next_of(m, ACCUMULATORS)?;
        let (m, n, k) = (rows as usize, columns as usize, k as usize);
        let mma = Mma {
            a_column_major,
            b_column_major,
            satfinite,
            bit_op: bit_op.unwrap_or_default(),
            rounding,
            ..Mma::new(Shape { m, n, k }, a, b, c, d)
        };
        if let Err(error) = mma.check() {
            return fail(error.to_string());
        }
        count(i, 4..=4)?;
        let register = if a == Element::F64 { Ty::F64 } else { Ty::B32 };
        let op = TensorOp::Mma {
            mma,
            d: self.dst_rows(operand(i, 0)?, register)?,
            a: self.srcs(operand(i, 1)?, register)?.into(),
            b: self.srcs(operand(i, 2)?, register)?.into(),
            c: self.srcs(operand(i, 3)?, register)?.into(),
        };
        let TensorOp::Mma { d, a, b, c, .. } = &op else {
            return Ok(op);
        };
        if [a.len(), b.len(), c.len(), d.len()] != mma.registers() {
            return fail(format!("the operands have {:?} registers", mma.registers()));
        }
        Ok(op)
    }

    fn wgmma(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WgmmaOp, Failure> {
        let Some((64, n, k)) = m.find(shape) else {
            return fail("the shape is missing or not known");
        };
        if n == 0 || n % 8 != 0 || n > 256 {
            return fail("n is a multiple of 8 up to 256");
        }
        let satfinite = m.take("satfinite");
        let (d_ty, a_ty, b_ty) = (m.ty()?, m.ty()?, m.ty()?);
        let integer = d_ty == Ty::S32;
        let byte = |ty| matches!(ty, Ty::S8 | Ty::U8);
        let half = matches!(a_ty, Ty::F16 | Ty::Bf16);
        let fp8 = !integer && matches!(a_ty, Ty::E4m3 | Ty::E5m2) && matches!(b_ty, Ty::E4m3 | Ty::E5m2);
        let known = match k {
            16 => half && a_ty == b_ty && (d_ty == Ty::F32 || (d_ty, a_ty) == (Ty::F16, Ty::F16)),
            8 => a_ty == Ty::Tf32 && b_ty == Ty::Tf32 && d_ty == Ty::F32,
            32 if integer => byte(a_ty) && byte(b_ty) && (n <= 32 || n % 16 == 0),
            32 => fp8 && matches!(d_ty, Ty::F32 | Ty::F16),
            _ => false,
        };
        if !known || satfinite && !integer {
            return fail("this combination of shape and types is not known");
        }
        let d = self.dst_rows(operand(i, 0)?, Ty::B32)?;
        let per_lane = if d_ty == Ty::F16 { n / 4 } else { n / 2 };
        if d.len() != per_lane as usize {
            return fail(format!("the accumulator has {} registers, not {per_lane}", d.len()));
        }
        self.reads.extend_from_slice(&d);
        let a = match operand(i, 1)? {
            list @ Operand::Vector(_) => {
                let rows = self.srcs(list, Ty::B32)?;
                if rows.len() != 4 {
                    return fail("A in registers is 4 registers");
                }
                WgmmaA::Registers(rows.into())
            }
            descriptor => WgmmaA::Descriptor(self.src(descriptor, Ty::B64)?),
        };
        let b = self.src(operand(i, 2)?, Ty::B64)?;
        let scale_d = self.pred(operand(i, 3)?)?;
        let from_shared = matches!(a, WgmmaA::Descriptor(_));
        let transposes = usize::from(half) * (1 + usize::from(from_shared));
        let signs = if integer { 0 } else { 2 };
        count(i, 4 + signs + transposes..=4 + signs + transposes)?;
        let mut trans = [false; 2];
        for (at, flag) in trans.iter_mut().rev().take(transposes).enumerate() {
            *flag = self.flag(operand(i, 5 + transposes - at)?)?;
        }
        Ok(WgmmaOp::Mma(Box::new(Wgmma {
            n,
            k,
            d_ty,
            a_ty,
            b_ty,
            d,
            a,
            b,
            scale_d,
            negate_a: !integer && self.sign(operand(i, 4)?)?,
            negate_b: !integer && self.sign(operand(i, 5)?)?,
            satfinite,
            trans_a: trans[0],
            trans_b: trans[1],
        })))
    }

    /// Reads `1` or `-1`; true for `-1`.
    fn sign(&mut self, operand: &Operand<'a>) -> Result<bool, Failure> {
        match self.literal(operand)? as i64 {
            1 => Ok(false),
            -1 => Ok(true),
            other => fail(format!("the scale is 1 or -1, not {other}")),
        }
    }

    fn flag(&mut self, operand: &Operand<'a>) -> Result<bool, Failure> {
        match self.literal(operand)? {
            0 => Ok(false),
            1 => Ok(true),
            other => fail(format!("the transpose flag is 0 or 1, not {other}")),
        }
    }
}
