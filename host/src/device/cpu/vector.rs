//! Interface between the algorithm and the instruction sets: a vector of f32, with the operations of products and
//! softmaxes.
//!
//! Everything above this trait is written once. A new instruction set is one `impl`, and one line in
//! `kernels/isa.rs`.

#[cfg(target_arch = "aarch64")]
mod arm;
mod exponential;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_words;

#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;
use exponential::{POWERS, ROUND};
pub(super) use words::Words;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

/// A register of f32.
///
/// # Safety
/// `LANES` is the number of f32 that `load` reads and `store` writes. Methods are called only if the processor has
/// the instructions, and are inlined into a function that is compiled for them.
pub(super) unsafe trait Vector: Copy {
    /// Number of f32 in a register.
    const LANES: usize;
    /// Rows by registers of columns of a product that stay in registers for a whole sum: 4, 6 or 8 rows, up to 3
    /// registers. They leave registers for a row of `b` and an element of `a`.
    const ROWS: usize;
    const COLUMNS: usize;
    /// Steps of a product's sums between two branches, one or two. Two leave fewer registers for addresses.
    const STEPS: usize;
    /// Parts of numbers at most that the processor's products of pairs take; 0 where it has none.
    const PARTS: usize;
    /// True if `fma` rounds once.
    const FUSED: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Loads element `index` of a row to every lane.
    #[inline(always)]
    unsafe fn broadcast(row: *const f32, index: usize) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { Self::splat(*row.add(index)) }
    }
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// Computes `self * factor + addend`.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// Returns the larger value, or `other` if one is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// Returns the smaller value, or `other` if one is NaN.
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { other.select_greater(self, self, other) }
    }
    /// Returns `x` where `self > other`, else `y`.
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self;
    /// Returns `self` where `place < end`, else `other`; neither of the two is NaN or infinite.
    #[inline(always)]
    unsafe fn where_less(self, place: Self, end: Self, other: Self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { end.select_greater(place, self, other) }
    }
    /// Returns 2^n, where the low bits hold n + 127, from 1 to 254; 0 where they hold 0.
    unsafe fn power_of_two(self) -> Self;
    /// Loads and widens `LANES` elements of f16.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// `LANES` elements of bf16, widened.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Eight elements, where that is half of a register, and zeros.
    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Self {
        // SAFETY: passed on to the caller; no other register is that long.
        unsafe { Self::load(from) }
    }
    #[inline(always)]
    unsafe fn load_half_f16(from: *const u16) -> Self {
        // SAFETY: as for `load_half`.
        unsafe { Self::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn load_half_bf16(from: *const u16) -> Self {
        // SAFETY: as for `load_half`.
        unsafe { Self::load_bf16(from) }
    }
    /// Rounds to f16, ties to even.
    unsafe fn store_f16(self, to: *mut u16);
    /// Rounds to bf16, ties to even.
    unsafe fn store_bf16(self, to: *mut u16);

    /// The sum of all lanes, halves added to halves.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0.0_f32; 16];
        // SAFETY: no register is longer.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// The sums of all lanes of the first `LANES` registers: lane n has that of register n, with the bits of [`sum`](Self::sum).
    #[inline(always)]
    unsafe fn sum_each(registers: &[Self; 16]) -> Self {
        let mut sums = [0.0_f32; 16];
        // SAFETY: no register is longer.
        unsafe {
            for (sum, register) in sums.iter_mut().zip(registers).take(Self::LANES) {
                *sum = register.sum();
            }
            Self::load(sums.as_ptr())
        }
    }

    /// Rounds to bf16, and writes words whose lower halves are `self`. Ties go away from zero.
    #[inline(always)]
    unsafe fn store_pairs(self, high: Self, to: *mut u32) {
        let (mut low_bits, mut high_bits) = ([0.0_f32; 16], [0.0_f32; 16]);
        // SAFETY: no register is longer than the arrays; the rest is passed on to the caller.
        unsafe {
            self.store(low_bits.as_mut_ptr());
            high.store(high_bits.as_mut_ptr());
            for lane in 0..Self::LANES {
                let round = |x: f32| x.to_bits().wrapping_add(0x8000) >> 16;
                *to.add(lane) = round(low_bits[lane]) | round(high_bits[lane]) << 16;
            }
        }
    }

    /// Rounds to the nearest bf16. Ties go away from zero; the result for NaN and infinity is unspecified.
    #[inline(always)]
    unsafe fn nearest_bf16(self) -> Self {
        let mut lanes = [0.0_f32; 16];
        // SAFETY: no register is longer.
        unsafe {
            self.store(lanes.as_mut_ptr());
            let nearest = |x: f32| f32::from_bits(x.to_bits().wrapping_add(0x8000) & 0xffff_0000);
            Self::load(lanes.map(nearest).as_ptr())
        }
    }

    /// Writes words whose lower halves are the upper halves of `self` (bf16 rounded toward zero), and whose upper
    /// halves are those of `high`. A NaN that arithmetic made stays NaN.
    #[inline(always)]
    unsafe fn store_upper_halves(self, high: Self, to: *mut u32) {
        let (mut low_lanes, mut high_lanes) = ([0.0_f32; 16], [0.0_f32; 16]);
        // SAFETY: no register is longer than the arrays; the rest is passed on to the caller.
        unsafe {
            self.store(low_lanes.as_mut_ptr());
            high.store(high_lanes.as_mut_ptr());
            for lane in 0..Self::LANES {
                *to.add(lane) = low_lanes[lane].to_bits() >> 16 | high_lanes[lane].to_bits() & 0xffff_0000;
            }
        }
    }

    /// Returns true if every lane is 0 or has a magnitude in `least .. limit`, two positive numbers.
    #[inline(always)]
    unsafe fn is_within(self, least: f32, limit: f32) -> bool {
        let mut lanes = [0.0_f32; 16];
        // SAFETY: no register is longer.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes.iter().all(|x| *x == 0.0 || (least..limit).contains(&x.abs()))
    }

    /// Writes the transpose of `rows` rows, `stride` apart, to the first `columns` of the rows of `to`, `to_stride`
    /// apart. Neither is more than `LANES`. Whole registers are read and written, also past the end.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, rows: usize, to: *mut f32, to_stride: usize, columns: usize) {
        for column in 0..columns {
            for row in 0..rows {
                // SAFETY: passed on to the caller.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) };
            }
        }
    }

    /// Computes 2^x for x <= 0 or NaN, within one and a half units in the last place. It is exact for whole x. Where 2^x is less than
    /// 2^-126, the result is 0, or not more than 2^-126. A small positive x is allowed too.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { Self::exp2_each([self], Self::splat(1.0))[0] }
    }

    /// Computes [`exp2`](Self::exp2) of several registers times `scale`, so that each constant is read once for all of them.
    ///
    /// x = n + f with n whole and |f| <= 1/2. 2^f is a polynomial. 2^n is made by writing n to the exponent; for n =
    /// -127 this gives 0.
    #[inline(always)]
    unsafe fn exp2_each<const N: usize>(x: [Self; N], scale: Self) -> [Self; N] {
        // SAFETY: passed on to the caller.
        unsafe {
            // A NaN is not less than -127, and max returns its second operand if that is NaN.
            let x = each(x, |x| Self::splat(-127.0).max(x.mul(scale)));
            let rounded = each(x, |x| x.add(Self::splat(ROUND)));
            let mut fraction = x;
            for (fraction, rounded) in fraction.iter_mut().zip(rounded) {
                *fraction = fraction.sub(rounded.sub(Self::splat(ROUND)));
            }
            let mut power = Self::polynomial(fraction);
            for (power, rounded) in power.iter_mut().zip(rounded) {
                *power = power.mul(rounded.power_of_two());
            }
            power
        }
    }

    /// Computes 2^f for |f| <= 1/2.
    #[inline(always)]
    unsafe fn polynomial<const N: usize>(fraction: [Self; N]) -> [Self; N] {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut power = [Self::splat(POWERS[POWERS.len() - 1]); N];
            for coefficient in POWERS[..POWERS.len() - 1].iter().rev() {
                let coefficient = Self::splat(*coefficient);
                for (power, fraction) in power.iter_mut().zip(fraction) {
                    *power = power.fma(fraction, coefficient);
                }
            }
            power
        }
    }
}

