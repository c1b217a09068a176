//! Bit counting, bit fields, permutes, shifts and logic (manual sections "Integer Arithmetic Instructions" from popc
//! on, "Logic and Shift Instructions", "prmt").
//!
//! Registers are passed as in [`super::integer`]. Amounts and positions beyond the width clamp or wrap, or give the
//! result of the manual's loops; none is undefined here.

use super::integer::{IntType, shr_extended};

/// `popc`.
pub const fn popc(ty: IntType, a: u64) -> u32 {
    (a & (u64::MAX >> (64 - ty.bits()))).count_ones()
}

/// `clz`: the type's width for zero.
pub const fn clz(ty: IntType, a: u64) -> u32 {
    (a & (u64::MAX >> (64 - ty.bits()))).leading_zeros() - (64 - ty.bits())
}

/// `brev`.
pub const fn brev(ty: IntType, a: u64) -> u64 {
    ty.extend(a.reverse_bits() >> (64 - ty.bits()))
}

/// `bfind{.shiftamt}`: position of the highest bit that differs from the sign, or the shift that moves it to the top;
/// 0xffffffff if there is none.
pub const fn bfind(ty: IntType, a: u64, shift_amount: bool) -> u32 {
    let a = if ty.value(a) < 0 { !a } else { a };
    match clz(ty, a) {
        zeros if zeros == ty.bits() => u32::MAX,
        zeros if shift_amount => zeros,
        zeros => ty.bits() - 1 - zeros,
    }
}

/// `fns`: position of the n-th set bit of `mask`, counted from `base` up (offset > 0) or down (offset < 0); an offset
/// of 0 tests `base` itself. 0xffffffff if there is none, or if `base` exceeds 31 (undefined in PTX).
pub const fn fns(mask: u32, base: u32, offset: i32) -> u32 {
    if base > 31 {
        return u32::MAX;
    }
    if offset == 0 {
        return if mask >> base & 1 == 1 { base } else { u32::MAX };
    }
    let mut left = offset.unsigned_abs();
    let mut position = base as i32;
    while position >= 0 && position < 32 {
        if mask >> position & 1 == 1 {
            left -= 1;
            if left == 0 {
                return position as u32;
            }
        }
        position += offset.signum();
    }
    u32::MAX
}

/// `bfe`: `length` bits of `a` from `start`, sign- or zero-extended; start and length count modulo 256.
pub const fn bfe(ty: IntType, a: u64, start: u32, length: u32) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    // Beyond the top the extended value continues with zeros or with the sign, as the manual requires.
    let from = if start > 64 { 64 } else { start };
    let extended = ty.extend(a);
    let field = match (ty.signed(), from) {
        (true, 63..) => ((extended as i64) >> 63) as u64,
        (true, _) => ((extended as i64) >> from) as u64,
        (false, 64..) => 0,
        (false, _) => extended >> from,
    };
    if length >= ty.bits() {
        return ty.extend(field);
    }
    let top = 64 - length;
    ty.extend(if ty.signed() {
        ((field << top) as i64 >> top) as u64
    } else {
        field << top >> top
    })
}

/// `bfi`: `b` with `length` bits from `start` replaced by the low bits of `a`.
pub const fn bfi(ty: IntType, a: u64, b: u64, start: u32, length: u32) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    if start >= ty.bits() || length == 0 {
        return ty.extend(b);
    }
    let ones = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    let mask = ones << start;
    ty.extend(b & !mask | a << start & mask)
}

/// Treatment of a shift or width that is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overflow {
    /// `.clamp`.
    Clamp,
    /// `.wrap`: modulo 32.
    Wrap,
}

/// `szext`: the low `b` bits of `a`, sign-extended for `.s32`, zero-extended for `.u32`.
pub const fn szext(mode: Overflow, signed: bool, a: u32, b: u32) -> u32 {
    if b >= 32 && matches!(mode, Overflow::Clamp) {
        return a;
    }
    let n = b & 31;
    if n == 0 {
        return 0;
    }
    let up = 32 - n;
    if signed {
        ((a << up) as i32 >> up) as u32
    } else {
        a << up >> up
    }
}

/// `bmsk`: `b` ones from bit `a` up.
pub const fn bmsk(mode: Overflow, a: u32, b: u32) -> u32 {
    let (start, width) = match mode {
        Overflow::Clamp => (a, if b > 32 { 32 } else { b }),
        Overflow::Wrap => (a & 31, b & 31),
    };
    if start >= 32 {
        return 0;
    }
    (((1u64 << width) - 1) << start) as u32
}

