//! Words in the registers of x86.

use std::arch::x86_64::*;

use super::{Avx2, Avx512, Vector, Words};

/// Implements methods of [`Words`] for a register, given its casts to integers and back. The methods are one instruction
/// each, of f32 or of integers; other methods, which differ between registers, follow.
macro_rules! words {
    (
        $register:ty, $to_integers:ident, $to_numbers:ident,
        one: { $($one:ident: $one_instruction:expr,)+ }
        two: { $($two:ident: $two_instruction:expr,)+ }
        integers: { $($integers:ident: $instruction:expr,)+ }
        shifts: { $($shift:ident: $shift_instruction:ident,)+ }
        convert: $to_number:ident, $to_word:ident;
        $($method:item)*
    ) => {
        // SAFETY: the trait's own contract, which each method passes on.
        #[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
        unsafe impl Words for $register {
            $(
                #[inline(always)]
                unsafe fn $one(self) -> Self {
                    Self(unsafe { $one_instruction(self.0) })
                }
            )+
            $(
                #[inline(always)]
                unsafe fn $two(self, other: Self) -> Self {
                    Self(unsafe { $two_instruction(self.0, other.0) })
                }
            )+
            $(
                #[inline(always)]
                unsafe fn $integers(self, other: Self) -> Self {
                    Self(unsafe { $to_numbers($instruction($to_integers(self.0), $to_integers(other.0))) })
                }
            )+
            $(
                #[inline(always)]
                unsafe fn $shift(self, other: Self) -> Self {
                    unsafe {
                        let by = other.and(Self::splat_word(31));
                        Self($to_numbers($shift_instruction($to_integers(self.0), $to_integers(by.0))))
                    }
                }
            )+
            #[inline(always)]
            unsafe fn to_number(self) -> Self {
                Self(unsafe { $to_number($to_integers(self.0)) })
            }
            #[inline(always)]
            unsafe fn to_word(self) -> Self {
                unsafe {
                    // Out of range the instruction gives i32::MIN, which is right below it and for nothing else.
                    let words = Self($to_numbers($to_word(self.0)));
                    let above = Self::splat(2_147_483_648.0).less_or_equal(self);
                    let words = above.choose(Self::splat_word(i32::MAX), words);
                    self.equal(self).and(words)
                }
            }
            $($method)*
        }
    };
}

words! {
    Avx2, _mm256_castps_si256, _mm256_castsi256_ps,
    one: {
        sqrt: _mm256_sqrt_ps,
        floor: _mm256_floor_ps,
    }
    two: {
        divide: _mm256_div_ps,
        less: _mm256_cmp_ps::<_CMP_LT_OQ>,
        less_or_equal: _mm256_cmp_ps::<_CMP_LE_OQ>,
        equal: _mm256_cmp_ps::<_CMP_EQ_OQ>,
    }
    integers: {
        add_words: _mm256_add_epi32,
        sub_words: _mm256_sub_epi32,
        mul_words: _mm256_mullo_epi32,
        min_words: _mm256_min_epi32,
        max_words: _mm256_max_epi32,
        and: _mm256_and_si256,
        and_not: _mm256_andnot_si256,
        or: _mm256_or_si256,
        xor: _mm256_xor_si256,
        less_words: less_epi32,
        equal_words: _mm256_cmpeq_epi32,
    }
    shifts: {
        shift_left: _mm256_sllv_epi32,
        shift_right: _mm256_srav_epi32,
    }
    convert: _mm256_cvtepi32_ps, _mm256_cvttps_epi32;

    #[inline(always)]
    unsafe fn choose(self, x: Self, y: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, self.0) })
    }
    #[inline(always)]
    unsafe fn quotient(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            // The f64 nearest to a quotient of two i32 has the floor of the quotient.
            let low = _mm256_div_pd(
                _mm256_cvtepi32_pd(_mm256_castsi256_si128(x)),
                _mm256_cvtepi32_pd(_mm256_castsi256_si128(y)),
            );
            let high = _mm256_div_pd(
                _mm256_cvtepi32_pd(_mm256_extracti128_si256::<1>(x)),
                _mm256_cvtepi32_pd(_mm256_extracti128_si256::<1>(y)),
            );
            let (low, high) = (
                _mm256_cvttpd_epi32(_mm256_floor_pd(low)),
                _mm256_cvttpd_epi32(_mm256_floor_pd(high)),
            );
            let quotient = Self(_mm256_castsi256_ps(_mm256_inserti128_si256::<1>(
                _mm256_castsi128_si256(low),
                high,
            )));
            Self::splat_word(0).less_words(other).and(quotient)
        }
    }
}

