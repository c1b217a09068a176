//! Bulk and tensor copies: what the copy engine of an SM does in the background.
//!
//! An operation is checked and resolved into pieces when it is issued, and put in a queue of the cluster. It lands
//! at its drawn moment, or when somebody waits for it; landing moves the bytes and completes the barrier or group.

use std::collections::VecDeque;

use super::access::{Access, Target, effective};
use super::atomics::{combine, element_bytes};
use super::warp::{Warp, lanes};
use super::{Actor, Cluster, Flow, Step};
use crate::check::clock::Knowledge;
use crate::check::shared_race::{Engine, Site};
use crate::decode::op::{AsyncOp, AtomicOp, AtomicTy, Completion, Instr, Op, Reduction};
use crate::decode::types::{Addr, FloatTy, IntTy, Order, Slot, Space};
use crate::error::Error;
use crate::memory::window;
use crate::report::FindingKind;
use crate::schedule::Landing;
use crate::tensor::tensor_map::{ElementType, Fill, TILE_ALIGNMENT};

/// One end of a piece.
#[derive(Debug, Clone, Copy)]
enum End {
    /// Allocation and offset.
    Global(usize, usize),
    /// Block and offset.
    Shared(usize, usize),
    /// Bytes outside a tensor.
    Fill(Fill),
    /// Values of an `st.async` or `red.async`.
    Value(u64),
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    from: End,
    to: End,
    bytes: usize,
}

/// A bulk operation in flight.
#[derive(Debug)]
struct Pending {
    landing: Landing,
    pieces: Vec<Piece>,
    reduction: Option<Reduction>,
    /// Round 32-bit elements on the way in, as the map's type asks.
    element: Option<ElementType>,
    /// Barriers to complete, with the bytes each gets.
    barriers: Vec<((usize, u32), u32)>,
    /// Warp, lane and group that wait for it.
    group: Option<(usize, usize)>,
    known: Knowledge,
    actor: Actor,
    line: u32,
}

/// Bulk groups of one lane: operations not yet in a group, then the sizes of the groups.
#[derive(Debug, Default, Clone)]
struct LaneGroups {
    open: usize,
    open_step: u32,
    committed: VecDeque<(usize, u32)>,
}

/// The copy engine's queue.
#[derive(Debug, Default)]
pub(crate) struct BulkQueue {
    pending: Vec<Pending>,
    groups: std::collections::HashMap<(usize, usize), LaneGroups>,
    /// Somebody waits: late operations may land from this tick on.
    hurried: bool,
}

impl BulkQueue {
    /// Somebody waits for an mbarrier: what lands "at its wait" may do so now.
    pub fn hurry(&mut self) {
        self.hurried = true;
    }
}

impl<'m> Cluster<'m> {
    pub(super) fn bulk(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, mask: u32) -> Step {
        match op {
            AsyncOp::Bulk { .. } => {
                for lane in lanes(mask) {
                    self.bulk_copy(warp, instr, op, lane)?;
                }
            }
            AsyncOp::TensorLoad { .. } | AsyncOp::TensorStore { .. } => {
                for lane in lanes(mask) {
                    self.tensor_copy(warp, instr, op, lane)?;
                }
            }
            AsyncOp::Store { .. } | AsyncOp::Reduce { .. } => {
                for lane in lanes(mask) {
                    self.store_async(warp, instr, op, lane)?;
                }
            }
            AsyncOp::ReplaceField { addr, field, value } => {
                for lane in lanes(mask) {
                    self.replace_field(warp, instr, lane, addr, *field, *value)?;
                }
            }
            AsyncOp::PublishMap { dst, src } => self.publish_map(warp, instr, mask, dst, src)?,
            AsyncOp::BulkCommit => {
                for lane in lanes(mask) {
                    let groups = self.bulk.groups.entry((warp.id, lane)).or_default();
                    let n = std::mem::take(&mut groups.open);
                    groups.committed.push_back((n, groups.open_step));
                }
            }
            AsyncOp::BulkWait { left } => {
                for lane in lanes(mask) {
                    self.bulk_wait(warp, lane, *left as usize);
                }
            }
            AsyncOp::Copy { .. } | AsyncOp::Commit | AsyncOp::WaitGroup { .. } | AsyncOp::WaitAll => {}
        }
        Ok(Flow::Next)
    }

    /// Waits until at most `left` bulk groups of the lane are pending. Waiting for the reads alone lands the whole.
    fn bulk_wait(&mut self, warp: &Warp, lane: usize, left: usize) {
        let key = (warp.id, lane);
        let Some(groups) = self.bulk.groups.get_mut(&key) else {
            return;
        };
        let (mut finish, mut step) = (0, 0);
        while groups.committed.len() > left {
            if let Some((n, at)) = groups.committed.pop_front() {
                finish += n;
                step = at;
            }
        }
        // The lane's oldest operations are the first of its own in the queue.
        while finish > 0 {
            let Some(at) = self.bulk.pending.iter().position(|p| p.group == Some(key)) else {
                break;
            };
            let done = self.bulk.pending.remove(at);
            self.land_bulk(done);
            finish -= 1;
        }
        if step > 0 {
            let agent = Engine::Bulk.agent(warp.id);
            self.known[warp.id].generic.set(agent, step);
        }
    }

