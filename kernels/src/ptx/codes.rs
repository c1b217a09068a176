//! Codes of e4m3 in words. PTX ISA, "cvt", "prmt". PTX 7.8, sm_90.

use core::arch::asm;

/// `cvt.rn.satfinite.e4m3x2.f32` twice: four f32 as codes, rounded to nearest even, the first in the lowest byte. Beyond 448
/// they are 448, and NaN stays one.
#[inline(always)]
pub fn pack(x: [f32; 4]) -> u32 {
    let word;
    // SAFETY: arithmetic on one lane's registers.
    unsafe {
        asm!("{{ .reg .b16 {w}_l, {w}_h; cvt.rn.satfinite.e4m3x2.f32 {w}_l, {b}, {a}; cvt.rn.satfinite.e4m3x2.f32 {w}_h, {d}, {c}; mov.b32 {w}, {{{w}_l, {w}_h}}; }}",
            w = out(reg32) word, a = in(reg32) x[0], b = in(reg32) x[1], c = in(reg32) x[2], d = in(reg32) x[3],
            options(pure, nomem, nostack));
    }
    word
}

/// `prmt.b32` twice: the even bytes of two words, and the odd ones, those of `a` first.
#[inline(always)]
pub fn split_bytes(a: u32, b: u32) -> [u32; 2] {
    let (even, odd);
    // SAFETY: arithmetic on one lane's registers.
    unsafe {
        asm!("prmt.b32 {e}, {a}, {b}, 0x6420; prmt.b32 {o}, {a}, {b}, 0x7531;", e = out(reg32) even, o = out(reg32) odd,
            a = in(reg32) a, b = in(reg32) b, options(pure, nomem, nostack));
    }
    [even, odd]
}

/// Returns the highest bit of each code of a word that is NaN.
#[inline(always)]
pub fn nan(word: u32) -> u32 {
    ((word & 0x7f7f_7f7f) + 0x0101_0101) & 0x8080_8080
}

/// Returns the word with zeros in place of NaN.
#[inline(always)]
pub fn without_nan(word: u32) -> u32 {
    word & !((nan(word) >> 7) * 0xff)
}
