//! Asynchronous copies from global to shared memory. PTX ISA, "Data Movement: Asynchronous copy".

use core::arch::asm;

/// `cp.async.cg.shared.global [dst], [src], 16, bytes;` — starts to copy `bytes` (0 to 16) bytes and fills the rest
/// of 16 with zeros. PTX 7.0, sm_80.
///
/// # Safety
/// - `dst` is a 16-byte aligned shared-window address of this block. No thread reads or writes it until the copy's
///   group was awaited and a barrier passed.
/// - `src .. src + bytes` is readable global memory; `src` is 16-byte aligned.
#[inline(always)]
pub unsafe fn cp_async_16(dst: u32, src: u64, bytes: u32) {
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
/// The contract of [`cp_async_16`], with 4-byte alignment.
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