    /// Lands what is due; everything, if `all`. True if anything did.
    pub(super) fn land_bulk_due(&mut self, all: bool) -> bool {
        if self.bulk.pending.is_empty() {
            return false;
        }
        let hurried = std::mem::take(&mut self.bulk.hurried);
        let mut any = false;
        let mut at = 0;
        while at < self.bulk.pending.len() {
            let pending = &self.bulk.pending[at];
            // A late operation completes an mbarrier some time after the wait began, in no fixed order.
            let late = hurried && pending.landing == Landing::AtWait && !pending.barriers.is_empty();
            let now = all || pending.landing.due(self.tick) || late && self.rng.below(4) == 0;
            if !now {
                at += 1;
                continue;
            }
            let done = self.bulk.pending.remove(at);
            self.finish_group_member(&done);
            self.land_bulk(done);
            any = true;
        }
        any
    }

    /// A member of a bulk group landed before its wait: the wait has one less to do.
    fn finish_group_member(&mut self, done: &Pending) {
        let Some(groups) = done.group.and_then(|key| self.bulk.groups.get_mut(&key)) else {
            return;
        };
        match groups.committed.iter_mut().find(|(n, _)| *n > 0) {
            Some((n, _)) => *n -= 1,
            None => groups.open = groups.open.saturating_sub(1),
        }
    }

    fn land_bulk(&mut self, done: Pending) {
        for piece in &done.pieces {
            self.move_piece(piece, done.reduction, done.element);
        }
        for (object, bytes) in &done.barriers {
            self.complete_tx(done.actor, done.line, *object, *bytes, &done.known);
        }
        self.progress += 1;
    }

    fn fetch(&self, from: End, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        match from {
            End::Global(allocation, at) => {
                self.ctx.view.allocations[allocation].copy_out(at, &mut out);
            }
            End::Shared(cta, at) => out.copy_from_slice(self.ctas[cta].shared.bytes(at, bytes)),
            End::Fill(fill) => {
                for (index, byte) in out.iter_mut().enumerate() {
                    *byte = fill.byte(index);
                }
            }
            End::Value(value) => out.copy_from_slice(&value.to_le_bytes()[..bytes]),
        }
        out
    }

    fn move_piece(&mut self, piece: &Piece, reduction: Option<Reduction>, element: Option<ElementType>) {
        let mut bytes = self.fetch(piece.from, piece.bytes);
        if let (Some(element), End::Global(..)) = (element, piece.from)
            && element.bytes() == 4
        {
            for word in bytes.chunks_exact_mut(4) {
                let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                word.copy_from_slice(&element.loaded(value).to_le_bytes());
            }
        }
        if let Some(Reduction { op, ty }) = reduction {
            return self.reduce_piece(piece, &bytes, op, ty);
        }
        match piece.to {
            End::Global(allocation, at) => {
                self.ctx.view.allocations[allocation].copy_in(at, &bytes);
            }
            End::Shared(cta, at) => self.ctas[cta].shared.write(at, &bytes),
            End::Fill(_) | End::Value(_) => {}
        }
    }

    fn reduce_piece(&mut self, piece: &Piece, bytes: &[u8], op: AtomicOp, ty: AtomicTy) {
        let size = element_bytes(ty);
        for (index, value) in bytes.chunks_exact(size).enumerate() {
            let value = crate::memory::shared::load(value);
            let f = |old: u64| combine(op, ty, old, value, 0);
            match piece.to {
                End::Global(allocation, at) => {
                    let memory = &self.ctx.view.allocations[allocation];
                    memory.update(at + index * size, size, f);
                    memory.mark(at + index * size, size);
                }
                End::Shared(cta, at) => {
                    let shared = &mut self.ctas[cta].shared;
                    let at = at + index * size;
                    let new = f(shared.load(at, size));
                    shared.store(at, size, new);
                }
                End::Fill(_) | End::Value(_) => {}
            }
        }
    }

