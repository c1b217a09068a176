//! Issue of bulk operations: checks both ends and splits the operation into pieces.

use super::{End, Pending, Piece};
use crate::check::clock::Knowledge;
use crate::check::event::{Effect, Engine, Site};
use crate::error::Error;
use crate::exec::Cluster;
use crate::exec::access::{Access, Act, Target, effective};
use crate::exec::warp::Warp;
use crate::isa::types::{Addr, FloatTy, IntTy, Slot, Space};
use crate::isa::window;
use crate::isa::{AsyncOp, AtomicTy, Completion, Instr, Op, Reduction};
use crate::report::FindingKind;
use crate::schedule::Landing;
use crate::tensor::tensor_map::{ElementType, TILE_ALIGNMENT};

impl<'m> Cluster<'m> {
    /// Finds and checks the range at one end of a copy.
    fn end(&mut self, warp: &mut Warp, instr: &Instr, access: Access, site: Site) -> Result<Option<End>, Error> {
        let Some(target) = self.locate(warp, instr, access)? else {
            return Ok(None);
        };
        let mut act = Act {
            engine: Engine::Bulk,
            ..Act::of(access)
        };
        match target {
            Target::Global { allocation, at } => {
                let reduces = matches!(&instr.op, Op::Async(op) if op.reduces());
                if access.write && reduces {
                    // Each element is updated atomically.
                    act.effect = Effect::Update { returns: false };
                }
                self.observe(warp, instr, site, access, target, act);
                let n = access.bytes as u64;
                let sectors = (access.address + n - 1) / 32 - access.address / 32 + 1;
                if access.write {
                    self.counters.global_written_bytes += n;
                    self.counters.global_written_sectors += sectors;
                } else {
                    self.counters.global_read_bytes += n;
                    self.counters.global_read_sectors += sectors;
                }
                Ok(Some(End::Global(allocation, at)))
            }
            Target::Shared { cta, at } => {
                if access.write {
                    self.counters.shared_written_bytes += access.bytes as u64;
                } else {
                    self.counters.shared_read_bytes += access.bytes as u64;
                }
                self.observe(warp, instr, site, access, target, act);
                Ok(Some(End::Shared(cta, at)))
            }
            Target::Local { .. } | Target::Param { .. } => {
                let message = "a bulk copy touches neither local memory nor parameters";
                Err(self.fault(warp, instr.line, message))
            }
        }
    }

    /// Queues an operation, or lands it at once.
    fn enqueue(&mut self, warp: &Warp, lane: usize, step: u32, mut pending: Pending, grouped: bool) {
        pending.known = self.watch.completion(warp.id, Engine::Bulk, step);
        pending.landing = self.temper.landing(&mut self.rng, self.tick);
        if grouped {
            let groups = self.bulk.groups.entry((warp.id, lane)).or_default();
            groups.open_step = step;
            pending.group = Some((warp.id, lane));
        }
        if pending.landing.due(self.tick) {
            self.land_bulk(pending);
            return;
        }
        if let Some(key) = pending.group {
            self.bulk.groups.entry(key).or_default().open += 1;
        }
        self.bulk.pending.push(pending);
    }

    fn blank(&self, warp: &Warp, instr: &Instr) -> Pending {
        Pending {
            landing: Landing::Now,
            pieces: Vec::new(),
            read: Vec::new(),
            reduction: None,
            element: None,
            barriers: Vec::new(),
            group: None,
            known: Knowledge::default(),
            actor: self.actor(warp),
            line: instr.line,
        }
    }

    /// Lists the blocks that receive a multicast, with the shared address in each.
    fn receivers(&self, warp: &Warp, lane: usize, multicast: Option<Slot>, address: u64) -> Vec<u64> {
        match multicast {
            None => vec![address],
            Some(slot) => {
                let mask = warp.frame().row(slot)[lane];
                let offset = address & window::OFFSET_MASK;
                let ranks = (0..16u64).filter(|r| mask >> r & 1 != 0);
                ranks.map(|r| (r + 1) << window::RANK_SHIFT | offset).collect()
            }
        }
    }

