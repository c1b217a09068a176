//! Words in the registers of x86.

use std::arch::x86_64::*;

use super::{Avx2, Avx512, Vector, Words};

// SAFETY: the trait's own contract, which each method passes on.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Words for Avx2 {
    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self(unsafe { _mm256_sqrt_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        Self(unsafe { _mm256_floor_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn less(self, other: Self) -> Self {
        Self(unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn less_or_equal(self, other: Self) -> Self {
        Self(unsafe { _mm256_cmp_ps::<_CMP_LE_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> Self {
        Self(unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn choose(self, x: Self, y: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, self.0) })
    }
    #[inline(always)]
    unsafe fn to_number(self) -> Self {
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_castps_si256(self.0)) })
    }
    #[inline(always)]
    unsafe fn to_word(self) -> Self {
        unsafe {
            // Out of range the instruction gives i32::MIN, which is right below it and for nothing else.
            let words = Self(_mm256_castsi256_ps(_mm256_cvttps_epi32(self.0)));
            let above = Self::splat(2_147_483_648.0).less_or_equal(self);
            let words = above.choose(Self::splat_word(i32::MAX), words);
            self.equal(self).and(words)
        }
    }
    #[inline(always)]
    unsafe fn add_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_add_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn sub_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_sub_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn mul_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_mullo_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn min_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_min_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn max_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_max_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_and_si256(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn and_not(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_andnot_si256(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_or_si256(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_xor_si256(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn shift_left(self, other: Self) -> Self {
        unsafe {
            let by = _mm256_and_si256(_mm256_castps_si256(other.0), _mm256_set1_epi32(31));
            Self(_mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_castps_si256(self.0), by)))
        }
    }
    #[inline(always)]
    unsafe fn shift_right(self, other: Self) -> Self {
        unsafe {
            let by = _mm256_and_si256(_mm256_castps_si256(other.0), _mm256_set1_epi32(31));
            Self(_mm256_castsi256_ps(_mm256_srav_epi32(_mm256_castps_si256(self.0), by)))
        }
    }
    #[inline(always)]
    unsafe fn less_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y, x)))
        }
    }
    #[inline(always)]
    unsafe fn equal_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm256_castps_si256(self.0), _mm256_castps_si256(other.0));
            Self(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, y)))
        }
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

// SAFETY: the trait's own contract, which each method passes on.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
unsafe impl Words for Avx512 {
    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn floor(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    unsafe fn less(self, other: Self) -> Self {
        unsafe {
            let holds = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0);
            Self(_mm512_castsi512_ps(_mm512_maskz_set1_epi32(holds, -1)))
        }
    }
    #[inline(always)]
    unsafe fn less_or_equal(self, other: Self) -> Self {
        unsafe {
            let holds = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, other.0);
            Self(_mm512_castsi512_ps(_mm512_maskz_set1_epi32(holds, -1)))
        }
    }
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> Self {
        unsafe {
            let holds = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0);
            Self(_mm512_castsi512_ps(_mm512_maskz_set1_epi32(holds, -1)))
        }
    }
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
    unsafe fn to_number(self) -> Self {
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_castps_si512(self.0)) })
    }
    #[inline(always)]
    unsafe fn to_word(self) -> Self {
        unsafe {
            // Out of range the instruction gives i32::MIN, which is right below it and for nothing else.
            let words = Self(_mm512_castsi512_ps(_mm512_cvttps_epi32(self.0)));
            let above = Self::splat(2_147_483_648.0).less_or_equal(self);
            let words = above.choose(Self::splat_word(i32::MAX), words);
            self.equal(self).and(words)
        }
    }
    #[inline(always)]
    unsafe fn add_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn sub_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_sub_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn mul_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_mullo_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn min_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_min_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn max_words(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_max_epi32(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_and_si512(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn and_not(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_andnot_si512(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_or_si512(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        unsafe {
            let (x, y) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_xor_si512(x, y)))
        }
    }
    #[inline(always)]
    unsafe fn shift_left(self, other: Self) -> Self {
        unsafe {
            let by = _mm512_and_si512(_mm512_castps_si512(other.0), _mm512_set1_epi32(31));
            Self(_mm512_castsi512_ps(_mm512_sllv_epi32(_mm512_castps_si512(self.0), by)))
        }
    }
    #[inline(always)]
    unsafe fn shift_right(self, other: Self) -> Self {
        unsafe {
            let by = _mm512_and_si512(_mm512_castps_si512(other.0), _mm512_set1_epi32(31));
            Self(_mm512_castsi512_ps(_mm512_srav_epi32(_mm512_castps_si512(self.0), by)))
        }
    }
    #[inline(always)]
    unsafe fn less_words(self, other: Self) -> Self {
        unsafe {
            let holds = _mm512_cmplt_epi32_mask(_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_maskz_set1_epi32(holds, -1)))
        }
    }
    #[inline(always)]
    unsafe fn equal_words(self, other: Self) -> Self {
        unsafe {
            let holds = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_maskz_set1_epi32(holds, -1)))
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
