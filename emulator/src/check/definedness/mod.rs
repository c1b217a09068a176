//! Definedness of values, tracked as in Valgrind's memcheck: one bit for every bit of a register.
//!
//! A read of bytes that were never written is not a finding. It makes these bits of its destination undefined, and
//! also the bits of results that the undefined bits can change: `and` with a defined zero is defined, and so is a
//! comparison with the same outcome for all values of the undefined bits. A finding is made where the program depends
//! on an undefined bit: a guard, such as that of a branch; an address; an operand of an atomic, barrier, asynchronous
//! or tensor-core operation; or a store to global memory of a value that was computed from it. Bits that were only
//! moved may be stored anywhere, and stay undefined there.
//!
//! A frame has a [`Shadow`] only while one of its registers is undefined. A kernel without undefined values pays one
//! test an instruction.

mod alu;

use std::collections::HashMap;

use crate::isa::types::{FloatTy, PRED_SINK, PRED_TRUE, Pred, SINK, Slot};
use crate::isa::{Alu, BoolOp, Control, Instr, Memory, Op, TensorOp, WarpOp, WmmaOp};
use crate::isa::{VoteMode, WgmmaA, WgmmaOp};
use crate::memory::origin::Origin;
use crate::tensor::matrix;

type Lanes = [u64; 32];

/// Read access to the executor's registers.
pub(crate) trait Registers {
    fn value(&self, slot: Slot) -> &Lanes;
    fn predicate(&self, slot: Slot) -> u32;
}

/// Undefined bits of a register in every lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub bits: Lanes,
    pub origin: [Origin; 32],
}

const DEFINED: Row = Row {
    bits: [0; 32],
    origin: [Origin {
        line: 0,
        computed: false,
    }; 32],
};

#[derive(Debug, Clone, Copy, Default)]
struct Flag {
    lanes: u32,
    origin: [Origin; 32],
}

/// A use of an undefined value that affects the program's behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    pub lane: usize,
    pub origin: Origin,
    pub what: &'static str,
}

/// Undefined registers of a frame.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    rows: HashMap<Slot, Box<Row>>,
    flags: HashMap<Slot, Flag>,
    carry: Flag,
}

/// Returns a mask of the low `bits` bits.
fn width(bits: u32) -> u64 {
    u64::MAX >> (64 - bits.clamp(1, 64))
}

