//! The inner loops compiled for each instruction set, and those of the processor.

use std::sync::OnceLock;

use flash_attention_kernels::entries::Dtype;

use super::few::{Addresses, Group, Loops};
use super::{
    Backpropagate, Few, Hide, Keep, Kernels, Merge, Pairing, Pairs, Product, Query, Softmax, Strip, backward, convert,
    dropout, few, parts, product, softmax, strip,
};
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
use crate::device::cpu::bf16;
#[cfg(target_arch = "aarch64")]
use crate::device::cpu::vector::Neon;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::vector::{Avx2, Avx512};
use crate::device::cpu::vector::{Portable, Vector};
use crate::target::Instructions;

/// Returns the instructions of this processor, the best first.
pub(in crate::device::cpu) fn available() -> &'static [Instructions] {
    static AVAILABLE: OnceLock<Vec<Instructions>> = OnceLock::new();
    AVAILABLE.get_or_init(|| {
        let mut available = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            // With AVX512VL narrower parts of a register may be those of any of the 32; without, sums of `few` do not stay in
            // registers. Only Xeon Phi lacks it.
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                available.push(Instructions::Avx512);
                // Faster ones first: tiles, if there are any.
                if bf16::has_avx512_bf16() {
                    available.insert(usize::from(!bf16::prefers_avx512_bf16()), Instructions::Avx512Bf16);
                }
                if bf16::has_amx() {
                    available.insert(0, Instructions::Amx);
                }
            }
            if avx2 {
                available.push(Instructions::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if bf16::has_neon_bf16() {
                available.push(Instructions::NeonBf16);
            }
            available.push(Instructions::Neon);
        }
        available.push(Instructions::Portable);
        available
    })
}

/// Returns the inner loops of instructions that the processor has.
pub(in crate::device::cpu) fn kernels(instructions: Instructions) -> &'static Kernels {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Amx => const { &with_pairs(avx512::KERNELS, &bf16::AMX) },
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Bf16 => const { &with_pairs(avx512::KERNELS, &bf16::AVX512_BF16) },
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Instructions::NeonBf16 => const { &with_pairs(neon::KERNELS, &bf16::NEON_BF16) },
        #[cfg(target_arch = "aarch64")]
        Instructions::Neon => &neon::KERNELS,
        // Those of other architectures are never available.
        _ => &portable::KERNELS,
    }
}

/// Inner loops with products of pairs of bf16.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
const fn with_pairs(kernels: Kernels, pairs: &'static Pairs) -> Kernels {
    Kernels {
        pairs: Some(pairs),
        ..kernels
    }
}

