//! Loads, stores, atomics and fences.

use super::convert::SPACES;
use super::modifiers::Modifiers;
use super::operand::{Dst, count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Addr, Order, Slot, Space, Ty};
use crate::isa::{AtomicOp, AtomicTy, Memory, Op};
use crate::parse::ast::{Instruction, Operand};

type Decoded = Result<Option<Op>, Failure>;

/// Takes cache-hint modifiers.
pub(super) fn take_cache_hints(m: &mut Modifiers<'_>) {
    for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"] {
        m.take(hint);
    }
    while m
        .find(|w| (w.starts_with("L1::") || w.starts_with("L2::") || w.starts_with("level::")).then_some(()))
        .is_some()
    {}
}

/// Takes the memory-ordering modifiers and the scope.
fn order(m: &mut Modifiers<'_>) -> Order {
    let mut order = Order::Weak;
    for word in ["volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"] {
        if m.take(word) {
            let releases = matches!(word, "release" | "acq_rel");
            order = if releases { Order::Release } else { Order::Relaxed };
        }
    }
    m.take("weak");
    for scope in ["cta", "cluster", "gpu", "sys"] {
        m.take(scope);
    }
    order
}

pub(super) fn space(m: &mut Modifiers<'_>) -> Space {
    m.one_of(SPACES).unwrap_or(Space::Generic)
}

pub(super) const ATOMICS: &[(&str, AtomicOp)] = &[
    ("and", AtomicOp::And),
    ("or", AtomicOp::Or),
    ("xor", AtomicOp::Xor),
    ("cas", AtomicOp::Cas),
    ("exch", AtomicOp::Exch),
    ("add", AtomicOp::Add),
    ("inc", AtomicOp::Inc),
    ("dec", AtomicOp::Dec),
    ("min", AtomicOp::Min),
    ("max", AtomicOp::Max),
];

