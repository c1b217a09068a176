//! Moves that mean nothing to the machine and something to the optimiser. PTX ISA, "mov".

use core::arch::asm;

/// `value`, which the optimiser cannot know: keeps a loop with this trip count rolled.
#[inline(always)]
pub fn opaque(value: u32) -> u32 {
    let result;
    // SAFETY: a register move.
    unsafe { asm!("mov.u32 {r}, {v};", r = out(reg32) result, v = in(reg32) value, options(pure, nomem, nostack)) }
    result
}

/// `value`, from which everything is computed anew: nothing is kept in registers since the last time.
#[inline(always)]
pub fn renew(value: u32) -> u32 {
    let result;
    // SAFETY: a register move; not `pure`, so that two of them stay two.
    unsafe { asm!("mov.u32 {r}, {v};", r = out(reg32) result, v = in(reg32) value, options(nomem, nostack)) }
    result
}