    pub(super) fn bulk_copy(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, lane: usize) -> Result<(), Error> {
        let AsyncOp::Bulk {
            dst,
            src,
            size,
            completion,
            multicast,
            reduction,
        } = op
        else {
            return Ok(());
        };
        let value = |slot: Slot| warp.frame().row(slot)[lane];
        let bytes = value(*size) as u32 as usize;
        let (to, from) = (effective(dst, value(dst.base)), effective(src, value(src.base)));
        if !bytes.is_multiple_of(16) {
            let actor = self.actor(warp);
            self.report(
                FindingKind::InvalidOperand,
                instr.line,
                actor,
                (Some(lane), None),
                || format!("bulk copy of {bytes} bytes: the size is a multiple of 16"),
            );
            return Ok(());
        }
        let step = self.watch.issue(warp.id, Engine::Bulk);
        let place = self.site(warp);
        let mut pending = self.blank(warp, instr);
        pending.reduction = *reduction;
        if bytes > 0 {
            let read = access_of(lane, from, src.space, bytes, false);
            let Some(from) = self.end(warp, instr, read, place)? else {
                return Ok(());
            };
            for to in self.receivers(warp, lane, *multicast, to) {
                let write = access_of(lane, to, dst.space, bytes, true);
                let Some(to) = self.end(warp, instr, write, place)? else {
                    return Ok(());
                };
                pending.pieces.push(Piece { from, to, bytes });
            }
        }
        let barrier = match completion {
            Completion::Mbarrier(addr) => Some(addr),
            Completion::BulkGroup => None,
        };
        if let Some(addr) = barrier {
            self.signal(warp, instr, lane, addr, *multicast, bytes as u32, &mut pending)?;
        }
        self.enqueue(warp, lane, step, pending, barrier.is_none());
        Ok(())
    }

    /// Adds the barriers that an operation completes: one for each receiving block.
    #[expect(clippy::too_many_arguments, reason = "a completion is all of these")]
    fn signal(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        addr: &Addr,
        multicast: Option<Slot>,
        bytes: u32,
        pending: &mut Pending,
    ) -> Result<(), Error> {
        let Some((_, offset)) = self.object(warp, instr, lane, addr, false)? else {
            return Ok(());
        };
        let address = effective(addr, warp.frame().row(addr.base)[lane]);
        for receiver in self.receivers(warp, lane, multicast, address) {
            let target = self.shared_target(warp.cta, receiver & 0xffff_ffff, 8);
            if let Some(Target::Shared { cta, .. }) = target {
                pending.barriers.push(((cta, offset), bytes));
            }
        }
        Ok(())
    }

    pub(super) fn tensor_copy(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        op: &AsyncOp,
        lane: usize,
    ) -> Result<(), Error> {
        let (map_addr, coordinates, shared, load) = match op {
            AsyncOp::TensorLoad {
                map, coordinates, dst, ..
            } => (map, coordinates, dst, true),
            AsyncOp::TensorStore {
                map, coordinates, src, ..
            } => (map, coordinates, src, false),
            _ => return Ok(()),
        };
        let value = |slot: Slot| warp.frame().row(slot)[lane];
        let coordinates: Vec<i32> = coordinates.iter().map(|c| value(*c) as i32).collect();
        let tile = effective(shared, value(shared.base));
        let Some(map) = self.tensor_map(warp, instr, lane, map_addr)? else {
            return Ok(());
        };
        if !tile.is_multiple_of(u64::from(TILE_ALIGNMENT)) {
            let access = Access {
                align: u64::from(TILE_ALIGNMENT),
                ..access_of(lane, tile, shared.space, 16, load)
            };
            self.locate(warp, instr, access)?;
            return Ok(());
        }
        let (multicast, barrier) = match op {
            AsyncOp::TensorLoad { multicast, barrier, .. } => (*multicast, Some(barrier)),
            _ => (None, None),
        };
        let step = self.watch.issue(warp.id, Engine::Bulk);
        let place = self.site(warp);
        let mut pending = self.blank(warp, instr);
        pending.element = load.then_some(map.element());
        if let AsyncOp::TensorStore {
            reduction: Some(op), ..
        } = op
        {
            let ty = reduction_ty(map.element());
            pending.reduction = Some(Reduction { op: *op, ty });
        }
        let receivers = self.receivers(warp, lane, multicast, tile);
        let start = (tile & window::OFFSET_MASK) as u32;
        let pieces = match map.pieces(&coordinates, start) {
            Ok(pieces) => pieces,
            Err(error) => return Err(self.fault(warp, instr.line, error.to_string())),
        };
        for piece in pieces.into_iter().filter(|piece| load || piece.global.is_some()) {
            let bytes = piece.bytes as usize;
            // A multicast reads once for all receivers.
            let far = match piece.global {
                Some(address) => {
                    let far = Access {
                        align: 1,
                        ..access_of(lane, address, Space::Global, bytes, !load)
                    };
                    match self.end(warp, instr, far, place)? {
                        Some(end) => end,
                        None => return Ok(()),
                    }
                }
                None => End::Fill(map.fill()),
            };
            for tile in &receivers {
                let at = tile & !window::OFFSET_MASK | u64::from(piece.shared);
                let near = Access {
                    align: 1,
                    ..access_of(lane, at, shared.space, bytes, load)
                };
                let Some(near) = self.end(warp, instr, near, place)? else {
                    return Ok(());
                };
                let (from, to) = if load { (far, near) } else { (near, far) };
                pending.pieces.push(Piece { from, to, bytes });
            }
        }
        if let Some(barrier) = barrier {
            // A larger box than shared memory was refused above.
            let bytes = u32::try_from(map.copied_bytes()).unwrap_or(u32::MAX);
            self.signal(warp, instr, lane, barrier, multicast, bytes, &mut pending)?;
        }
        self.enqueue(warp, lane, step, pending, !load);
        Ok(())
    }

