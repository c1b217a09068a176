//! Integer arithmetic, logic, moves and conversions: what one lane does with its registers.
//!
//! Each instruction becomes one loop over the rows of its operands; [`map`] and its kin are that loop, and take
//! the meaning of one lane as a closure. With every lane active it is a plain loop the compiler can vectorise.

use super::float;
use super::warp::{FULL, Frame, Lanes, lanes};
use crate::decode::op::{Alu, BoolOp, Carry, Cmp, CmpTy, Int1, Int2, Int3, Packed};
use crate::decode::types::{FloatTy, IntTy, Pred, Slot};
use crate::numeric::cvt;
use crate::numeric::integer::{self, MulPart, Overflow};

/// The value in the low `bits` bits.
#[inline]
pub(super) fn truncate(bits: u32, value: u64) -> u64 {
    if bits >= 64 {
        value
    } else {
        value & ((1u64 << bits) - 1)
    }
}

#[inline]
pub(super) fn map(f: &mut Frame, mask: u32, d: Slot, a: Slot, op: impl Fn(u64) -> u64) {
    let x = *f.row(a);
    let out = f.row_mut(d);
    if mask == FULL {
        for lane in 0..32 {
            out[lane] = op(x[lane]);
        }
    } else {
        for lane in lanes(mask) {
            out[lane] = op(x[lane]);
        }
    }
}

#[inline]
pub(super) fn map2(f: &mut Frame, mask: u32, d: Slot, s: [Slot; 2], op: impl Fn(u64, u64) -> u64) {
    let (x, y) = (*f.row(s[0]), *f.row(s[1]));
    let out = f.row_mut(d);
    if mask == FULL {
        for lane in 0..32 {
            out[lane] = op(x[lane], y[lane]);
        }
    } else {
        for lane in lanes(mask) {
            out[lane] = op(x[lane], y[lane]);
        }
    }
}

#[inline]
pub(super) fn map3(f: &mut Frame, mask: u32, d: Slot, s: [Slot; 3], op: impl Fn(u64, u64, u64) -> u64) {
    let (x, y, z) = (*f.row(s[0]), *f.row(s[1]), *f.row(s[2]));
    let out = f.row_mut(d);
    if mask == FULL {
        for lane in 0..32 {
            out[lane] = op(x[lane], y[lane], z[lane]);
        }
    } else {
        for lane in lanes(mask) {
            out[lane] = op(x[lane], y[lane], z[lane]);
        }
    }
}

/// Bit mask of the lanes for which `op` holds.
#[inline]
fn test2(f: &Frame, s: [Slot; 2], op: impl Fn(u64, u64) -> bool) -> u32 {
    let (x, y): (&Lanes, &Lanes) = (f.row(s[0]), f.row(s[1]));
    let mut out = 0;
    for lane in 0..32 {
        out |= u32::from(op(x[lane], y[lane])) << lane;
    }
    out
}

