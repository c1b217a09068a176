//! The warp-level product `mma.sync` (manual section "Multiply-and-Accumulate Instruction: mma").
//!
//! All shapes and types take three steps: scatter the lanes' registers to small row-major matrices by the maps of
//! [`super::fragment`], multiply, gather. The manual leaves some rounding open; it is fixed here as follows.
//! * f16, bf16, tf32, fp8: a product is exact in f32 (bf16 and tf32 products may overflow or underflow). Products are
//!   added to the accumulator in f32 one after the other, k rising, each sum rounded to nearest even. An f16
//!   accumulator is widened before and rounded once after.
//! * f64: one fused multiply-add after the other, k rising, in the instruction's rounding mode.
//! * integers: the sum is exact; without `.satfinite` it wraps, with it clamps.
//!
//! A NaN result is the canonical NaN.

#![expect(
    clippy::needless_range_loop,
    reason = "lane, register, row and column index several arrays at once"
)]

use super::fragment::{self, LANES, volta};
use crate::numeric::Rounding;
use crate::numeric::float32::canonical;
use crate::numeric::float64;
use crate::numeric::format::{bf16_to_f32, e4m3_to_f32, e5m2_to_f32, f16_to_f32, f32_to_f16, tf32_to_f32};

/// Most registers of a lane for one operand (f64 `m16n8k16` A; f16 `m8n8k4` C in f32).
pub const MAX_REGISTERS: usize = 8;

/// Largest k of a float type.
const MAX_FLOAT_K: usize = 32;

/// An operand: up to eight registers of each lane, narrower ones in the low bits.
pub type Fragment = [[u64; MAX_REGISTERS]; LANES];

/// Element types of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's types")]
pub enum Element {
    F16,
    Bf16,
    Tf32,
    F64,
    E4m3,
    E5m2,
    S8,
    U8,
    S4,
    U4,
    B1,
}

impl Element {
    /// Returns the width of an element in a register, in bits.
    pub const fn bits(self) -> usize {
        match self {
            Element::F64 => 64,
            Element::Tf32 => 32,
            Element::F16 | Element::Bf16 => 16,
            Element::E4m3 | Element::E5m2 | Element::S8 | Element::U8 => 8,
            Element::S4 | Element::U4 => 4,
            Element::B1 => 1,
        }
    }

    /// Returns the number of elements in one register.
    pub const fn pack(self) -> usize {
        match self.bits() {
            64 => 1,
            bits => 32 / bits,
        }
    }

    /// Returns the value of an integer element at `part` of a register.
    #[inline]
    pub const fn to_i32(self, register: u32, part: usize) -> i32 {
        let bits = self.bits();
        let up = register << (32 - bits * (part + 1));
        match self {
            Element::S8 | Element::S4 => up as i32 >> (32 - bits),
            _ => (up >> (32 - bits)) as i32,
        }
    }
}

/// Types of the accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's types")]
pub enum Accumulator {
    F16,
    F32,
    F64,
    S32,
}

impl Accumulator {
    /// Returns the number of accumulator elements in one register.
    pub const fn pack(self) -> usize {
        match self {
            Accumulator::F16 => 2,
            Accumulator::F32 | Accumulator::F64 | Accumulator::S32 => 1,
        }
    }
}

/// Bit operation of a `.b1` product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BitOp {
    /// `.xor.popc`.
    #[default]
    Xor,
    /// `.and.popc`.
    And,
}

/// m, n and k of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// An `mma.sync` instruction, without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mma {
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
    /// True if A is stored by columns (only for f16 `m8n8k4`; the other shapes have `.row` alone).
    pub a_column_major: bool,
    /// True if B is stored by columns (`.col`, the only layout except for f16 `m8n8k4`).
    pub b_column_major: bool,
    /// `.satfinite` of the integer types.
    pub satfinite: bool,
    /// Operation of `.b1`.
    pub bit_op: BitOp,
    /// Rounding of `.f64`.
    pub rounding: Rounding,
}

/// A combination of shape and types that no `mma.sync` of sm_80 to sm_90 has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mma.sync has no m{}n{}k{} with types {:?} x {:?} + {:?} -> {:?} and these layouts",
    .0.shape.m, .0.shape.n, .0.shape.k, .0.a, .0.b, .0.c, .0.d)]
pub struct UnsupportedMma(pub Mma);

impl Mma {
    /// Makes an instruction with `.row.col` layouts and no further modifiers.
    pub const fn new(shape: Shape, a: Element, b: Element, c: Accumulator, d: Accumulator) -> Mma {
        Mma {
            shape,
            a,
            b,
            c,
            d,
            a_column_major: false,
            b_column_major: true,
            satfinite: false,
            bit_op: BitOp::Xor,
            rounding: Rounding::NearestEven,
        }
    }

