//! `wmma.load`, `wmma.mma`, `wmma.store` (manual section "Matrix multiply-accumulate operation using wmma
//! instructions").
//!
//! The manual defines the number of registers of a fragment, but not the element that lies in each; programs may only
//! treat all elements alike. This layout is the simplest: element `slot` of lane `lane` is number `lane * slots +
//! slot` of the matrix by rows. The f16 fragments of A and B have room for more elements than the matrix; the numbers
//! then wrap, so some elements are held several times, as on hardware.

use super::fragment::LANES;
use super::mma::{Accumulator, BitOp, Element, Fragment, MAX_REGISTERS, Shape, read_float, write_float};
use crate::numeric::Rounding;
use crate::numeric::float64;
use crate::numeric::format::{bf16_to_f32, f16_to_f32, tf32_to_f32};

/// Matrix of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// m x k.
    A,
    /// k x n.
    B,
    /// m x n, the C of `wmma.load` and `wmma.mma`.
    C,
    /// m x n, the D of `wmma.mma` and `wmma.store`.
    D,
}

/// Shape and types of a `wmma` instruction; `wmma.load` and `wmma.store` use the fields of their matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wmma {
    /// Shape of the product.
    pub shape: Shape,
    /// Element type of A.
    pub a: Element,
    /// Element type of B.
    pub b: Element,
    /// Type of C.
    pub c: Accumulator,
    /// Type of D.
    pub d: Accumulator,
    /// `.satfinite`: integers clamp.
    pub satfinite: bool,
    /// Operation of `.b1`.
    pub bit_op: BitOp,
    /// Rounding of `.f64`.
    pub rounding: Rounding,
}

/// A combination of shape and types that `wmma` does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wmma has no m{}n{}k{} with types {:?} x {:?} + {:?} -> {:?}",
    .0.shape.m, .0.shape.n, .0.shape.k, .0.a, .0.b, .0.c, .0.d)]
pub struct UnsupportedWmma(pub Wmma);

impl Wmma {
    /// Makes an instruction without modifiers.
    pub const fn new(shape: Shape, a: Element, b: Element, c: Accumulator, d: Accumulator) -> Wmma {
        Wmma {
            shape,
            a,
            b,
            c,
            d,
            satfinite: false,
            bit_op: BitOp::Xor,
            rounding: Rounding::NearestEven,
        }
    }

    /// Checks the instruction against the manual's table.
    ///
    /// # Errors
    ///
    /// [`UnsupportedWmma`] if there is no such instruction.
    pub const fn check(&self) -> Result<(), UnsupportedWmma> {
        use Accumulator as Acc;
        use Element::{B1, Bf16, F16, F64, S4, S8, Tf32, U4, U8};
        let Shape { m, n, k } = self.shape;
        let wide = matches!((m, n, k), (16, 16, 16) | (8, 32, 16) | (32, 8, 16));
        let fine = match (self.a, self.b, self.c, self.d) {
            (F16, F16, Acc::F16 | Acc::F32, Acc::F16 | Acc::F32) | (Bf16, Bf16, Acc::F32, Acc::F32) => wide,
            (S8, S8, Acc::S32, Acc::S32) | (U8, U8, Acc::S32, Acc::S32) => wide,
            (Tf32, Tf32, Acc::F32, Acc::F32) => matches!((m, n, k), (16, 16, 8)),
            (F64, F64, Acc::F64, Acc::F64) => matches!((m, n, k), (8, 8, 4)),
            (S4, S4, Acc::S32, Acc::S32) | (U4, U4, Acc::S32, Acc::S32) => {
                matches!((m, n, k), (8, 8, 32))
            }
            (B1, B1, Acc::S32, Acc::S32) => matches!((m, n, k), (8, 8, 128)),
            _ => false,
        };
        if fine { Ok(()) } else { Err(UnsupportedWmma(*self)) }
    }