/// Runs an arithmetic instruction for the lanes of `mask`. `Clock`, `Cvta` and the other instructions that look
/// beyond the registers are the executor's.
pub(super) fn execute(f: &mut Frame, mask: u32, alu: &Alu) {
    match alu {
        Alu::Mov { dst, src, bits } => {
            let bits = *bits;
            map(f, mask, *dst, *src, |a| truncate(bits, a));
        }
        Alu::MovPred { dst, src } => {
            let value = f.pred(*src);
            f.set_pred(*dst, mask, value);
        }
        Alu::Pack { dst, parts, part_bits } => pack(f, mask, *dst, parts, *part_bits),
        Alu::Unpack { dsts, src, part_bits } => unpack(f, mask, dsts, *src, *part_bits),
        Alu::Int1 { op, ty, dst, a } => int1(f, mask, *op, *ty, *dst, *a),
        Alu::Int2 { op, ty, dst, a, b } => int2(f, mask, *op, *ty, *dst, [*a, *b]),
        Alu::Int3 { op, ty, dst, a, b, c } => int3(f, mask, *op, *ty, *dst, [*a, *b, *c]),
        Alu::Relu32 { max, dst, a, b } => {
            let op = if *max { integer::max } else { integer::min };
            map2(f, mask, *dst, [*a, *b], |x, y| truncate(32, op(IntTy::S32, x, y, true)));
        }
        Alu::Bfi {
            ty,
            dst,
            a,
            b,
            pos,
            len,
        } => {
            let (pos, len) = (*f.row(*pos), *f.row(*len));
            let (x, y) = (*f.row(*a), *f.row(*b));
            let out = f.row_mut(*dst);
            for lane in lanes(mask) {
                let (at, n) = (pos[lane] as u32, len[lane] as u32);
                out[lane] = truncate(ty.bits(), integer::bfi(*ty, x[lane], y[lane], at, n));
            }
        }
        Alu::Packed16 {
            op,
            signed,
            relu,
            dst,
            a,
            b,
        } => packed16(f, mask, (*op, *signed, *relu), *dst, [*a, *b]),
        Alu::Carry { .. } => carry(f, mask, alu),
        Alu::PredLogic { op, dst, a, b } => {
            let value = combine(*op, f.pred(*a), f.pred(*b));
            f.set_pred(*dst, mask, value);
        }
        Alu::Lop3Pred {
            lut,
            or,
            dst,
            pred,
            a,
            b,
            c,
            q,
        } => {
            let lut = *lut;
            let of = |x, y, z| u64::from(integer::lop3(x as u32, y as u32, z as u32, lut));
            map3(f, mask, *dst, [*a, *b, *c], of);
            let nonzero = test2(f, [*dst, *dst], |x, _| x != 0);
            let op = if *or { BoolOp::Or } else { BoolOp::And };
            let value = combine(op, nonzero, f.pred(*q));
            f.set_pred(*pred, mask, value);
        }
        Alu::Setp {
            cmp,
            ty,
            p,
            q,
            a,
            b,
            combine: with,
        } => {
            let holds = compare(f, *cmp, *ty, [*a, *b]);
            let (yes, mut no) = combined(f, holds, *with);
            // On two halves the second predicate is the upper half's, not the opposite of the first.
            if let CmpTy::Float(halves @ (FloatTy::F16x2 | FloatTy::Bf16x2), ftz) = *ty {
                let upper = float::compare(f, *cmp, halves, ftz, [*a, *b], 1);
                no = combined(f, upper, *with).0;
            }
            f.set_pred(*p, mask, yes);
            f.set_pred(*q, mask, no);
        }
        Alu::Set {
            cmp,
            ty,
            one,
            dst,
            a,
            b,
            combine: with,
        } => set(f, mask, (*cmp, *ty, *one, *with), *dst, [*a, *b]),
        Alu::Selp { dst, a, b, p } => {
            let choose = f.pred(*p);
            let (x, y) = (*f.row(*a), *f.row(*b));
            let out = f.row_mut(*dst);
            for lane in 0..32 {
                if mask >> lane & 1 != 0 {
                    out[lane] = if choose >> lane & 1 != 0 { x[lane] } else { y[lane] };
                }
            }
        }
        Alu::Slct {
            float,
            ftz: _,
            dst,
            a,
            b,
            c,
        } => {
            // Flushing a subnormal selector gives a zero of the same sign, and -0 >= 0 too.
            let float = *float;
            map3(f, mask, *dst, [*a, *b, *c], |x, y, z| {
                let first = if float {
                    let value = f32::from_bits(z as u32);
                    value >= 0.0 || value.is_subnormal() && alu_ftz(alu)
                } else {
                    z as i32 >= 0
                };
                if first { x } else { y }
            });
        }
        Alu::Cvt {
            to,
            from,
            mode,
            dst_bits,
            dst,
            a,
        } => {
            let (to, from, mode, bits) = (*to, *from, *mode, *dst_bits);
            let signed = to.int().is_some_and(|ty| ty.signed());
            let to_bits = to.bits();
            map(f, mask, *dst, *a, |x| {
                let value = cvt::cvt(to, from, x, mode);
                // A signed result narrower than its register is sign-extended to it.
                if signed && to_bits < bits {
                    let shift = 64 - to_bits;
                    truncate(bits, ((value << shift) as i64 >> shift) as u64)
                } else {
                    truncate(to_bits, value)
                }
            });
        }
        Alu::CvtTf32 { mode, dst, a } => {
            let mode = *mode;
            map(f, mask, *dst, *a, |x| {
                u64::from(cvt::cvt_tf32_from_f32(f32::from_bits(x as u32), mode))
            });
        }
        Alu::CvtHalf2 { half, mode, dst, a, b } => {
            let (half, mode) = (*half, *mode);
            map2(f, mask, *dst, [*a, *b], |x, y| {
                let (x, y) = (f32::from_bits(x as u32), f32::from_bits(y as u32));
                u64::from(cvt::cvt_half2_from_f32(half, x, y, mode))
            });
        }
        Alu::CvtFp8FromF32 { kind, relu, dst, a, b } => {
            let (kind, relu) = (*kind, *relu);
            map2(f, mask, *dst, [*a, *b], |x, y| {
                let (x, y) = (f32::from_bits(x as u32), f32::from_bits(y as u32));
                u64::from(cvt::cvt_fp8x2_from_f32(kind, x, y, relu))
            });
        }
        Alu::CvtFp8FromHalf2 {
            kind,
            half,
            relu,
            dst,
            a,
        } => {
            let (kind, half, relu) = (*kind, *half, *relu);
            map(f, mask, *dst, *a, |x| {
                u64::from(cvt::cvt_fp8x2_from_half2(kind, half, x as u32, relu))
            });
        }
        Alu::CvtHalf2FromFp8 { kind, relu, dst, a } => {
            let (kind, relu) = (*kind, *relu);
            map(f, mask, *dst, *a, |x| {
                u64::from(cvt::cvt_f16x2_from_fp8x2(kind, x as u16, relu))
            });
        }
        Alu::CvtPack { to, dst, a, b, c } => {
            let to = *to;
            map3(f, mask, *dst, [*a, *b, *c], |x, y, z| {
                u64::from(cvt::cvt_pack(to, x as i32, y as i32, z as u32))
            });
        }
        Alu::Float1 { .. }
        | Alu::Float2 { .. }
        | Alu::MinMax3 { .. }
        | Alu::Fma { .. }
        | Alu::MixedFma { .. }
        | Alu::MixedAdd { .. }
        | Alu::TestP { .. } => float::execute(f, mask, alu),
        Alu::Clock { .. } | Alu::Cvta { .. } | Alu::Isspacep { .. } | Alu::Mapa { .. } | Alu::CtaRank { .. } => {
            unreachable!("the executor handles what looks beyond registers")
        }
    }
}