    /// Returns true for the Volta-style product, which has maps of its own.
    pub const fn is_volta(&self) -> bool {
        matches!(self.a, Element::F16) && self.shape.m == 8
    }

    /// Returns the number of registers that a lane supplies for A, B, C and D.
    pub const fn registers(&self) -> [usize; 4] {
        let Shape { m, n, k } = self.shape;
        if self.is_volta() {
            return [2, 2, 8 / self.c.pack(), 8 / self.d.pack()];
        }
        let accumulators = m * n / LANES;
        [
            m * k / LANES / self.a.pack(),
            n * k / LANES / self.b.pack(),
            accumulators / self.c.pack(),
            accumulators / self.d.pack(),
        ]
    }

    /// Returns the FLOPs of one warp: two for each multiply-add.
    pub const fn flops(&self) -> u64 {
        let products = if self.is_volta() { 4 } else { 1 };
        (2 * self.shape.m * self.shape.n * self.shape.k * products) as u64
    }

    /// Checks the instruction against the manual's table of shapes and types.
    ///
    /// # Errors
    ///
    /// [`UnsupportedMma`] if sm_80 to sm_90 have no such instruction.
    pub const fn check(&self) -> Result<(), UnsupportedMma> {
        use Accumulator as Acc;
        use Element::{B1, Bf16, E4m3, E5m2, F16, F64, S4, S8, Tf32, U4, U8};
        let Shape { m, n, k } = self.shape;
        let row_col = !self.a_column_major && self.b_column_major;
        let half = matches!((self.c, self.d), (Acc::F16, Acc::F16) | (Acc::F32, Acc::F32));
        let single = matches!((self.c, self.d), (Acc::F32, Acc::F32));
        let integer = matches!((self.c, self.d), (Acc::S32, Acc::S32));
        let fine = n == 8
            && match (self.a, self.b) {
                (F16, F16) if m == 8 => {
                    k == 4 && !matches!((self.c, self.d), (Acc::F32, Acc::F16)) && self.float_accumulators()
                }
                (F16, F16) => row_col && half && m == 16 && matches!(k, 8 | 16),
                (Bf16, Bf16) => row_col && single && m == 16 && matches!(k, 8 | 16),
                (Tf32, Tf32) => row_col && single && m == 16 && matches!(k, 4 | 8),
                (F64, F64) => {
                    row_col
                        && matches!((self.c, self.d), (Acc::F64, Acc::F64))
                        && matches!((m, k), (8, 4) | (16, 4 | 8 | 16))
                }
                (E4m3 | E5m2, E4m3 | E5m2) => row_col && half && m == 16 && matches!(k, 16 | 32),
                (S8 | U8, S8 | U8) => row_col && integer && matches!((m, k), (8, 16) | (16, 16 | 32)),
                (S4 | U4, S4 | U4) => row_col && integer && matches!((m, k), (8, 32) | (16, 32 | 64)),
                (B1, B1) => row_col && integer && matches!((m, k), (8, 128) | (16, 128 | 256)),
                _ => false,
            };
        if fine { Ok(()) } else { Err(UnsupportedMma(*self)) }
    }

    const fn float_accumulators(&self) -> bool {
        matches!(self.c, Accumulator::F16 | Accumulator::F32) && matches!(self.d, Accumulator::F16 | Accumulator::F32)
    }

    /// Computes D = A B + C. Registers beyond [`Mma::registers`] are ignored in the operands and zero in the result.
    ///
    /// # Errors
    ///
    /// [`UnsupportedMma`] under the conditions of [`Mma::check`].
    pub fn execute(&self, a: &Fragment, b: &Fragment, c: &Fragment) -> Result<Fragment, UnsupportedMma> {
        self.check()?;
        let mut d = [[0; MAX_REGISTERS]; LANES];
        match self.a {
            Element::F16 if self.is_volta() => self.volta(a, b, c, &mut d),
            Element::F16 | Element::Bf16 | Element::Tf32 | Element::E4m3 | Element::E5m2 => self.float(a, b, c, &mut d),
            Element::F64 => self.double(a, b, c, &mut d),
            Element::S8 | Element::U8 | Element::S4 | Element::U4 => self.integer(a, b, c, &mut d),
            Element::B1 => self.bits(a, b, c, &mut d),
        }
        Ok(d)
    }

