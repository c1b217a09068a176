//! Definedness of arithmetic results. It is exact for moves, masks, selections and integer comparisons. A sum is
//! undefined in every bit that a carry may reach. Every other result is undefined as a whole, in packed f16x2 and
//! bf16x2 arithmetic each half by itself.

use super::{Flag, Registers, Row, Shadow, carried, combined, float_bits, float_elements, lanes, width};
use crate::isa::types::{IntTy, Pred, Slot};
use crate::isa::{Alu, BoolOp, Carry, Cmp, CmpTy, Instr, Int1, Int2, Int3};
use crate::memory::origin::Origin;
use crate::numeric::{bits, integer};

impl Shadow {
    pub(super) fn alu(&mut self, registers: &impl Registers, instr: &Instr, alu: &Alu, mask: u32) {
        let value = |slot: Slot, lane: usize| registers.value(slot)[lane];
        match alu {
            Alu::Mov { dst, src, bits } => self.write(*dst, &[*src], mask, false, |_, u| u[0] & width(*bits)),
            Alu::Pack { dst, parts, part_bits } => self.pack(*dst, parts, *part_bits, mask),
            Alu::Unpack { dsts, src, part_bits } => self.unpack(dsts, *src, *part_bits, mask),
            Alu::Int1 { op, ty, dst, a } => match op {
                Int1::Not => self.write(*dst, &[*a], mask, true, |_, u| u[0] & width(ty.bits())),
                _ => self.whole(*dst, &[*a], mask, 64),
            },
            Alu::Int2 { op, ty, dst, a, b } => {
                let shifts = matches!(op, Int2::Shl | Int2::Shr);
                let moves = shifts || matches!(op, Int2::And | Int2::Or);
                let (op, ty) = (*op, *ty);
                self.write(*dst, &[*a, *b], mask, !moves, |lane, u| {
                    let (x, y) = (value(*a, lane), value(*b, lane));
                    let undefined = int2(op, ty, [x, y], [u[0], u[1]]);
                    undefined & width(if op == Int2::MulWide { 64 } else { ty.bits() })
                });
            }
            Alu::Int3 { op, ty, dst, a, b, c } => {
                let moves = matches!(op, Int3::Bfe | Int3::Prmt(_) | Int3::Lop3(_))
                    || matches!(
                        op,
                        Int3::ShfLeftClamp | Int3::ShfLeftWrap | Int3::ShfRightClamp | Int3::ShfRightWrap
                    );
                let (op, ty) = (*op, *ty);
                self.write(*dst, &[*a, *b, *c], mask, !moves, |lane, u| {
                    let values = [value(*a, lane), value(*b, lane), value(*c, lane)];
                    int3(op, ty, values, [u[0], u[1], u[2]])
                });
            }
            Alu::Bfi {
                ty,
                dst,
                a,
                b,
                pos,
                len,
                ..
            } => {
                let ty = *ty;
                self.write(*dst, &[*a, *b, *pos, *len], mask, false, |lane, u| {
                    if u[2] | u[3] != 0 {
                        return width(ty.bits());
                    }
                    let (at, n) = (value(*pos, lane) as u32, value(*len, lane) as u32);
                    integer::bfi(ty, u[0], u[1], at, n) & width(ty.bits())
                });
            }
            Alu::Carry {
                op,
                ty,
                reads_carry,
                writes_carry,
                dst,
                a,
                b,
                c,
            } => {
                let third = matches!(op, Carry::MadLo | Carry::MadHi).then_some(*c);
                let mut sources = vec![*a, *b];
                sources.extend(third);
                let carry = if *reads_carry { self.carry } else { Flag::default() };
                let out: Vec<Option<Origin>> = (0..32)
                    .map(|lane| {
                        let open = carry.lanes >> lane & 1 != 0;
                        self.origin(&sources, lane).or(open.then_some(carry.origin[lane]))
                    })
                    .collect();
                for lane in lanes(mask) {
                    let origin = out[lane].map(|origin| Origin {
                        computed: true,
                        ..origin
                    });
                    let bits = if origin.is_some() { width(ty.bits()) } else { 0 };
                    self.set(*dst, lane, bits, origin.unwrap_or_default());
                    if *writes_carry {
                        self.carry.lanes = self.carry.lanes & !(1 << lane) | u32::from(origin.is_some()) << lane;
                        self.carry.origin[lane] = origin.unwrap_or_default();
                    }
                }
            }
            Alu::MovPred { dst, src } => {
                let flag = self.flag(*src);
                self.set_flag(*dst, mask, flag.lanes, |lane| flag.origin[lane]);
            }
            Alu::PredLogic { op, dst, a, b } => {
                let (x, y) = (self.flag(*a), self.flag(*b));
                let undefined = combined(*op, (of(registers, *a), x.lanes), (of(registers, *b), y.lanes));
                self.set_flag(*dst, mask, undefined, |lane| either(&x, &y, lane));
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
                let op = Int3::Lop3(*lut);
                let with = (if *or { BoolOp::Or } else { BoolOp::And }, *q);
                let mut holds = (0, Flag::default());
                let rows = [self.row(*a).bits, self.row(*b).bits, self.row(*c).bits];
                for lane in lanes(mask) {
                    let values = [value(*a, lane), value(*b, lane), value(*c, lane)];
                    let undefined = int3(op, IntTy::U32, values, [rows[0][lane], rows[1][lane], rows[2][lane]]);
                    let [x, y, z] = values.map(|v| v as u32);
                    let result = u64::from(bits::lop3(x, y, z, *lut));
                    let settled = result & !undefined != 0;
                    holds.0 |= u32::from(result != 0) << lane;
                    if undefined != 0 && !settled {
                        holds.1.lanes |= 1 << lane;
                        holds.1.origin[lane] = self.origin(&[*a, *b, *c], lane).unwrap_or_default();
                    }
                }
                self.write(*dst, &[*a, *b, *c], mask, false, |lane, u| {
                    let values = [value(*a, lane), value(*b, lane), value(*c, lane)];
                    int3(op, IntTy::U32, values, [u[0], u[1], u[2]])
                });
                self.compared(registers, *pred, mask, holds, Some(with));
            }
            Alu::Setp {
                cmp,
                ty,
                p,
                q,
                a,
                b,
                combine,
            } => {
                let open = self.comparison(registers, *cmp, *ty, [*a, *b], mask);
                // The values of floats are not known here, so none decides the combination by itself.
                let (yes, no) = match (ty, combine) {
                    (CmpTy::Int(ty), _) => {
                        let holds = compare_lanes(registers, *cmp, *ty, [*a, *b]);
                        (holds, !holds)
                    }
                    (CmpTy::Float(..), Some((BoolOp::Or, _))) => (0, 0),
                    (CmpTy::Float(..), _) => (u32::MAX, u32::MAX),
                };
                self.compared(registers, *p, mask, (yes, open), *combine);
                self.compared(registers, *q, mask, (no, open), *combine);
            }
            Alu::Set {
                cmp,
                ty,
                one,
                dst,
                a,
                b,
                combine,
            } => {
                let mut open = self.comparison(registers, *cmp, *ty, [*a, *b], mask);
                if let Some((_, pred)) = combine {
                    let flag = self.flag(*pred);
                    for lane in lanes(flag.lanes & mask) {
                        open.origin[lane] = flag.origin[lane];
                    }
                    open.lanes |= flag.lanes;
                }
                for lane in lanes(mask) {
                    let bits = if open.lanes >> lane & 1 != 0 {
                        *one | *one << 16
                    } else {
                        0
                    };
                    let origin = Origin {
                        computed: true,
                        ..open.origin[lane]
                    };
                    self.set(*dst, lane, bits, origin);
                }
            }
            Alu::Selp { dst, a, b, p } => {
                let (flag, choose) = (self.flag(*p), of(registers, *p));
                let origins: Vec<Option<Origin>> = lanes(u32::MAX)
                    .map(|lane| (flag.lanes >> lane & 1 != 0).then_some(flag.origin[lane]))
                    .collect();
                self.write(*dst, &[*a, *b], mask, false, |lane, u| {
                    if flag.lanes >> lane & 1 != 0 {
                        u[0] | u[1] | (value(*a, lane) ^ value(*b, lane))
                    } else if choose >> lane & 1 != 0 {
                        u[0]
                    } else {
                        u[1]
                    }
                });
                for lane in lanes(mask) {
                    if let (Some(origin), Some(row)) = (origins[lane], self.rows.get_mut(dst)) {
                        row.origin[lane] = Origin {
                            computed: true,
                            ..origin
                        };
                    }
                }
            }
            Alu::Slct { dst, a, b, c, .. } => self.write(*dst, &[*a, *b, *c], mask, false, |lane, u| {
                if u[2] != 0 {
                    u[0] | u[1] | (value(*a, lane) ^ value(*b, lane))
                } else if value(*c, lane) as i32 >= 0 {
                    u[0]
                } else {
                    u[1]
                }
            }),
            Alu::Float1 { ty, dst, a, .. } => {
                let ty = *ty;
                self.write(*dst, &[*a], mask, true, |_, u| float_elements(ty, u[0]));
            }
            Alu::Float2 { ty, dst, a, b, .. } => {
                let ty = *ty;
                self.write(*dst, &[*a, *b], mask, true, |_, u| float_elements(ty, u[0] | u[1]));
            }
            Alu::Fma { ty, dst, a, b, c, .. } => {
                let ty = *ty;
                self.write(*dst, &[*a, *b, *c], mask, true, |_, u| {
                    float_elements(ty, u[0] | u[1] | u[2])
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
                let bits = if to.bits() < *dst_bits { *dst_bits } else { to.bits() };
                match (to.int(), from.int()) {
                    (Some(to), Some(from)) if !mode.sat => self.write(*dst, &[*a], mask, false, |_, u| {
                        let extended = to.extend(from.extend(u[0] & width(from.bits())));
                        extended & width(bits)
                    }),
                    _ => self.whole(*dst, &[*a], mask, bits),
                }
            }
            Alu::CvtHalf2 { dst, a, b, .. } => self.write(*dst, &[*a, *b], mask, true, |_, u| {
                (u64::from(u[0] != 0) * 0xffff_0000) | (u64::from(u[1] != 0) * 0xffff)
            }),
            Alu::TestP { dst, a, .. } | Alu::Isspacep { dst, src: a, .. } => {
                let row = *self.row(*a);
                let open = lanes(mask)
                    .filter(|lane| row.bits[*lane] != 0)
                    .fold(0, |m, lane| m | 1 << lane);
                self.set_flag(*dst, mask, open, |lane| row.origin[lane]);
            }
            Alu::Relu32 { .. } | Alu::Packed16 { .. } | Alu::MinMax3 { .. } | Alu::CvtTf32 { .. } => {
                self.narrow(instr, mask, 32);
            }
            Alu::MixedFma { .. } | Alu::MixedAdd { .. } | Alu::CvtPack { .. } => self.narrow(instr, mask, 32),
            Alu::CvtFp8FromF32 { .. } | Alu::CvtFp8FromHalf2 { .. } => self.narrow(instr, mask, 16),
            Alu::CvtHalf2FromFp8 { .. } => self.narrow(instr, mask, 32),
            Alu::Clock { .. } | Alu::Cvta { .. } | Alu::Mapa { .. } | Alu::CtaRank { .. } => {
                self.narrow(instr, mask, 64)
            }
        }
    }

    /// Makes the whole result undefined if any bit of an operand is.
    fn narrow(&mut self, instr: &Instr, mask: u32, bits: u32) {
        for row in &instr.writes {
            self.whole(*row, &instr.reads, mask, bits);
        }
    }

    /// Returns the lanes in which a comparison depends on undefined bits.
    fn comparison(&self, registers: &impl Registers, cmp: Cmp, ty: CmpTy, s: [Slot; 2], mask: u32) -> Flag {
        let mut open = Flag::default();
        let rows = s.map(|slot| *self.row(slot));
        for lane in lanes(mask) {
            let undefined = [rows[0].bits[lane], rows[1].bits[lane]];
            let depends = match ty {
                CmpTy::Int(ty) => depends(cmp, ty, s.map(|slot| registers.value(slot)[lane]), undefined),
                CmpTy::Float(ty, _) => (undefined[0] | undefined[1]) & width(float_bits(ty)) != 0,
            };
            if depends {
                open.lanes |= 1 << lane;
                open.origin[lane] = self.origin(&s, lane).unwrap_or_default();
            }
        }
        open
    }

    /// Writes the predicate of a comparison, combined with another.
    fn compared(
        &mut self,
        registers: &impl Registers,
        dst: Slot,
        mask: u32,
        holds: (u32, Flag),
        with: Option<(BoolOp, Pred)>,
    ) {
        let (value, open) = holds;
        let Some((op, pred)) = with else {
            return self.set_flag(dst, mask, open.lanes, |lane| open.origin[lane]);
        };
        let other = self.flag(pred);
        let undefined = combined(op, (value, open.lanes), (of(registers, pred), other.lanes));
        self.set_flag(dst, mask, undefined, |lane| either(&open, &other, lane));
    }

    fn pack(&mut self, dst: Slot, parts: &[Slot], part_bits: u32, mask: u32) {
        let per_row = (64 / part_bits) as usize;
        let rows: Vec<Row> = parts.iter().map(|part| *self.row(*part)).collect();
        for (at, chunk) in (0..).zip(rows.chunks(per_row)) {
            for lane in lanes(mask) {
                let bits = chunk.iter().rev().fold(0u64, |acc, row| {
                    let part = row.bits[lane] & width(part_bits);
                    if part_bits == 64 { part } else { acc << part_bits | part }
                });
                let origin = chunk.iter().find(|row| row.bits[lane] != 0).map(|row| row.origin[lane]);
                self.set(dst + at, lane, bits, origin.unwrap_or_default());
            }
        }
    }

    fn unpack(&mut self, dsts: &[Slot], src: Slot, part_bits: u32, mask: u32) {
        let per_row = (64 / part_bits) as usize;
        let rows: Vec<Row> = (0..dsts.len().div_ceil(per_row) as u32)
            .map(|at| *self.row(src + at))
            .collect();
        for (index, dst) in dsts.iter().enumerate() {
            let row = &rows[index / per_row];
            let shift = (index % per_row) as u32 * part_bits;
            for lane in lanes(mask) {
                let bits = row.bits[lane] >> shift & width(part_bits);
                self.set(*dst, lane, bits, row.origin[lane]);
            }
        }
    }
}

fn of(registers: &impl Registers, pred: Pred) -> u32 {
    let value = registers.predicate(pred.slot);
    if pred.negated { !value } else { value }
}

fn either(x: &Flag, y: &Flag, lane: usize) -> Origin {
    let flag = if x.lanes >> lane & 1 != 0 { x } else { y };
    flag.origin[lane]
}

fn int2(op: Int2, ty: IntTy, values: [u64; 2], undefined: [u64; 2]) -> u64 {
    let ([a, b], [ua, ub]) = (values, undefined);
    if ua | ub == 0 {
        return 0;
    }
    match op {
        Int2::And => ua & ub | ua & b | ub & a,
        Int2::Or => ua & ub | ua & !b | ub & !a,
        Int2::Xor => ua | ub,
        Int2::Add | Int2::Sub | Int2::MulLo => carried(ua | ub),
        Int2::Shl if ub == 0 => bits::shl(ty, ua & width(ty.bits()), b as u32),
        Int2::Shr if ub == 0 => bits::shr(ty, ua & width(ty.bits()), b as u32),
        _ => u64::MAX,
    }
}

fn int3(op: Int3, ty: IntTy, values: [u64; 3], undefined: [u64; 3]) -> u64 {
    let ([a, b, c], [ua, ub, uc]) = (values, undefined);
    if ua | ub | uc == 0 {
        return 0;
    }
    let words = (ua as u32, ub as u32, c as u32);
    match op {
        Int3::Lop3(lut) => {
            let base = bits::lop3(a as u32, b as u32, c as u32, lut);
            let flipped = (0..8u64).map(|which| {
                let flip = |value: u64, undefined: u64, bit: u64| {
                    (value ^ if which >> bit & 1 != 0 { undefined } else { 0 }) as u32
                };
                bits::lop3(flip(a, ua, 0), flip(b, ub, 1), flip(c, uc, 2), lut)
            });
            u64::from(flipped.fold(0, |changed, result| changed | (result ^ base)))
        }
        Int3::Bfe if ub | uc == 0 => integer::bfe(ty, ua, b as u32, c as u32) & width(ty.bits()),
        Int3::Prmt(mode) if uc == 0 => u64::from(integer::prmt(mode, words.0, words.1, words.2)),
        Int3::MadLo => carried(ua | ub | uc) & width(ty.bits()),
        _ => width(if op == Int3::MadWide { 64 } else { ty.bits() }),
    }
}

/// Converts a value to an unsigned key with the order of the type.
fn key(ty: IntTy, value: u64) -> u64 {
    let value = ty.extend(value);
    if ty.signed() { value ^ 1 << 63 } else { value }
}

fn holds(cmp: Cmp, a: u64, b: u64) -> bool {
    match cmp {
        Cmp::Eq | Cmp::Equ => a == b,
        Cmp::Ne | Cmp::Neu => a != b,
        Cmp::Lt | Cmp::Ltu => a < b,
        Cmp::Le | Cmp::Leu => a <= b,
        Cmp::Gt | Cmp::Gtu => a > b,
        Cmp::Ge | Cmp::Geu => a >= b,
        Cmp::Num => true,
        Cmp::Nan => false,
    }
}

fn compare_lanes(registers: &impl Registers, cmp: Cmp, ty: IntTy, s: [Slot; 2]) -> u32 {
    let [a, b] = s.map(|slot| registers.value(slot));
    let lane = |lane: usize| u32::from(holds(cmp, key(ty, a[lane]), key(ty, b[lane]))) << lane;
    (0..32).fold(0, |m, at| m | lane(at))
}

/// Returns true if undefined bits can change the outcome of an integer comparison.
fn depends(cmp: Cmp, ty: IntTy, values: [u64; 2], undefined: [u64; 2]) -> bool {
    let undefined = undefined.map(|u| u & width(ty.bits()));
    if undefined == [0; 2] {
        return false;
    }
    let known = !(undefined[0] | undefined[1]) & width(ty.bits());
    let differs = (values[0] ^ values[1]) & known != 0;
    // The smallest and the largest value. A signed type has its sign bit inverted.
    let sign = if ty.signed() { 1 << (ty.bits() - 1) } else { 0 };
    let range = |value: u64, u: u64| {
        let least = value & !u | u & sign;
        let most = value & !(u & sign) | u & !sign;
        (key(ty, least), key(ty, most))
    };
    let ((a0, a1), (b0, b1)) = (range(values[0], undefined[0]), range(values[1], undefined[1]));
    match cmp {
        Cmp::Eq | Cmp::Equ | Cmp::Ne | Cmp::Neu => !differs,
        Cmp::Lt | Cmp::Ltu | Cmp::Ge | Cmp::Geu => !(a1 < b0 || a0 >= b1),
        Cmp::Le | Cmp::Leu | Cmp::Gt | Cmp::Gtu => !(a1 <= b0 || a0 > b1),
        Cmp::Num | Cmp::Nan => false,
    }
}