fn alu_ftz(alu: &Alu) -> bool {
    matches!(alu, Alu::Slct { ftz: true, .. })
}

fn pack(f: &mut Frame, mask: u32, dst: Slot, parts: &[Slot], part_bits: u32) {
    if part_bits == 64 {
        // A 128-bit register is two rows; its parts may be the rows it is made of.
        let rows: Vec<Lanes> = parts.iter().map(|p| *f.row(*p)).collect();
        for (at, row) in (0..).zip(&rows) {
            let out = f.row_mut(dst + at);
            for lane in lanes(mask) {
                out[lane] = row[lane];
            }
        }
        return;
    }
    let per_row = (64 / part_bits) as usize;
    let rows: Vec<Lanes> = parts.iter().map(|p| *f.row(*p)).collect();
    for (at, chunk) in (0..).zip(rows.chunks(per_row)) {
        let out = f.row_mut(dst + at);
        for lane in lanes(mask) {
            let parts = chunk.iter().rev();
            out[lane] = parts.fold(0, |acc, row| acc << part_bits | truncate(part_bits, row[lane]));
        }
    }
}

fn unpack(f: &mut Frame, mask: u32, dsts: &[Slot], src: Slot, part_bits: u32) {
    let per_row = (64 / part_bits) as usize;
    let rows = dsts.len().div_ceil(per_row);
    let rows: Vec<Lanes> = (0..rows as u32).map(|at| *f.row(src + at)).collect();
    for (index, dst) in dsts.iter().enumerate() {
        let row = &rows[index / per_row];
        let shift = (index % per_row) as u32 * part_bits;
        let out = f.row_mut(*dst);
        for lane in lanes(mask) {
            out[lane] = truncate(part_bits, row[lane] >> shift);
        }
    }
}