/// Returns true if rows that are read soon are asked for as far as the L1 cache, false for the L2 cache. AMD's processors take them at
/// three quarters of the rate that way, measured on Zen 4; a Xeon decodes up to 1.15 times as fast.
pub(super) fn prefers_l1() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !super::bf16::is_of_amd();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Asks for a cache line, which need not exist, as far as the L1 cache where [`prefers_l1`] says so and there is an instruction.
#[inline(always)]
pub(super) fn prefetch_l1(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    prefetch_l2(line);
}

/// Asks for a cache line, which need not exist, as far as the L2 cache.
#[inline(always)]
pub(super) fn prefetch_l2(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    super::arm::prefetch_l2(line);
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    let _ = line;
}

/// `f` of each.
#[inline(always)]
fn each<V: Copy, const N: usize>(mut x: [V; N], f: impl Fn(V) -> V) -> [V; N] {
    x.iter_mut().for_each(|x| *x = f(*x));
    x
}

/// Arrays, which the compiler vectorises: with SSE2 on x86-64, elsewhere with what the target has.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

// SAFETY: plain Rust that needs no instructions.
unsafe impl Vector for Portable {
    const LANES: usize = 4;
    const ROWS: usize = 6; // 12 sums of 16 registers
    const COLUMNS: usize = 2;
    const STEPS: usize = 1;
    const PARTS: usize = 0;
    // Where there is an instruction for it; in software it takes a hundred times as long as two roundings.
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises that four f32 exist.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises that there is room for four f32.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            if Self::FUSED {
                self.0[lane].mul_add(factor.0[lane], addend.0[lane])
            } else {
                self.0[lane] * factor.0[lane] + addend.0[lane]
            }
        }))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            if self.0[lane] > other.0[lane] {
                x.0[lane]
            } else {
                y.0[lane]
            }
        }))
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: four elements are there, says the caller.
        let bits = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
        Self(bits.map(|bits| {
            // The exponent is wider, and 112 more; what was largest, for infinity and NaN, is so again. No branch, for vectors.
            const SCALE: f32 = f32::from_bits((127 + 112) << 23);
            let magnitude = f32::from_bits((u32::from(bits) & 0x7fff) << 13) * SCALE;
            let largest = if magnitude < 65536.0 { 0 } else { 0x7f80_0000 };
            let sign = (u32::from(bits) & 0x8000) << 16;
            f32::from_bits(magnitude.to_bits() | largest | sign)
        }))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: four elements are there, says the caller.
        let bits = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
        Self(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let bits = self.0.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: there is room for four elements, says the caller.
        unsafe { to.cast::<[u16; 4]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let bits = self.0.map(|x| half::bf16::from_f32(x).to_bits());
        // SAFETY: there is room for four elements, says the caller.
        unsafe { to.cast::<[u16; 4]>().write_unaligned(bits) }
    }
}
