//! Integer operations, lane by lane.

use super::{map, map2, map3, truncate};
use crate::exec::warp::{Frame, lanes};
use crate::isa::types::{IntTy, Slot};
use crate::isa::{Alu, Carry, Int1, Int2, Int3, Packed};
use crate::numeric::integer::{self, MulPart, Overflow};

pub(super) fn int1(f: &mut Frame, mask: u32, op: Int1, ty: IntTy, d: Slot, a: Slot) {
    let bits = ty.bits();
    match op {
        Int1::Abs => map(f, mask, d, a, |x| truncate(bits, integer::abs(ty, x))),
        Int1::Neg => map(f, mask, d, a, |x| truncate(bits, integer::neg(ty, x))),
        Int1::Not => map(f, mask, d, a, |x| truncate(bits, !x)),
        Int1::Cnot => map(f, mask, d, a, |x| truncate(bits, integer::cnot(ty, x))),
        Int1::Popc => map(f, mask, d, a, |x| u64::from(integer::popc(ty, x))),
        Int1::Clz => map(f, mask, d, a, |x| u64::from(integer::clz(ty, x))),
        Int1::Brev => map(f, mask, d, a, |x| truncate(bits, integer::brev(ty, x))),
        Int1::Bfind | Int1::BfindShift => {
            let shift = op == Int1::BfindShift;
            map(f, mask, d, a, |x| u64::from(integer::bfind(ty, x, shift)));
        }
    }
}

pub(super) fn int2(f: &mut Frame, mask: u32, op: Int2, ty: IntTy, d: Slot, s: [Slot; 2]) {
    by_type!(ty, T => {
        let cut = |x| truncate(T.bits(), x);
        match op {
            Int2::Add => map2(f, mask, d, s, |a, b| cut(a.wrapping_add(b))),
            Int2::Sub => map2(f, mask, d, s, |a, b| cut(a.wrapping_sub(b))),
            Int2::AddSat => map2(f, mask, d, s, |a, b| cut(integer::add(T, a, b, true))),
            Int2::SubSat => map2(f, mask, d, s, |a, b| cut(integer::sub(T, a, b, true))),
            Int2::MulLo => map2(f, mask, d, s, |a, b| cut(a.wrapping_mul(b))),
            Int2::MulHi => map2(f, mask, d, s, |a, b| cut(integer::mul(MulPart::Hi, T, a, b))),
            Int2::MulWide => map2(f, mask, d, s, |a, b| {
                truncate(2 * T.bits(), T.extend(a).wrapping_mul(T.extend(b)))
            }),
            Int2::Mul24Lo => map2(f, mask, d, s, |a, b| cut(integer::mul24(false, T, a, b))),
            Int2::Mul24Hi => map2(f, mask, d, s, |a, b| cut(integer::mul24(true, T, a, b))),
            Int2::Div => map2(f, mask, d, s, |a, b| cut(integer::div(T, a, b))),
            Int2::Rem => map2(f, mask, d, s, |a, b| cut(integer::rem(T, a, b))),
            Int2::Min => map2(f, mask, d, s, |a, b| cut(integer::min(T, a, b, false))),
            Int2::Max => map2(f, mask, d, s, |a, b| cut(integer::max(T, a, b, false))),
            Int2::And => map2(f, mask, d, s, |a, b| cut(a & b)),
            Int2::Or => map2(f, mask, d, s, |a, b| cut(a | b)),
            Int2::Xor => map2(f, mask, d, s, |a, b| cut(a ^ b)),
            Int2::Shl => map2(f, mask, d, s, |a, b| cut(integer::shl(T, a, b as u32))),
            Int2::Shr => map2(f, mask, d, s, |a, b| cut(integer::shr(T, a, b as u32))),
            Int2::BmskClamp => map2(f, mask, d, s, |a, b| bmsk(Overflow::Clamp, a, b)),
            Int2::BmskWrap => map2(f, mask, d, s, |a, b| bmsk(Overflow::Wrap, a, b)),
            Int2::SzextClamp => map2(f, mask, d, s, |a, b| szext(Overflow::Clamp, T, a, b)),
            Int2::SzextWrap => map2(f, mask, d, s, |a, b| szext(Overflow::Wrap, T, a, b)),
        }
    });
}

fn bmsk(mode: Overflow, a: u64, b: u64) -> u64 {
    u64::from(integer::bmsk(mode, a as u32, b as u32))
}

fn szext(mode: Overflow, ty: IntTy, a: u64, b: u64) -> u64 {
    u64::from(integer::szext(mode, ty.signed(), a as u32, b as u32))
}

