//! Integer arithmetic (manual sections "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic
//! Instructions"). Bit fields, shifts and logic are in [`super::bits`].
//!
//! A register's content is a `u64` of which the type's low bits count. Results are extended to 64 bits: by the sign
//! for signed types, by zeros for the others ([`IntType::extend`]). Nothing panics: operations that the manual leaves
//! unspecified (division by zero) have a fixed result here, documented at the function.

pub use super::bits::{
    Overflow, Permute, bfe, bfi, bfind, bmsk, brev, clz, cnot, fns, lop3, popc, prmt, shf, shl, shr, szext,
};

/// Integer types of PTX. Bit-size types (`.b32`) behave like the unsigned ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the manual's types")]
pub enum IntType {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
}

impl IntType {
    /// Returns the width in bits.
    #[inline]
    pub const fn bits(self) -> u32 {
        match self {
            IntType::U8 | IntType::S8 => 8,
            IntType::U16 | IntType::S16 => 16,
            IntType::U32 | IntType::S32 => 32,
            IntType::U64 | IntType::S64 => 64,
        }
    }

    /// Returns true if the type is signed.
    #[inline]
    pub const fn signed(self) -> bool {
        matches!(self, IntType::S8 | IntType::S16 | IntType::S32 | IntType::S64)
    }

    /// Extends the low bits of `x` as this type to 64 bits.
    #[inline]
    pub const fn extend(self, x: u64) -> u64 {
        match self {
            IntType::U8 => x as u8 as u64,
            IntType::S8 => x as i8 as u64,
            IntType::U16 => x as u16 as u64,
            IntType::S16 => x as i16 as u64,
            IntType::U32 => x as u32 as u64,
            IntType::S32 => x as i32 as u64,
            IntType::U64 | IntType::S64 => x,
        }
    }

    /// Returns the mathematical value of the low bits of `x`.
    #[inline]
    pub const fn value(self, x: u64) -> i128 {
        if self.signed() {
            self.extend(x) as i64 as i128
        } else {
            self.extend(x) as i128
        }
    }

    /// Returns the smallest value.
    pub const fn min_value(self) -> i128 {
        if self.signed() { -(1 << (self.bits() - 1)) } else { 0 }
    }

    /// Returns the largest value.
    pub const fn max_value(self) -> i128 {
        if self.signed() {
            (1 << (self.bits() - 1)) - 1
        } else {
            (1 << self.bits()) - 1
        }
    }

    #[inline]
    pub(super) const fn wrap(self, x: i128) -> u64 {
        self.extend(x as u64)
    }
}

/// Part of a product that an instruction keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MulPart {
    /// `.lo`: the low half.
    Lo,
    /// `.hi`: the high half.
    Hi,
    /// `.wide`: all of it, in a register of twice the width.
    Wide,
}

/// `add`; with `sat` (`.s32` only) clamped to the type's range.
#[inline]
pub const fn add(ty: IntType, a: u64, b: u64, sat: bool) -> u64 {
    if sat {
        clamp(ty, ty.value(a) + ty.value(b))
    } else {
        ty.extend(a.wrapping_add(b))
    }
}

/// `sub`; with `sat` (`.s32` only) clamped to the type's range.
#[inline]
pub const fn sub(ty: IntType, a: u64, b: u64, sat: bool) -> u64 {
    if sat {
        clamp(ty, ty.value(a) - ty.value(b))
    } else {
        ty.extend(a.wrapping_sub(b))
    }
}

const fn clamp(ty: IntType, x: i128) -> u64 {
    if x < ty.min_value() {
        ty.wrap(ty.min_value())
    } else if x > ty.max_value() {
        ty.wrap(ty.max_value())
    } else {
        ty.wrap(x)
    }
}

/// `mul.lo`, `mul.hi`, `mul.wide`. The wide result of a 16- or 32-bit type is extended from twice its width.
#[inline]
pub const fn mul(part: MulPart, ty: IntType, a: u64, b: u64) -> u64 {
    // The whole product of types up to 32 bits fits.
    let product = ty.extend(a).wrapping_mul(ty.extend(b));
    match part {
        MulPart::Lo => ty.extend(product),
        MulPart::Wide => product,
        MulPart::Hi if ty.bits() == 64 => (ty.value(a).wrapping_mul(ty.value(b)) >> 64) as u64,
        MulPart::Hi => shr_extended(ty, product, ty.bits()),
    }
}

/// Shifts right a value already extended to 64 bits, by at most 64.
pub(super) const fn shr_extended(ty: IntType, x: u64, amount: u32) -> u64 {
    match (ty.signed(), amount) {
        (true, 63..) => ((x as i64) >> 63) as u64,
        (true, _) => ty.extend(((x as i64) >> amount) as u64),
        (false, 64..) => 0,
        (false, _) => ty.extend(x >> amount),
    }
}

