//! Inner loops that change layout or type, without sums: conversions between f32 and the 16-bit types, and
//! transposes.

use flash_attention_kernels::entries::Dtype;

use super::MAX_LANES;
use crate::device::cpu::vector::Vector;

/// Widens `count` elements.
#[inline(always)]
pub(super) unsafe fn widen<V: Vector>(dtype: Dtype, from: *const u8, count: usize, to: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        let halves = from.cast::<u16>();
        match dtype {
            Dtype::F32 => std::ptr::copy_nonoverlapping(from, to.cast(), 4 * count),
            Dtype::F16 => widen_halves::<V, false>(halves, count, to),
            Dtype::Bf16 => widen_halves::<V, true>(halves, count, to),
        }
    }
}

#[inline(always)]
unsafe fn widen_halves<V: Vector, const BF16: bool>(from: *const u16, count: usize, to: *mut f32) {
    // SAFETY: passed on to the caller; the rest is copied through arrays that are long enough.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            load_half::<V, BF16>(from.add(i)).store(to.add(i));
        }
        if whole < count {
            let (mut narrow, mut wide) = ([0_u16; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(from.add(whole), narrow.as_mut_ptr(), count - whole);
            load_half::<V, BF16>(narrow.as_ptr()).store(wide.as_mut_ptr());
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), count - whole);
        }
    }
}

// These are no closures: closures may not be inlined, and code that is not inlined is not vectorised.
#[inline(always)]
unsafe fn load_half<V: Vector, const BF16: bool>(from: *const u16) -> V {
    // SAFETY: passed on to the caller.
    unsafe { if BF16 { V::load_bf16(from) } else { V::load_f16(from) } }
}

#[inline(always)]
unsafe fn store_half<V: Vector, const BF16: bool>(x: V, to: *mut u16) {
    // SAFETY: passed on to the caller.
    unsafe { if BF16 { x.store_bf16(to) } else { x.store_f16(to) } }
}

/// Converts `count` codes of e4m3, and multiplies them by a scale.
#[inline(always)]
pub(super) unsafe fn widen_codes<V: Vector>(from: *const u8, count: usize, scale: f32, to: *mut f32) {
    // SAFETY: as for `widen_halves`.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            load_codes::<V>(from.add(i), scale).store(to.add(i));
        }
        if whole < count {
            let (mut narrow, mut wide) = ([0_u8; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(from.add(whole), narrow.as_mut_ptr(), count - whole);
            load_codes::<V>(narrow.as_ptr(), scale).store(wide.as_mut_ptr());
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// Reads a register of codes. Their fields, moved to the places of those of f16, are numbers with another bias: every code is
/// one, those of subnormal numbers too.
#[inline(always)]
unsafe fn load_codes<V: Vector>(from: *const u8, scale: f32) -> V {
    const UNBIAS: f32 = 256.0; // 2^(15 - 7)
    let mut halves = [0_u16; MAX_LANES];
    // SAFETY: passed on to the caller.
    unsafe {
        for (lane, half) in halves.iter_mut().enumerate().take(V::LANES) {
            let code = u16::from(from.add(lane).read());
            let magnitude = code & 0x7f;
            // NaN would be a number of f16.
            let magnitude = if magnitude == 0x7f { 0x7e00 } else { magnitude << 7 };
            *half = magnitude | (code & 0x80) << 8;
        }
        V::load_f16(halves.as_ptr()).mul(V::splat(UNBIAS)).mul(V::splat(scale))
    }
}

/// Rounds `count` elements.
#[inline(always)]
pub(super) unsafe fn narrow<V: Vector>(dtype: Dtype, from: *const f32, count: usize, to: *mut u8) {
    // SAFETY: passed on to the caller.
    unsafe {
        let halves = to.cast::<u16>();
        match dtype {
            Dtype::F32 => std::ptr::copy_nonoverlapping(from.cast(), to, 4 * count),
            Dtype::F16 => narrow_to_halves::<V, false>(from, count, halves),
            Dtype::Bf16 => narrow_to_halves::<V, true>(from, count, halves),
        }
    }
}

#[inline(always)]
unsafe fn narrow_to_halves<V: Vector, const BF16: bool>(from: *const f32, count: usize, to: *mut u16) {
    // SAFETY: as for `widen_halves`.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            store_half::<V, BF16>(V::load(from.add(i)), to.add(i));
        }
        if whole < count {
            let (mut narrow, mut wide) = ([0_u16; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(from.add(whole), wide.as_mut_ptr(), count - whole);
            store_half::<V, BF16>(V::load(wide.as_ptr()), narrow.as_mut_ptr());
            std::ptr::copy_nonoverlapping(narrow.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// Transposes block by block.
#[inline(always)]
pub(super) unsafe fn transpose<V: Vector>(
    from: *const f32,
    stride: usize,
    rows: usize,
    to: *mut f32,
    to_stride: usize,
    columns: usize,
) {
    for row in (0..rows).step_by(V::LANES) {
        for column in (0..columns).step_by(V::LANES) {
            // SAFETY: passed on to the caller.
            unsafe {
                let (from, to) = (from.add(row * stride + column), to.add(column * to_stride + row));
                V::transpose(
                    from,
                    stride,
                    V::LANES.min(rows - row),
                    to,
                    to_stride,
                    V::LANES.min(columns - column),
                );
            }
        }
    }
}
