//! Barriers and shuffles. PTX ISA, "Parallel Synchronization and Communication Instructions".

use core::arch::asm;

/// `bar.sync 0;` — every thread of the block arrives, and sees the earlier writes of the others.
#[inline(always)]
pub fn sync_threads() {
    // SAFETY: the kernels call it where control is uniform over the block.
    unsafe { asm!("bar.sync 0;", options(nostack)) }
}

/// `barrier.cluster.arrive; barrier.cluster.wait;` — every thread of the cluster's blocks arrives, and sees the earlier
/// writes of the others, also to the shared memory of other blocks. PTX 8.0, sm_90.
#[inline(always)]
pub fn sync_cluster() {
    // SAFETY: the kernels call it where control is uniform over the cluster; lanes of a warp may come one after another.
    unsafe {
        asm!(
            "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
            options(nostack)
        )
    }
}

/// `bar.sync barrier, threads;` — `threads` threads, including this one, arrive at named barrier `barrier` (1 to 15)
/// and see the earlier writes of the others.
///
/// # Safety
/// Whole warps call it, and all threads that use the barrier give the same count. Barrier 0 belongs to
/// [`sync_threads`].
#[inline(always)]
pub unsafe fn named_barrier_sync(barrier: u32, threads: u32) {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.sync {b}, {n};", b = in(reg32) barrier, n = in(reg32) threads, options(nostack)) }
}

/// `bar.red.or.pred` on barrier 0 — every thread of the block arrives, sees the earlier writes of the others, and
/// gets true if `predicate` holds for any.
#[inline(always)]
pub fn sync_threads_or(predicate: bool) -> bool {
    let result: u32;
    // SAFETY: the kernels call it where control is uniform over the block.
    unsafe {
        asm!("{{ .reg .pred one, any; setp.ne.u32 one, {p}, 0; bar.red.or.pred any, 0, one; selp.u32 {r}, 1, 0, any; }}",
            r = out(reg32) result, p = in(reg32) predicate as u32, options(nostack));
    }
    result != 0
}

/// `bar.red.or.pred` on named barrier `barrier` — waits like [`named_barrier_sync`]; true if `predicate` holds for
/// any thread.
///
/// # Safety
/// The contract of [`named_barrier_sync`].
#[inline(always)]
pub unsafe fn named_barrier_or(barrier: u32, threads: u32, predicate: bool) -> bool {
    let result: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{ .reg .pred one, any; setp.ne.u32 one, {p}, 0; bar.red.or.pred any, {b}, {n}, one; selp.u32 {r}, 1, 0, any; }}",
            r = out(reg32) result, p = in(reg32) predicate as u32, b = in(reg32) barrier, n = in(reg32) threads,
            options(nostack));
    }
    result != 0
}

/// `bar.arrive barrier, threads;` — arrives like [`named_barrier_sync`], without waiting.
///
/// # Safety
/// The contract of [`named_barrier_sync`].
#[inline(always)]
pub unsafe fn named_barrier_arrive(barrier: u32, threads: u32) {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.arrive {b}, {n};", b = in(reg32) barrier, n = in(reg32) threads, options(nostack)) }
}

/// `bar.warp.sync -1;` — every lane of the warp arrives, and sees the earlier writes of the others.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: the kernels call it where control is uniform over the warp.
    unsafe { asm!("bar.warp.sync -1;", options(nostack)) }
}

/// `ld.acquire.gpu` — waits until the word at `address` is `value`; earlier writes of the threads that
/// [signalled](signal) are then visible.
///
/// # Safety
/// `address` is a readable, 4-byte aligned word of device memory that only [`signal`] writes meanwhile.
#[inline(always)]
pub unsafe fn wait_for(address: u64, value: u32) {
    loop {
        let now: u32;
        // SAFETY: the caller's contract.
        unsafe {
            asm!("ld.acquire.gpu.global.u32 {n}, [{p}];", n = out(reg32) now, p = in(reg64) address, options(nostack));
        }
        if now == value {
            return;
        }
    }
}

/// `red.release.gpu.add` — adds 1 to a word; this thread's earlier writes are visible to threads that
/// [wait](wait_for) for it.
///
/// # Safety
/// `address` is a writable, 4-byte aligned word of device memory.
#[inline(always)]
pub unsafe fn signal(address: u64) {
    // SAFETY: the caller's contract.
    unsafe { asm!("red.release.gpu.global.add.u32 [{p}], 1;", p = in(reg64) address, options(nostack)) }
}

/// `vote.sync.any.pred` — true if `predicate` holds in any lane of the warp, which executes it together.
#[inline(always)]
pub fn any(predicate: bool) -> bool {
    let result: u32;
    // SAFETY: the kernels call it where control is uniform over the warp.
    unsafe {
        asm!("{{ .reg .pred one, any; setp.ne.u32 one, {p}, 0; vote.sync.any.pred any, one, -1; selp.u32 {r}, 1, 0, any; }}",
            r = out(reg32) result, p = in(reg32) predicate as u32, options(nomem, nostack));
    }
    result != 0
}

/// `shfl.sync.bfly.b32` — returns the value of lane `lane_id ^ mask`.
#[inline(always)]
pub fn shuffle_xor(value: f32, mask: u32) -> f32 {
    let result;
    // SAFETY: the kernels call it where control is uniform over the warp.
    unsafe {
        asm!("shfl.sync.bfly.b32 {r}, {v}, {m}, 31, -1;", r = out(reg32) result, v = in(reg32) value,
            m = in(reg32) mask, options(nomem, nostack));
    }
    result
}

/// `shfl.sync.idx.b32` — returns the value of lane `lane`.
#[inline(always)]
pub fn shuffle(value: f32, lane: u32) -> f32 {
    let result;
    // SAFETY: the kernels call it where control is uniform over the warp.
    unsafe {
        asm!("shfl.sync.idx.b32 {r}, {v}, {l}, 31, -1;", r = out(reg32) result, v = in(reg32) value,
            l = in(reg32) lane, options(nomem, nostack));
    }
    result
}

/// `shfl.sync.idx.b32` — returns the value of lane 0, which ptxas then knows to be uniform in the warp.
#[inline(always)]
pub fn uniform(value: u32) -> u32 {
    let result;
    // SAFETY: the kernels call it where control is uniform over the warp.
    unsafe {
        asm!("shfl.sync.idx.b32 {r}, {v}, 0, 31, -1;", r = out(reg32) result, v = in(reg32) value,
            options(nomem, nostack));
    }
    result
}
