//! Asynchronous copies: `cp.async`, bulk and tensor copies, and their groups.

use super::convert::SPACES;
use super::memory::{ATOMICS, atomic_ty, take_cache_hints};
use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{Addr, Slot, Space, Ty};
use crate::isa::{AsyncOp, AtomicOp, AtomicTy, Completion, MbarrierOp, Op, Reduction};
use crate::parse::ast::{Instruction, Operand};
use crate::tensor::tensor_map::Field;

type Decoded = Result<Option<Op>, Failure>;

/// Takes the first state space in the text: copies name their destination before their source.
fn next_space(m: &mut Modifiers<'_>) -> Result<Space, Failure> {
    let find = |w: &str| SPACES.iter().find(|(name, _)| *name == w).map(|(_, s)| *s);
    match m.find(find) {
        Some(space) => Ok(space),
        None => fail("the state space is missing"),
    }
}

fn is_hinted(i: &Instruction<'_>) -> bool {
    i.modifiers.contains(&"L2::cache_hint")
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn asynchronous(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        if i.opcode == "tensormap" {
            return self.tensormap(i, m).map(Some);
        }
        if i.opcode != "cp" {
            return Ok(None);
        }
        let reduce = m.take("reduce");
        if !m.take("async") {
            return fail("`.async` is missing");
        }
        if m.take("bulk") {
            return self.bulk(i, m, reduce).map(Some);
        }
        if reduce {
            return fail("`cp.reduce.async` needs `.bulk`");
        }
        if m.take("commit_group") {
            count(i, 0..=0)?;
            return Ok(Some(Op::Async(AsyncOp::Commit)));
        }
        if m.take("wait_group") {
            let left = self.group_count(i)?;
            return Ok(Some(Op::Async(AsyncOp::WaitGroup { left })));
        }
        if m.take("wait_all") {
            return Ok(Some(Op::Async(AsyncOp::WaitAll)));
        }
        if m.take("mbarrier") {
            if !m.take("arrive") {
                return fail("`.arrive` is missing");
            }
            let no_increment = m.take("noinc");
            let addr = self.shared_addr(operand(i, 0)?, m)?;
            m.ty()?;
            return Ok(Some(Op::Mbarrier(MbarrierOp::CpAsyncArrive { addr, no_increment })));
        }
        self.cp_async(i, m).map(Some)
    }

    fn tensormap(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        if m.take("cp_fenceproxy") {
            let (to, from) = (next_space(m)?, next_space(m)?);
            let words = ["tensormap::generic", "release", "sync", "aligned"];
            if (to, from) != (Space::Global, Space::Shared) || !words.iter().all(|w| m.take(w)) {
                return fail("this form of `tensormap.cp_fenceproxy` is not known");
            }
            for scope in ["cta", "cluster", "gpu", "sys"] {
                m.take(scope);
            }
            count(i, 3..=3)?;
            if self.literal(operand(i, 2)?)? != 128 {
                return fail("a tensor map is 128 bytes");
            }
            return Ok(Op::Async(AsyncOp::PublishMap {
                dst: self.addr(operand(i, 0)?, to)?,
                src: self.addr(operand(i, 1)?, from)?,
            }));
        }
        if !m.take("replace") || !m.take("tile") {
            return fail("this `tensormap` instruction is not known");
        }
        let entries = |name: &str| match name {
            "box_dim" | "global_dim" | "element_stride" => Some(5),
            "global_stride" => Some(4),
            _ => None,
        };
        let whole = m.one_of(&[
            ("global_address", Field::GlobalAddress),
            ("rank", Field::Rank),
            ("elemtype", Field::ElementType),
            ("interleave_layout", Field::Interleave),
            ("swizzle_mode", Field::Swizzle),
            ("fill_mode", Field::Fill),
        ]);
        let (field, at) = match whole {
            Some(field) => (field, 1),
            None => {
                let found = m.find(|w| entries(w).map(|n| (w.to_owned(), n)));
                let Some((name, entries)) = found else {
                    return fail("the field is missing or not known");
                };
                let entry = self.literal(operand(i, 1)?)?;
                if entry >= entries {
                    return fail(format!("the field has entries 0 to {}", entries - 1));
                }
                let entry = entry as u8;
                let field = match name.as_str() {
                    "box_dim" => Field::BoxDim(entry),
                    "global_dim" => Field::GlobalDim(entry),
                    "global_stride" => Field::GlobalStride(entry),
                    _ => Field::ElementStride(entry),
                };
                (field, 2)
            }
        };
        let space = m.one_of(SPACES).unwrap_or(Space::Generic);
        if !m.take("b1024") {
            return fail("`.b1024` is missing");
        }
        let ty = m.ty()?;
        let wide = matches!(field, Field::GlobalAddress | Field::GlobalStride(_));
        if ty != if wide { Ty::B64 } else { Ty::B32 } {
            return fail("the type does not fit the field");
        }
        count(i, at + 1..=at + 1)?;
        Ok(Op::Async(AsyncOp::ReplaceField {
            addr: self.addr(operand(i, 0)?, space)?,
            field,
            value: self.src(operand(i, at)?, ty)?,
        }))
    }

    fn group_count(&mut self, i: &Instruction<'a>) -> Result<u32, Failure> {
        count(i, 1..=1)?;
        let left = self.literal(operand(i, 0)?)?;
        u32::try_from(left).or_else(|_| fail("the group count is too large"))
    }

    fn cp_async(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let bypass = m.need("`.ca` or `.cg`", &[("ca", false), ("cg", true)])?;
        let (to, from) = (next_space(m)?, next_space(m)?);
        if to != Space::Shared || from != Space::Global {
            return fail("the copy goes from global to shared memory");
        }
        let hinted = is_hinted(i);
        take_cache_hints(m);
        let hint = usize::from(hinted);
        count(i, 3 + hint..=4 + hint)?;
        let size = self.literal(operand(i, 2)?)?;
        if !matches!((bypass, size), (_, 16) | (false, 4 | 8)) {
            return fail(format!("a copy of {size} bytes does not exist"));
        }
        let mut src_size = None;
        let mut ignore = None;
        if i.operands.len() == 4 + hint {
            let fourth = operand(i, 3)?;
            if self.is_pred(fourth) {
                ignore = Some(self.pred(fourth)?);
            } else {
                src_size = Some(self.src(fourth, Ty::B32)?);
            }
        }
        Ok(Op::Async(AsyncOp::Copy {
            dst: self.addr(operand(i, 0)?, to)?,
            src: self.addr(operand(i, 1)?, from)?,
            size: size as u32,
            src_size,
            ignore,
        }))
    }

    fn bulk(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, reduce: bool) -> Result<Op, Failure> {
        if m.take("commit_group") {
            return Ok(Op::Async(AsyncOp::BulkCommit));
        }
        if m.take("wait_group") {
            let read = m.take("read");
            let left = self.group_count(i)?;
            return Ok(Op::Async(AsyncOp::BulkWait { left, read }));
        }
        if m.take("prefetch") {
            while m.next().is_some() {}
            return Ok(Op::Nop);
        }
        if m.take("tensor") {
            return self.tensor_copy(i, m, reduce);
        }
        let (to, from) = (next_space(m)?, next_space(m)?);
        let hinted = is_hinted(i);
        take_cache_hints(m);
        let multicast = m.take("multicast::cluster");
        let on_barrier = m.need(
            "the completion mechanism",
            &[("mbarrier::complete_tx::bytes", true), ("bulk_group", false)],
        )?;
        let known = match (to, from) {
            (Space::SharedCluster | Space::Shared, Space::Global) => on_barrier && !reduce,
            (Space::SharedCluster, Space::Shared) => on_barrier,
            (Space::Global, Space::Shared) => !on_barrier,
            _ => false,
        };
        if !known {
            return fail("this pair of state spaces and completion is not known");
        }
        let mut reduction = None;
        if reduce {
            m.take("noftz");
            let op = m.need("the operation", ATOMICS)?;
            let ty = atomic_ty_of_bulk(op, m.ty()?)?;
            reduction = Some(Reduction { op, ty });
        }
        let n = 3 + usize::from(on_barrier) + usize::from(multicast) + usize::from(hinted);
        count(i, n..=n)?;
        Ok(Op::Async(AsyncOp::Bulk {
            dst: self.addr(operand(i, 0)?, to)?,
            src: self.addr(operand(i, 1)?, from)?,
            size: self.src(operand(i, 2)?, Ty::B32)?,
            completion: if on_barrier {
                Completion::Mbarrier(self.addr(operand(i, 3)?, to)?)
            } else {
                Completion::BulkGroup
            },
            multicast: if multicast {
                Some(self.src(operand(i, 4)?, Ty::B16)?)
            } else {
                None
            },
            reduction,
        }))
    }

    fn tensor_copy(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>, reduce: bool) -> Result<Op, Failure> {
        let dims = m.need(
            "the dimension",
            &[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)],
        )?;
        let (to, from) = (next_space(m)?, next_space(m)?);
        m.take("tile");
        let hinted = usize::from(is_hinted(i));
        take_cache_hints(m);
        match (to, from) {
            (Space::SharedCluster | Space::Shared, Space::Global) if !reduce => {
                if !m.take("mbarrier::complete_tx::bytes") {
                    return fail("the completion mechanism is missing");
                }
                let multicast = m.take("multicast::cluster");
                m.take("cta_group::1");
                let n = 3 + usize::from(multicast) + hinted;
                count(i, n..=n)?;
                let (map, coordinates) = self.tensor_address(operand(i, 1)?, dims)?;
                Ok(Op::Async(AsyncOp::TensorLoad {
                    dst: self.addr(operand(i, 0)?, to)?,
                    map,
                    coordinates,
                    barrier: self.addr(operand(i, 2)?, to)?,
                    multicast: if multicast {
                        Some(self.src(operand(i, 3)?, Ty::B16)?)
                    } else {
                        None
                    },
                }))
            }
            (Space::Global, Space::Shared) => {
                let reduction = if reduce {
                    Some(m.need("the operation", ATOMICS)?)
                } else {
                    None
                };
                if reduction == Some(AtomicOp::Cas) || reduction == Some(AtomicOp::Exch) {
                    return fail("this reduction is not known");
                }
                if !m.take("bulk_group") {
                    return fail("the completion mechanism is missing");
                }
                count(i, 2 + hinted..=2 + hinted)?;
                let (map, coordinates) = self.tensor_address(operand(i, 0)?, dims)?;
                Ok(Op::Async(AsyncOp::TensorStore {
                    map,
                    coordinates,
                    src: self.addr(operand(i, 1)?, from)?,
                    reduction,
                }))
            }
            _ => fail("this pair of state spaces is not known"),
        }
    }

    /// Decodes `[tensorMap, {c0, c1, …}]`.
    fn tensor_address(&mut self, operand: &Operand<'a>, dims: usize) -> Result<(Addr, Box<[Slot]>), Failure> {
        let Operand::Address {
            base,
            offset,
            coordinates: Some(coordinates),
        } = operand
        else {
            return fail("expected a tensor map with coordinates");
        };
        if coordinates.len() != dims {
            return fail("the number of coordinates is not that of the dimensions");
        }
        let map = self.address(base, *offset, Space::Generic)?;
        let rows: Result<Vec<Slot>, _> = coordinates.iter().map(|c| self.src(c, Ty::B32)).collect();
        Ok((map, rows?.into()))
    }
}

fn atomic_ty_of_bulk(op: AtomicOp, ty: Ty) -> Result<AtomicTy, Failure> {
    if matches!(op, AtomicOp::Cas | AtomicOp::Exch) {
        return fail("this reduction is not known");
    }
    atomic_ty(op, ty)
}
