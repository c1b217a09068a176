//! Instructions of aarch64 that stable Rust has no functions for yet: conversions of f16, products of bf16,
//! prefetches.
//!
//! One function is one instruction.

use std::arch::aarch64::{float32x4_t, uint16x4_t, uint32x4_t};
use std::arch::asm;

/// `LDR` of an `S` register: element `index` of a row of f32, then zeros.
///
/// # Safety
/// The element is there.
#[inline(always)]
pub(super) unsafe fn load_f32(row: *const f32, index: usize) -> float32x4_t {
    let register;
    // SAFETY: reads one f32, which is there, says the caller.
    unsafe {
        asm!("ldr {register:s}, [{row}, {index}, lsl #2]",
            register = lateout(vreg) register, row = in(reg) row, index = in(reg) index,
            options(pure, readonly, nostack, preserves_flags));
    }
    register
}

/// `FCVTL`: four f16, widened. Every aarch64 processor has it.
#[inline(always)]
pub(super) fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: reads and writes registers alone.
    unsafe {
        asm!("fcvtl {wide:v}.4s, {halves:v}.4h", wide = lateout(vreg) wide, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

/// `FCVTN`: four f32, rounded to f16, ties to even. Every aarch64 processor has it.
#[inline(always)]
pub(super) fn round_to_f16(wide: float32x4_t) -> uint16x4_t {
    let halves;
    // SAFETY: reads and writes registers alone.
    unsafe {
        asm!("fcvtn {halves:v}.4h, {wide:v}.4s", halves = lateout(vreg) halves, wide = in(vreg) wide,
            options(pure, nomem, nostack, preserves_flags));
    }
    halves
}

/// `BFMMLA`: adds to a matrix of 2 x 2 the product of two rows of four bf16 and, of the other operand, two columns of
/// four.
///
/// # Safety
/// The processor has FEAT_BF16.
#[inline]
#[target_feature(enable = "bf16")]
pub(super) unsafe fn multiply_bf16(sums: float32x4_t, rows: uint32x4_t, columns: uint32x4_t) -> float32x4_t {
    let mut result = sums;
    // SAFETY: reads and writes registers alone; the processor has the instruction, says the caller.
    unsafe {
        asm!("bfmmla {sums:v}.4s, {rows:v}.8h, {columns:v}.8h",
            sums = inout(vreg) result, rows = in(vreg) rows, columns = in(vreg) columns,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// `PRFM PLDL2KEEP`: asks for a cache line, which need not exist, as far as the L2 cache.
#[inline(always)]
pub(super) fn prefetch_l2(line: *const u8) {
    // SAFETY: a prefetch never faults, and changes no memory.
    unsafe { asm!("prfm pldl2keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags)) };
}