pub(super) fn int3(f: &mut Frame, mask: u32, op: Int3, ty: IntTy, d: Slot, s: [Slot; 3]) {
    let bits = ty.bits();
    let word = |x: u32| u64::from(x);
    match op {
        Int3::MadLo => by_type!(ty, T => map3(f, mask, d, s, |a, b, c| {
            truncate(T.bits(), a.wrapping_mul(b).wrapping_add(c))
        })),
        Int3::MadWide => by_type!(ty, T => map3(f, mask, d, s, |a, b, c| {
            let product = T.extend(a).wrapping_mul(T.extend(b));
            truncate(2 * T.bits(), product.wrapping_add(c))
        })),
        Int3::MadHi | Int3::MadHiSat => map3(f, mask, d, s, |a, b, c| {
            let sat = op == Int3::MadHiSat;
            truncate(bits, integer::mad(MulPart::Hi, ty, a, b, c, sat))
        }),
        Int3::Mad24Lo | Int3::Mad24Hi => map3(f, mask, d, s, |a, b, c| {
            let hi = op == Int3::Mad24Hi;
            truncate(bits, integer::mad24(hi, ty, a, b, c, false))
        }),
        Int3::Sad => map3(f, mask, d, s, |a, b, c| truncate(bits, integer::sad(ty, a, b, c))),
        Int3::Bfe => map3(f, mask, d, s, |a, b, c| {
            truncate(bits, integer::bfe(ty, a, b as u32, c as u32))
        }),
        Int3::ShfLeftClamp | Int3::ShfLeftWrap | Int3::ShfRightClamp | Int3::ShfRightWrap => {
            let left = matches!(op, Int3::ShfLeftClamp | Int3::ShfLeftWrap);
            let clamp = matches!(op, Int3::ShfLeftClamp | Int3::ShfRightClamp);
            let mode = if clamp { Overflow::Clamp } else { Overflow::Wrap };
            map3(f, mask, d, s, |a, b, c| {
                word(integer::shf(left, mode, a as u32, b as u32, c as u32))
            });
        }
        Int3::Lop3(lut) => map3(f, mask, d, s, |a, b, c| {
            word(integer::lop3(a as u32, b as u32, c as u32, lut))
        }),
        Int3::Fns => map3(f, mask, d, s, |a, b, c| {
            word(integer::fns(a as u32, b as u32, c as i32))
        }),
        Int3::Prmt(mode) => map3(f, mask, d, s, |a, b, c| {
            word(integer::prmt(mode, a as u32, b as u32, c as u32))
        }),
        Int3::Dp4a(x, y) => map3(f, mask, d, s, |a, b, c| {
            word(integer::dp4a(x, y, a as u32, b as u32, c as u32))
        }),
        Int3::Dp2a(x, y, hi) => map3(f, mask, d, s, |a, b, c| {
            word(integer::dp2a(hi, x, y, a as u32, b as u32, c as u32))
        }),
        Int3::ScalarVideo(video) => map3(f, mask, d, s, |a, b, c| word(video.apply(a as u32, b as u32, c as u32))),
        Int3::Video(op, mode) => map3(f, mask, d, s, |a, b, c| {
            word(integer::video(op, mode, a as u32, b as u32, c as u32))
        }),
    }
}

pub(super) fn packed16(f: &mut Frame, mask: u32, what: (Packed, bool, bool), d: Slot, s: [Slot; 2]) {
    let (op, signed, relu) = what;
    let ty = if signed { IntTy::S16 } else { IntTy::U16 };
    map2(f, mask, d, s, |a, b| {
        let one = |x, y| match op {
            Packed::Add => integer::add(ty, x, y, false),
            Packed::Min => integer::min(ty, x, y, relu),
            Packed::Max => integer::max(ty, x, y, relu),
        };
        u64::from(integer::map16x2(a as u32, b as u32, one))
    });
}

pub(super) fn carry(f: &mut Frame, mask: u32, alu: &Alu) {
    let Alu::Carry {
        op,
        ty,
        reads_carry,
        writes_carry,
        dst,
        a,
        b,
        c,
    } = alu
    else {
        return;
    };
    let (x, y, z) = (*f.row(*a), *f.row(*b), *f.row(*c));
    for lane in lanes(mask) {
        let flag = *reads_carry && f.carry >> lane & 1 != 0;
        let (value, out) = match op {
            Carry::Add => integer::add_carry(*ty, x[lane], y[lane], flag),
            // The flag is the carry of a + !b + 1, so it is set if there was no borrow. ptxas compiles `addc` after
            // `sub.cc` to that, and nvcc's 128-bit division depends on it.
            Carry::Sub => {
                let (value, borrowed) = integer::sub_borrow(*ty, x[lane], y[lane], *reads_carry && !flag);
                (value, !borrowed)
            }
            Carry::MadLo => integer::mad_carry(MulPart::Lo, *ty, x[lane], y[lane], z[lane], flag),
            Carry::MadHi => integer::mad_carry(MulPart::Hi, *ty, x[lane], y[lane], z[lane], flag),
        };
        f.row_mut(*dst)[lane] = truncate(ty.bits(), value);
        if *writes_carry {
            f.carry = (f.carry & !(1 << lane)) | u32::from(out) << lane;
        }
    }
}
