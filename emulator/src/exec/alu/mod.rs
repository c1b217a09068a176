//! Integer arithmetic, logic, moves and conversions of one lane's registers.
//!
//! Each instruction is one loop over the rows of its operands. [`map`], [`map2`] and [`map3`] are that loop and take
//! the operation of one lane as a closure. With all lanes active it is a plain loop that the compiler can vectorise.

use super::float;
use super::warp::{FULL, Frame, Lanes, lanes};
use crate::isa::types::{FloatTy, IntTy, Pred, Slot};
use crate::isa::{Alu, BoolOp, Cmp, CmpTy};
use crate::numeric::cvt;
use crate::numeric::integer;

/// Expands `op` with the type known in each arm, so that the most frequent instructions are tight loops.
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

mod integers;

use integers::{carry, int1, int2, int3, packed16};

/// Keeps the low `bits` bits.
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

/// Returns the mask of the lanes in which `op` holds.
#[inline]
fn test2(f: &Frame, s: [Slot; 2], op: impl Fn(u64, u64) -> bool) -> u32 {
    let (x, y): (&Lanes, &Lanes) = (f.row(s[0]), f.row(s[1]));
    let mut out = 0;
    for lane in 0..32 {
        out |= u32::from(op(x[lane], y[lane])) << lane;
    }
    out
}

/// Executes an arithmetic instruction for the lanes of `mask`. The executor handles `Clock`, `Cvta` and the other
/// instructions that need more than registers.
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
            // On two halves the second predicate belongs to the upper half and is not the complement of the first.
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
            // Flushing a subnormal selector gives a zero of the same sign, and -0 >= 0 holds too.
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
        // A 128-bit register is two rows; the sources may be the same rows as the destination.
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

fn combine(op: BoolOp, a: u32, b: u32) -> u32 {
    match op {
        BoolOp::And => a & b,
        BoolOp::Or => a | b,
        BoolOp::Xor => a ^ b,
    }
}

/// Combines the comparison and its complement each with the predicate.
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
