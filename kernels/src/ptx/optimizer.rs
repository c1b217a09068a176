//! Moves that only affect the optimiser. PTX ISA, "mov".

use core::arch::asm;

/// Returns `value`, unknown to the optimiser: keeps a loop with this trip count from being unrolled.
#[inline(always)]
pub fn opaque(value: u32) -> u32 {
    let result;
    // SAFETY: a register move.
    unsafe { asm!("mov.u32 {r}, {v};", r = out(reg32) result, v = in(reg32) value, options(pure, nomem, nostack)) }
    result
}

/// Returns `value`; everything that depends on it is recomputed instead of being kept in registers.
#[inline(always)]
pub fn renew(value: u32) -> u32 {
    let result;
    // SAFETY: a register move; not `pure`, so that two of them are not merged.
    unsafe { asm!("mov.u32 {r}, {v};", r = out(reg32) result, v = in(reg32) value, options(nomem, nostack)) }
    result
}