/// `mad.lo`, `mad.hi{.sat}`, `mad.wide`: `sat` belongs to `mad.hi.sat.s32`. For `.wide`, `c` has twice the width.
#[inline]
pub const fn mad(part: MulPart, ty: IntType, a: u64, b: u64, c: u64, sat: bool) -> u64 {
    match part {
        MulPart::Lo => ty.extend(a.wrapping_mul(b).wrapping_add(c)),
        MulPart::Hi => add(ty, mul(MulPart::Hi, ty, a, b), c, sat),
        MulPart::Wide => {
            let sum = mul(MulPart::Wide, ty, a, b).wrapping_add(c);
            match ty {
                IntType::U16 => sum as u32 as u64,
                IntType::S16 => sum as i32 as u64,
                _ => sum,
            }
        }
    }
}

/// Extends the 24 low bits of a 32-bit value by the type's sign.
const fn low24(ty: IntType, x: u64) -> i64 {
    if ty.signed() {
        ((x as i32) << 8 >> 8) as i64
    } else {
        (x & 0xff_ffff) as i64
    }
}

/// `mul24.lo`, `mul24.hi`: bits 31..0 or 47..16 of the 48-bit product of the low 24 bits.
pub const fn mul24(hi: bool, ty: IntType, a: u64, b: u64) -> u64 {
    let t = low24(ty, a).wrapping_mul(low24(ty, b));
    ty.extend((if hi { t >> 16 } else { t }) as u64)
}

/// `mad24.lo`, `mad24.hi{.sat}`.
pub const fn mad24(hi: bool, ty: IntType, a: u64, b: u64, c: u64, sat: bool) -> u64 {
    add(ty, mul24(hi, ty, a, b), c, sat)
}

/// Operations of the SIMD video instructions (`vadd4` and similar).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the instructions'")]
pub enum Video {
    Add,
    Sub,
    AbsDiff,
    Min,
    Max,
}

/// Modifiers of a SIMD video instruction on a 32-bit word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoMode {
    /// Number of lanes: 2 halves or 4 bytes.
    pub parts: u32,
    /// True if the lanes of the result, of a and of b are signed.
    pub signed: [bool; 3],
    /// True to clamp each lane to its range instead of wrapping.
    pub saturate: bool,
    /// True to add up the lanes and `c`.
    pub accumulate: bool,
}

/// Applies a SIMD video instruction to all lanes.
pub fn video(op: Video, mode: VideoMode, a: u32, b: u32, c: u32) -> u32 {
    let bits = 32 / mode.parts;
    let lane = |word: u32, part: u32, signed: bool| {
        let up = word << (32 - bits * (part + 1));
        if signed {
            i64::from(up as i32 >> (32 - bits))
        } else {
            i64::from(up >> (32 - bits))
        }
    };
    let (least, most) = if mode.signed[0] {
        (-(1i64 << (bits - 1)), (1i64 << (bits - 1)) - 1)
    } else {
        (0, (1i64 << bits) - 1)
    };
    let mut out = if mode.accumulate { c } else { 0 };
    for part in 0..mode.parts {
        let (x, y) = (lane(a, part, mode.signed[1]), lane(b, part, mode.signed[2]));
        let value = match op {
            Video::Add => x + y,
            Video::Sub => x - y,
            Video::AbsDiff => (x - y).abs(),
            Video::Min => x.min(y),
            Video::Max => x.max(y),
        };
        let value = if mode.saturate { value.clamp(least, most) } else { value };
        if mode.accumulate {
            out = out.wrapping_add(value as u32);
        } else {
            out |= (value as u32 & (((1u64 << bits) - 1) as u32)) << (bits * part);
        }
    }
    out
}

/// `sad`: c + |a - b|.
pub const fn sad(ty: IntType, a: u64, b: u64, c: u64) -> u64 {
    ty.extend(c.wrapping_add((ty.value(a) - ty.value(b)).unsigned_abs() as u64))
}

/// `div`: rounds toward zero. Division by zero is unspecified in PTX; here it gives all ones. MIN / -1 wraps to MIN.
#[inline]
pub const fn div(ty: IntType, a: u64, b: u64) -> u64 {
    let (a, b) = (ty.extend(a), ty.extend(b));
    if b == 0 {
        ty.extend(u64::MAX)
    } else if ty.signed() {
        ty.extend((a as i64).wrapping_div(b as i64) as u64)
    } else {
        a / b
    }
}