/// Returns the lowest set bit and all bits above it, which a carry can reach.
fn carried(bits: u64) -> u64 {
    bits | bits.wrapping_neg()
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

fn float_bits(ty: FloatTy) -> u32 {
    match ty {
        FloatTy::F16 | FloatTy::Bf16 => 16,
        FloatTy::F16x2 | FloatTy::Bf16x2 | FloatTy::F32 => 32,
        FloatTy::F64 => 64,
    }
}

/// Widens the undefined bits of floats of type `ty` to whole elements: a computed element is undefined as a whole.
fn float_elements(ty: FloatTy, undefined: u64) -> u64 {
    match ty {
        FloatTy::F16x2 | FloatTy::Bf16x2 => [0xffff, 0xffff_0000].iter().filter(|h| undefined & **h != 0).sum(),
        _ if undefined & width(float_bits(ty)) != 0 => width(float_bits(ty)),
        _ => 0,
    }
}

/// Returns the undefined lanes of a combination of two predicates, each given as values and undefined lanes.
fn combined(op: BoolOp, a: (u32, u32), b: (u32, u32)) -> u32 {
    let ((a, ua), (b, ub)) = (a, b);
    match op {
        BoolOp::And => ua & ub | ua & b | ub & a,
        BoolOp::Or => ua & ub | ua & !b | ub & !a,
        BoolOp::Xor => ua | ub,
    }
}

impl Shadow {
    /// Returns true if every register is defined.
    pub fn is_clear(&self) -> bool {
        self.rows.is_empty() && self.flags.is_empty() && self.carry.lanes == 0
    }

    /// Returns the undefined bits of a register.
    pub fn row(&self, slot: Slot) -> &Row {
        self.rows.get(&slot).map_or(&DEFINED, |row| row)
    }

    /// Sets one lane of a register.
    pub fn set(&mut self, slot: Slot, lane: usize, undefined: u64, origin: Origin) {
        if slot == SINK {
            return;
        }
        if undefined != 0 {
            let row = self.rows.entry(slot).or_insert_with(|| Box::new(DEFINED));
            row.bits[lane] = undefined;
            row.origin[lane] = origin;
        } else if let Some(row) = self.rows.get_mut(&slot) {
            row.bits[lane] = 0;
            if row.bits == [0; 32] {
                self.rows.remove(&slot);
            }
        }
    }

    fn clear(&mut self, slot: Slot, mask: u32) {
        if self.rows.contains_key(&slot) {
            for lane in lanes(mask) {
                self.set(slot, lane, 0, Origin::default());
            }
        }
    }

    fn flag(&self, pred: Pred) -> Flag {
        self.flags.get(&pred.slot).copied().unwrap_or_default()
    }

    fn set_flag(&mut self, slot: Slot, mask: u32, undefined: u32, origin: impl Fn(usize) -> Origin) {
        if slot == PRED_SINK || slot == PRED_TRUE {
            return;
        }
        if undefined & mask == 0 && !self.flags.contains_key(&slot) {
            return;
        }
        let flag = self.flags.entry(slot).or_default();
        flag.lanes = flag.lanes & !mask | undefined & mask;
        for lane in lanes(undefined & mask) {
            flag.origin[lane] = origin(lane);
        }
        if flag.lanes == 0 {
            self.flags.remove(&slot);
        }
    }

    /// Returns the origin of the first of these registers that is undefined in a lane.
    fn origin(&self, slots: &[Slot], lane: usize) -> Option<Origin> {
        let mut rows = slots.iter().map(|slot| self.row(*slot));
        rows.find(|row| row.bits[lane] != 0).map(|row| row.origin[lane])
    }

    /// Writes lanes of a register. `f` computes a lane's undefined bits from those of the sources. All lanes are read
    /// before the first is written.
    fn write(&mut self, dst: Slot, sources: &[Slot], mask: u32, computed: bool, f: impl Fn(usize, &[u64]) -> u64) {
        let mut results = [(0, Origin::default()); 32];
        let mut undefined = [0; 8];
        for lane in lanes(mask) {
            let n = sources.len().min(undefined.len());
            for (bits, slot) in undefined.iter_mut().zip(sources) {
                *bits = self.row(*slot).bits[lane];
            }
            let origin = self.origin(sources, lane).unwrap_or_default();
            let computed = computed || origin.computed;
            results[lane] = (f(lane, &undefined[..n]), Origin { computed, ..origin });
        }
        for lane in lanes(mask) {
            self.set(dst, lane, results[lane].0, results[lane].1);
        }
    }

    /// Makes `bits` of `dst` undefined in the lanes where any bit of a source is.
    fn whole(&mut self, dst: Slot, sources: &[Slot], mask: u32, bits: u32) {
        let any = |u: &[u64]| u.iter().any(|u| *u != 0);
        self.write(dst, sources, mask, true, |_, u| if any(u) { width(bits) } else { 0 });
    }

    /// Records uses of registers that must be defined. Undefined ones count as defined afterwards, so that one
    /// mistake gives one finding.
    fn consume(&mut self, slots: &[Slot], mask: u32, what: &'static str, found: &mut Vec<Use>) {
        for lane in lanes(mask) {
            if let Some(origin) = self.origin(slots, lane) {
                found.push(Use { lane, origin, what });
            }
        }
        for slot in slots {
            self.clear(*slot, mask);
        }
    }

    fn consume_flag(&mut self, pred: Pred, mask: u32, what: &'static str, found: &mut Vec<Use>) {
        let flag = self.flag(pred);
        for lane in lanes(flag.lanes & mask) {
            let origin = flag.origin[lane];
            found.push(Use { lane, origin, what });
        }
        self.set_flag(pred.slot, mask, 0, |_| Origin::default());
    }

    /// Follows an instruction that the lanes of `group` are about to execute, where its guard allows it. Loads,
    /// stores and calls update the definedness of the data they move elsewhere.
    pub fn execute(&mut self, registers: &impl Registers, instr: &Instr, group: u32, found: &mut Vec<Use>) {
        let mut mask = group;
        let mut doubtful = None;
        if let Some(guard) = instr.guard {
            let flag = self.flag(guard);
            let calculates = matches!(&instr.op, Op::Alu(_) | Op::Memory(Memory::Load { .. }));
            if flag.lanes & group != 0 && calculates {
                doubtful = Some(flag);
            } else if flag.lanes & group != 0 {
                let what = match &instr.op {
                    Op::Control(Control::Bra { .. }) => "decides a branch",
                    _ => "decides whether the instruction is executed",
                };
                self.consume_flag(guard, group, what, found);
            }
            let value = registers.predicate(guard.slot);
            mask &= if guard.negated { !value } else { value };
        }
        match &instr.op {
            Op::Alu(alu) => self.alu(registers, instr, alu, mask),
            Op::Memory(Memory::Load { addr, dsts, .. }) => {
                self.consume(&[addr.base], mask, "is an address", found);
                for dst in dsts {
                    self.clear(*dst, mask);
                }
            }
            Op::Memory(Memory::Store { addr, .. }) | Op::Tensor(TensorOp::Stmatrix { addr, .. }) => {
                self.consume(&[addr.base], mask, "is an address", found);
            }
            Op::Tensor(TensorOp::Ldmatrix { addr, dsts, .. }) => {
                self.consume(&[addr.base], mask, "is an address", found);
                for dst in dsts {
                    self.clear(*dst, mask);
                }
            }
            Op::Wmma(WmmaOp::Move {
                addr,
                stride,
                rows,
                store,
                ..
            }) => {
                self.consume(&[addr.base], mask, "is an address", found);
                self.consume(&stride.iter().copied().collect::<Vec<_>>(), mask, "is a stride", found);
                for row in rows.iter().filter(|_| !store) {
                    self.clear(*row, mask);
                }
            }
            Op::Tensor(TensorOp::Movmatrix { dst, src }) => self.transpose(*dst, *src),
            Op::Wgmma(WgmmaOp::Mma(op)) => {
                let mut operands = vec![op.b];
                match &op.a {
                    WgmmaA::Descriptor(slot) => operands.push(*slot),
                    WgmmaA::Registers(rows) => operands.extend(rows),
                }
                let scale = registers.predicate(op.scale_d.slot);
                if scale != 0 && !op.scale_d.negated || scale != u32::MAX && op.scale_d.negated {
                    operands.extend(&op.d);
                }
                self.consume_flag(op.scale_d, mask, "decides a tensor-core operation", found);
                self.consume(&operands, mask, "is an operand of a tensor-core operation", found);
                for row in &op.d {
                    self.clear(*row, mask);
                }
            }
            Op::Control(Control::Call { target, .. }) => {
                if let crate::isa::CallTarget::Indirect(slot) = target {
                    self.consume(&[*slot], mask, "is the function that is called", found);
                }
            }
            Op::Warp(op) => self.warp(registers, op, mask, found),
            Op::Barrier(crate::isa::BarrierOp::Red { src, .. }) => {
                self.consume_flag(*src, mask, "is voted on at a barrier", found);
                self.others(instr, mask, found);
            }
            _ => self.others(instr, mask, found),
        }
        if let Some(flag) = doubtful {
            self.doubt(instr, group & flag.lanes, &flag);
        }
    }

    /// Handles any other instruction: the registers it reads must be defined.
    fn others(&mut self, instr: &Instr, mask: u32, found: &mut Vec<Use>) {
        let what = match &instr.op {
            Op::Memory(Memory::Atomic { .. }) => "is an operand of an atomic operation",
            Op::Tensor(_) | Op::Wmma(_) | Op::Wgmma(_) => "is an operand of a tensor-core operation",
            Op::Control(Control::Brx { .. }) => "decides a branch",
            Op::Async(_) => "is an operand of an asynchronous operation",
            _ => "is an operand",
        };
        self.consume(&instr.reads, mask, what, found);
        for row in &instr.writes {
            self.clear(*row, mask);
        }
    }

    /// Makes the results undefined in lanes whose guard is undefined: whether they executed the instruction is
    /// unknown.
    fn doubt(&mut self, instr: &Instr, mask: u32, guard: &Flag) {
        let computed = |origin: Origin| Origin {
            computed: true,
            ..origin
        };
        for lane in lanes(mask) {
            for row in &instr.writes {
                self.set(*row, lane, u64::MAX, computed(guard.origin[lane]));
            }
        }
        let flags = match &instr.op {
            Op::Alu(Alu::MovPred { dst, .. } | Alu::PredLogic { dst, .. } | Alu::TestP { dst, .. }) => {
                [*dst, PRED_SINK]
            }
            Op::Alu(Alu::Isspacep { dst, .. }) => [*dst, PRED_SINK],
            Op::Alu(Alu::Lop3Pred { pred, .. }) => [*pred, PRED_SINK],
            Op::Alu(Alu::Setp { p, q, .. }) => [*p, *q],
            _ => return,
        };
        for slot in flags {
            self.set_flag(slot, mask, mask, |lane| computed(guard.origin[lane]));
        }
    }

    fn transpose(&mut self, dst: Slot, src: Slot) {
        let row = *self.row(src);
        let Some(origin) = self.origin_in_warp(src) else {
            return self.clear(dst, u32::MAX);
        };
        let moved = matrix::transpose(&row.bits.map(|bits| bits as u32));
        for (lane, bits) in moved.into_iter().enumerate() {
            self.set(dst, lane, u64::from(bits), origin);
        }
    }

    fn origin_in_warp(&self, slot: Slot) -> Option<Origin> {
        let row = self.row(slot);
        (0..32).find(|lane| row.bits[*lane] != 0).map(|lane| row.origin[lane])
    }

    fn warp(&mut self, registers: &impl Registers, op: &WarpOp, mask: u32, found: &mut Vec<Use>) {
        match op {
            WarpOp::Shfl {
                mode,
                dst,
                p,
                a,
                b,
                c,
                members,
            } => {
                self.consume(&[*members, *b, *c], mask, "decides a shuffle", found);
                let row = *self.row(*a);
                let (bits, _) = mode.shuffle(&row.bits, registers.value(*b), registers.value(*c), mask);
                let origin = self.origin_in_warp(*a).unwrap_or_default();
                for lane in lanes(mask) {
                    self.set(*dst, lane, bits[lane], origin);
                }
                self.set_flag(*p, mask, 0, |_| Origin::default());
            }
            WarpOp::Vote {
                mode,
                dst,
                src,
                members,
            } => {
                self.consume(&[*members], mask, "decides a vote", found);
                let flag = self.flag(*src);
                let undefined = flag.lanes & mask;
                let origin = lanes(undefined)
                    .next()
                    .map(|lane| flag.origin[lane])
                    .unwrap_or_default();
                let origin = Origin {
                    computed: true,
                    ..origin
                };
                if *mode == VoteMode::Ballot {
                    for lane in lanes(mask) {
                        self.set(*dst, lane, u64::from(undefined), origin);
                    }
                    return;
                }
                let value = registers.predicate(src.slot) ^ if src.negated { u32::MAX } else { 0 };
                let sure = mask & !undefined;
                let settled = match mode {
                    VoteMode::All => sure & !value != 0,
                    VoteMode::Any => sure & value != 0,
                    _ => sure & !value != 0 && sure & value != 0,
                };
                let open = if undefined == 0 || settled { 0 } else { mask };
                self.set_flag(*dst, mask, open, |_| origin);
            }
            WarpOp::MatchAny { dst, a, members, .. } | WarpOp::Redux { dst, a, members, .. } => {
                self.consume(&[*members], mask, "decides an exchange of the warp", found);
                self.gathered(*dst, *a, mask);
            }
            WarpOp::MatchAll { dst, p, a, members, .. } => {
                self.consume(&[*members], mask, "decides an exchange of the warp", found);
                let open = self.gathered(*dst, *a, mask);
                self.set_flag(*p, mask, if open.is_some() { mask } else { 0 }, |_| {
                    open.unwrap_or_default()
                });
            }
            WarpOp::Elect { dst, p, members } => {
                self.consume(&[*members], mask, "decides an exchange of the warp", found);
                self.clear(*dst, mask);
                self.set_flag(*p, mask, 0, |_| Origin::default());
            }
            WarpOp::Activemask { dst } => self.clear(*dst, mask),
            WarpOp::Sync { members } => self.consume(&[*members], mask, "decides a barrier", found),
        }
    }

    /// Writes a result that depends on `a` in all lanes; returns the origin if it is undefined.
    fn gathered(&mut self, dst: Slot, a: Slot, mask: u32) -> Option<Origin> {
        let origin = lanes(mask).find_map(|lane| self.origin(&[a], lane));
        let origin = origin.map(|origin| Origin {
            computed: true,
            ..origin
        });
        for lane in lanes(mask) {
            let bits = if origin.is_some() { width(32) } else { 0 };
            self.set(dst, lane, bits, origin.unwrap_or_default());
        }
        origin
    }
}