    /// Computes a product of a float type other than f64; all have 16 rows.
    fn float(&self, a: &Fragment, b: &Fragment, c: &Fragment, d: &mut Fragment) {
        // One instance per element type, so that decoding is inlined into the loops.
        let right = match self.b {
            Element::F16 => self.right::<2>(b, |bits| f16_to_f32(bits as u16)),
            Element::Bf16 => self.right::<2>(b, |bits| bf16_to_f32(bits as u16)),
            Element::E4m3 => self.right::<4>(b, |bits| e4m3_to_f32(bits as u8)),
            Element::E5m2 => self.right::<4>(b, |bits| e5m2_to_f32(bits as u8)),
            _ => self.right::<1>(b, tf32_to_f32),
        };
        let left = match self.a {
            Element::F16 => self.left::<2>(a, |bits| f16_to_f32(bits as u16)),
            Element::Bf16 => self.left::<2>(a, |bits| bf16_to_f32(bits as u16)),
            Element::E4m3 => self.left::<4>(a, |bits| e4m3_to_f32(bits as u8)),
            Element::E5m2 => self.left::<4>(a, |bits| e5m2_to_f32(bits as u8)),
            _ => self.left::<1>(a, tf32_to_f32),
        };
        let mut sums = [[0f32; 8]; 16];
        for (lane, registers) in c.iter().enumerate() {
            for index in 0..4 {
                let (row, column) = fragment::c(lane, index);
                sums[row][column] = read_float(self.c, registers, index);
            }
        }
        for (sums, left) in sums.iter_mut().zip(&left) {
            let mut row = *sums;
            for (x, right) in left.iter().zip(&right).take(self.shape.k) {
                for (sum, y) in row.iter_mut().zip(right) {
                    *sum += x * y;
                }
            }
            *sums = row;
        }
        for (lane, registers) in d.iter_mut().enumerate() {
            for index in 0..4 {
                let (row, column) = fragment::c(lane, index);
                write_float(self.d, registers, index, sums[row][column]);
            }
        }
    }

    #[inline]
    fn left<const PACK: usize>(&self, a: &Fragment, decode: impl Fn(u32) -> f32) -> [[f32; MAX_FLOAT_K]; 16] {
        let mut left = [[0f32; MAX_FLOAT_K]; 16];
        for (lane, registers) in a.iter().enumerate() {
            for (register, &bits) in registers.iter().enumerate().take(self.shape.k / (2 * PACK)) {
                for part in 0..PACK {
                    let (row, k) = fragment::a(PACK, 16, lane, register, part);
                    left[row][k] = decode(bits as u32 >> (32 / PACK * part));
                }
            }
        }
        left
    }

    #[inline]
    fn right<const PACK: usize>(&self, b: &Fragment, decode: impl Fn(u32) -> f32) -> [[f32; 8]; MAX_FLOAT_K] {
        let mut right = [[0f32; 8]; MAX_FLOAT_K];
        for (lane, registers) in b.iter().enumerate() {
            for (register, &bits) in registers.iter().enumerate().take(self.shape.k / (4 * PACK)) {
                for part in 0..PACK {
                    let (k, column) = fragment::b(PACK, lane, register, part);
                    right[k][column] = decode(bits as u32 >> (32 / PACK * part));
                }
            }
        }
        right
    }

    fn double(&self, a: &Fragment, b: &Fragment, c: &Fragment, d: &mut Fragment) {
        let [a_registers, b_registers, ..] = self.registers();
        let m = self.shape.m;
        let mut left = [[0f64; 16]; 16];
        let mut right = [[0f64; 8]; 16];
        for lane in 0..LANES {
            for register in 0..a_registers {
                let (row, k) = fragment::a(1, m, lane, register, 0);
                left[row][k] = f64::from_bits(a[lane][register]);
            }
            for register in 0..b_registers {
                let (k, column) = fragment::b(1, lane, register, 0);
                right[k][column] = f64::from_bits(b[lane][register]);
            }
        }
        for lane in 0..LANES {
            for index in 0..m / 4 {
                let (row, column) = fragment::c(lane, index);
                let sum = (0..self.shape.k).fold(f64::from_bits(c[lane][index]), |sum, k| {
                    float64::fma(left[row][k], right[k][column], sum, self.rounding)
                });
                d[lane][index] = sum.to_bits();
            }
        }
    }

