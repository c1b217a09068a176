//! Tensor cores of a warpgroup: four warps multiply together, while they do other work. PTX ISA, "Asynchronous
//! Warpgroup Level Matrix Multiply-Accumulate Instructions". PTX 8.0, sm_90a.
//!
//! A product is issued, committed to a group and awaited. Until then its accumulators belong to the tensor cores. The
//! compiler does not know that, so [`WarpgroupMma::pin`] keeps reads of them after the wait.

use crate::element::{Bf16, F16};
use core::arch::asm;
pub use e4m3::CodeMma;

/// Accumulators of m64nNk16 as a lane holds them: four for each 8 columns, as in m16n8.
pub trait WarpgroupMma<T>: Sized {
    /// `wgmma.mma_async …, [a], [b]`: starts a new sum, A B^T of two tiles whose rows run along k.
    ///
    /// # Safety
    /// `a` and `b` describe initialised shared memory, visible to the async proxy and unchanged until the group was
    /// awaited. The whole warpgroup executes it, after [`fence`].
    unsafe fn product(a: u64, b: u64) -> Self;

    /// `wgmma.mma_async …, [a], [b]`: adds A B^T of two tiles whose rows run along k.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_product(&mut self, a: u64, b: u64);

    /// `wgmma.mma_async …, {a…}, [b]`: adds A B, with A in registers (laid out as in m16n8k16) and B a tile whose
    /// rows run along n.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_registers(&mut self, a: [u32; 4], b: u64);

    /// `wgmma.mma_async …, [a], [b]`, both transposed: starts a new sum, A^T B of two tiles whose rows run along m
    /// and n.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn product_down(a: u64, b: u64) -> Self;

    /// `wgmma.mma_async …, [a], [b]`, both transposed: adds A^T B of two tiles whose rows run along m and n.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_product_down(&mut self, a: u64, b: u64);

    /// `wgmma.mma_async …, [a], [b]`, the second transposed: starts a new sum, A B of a tile whose rows run along k and one
    /// whose rows run along n.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn product_across(a: u64, b: u64) -> Self;

    /// `wgmma.mma_async …, [a], [b]`, the second transposed: adds A B of a tile whose rows run along k and one whose rows
    /// run along n.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_product_across(&mut self, a: u64, b: u64);

    /// Starts a new sum like [`product_across`](Self::product_across), in the registers of an earlier one: what reads the earlier
    /// sum comes before.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn restart_across(&mut self, a: u64, b: u64, add: u32);

    /// Emits no instruction. Later code uses the values as they are here: after a [`wait`], their final values.
    fn pin(&mut self);
}

/// Placeholders for the accumulators of 8 more columns.
macro_rules! four {
    ($j:literal) => {
        ", {}, {}, {}, {}"
    };
}

mod e4m3;