/// Returns the type of an atomic operation, if it exists for this operation.
pub(super) fn atomic_ty(op: AtomicOp, ty: Ty) -> Result<AtomicTy, Failure> {
    if ty == Ty::B128 && matches!(op, AtomicOp::Cas | AtomicOp::Exch) {
        return Ok(AtomicTy::B128);
    }
    if let Some(float) = ty.float() {
        let extremum = matches!(op, AtomicOp::Min | AtomicOp::Max);
        let half = !matches!(ty, Ty::F32 | Ty::F64);
        if op == AtomicOp::Add || (extremum && half) {
            return Ok(AtomicTy::Float(float));
        }
        return fail("this operation does not exist for floats");
    }
    match ty.int() {
        Some(int) if int.bits() >= 16 => Ok(AtomicTy::Int(int)),
        _ => fail("the type is not known"),
    }
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn memory(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let op = match i.opcode {
            "ld" | "ldu" => self.load(i, m)?,
            "st" => self.store(i, m)?,
            "atom" => self.atomic(i, m, true)?,
            "red" if !m.take("async") => self.atomic(i, m, false)?,
            "red" => return self.red_async(i, m).map(Some),
            "fence" | "membar" => self.fence(i, m)?,
            "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                self.prefetch(i, m)?;
                Op::Nop
            }
            "createpolicy" => {
                // Cache policies have no effect here; the result is only ever passed on as a hint.
                while m.next().is_some() {}
                let dst = self.dst_of(operand(i, 0)?, Ty::B64)?;
                let src = self.constant(0);
                Op::Alu(crate::isa::Alu::Mov { dst, src, bits: 64 })
            }
            _ => return Ok(None),
        };
        Ok(Some(op))
    }

    fn prefetch(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<(), Failure> {
        m.take("tensormap");
        for level in ["L1", "L2"] {
            m.take(level);
        }
        take_cache_hints(m);
        let space = space(m);
        self.addr(operand(i, 0)?, space)?;
        Ok(())
    }

    /// Takes the vector length and element type: `.v4.f32`.
    fn shape(&self, m: &mut Modifiers<'a>) -> Result<(usize, Ty), Failure> {
        let vector = m.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
        let ty = m.ty()?;
        if ty == Ty::Pred {
            return fail("predicates cannot be in memory");
        }
        Ok((vector, ty))
    }

    fn load(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        take_cache_hints(m);
        let order = order(m);
        let space = space(m);
        m.take("unified");
        let hinted = i.modifiers.contains(&"L2::cache_hint");
        let (vector, ty) = self.shape(m)?;
        count(i, 2..=2 + usize::from(hinted))?;
        let mut dsts = self.dsts(operand(i, 0)?)?;
        if dsts.len() != vector {
            return fail("the number of destinations is not that of the vector");
        }
        let wide_enough = |d: &Dst| d.bits >= ty.bits().max(8);
        if !dsts.iter().all(wide_enough) {
            return fail("a destination register is narrower than the type");
        }
        let mut bytes = ty.bytes();
        if ty == Ty::B128 {
            dsts = split_wide(&dsts);
            bytes = 8;
        }
        let dst_bits = dsts.iter().map(|d| d.bits).min().unwrap_or(64);
        Ok(Op::Memory(Memory::Load {
            addr: self.addr(operand(i, 1)?, space)?,
            order,
            bytes,
            signed: ty.signed(),
            dst_bits,
            dsts: dsts.iter().map(|d| d.slot).collect(),
            guess: false,
        }))
    }

    fn store(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        if m.take("async") {
            return self.st_async(i, m);
        }
        take_cache_hints(m);
        if m.take("bulk") {
            return fail("`st.bulk` is not known");
        }
        let order = order(m);
        let space = space(m);
        let hinted = i.modifiers.contains(&"L2::cache_hint");
        let (vector, ty) = self.shape(m)?;
        count(i, 2..=2 + usize::from(hinted))?;
        let mut srcs = self.srcs(operand(i, 1)?, ty)?;
        if srcs.len() != vector {
            return fail("the number of sources is not that of the vector");
        }
        let mut bytes = ty.bytes();
        if ty == Ty::B128 {
            srcs = srcs.iter().flat_map(|s| [*s, *s + 1]).collect();
            bytes = 8;
        }
        Ok(Op::Memory(Memory::Store {
            addr: self.addr(operand(i, 0)?, space)?,
            order,
            bytes,
            srcs: srcs.into(),
        }))
    }

    fn atomic(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, returns: bool) -> Result<Op, Failure> {
        take_cache_hints(m);
        let order = match order(m) {
            Order::Weak => Order::Relaxed,
            strong => strong,
        };
        let space = space(m);
        let op = m.need("the operation", ATOMICS)?;
        m.take("noftz");
        let vector = m.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
        let ty = m.ty()?;
        let kind = atomic_ty(op, ty)?;
        let at = usize::from(returns);
        let hinted = i.modifiers.contains(&"L2::cache_hint");
        let n = at + 2 + usize::from(op == AtomicOp::Cas);
        count(i, n..=n + usize::from(hinted))?;
        let dsts = if returns && operand(i, 0)? != &Operand::Name("_") {
            Some(self.atomic_dsts(i, ty)?)
        } else {
            None
        };
        let addr = self.addr(operand(i, at)?, space)?;
        let b = self.atomic_srcs(operand(i, at + 1)?, ty)?;
        let c = if op == AtomicOp::Cas {
            self.atomic_srcs(operand(i, at + 2)?, ty)?
        } else {
            Box::default()
        };
        if ty != Ty::B128 && b.len() != vector {
            return fail("the number of operands is not that of the vector");
        }
        Ok(Op::Memory(Memory::Atomic {
            op,
            ty: kind,
            order,
            addr,
            dsts,
            b,
            c,
        }))
    }

    fn atomic_dsts(&mut self, i: &Instruction<'a>, ty: Ty) -> Result<Box<[Slot]>, Failure> {
        let dsts = self.dst_rows(operand(i, 0)?, ty)?;
        Ok(if ty == Ty::B128 {
            [dsts[0], dsts[0] + 1].into()
        } else {
            dsts
        })
    }

    fn atomic_srcs(&mut self, operand: &Operand<'a>, ty: Ty) -> Result<Box<[Slot]>, Failure> {
        let srcs = self.srcs(operand, ty)?;
        Ok(if ty == Ty::B128 {
            [srcs[0], srcs[0] + 1].into()
        } else {
            srcs.into()
        })
    }

    fn fence(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let known = [
            "sc",
            "acq_rel",
            "acquire",
            "release",
            "cta",
            "cluster",
            "gpu",
            "sys",
            "gl",
            "proxy",
            "alias",
            "mbarrier_init",
            "tensormap::generic",
        ];
        let has = |words: &[&str]| words.iter().any(|w| i.modifiers.contains(w));
        let device = has(&["gpu", "sys", "gl"]) && !has(&["proxy"]);
        let mut async_proxy = false;
        for word in ["async", "async::generic"] {
            async_proxy |= m.take(word);
        }
        while m
            .find(|w| {
                let qualified = ["async.", "sync_restrict::", "async::"]
                    .iter()
                    .any(|p| w.starts_with(p));
                (known.contains(&w) || qualified).then_some(())
            })
            .is_some()
        {}
        for space in ["global", "shared::cta", "shared::cluster"] {
            m.take(space);
        }
        count(i, 0..=2)?;
        Ok(Op::Memory(Memory::Fence { async_proxy, device }))
    }

    /// Decodes `st.async{.weak}.shared::cluster.mbarrier::complete_tx::bytes{.vec}.type [a], b, [mbar]`.
    fn st_async(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        m.take("weak");
        let space = space(m);
        if space != Space::SharedCluster || !m.take("mbarrier::complete_tx::bytes") {
            return fail("this form of `st.async` is not known");
        }
        let (vector, ty) = self.shape(m)?;
        count(i, 3..=3)?;
        let srcs = self.srcs(operand(i, 1)?, ty)?;
        if srcs.len() != vector {
            return fail("the number of sources is not that of the vector");
        }
        Ok(Op::Async(crate::isa::AsyncOp::Store {
            addr: self.addr(operand(i, 0)?, space)?,
            bytes: ty.bytes(),
            srcs: srcs.into(),
            barrier: self.addr(operand(i, 2)?, space)?,
        }))
    }

    /// Decodes `red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.op.type [a], b, [mbar]`.
    fn red_async(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        order(m);
        let space = space(m);
        if space != Space::SharedCluster || !m.take("mbarrier::complete_tx::bytes") {
            return fail("this form of `red.async` is not known");
        }
        let op = m.need("the operation", ATOMICS)?;
        let ty = m.ty()?;
        count(i, 3..=3)?;
        let AtomicTy::Int(int) = atomic_ty(op, ty)? else {
            return fail("`red.async` exists for integers only");
        };
        Ok(Op::Async(crate::isa::AsyncOp::Reduce {
            op,
            ty: int,
            addr: self.addr(operand(i, 0)?, space)?,
            src: self.src(operand(i, 1)?, ty)?,
            barrier: self.addr(operand(i, 2)?, space)?,
        }))
    }
}

/// Splits a 128-bit register into its two rows.
fn split_wide(dsts: &[Dst]) -> Vec<Dst> {
    let halves = dsts
        .iter()
        .flat_map(|d| [d.slot, d.slot + 1].map(|slot| Dst { slot, bits: 64 }));
    halves.collect()
}

impl<'a> Decoder<'_, 'a> {
    /// Decodes an address whose state space the opcode leaves open; these instructions use shared memory.
    pub(super) fn shared_addr(&mut self, operand: &Operand<'a>, m: &mut Modifiers<'a>) -> Result<Addr, Failure> {
        let space = space(m);
        self.addr(operand, space)
    }
}
