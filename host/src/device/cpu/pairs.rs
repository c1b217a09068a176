//! Products of bf16 that processors have instructions for: AVX512-BF16, and the tiles of AMX.
//!
//! Both multiply pairs: a word holds two neighbours along the inner axis. Sums are f32.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::kernels::{PairProduct, Pairs, SIDE};

pub(super) static AVX512_BF16: Pairs = Pairs {
    begin: nothing,
    end: nothing,
    product: registers,
};

pub(super) static AMX: Pairs = Pairs {
    begin: configure,
    end: release,
    product: tiles,
};

unsafe fn nothing() {}

/// Whether the processor has AVX512-BF16.
pub(super) fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Whether AVX512-BF16 is faster than widening to f32: it is on AMD's processors, where it does twice the work of an FMA in
/// the same time. Measured on Sapphire Rapids, it takes nearly four times as long.
pub(super) fn prefers_avx512_bf16() -> bool {
    let vendor = __cpuid(0);
    has_avx512_bf16() && (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

/// Whether the processor has AMX for bf16, and the system lets this process use it.
pub(super) fn has_amx() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
        if __cpuid(0).eax < 7 || !is_x86_feature_detected!("avx512f") {
            return false;
        }
        __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE && ask_for_tiles()
    })
}

/// Linux keeps the state of tiles only for processes that have asked for it.
#[cfg(target_os = "linux")]
fn ask_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn ask_for_tiles() -> bool {
    false
}

/// [`PairProduct`] with AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn registers(p: &PairProduct) {
    for row in (0..p.rows).step_by(8) {
        // SAFETY: passed on to the caller.
        unsafe {
            if p.columns == SIDE {
                register_block::<1>(p, row);
            } else {
                register_block::<2>(p, row);
            }
        }
    }
}

/// Eight rows by `N` registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn register_block<const N: usize>(p: &PairProduct, row: usize) {
    // SAFETY: passed on to the caller; vectors of 64 bytes may hold either type.
    unsafe {
        let (a, c) = (p.a.add(row * p.a_stride), p.c.add(row * p.c_stride));
        let mut sums = [[_mm512_setzero_ps(); N]; 8];
        if p.accumulate {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(m * p.c_stride + n * SIDE));
                }
            }
        }
        for i in 0..p.inner {
            let mut b = [_mm512_setzero_si512(); N];
            for (n, b) in b.iter_mut().enumerate() {
                *b = _mm512_loadu_si512(p.b.add(i * p.b_stride + n * SIDE).cast());
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let factor = _mm512_set1_epi32(*a.add(m * p.a_stride + i) as i32);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbf16_ps(
                        *sum,
                        std::mem::transmute::<__m512i, __m512bh>(factor),
                        std::mem::transmute::<__m512i, __m512bh>(b),
                    );
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(m * p.c_stride + n * SIDE), *sum);
            }
        }
    }
}

/// Eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfiguration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

unsafe fn configure() {
    static CONFIGURATION: TileConfiguration = TileConfiguration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    // SAFETY: reads 64 bytes; the processor has tiles, says the caller.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly)) };
}

unsafe fn release() {
    // SAFETY: the processor has tiles, says the caller.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// [`PairProduct`] with AMX.
unsafe fn tiles(p: &PairProduct) {
    let mut row = 0;
    while row < p.rows {
        // SAFETY: passed on to the caller.
        unsafe {
            if p.columns == 2 * SIDE && row + 2 * SIDE <= p.rows {
                four_tiles(p, row);
                row += 2 * SIDE;
            } else {
                (0..p.columns).step_by(SIDE).for_each(|column| one_tile(p, row, column));
                row += SIDE;
            }
        }
    }
}

/// Two by two tiles of c: each tile of a and of b that is loaded serves two products.
#[inline]
unsafe fn four_tiles(p: &PairProduct, row: usize) {
    // SAFETY: tiles are configured as sixteen rows of 64 bytes, and the addresses are those of sixteen such rows within
    // a, b and c, says the caller. Tile registers are used nowhere else.
    unsafe {
        let (c, c_bytes) = (p.c.add(row * p.c_stride), 4 * p.c_stride);
        let c_below = c.add(SIDE * p.c_stride);
        if p.accumulate {
            asm!(
                "tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 64]",
                "tileloadd tmm2, [{d} + {s}]", "tileloadd tmm3, [{d} + {s} + 64]",
                c = in(reg) c, d = in(reg) c_below, s = in(reg) c_bytes, options(nostack, readonly)
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem)
            );
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {a_bytes}]",
            "tileloadd tmm6, [{b} + {b_bytes}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {b_bytes} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a_below} + {a_bytes}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {a_below}, 64",
            "add {b}, {b_step}",
            "dec {count}",
            "jnz 2b",
            a = inout(reg) p.a.add(row * p.a_stride) => _,
            a_below = inout(reg) p.a.add((row + SIDE) * p.a_stride) => _,
            a_bytes = in(reg) 4 * p.a_stride,
            b = inout(reg) p.b => _,
            b_bytes = in(reg) 4 * p.b_stride,
            b_step = in(reg) 4 * SIDE * p.b_stride,
            count = inout(reg) p.inner / SIDE => _,
            options(nostack, readonly)
        );
        asm!(
            "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
            "tilestored [{d} + {s}], tmm2", "tilestored [{d} + {s} + 64], tmm3",
            c = in(reg) c, d = in(reg) c_below, s = in(reg) c_bytes, options(nostack)
        );
    }
}