macro_rules! wgmma {
    ($columns:literal: $($j:literal)*) => {
        wgmma!(F16 "f16" $columns: $($j)*);
        wgmma!(Bf16 "bf16" $columns: $($j)*);
    };
    // Both operands in shared memory. `$transposed` tells for each if its rows run along m or n instead of k.
    (shared $new:ident, $add:ident: $name:literal $columns:literal $transposed:literal; $($j:literal)*) => {
        #[inline(always)]
        unsafe fn $new(a: u64, b: u64) -> Self {
            let mut d = [[0.0; 4]; $columns / 8];
            // SAFETY: the caller's contract. The old sum is not read, because the predicate is false.
            unsafe {
                asm!(concat!("{{ .reg .pred add; setp.ne.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                    "k16.f32.", $name, ".", $name, " {{{}, {}, {}, {}", $(four!($j)),*, "}}, {a}, {b}, add, 1, 1, ", $transposed, "; }}"),
                    out(reg32) d[0][0], out(reg32) d[0][1], out(reg32) d[0][2], out(reg32) d[0][3],
                    $(out(reg32) d[$j][0], out(reg32) d[$j][1], out(reg32) d[$j][2], out(reg32) d[$j][3],)*
                    a = in(reg64) a, b = in(reg64) b, options(nostack));
            }
            d
        }

        #[inline(always)]
        unsafe fn $add(&mut self, a: u64, b: u64) {
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                    "k16.f32.", $name, ".", $name, " {{{}, {}, {}, {}", $(four!($j)),*, "}}, {a}, {b}, add, 1, 1, ", $transposed, "; }}"),
                    inout(reg32) self[0][0], inout(reg32) self[0][1], inout(reg32) self[0][2], inout(reg32) self[0][3],
                    $(inout(reg32) self[$j][0], inout(reg32) self[$j][1], inout(reg32) self[$j][2],
                      inout(reg32) self[$j][3],)*
                    a = in(reg64) a, b = in(reg64) b, options(nostack));
            }
        }
    };
    ($type:ident $name:literal $columns:literal: $($j:literal)*) => {
        impl WarpgroupMma<$type> for [[f32; 4]; $columns / 8] {
            wgmma!(shared product, add_product: $name $columns "0, 0"; $($j)*);
            wgmma!(shared product_down, add_product_down: $name $columns "1, 1"; $($j)*);
            wgmma!(shared product_across, add_product_across: $name $columns "0, 1"; $($j)*);

            #[inline(always)]
            unsafe fn restart_across(&mut self, a: u64, b: u64, add: u32) {
                // SAFETY: the caller's contract. ptxas does not see that the predicate is false.
                unsafe {
                    asm!(concat!("{{ .reg .pred add; setp.ne.u32 add, {zero}, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                        "k16.f32.", $name, ".", $name, " {{{}, {}, {}, {}", $(four!($j)),*, "}}, {a}, {b}, add, 1, 1, 0, 1; }}"),
                        inout(reg32) self[0][0], inout(reg32) self[0][1], inout(reg32) self[0][2], inout(reg32) self[0][3],
                        $(inout(reg32) self[$j][0], inout(reg32) self[$j][1], inout(reg32) self[$j][2],
                          inout(reg32) self[$j][3],)*
                        a = in(reg64) a, b = in(reg64) b, zero = in(reg32) add, options(nostack));
                }
            }

            #[inline(always)]
            unsafe fn add_registers(&mut self, a: [u32; 4], b: u64) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                        "k16.f32.", $name, ".", $name, " {{{}, {}, {}, {}", $(four!($j)),*,
                        "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, add, 1, 1, 1; }}"),
                        inout(reg32) self[0][0], inout(reg32) self[0][1], inout(reg32) self[0][2], inout(reg32) self[0][3],
                        $(inout(reg32) self[$j][0], inout(reg32) self[$j][1], inout(reg32) self[$j][2],
                          inout(reg32) self[$j][3],)*
                        a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                        b = in(reg64) b, options(nostack));
                }
            }

            #[inline(always)]
            fn pin(&mut self) {
                for j in 0..$columns / 8 {
                    let [a, b, c, d] = &mut self[j];
                    // SAFETY: the assembly is a comment.
                    unsafe {
                        asm!("// {} {} {} {}", inout(reg32) *a, inout(reg32) *b, inout(reg32) *c, inout(reg32) *d,
                            options(nomem, nostack));
                    }
                }
            }
        }
    };
}

wgmma!(32: 1 2 3);
wgmma!(40: 1 2 3 4);
wgmma!(48: 1 2 3 4 5);
wgmma!(64: 1 2 3 4 5 6 7);
wgmma!(80: 1 2 3 4 5 6 7 8 9);
wgmma!(96: 1 2 3 4 5 6 7 8 9 10 11);
wgmma!(112: 1 2 3 4 5 6 7 8 9 10 11 12 13);
wgmma!(128: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
wgmma!(160: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19);
wgmma!(176: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21);
wgmma!(192: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23);
wgmma!(256: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// Pins two words of a left operand, like [`WarpgroupMma::pin`].
#[inline(always)]
pub fn pin_words([a, b]: &mut [u32; 2]) {
    // SAFETY: the assembly is a comment.
    unsafe { asm!("// {} {}", inout(reg32) * a, inout(reg32) * b, options(nomem, nostack)) }
}

/// `wgmma.fence` — makes the content of the warpgroup's registers available to later products.
#[inline(always)]
pub fn fence() {
    // SAFETY: orders registers; the kernels call it where control is uniform over the warpgroup.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

/// `wgmma.commit_group` — commits the products so far to a group.
#[inline(always)]
pub fn commit() {
    // SAFETY: orders registers; the kernels call it where control is uniform over the warpgroup.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// `wgmma.wait_group PENDING` — waits until at most the newest `PENDING` groups are in flight.
#[inline(always)]
pub fn wait<const PENDING: u32>() {
    // SAFETY: orders registers; the kernels call it where control is uniform over the warpgroup.
    unsafe { asm!("wgmma.wait_group.sync.aligned {n};", n = const PENDING, options(nostack)) }
}

/// `setmaxnreg.dec` — returns registers to the block's pool: a producer thread needs few.
///
/// # Safety
/// Called once, where control is uniform over the warpgroup.
macro_rules! shrink_registers {
    ($registers:expr) => {
        core::arch::asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const $registers, options(nostack))
    };
}
pub(crate) use shrink_registers;

/// `setmaxnreg.inc` — takes registers from the block's pool and waits for them: a consumer thread needs many.
///
/// # Safety
/// The contract of `shrink_registers`; all threads together have at most the registers of the launch (asserted in
/// `shape`).
macro_rules! grow_registers {
    ($registers:expr) => {
        core::arch::asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const $registers, options(nostack))
    };
}
pub(crate) use grow_registers;
