//! The warpgroup-level product `wgmma.mma_async` (manual section "Asynchronous Multiply-and-Accumulate Instruction").
//!
//! 128 threads hold the 64 x n accumulator. B is read through a [`Descriptor`], and so is A unless it comes from
//! registers. The work is done on plain row-major arrays: operands are decoded once to f32 (or i32), the product runs
//! as tight loops that vectorise, and [`accumulator`] maps elements to the registers of threads.
//!
//! Rounding that the manual leaves open is fixed as for `mma.sync` ([`super::mma`]): products are exact, summed in
//! f32 with k rising, and added to the accumulator. f16 accumulators are widened before and rounded once after.
//! Integers are summed exactly and then wrap or, with `.satfinite`, clamp. The instruction is asynchronous; the
//! caller decides when the work happens and which proxy sees which bytes. [`Wgmma::chunks_of_a`] and
//! [`Wgmma::chunks_of_b`] list the bytes that are read.

use super::descriptor::{CHUNK_BYTES, Descriptor, Major};
use super::fragment;
use super::mma::{Accumulator, Element};
use crate::numeric::float32::canonical;
use crate::numeric::format::{bf16_to_f32, e4m3_to_f32, e5m2_to_f32, f16_to_f32, f32_to_f16, tf32_to_f32};

/// Number of rows of the accumulator.
pub const M: usize = 64;
/// Largest n.
pub const MAX_N: usize = 256;
/// Largest k (8-bit elements).
pub const MAX_K: usize = 32;
/// Number of threads of a warpgroup.
pub const THREADS: usize = 128;

/// Returns the (row, column) of accumulator element `index` of a thread; `index` counts elements, not registers.
#[inline]
pub const fn accumulator(thread: usize, index: usize) -> (usize, usize) {
    let (row, column) = fragment::c(thread % 32, index % 4);
    (thread / 32 * 16 + row, index / 4 * 8 + column)
}

/// Returns the (row, k) of part `part` of register `register` (0..4) of an A operand in registers.
#[inline]
pub const fn a_in_registers(pack: usize, thread: usize, register: usize, part: usize) -> (usize, usize) {
    let (row, k) = fragment::a(pack, 16, thread % 32, register, part);
    (thread / 32 * 16 + row, k)
}

/// A `wgmma.mma_async` instruction, without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wgmma {
    /// n: number of columns of the accumulator.
    pub n: usize,
    /// Element type of A.
    pub a: Element,
    /// Element type of B.
    pub b: Element,
    /// Type of the accumulator.
    pub d: Accumulator,
    /// True if `imm-scale-a` is -1.
    pub negate_a: bool,
    /// True if `imm-scale-b` is -1.
    pub negate_b: bool,
    /// True if `imm-trans-a` is 1: A in shared memory is M-major.
    pub transpose_a: bool,
    /// True if `imm-trans-b` is 1: B in shared memory is N-major.
    pub transpose_b: bool,
    /// `.satfinite` of the integer types.
    pub satfinite: bool,
}

/// A combination of shape, types and immediates that `wgmma.mma_async` does not have, or that is not emulated
/// (`.b1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wgmma.mma_async has no m64n{} with types {:?} x {:?} -> {:?} and these immediates", .0.n, .0.a, .0.b, .0.d)]
pub struct UnsupportedWgmma(pub Wgmma);

/// Source of A.
pub enum Left<F> {
    /// Shared memory, through a matrix descriptor.
    Shared(Descriptor),
    /// Registers: a function from (thread, register 0..4) to the register's content.
    Registers(F),
}

impl Wgmma {
    /// Makes an instruction without negation, transposition or saturation.
    pub const fn new(n: usize, a: Element, b: Element, d: Accumulator) -> Wgmma {
        Wgmma {
            n,
            a,
            b,
            d,
            negate_a: false,
            negate_b: false,
            transpose_a: false,
            transpose_b: false,
            satfinite: false,
        }
    }

    /// Returns k: 32 bytes of elements.
    pub const fn k(&self) -> usize {
        256 / self.a.bits()
    }

    /// Returns the registers of a thread's accumulator.
    pub const fn accumulator_registers(&self) -> usize {
        self.n / 2 / self.d.pack()
    }