/// Compiles the inner loops for one instruction set: each of the functions below, with its features.
macro_rules! instruction_set {
    ($module:ident, $vector:ty $(, $features:literal)?) => {
        mod $module {
            use super::*;

            pub(super) const KERNELS: Kernels = Kernels {
                lanes: <$vector>::LANES,
                panel: <$vector>::COLUMNS * <$vector>::LANES,
                fused: <$vector>::FUSED,
                product,
                pairs: None,
                pair_rows,
                pair_columns,
                may_be_split,
                hide,
                softmax,
                few,
                merge,
                backpropagate,
                strip_lanes: STRIP_LANES,
                strip,
                keep,
                widen,
                widen_codes,
                narrow,
                transpose,
                dot,
                #[cfg(test)]
                exp2,
            };

            /// 16, or a panel where 16 does not divide it. Where products of pairs have panels of 32 besides, a register, which
            /// divides both.
            const STRIP_LANES: usize = {
                let panel = <$vector>::COLUMNS * <$vector>::LANES;
                if panel.is_multiple_of(16) {
                    16
                } else if <$vector>::PARTS > 0 {
                    <$vector>::LANES
                } else {
                    panel
                }
            };

            $(#[target_feature(enable = $features)])?
            unsafe fn product(p: &Product) {
                // SAFETY: passed on to the caller, as in all that follow.
                unsafe { product::product::<$vector>(p) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pair_rows(p: &Pairing) {
                // SAFETY: as above.
                unsafe { parts::pair_rows::<$vector>(p) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pair_columns(p: &Pairing) {
                // SAFETY: as above.
                unsafe { parts::pair_columns::<$vector>(p) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn may_be_split(from: *const f32, count: usize) -> bool {
                // SAFETY: as above.
                unsafe { parts::may_be_split::<$vector>(from, count) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn hide(h: &Hide) {
                // SAFETY: as above.
                unsafe { softmax::hide::<$vector>(h) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(s: &Softmax) {
                // SAFETY: as above.
                unsafe { softmax::softmax::<$vector>(s) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn few(f: &Few<'_>) {
                // SAFETY: as above.
                unsafe {
                    match f.dtype {
                        Dtype::F32 => few::few::<$vector, 0>(f),
                        Dtype::F16 => few::few::<$vector, 1>(f),
                        Dtype::Bf16 => few::few::<$vector, 2>(f),
                    }
                }
            }
            impl Loops for $vector {
                unsafe fn multiply<const DTYPE: u8, const R: usize>(
                    group: &Group<'_, R>,
                    k: (impl Addresses, impl Addresses),
                ) {
                    $(#[target_feature(enable = $features)])?
                    #[inline(never)]
                    unsafe fn multiply<const DTYPE: u8, const R: usize>(
                        group: &Group<'_, R>,
                        k: (impl Addresses, impl Addresses),
                    ) {
                        // SAFETY: as above.
                        unsafe { few::multiply::<$vector, DTYPE, R>(group, k) }
                    }
                    // SAFETY: as above.
                    unsafe { multiply::<DTYPE, R>(group, k) }
                }

                unsafe fn exponentiate(f: &Few<'_>, query: &Query, scores: *mut f32) -> f32 {
                    $(#[target_feature(enable = $features)])?
                    #[inline(never)]
                    unsafe fn exponentiate(f: &Few<'_>, query: &Query, scores: *mut f32) -> f32 {
                        // SAFETY: as above.
                        unsafe { few::exponentiate::<$vector>(f, query, scores) }
                    }
                    // SAFETY: as above.
                    unsafe { exponentiate(f, query, scores) }
                }

                unsafe fn add_values<const DTYPE: u8, const R: usize>(
                    group: &Group<'_, R>,
                    v: (impl Addresses, impl Addresses),
                    rescales: [f32; R],
                ) {
                    $(#[target_feature(enable = $features)])?
                    #[inline(never)]
                    unsafe fn add_values<const DTYPE: u8, const R: usize>(
                        group: &Group<'_, R>,
                        v: (impl Addresses, impl Addresses),
                        rescales: [f32; R],
                    ) {
                        // SAFETY: as above.
                        unsafe { few::add_values::<$vector, DTYPE, R>(group, v, rescales) }
                    }
                    // SAFETY: as above.
                    unsafe { add_values::<DTYPE, R>(group, v, rescales) }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(m: &Merge) {
                // SAFETY: as above.
                unsafe { softmax::merge::<$vector>(m) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn backpropagate(b: &Backpropagate) {
                // SAFETY: as above.
                unsafe { backward::backpropagate::<$vector>(b) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn strip(s: &Strip<'_>) {
                // SAFETY: as above.
                unsafe { strip::run::<$vector, STRIP_LANES>(s) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn keep(k: &Keep) {
                // SAFETY: as above.
                unsafe { dropout::keep::<STRIP_LANES>(k) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn widen(dtype: Dtype, from: *const u8, count: usize, to: *mut f32) {
                // SAFETY: as above.
                unsafe { convert::widen::<$vector>(dtype, from, count, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn widen_codes(from: *const u8, count: usize, scale: f32, to: *mut f32) {
                // SAFETY: as above.
                unsafe { convert::widen_codes::<$vector>(from, count, scale, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(dtype: Dtype, from: *const f32, count: usize, to: *mut u8) {
                // SAFETY: as above.
                unsafe { convert::narrow::<$vector>(dtype, from, count, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn transpose(
                from: *const f32,
                stride: usize,
                rows: usize,
                to: *mut f32,
                to_stride: usize,
                columns: usize,
            ) {
                // SAFETY: as above.
                unsafe { convert::transpose::<$vector>(from, stride, rows, to, to_stride, columns) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dot(x: *const f32, y: *const f32, count: usize, in_order: bool, sums: *mut f32) {
                // SAFETY: as above.
                unsafe { backward::dot::<$vector>(x, y, count, in_order, sums) }
            }
            #[cfg(test)]
            $(#[target_feature(enable = $features)])?
            unsafe fn exp2(x: *mut f32, count: usize) {
                for i in (0..count).step_by(<$vector>::LANES) {
                    // SAFETY: as above.
                    unsafe { <$vector>::load(x.add(i)).exp2().store(x.add(i)) }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instruction_set!(avx512, Avx512, "avx512f,avx512vl,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
instruction_set!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
instruction_set!(neon, Neon, "neon");
instruction_set!(portable, Portable);
