//! Arithmetic that `core` does not have. PTX ISA, "Floating Point Instructions".

use core::arch::asm;

macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y;
            // SAFETY: arithmetic on one lane's registers.
            unsafe {
                asm!(concat!($instruction, " {y}, {x};"), y = out(reg32) y, x = in(reg32) x, options(pure, nomem, nostack));
            }
            y
        }
    };
}

unary!(
    /// 2^x; relative error 2^-22, subnormal results flushed to 0.
    ex2, "ex2.approx.ftz.f32");
unary!(
    /// log2(x); absolute error 2^-22 in [0.5, 2], relative 2^-22 elsewhere.
    lg2, "lg2.approx.ftz.f32");
unary!(
    /// 1/x, correctly rounded.
    rcp, "rcp.rn.f32");

/// The smaller of x and y, NaN if either is: `min.NaN.f32`. PTX 7.0, sm_80.
#[inline(always)]
pub fn min_nan(x: f32, y: f32) -> f32 {
    let r;
    // SAFETY: arithmetic on one lane's registers.
    unsafe {
        asm!("min.NaN.f32 {r}, {x}, {y};", r = out(reg32) r, x = in(reg32) x, y = in(reg32) y,
            options(pure, nomem, nostack));
    }
    r
}

/// x * y + z, rounded once.
#[inline(always)]
pub fn fma(x: f32, y: f32, z: f32) -> f32 {
    let r;
    // SAFETY: arithmetic on one lane's registers.
    unsafe {
        asm!("fma.rn.f32 {r}, {x}, {y}, {z};", r = out(reg32) r, x = in(reg32) x, y = in(reg32) y, z = in(reg32) z,
            options(pure, nomem, nostack));
    }
    r
}