    /// Returns the FLOPs: two for each multiply-add.
    pub const fn flops(&self) -> u64 {
        (2 * M * self.n * self.k()) as u64
    }

    /// Checks the instruction against the manual's tables of shapes and types.
    ///
    /// # Errors
    ///
    /// [`UnsupportedWgmma`] if there is no such instruction.
    pub const fn check(&self) -> Result<(), UnsupportedWgmma> {
        use Accumulator as Acc;
        use Element::{Bf16, E4m3, E5m2, F16, S8, Tf32, U8};
        let plain = !self.transpose_a && !self.transpose_b;
        let size = self.n >= 8 && self.n <= MAX_N && self.n.is_multiple_of(8);
        let fine = match (self.a, self.b, self.d) {
            (F16, F16, Acc::F16 | Acc::F32) | (Bf16, Bf16, Acc::F32) => size,
            (Tf32, Tf32, Acc::F32) | (E4m3 | E5m2, E4m3 | E5m2, Acc::F16 | Acc::F32) => size && plain,
            (S8 | U8, S8 | U8, Acc::S32) => {
                let sixteens = self.n.is_multiple_of(16) || self.n == 8 || self.n == 24;
                size && sixteens && plain && !self.negate_a && !self.negate_b
            }
            _ => false,
        };
        if fine { Ok(()) } else { Err(UnsupportedWgmma(*self)) }
    }

    const fn major_a(&self) -> Major {
        if self.transpose_a { Major::Mn } else { Major::K }
    }

    const fn major_b(&self) -> Major {
        if self.transpose_b { Major::Mn } else { Major::K }
    }

    /// Lists the shared addresses of the 16-byte chunks that A is read from.
    pub fn chunks_of_a(&self, a: Descriptor) -> impl Iterator<Item = u32> {
        a.chunks(self.major_a(), self.a.bits() / 8, M, self.k())
            .map(|(address, ..)| address)
    }

    /// Lists the shared addresses of the 16-byte chunks that B is read from.
    pub fn chunks_of_b(&self, b: Descriptor) -> impl Iterator<Item = u32> {
        b.chunks(self.major_b(), self.b.bits() / 8, self.n, self.k())
            .map(|(address, ..)| address)
    }

    /// Computes D = A B + D, or A B if not `accumulate` (`scale-d`), for float types on a row-major 64 x n
    /// accumulator. `read` returns the 16 bytes at a shared address that is a multiple of 16.
    ///
    /// # Errors
    ///
    /// [`UnsupportedWgmma`] under the conditions of [`Wgmma::check`], or for an integer type.
    ///
    /// # Panics
    ///
    /// If `sums` is not 64 x n long.
    pub fn multiply_f32<F: Fn(usize, usize) -> u32>(
        &self,
        a: Left<F>,
        b: Descriptor,
        read: impl Fn(u32) -> [u8; CHUNK_BYTES],
        accumulate: bool,
        sums: &mut [f32],
    ) -> Result<(), UnsupportedWgmma> {
        self.check()?;
        if self.d == Accumulator::S32 {
            return Err(UnsupportedWgmma(*self));
        }
        let signed = |negate: bool| move |x: f32| if negate { -x } else { x };
        let (sign_a, sign_b) = (signed(self.negate_a), signed(self.negate_b));
        let left = match self.a {
            Element::F16 => self.left::<2, _, _>(a, &read, |x| sign_a(f16_to_f32(x as u16))),
            Element::Bf16 => self.left::<2, _, _>(a, &read, |x| sign_a(bf16_to_f32(x as u16))),
            Element::E4m3 => self.left::<1, _, _>(a, &read, |x| sign_a(e4m3_to_f32(x as u8))),
            Element::E5m2 => self.left::<1, _, _>(a, &read, |x| sign_a(e5m2_to_f32(x as u8))),
            _ => self.left::<4, _, _>(a, &read, |x| sign_a(tf32_to_f32(x))),
        };
        let right = match self.b {
            Element::F16 => self.right::<2, _>(b, &read, |x| sign_b(f16_to_f32(x as u16))),
            Element::Bf16 => self.right::<2, _>(b, &read, |x| sign_b(bf16_to_f32(x as u16))),
            Element::E4m3 => self.right::<1, _>(b, &read, |x| sign_b(e4m3_to_f32(x as u8))),
            Element::E5m2 => self.right::<1, _>(b, &read, |x| sign_b(e5m2_to_f32(x as u8))),
            _ => self.right::<4, _>(b, &read, |x| sign_b(tf32_to_f32(x))),
        };
        if !accumulate {
            sums.fill(0.0);
        }
        product_f32(&left, &right, self.n, self.k(), sums);
        Ok(())
    }