/// Modes of `prmt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permute {
    /// No mode: four selectors of four bits; the top bit of a selector replicates the byte's sign.
    Generic,
    /// `.f4e`: four bytes upward from the selected one.
    Forward4,
    /// `.b4e`: four bytes downward from the selected one, wrapping at byte 0.
    Backward4,
    /// `.rc8`: the selected byte four times.
    Replicate8,
    /// `.ecl`: bytes 3..0, none below the selected one.
    EdgeClampLeft,
    /// `.ecr`: bytes 3..0, none above the selected one.
    EdgeClampRight,
    /// `.rc16`: the selected half (by the lowest bit) twice.
    Replicate16,
}

/// `prmt{.mode}.b32 d, a, b, c`: bytes 0..3 come from `a`, 4..7 from `b`.
#[inline]
pub const fn prmt(mode: Permute, a: u32, b: u32, c: u32) -> u32 {
    let source = (b as u64) << 32 | a as u64;
    let select = c & 3;
    let mut result = 0;
    let mut i = 0;
    while i < 4 {
        let index = match mode {
            Permute::Generic => c >> (4 * i) & 7,
            Permute::Forward4 => select + i,
            Permute::Backward4 => (select + 8 - i) & 7,
            Permute::Replicate8 => select,
            Permute::EdgeClampLeft if i < select => select,
            Permute::EdgeClampRight if i > select => select,
            Permute::EdgeClampLeft | Permute::EdgeClampRight => i,
            Permute::Replicate16 => (select & 1) * 2 + (i & 1),
        };
        let mut byte = (source >> (8 * index)) as u8;
        if matches!(mode, Permute::Generic) && c >> (4 * i + 3) & 1 == 1 {
            byte = ((byte as i8) >> 7) as u8;
        }
        result |= (byte as u32) << (8 * i);
        i += 1;
    }
    result
}

/// `shl`: amounts of the width or more give 0.
#[inline]
pub const fn shl(ty: IntType, a: u64, amount: u32) -> u64 {
    if amount >= ty.bits() { 0 } else { ty.extend(a << amount) }
}

/// `shr`: amounts of the width or more give 0, or the sign for signed types.
#[inline]
pub const fn shr(ty: IntType, a: u64, amount: u32) -> u64 {
    let amount = if amount > ty.bits() { ty.bits() } else { amount };
    shr_extended(ty, ty.extend(a), amount)
}

/// `shf.l`, `shf.r`: the 64 bits `b:a` shifted; the left form keeps the upper word, the right form the lower.
#[inline]
pub const fn shf(left: bool, mode: Overflow, a: u32, b: u32, c: u32) -> u32 {
    let n = match mode {
        Overflow::Clamp if c > 32 => 32,
        Overflow::Clamp => c,
        Overflow::Wrap => c & 31,
    };
    let both = (b as u64) << 32 | a as u64;
    if left {
        (both << n >> 32) as u32
    } else {
        (both >> n) as u32
    }
}

/// `lop3`: the bitwise function whose truth table is `table` (bit index `4a + 2b + c`).
#[inline]
pub const fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    // A tree of selections: by c between neighbouring table bits, then by b, then by a.
    let by_c = select(c, table_bit(table, 1), table_bit(table, 0));
    let by_c_if_b = select(c, table_bit(table, 3), table_bit(table, 2));
    let by_c_if_a = select(c, table_bit(table, 5), table_bit(table, 4));
    let by_c_if_both = select(c, table_bit(table, 7), table_bit(table, 6));
    select(a, select(b, by_c_if_both, by_c_if_a), select(b, by_c_if_b, by_c))
}

/// Selects bits of `yes` where `mask` is one and of `no` where it is zero.
const fn select(mask: u32, yes: u32, no: u32) -> u32 {
    mask & yes | !mask & no
}

/// Replicates a table bit to all 32 positions.
const fn table_bit(table: u8, index: u32) -> u32 {
    ((table >> index & 1) as u32).wrapping_neg()
}

/// `cnot`: 1 for zero, else 0.
pub const fn cnot(ty: IntType, a: u64) -> u64 {
    (a & (u64::MAX >> (64 - ty.bits())) == 0) as u64
}
