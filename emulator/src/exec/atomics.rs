//! `atom` and `red`: read, combine and write in one step.

use super::access::{Access, Act, Target, effective};
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::event::Effect;
use crate::isa::types::{FloatTy, IntTy};
use crate::isa::{AtomicOp, AtomicTy, Instr, Memory};
use crate::numeric::Rounding;
use crate::numeric::float16::{self, Half, HalfMode};
use crate::numeric::float32::{self, Mode};
use crate::numeric::float64;
use crate::numeric::minmax::{Extremum, MinMaxMode};
use crate::report::FindingKind;

/// Returns `op` applied to the old value, `b`, and for `cas` `c`.
pub(crate) fn combine(op: AtomicOp, ty: AtomicTy, old: u64, b: u64, c: u64) -> u64 {
    match ty {
        AtomicTy::Int(ty) => combine_int(op, ty, old, b, c),
        AtomicTy::Float(ty) => combine_float(op, ty, old, b),
        // Compare-and-swap of 128 bits is handled by its caller in halves; an exchange of one half is `b`.
        AtomicTy::B128 => b,
    }
}

fn combine_int(op: AtomicOp, ty: IntTy, old: u64, b: u64, c: u64) -> u64 {
    let (x, y) = (ty.extend(old), ty.extend(b));
    let less = if ty.signed() { (x as i64) < y as i64 } else { x < y };
    match op {
        AtomicOp::And => old & b,
        AtomicOp::Or => old | b,
        AtomicOp::Xor => old ^ b,
        AtomicOp::Cas => {
            if x == y {
                c
            } else {
                old
            }
        }
        AtomicOp::Exch => b,
        AtomicOp::Add => old.wrapping_add(b),
        AtomicOp::Inc => {
            if x >= y {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Dec => {
            if x == 0 || x > y {
                b
            } else {
                old - 1
            }
        }
        AtomicOp::Min => {
            if less {
                old
            } else {
                b
            }
        }
        AtomicOp::Max => {
            if less {
                b
            } else {
                old
            }
        }
    }
}

fn combine_float(op: AtomicOp, ty: FloatTy, old: u64, b: u64) -> u64 {
    let half = match ty {
        FloatTy::F32 => {
            let (x, y) = (f32::from_bits(old as u32), f32::from_bits(b as u32));
            return u64::from(float32::add(x, y, Mode::default()).to_bits());
        }
        FloatTy::F64 => {
            let (x, y) = (f64::from_bits(old), f64::from_bits(b));
            return float64::add(x, y, Rounding::NearestEven).to_bits();
        }
        FloatTy::F16 | FloatTy::F16x2 => Half::F16,
        FloatTy::Bf16 | FloatTy::Bf16x2 => Half::Bf16,
    };
    let of = |x, y| match op {
        AtomicOp::Min => half.min_max(Extremum::Min, x, y, MinMaxMode::default()),
        AtomicOp::Max => half.min_max(Extremum::Max, x, y, MinMaxMode::default()),
        _ => half.add(x, y, HalfMode::default()),
    };
    u64::from(float16::map2(old as u32, b as u32, of))
}

/// Returns the bytes of one element.
pub(crate) fn element_bytes(ty: AtomicTy) -> usize {
    match ty {
        AtomicTy::Int(ty) => ty.bits() as usize / 8,
        AtomicTy::Float(FloatTy::F16 | FloatTy::Bf16) => 2,
        AtomicTy::Float(FloatTy::F32 | FloatTy::F16x2 | FloatTy::Bf16x2) => 4,
        AtomicTy::Float(FloatTy::F64) => 8,
        AtomicTy::B128 => 16,
    }
}

impl<'m> Cluster<'m> {
    pub(super) fn atomic(&mut self, warp: &mut Warp, instr: &Instr, op: &Memory, mask: u32) -> Step {
        let Memory::Atomic {
            op,
            ty,
            order,
            addr,
            dsts,
            b,
            c,
        } = op
        else {
            return Ok(Flow::Next);
        };
        let base = *warp.frame().row(addr.base);
        let size = element_bytes(*ty);
        let total = if *ty == AtomicTy::B128 { 16 } else { size * b.len() };
        let site = self.site(warp);
        for lane in lanes(mask) {
            let access = Access {
                lane,
                address: effective(addr, base[lane]),
                space: addr.space,
                bytes: total,
                align: total.next_power_of_two() as u64,
                write: true,
            };
            let Some(target) = self.locate(warp, instr, access)? else {
                continue;
            };
            let mut taken = Vec::new();
            if self.lacks(warp, lane, target, total) {
                // An exchange only moves the old value; every other operation computes with it.
                let read = (0..total).step_by(size.min(8));
                taken = read
                    .map(|at| self.undefined(warp, lane, target, (at, size.min(8)), instr.line))
                    .collect();
                if *op != AtomicOp::Exch {
                    taken.clear();
                    let actor = self.actor(warp);
                    let place = (Some(lane), Some(access.address));
                    self.report(FindingKind::Uninitialized, instr.line, actor, place, || {
                        format!("atomic operation on {total} bytes, some of which were never written")
                    });
                }
            }
            let returns = dsts.is_some();
            let act = Act {
                effect: Effect::Update { returns },
                order: *order,
                ..Act::of(access)
            };
            self.observe(warp, instr, site, access, target, act);
            self.count_atomic(access, target, returns);
            self.counters.atomics += 1;
            if let Target::Param { .. } = target {
                continue;
            }
            if *ty == AtomicTy::B128 {
                self.atomic_wide(warp, lane, target, *op, [dsts.as_deref(), Some(b), Some(c)]);
            }
            let elements = if *ty == AtomicTy::B128 { 0 } else { b.len() };
            for index in 0..elements {
                let operand = warp.frame().row(b[index])[lane];
                let swap = c.get(index).map_or(0, |c| warp.frame().row(*c)[lane]);
                let f = |old: u64| combine(*op, *ty, old, operand, swap);
                let old = self.update(warp, lane, target, index * size, size, f);
                if let Some(dsts) = dsts {
                    warp.frame_mut().row_mut(dsts[index])[lane] = old;
                }
            }
            for (dst, (bits, origin)) in dsts.iter().flatten().zip(taken) {
                warp.frame_mut().set_undefined(*dst, lane, bits, origin);
            }
        }
        Ok(Flow::Next)
    }

    /// Counts the bytes of an atomic operation on global memory, and marks them as written.
    fn count_atomic(&mut self, access: Access, target: Target, returns: bool) {
        if let Target::Global { allocation, at } = target {
            self.counters.global_read_bytes += access.bytes as u64 * u64::from(returns);
            self.counters.global_written_bytes += access.bytes as u64;
            self.counters.global_written_sectors += 1;
            self.ctx.view.allocations[allocation].mark(at, access.bytes);
        }
    }

    /// Replaces up to 8 bytes by `f` applied to them; returns the old value.
    pub fn update(
        &mut self,
        warp: &mut Warp,
        lane: usize,
        target: Target,
        offset: usize,
        bytes: usize,
        f: impl Fn(u64) -> u64,
    ) -> u64 {
        if let Target::Global { allocation, at } = target {
            return self.ctx.view.allocations[allocation].update(at + offset, bytes, f);
        }
        let old = self.peek(warp, lane, target, offset, bytes);
        self.poke(warp, lane, target, offset, bytes, f(old));
        old
    }

    /// Performs a 128-bit `exch` or `cas`. Kernels with such instructions run on one host thread, so the two words
    /// change in one step.
    fn atomic_wide(&mut self, warp: &mut Warp, lane: usize, target: Target, op: AtomicOp, rows: [Option<&[u32]>; 3]) {
        let [dsts, b, c] = rows;
        let read = |warp: &Warp, rows: Option<&[u32]>| {
            let at = |index| rows.and_then(|r: &[u32]| r.get(index)).copied().unwrap_or(0);
            [at(0), at(1)].map(|slot| warp.frame().row(slot)[lane])
        };
        let (b, c) = (read(warp, b), read(warp, c));
        let old = [0, 8].map(|offset| self.peek(warp, lane, target, offset, 8));
        let new = match op {
            AtomicOp::Cas if old == b => c,
            AtomicOp::Cas => old,
            _ => b,
        };
        for (index, value) in new.into_iter().enumerate() {
            self.poke(warp, lane, target, index * 8, 8, value);
        }
        for (dst, value) in dsts.unwrap_or(&[]).iter().zip(old) {
            warp.frame_mut().row_mut(*dst)[lane] = value;
        }
    }
}
