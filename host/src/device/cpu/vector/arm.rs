//! The registers of aarch64: NEON.

use std::arch::aarch64::*;

use super::{Vector, Words};
use crate::device::cpu::arm;

/// NEON, which every aarch64 processor has.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Neon(float32x4_t);

impl Neon {
    /// Bit patterns, half of a unit of bf16 away from zero: their upper halves are the nearest bf16, ties away from
    /// zero.
    #[inline(always)]
    unsafe fn rounded_up(self) -> uint32x4_t {
        // SAFETY: every aarch64 processor has NEON.
        unsafe { vaddq_u32(vreinterpretq_u32_f32(self.0), vdupq_n_u32(0x8000)) }
    }
}

// SAFETY: four f32; the rest is the trait's own contract, which each method passes on.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the contract of the trait, for each")]
#[allow(
    unused_unsafe,
    reason = "these functions are unsafe to the oldest compilers that build this crate"
)]
unsafe impl Vector for Neon {
    const LANES: usize = 4;
    const ROWS: usize = 8; // 24 sums of 32 registers
    const COLUMNS: usize = 3;
    const STEPS: usize = 1;
    const PARTS: usize = 1;
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { vdupq_n_f32(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { vld1q_f32(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { vst1q_f32(to, self.0) }
    }
    #[inline(always)]
    unsafe fn broadcast(row: *const f32, index: usize) -> Self {
        // FMLA takes its factor from one lane. LD1R, which the compiler would take, fills all four, in the place of
        // an FMLA.
        Self(unsafe { vdupq_laneq_f32::<0>(arm::load_f32(row, index)) })
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(unsafe { vaddq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(unsafe { vsubq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(unsafe { vmulq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { vfmaq_f32(addend.0, self.0, factor.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { self.select_greater(other, self, other) }
    }
    #[inline(always)]
    unsafe fn select_greater(self, other: Self, x: Self, y: Self) -> Self {
        Self(unsafe { vbslq_f32(vcgtq_f32(self.0, other.0), x.0, y.0) })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Self(unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0))) })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(arm::widen_f16(unsafe { vld1_u16(from) }))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from))) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe { vst1_u16(to, arm::round_to_f16(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let bits = vreinterpretq_u32_f32(self.0);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
            let is_number = vceqq_f32(self.0, self.0);
            vst1_u16(to, vshrn_n_u32::<16>(vbslq_u32(is_number, rounded, quiet)));
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn sum_each(registers: &[Self; 16]) -> Self {
        // Neighbours first, as FADDP and the sum of a register have it.
        unsafe {
            let [a, b, c, d, ..] = *registers;
            Self(vpaddq_f32(vpaddq_f32(a.0, b.0), vpaddq_f32(c.0, d.0)))
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, high: Self, to: *mut u32) {
        // The upper half of one, shifted below that of the other.
        unsafe { vst1q_u32(to, vsriq_n_u32::<16>(high.rounded_up(), self.rounded_up())) }
    }
    #[inline(always)]
    unsafe fn nearest_bf16(self) -> Self {
        Self(unsafe { vreinterpretq_f32_u32(vandq_u32(self.rounded_up(), vdupq_n_u32(0xffff_0000))) })
    }
    #[inline(always)]
    unsafe fn store_upper_halves(self, high: Self, to: *mut u32) {
        unsafe {
            let (low, high) = (vreinterpretq_u32_f32(self.0), vreinterpretq_u32_f32(high.0));
            vst1q_u32(to, vsriq_n_u32::<16>(high, low));
        }
    }
    #[inline(always)]
    unsafe fn is_within(self, least: f32, limit: f32) -> bool {
        unsafe {
            let (least, limit) = (least.to_bits(), limit.to_bits());
            let magnitude = vandq_u32(vreinterpretq_u32_f32(self.0), vdupq_n_u32(i32::MAX as u32));
            let above = vsubq_u32(magnitude, vdupq_n_u32(least)); // what is less wraps around
            let within = vcltq_u32(above, vdupq_n_u32(limit - least));
            vminvq_u32(vorrq_u32(within, vceqzq_u32(magnitude))) != 0
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, rows: usize, to: *mut f32, to_stride: usize, columns: usize) {
        unsafe {
            let mut x = [vdupq_n_f32(0.0); 4];
            for (row, x) in x.iter_mut().enumerate().take(rows) {
                *x = vld1q_f32(from.add(row * stride));
            }
            let [a, b, c, d] = x;
            // Columns 0 and 1, then 2 and 3, of two rows each.
            let (ac, bd) = (
                [vzip1q_f32(a, c), vzip2q_f32(a, c)],
                [vzip1q_f32(b, d), vzip2q_f32(b, d)],
            );
            let x = [
                vzip1q_f32(ac[0], bd[0]),
                vzip2q_f32(ac[0], bd[0]),
                vzip1q_f32(ac[1], bd[1]),
                vzip2q_f32(ac[1], bd[1]),
            ];
            for (column, x) in x.iter().enumerate().take(columns) {
                vst1q_f32(to.add(column * to_stride), *x);
            }
        }
    }
}

// SAFETY: the forms over arrays, which the trait brings.
unsafe impl Words for Neon {}