    /// Multiplies `.s8` and `.u8` operands, with i32 accumulators.
    ///
    /// # Errors
    ///
    /// [`UnsupportedWgmma`] under the conditions of [`Wgmma::check`], or for a float type.
    ///
    /// # Panics
    ///
    /// If `sums` is not 64 x n long.
    pub fn multiply_i32<F: Fn(usize, usize) -> u32>(
        &self,
        a: Left<F>,
        b: Descriptor,
        read: impl Fn(u32) -> [u8; CHUNK_BYTES],
        accumulate: bool,
        sums: &mut [i32],
    ) -> Result<(), UnsupportedWgmma> {
        self.check()?;
        if self.d != Accumulator::S32 {
            return Err(UnsupportedWgmma(*self));
        }
        let left = self.left::<1, _, _>(a, &read, |x| self.a.to_i32(x, 0));
        let right = self.right::<1, _>(b, &read, |x| self.b.to_i32(x, 0));
        let mut products = vec![0i32; M * self.n];
        // At most 32 products of 255 * 255: no overflow.
        product(&left, &right, self.n, self.k(), &mut products, |sum, x, y| sum + x * y);
        assert_eq!(sums.len(), products.len(), "accumulator of m64n{}", self.n);
        for (sum, product) in sums.iter_mut().zip(products) {
            let start = if accumulate { *sum } else { 0 };
            *sum = if self.satfinite {
                start.saturating_add(product)
            } else {
                start.wrapping_add(product)
            };
        }
        Ok(())
    }

    /// Reads A as 64 rows of k values.
    #[inline]
    fn left<const BYTES: usize, T: Copy + Default, F: Fn(usize, usize) -> u32>(
        &self,
        a: Left<F>,
        read: impl Fn(u32) -> [u8; CHUNK_BYTES],
        decode: impl Fn(u32) -> T,
    ) -> [[T; MAX_K]; M] {
        let mut left = [[T::default(); MAX_K]; M];
        match a {
            Left::Shared(descriptor) => {
                let major = self.major_a();
                for (address, row, k) in descriptor.chunks(major, BYTES, M, self.k()) {
                    for (i, x) in elements::<BYTES>(&read(address)).enumerate() {
                        match major {
                            Major::K => left[row][k + i] = decode(x),
                            Major::Mn => left[row + i][k] = decode(x),
                        }
                    }
                }
            }
            Left::Registers(register) => {
                for thread in 0..THREADS {
                    for index in 0..4 {
                        for (part, x) in elements::<BYTES>(&register(thread, index).to_le_bytes()).enumerate() {
                            let (row, k) = a_in_registers(4 / BYTES, thread, index, part);
                            left[row][k] = decode(x);
                        }
                    }
                }
            }
        }
        left
    }

    /// Reads B as k rows of n values.
    #[inline]
    fn right<const BYTES: usize, T: Copy + Default>(
        &self,
        b: Descriptor,
        read: impl Fn(u32) -> [u8; CHUNK_BYTES],
        decode: impl Fn(u32) -> T,
    ) -> [[T; MAX_N]; MAX_K] {
        let mut right = [[T::default(); MAX_N]; MAX_K];
        let major = self.major_b();
        for (address, column, k) in b.chunks(major, BYTES, self.n, self.k()) {
            for (i, x) in elements::<BYTES>(&read(address)).enumerate() {
                match major {
                    Major::K => right[k + i][column] = decode(x),
                    Major::Mn => right[k][column + i] = decode(x),
                }
            }
        }
        right
    }

