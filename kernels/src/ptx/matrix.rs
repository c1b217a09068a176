//! Tensor cores and their operands. PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".

use crate::element::{Bf16, F16};
use core::arch::asm;

/// A 16-bit element type of the tensor cores.
pub trait Half: Copy {
    /// Exponent field with all bits set.
    const EXPONENT: u16;
    /// Largest finite number.
    const MAX: f32;

    /// `mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32` — computes d += a b. PTX 7.0, sm_80. The whole warp executes
    /// it.
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
    /// Packs two f32 in one word, each rounded to nearest even; `low` in the low half.
    fn pack(low: f32, high: f32) -> u32;
    /// Unpacks one word to two f32, exactly.
    fn unpack(pair: u32) -> [f32; 2];
    /// Multiplies `pair * factor` elementwise, rounded to nearest even.
    fn scale(pair: u32, factor: u32) -> u32;
}

macro_rules! half {
    ($type:ident, $name:literal, $exponent:literal, $max:expr, $unpack:expr) => {
        impl Half for $type {
            const EXPONENT: u16 = $exponent;
            const MAX: f32 = $max;

            #[inline(always)]
            fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
                // SAFETY: registers only; the kernels call it where control is uniform over the warp.
                unsafe {
                    asm!(concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $name, ".", $name, ".f32 ",
                        "{{{d0}, {d1}, {d2}, {d3}}}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {{{d0}, {d1}, {d2}, {d3}}};"),
                        d0 = inout(reg32) d[0], d1 = inout(reg32) d[1], d2 = inout(reg32) d[2], d3 = inout(reg32) d[3],
                        a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                        b0 = in(reg32) b[0], b1 = in(reg32) b[1], options(nomem, nostack));
                }
            }

            #[inline(always)]
            fn pack(low: f32, high: f32) -> u32 {
                let pair;
                // SAFETY: arithmetic on one lane's registers.
                unsafe {
                    asm!(concat!("cvt.rn.", $name, "x2.f32 {p}, {h}, {l};"), p = out(reg32) pair, h = in(reg32) high,
                        l = in(reg32) low, options(pure, nomem, nostack));
                }
                pair
            }

            #[inline(always)]
            fn unpack(pair: u32) -> [f32; 2] {
                $unpack(pair)
            }

            #[inline(always)]
            fn scale(pair: u32, factor: u32) -> u32 {
                let product;
                // SAFETY: arithmetic on one lane's registers. Adding -0 changes no product; bf16x2 has no mul before
                // sm_90.
                unsafe {
                    asm!(concat!("fma.rn.", $name, "x2 {r}, {x}, {y}, {z};"), r = out(reg32) product, x = in(reg32) pair,
                        y = in(reg32) factor, z = in(reg32) 0x8000_8000_u32, options(pure, nomem, nostack));
                }
                product
            }
        }
    };
}

half!(F16, "f16", 0x7c00, 65504.0, unpack_f16);
half!(Bf16, "bf16", 0x7f80, f32::from_bits(0x7f7f_0000), |pair: u32| [
    f32::from_bits(pair << 16),
    f32::from_bits(pair & 0xffff_0000)
]);

/// `cvt.f32.f16` of both halves of a word.
#[inline(always)]
fn unpack_f16(pair: u32) -> [f32; 2] {
    let (low, high);
    // SAFETY: arithmetic on one lane's registers.
    unsafe {
        asm!("{{ .reg .b16 {l}_h, {h}_h; mov.b32 {{{l}_h, {h}_h}}, {p}; cvt.f32.f16 {l}, {l}_h; cvt.f32.f16 {h}, {h}_h; }}",
            l = out(reg32) low, h = out(reg32) high, p = in(reg32) pair, options(pure, nomem, nostack));
    }
    [low, high]
}

macro_rules! ldmatrix {
    ($name:ident, $transposed:literal, $doc:literal) => {
        #[doc = $doc]
        ///
        /// Lanes `8i .. 8i + 8` name the rows of matrix `i`. PTX 6.5, sm_75. The whole warp executes it.
        ///
        /// # Safety
        /// Every lane's `address` is a 16-byte aligned shared-window address of 16 initialised bytes.
        #[inline(always)]
        pub unsafe fn $name(address: u32) -> [u32; 4] {
            let (a, b, c, d);
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("ldmatrix.sync.aligned.m8n8.x4", $transposed, ".shared.b16 {{{a}, {b}, {c}, {d}}}, [{p}];"),
                    a = out(reg32) a, b = out(reg32) b, c = out(reg32) c, d = out(reg32) d, p = in(reg32) address,
                    options(nostack, readonly));
            }
            [a, b, c, d]
        }
    };
}

ldmatrix!(
    ldmatrix_x4,
    "",
    "Four 8x8 matrices of 16-bit elements: lane l receives elements (l / 4, l % 4 * 2 ..+ 2) of each."
);
ldmatrix!(
    ldmatrix_x4_trans,
    ".trans",
    "The same, each matrix transposed: lane l receives elements (l % 4 * 2 ..+ 2, l / 4) of each."
);

/// `stmatrix` — stores two 8x8 matrices of 16-bit elements, as [`stmatrix_x4`] does four. Lanes `0 .. 16` supply the row
/// addresses.
///
/// # Safety
/// The contract of [`stmatrix_x4`].
#[inline(always)]
pub unsafe fn stmatrix_x2(address: u32, words: [u32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x2.shared.b16 [{p}], {{{a}, {b}}};", p = in(reg32) address,
            a = in(reg32) words[0], b = in(reg32) words[1], options(nostack));
    }
}

macro_rules! stmatrix {
    ($name:ident, $transposed:literal, $doc:literal) => {
        #[doc = $doc]
        ///
        /// Lanes `8i .. 8i + 8` supply the row addresses of matrix `i`. PTX 7.8, sm_90. The whole warp executes it.
        ///
        /// # Safety
        /// Every lane's `address` is a 16-byte aligned shared-window address of 16 bytes that no other thread accesses.
        #[inline(always)]
        pub unsafe fn $name(address: u32, words: [u32; 4]) {
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("stmatrix.sync.aligned.m8n8.x4", $transposed, ".shared.b16 [{p}], {{{a}, {b}, {c}, {d}}};"),
                    p = in(reg32) address, a = in(reg32) words[0], b = in(reg32) words[1], c = in(reg32) words[2],
                    d = in(reg32) words[3], options(nostack));
            }
        }
    };
}

stmatrix!(
    stmatrix_x4,
    "",
    "`stmatrix` — stores four 8x8 matrices of 16-bit elements: lane l holds elements (l / 4, l % 4 * 2 ..+ 2) of each."
);
stmatrix!(
    stmatrix_x4_trans,
    ".trans",
    "The same, each matrix transposed: lane l holds elements (l % 4 * 2 ..+ 2, l / 4) of each."
);
