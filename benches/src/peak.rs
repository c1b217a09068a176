//! Limits of the processor, with which CPU measurements are compared: the rate of multiply-adds, and the bandwidth of
//! memory reads.

use std::hint::black_box;
use std::time::Instant;

/// Returns the FLOP/s of f32 multiply-adds of one thread (two operations each) for an instruction set: `avx2`,
/// `avx512`, `avx512bf16` or `neon`; `None` if the processor does not support it. Twelve independent sums hide the
/// latency.
pub fn multiply_adds(isa: &str) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        let has = match isa {
            "avx2" => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            "avx512" => is_x86_feature_detected!("avx512f"),
            "avx512bf16" => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"),
            _ => false,
        };
        // SAFETY: the processor has the instructions.
        has.then(|| unsafe {
            match isa {
                "avx2" => x86::avx2(),
                "avx512" => x86::avx512(),
                _ => x86::avx512_bf16(),
            }
        })
    }
    #[cfg(target_arch = "aarch64")]
    {
        (isa == "neon").then(neon)
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = isa;
        None
    }
}

/// Instructions of each of the twelve sums in one measurement, which takes a few milliseconds.
const STEPS: usize = 1_000_000;

const SUMS: usize = 12;

/// Returns the best of several rates of twelve sums, whose steps have `flops` operations each.
#[inline(always)]
fn best(flops: usize, mut run: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed().as_secs_f64());
    }
    (STEPS * SUMS * flops) as f64 / least
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{STEPS, SUMS, best, black_box};

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2() -> f64 {
        let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        best(16, || {
            let mut sums = [y; SUMS];
            for _ in 0..STEPS {
                sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, x, y));
            }
            black_box(sums);
        })
    }

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512() -> f64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        best(32, || {
            let mut sums = [y; SUMS];
            for _ in 0..STEPS {
                sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, x, y));
            }
            black_box(sums);
        })
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512_bf16() -> f64 {
        // SAFETY: vectors of 64 bytes may hold either type.
        let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(black_box(0x3e80_3e80))) };
        best(64, || {
            let mut sums = [_mm512_setzero_ps(); SUMS];
            for _ in 0..STEPS {
                sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, x, x));
            }
            black_box(sums);
        })
    }
}

#[cfg(target_arch = "aarch64")]
fn neon() -> f64 {
    use std::arch::aarch64::{vdupq_n_f32, vfmaq_f32};
    // SAFETY: every such processor has NEON.
    let (x, y) = unsafe { (vdupq_n_f32(black_box(0.5)), vdupq_n_f32(black_box(0.25))) };
    best(8, || {
        let mut sums = [y; SUMS];
        for _ in 0..STEPS {
            // SAFETY: every such processor has NEON.
            sums.iter_mut().for_each(|sum| *sum = unsafe { vfmaq_f32(y, *sum, x) });
        }
        black_box(sums);
    })
}

/// Returns the bytes per second that `threads` threads read together from `data`: the best of several rates.
pub fn reading(data: &[u64], threads: usize) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        read(data, threads);
        least = least.min(start.elapsed().as_secs_f64());
    }
    (size_of_val(data)) as f64 / least
}

/// Reads `data` once with `threads` threads, each its own share in order.
pub fn read(data: &[u64], threads: usize) {
    std::thread::scope(|scope| {
        for share in data.chunks(data.len().div_ceil(threads)) {
            scope.spawn(move || black_box(sum(share)));
        }
    });
}

/// Sums with sixteen accumulators, which compilers vectorise.
fn sum(share: &[u64]) -> u64 {
    let mut sums = [0_u64; 16];
    for line in share.chunks_exact(16) {
        for (sum, x) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums.iter().fold(0, |all, x| all.wrapping_add(*x))
}