    /// Returns the rows and columns of an operand.
    pub const fn size(&self, operand: Operand) -> (usize, usize) {
        let Shape { m, n, k } = self.shape;
        match operand {
            Operand::A => (m, k),
            Operand::B => (k, n),
            Operand::C | Operand::D => (m, n),
        }
    }

    /// Returns the number of elements of an operand that a lane holds.
    pub const fn slots(&self, operand: Operand) -> usize {
        let (rows, columns) = self.size(operand);
        match operand {
            // Always eight registers of two, whatever the shape.
            Operand::A | Operand::B if matches!(self.a, Element::F16) => 16,
            _ => rows * columns / LANES,
        }
    }

    /// Returns the number of elements in one register of an operand.
    pub const fn pack(&self, operand: Operand) -> usize {
        match operand {
            Operand::A => self.a.pack(),
            Operand::B => self.b.pack(),
            Operand::C => self.c.pack(),
            Operand::D => self.d.pack(),
        }
    }

    /// Returns the number of registers of an operand that a lane holds.
    pub const fn registers(&self, operand: Operand) -> usize {
        self.slots(operand) / self.pack(operand)
    }

    /// Returns the width of an operand's elements in memory, in bits.
    pub const fn bits(&self, operand: Operand) -> usize {
        match operand {
            Operand::A => self.a.bits(),
            Operand::B => self.b.bits(),
            Operand::C | Operand::D => {
                let kind = if matches!(operand, Operand::C) { self.c } else { self.d };
                match kind {
                    Accumulator::F16 => 16,
                    Accumulator::F32 | Accumulator::S32 => 32,
                    Accumulator::F64 => 64,
                }
            }
        }
    }

    /// Returns the (row, column) of a lane's element: register `slot / pack`, part `slot % pack` from the low bits.
    #[inline]
    pub const fn element(&self, operand: Operand, lane: usize, slot: usize) -> (usize, usize) {
        let (rows, columns) = self.size(operand);
        let number = (lane * self.slots(operand) + slot) % (rows * columns);
        (number / columns, number % columns)
    }

    /// Returns the index of (row, column) in elements from the matrix's address, for a layout and `stride`.
    #[inline]
    pub const fn memory_index(column_major: bool, stride: usize, row: usize, column: usize) -> usize {
        if column_major {
            column * stride + row
        } else {
            row * stride + column
        }
    }

    /// `wmma.mma`: computes D = A B + C, with the arithmetic of [`super::mma`].
    ///
    /// # Errors
    ///
    /// [`UnsupportedWmma`] under the conditions of [`Wmma::check`].
    pub fn execute(&self, a: &Fragment, b: &Fragment, c: &Fragment) -> Result<Fragment, UnsupportedWmma> {
        self.check()?;
        let mut d = [[0; MAX_REGISTERS]; LANES];
        match self.a {
            Element::F64 => {
                let read = |bits: u64, _: usize| f64::from_bits(bits);
                let (left, right) = (self.matrix(Operand::A, a, read), self.matrix(Operand::B, b, read));
                let fma = |sum, x, y| float64::fma(x, y, sum, self.rounding);
                for (lane, registers) in d.iter_mut().enumerate() {
                    for (slot, register) in registers[..2].iter_mut().enumerate() {
                        let sum = f64::from_bits(c[lane][slot]);
                        *register = self.dot(lane, slot, &left, &right, sum, fma).to_bits();
                    }
                }
            }
            Element::F16 | Element::Bf16 | Element::Tf32 | Element::E4m3 | Element::E5m2 => {
                let bits = self.a.bits();
                let read = |register: u64, part: usize| match bits {
                    16 if self.a == Element::F16 => f16_to_f32((register >> (16 * part)) as u16),
                    16 => bf16_to_f32((register >> (16 * part)) as u16),
                    _ => tf32_to_f32(register as u32),
                };
                let (left, right) = (self.matrix(Operand::A, a, read), self.matrix(Operand::B, b, read));
                for (lane, registers) in d.iter_mut().enumerate() {
                    for slot in 0..self.slots(Operand::D) {
                        let sum = read_float(self.c, &c[lane], slot);
                        let sum = self.dot(lane, slot, &left, &right, sum, |sum, x, y| sum + x * y);
                        write_float(self.d, registers, slot, sum);
                    }
                }
            }
            Element::S8 | Element::U8 | Element::S4 | Element::U4 | Element::B1 => {
                let left = self.matrix(Operand::A, a, |bits, part| self.a.to_i32(bits as u32, part));
                let right = self.matrix(Operand::B, b, |bits, part| self.b.to_i32(bits as u32, part));
                let term = |sum: i64, x: i32, y: i32| {
                    let product = match (self.a, self.bit_op) {
                        (Element::B1, BitOp::Xor) => x ^ y,
                        _ => x * y,
                    };
                    sum + i64::from(product)
                };
                for (lane, registers) in d.iter_mut().enumerate() {
                    for (slot, register) in registers.iter_mut().enumerate().take(self.slots(Operand::D)) {
                        let sum = i64::from(c[lane][slot] as i32);
                        let sum = self.dot(lane, slot, &left, &right, sum, term);
                        let clamped = sum.clamp(i32::MIN.into(), i32::MAX.into());
                        *register = u64::from(if self.satfinite { clamped } else { sum } as u32);
                    }
                }
            }
        }
        Ok(d)
    }

