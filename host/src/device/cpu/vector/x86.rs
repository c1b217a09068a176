//! The registers of x86: AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::Vector;
use super::exponential::{ROOTS_8, ROOTS_32};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Avx2(pub(super) __m256);

// SAFETY: eight f32; the rest is the trait's own contract, which each method passes on.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Vector for Avx2 {
    const LANES: usize = 8;
    const ROWS: usize = 6; // 12 sums of 16 registers
    const COLUMNS: usize = 2;
    const STEPS: usize = 2;
    const PARTS: usize = 0;
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
    unsafe fn min(self, other: Self) -> Self {
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, other.0)) })
    }
    #[inline(always)]
    unsafe fn where_less(self, place: Self, end: Self, other: Self) -> Self {
        // By the sign of the difference, byte by byte. The compiler makes a masked store of a choice of numbers that is stored to where
        // `self` came from, and AMD's processors run that as microcode.
        unsafe {
            let differences = _mm256_castps_si256(_mm256_sub_ps(place.0, end.0));
            let is_less = _mm256_srai_epi32::<31>(differences);
            let (here, other) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_blendv_epi8(other, here, is_less)))
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
            Self(_mm256_castsi256_ps(exponent))
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
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn sum_each(registers: &[Self; 16]) -> Self {
        unsafe {
            // Halves of two registers side by side, then quarters of four, then lanes of eight.
            let halves = |a: Self, b: Self| {
                let (low, high) = (
                    _mm256_permute2f128_ps::<0x20>(a.0, b.0),
                    _mm256_permute2f128_ps::<0x31>(a.0, b.0),
                );
                _mm256_add_ps(low, high)
            };
            let quarters = |a, b| {
                let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
                let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
                _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
            };
            let lanes = |a, b| _mm256_add_ps(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
            let [x0, x1, x2, x3, x4, x5, x6, x7, ..] = *registers;
            let (x04, x15, x26, x37) = (halves(x0, x4), halves(x1, x5), halves(x2, x6), halves(x3, x7));
            Self(lanes(quarters(x04, x15), quarters(x26, x37)))
        }
    }
    #[inline(always)]
    unsafe fn exp2_each<const N: usize>(x: [Self; N], scale: Self) -> [Self; N] {
        // x * scale is `near`, a multiple of 1/8, and the rest. 2^near is a sum of bits, and 0 for -127.
        unsafe {
            let (least, round) = (Self::splat(-127.0).0, Self::splat(ROOTS_8.round).0);
            let roots = Self::load(ROOTS_8.without_exponent.as_ptr()).0;
            let [c1, c2, c3] = ROOTS_8.polynomial;
            let (c1, c2, c3) = (Self::splat(c1).0, Self::splat(c2).0, Self::splat(c3).0);
            let mut power = x;
            for power in &mut power {
                let x = _mm256_max_ps(least, _mm256_mul_ps(power.0, scale.0)); // NaN stays NaN
                let rounded = _mm256_add_ps(x, round);
                let rest = _mm256_sub_ps(x, _mm256_sub_ps(rounded, round));
                let rounded = _mm256_castps_si256(rounded);
                let root = _mm256_castps_si256(_mm256_permutevar8x32_ps(roots, rounded));
                let near = _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32::<20>(rounded)));
                let terms = _mm256_fmadd_ps(rest, _mm256_fmadd_ps(rest, c3, c2), c1);
                power.0 = _mm256_fmadd_ps(_mm256_mul_ps(rest, terms), near, near);
            }
            power
        }
    }
}

/// AVX-512 F.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Avx512(pub(super) __m512);

