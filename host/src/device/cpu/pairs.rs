//! Products of bf16 that processors have instructions for: AVX512-BF16, and the tiles of AMX.
//!
//! Both multiply pairs: a word holds two neighbours along the inner axis. Sums are f32.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::kernels::{PairProduct, Pairs, SIDE, terms};

pub(super) static AVX512_BF16: Pairs = Pairs {
    begin: nothing,
    end: nothing,
    most_parts: 1,
    product: registers,
};

pub(super) static AMX: Pairs = Pairs {
    begin: configure,
    end: release,
    most_parts: 3,
    product: tiles,
};

unsafe fn nothing() {}

/// A leaf of what the processor says of itself.
#[allow(
    unused_unsafe,
    reason = "the function is unsafe to the oldest compilers that build this crate"
)]
fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { __cpuid_count(leaf, 0) }
}

/// Whether the processor has AVX512-BF16.
pub(super) fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Whether AVX512-BF16 is faster than widening to f32: it is on AMD's processors, where it does twice the work of an FMA in
/// the same time. Measured on Sapphire Rapids, it takes nearly four times as long.
pub(super) fn prefers_avx512_bf16() -> bool {
    let vendor = cpuid(0);
    has_avx512_bf16() && (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

/// Whether the processor has AMX for bf16, and the system lets this process use it.
pub(super) fn has_amx() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
        if cpuid(0).eax < 7 || !is_x86_feature_detected!("avx512f") {
            return false;
        }
        cpuid(7).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE && ask_for_tiles()
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

/// Eight rows by `N` registers.
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
        for &(of_a, of_b) in terms(p.parts) {
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
    // SAFETY: reads 64 bytes; the processor has tiles, says the caller.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly)) };
}

unsafe fn release() {
    // SAFETY: the processor has tiles, says the caller.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// [`PairProduct`] with AMX.
unsafe fn tiles(p: &PairProduct) {
    // SAFETY: passed on to the caller.
    unsafe {
        match p.parts {
            1 => tiles_of::<1>(p),
            2 => tiles_of::<2>(p),
            _ => tiles_of::<3>(p),
        }
    }
}

/// The same, of numbers of so many parts.
unsafe fn tiles_of<const PARTS: usize>(p: &PairProduct) {
    for column in (0..p.columns).step_by(2 * SIDE) {
        let mut row = 0;
        while row < p.rows {
            let is_wide = p.columns - column > SIDE;
            // SAFETY: passed on to the caller.
            unsafe {
                if is_wide && row + 2 * SIDE <= p.rows {
                    four_tiles::<PARTS>(p, row, column);
                    row += 2 * SIDE;
                } else {
                    one_tile::<PARTS>(p, row, column);
                    if is_wide {
                        one_tile::<PARTS>(p, row, column + SIDE);
                    }
                    row += SIDE;
                }
            }
        }
    }
}

/// Two by two tiles of c: each tile of a and of b that is loaded serves two products, and more where the next of the terms has
/// a part in common with this one.
#[inline]
unsafe fn four_tiles<const PARTS: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: tiles are configured as sixteen rows of 64 bytes, and the addresses are those of sixteen such rows within
    // a, b and c, says the caller. Tile registers are used nowhere else.
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
            for &(of_a, of_b) in const { terms(PARTS) } {
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

/// One tile of c, whose sums are in the same order.
#[inline]
unsafe fn one_tile<const PARTS: usize>(p: &PairProduct, row: usize, column: usize) {
    // SAFETY: as for `four_tiles`.
    unsafe {
        let (c, c_bytes) = (p.c.add(row * p.c_stride + column), 4 * p.c_stride);
        if p.accumulate {
            asm!("tileloadd tmm0, [{c} + {s}]", c = in(reg) c, s = in(reg) c_bytes, options(nostack, readonly));
        } else {
            asm!("tilezero tmm0", options(nostack, nomem));
        }
        for i in (0..p.inner).step_by(SIDE) {
            let (a, b) = (p.a.add(row * p.a_stride + i), p.b.add(i * p.b_stride + column));
            for &(of_a, of_b) in const { terms(PARTS) } {
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
            for (rows, inner, columns) in [(16, 16, 16), (32, 32, 32), (48, 16, 32), (64, 64, 16), (48, 16, 80)] {
                // Small whole numbers, so that every sum is exact.
                let value = |i: usize| half::bf16::from_f32((i * 7 % 11) as f32 - 5.0);
                let word = |i: usize| u32::from(value(2 * i).to_bits()) | u32::from(value(2 * i + 1).to_bits()) << 16;
                let a: Vec<u32> = (0..3 * rows * inner).map(word).collect();
                let b: Vec<u32> = (0..3 * inner * columns).map(|i| word(3 * i)).collect();
                for (parts, accumulate) in [(1, false), (1, true), (2, true), (3, false), (3, true)] {
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
                            a_part: rows * inner,
                            b: b.as_ptr(),
                            b_stride: columns,
                            b_part: inner * columns,
                            parts,
                            c: c.as_mut_ptr(),
                            c_stride: columns,
                            accumulate,
                        });
                        (pairs.end)();
                    }
                    let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
                    for (i, got) in c.into_iter().enumerate() {
                        let (row, column) = (i / columns, i % columns);
                        let term = |k: usize, (of_a, of_b): (usize, usize)| {
                            let x = halves(a[(of_a * rows + row) * inner + k]);
                            let y = halves(b[(of_b * inner + k) * columns + column]);
                            x[0] * y[0] + x[1] * y[1]
                        };
                        let product = |k: usize| terms(parts).iter().map(|&of| term(k, of)).sum::<f32>();
                        let before = if accumulate { i as f32 } else { 0.0 };
                        let want = before + (0..inner).map(product).sum::<f32>();
                        assert_eq!(got, want, "{name} ({row}, {column}), {parts} parts");
                    }
                }
            }
        }
    }

    /// Of the parts that a number has, those of every product down to what is asked for, and each once.
    #[test]
    fn terms_are_the_products_that_matter() {
        for parts in 1..=3 {
            let mut all: Vec<_> = terms(parts).to_vec();
            all.sort();
            let each = (0..parts).flat_map(|of_a| (0..parts - of_a).map(move |of_b| (of_a, of_b)));
            assert_eq!(all, each.collect::<Vec<_>>());
            let share = |two: &[(usize, usize)]| two[0].0 == two[1].0 || two[0].1 == two[1].1;
            assert!(
                terms(parts).windows(2).all(share),
                "a part in common with the one before"
            );
        }
    }
}
