//! AVX512-BF16, and the tiles of AMX.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use crate::device::cpu::kernels::{PairProduct, Pairs, SIDE, Terms, terms};

pub(in crate::device::cpu) static AVX512_BF16: Pairs = Pairs {
    begin: nothing,
    end: nothing,
    product: registers,
};

pub(in crate::device::cpu) static AMX: Pairs = Pairs {
    begin: configure,
    end: release,
    product: tiles,
};

unsafe fn nothing() {}

/// Reads a leaf of `cpuid`.
#[allow(
    unused_unsafe,
    reason = "the function is unsafe to the oldest compilers that build this crate"
)]
fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { __cpuid_count(leaf, 0) }
}

/// Returns true if the processor has AVX512-BF16.
pub(in crate::device::cpu) fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Returns true if AVX512-BF16 is faster than widening to f32. It is on AMD's processors, where it does twice the
/// work of an FMA in the same time. Measured on Sapphire Rapids it takes nearly four times as long.
pub(in crate::device::cpu) fn prefers_avx512_bf16() -> bool {
    has_avx512_bf16() && is_of_amd()
}

/// Returns true if the processor is one of AMD's.
pub(in crate::device::cpu) fn is_of_amd() -> bool {
    // A virtual machine takes microseconds for `cpuid`.
    static IS: OnceLock<bool> = OnceLock::new();
    *IS.get_or_init(|| {
        let vendor = cpuid(0);
        (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
    })
}

/// Returns true if the processor has AMX for bf16, and the system lets this process use it.
pub(in crate::device::cpu) fn has_amx() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
        if cpuid(0).eax < 7 || !is_x86_feature_detected!("avx512f") {
            return false;
        }
        cpuid(7).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE && ask_for_tiles()
    })
}

/// Asks Linux for the state of AMX tiles, which it keeps only for processes that have asked for it.
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

/// Runs [`PairProduct`] with AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn registers(p: &PairProduct) {
    for column in (0..p.columns).step_by(2 * SIDE) {
        for row in (0..p.rows).step_by(8) {
            // SAFETY: passed on to the caller.
            unsafe {
                if p.columns - column == SIDE {
                    register_block::<1>(p, row, column);
                } else {
                    register_block::<2>(p, row, column);
                }
            }
        }
    }
}