    fn integer(&self, a: &Fragment, b: &Fragment, c: &Fragment, d: &mut Fragment) {
        const K: usize = 64;
        let [a_registers, b_registers, ..] = self.registers();
        let (pack, m) = (self.a.pack(), self.shape.m);
        let mut left = [[0i32; K]; 16];
        let mut right = [[0i32; K]; 8];
        for lane in 0..LANES {
            for register in 0..a_registers {
                for part in 0..pack {
                    let (row, k) = fragment::a(pack, m, lane, register, part);
                    left[row][k] = self.a.to_i32(a[lane][register] as u32, part);
                }
            }
            for register in 0..b_registers {
                for part in 0..pack {
                    let (k, column) = fragment::b(pack, lane, register, part);
                    right[column][k] = self.b.to_i32(b[lane][register] as u32, part);
                }
            }
        }
        for lane in 0..LANES {
            for index in 0..m / 4 {
                let (row, column) = fragment::c(lane, index);
                let products: i32 = left[row].iter().zip(&right[column]).map(|(x, y)| x * y).sum();
                let sum = i64::from(c[lane][index] as i32) + i64::from(products);
                d[lane][index] = u64::from(self.finish_integer(sum));
            }
        }
    }

    fn bits(&self, a: &Fragment, b: &Fragment, c: &Fragment, d: &mut Fragment) {
        let [a_registers, b_registers, ..] = self.registers();
        let m = self.shape.m;
        // One register is 32 neighbouring bits of k: a matrix of words.
        let mut left = [[0u32; 8]; 16];
        let mut right = [[0u32; 8]; 8];
        for lane in 0..LANES {
            for register in 0..a_registers {
                let (row, word) = fragment::a(1, m, lane, register, 0);
                left[row][word] = a[lane][register] as u32;
            }
            for register in 0..b_registers {
                let (word, column) = fragment::b(1, lane, register, 0);
                right[column][word] = b[lane][register] as u32;
            }
        }
        for lane in 0..LANES {
            for index in 0..m / 4 {
                let (row, column) = fragment::c(lane, index);
                let words = left[row].iter().zip(&right[column]);
                let count: u32 = match self.bit_op {
                    BitOp::Xor => words.map(|(x, y)| (x ^ y).count_ones()).sum(),
                    BitOp::And => words.map(|(x, y)| (x & y).count_ones()).sum(),
                };
                let sum = i64::from(c[lane][index] as i32) + i64::from(count);
                d[lane][index] = u64::from(self.finish_integer(sum));
            }
        }
    }

    fn finish_integer(&self, sum: i64) -> u32 {
        if self.satfinite {
            sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32
        } else {
            sum as u32
        }
    }

    fn volta(&self, a: &Fragment, b: &Fragment, c: &Fragment, d: &mut Fragment) {
        let mut left = [[[0f32; 4]; 8]; 4];
        let mut right = [[[0f32; 8]; 4]; 4];
        for lane in 0..LANES {
            let product = volta::product(lane);
            for index in 0..4 {
                let half = |fragment: &Fragment| f16_to_f32((fragment[lane][index / 2] >> (16 * (index % 2))) as u16);
                let (row, k) = volta::a(self.a_column_major, lane, index);
                left[product][row][k] = half(a);
                let (k, column) = volta::b(self.b_column_major, lane, index);
                right[product][k][column] = half(b);
            }
        }
        let map = |kind, lane, index| match kind {
            Accumulator::F16 => volta::c_f16(lane, index),
            _ => volta::c_f32(lane, index),
        };
        let mut sums = [[[0f32; 8]; 8]; 4];
        for lane in 0..LANES {
            for index in 0..8 {
                let (row, column) = map(self.c, lane, index);
                sums[volta::product(lane)][row][column] = read_float(self.c, &c[lane], index);
            }
        }
        for product in 0..4 {
            for row in 0..8 {
                for k in 0..4 {
                    for column in 0..8 {
                        sums[product][row][column] += left[product][row][k] * right[product][k][column];
                    }
                }
            }
        }
        for (lane, registers) in d.iter_mut().enumerate() {
            for index in 0..8 {
                let (row, column) = map(self.d, lane, index);
                write_float(self.d, registers, index, sums[volta::product(lane)][row][column]);
            }
        }
    }
}

/// Returns element `index` of a float accumulator held in `registers`.
#[inline]
pub(super) fn read_float(kind: Accumulator, registers: &[u64], index: usize) -> f32 {
    match kind {
        Accumulator::F16 => f16_to_f32((registers[index / 2] >> (16 * (index % 2))) as u16),
        _ => f32::from_bits(registers[index] as u32),
    }
}

/// Sets element `index` of a float accumulator; for f16, registers must start at zero.
#[inline]
pub(super) fn write_float(kind: Accumulator, registers: &mut [u64], index: usize, value: f32) {
    match kind {
        Accumulator::F16 => registers[index / 2] |= u64::from(f32_to_f16(value)) << (16 * (index % 2)),
        _ => registers[index] = u64::from(canonical(value).to_bits()),
    }
}

#[cfg(test)]
#[path = "mma_tests.rs"]
mod tests;
