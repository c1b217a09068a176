//! Loads and stores with an explicit state space. PTX ISA, "ld", "st".
//!
//! To LLVM a pointer from a parameter struct is generic; an explicit space avoids the lookup of the space at run
//! time.

use core::arch::asm;
use core::mem::MaybeUninit;

/// `ld.shared.v4.f32` — four f32 from 16-byte aligned shared memory.
///
/// # Safety
/// `address` is a 16-byte aligned shared-window address of initialised memory that no other thread writes meanwhile.
#[inline(always)]
pub unsafe fn ld_shared_v4(address: u32) -> [f32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v4.f32 {{{a}, {b}, {c}, {d}}}, [{p}];", a = out(reg32) a, b = out(reg32) b,
            c = out(reg32) c, d = out(reg32) d, p = in(reg32) address, options(nostack, readonly));
    }
    [a, b, c, d]
}

/// `ld.shared.v2.f32` — two f32 from 8-byte aligned shared memory.
///
/// # Safety
/// `address` is an 8-byte aligned shared-window address of initialised memory that no other thread writes meanwhile.
#[inline(always)]
pub unsafe fn ld_shared_v2(address: u32) -> [f32; 2] {
    let (a, b);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v2.f32 {{{a}, {b}}}, [{p}];", a = out(reg32) a, b = out(reg32) b, p = in(reg32) address,
            options(nostack, readonly));
    }
    [a, b]
}

/// `ld.shared.f32` — one f32 from shared memory.
///
/// # Safety
/// `address` is a 4-byte aligned shared-window address of initialised memory that no other thread writes meanwhile.
#[inline(always)]
pub unsafe fn ld_shared(address: u32) -> f32 {
    let value;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.f32 {v}, [{p}];", v = out(reg32) value, p = in(reg32) address, options(nostack, readonly));
    }
    value
}

/// `ld.shared.b32` — one word from shared memory.
///
/// # Safety
/// The contract of [`ld_shared`].
#[inline(always)]
pub unsafe fn ld_shared_u32(address: u32) -> u32 {
    // SAFETY: the caller's contract.
    unsafe { ld_shared(address) }.to_bits()
}

/// `ld.shared.v4.b32` — 16 bytes from shared memory as four words.
///
/// # Safety
/// The contract of [`ld_shared_v4`].
#[inline(always)]
pub unsafe fn ld_shared_words(address: u32) -> [u32; 4] {
    // SAFETY: the caller's contract.
    unsafe { ld_shared_v4(address) }.map(f32::to_bits)
}

/// `st.shared.v4.b32` — 16 bytes to 16-byte aligned shared memory.
///
/// # Safety
/// `address` is a 16-byte aligned shared-window address of this block that no other thread accesses meanwhile.
#[inline(always)]
pub unsafe fn st_shared_words(address: u32, words: [u32; 4]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v4.b32 [{p}], {{{a}, {b}, {c}, {d}}};", p = in(reg32) address, a = in(reg32) words[0],
            b = in(reg32) words[1], c = in(reg32) words[2], d = in(reg32) words[3], options(nostack));
    }
}

/// `st.shared.b32` — one word to 4-byte aligned shared memory.
///
/// # Safety
/// `address` is a 4-byte aligned shared-window address of this block that no other thread accesses meanwhile.
#[inline(always)]
pub unsafe fn st_shared_word(address: u32, word: u32) {
    // SAFETY: the caller's contract.
    unsafe { asm!("st.shared.b32 [{p}], {w};", p = in(reg32) address, w = in(reg32) word, options(nostack)) }
}

/// `st.shared.v2.f32` — two f32 to 8-byte aligned shared memory.
///
/// # Safety
/// `address` is an 8-byte aligned shared-window address of this block that no other thread accesses meanwhile.
#[inline(always)]
pub unsafe fn st_shared_v2(address: u32, values: [f32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v2.f32 [{p}], {{{a}, {b}}};", p = in(reg32) address, a = in(reg32) values[0],
            b = in(reg32) values[1], options(nostack));
    }
}

/// `st.shared.b16` — two bytes to 2-byte aligned shared memory.
///
/// # Safety
/// `address` is a 2-byte aligned shared-window address of this block whose two bytes no other thread accesses meanwhile.
#[inline(always)]
pub unsafe fn st_shared_u16(address: u32, value: u16) {
    // SAFETY: the caller's contract.
    unsafe { asm!("st.shared.b16 [{p}], {v};", p = in(reg32) address, v = in(reg16) value, options(nostack)) }
}