    /// Returns an operand by rows.
    fn matrix<T: Copy + Default>(
        &self,
        operand: Operand,
        fragment: &Fragment,
        read: impl Fn(u64, usize) -> T,
    ) -> Vec<T> {
        let (rows, columns) = self.size(operand);
        let pack = self.pack(operand);
        let mut matrix = vec![T::default(); rows * columns];
        for (lane, registers) in fragment.iter().enumerate() {
            for slot in 0..self.slots(operand) {
                let (row, column) = self.element(operand, lane, slot);
                matrix[row * columns + column] = read(registers[slot / pack], slot % pack);
            }
        }
        matrix
    }

    /// Adds the products of a lane's element of D to `sum`, k rising.
    fn dot<T: Copy, S>(
        &self,
        lane: usize,
        slot: usize,
        left: &[T],
        right: &[T],
        sum: S,
        term: impl Fn(S, T, T) -> S,
    ) -> S {
        let (row, column) = self.element(Operand::D, lane, slot);
        let Shape { n, k, .. } = self.shape;
        (0..k).fold(sum, |sum, i| term(sum, left[row * k + i], right[i * n + column]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numeric::format::{f32_to_bf16, f32_to_f16};
    use std::collections::HashSet;

    fn all() -> Vec<Wmma> {
        use Accumulator as Acc;
        use Element::*;
        let mut out = Vec::new();
        for (m, n, k) in [
            (16, 16, 16),
            (8, 32, 16),
            (32, 8, 16),
            (16, 16, 8),
            (8, 8, 4),
            (8, 8, 32),
            (8, 8, 128),
        ] {
            for element in [F16, Bf16, Tf32, F64, S8, U8, S4, U4, B1] {
                for c in [Acc::F16, Acc::F32, Acc::F64, Acc::S32] {
                    for d in [Acc::F16, Acc::F32, Acc::F64, Acc::S32] {
                        let op = Wmma::new(Shape { m, n, k }, element, element, c, d);
                        if op.check().is_ok() {
                            out.push(op);
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn register_counts_are_the_manuals() {
        use Element::*;
        for op in all() {
            let want = match (op.a, op.shape.m) {
                (F16, _) => (8, 8),
                (Bf16, 16) | (Tf32, _) => (4, 4),
                (Bf16, 8) => (2, 8),
                (Bf16, _) => (8, 2),
                (S8 | U8, 16) => (2, 2),
                (S8 | U8, 8) => (1, 4),
                (S8 | U8, _) => (4, 1),
                _ => (1, 1),
            };
            assert_eq!((op.registers(Operand::A), op.registers(Operand::B)), want, "{op:?}");
            let want = match (op.d, op.shape.k) {
                (Accumulator::F16, _) => 4,
                (Accumulator::F64, _) | (_, 32 | 128) => 2,
                _ => 8,
            };
            assert_eq!(op.registers(Operand::D), want, "{op:?}");
        }
        // Three wide shapes: f16 with four pairs of accumulators, bf16, s8, u8; then tf32, f64, s4, u4, b1.
        assert_eq!(all().len(), 3 * (4 + 1 + 2) + 1 + 1 + 2 + 1);
    }

    #[test]
    fn fragments_cover_their_matrix() {
        for op in all() {
            for operand in [Operand::A, Operand::B, Operand::C, Operand::D] {
                let (rows, columns) = op.size(operand);
                let held: HashSet<_> = (0..LANES)
                    .flat_map(|lane| (0..op.slots(operand)).map(move |slot| op.element(operand, lane, slot)))
                    .collect();
                assert_eq!(held.len(), rows * columns);
                assert!(held.iter().all(|&(r, c)| r < rows && c < columns));
            }
        }
    }

    #[test]
    fn products_match_a_triple_loop() {
        for op in all() {
            let value = |seed: usize, row: usize, column: usize| match op.a {
                Element::B1 => ((row * 3 + column * 5 + seed) % 2) as i32,
                Element::U8 | Element::U4 => ((row * 3 + column * 5 + seed) % 7) as i32,
                _ => ((row * 3 + column * 5 + seed) % 7) as i32 - 3,
            };
            let bits = |x: i32| match op.a {
                Element::F16 => u64::from(f32_to_f16(x as f32)),
                Element::Bf16 => u64::from(f32_to_bf16(x as f32)),
                Element::Tf32 => u64::from((x as f32).to_bits()),
                Element::F64 => f64::from(x).to_bits(),
                _ => x as u64 & ((1 << op.a.bits()) - 1),
            };
            let fill = |operand: Operand, seed: usize| -> Fragment {
                std::array::from_fn(|lane| {
                    let mut registers = [0; MAX_REGISTERS];
                    for slot in 0..op.slots(operand) {
                        let (row, column) = op.element(operand, lane, slot);
                        let pack = op.pack(operand);
                        registers[slot / pack] |= bits(value(seed, row, column)) << (slot % pack * op.a.bits() % 64);
                    }
                    registers
                })
            };
            let mut c: Fragment = [[0; MAX_REGISTERS]; LANES];
            for registers in &mut c {
                for slot in 0..op.slots(Operand::C) {
                    match op.c {
                        Accumulator::S32 => registers[slot] = 2,
                        Accumulator::F64 => registers[slot] = 2f64.to_bits(),
                        kind => write_float(kind, registers, slot, 2.0),
                    }
                }
            }
            let d = op.execute(&fill(Operand::A, 1), &fill(Operand::B, 2), &c).unwrap();
            for (lane, registers) in d.iter().enumerate() {
                for slot in 0..op.slots(Operand::D) {
                    let (row, column) = op.element(Operand::D, lane, slot);
                    let terms = (0..op.shape.k).map(|k| match op.a {
                        Element::B1 => value(1, row, k) ^ value(2, k, column),
                        _ => value(1, row, k) * value(2, k, column),
                    });
                    let want = 2 + terms.sum::<i32>();
                    let got = match op.d {
                        Accumulator::S32 => f64::from(registers[slot] as i32),
                        Accumulator::F64 => f64::from_bits(registers[slot]),
                        kind => f64::from(read_float(kind, registers, slot)),
                    };
                    assert_eq!(got, f64::from(want), "{op:?} ({row}, {column})");
                }
            }
        }
    }

    #[test]
    fn memory_layouts() {
        assert_eq!(Wmma::memory_index(false, 24, 3, 5), 77);
        assert_eq!(Wmma::memory_index(true, 24, 3, 5), 123);
    }
}
