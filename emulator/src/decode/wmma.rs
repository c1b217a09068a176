//! `wmma.load`, `wmma.store` and `wmma.mma`.

use super::matrix::{ACCUMULATORS, ELEMENTS, next_of, shape};
use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Slot, Ty};
use crate::isa::{Op, WmmaOp};
use crate::parse::ast::Instruction;
use crate::tensor::mma::{Accumulator, Element, Shape};
use crate::tensor::wmma::{Operand as Matrix, Wmma};

/// Returns the accumulator type of an element type, for instructions that do not name one.
fn accumulator_of(element: Element) -> Accumulator {
    match element {
        Element::F64 => Accumulator::F64,
        Element::S8 | Element::U8 => Accumulator::S32,
        _ => Accumulator::F32,
    }
}

/// Returns an element type that goes with an accumulator and shape, for instructions that name only the accumulator.
fn element_of(accumulator: Accumulator, k: usize) -> Element {
    match (accumulator, k) {
        (Accumulator::F64, _) => Element::F64,
        (Accumulator::S32, _) => Element::S8,
        (Accumulator::F32, 8) => Element::Tf32,
        _ => Element::F16,
    }
}

/// Returns the operand that a `wmma.load` or `wmma.store` names.
fn operand_named(word: &str) -> Option<Matrix> {
    match word {
        "a" => Some(Matrix::A),
        "b" => Some(Matrix::B),
        "c" => Some(Matrix::C),
        "d" => Some(Matrix::D),
        _ => None,
    }
}

fn register(wmma: &Wmma, operand: Matrix) -> Ty {
    if wmma.bits(operand) == 64 { Ty::F64 } else { Ty::B32 }
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn wmma(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let action = m.next().unwrap_or("");
        let named = if action == "mma" { None } else { m.next() };
        if !m.take("sync") || !m.take("aligned") {
            return fail("`.sync.aligned` is missing");
        }
        let Some((rows, columns, k)) = m.find(shape) else {
            return fail("the shape is missing");
        };
        let shape = Shape {
            m: rows as usize,
            n: columns as usize,
            k: k as usize,
        };
        let mut major = || match m.next() {
            Some("row") => Ok(false),
            Some("col") => Ok(true),
            _ => fail("the layout is missing"),
        };
        let first = major()?;
        if action == "mma" {
            major()?;
            return self.wmma_mma(i, m, shape);
        }
        let space = super::memory::space(m);
        let store = action == "store";
        let Some(matrix) = named.and_then(operand_named) else {
            return fail("the operand is a, b, c or d");
        };
        let wmma = if matches!(matrix, Matrix::A | Matrix::B) {
            let element = next_of(m, ELEMENTS)?;
            let accumulator = accumulator_of(element);
            Wmma::new(shape, element, element, accumulator, accumulator)
        } else {
            let accumulator = next_of(m, ACCUMULATORS)?;
            let element = element_of(accumulator, shape.k);
            Wmma::new(shape, element, element, accumulator, accumulator)
        };
        if let Err(error) = wmma.check() {
            return fail(error.to_string());
        }
        if wmma.bits(matrix) < 8 || !matches!(action, "load" | "store") {
            return fail("this `wmma` instruction is not known");
        }
        count(i, 2..=3)?;
        let (at_rows, at_addr) = if store { (1, 0) } else { (0, 1) };
        let ty = register(&wmma, matrix);
        let rows: Box<[Slot]> = if store {
            self.srcs(operand(i, at_rows)?, ty)?.into()
        } else {
            self.dst_rows(operand(i, at_rows)?, ty)?
        };
        if rows.len() != wmma.registers(matrix) {
            return fail(format!("the fragment has {} registers", wmma.registers(matrix)));
        }
        Ok(Op::Wmma(WmmaOp::Move {
            wmma,
            operand: matrix,
            column_major: first,
            addr: self.addr(operand(i, at_addr)?, space)?,
            stride: match i.operands.get(2) {
                Some(stride) => Some(self.src(stride, Ty::B32)?),
                None => None,
            },
            rows,
            store,
        }))
    }

    fn wmma_mma(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, shape: Shape) -> Result<Op, Failure> {
        let rounding = m.rounding();
        let satfinite = m.take("satfinite");
        let d = next_of(m, ACCUMULATORS)?;
        // Instructions on half precision name only D and C; the others name all four.
        let (a, b, c) = if i.modifiers.len() == 8 + usize::from(satfinite) + usize::from(rounding.is_some()) {
            (Element::F16, Element::F16, next_of(m, ACCUMULATORS)?)
        } else {
            (next_of(m, ELEMENTS)?, next_of(m, ELEMENTS)?, next_of(m, ACCUMULATORS)?)
        };
        let mut wmma = Wmma::new(shape, a, b, c, d);
        wmma.satfinite = satfinite;
        wmma.rounding = rounding.unwrap_or(wmma.rounding);
        if let Err(error) = wmma.check() {
            return fail(error.to_string());
        }
        count(i, 4..=4)?;
        let sources = [(1, Matrix::A), (2, Matrix::B), (3, Matrix::C)];
        let mut rows: Vec<Box<[Slot]>> = Vec::new();
        for (at, matrix) in sources {
            rows.push(self.srcs(operand(i, at)?, register(&wmma, matrix))?.into());
        }
        let d = self.dst_rows(operand(i, 0)?, register(&wmma, Matrix::D))?;
        let lengths = [Matrix::A, Matrix::B, Matrix::C, Matrix::D].map(|o| wmma.registers(o));
        if [rows[0].len(), rows[1].len(), rows[2].len(), d.len()] != lengths {
            return fail(format!("the fragments have {lengths:?} registers"));
        }
        let [a, b, c] = [0, 1, 2].map(|at: usize| rows[at].clone());
        Ok(Op::Wmma(WmmaOp::Mma { wmma, d, a, b, c }))
    }
}
