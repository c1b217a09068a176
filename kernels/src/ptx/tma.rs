//! Copies of tiles by the tensor memory accelerator. PTX ISA, "Tensor copy: cp.async.bulk.tensor". PTX 8.0, sm_90.

use core::arch::asm;

/// `cvta.param` — the generic address of the only parameter of the kernel `$kernel`: tensor maps are used where the launch
/// put them, without a copy.
macro_rules! parameter_address {
    ($kernel:expr) => {{
        let address: u64;
        // SAFETY: the address of a parameter, which is there as long as the kernel runs.
        unsafe {
            core::arch::asm!(concat!("mov.b64 {a}, ", $kernel, "_param_0; cvta.param.u64 {a}, {a};"),
                a = out(reg64) address, options(pure, nomem, nostack));
        }
        address
    }};
}
pub(crate) use parameter_address;

/// Where a tile starts in a `[batch, heads, seqlen, packed heads, head_dim]` tensor; of packed heads it takes all.
#[derive(Clone, Copy)]
pub struct Corner {
    /// Batch entry.
    pub batch: u32,
    /// Head.
    pub head: u32,
    /// Position in the sequence.
    pub row: u32,
    /// Element of the head.
    pub column: u32,
}

/// `cp.async.bulk.tensor.5d.shared::cluster.global` — starts to copy the box of `map` at `corner`; its bytes are counted
/// by `barrier`, those of elements that do not exist too, which become zeros.
///
/// # Safety
/// `map` is the generic address of a tensor map over readable memory. `dst` is an aligned shared-window address of room
/// for the box, which nobody touches until the barrier's phase has ended.
#[inline(always)]
pub unsafe fn load(dst: u32, map: u64, corner: Corner, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{d}], [{m}, {{{x}, 0, {y}, {z}, {w}}}], [{b}];",
            d = in(reg32) dst, m = in(reg64) map, x = in(reg32) corner.column, y = in(reg32) corner.row,
            z = in(reg32) corner.head, w = in(reg32) corner.batch, b = in(reg32) barrier, options(nostack));
    }
}

/// `cp.async.bulk.tensor.5d.global.shared::cta` — starts to copy the box at `corner` back; elements that do not exist are
/// dropped.
///
/// # Safety
/// As [`load`], over writable memory. What `src` holds was made visible by [`fence_async`], and stays until [`wait_read`].
#[inline(always)]
pub unsafe fn store(map: u64, corner: Corner, src: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [{m}, {{{x}, 0, {y}, {z}, {w}}}], [{s}];",
            m = in(reg64) map, x = in(reg32) corner.column, y = in(reg32) corner.row, z = in(reg32) corner.head,
            w = in(reg32) corner.batch, s = in(reg32) src, options(nostack));
    }
}

/// `cp.async.bulk.shared::cluster.global` — starts to copy `bytes` bytes, a multiple of 16, that `barrier` counts.
///
/// # Safety
/// `source` is readable, `dst` a shared-window address of room that nobody touches until the barrier's phase has ended;
/// both are 16-byte aligned.
#[inline(always)]
pub unsafe fn load_run(dst: u32, source: u64, bytes: u32, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], [{s}], {n}, [{b}];",
            d = in(reg32) dst, s = in(reg64) source, n = in(reg32) bytes, b = in(reg32) barrier, options(nostack));
    }
}

/// `cp.reduce.async.bulk.global.shared::cta…add.f32` — starts to add `bytes` bytes of f32, a multiple of 16, to `target`.
///
/// # Safety
/// As [`store`], with `target` writable; both addresses are 16-byte aligned. Others touch `target` only in this way.
#[inline(always)]
pub unsafe fn add_run(target: u64, src: u32, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{t}], [{s}], {n};", t = in(reg64) target,
            s = in(reg32) src, n = in(reg32) bytes, options(nostack));
    }
}

/// `cp.async.bulk.commit_group` — closes the current group of this thread's stores.
#[inline(always)]
fn commit() {
    // SAFETY: concerns this thread's own copies.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

/// `cp.async.bulk.wait_group 0` — waits until what this thread stored and committed is in memory, for it to see.
#[inline(always)]
pub fn wait_written() {
    // SAFETY: as for `commit`.
    unsafe { asm!("cp.async.bulk.wait_group 0;", options(nostack)) }
}

/// `cp.async.bulk.commit_group` and `wait_group.read 0` — waits until this thread's stores have read what they store.
#[inline(always)]
pub fn wait_read() {
    commit();
    // SAFETY: as for `commit`.
    unsafe { asm!("cp.async.bulk.wait_group.read 0;", options(nostack)) }
}

/// `fence.proxy.async.global` — copies that this thread starts from here on come after what it has seen of device memory.
#[inline(always)]
pub fn fence_async_global() {
    // SAFETY: orders this thread's accesses.
    unsafe { asm!("fence.proxy.async.global;", options(nostack)) }
}

/// `fence.proxy.async` — what this thread wrote to shared memory is visible to copies and products that follow.
#[inline(always)]
pub fn fence_async() {
    // SAFETY: orders this thread's writes.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}