    /// Looks up and checks a range one end of a copy touches.
    fn end(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        access: Access,
        step_site: (u32, Site),
    ) -> Result<Option<End>, Error> {
        let Some(target) = self.locate(warp, instr, access)? else {
            return Ok(None);
        };
        let (_, site) = step_site;
        match target {
            Target::Global { allocation, at } => {
                let reduces = matches!(&instr.op, Op::Async(op) if op.reduces());
                if !(access.write && reduces) {
                    self.observe(warp, instr, access, target, Order::Weak, site);
                } else if self.ctx.checks.global_races {
                    // Each element is updated atomically.
                    self.watch_global(warp, instr, access, (allocation, at), Order::Weak, true, &[]);
                }
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
                self.watch_bulk(warp, instr, access, cta, at, site);
                Ok(Some(End::Shared(cta, at)))
            }
            Target::Local { .. } | Target::Param { .. } => {
                let message = "a bulk copy touches neither local memory nor parameters";
                Err(self.fault(warp, instr.line, message))
            }
        }
    }

    fn watch_bulk(&mut self, warp: &Warp, instr: &Instr, access: Access, cta: usize, at: usize, site: Site) {
        if !access.write && self.ctx.checks.uninitialized {
            let missing = self.ctas[cta].shared.first_uninitialized(at, access.bytes);
            if let Some(missing) = missing {
                let actor = self.actor(warp);
                let place = (Some(access.lane), Some(missing as u64));
                self.report(FindingKind::Uninitialized, instr.line, actor, place, || {
                    format!(
                        "bulk copy of {} bytes of shared memory, of which {missing:#x} was never written",
                        access.bytes
                    )
                });
            }
        }
        if access.write {
            self.counters.shared_written_bytes += access.bytes as u64;
        } else {
            self.counters.shared_read_bytes += access.bytes as u64;
        }
        if self.watches_shared() {
            let agent = Engine::Bulk.agent(warp.id);
            let actor = self.actor(warp);
            let range = (at, access.bytes);
            self.watch_shared(
                warp.id,
                agent,
                actor,
                site,
                cta,
                range,
                access.write.into(),
                Some(access.lane),
            );
        }
    }

    /// Queues an operation that was resolved, or lands it at once.
    fn enqueue(&mut self, warp: &Warp, lane: usize, step: u32, mut pending: Pending, grouped: bool) {
        pending.known = self.known[warp.id].clone();
        pending.known.generic.set(Engine::Bulk.agent(warp.id), step);
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
            reduction: None,
            element: None,
            barriers: Vec::new(),
            group: None,
            known: Knowledge::default(),
            actor: self.actor(warp),
            line: instr.line,
        }
    }

    /// Blocks that receive a multicast, with the shared address each gets.
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

    fn bulk_copy(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, lane: usize) -> Result<(), Error> {
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
        let step = self.engine_step(warp.id, Engine::Bulk);
        let place = (step, self.site(warp));
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

    /// Adds the barriers that an operation completes: one a receiving block.
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

    fn tensor_copy(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, lane: usize) -> Result<(), Error> {
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
        let step = self.engine_step(warp.id, Engine::Bulk);
        let place = (step, self.site(warp));
        let mut pending = self.blank(warp, instr);
        pending.element = load.then_some(map.element());
        if let AsyncOp::TensorStore {
            reduction: Some(op), ..
        } = op
        {
            let ty = reduction_ty(map.element());
            pending.reduction = Some(Reduction { op: *op, ty });
        }
        for tile in self.receivers(warp, lane, multicast, tile) {
            let rank = tile & !window::OFFSET_MASK;
            let start = (tile & window::OFFSET_MASK) as u32;
            let pieces = match map.pieces(&coordinates, start) {
                Ok(pieces) => pieces,
                Err(error) => return Err(self.fault(warp, instr.line, error.to_string())),
            };
            for piece in pieces {
                let bytes = piece.bytes as usize;
                let at = rank | u64::from(piece.shared);
                if !load && piece.global.is_none() {
                    continue;
                }
                let near = Access {
                    align: 1,
                    ..access_of(lane, at, shared.space, bytes, load)
                };
                let Some(near) = self.end(warp, instr, near, place)? else {
                    return Ok(());
                };
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
                let (from, to) = if load { (far, near) } else { (near, far) };
                pending.pieces.push(Piece { from, to, bytes });
            }
        }
        if let Some(barrier) = barrier {
            // A box is at most what fits in shared memory, or the copy was refused above.
            let bytes = u32::try_from(map.copied_bytes()).unwrap_or(u32::MAX);
            self.signal(warp, instr, lane, barrier, multicast, bytes, &mut pending)?;
        }
        self.enqueue(warp, lane, step, pending, !load);
        Ok(())
    }

    /// `st.async` and `red.async`: values to another block's shared memory, completing a barrier there.
    fn store_async(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, lane: usize) -> Result<(), Error> {
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
        let step = self.engine_step(warp.id, Engine::CpAsync);
        let place = (step, self.site(warp));
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

pub(super) fn access_of(lane: usize, address: u64, space: Space, bytes: usize, write: bool) -> Access {
    Access {
        lane,
        address,
        space,
        bytes,
        align: 16,
        write,
    }
}

/// The type a tensor reduction works in.
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