/// `ld.global.u8` — one byte.
///
/// # Safety
/// `address` is readable.
#[inline(always)]
pub unsafe fn ld_global_u8(address: u64) -> u32 {
    let value;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.u8 {v}, [{p}];", v = out(reg32) value, p = in(reg64) address, options(nostack, readonly));
    }
    value
}

macro_rules! global_access {
    ($load:ident, $store:ident, $type:ident, $class:ident, $space_type:literal) => {
        #[doc = concat!("`ld.global.", $space_type, "`.\n\n# Safety\n`address` is readable and aligned to the access.")]
        #[inline(always)]
        pub unsafe fn $load(address: u64) -> $type {
            let value;
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("ld.global.", $space_type, " {v}, [{p}];"), v = out($class) value, p = in(reg64) address,
                    options(nostack, readonly));
            }
            value
        }

        #[doc = concat!("`st.global.", $space_type, "`.\n\n# Safety\n`address` is writable, aligned to the access, and no other thread touches it.")]
        #[inline(always)]
        pub unsafe fn $store(address: u64, value: $type) {
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("st.global.", $space_type, " [{p}], {v};"), p = in(reg64) address, v = in($class) value,
                    options(nostack));
            }
        }
    };
}

global_access!(ld_global_u16, st_global_u16, u16, reg16, "b16");
global_access!(ld_global_u32, st_global_u32, u32, reg32, "b32");
global_access!(ld_global_u64, st_global_u64, u64, reg64, "b64");

/// Struct `index` of a list in global memory, by `ld.global.b32`.
///
/// # Safety
/// `T` is `repr(C)` and consists of `u32` alone. `list` is 4-byte aligned, and the struct in it readable.
#[inline(always)]
pub unsafe fn ld_global_struct<T: Copy>(list: u64, index: u32) -> T {
    const { assert!(align_of::<T>() == 4) };
    let address = list + index as u64 * size_of::<T>() as u64;
    let mut value = MaybeUninit::<T>::uninit();
    for i in 0..size_of::<T>() / 4 {
        // SAFETY: the word lies in the struct, and the caller's contract.
        unsafe {
            let word = ld_global_u32(address + i as u64 * 4);
            value.as_mut_ptr().cast::<u32>().add(i).write(word);
        }
    }
    // SAFETY: every word was written, and any word is a `u32`.
    unsafe { value.assume_init() }
}

/// `ld.global.v4.b32` — 16 bytes from 16-byte aligned global memory.
///
/// # Safety
/// `address` is readable and 16-byte aligned.
#[inline(always)]
pub unsafe fn ld_global_words(address: u64) -> [u32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.v4.b32 {{{a}, {b}, {c}, {d}}}, [{p}];", a = out(reg32) a, b = out(reg32) b, c = out(reg32) c,
            d = out(reg32) d, p = in(reg64) address, options(nostack, readonly));
    }
    [a, b, c, d]
}

/// `st.global.v2.f32` — two f32 to 8-byte aligned global memory.
///
/// # Safety
/// `address` is writable, 8-byte aligned, and no other thread accesses it.
#[inline(always)]
pub unsafe fn st_global_v2(address: u64, values: [f32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v2.f32 [{p}], {{{a}, {b}}};", p = in(reg64) address, a = in(reg32) values[0],
            b = in(reg32) values[1], options(nostack));
    }
}

/// `st.global.v4.b32` — 16 bytes to 16-byte aligned global memory.
///
/// # Safety
/// `address` is writable, 16-byte aligned, and no other thread accesses it.
#[inline(always)]
pub unsafe fn st_global_words(address: u64, words: [u32; 4]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v4.b32 [{p}], {{{a}, {b}, {c}, {d}}};", p = in(reg64) address, a = in(reg32) words[0],
            b = in(reg32) words[1], c = in(reg32) words[2], d = in(reg32) words[3], options(nostack));
    }
}

/// `red.global.add.v4.f32` — adds four f32 to 16-byte aligned global memory, in any order with other additions. PTX 8.1,
/// sm_90.
///
/// # Safety
/// `address` is writable and 16-byte aligned. Other threads access it only by additions.
#[inline(always)]
pub unsafe fn add_global_v4(address: u64, values: [f32; 4]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("red.relaxed.gpu.global.add.v4.f32 [{p}], {{{a}, {b}, {c}, {d}}};", p = in(reg64) address,
            a = in(reg32) values[0], b = in(reg32) values[1], c = in(reg32) values[2], d = in(reg32) values[3],
            options(nostack));
    }
}
