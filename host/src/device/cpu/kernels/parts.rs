//! Numbers as sums of bf16 parts, which processors can multiply in pairs.
//!
//! An f16 number has 11 significant bits and is the exact sum of two bf16 of 8 bits each. An f32 number has 24 bits
//! and is the exact sum of three. Every part but the last is the bf16 nearest to the rest, and the new rest is exact
//! in f32, since its last bit is that of the number. A rounded part leaves at most 2^-8 of the number's largest power
//! of two, of either sign. Of two f16 numbers all products of parts are added, so that their product is exact: scores of thousands
//! need the last of their bits. Of an f16 number and a probability, which two parts hold but for 2^-16 of it, the product of the
//! second parts is left out, which is as small. Of two f32 numbers the products that are left out (see [`Terms`]) are at most 2^-24 of
//! theirs, about half a unit in the last place. Both are of either sign.

use crate::device::cpu::kernels::SIDE;
use crate::device::cpu::vector::Vector;

/// Least magnitude of a number that is split, unless it is 0. No part is then below the smallest normal bf16, and no
/// product of two first parts is below 2^-90, so the 24 bits after it are above what the processor flushes to 0.
const LEAST: f32 = 1.0 / (1_u64 << 45) as f32;

/// Limit of the magnitude of a number that is split. No sum of products then overflows, and no infinity is multiplied
/// by a zero second part of another number. All f16 numbers are within both limits.
const LIMIT: f32 = (1_u64 << 50) as f32;

/// Number of products of parts that are added for each product of two numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::device::cpu) enum Terms {
    /// Of two bf16 numbers.
    One = 1,
    /// Of an f16 number and a probability or its gradient, in two parts each.
    Three = 3,
    /// Of two f16 numbers, in two parts each.
    Four = 4,
    /// Of two f32 numbers, in three parts each.
    Six = 6,
}

impl Terms {
    /// The terms for two inputs, q, k, v or dout, of this many parts.
    pub(in crate::device::cpu) const fn of_inputs(parts: usize) -> Self {
        match parts {
            1 => Self::One,
            2 => Self::Four,
            _ => Self::Six,
        }
    }

    /// The terms for an input and P or dS.
    pub(in crate::device::cpu) const fn of_probabilities(parts: usize) -> Self {
        match Self::of_inputs(parts) {
            Self::Four => Self::Three,
            terms => terms,
        }
    }
}

/// Returns the pairs of parts to multiply, (of a, of b), of the [`Terms`] of this number. Each pair has one part in common with the pair
/// before it.
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
pub(in crate::device::cpu) const fn terms(count: usize) -> &'static [(usize, usize)] {
    match count {
        1 => &[(0, 0)],
        3 => &[(1, 0), (0, 0), (0, 1)],
        4 => &[(1, 1), (1, 0), (0, 0), (0, 1)],
        _ => &[(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)],
    }
}

/// Conversion of a matrix to words of two bf16, once for each part.
pub(in crate::device::cpu) struct Pairing {
    pub from: *const f32,
    pub stride: usize,
    /// Rows and columns of the matrix; the axis along which numbers are paired is a multiple of 8.
    pub rows: usize,
    pub columns: usize,
    /// Distance of the two numbers of a word: 1, or [`SIDE`], so that 32 neighbours make the words (0, 16), (1, 17),
    /// … Numbers past the end of the axis are 0.
    pub apart: usize,
    pub to: *mut u32,
    pub to_stride: usize,
    /// Number of parts; with one part the number is rounded.
    pub parts: usize,
    /// Number of words from one part to the next.
    pub part: usize,
}

/// Writes the words of two registers.
#[inline(always)]
pub(super) unsafe fn store_parts<V: Vector, const PARTS: usize>(mut low: V, mut high: V, to: *mut u32, part: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        if PARTS == 1 {
            return low.store_pairs(high, to);
        }
        for i in 0..PARTS - 1 {
            let (nearest_low, nearest_high) = (low.nearest_bf16(), high.nearest_bf16());
            nearest_low.store_upper_halves(nearest_high, to.add(i * part));
            (low, high) = (low.sub(nearest_low), high.sub(nearest_high));
        }
        low.store_upper_halves(high, to.add((PARTS - 1) * part));
    }
}

/// Packs pairs of rows: runs [`Pairing`] with whole registers.
#[inline(always)]
pub(super) unsafe fn pair_rows<V: Vector>(p: &Pairing) {
    // SAFETY: passed on to the caller.
    unsafe {
        match p.parts {
            1 => rows_of::<V, 1>(p),
            2 => rows_of::<V, 2>(p),
            _ => rows_of::<V, 3>(p),
        }
    }
}

#[inline(always)]
unsafe fn rows_of<V: Vector, const PARTS: usize>(p: &Pairing) {
    let words = p.rows.next_multiple_of(2 * p.apart) / 2;
    for word in 0..words {
        let first = word / p.apart * 2 * p.apart + word % p.apart;
        for column in (0..p.columns).step_by(V::LANES) {
            // SAFETY: passed on to the caller; rows past the last are not read.
            unsafe {
                let row_or_zero = |row: usize| p.from.add(row * p.stride + column);
                let low = if first < p.rows {
                    V::load(row_or_zero(first))
                } else {
                    V::splat(0.0)
                };
                let high = if first + p.apart < p.rows {
                    V::load(row_or_zero(first + p.apart))
                } else {
                    V::splat(0.0)
                };
                store_parts::<V, PARTS>(low, high, p.to.add(word * p.to_stride + column), p.part);
            }
        }
    }
}

/// Packs pairs of columns, [`SIDE`] apart: runs [`Pairing`].
#[inline(always)]
pub(super) unsafe fn pair_columns<V: Vector>(p: &Pairing) {
    // SAFETY: passed on to the caller.
    unsafe {
        match p.parts {
            1 => columns_of::<V, 1>(p),
            2 => columns_of::<V, 2>(p),
            _ => columns_of::<V, 3>(p),
        }
    }
}

#[inline(always)]
unsafe fn columns_of<V: Vector, const PARTS: usize>(p: &Pairing) {
    const GROUP: usize = 2 * SIDE;
    for row in 0..p.rows {
        for column in (0..p.columns).step_by(GROUP) {
            // SAFETY: passed on to the caller; the last columns pass through an array that is long enough.
            unsafe {
                let mut from = p.from.add(row * p.stride + column);
                let mut last = [0.0_f32; GROUP];
                if column + GROUP > p.columns {
                    std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), p.columns - column);
                    from = last.as_ptr();
                }
                let to = p.to.add(row * p.to_stride + column / 2);
                for lane in (0..SIDE).step_by(V::LANES) {
                    let (low, high) = (V::load(from.add(lane)), V::load(from.add(SIDE + lane)));
                    store_parts::<V, PARTS>(low, high, to.add(lane), p.part);
                }
            }
        }
    }
}

/// Returns true if `count` numbers may be split.
#[inline(always)]
pub(super) unsafe fn may_be_split<V: Vector>(from: *const f32, count: usize) -> bool {
    let whole = count / V::LANES * V::LANES;
    let mut all = true;
    // SAFETY: passed on to the caller; the last numbers pass through an array that is long enough.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            all &= V::load(from.add(i)).is_within(LEAST, LIMIT);
        }
        let mut last = [0.0_f32; 16];
        std::ptr::copy_nonoverlapping(from.add(whole), last.as_mut_ptr(), count - whole);
        all & V::load(last.as_ptr()).is_within(LEAST, LIMIT)
    }
}
