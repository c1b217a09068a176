//! The seam between the algorithm and the instruction sets: a vector of f32, and what products and softmaxes do with it.
//!
//! Everything above this trait is written once. A new instruction set is one `impl`, and one line in `kernels/isa.rs`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A register of f32.
///
/// # Safety
/// `LANES` is how many f32 `load` reads and `store` writes. Methods are called only where the processor has the
/// instructions, and inlined into a function that is compiled for them.
pub(super) unsafe trait Vector: Copy {
    /// f32 in a register.
    const LANES: usize;
    /// Rows of a product that stay in registers: divides 8.
    const ROWS: usize;
    /// Whether `fma` rounds once.
    const FUSED: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// The larger of the two, `other` where one is not a number.
    unsafe fn max(self, other: Self) -> Self;
    /// `x` where `self > other`, else `y`.
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self;
    /// `self * 2^n`, where the low bits of `rounded` hold the whole number n in -126 ..= 127.
    unsafe fn times_power(self, rounded: Self) -> Self;
    /// `LANES` elements of f16, widened.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// `LANES` elements of bf16, widened.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Rounds to f16, ties to even.
    unsafe fn store_f16(self, to: *mut u16);
    /// Rounds to bf16, ties to even.
    unsafe fn store_bf16(self, to: *mut u16);

    /// Asks for a cache line, which need not exist.
    #[inline(always)]
    unsafe fn prefetch(_line: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch never faults, and every x86-64 processor has it.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(_line.cast());
        }
    }

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

    /// Writes the transpose of `rows` rows, `stride` apart, to the first `columns` of the rows of `to`, `to_stride` apart.
    /// Neither is more than `LANES`; whole registers are read and written, whatever is past the end.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, rows: usize, to: *mut f32, to_stride: usize, columns: usize) {
        for column in 0..columns {
            for row in 0..rows {
                // SAFETY: passed on to the caller.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) };
            }
        }
    }

    /// 2^x for x <= 0 or NaN, within one and a half units in the last place; below 2^-126 it is 0. A small positive x is
    /// as good.
    ///
    /// x = n + f with n whole and |f| <= 1/2. 2^f is a polynomial; 2^n is made by writing n into the exponent.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            let smallest = Self::splat(-126.0);
            // A NaN is not less than -126, and max keeps its second operand if that is one.
            let x = smallest.max(self);
            let rounded = x.add(Self::splat(ROUND));
            let fraction = x.sub(rounded.sub(Self::splat(ROUND)));
            let power = Self::polynomial(fraction).times_power(rounded);
            smallest.select_greater(self, Self::splat(0.0), power)
        }
    }

    /// 2^f for |f| <= 1/2.
    #[inline(always)]
    unsafe fn polynomial(fraction: Self) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut power = Self::splat(POWERS[POWERS.len() - 1]);
            for coefficient in POWERS[..POWERS.len() - 1].iter().rev() {
                power = power.fma(fraction, Self::splat(*coefficient));
            }
            power
        }
    }
}

/// Added to a float of less than 2^22, rounds it to a whole number and leaves that in the low bits.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// The polynomial of degree 6 that is 1 at 0 and whose largest relative error against 2^f for |f| <= 1/2 is least: 2e-9,
/// before its coefficients and its arithmetic are rounded.
const POWERS: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_48,
    0.055_503_324,
    0.009_618_437,
    0.001_339_887_5,
    0.000_153_533_62,
];

/// Arrays, for the compiler to make vectors of: SSE2 or NEON, where those are what every processor has.
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
    const ROWS: usize = if cfg!(target_arch = "aarch64") { 8 } else { 4 };
    // Where there is an instruction for it; in software it takes a hundred times as long as two roundings.
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: four f32 are there, says the caller.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: there is room for four f32, says the caller.
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
    unsafe fn times_power(self, rounded: Self) -> Self {
        let power = |x: f32| f32::from_bits((x.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
        self.zip(rounded, |x, n| x * power(n))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: four elements are there, says the caller.
        let bits = unsafe { from.cast::<[u16; 4]>().read_unaligned() };
        Self(bits.map(|bits| half::f16::from_bits(bits).to_f32()))
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

/// AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

// SAFETY: eight f32; the rest is the trait's own contract, which each method passes on.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Vector for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, other.0)) })
    }
    #[inline(always)]
    unsafe fn times_power(self, rounded: Self) -> Self {
        unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded.0));
            let power = _mm256_add_epi32(exponent, _mm256_set1_epi32(1.0_f32.to_bits() as i32));
            self.mul(Self(_mm256_castsi256_ps(power)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let wide = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let packed = _mm256_packus_epi32(wide, wide); // within halves of 128 bits
            let packed = _mm256_permute4x64_epi64::<0b1000>(packed);
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
}

/// AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

// SAFETY: sixteen f32; the rest is the trait's own contract, which each method passes on.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Vector for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 8;
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        unsafe {
            let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0);
            Self(_mm512_mask_blend_ps(greater, y.0, x.0))
        }
    }
    #[inline(always)]
    unsafe fn times_power(self, rounded: Self) -> Self {
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(rounded.0));
            let power = _mm512_add_epi32(exponent, _mm512_set1_epi32(1.0_f32.to_bits() as i32));
            self.mul(Self(_mm512_castsi512_ps(power)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let wide = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(is_nan, rounded, quiet));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(wide));
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, high: Self, to: *mut u32) {
        unsafe {
            let half = _mm512_set1_epi32(0x8000);
            let low = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(self.0), half));
            let high = _mm512_add_epi32(_mm512_castps_si512(high.0), half);
            // (high & mask) | low
            let words = _mm512_ternarylogic_epi32::<0xf8>(low, high, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            _mm512_storeu_si512(to.cast(), words);
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, rows: usize, to: *mut f32, to_stride: usize, columns: usize) {
        unsafe {
            let mut x = [_mm512_setzero_ps(); 16];
            for (row, x) in x.iter_mut().enumerate().take(rows) {
                *x = _mm512_loadu_ps(from.add(row * stride));
            }
            // Pairs of rows, then fours: register 4 g + j then holds columns j, j + 4, j + 8, j + 12 of rows 4 g .. 4 g + 4.
            let mut pairs = x;
            for i in (0..16).step_by(2) {
                pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
                pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
            }
            let mut fours = pairs;
            for g in (0..16).step_by(4) {
                let (a, b) = (_mm512_castps_pd(pairs[g]), _mm512_castps_pd(pairs[g + 2]));
                fours[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                let (a, b) = (_mm512_castps_pd(pairs[g + 1]), _mm512_castps_pd(pairs[g + 3]));
                fours[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
            for j in 0..4 {
                let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
                let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even_2, odd_2) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                x[j] = _mm512_shuffle_f32x4::<0x88>(even, even_2);
                x[j + 4] = _mm512_shuffle_f32x4::<0x88>(odd, odd_2);
                x[j + 8] = _mm512_shuffle_f32x4::<0xdd>(even, even_2);
                x[j + 12] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_2);
            }
            for (column, x) in x.iter().enumerate().take(columns) {
                _mm512_storeu_ps(to.add(column * to_stride), *x);
            }
        }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // Rounding and writing the exponent are instructions here, and one comparison makes what underflows 0.
        unsafe {
            let in_range = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, _mm512_set1_ps(-126.0)); // so for NaN
            let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            let power = Self::polynomial(self.sub(Self(whole)));
            Self(_mm512_maskz_scalef_ps(in_range, power.0, whole))
        }
    }
}