// SAFETY: sixteen f32; the rest is the trait's own contract, which each method passes on.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Vector for Avx512 {
    const LANES: usize = 16;
    const ROWS: usize = 8; // 24 sums of 32 registers
    const COLUMNS: usize = 3;
    const STEPS: usize = 2;
    const PARTS: usize = 3;
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
    unsafe fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        unsafe {
            let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0);
            Self(_mm512_mask_blend_ps(greater, y.0, x.0))
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            Self(_mm512_castsi512_ps(exponent))
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
    unsafe fn load_half(from: *const f32) -> Self {
        Self(unsafe { _mm512_zextps256_ps512(_mm256_loadu_ps(from)) })
    }
    #[inline(always)]
    unsafe fn load_half_f16(from: *const u16) -> Self {
        Self(unsafe { _mm512_zextps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_half_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())));
            Self(_mm512_castsi512_ps(_mm512_zextsi256_si512(wide)))
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
    unsafe fn sum_each(registers: &[Self; 16]) -> Self {
        unsafe {
            // Halves of two registers side by side, then quarters of four, then eighths of eight, then lanes of sixteen.
            let halves = |a: Self, b: Self| {
                let (low, high) = (
                    _mm512_shuffle_f32x4::<0x44>(a.0, b.0),
                    _mm512_shuffle_f32x4::<0xee>(a.0, b.0),
                );
                _mm512_add_ps(low, high)
            };
            let quarters = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let eighths = |a, b| {
                let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
                _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
            };
            let lanes = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
            // Register 4 i + j becomes lane j of quarter i.
            let mut of_four = [_mm512_setzero_ps(); 4];
            for (j, sums) in of_four.iter_mut().enumerate() {
                let [a, b, c, d] = [registers[j], registers[4 + j], registers[8 + j], registers[12 + j]];
                *sums = quarters(halves(a, b), halves(c, d));
            }
            let [x0, x1, x2, x3] = of_four;
            Self(lanes(eighths(x0, x1), eighths(x2, x3)))
        }
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
    unsafe fn nearest_bf16(self) -> Self {
        unsafe {
            let rounded = _mm512_add_epi32(_mm512_castps_si512(self.0), _mm512_set1_epi32(0x8000));
            let upper = _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            Self(_mm512_castsi512_ps(upper))
        }
    }
    #[inline(always)]
    unsafe fn store_upper_halves(self, high: Self, to: *mut u32) {
        unsafe {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.0));
            let high = _mm512_castps_si512(high.0);
            // (high & mask) | low
            let words = _mm512_ternarylogic_epi32::<0xf8>(low, high, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            _mm512_storeu_si512(to.cast(), words);
        }
    }
    #[inline(always)]
    unsafe fn is_within(self, least: f32, limit: f32) -> bool {
        unsafe {
            let (least, limit) = (least.to_bits() as i32, limit.to_bits() as i32);
            let magnitude = _mm512_and_si512(_mm512_castps_si512(self.0), _mm512_set1_epi32(i32::MAX));
            let above = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(least)); // what is less wraps around
            let within = _mm512_cmplt_epu32_mask(above, _mm512_set1_epi32(limit - least));
            within | _mm512_testn_epi32_mask(magnitude, magnitude) == u16::MAX
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, rows: usize, to: *mut f32, to_stride: usize, columns: usize) {
        unsafe {
            let mut x = [_mm512_setzero_ps(); 16];
            for (row, x) in x.iter_mut().enumerate().take(rows) {
                *x = _mm512_loadu_ps(from.add(row * stride));
            }
            // Pairs of rows, then fours: register 4 g + j then holds columns j, j + 4, j + 8, j + 12 of rows 4 g .. 4
            // g + 4.
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
    unsafe fn exp2_each<const N: usize>(x: [Self; N], scale: Self) -> [Self; N] {
        // x * scale is `near`, a multiple of 1/32, and the rest. One comparison makes what underflows 0, and what is infinite.
        unsafe {
            let (round, least) = (Self::splat(ROOTS_32.round).0, Self::splat(-126.0).0);
            let roots = ROOTS_32.powers.as_ptr();
            let (low, high) = (Self::load(roots).0, Self::load(roots.add(Self::LANES)).0);
            let [c1, c2] = ROOTS_32.polynomial;
            let (c1, c2) = (Self::splat(c1).0, Self::splat(c2).0);
            let mut power = x;
            for power in &mut power {
                let x = power.0;
                let rounded = _mm512_fmadd_ps(x, scale.0, round);
                let near = _mm512_sub_ps(rounded, round);
                let rest = _mm512_fmsub_ps(x, scale.0, near);
                let root = _mm512_permutex2var_ps(low, _mm512_castps_si512(rounded), high);
                let more = _mm512_mul_ps(rest, _mm512_fmadd_ps(rest, c2, c1)); // 2^rest - 1
                let in_range = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(near, least); // so for NaN
                power.0 = _mm512_maskz_scalef_ps(in_range, _mm512_fmadd_ps(more, root, root), near);
            }
            power
        }
    }
}