/// Returns the truths of `x < y`.
#[inline(always)]
unsafe fn less_epi32(x: __m256i, y: __m256i) -> __m256i {
    // SAFETY: passed on to the caller.
    unsafe { _mm256_cmpgt_epi32(y, x) }
}

words! {
    Avx512, _mm512_castps_si512, _mm512_castsi512_ps,
    one: {
        sqrt: _mm512_sqrt_ps,
        floor: _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>,
    }
    two: {
        divide: _mm512_div_ps,
        less: truths_of_numbers::<_CMP_LT_OQ>,
        less_or_equal: truths_of_numbers::<_CMP_LE_OQ>,
        equal: truths_of_numbers::<_CMP_EQ_OQ>,
    }
    integers: {
        add_words: _mm512_add_epi32,
        sub_words: _mm512_sub_epi32,
        mul_words: _mm512_mullo_epi32,
        min_words: _mm512_min_epi32,
        max_words: _mm512_max_epi32,
        and: _mm512_and_si512,
        and_not: _mm512_andnot_si512,
        or: _mm512_or_si512,
        xor: _mm512_xor_si512,
        less_words: truths_of_integers::<_MM_CMPINT_LT>,
        equal_words: truths_of_integers::<_MM_CMPINT_EQ>,
    }
    shifts: {
        shift_left: _mm512_sllv_epi32,
        shift_right: _mm512_srav_epi32,
    }
    convert: _mm512_cvtepi32_ps, _mm512_cvttps_epi32;

    #[inline(always)]
    unsafe fn choose(self, x: Self, y: Self) -> Self {
        unsafe {
            let (holds, x, y) = (
                _mm512_castps_si512(self.0),
                _mm512_castps_si512(x.0),
                _mm512_castps_si512(y.0),
            );
            // holds ? x : y, bit by bit
            Self(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(holds, x, y)))
        }
    }
    #[inline(always)]
    unsafe fn quotient(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            // The f64 nearest to a quotient of two i32 has the floor of the quotient.
            let low = _mm512_div_pd(
                _mm512_cvtepi32_pd(_mm512_castsi512_si256(x)),
                _mm512_cvtepi32_pd(_mm512_castsi512_si256(y)),
            );
            let high = _mm512_div_pd(
                _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64::<1>(x)),
                _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64::<1>(y)),
            );
            let (low, high) = (
                _mm512_cvttpd_epi32(_mm512_roundscale_pd::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(
                    low,
                )),
                _mm512_cvttpd_epi32(_mm512_roundscale_pd::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(
                    high,
                )),
            );
            let quotient = Self(_mm512_castsi512_ps(_mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(low),
                high,
            )));
            Self::splat_word(0).less_words(other).and(quotient)
        }
    }
}

/// Returns the truths of a comparison of f32.
#[inline(always)]
unsafe fn truths_of_numbers<const COMPARISON: i32>(x: __m512, y: __m512) -> __m512 {
    // SAFETY: passed on to the caller.
    unsafe { _mm512_castsi512_ps(truths(_mm512_cmp_ps_mask::<COMPARISON>(x, y))) }
}

/// Returns the truths of a comparison of i32.
#[inline(always)]
unsafe fn truths_of_integers<const COMPARISON: i32>(x: __m512i, y: __m512i) -> __m512i {
    // SAFETY: passed on to the caller.
    unsafe { truths(_mm512_cmp_epi32_mask::<COMPARISON>(x, y)) }
}

/// Returns all ones where the mask holds, else zeros.
#[inline(always)]
unsafe fn truths(mask: __mmask16) -> __m512i {
    // SAFETY: passed on to the caller.
    unsafe { _mm512_maskz_set1_epi32(mask, -1) }
}