fn int1(f: &mut Frame, mask: u32, op: Int1, ty: IntTy, d: Slot, a: Slot) {
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

/// `op` with the type known in each arm, so that the commonest instructions are tight loops.
macro_rules! by_type {
    ($ty:expr, $t:ident => $body:expr) => {
        match $ty {
            IntTy::U32 => {
                const $t: IntTy = IntTy::U32;
                $body
            }
            IntTy::S32 => {
                const $t: IntTy = IntTy::S32;
                $body
            }
            IntTy::U64 => {
                const $t: IntTy = IntTy::U64;
                $body
            }
            IntTy::S64 => {
                const $t: IntTy = IntTy::S64;
                $body
            }
            IntTy::U16 => {
                const $t: IntTy = IntTy::U16;
                $body
            }
            IntTy::S16 => {
                const $t: IntTy = IntTy::S16;
                $body
            }
            IntTy::U8 => {
                const $t: IntTy = IntTy::U8;
                $body
            }
            IntTy::S8 => {
                const $t: IntTy = IntTy::S8;
                $body
            }
        }
    };
}

fn int2(f: &mut Frame, mask: u32, op: Int2, ty: IntTy, d: Slot, s: [Slot; 2]) {
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

fn int3(f: &mut Frame, mask: u32, op: Int3, ty: IntTy, d: Slot, s: [Slot; 3]) {
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
        Int3::Video(op, mode) => map3(f, mask, d, s, |a, b, c| {
            word(integer::video(op, mode, a as u32, b as u32, c as u32))
        }),
    }
}

fn packed16(f: &mut Frame, mask: u32, what: (Packed, bool, bool), d: Slot, s: [Slot; 2]) {
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

fn carry(f: &mut Frame, mask: u32, alu: &Alu) {
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
            // The flag is the carry of a + !b + 1, so it is set where nothing was borrowed: ptxas turns `addc` after
            // `sub.cc` into that, and nvcc's 128-bit division counts on it.
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

fn combine(op: BoolOp, a: u32, b: u32) -> u32 {
    match op {
        BoolOp::And => a & b,
        BoolOp::Or => a | b,
        BoolOp::Xor => a ^ b,
    }
}

/// The comparison and its complement, each combined with the predicate.
fn combined(f: &Frame, holds: u32, with: Option<(BoolOp, Pred)>) -> (u32, u32) {
    match with {
        None => (holds, !holds),
        Some((op, pred)) => {
            let pred = f.pred(pred);
            (combine(op, holds, pred), combine(op, !holds, pred))
        }
    }
}

fn compare(f: &Frame, cmp: Cmp, ty: CmpTy, s: [Slot; 2]) -> u32 {
    match ty {
        CmpTy::Float(ty, ftz) => float::compare(f, cmp, ty, ftz, s, 0),
        CmpTy::Int(ty) => by_type!(ty, T => {
            // Sign-extended values compare as i64, zero-extended ones as u64.
            let key = |x: u64| {
                let x = T.extend(x);
                if T.signed() { x ^ (1 << 63) } else { x }
            };
            match cmp {
                Cmp::Eq | Cmp::Equ => test2(f, s, |a, b| key(a) == key(b)),
                Cmp::Ne | Cmp::Neu => test2(f, s, |a, b| key(a) != key(b)),
                Cmp::Lt | Cmp::Ltu => test2(f, s, |a, b| key(a) < key(b)),
                Cmp::Le | Cmp::Leu => test2(f, s, |a, b| key(a) <= key(b)),
                Cmp::Gt | Cmp::Gtu => test2(f, s, |a, b| key(a) > key(b)),
                Cmp::Ge | Cmp::Geu => test2(f, s, |a, b| key(a) >= key(b)),
                Cmp::Num => FULL,
                Cmp::Nan => 0,
            }
        }),
    }
}

fn set(f: &mut Frame, mask: u32, what: (Cmp, CmpTy, u64, Option<(BoolOp, Pred)>), d: Slot, s: [Slot; 2]) {
    let (cmp, ty, one, with) = what;
    let low = compare(f, cmp, ty, s);
    let (low, _) = combined(f, low, with);
    let high = match ty {
        CmpTy::Float(ty @ (FloatTy::F16x2 | FloatTy::Bf16x2), ftz) => {
            let high = float::compare(f, cmp, ty, ftz, s, 1);
            Some(combined(f, high, with).0)
        }
        _ => None,
    };
    let out = f.row_mut(d);
    for lane in lanes(mask) {
        let mut value = if low >> lane & 1 != 0 { one } else { 0 };
        if high.is_some_and(|high| high >> lane & 1 != 0) {
            value |= one << 16;
        }
        out[lane] = value;
    }
}