/// Computes eight rows by `N` registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn register_block<const N: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: passed on to the caller; vectors of 64 bytes may hold either type.
    unsafe {
        let (a, b, c) = (
            p.a.add(row * p.a_stride),
            p.b.add(column),
            p.c.add(row * p.c_stride + column),
        );
        let mut sums = [[_mm512_setzero_ps(); N]; 8];
        if p.accumulate {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(m * p.c_stride + n * SIDE));
                }
            }
        }
        for &(of_a, of_b) in terms(p.terms as usize) {
            let (a, b) = (a.add(of_a * p.a_part), b.add(of_b * p.b_part));
            for i in 0..p.inner {
                let mut b_row = [_mm512_setzero_si512(); N];
                for (n, b_row) in b_row.iter_mut().enumerate() {
                    *b_row = _mm512_loadu_si512(b.add(i * p.b_stride + n * SIDE).cast());
                }
                for (m, sums) in sums.iter_mut().enumerate() {
                    let factor = _mm512_set1_epi32(*a.add(m * p.a_stride + i) as i32);
                    for (sum, b) in sums.iter_mut().zip(b_row) {
                        *sum = _mm512_dpbf16_ps(
                            *sum,
                            std::mem::transmute::<__m512i, __m512bh>(factor),
                            std::mem::transmute::<__m512i, __m512bh>(b),
                        );
                    }
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
    // SAFETY: reads 64 bytes; the caller promises that the processor has tiles.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly)) };
}

unsafe fn release() {
    // SAFETY: the caller promises that the processor has tiles.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Runs [`PairProduct`] with AMX.
unsafe fn tiles(p: &PairProduct) {
    // SAFETY: passed on to the caller.
    unsafe {
        match p.terms {
            Terms::One => tiles_of::<1>(p),
            Terms::Three => tiles_of::<3>(p),
            Terms::Four => tiles_of::<4>(p),
            Terms::Six => tiles_of::<6>(p),
        }
    }
}

/// Runs [`PairProduct`] with AMX for `TERMS` products of parts.
unsafe fn tiles_of<const TERMS: usize>(p: &PairProduct) {
    for column in (0..p.columns).step_by(2 * SIDE) {
        let mut row = 0;
        while row < p.rows {
            let is_wide = p.columns - column > SIDE;
            // SAFETY: passed on to the caller.
            unsafe {
                if is_wide && row + 2 * SIDE <= p.rows {
                    four_tiles::<TERMS>(p, row, column);
                    row += 2 * SIDE;
                } else {
                    one_tile::<TERMS>(p, row, column);
                    if is_wide {
                        one_tile::<TERMS>(p, row, column + SIDE);
                    }
                    row += SIDE;
                }
            }
        }
    }
}

/// Computes two by two tiles of c. Each loaded tile of a and b serves two products, and more if the next term has a
/// part in common with this one.
#[inline]
unsafe fn four_tiles<const TERMS: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: tiles are configured as sixteen rows of 64 bytes, and the caller promises that the addresses are such
    // rows within a, b and c. Tile registers are used nowhere else.
    unsafe {
        let (c, c_bytes) = (p.c.add(row * p.c_stride + column), 4 * p.c_stride);
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
        for i in (0..p.inner).step_by(SIDE) {
            let (a, b) = (p.a.add(row * p.a_stride + i), p.b.add(i * p.b_stride + column));
            let mut loaded = (usize::MAX, usize::MAX);
            for &(of_a, of_b) in const { terms(TERMS) } {
                if of_a != loaded.0 {
                    let a = a.add(of_a * p.a_part);
                    asm!(
                        "tileloadd tmm4, [{a} + {s}]", "tileloadd tmm5, [{below} + {s}]",
                        a = in(reg) a, below = in(reg) a.add(SIDE * p.a_stride), s = in(reg) 4 * p.a_stride,
                        options(nostack, readonly)
                    );
                }
                if of_b != loaded.1 {
                    asm!(
                        "tileloadd tmm6, [{b} + {s}]", "tileloadd tmm7, [{b} + {s} + 64]",
                        b = in(reg) b.add(of_b * p.b_part), s = in(reg) 4 * p.b_stride, options(nostack, readonly)
                    );
                }
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nostack, nomem)
                );
                loaded = (of_a, of_b);
            }
        }
        asm!(
            "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
            "tilestored [{d} + {s}], tmm2", "tilestored [{d} + {s} + 64], tmm3",
            c = in(reg) c, d = in(reg) c_below, s = in(reg) c_bytes, options(nostack)
        );
    }
}

/// Computes one tile of c, with sums in the same order as `four_tiles`.
#[inline]
unsafe fn one_tile<const TERMS: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: the reasons given in `four_tiles`.
    unsafe {
        let (c, c_bytes) = (p.c.add(row * p.c_stride + column), 4 * p.c_stride);
        if p.accumulate {
            asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c, s = in(reg) c_bytes, options(nostack, readonly));
        } else {
            asm!("tilezero tmm0", options(nostack, nomem));
        }
        for i in (0..p.inner).step_by(SIDE) {
            let (a, b) = (p.a.add(row * p.a_stride + i), p.b.add(i * p.b_stride + column));
            for &(of_a, of_b) in const { terms(TERMS) } {
                asm!(
                    "tileloadd tmm4, [{a} + {a_bytes}]",
                    "tileloadd tmm6, [{b} + {b_bytes}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    a = in(reg) a.add(of_a * p.a_part), a_bytes = in(reg) 4 * p.a_stride,
                    b = in(reg) b.add(of_b * p.b_part), b_bytes = in(reg) 4 * p.b_stride,
                    options(nostack, readonly)
                );
            }
        }
        asm!("tilestored [{c} + {s}], tmm0", c = in(reg) c, s = in(reg) c_bytes, options(nostack));
    }
}