    /// Fills a row-major 64 x n array from the threads' f16 or f32 accumulators; `register(thread, index)` reads one.
    pub fn gather_f32(&self, register: impl Fn(usize, usize) -> u32, sums: &mut [f32]) {
        for thread in 0..THREADS {
            for index in 0..self.accumulator_registers() {
                let bits = register(thread, index);
                match self.d {
                    Accumulator::F16 => {
                        for part in 0..2 {
                            let (row, column) = accumulator(thread, 2 * index + part);
                            sums[row * self.n + column] = f16_to_f32((bits >> (16 * part)) as u16);
                        }
                    }
                    _ => {
                        let (row, column) = accumulator(thread, index);
                        sums[row * self.n + column] = f32::from_bits(bits);
                    }
                }
            }
        }
    }

    /// Scatters a row-major 64 x n array, the inverse of [`Wgmma::gather_f32`]: calls `write(thread, index, bits)`
    /// for every accumulator register.
    pub fn scatter_f32(&self, sums: &[f32], mut write: impl FnMut(usize, usize, u32)) {
        let at = |thread, index| {
            let (row, column) = accumulator(thread, index);
            sums[row * self.n + column]
        };
        for thread in 0..THREADS {
            for index in 0..self.accumulator_registers() {
                let bits = match self.d {
                    Accumulator::F16 => {
                        let [low, high] = [0, 1].map(|part| u32::from(f32_to_f16(at(thread, 2 * index + part))));
                        low | high << 16
                    }
                    _ => canonical(at(thread, index)).to_bits(),
                };
                write(thread, index, bits);
            }
        }
    }
}

/// Splits a chunk or register into its elements, low to high.
#[inline]
fn elements<const BYTES: usize>(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(BYTES).map(|element| match *element {
        [a] => u32::from(a),
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    })
}

/// Computes `sums += left * right`, row by row, in blocks of columns that fit in registers.
#[inline(always)]
fn product<T: Copy + Default>(
    left: &[[T; MAX_K]; M],
    right: &[[T; MAX_N]; MAX_K],
    n: usize,
    k: usize,
    sums: &mut [T],
    multiply_add: impl Fn(T, T, T) -> T + Copy,
) {
    assert_eq!(sums.len(), M * n, "accumulator of m64n{n}");
    for (left, sums) in left.iter().zip(sums.chunks_exact_mut(n)) {
        let mut column = 0;
        while column + WIDE <= n {
            block::<WIDE, T>(&left[..k], right, column, sums, multiply_add);
            column += WIDE;
        }
        while column < n {
            block::<8, T>(&left[..k], right, column, sums, multiply_add);
            column += 8;
        }
    }
}

/// Number of columns summed at a time: eight 256-bit registers of f32.
const WIDE: usize = 32;

#[inline(always)]
fn block<const W: usize, T: Copy + Default>(
    left: &[T],
    right: &[[T; MAX_N]; MAX_K],
    column: usize,
    sums: &mut [T],
    multiply_add: impl Fn(T, T, T) -> T,
) {
    let sums = &mut sums[column..column + W];
    let mut local = [T::default(); W];
    local.copy_from_slice(sums);
    for (&x, right) in left.iter().zip(right) {
        let right = &right[column..column + W];
        for i in 0..W {
            local[i] = multiply_add(local[i], x, right[i]);
        }
    }
    sums.copy_from_slice(&local);
}

fn product_f32(left: &[[f32; MAX_K]; M], right: &[[f32; MAX_N]; MAX_K], n: usize, k: usize, sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the function only requires AVX2, which was just detected.
        return unsafe { product_f32_avx2(left, right, n, k, sums) };
    }
    product(left, right, n, k, sums, |sum, x, y| sum + x * y);
}

/// Product loops compiled for wider registers. Without the fma feature the result has the same bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn product_f32_avx2(left: &[[f32; MAX_K]; M], right: &[[f32; MAX_N]; MAX_K], n: usize, k: usize, sums: &mut [f32]) {
    product(left, right, n, k, sums, |sum, x, y| sum + x * y);
}

#[cfg(test)]
#[path = "wgmma_tests.rs"]
mod tests;