/// One tile of c.
#[inline]
unsafe fn one_tile(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: as for `four_tiles`.
    unsafe {
        let (c, c_bytes) = (p.c.add(row * p.c_stride + column), 4 * p.c_stride);
        if p.accumulate {
            asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c, s = in(reg) c_bytes, options(nostack, readonly));
        } else {
            asm!("tilezero tmm0", options(nostack, nomem));
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {a_bytes}]",
            "tileloadd tmm6, [{b} + {b_bytes}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "add {a}, 64",
            "add {b}, {b_step}",
            "dec {count}",
            "jnz 2b",
            a = inout(reg) p.a.add(row * p.a_stride) => _,
            a_bytes = in(reg) 4 * p.a_stride,
            b = inout(reg) p.b.add(column) => _,
            b_bytes = in(reg) 4 * p.b_stride,
            b_step = in(reg) 4 * SIDE * p.b_stride,
            count = inout(reg) p.inner / SIDE => _,
            options(nostack, readonly)
        );
        asm!("tilestored [{c} + {s}], tmm0", c = in(reg) c, s = in(reg) c_bytes, options(nostack));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_pairs_are_those_of_their_definition() {
        let mut kinds = Vec::new();
        if has_avx512_bf16() {
            kinds.push(("AVX512-BF16", AVX512_BF16));
        }
        if has_amx() {
            kinds.push(("AMX", AMX));
        }
        for (name, pairs) in kinds {
            println!("{name}");
            for (rows, inner, columns) in [(16, 16, 16), (32, 32, 32), (48, 16, 32), (64, 64, 16)] {
                // Small whole numbers, so that every sum is exact.
                let value = |i: usize| half::bf16::from_f32((i * 7 % 11) as f32 - 5.0);
                let word = |i: usize| u32::from(value(2 * i).to_bits()) | u32::from(value(2 * i + 1).to_bits()) << 16;
                let a: Vec<u32> = (0..rows * inner).map(word).collect();
                let b: Vec<u32> = (0..inner * columns).map(|i| word(3 * i)).collect();
                for accumulate in [false, true] {
                    let mut c: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
                    // SAFETY: the processor has the instructions, and the matrices are of these sizes.
                    unsafe {
                        (pairs.begin)();
                        (pairs.product)(&PairProduct {
                            rows,
                            inner,
                            columns,
                            a: a.as_ptr(),
                            a_stride: inner,
                            b: b.as_ptr(),
                            b_stride: columns,
                            c: c.as_mut_ptr(),
                            c_stride: columns,
                            accumulate,
                        });
                        (pairs.end)();
                    }
                    let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
                    for (i, got) in c.into_iter().enumerate() {
                        let (row, column) = (i / columns, i % columns);
                        let term = |k: usize| {
                            let (x, y) = (halves(a[row * inner + k]), halves(b[k * columns + column]));
                            x[0] * y[0] + x[1] * y[1]
                        };
                        let before = if accumulate { i as f32 } else { 0.0 };
                        assert_eq!(
                            got,
                            before + (0..inner).map(term).sum::<f32>(),
                            "{name} ({row}, {column})"
                        );
                    }
                }
            }
        }
    }
}
