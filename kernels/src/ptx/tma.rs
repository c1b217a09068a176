//! Tile copies by the tensor memory accelerator. PTX ISA, "Tensor copy: cp.async.bulk.tensor". PTX 8.0, sm_90.

use core::arch::asm;

/// `cvta.param` — returns the generic address of the only parameter of the kernel `$kernel`. Tensor maps are used in
/// place, where the launch put them.
macro_rules! parameter_address {
    ($kernel:expr) => {{
        let address: u64;
        // SAFETY: takes the address of a parameter, which exists as long as the kernel runs.
        unsafe {
            core::arch::asm!(concat!("mov.b64 {a}, ", $kernel, "_param_0; cvta.param.u64 {a}, {a};"),
                a = out(reg64) address, options(pure, nomem, nostack));
        }
        address
    }};
}
pub(crate) use parameter_address;

/// Start of a tile in a `[batch, heads, seqlen, packed heads, head_dim]` tensor; the tile includes all packed heads.
#[derive(Clone, Copy)]
pub struct Corner {
    /// Index of the batch entry.
    pub batch: u32,
    /// Index of the head.
    pub head: u32,
    /// Position in the sequence.
    pub row: u32,
    /// First element of the head.
    pub column: u32,
}

/// `cp.async.bulk.tensor.5d.shared::cluster.global` — starts to copy the box of `map` at `corner`. `barrier` counts
/// its bytes, including those of elements outside of the tensor, which are filled with zeros.
///
/// # Safety
/// `map` is the generic address of a tensor map over readable memory. `dst` is an aligned shared-window address with
/// room for the box, which no thread accesses until the barrier's phase has ended.
#[inline(always)]
pub unsafe fn load(dst: u32, map: u64, corner: Corner, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{d}], [{m}, {{{x}, 0, {y}, {z}, {w}}}], [{b}];",
            d = in(reg32) dst, m = in(reg64) map, x = in(reg32) corner.column, y = in(reg32) corner.row,
            z = in(reg32) corner.head, w = in(reg32) corner.batch, b = in(reg32) barrier, options(nostack));
    }
}

/// `cp.async.bulk.tensor.5d.shared::cluster.global.multicast::cluster` — [loads](load) into every block of the cluster
/// whose bit is set in `blocks`, at the place that `dst` has in this one. The barrier at the place of `barrier` in each of
/// these blocks counts the bytes that the block receives.
///
/// # Safety
/// The contract of [`load`], for each of the blocks. They have started, and none ends before its barrier's phase.
#[inline(always)]
pub unsafe fn load_into_blocks(dst: u32, map: u64, corner: Corner, barrier: u32, blocks: u16) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [{d}], [{m}, {{{x}, 0, {y}, {z}, {w}}}], [{b}], {n};",
            d = in(reg32) dst, m = in(reg64) map, x = in(reg32) corner.column, y = in(reg32) corner.row,
            z = in(reg32) corner.head, w = in(reg32) corner.batch, b = in(reg32) barrier, n = in(reg16) blocks,
            options(nostack));
    }
}

/// `cp.async.bulk.tensor.5d.global.shared::cta` — starts to copy the box at `corner` back; elements outside of the
/// tensor are dropped.
///
/// # Safety
/// The contract of [`load`], over writable memory. [`fence_async`] made the content of `src` visible, and it stays
/// unchanged until [`wait_read`].
#[inline(always)]
pub unsafe fn store(map: u64, corner: Corner, src: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [{m}, {{{x}, 0, {y}, {z}, {w}}}], [{s}];",
            m = in(reg64) map, x = in(reg32) corner.column, y = in(reg32) corner.row, z = in(reg32) corner.head,
            w = in(reg32) corner.batch, s = in(reg32) src, options(nostack));
    }
}

/// `cp.async.bulk.shared::cluster.global` — starts to copy `bytes` bytes, a multiple of 16, which `barrier` counts.
///
/// # Safety
/// `source` is readable. `dst` is a shared-window address with room that no thread accesses until the barrier's phase
/// has ended. Both are 16-byte aligned.
#[inline(always)]
pub unsafe fn load_run(dst: u32, source: u64, bytes: u32, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], [{s}], {n}, [{b}];",
            d = in(reg32) dst, s = in(reg64) source, n = in(reg32) bytes, b = in(reg32) barrier, options(nostack));
    }
}

/// `cp.reduce.async.bulk.global.shared::cta…add.f32` — starts to add `bytes` bytes of f32, a multiple of 16, to
/// `target`.
///
/// # Safety
/// The contract of [`store`], with `target` writable; both addresses are 16-byte aligned. Other threads access
/// `target` only by this function.
#[inline(always)]
pub unsafe fn add_run(target: u64, src: u32, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{t}], [{s}], {n};", t = in(reg64) target,
            s = in(reg32) src, n = in(reg32) bytes, options(nostack));
    }
}

/// `cp.async.bulk.commit_group` — commits this thread's stores so far to a group.
#[inline(always)]
fn commit() {
    // SAFETY: affects only this thread's copies.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

/// `cp.async.bulk.wait_group 0` — waits until this thread's committed stores are written and visible to it.
#[inline(always)]
pub fn wait_written() {
    // SAFETY: affects only this thread's copies.
    unsafe { asm!("cp.async.bulk.wait_group 0;", options(nostack)) }
}

/// `cp.async.bulk.commit_group` and `wait_group.read 0` — waits until this thread's stores have read their sources.
#[inline(always)]
pub fn wait_read() {
    commit();
    // SAFETY: affects only this thread's copies.
    unsafe { asm!("cp.async.bulk.wait_group.read 0;", options(nostack)) }
}

/// `fence.proxy.async.global` — orders this thread's later copies after its earlier accesses to device memory.
#[inline(always)]
pub fn fence_async_global() {
    // SAFETY: orders this thread's accesses.
    unsafe { asm!("fence.proxy.async.global;", options(nostack)) }
}

/// `fence.proxy.async` — makes this thread's writes to shared memory visible to later copies and products.
#[inline(always)]
pub fn fence_async() {
    // SAFETY: orders this thread's writes.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}