    /// `st.async` and `red.async`: stores values to another block's shared memory and completes a barrier there.
    pub(super) fn store_async(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        op: &AsyncOp,
        lane: usize,
    ) -> Result<(), Error> {
        let (addr, size, values, barrier) = match op {
            AsyncOp::Store {
                addr,
                bytes,
                srcs,
                barrier,
            } => (addr, *bytes as usize, &srcs[..], barrier),
            AsyncOp::Reduce {
                ty, addr, src, barrier, ..
            } => (addr, ty.bits() as usize / 8, std::slice::from_ref(src), barrier),
            _ => return Ok(()),
        };
        let step = self.watch.issue(warp.id, Engine::Bulk);
        let place = self.site(warp);
        let address = effective(addr, warp.frame().row(addr.base)[lane]);
        let mut pending = self.blank(warp, instr);
        if let AsyncOp::Reduce { op, ty, .. } = op {
            let ty = AtomicTy::Int(*ty);
            pending.reduction = Some(Reduction { op: *op, ty });
        }
        for (index, src) in values.iter().enumerate() {
            let at = address + (index * size) as u64;
            let write = Access {
                align: size as u64,
                ..access_of(lane, at, addr.space, size, true)
            };
            let Some(to) = self.end(warp, instr, write, place)? else {
                return Ok(());
            };
            let from = End::Value(warp.frame().row(*src)[lane]);
            let bytes = size;
            pending.pieces.push(Piece { from, to, bytes });
        }
        let bytes = (size * values.len()) as u32;
        self.signal(warp, instr, lane, barrier, None, bytes, &mut pending)?;
        self.enqueue(warp, lane, step, pending, false);
        Ok(())
    }
}

pub(in crate::exec) fn access_of(lane: usize, address: u64, space: Space, bytes: usize, write: bool) -> Access {
    Access {
        lane,
        address,
        space,
        bytes,
        align: 16,
        write,
    }
}

/// Returns the type of a tensor reduction's arithmetic.
fn reduction_ty(element: ElementType) -> AtomicTy {
    match element {
        ElementType::U8 => AtomicTy::Int(IntTy::U8),
        ElementType::U16 => AtomicTy::Int(IntTy::U16),
        ElementType::U32 => AtomicTy::Int(IntTy::U32),
        ElementType::S32 => AtomicTy::Int(IntTy::S32),
        ElementType::U64 => AtomicTy::Int(IntTy::U64),
        ElementType::S64 => AtomicTy::Int(IntTy::S64),
        ElementType::F16 => AtomicTy::Float(FloatTy::F16),
        ElementType::Bf16 => AtomicTy::Float(FloatTy::Bf16),
        ElementType::F64 => AtomicTy::Float(FloatTy::F64),
        ElementType::F32 | ElementType::F32Ftz | ElementType::Tf32 | ElementType::Tf32Ftz => {
            AtomicTy::Float(FloatTy::F32)
        }
    }
}
