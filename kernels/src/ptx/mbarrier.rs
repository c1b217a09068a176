//! mbarriers, which count arrivals and bytes. PTX ISA, "Parallel Synchronization and Communication Instructions:
//! mbarrier". PTX 8.0, sm_90.
//!
//! A barrier goes through phases. A waiter gives the parity of the phase whose end it waits for.

use core::arch::asm;

/// Bytes of an mbarrier.
pub const BYTES: u32 = 8;

/// `mbarrier.init` — each phase ends after `arrivals` arrivals and the announced bytes.
///
/// # Safety
/// `barrier` is an 8-byte aligned shared-window address that no thread uses yet.
#[inline(always)]
pub unsafe fn init(barrier: u32, arrivals: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{b}], {n};", b = in(reg32) barrier, n = in(reg32) arrivals, options(nostack))
    }
}

/// `fence.mbarrier_init` — makes the barriers that this thread initialised visible to asynchronous copies.
#[inline(always)]
pub fn fence_init() {
    // SAFETY: orders this thread's writes.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
}

/// `mbarrier.arrive` — one arrival; this thread's earlier writes are visible to every thread that waits for the
/// phase.
///
/// # Safety
/// `barrier` is initialised, and its phase expects this arrival.
#[inline(always)]
pub unsafe fn arrive(barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{b}];", b = in(reg32) barrier, options(nostack)) }
}

/// `mapa` and `mbarrier.arrive.shared::cluster` — one arrival at the barrier that has the place of `barrier` in the shared
/// memory of block `rank` of the cluster. This thread's earlier reads are over when it arrives. Its earlier writes need not
/// be visible to another block: `.release.cluster` would see to that, with a fence of the whole GPU.
///
/// # Safety
/// The contract of [`arrive`], for the barrier of that block, which has started and does not end before the arrival.
#[inline(always)]
pub unsafe fn arrive_in(barrier: u32, rank: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{ .reg .b32 there; mapa.shared::cluster.u32 there, {b}, {r}; mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
            b = in(reg32) barrier, r = in(reg32) rank, options(nostack));
    }
}

/// `mbarrier.arrive.expect_tx` — one arrival, and announces `bytes` that copies bring before the phase ends.
///
/// # Safety
/// The contract of [`arrive`]; the copies are issued.
#[inline(always)]
pub unsafe fn arrive_expecting(barrier: u32, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{b}], {n};", b = in(reg32) barrier, n = in(reg32) bytes,
            options(nostack));
    }
}

/// `mbarrier.try_wait.parity` — repeats until the phase of parity `parity` has ended. In a new barrier the phase of
/// parity 1 counts as ended.
///
/// # Safety
/// `barrier` is initialised.
#[inline(always)]
pub unsafe fn wait(barrier: u32, parity: u32) {
    loop {
        let ended: u32;
        // SAFETY: the caller's contract.
        unsafe {
            asm!("{{ .reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [{b}], {p}; selp.u32 {e}, 1, 0, ended; }}",
                e = out(reg32) ended, b = in(reg32) barrier, p = in(reg32) parity, options(nostack));
        }
        if ended != 0 {
            return;
        }
    }
}

/// `mbarrier.test_wait.parity` — whether the phase of parity `parity` has ended; does not wait.
///
/// # Safety
/// The contract of [`wait`].
#[inline(always)]
pub unsafe fn has_ended(barrier: u32, parity: u32) -> bool {
    let ended: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{ .reg .pred ended; mbarrier.test_wait.parity.shared::cta.b64 ended, [{b}], {p}; selp.u32 {e}, 1, 0, ended; }}",
            e = out(reg32) ended, b = in(reg32) barrier, p = in(reg32) parity, options(nostack));
    }
    ended != 0
}
