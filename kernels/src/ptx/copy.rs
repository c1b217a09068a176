//! Asynchronous copies from global to shared memory. PTX ISA, "Data Movement: Asynchronous copy".

use core::arch::asm;

/// `cp.async.cg.shared.global [dst], [src], 16, size;` — starts to copy 16 bytes if `a < a_end` and `b < b_end`; else nothing is read
/// and zeros are written. PTX 7.0, sm_80.
///
/// The comparisons are instructions of their own: of a selected size the compiler would make five for each copy, and of these ptxas
/// makes one, into the copy's own predicate, and one for all copies with the same `a` and `a_end`.
///
/// # Safety
/// - `dst` is a 16-byte aligned shared-window address of this block. No thread reads or writes it until the copy's
///   group was awaited and a barrier passed.
/// - If both hold, `src .. src + 16` is readable global memory, and `src` is 16-byte aligned.
#[inline(always)]
pub unsafe fn cp_async_16(dst: u32, src: u64, [a, a_end]: [i32; 2], [b, b_end]: [i32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{ .reg .pred inside, exists; .reg .b32 size; setp.lt.s32 inside, {a}, {a_end}; setp.lt.s32 exists, {b}, {b_end};",
            "and.pred exists, exists, inside; selp.b32 size, 16, 0, exists;",
            "cp.async.cg.shared.global [{d}], [{s}], 16, size; }}",
            d = in(reg32) dst, s = in(reg64) src, a = in(reg32) a, a_end = in(reg32) a_end, b = in(reg32) b,
            b_end = in(reg32) b_end, options(nostack));
    }
}

/// `cp.async.cg.shared.global [dst], [src], 16, bytes;` — starts to copy `bytes` (0 or 16) bytes and fills the rest of 16 with zeros.
/// PTX 7.0, sm_80.
///
/// # Safety
/// The contract of [`cp_async_16`]; `src .. src + bytes` is readable.
#[inline(always)]
pub unsafe fn cp_async_16_bytes(dst: u32, src: u64, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.cg.shared.global [{d}], [{s}], 16, {n};",
            d = in(reg32) dst, s = in(reg64) src, n = in(reg32) bytes, options(nostack));
    }
}

/// `cp.async.ca.shared.global [dst], [src], 4, bytes;` — starts to copy 4 (or 0) bytes and fills the rest of 4 with
/// zeros. PTX 7.0, sm_80.
///
/// # Safety
/// The contract of [`cp_async_16`], with 4-byte alignment; `src .. src + bytes` is readable.
#[inline(always)]
pub unsafe fn cp_async_4(dst: u32, src: u64, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.ca.shared.global [{d}], [{s}], 4, {n};",
            d = in(reg32) dst, s = in(reg64) src, n = in(reg32) bytes, options(nostack));
    }
}

/// `cp.async.commit_group;` — commits this thread's copies so far to a group. PTX 7.0, sm_80.
#[inline(always)]
pub fn cp_async_commit() {
    // SAFETY: orders this thread's copies and accesses no memory.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

/// `cp.async.wait_group PENDING;` — waits until at most the newest `PENDING` groups of this thread are in flight.
/// PTX 7.0, sm_80. Makes the copies visible to this thread only: others need a barrier too.
#[inline(always)]
pub fn cp_async_wait<const PENDING: u32>() {
    // SAFETY: waits; the default clobber keeps reads of the copied bytes after it.
    unsafe { asm!("cp.async.wait_group {n};", n = const PENDING, options(nostack)) }
}
