//! Products of e4m3 codes: m64nNk32, both operands with rows along k.

use core::arch::asm;

/// Accumulators of m64nNk32 as a lane holds them, as those of [`WarpgroupMma`](super::WarpgroupMma).
pub trait CodeMma: Sized {
    /// `wgmma.mma_async …, [a], [b]`: starts a new sum, A B^T of two tiles whose rows run along k.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`](super::WarpgroupMma::product).
    unsafe fn product(a: u64, b: u64) -> Self;

    /// `wgmma.mma_async …, [a], [b]`: adds A B^T of two tiles whose rows run along k.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_product(&mut self, a: u64, b: u64);

    /// `wgmma.mma_async …, {a…}, [b]`: adds A B^T, with A in registers and B a tile whose rows run along k.
    ///
    /// Lane l holds columns `l % 4 * 4 ..+ 4` of rows `l / 4` and `l / 4 + 8` of its warp, then the same columns from 16 on.
    ///
    /// # Safety
    /// The contract of [`product`](Self::product).
    unsafe fn add_registers(&mut self, a: [u32; 4], b: u64);
}

macro_rules! e4m3 {
    ($columns:literal: $($j:literal)*) => {
        impl CodeMma for [[f32; 4]; $columns / 8] {
            #[inline(always)]
            unsafe fn product(a: u64, b: u64) -> Self {
                let mut d = [[0.0; 4]; $columns / 8];
                // SAFETY: the caller's contract. The old sum is not read, because the predicate is false.
                unsafe {
                    asm!(concat!("{{ .reg .pred add; setp.ne.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                        "k32.f32.e4m3.e4m3 {{{}, {}, {}, {}", $(four!($j)),*, "}}, {a}, {b}, add, 1, 1; }}"),
                        out(reg32) d[0][0], out(reg32) d[0][1], out(reg32) d[0][2], out(reg32) d[0][3],
                        $(out(reg32) d[$j][0], out(reg32) d[$j][1], out(reg32) d[$j][2], out(reg32) d[$j][3],)*
                        a = in(reg64) a, b = in(reg64) b, options(nostack));
                }
                d
            }

            #[inline(always)]
            unsafe fn add_product(&mut self, a: u64, b: u64) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                        "k32.f32.e4m3.e4m3 {{{}, {}, {}, {}", $(four!($j)),*, "}}, {a}, {b}, add, 1, 1; }}"),
                        inout(reg32) self[0][0], inout(reg32) self[0][1], inout(reg32) self[0][2], inout(reg32) self[0][3],
                        $(inout(reg32) self[$j][0], inout(reg32) self[$j][1], inout(reg32) self[$j][2],
                          inout(reg32) self[$j][3],)*
                        a = in(reg64) a, b = in(reg64) b, options(nostack));
                }
            }

            #[inline(always)]
            unsafe fn add_registers(&mut self, a: [u32; 4], b: u64) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n", $columns,
                        "k32.f32.e4m3.e4m3 {{{}, {}, {}, {}", $(four!($j)),*,
                        "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, add, 1, 1; }}"),
                        inout(reg32) self[0][0], inout(reg32) self[0][1], inout(reg32) self[0][2], inout(reg32) self[0][3],
                        $(inout(reg32) self[$j][0], inout(reg32) self[$j][1], inout(reg32) self[$j][2],
                          inout(reg32) self[$j][3],)*
                        a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                        b = in(reg64) b, options(nostack));
                }
            }
        }
    };
}

e4m3!(64: 1 2 3 4 5 6 7);
e4m3!(96: 1 2 3 4 5 6 7 8 9 10 11);
e4m3!(128: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
e4m3!(192: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23);
e4m3!(256: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