/// `rem`: has the sign of `a`. A zero divisor is unspecified in PTX; here it gives all ones.
#[inline]
pub const fn rem(ty: IntType, a: u64, b: u64) -> u64 {
    let (a, b) = (ty.extend(a), ty.extend(b));
    if b == 0 {
        ty.extend(u64::MAX)
    } else if ty.signed() {
        (a as i64).wrapping_rem(b as i64) as u64
    } else {
        a % b
    }
}

/// `abs`: MIN stays MIN.
pub const fn abs(ty: IntType, a: u64) -> u64 {
    ty.wrap(ty.value(a).abs())
}

/// `neg`: MIN stays MIN.
pub const fn neg(ty: IntType, a: u64) -> u64 {
    ty.extend(a.wrapping_neg())
}

/// `min{.relu}`.
#[inline]
pub const fn min(ty: IntType, a: u64, b: u64, relu: bool) -> u64 {
    relu_if(ty, if less(ty, a, b) { a } else { b }, relu)
}

/// `max{.relu}`.
#[inline]
pub const fn max(ty: IntType, a: u64, b: u64, relu: bool) -> u64 {
    relu_if(ty, if less(ty, b, a) { a } else { b }, relu)
}

/// Returns true if a < b, in the order of `setp` and `min`.
#[inline]
pub const fn less(ty: IntType, a: u64, b: u64) -> bool {
    let (a, b) = (ty.extend(a), ty.extend(b));
    if ty.signed() { (a as i64) < (b as i64) } else { a < b }
}

const fn relu_if(ty: IntType, x: u64, relu: bool) -> u64 {
    if relu && ty.value(x) < 0 { 0 } else { ty.extend(x) }
}

/// Applies a 16-bit operation to both halves: `add`, `min`, `max` of `.u16x2` and `.s16x2` (with `U16` or `S16`
/// inside).
#[inline]
pub fn map16x2(a: u32, b: u32, f: impl Fn(u64, u64) -> u64) -> u32 {
    let low = f(u64::from(a & 0xffff), u64::from(b & 0xffff)) as u32 & 0xffff;
    low | (f(u64::from(a >> 16), u64::from(b >> 16)) as u32) << 16
}

/// `add.cc`, `addc{.cc}`: the sum with a carry in, and the carry out of the type's width.
#[inline]
pub const fn add_carry(ty: IntType, a: u64, b: u64, carry: bool) -> (u64, bool) {
    let mask = u64::MAX >> (64 - ty.bits());
    let sum = (a & mask) as u128 + (b & mask) as u128 + carry as u128;
    (ty.extend(sum as u64), sum >> ty.bits() != 0)
}

/// `sub.cc`, `subc{.cc}`: the difference with a borrow in, and the borrow out.
#[inline]
pub const fn sub_borrow(ty: IntType, a: u64, b: u64, borrow: bool) -> (u64, bool) {
    let mask = u64::MAX >> (64 - ty.bits());
    let taken = (b & mask) as u128 + borrow as u128;
    (ty.extend(a.wrapping_sub(taken as u64)), taken > (a & mask) as u128)
}

/// `mad{.lo,.hi}.cc`, `madc{.lo,.hi}{.cc}`: half of the product plus `c` and a carry in, and the carry out.
pub const fn mad_carry(part: MulPart, ty: IntType, a: u64, b: u64, c: u64, carry: bool) -> (u64, bool) {
    add_carry(ty, mul(part, ty, a, b), c, carry)
}

/// `dp4a`: c plus the dot product of four bytes.
pub const fn dp4a(a_signed: bool, b_signed: bool, a: u32, b: u32, c: u32) -> u32 {
    let mut sum = c;
    let mut i = 0;
    while i < 4 {
        sum = sum.wrapping_add(byte(a_signed, a, i).wrapping_mul(byte(b_signed, b, i)) as u32);
        i += 1;
    }
    sum
}

/// `dp2a.lo`, `dp2a.hi`: c plus the dot product of two 16-bit values of `a` with the low or high two bytes of `b`.
pub const fn dp2a(hi: bool, a_signed: bool, b_signed: bool, a: u32, b: u32, c: u32) -> u32 {
    let first = if hi { 2 } else { 0 };
    let low = if a_signed { a as i16 as i32 } else { a as u16 as i32 };
    let high = if a_signed { a as i32 >> 16 } else { (a >> 16) as i32 };
    let low = low.wrapping_mul(byte(b_signed, b, first)) as u32;
    let high = high.wrapping_mul(byte(b_signed, b, first + 1)) as u32;
    c.wrapping_add(low).wrapping_add(high)
}

const fn byte(signed: bool, x: u32, index: u32) -> i32 {
    let x = (x >> (8 * index)) as u8;
    if signed { x as i8 as i32 } else { x as i32 }
}

#[cfg(test)]
#[path = "integer_tests.rs"]
mod tests;
