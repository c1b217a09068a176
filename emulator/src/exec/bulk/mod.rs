//! Bulk and tensor copies: the background work of an SM's copy engine.
//!
//! An operation is checked and split into pieces when it is issued, and put in a queue of the cluster. It lands at a
//! moment drawn from the seed, or when a thread waits for it. Landing moves the bytes and completes the barrier or
//! group. A wait for the reads alone makes the operation read its sources; the writes follow later.

mod issue;

pub(super) use issue::access_of;

use std::collections::VecDeque;

use super::atomics::{combine, element_bytes};
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::clock::Knowledge;
use crate::check::event::{Actor, Engine};
use crate::isa::{AsyncOp, AtomicOp, AtomicTy, Instr, Reduction};
use crate::memory::origin::Origin;
use crate::report::FindingKind;
use crate::schedule::Landing;
use crate::tensor::tensor_map::{ElementType, Fill};

/// Number of steps after a wait for the reads within which an operation writes, if no thread waits for the writes.
const WRITE_STEPS: u64 = 512;

/// One end of a piece.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// Allocation and offset.
    Global(usize, usize),
    /// Block and offset.
    Shared(usize, usize),
    /// Fill value of bytes outside of a tensor.
    Fill(Fill),
    /// Value of an `st.async` or `red.async`.
    Value(u64),
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    from: End,
    to: End,
    bytes: usize,
}

/// Bytes that were read, and which of them are undefined.
#[derive(Debug)]
struct Fetched {
    bytes: Vec<u8>,
    undefined: Vec<usize>,
}

/// A bulk operation in flight.
#[derive(Debug)]
struct Pending {
    landing: Landing,
    pieces: Vec<Piece>,
    /// Bytes of the pieces, if they were read before landing.
    read: Vec<Fetched>,
    reduction: Option<Reduction>,
    /// Element type of a map that rounds 32-bit elements when they are loaded.
    element: Option<ElementType>,
    /// Barriers to complete, with the number of bytes for each.
    barriers: Vec<((usize, u32), u32)>,
    /// Warp and lane whose bulk group the operation belongs to.
    group: Option<(usize, usize)>,
    known: Knowledge,
    actor: Actor,
    line: u32,
}

/// Bulk groups of one lane: the number of operations not yet in a group, then the sizes of the groups.
#[derive(Debug, Default, Clone)]
struct LaneGroups {
    open: usize,
    open_step: u32,
    committed: VecDeque<(usize, u32)>,
}

/// Queue of the copy engine.
#[derive(Debug, Default)]
pub(crate) struct BulkQueue {
    pending: Vec<Pending>,
    groups: std::collections::HashMap<(usize, usize), LaneGroups>,
    /// True while a thread waits: late operations may land from this tick on.
    hurried: bool,
}

impl BulkQueue {
    /// Records that a thread waits for an mbarrier: operations drawn to land at their wait may do so now.
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
            AsyncOp::BulkWait { left, read } => {
                for lane in lanes(mask) {
                    if *read {
                        self.bulk_wait_read(warp, lane, *left as usize);
                    } else {
                        self.bulk_wait(warp, lane, *left as usize);
                    }
                }
            }
            AsyncOp::Copy { .. } | AsyncOp::Commit | AsyncOp::WaitGroup { .. } | AsyncOp::WaitAll => {}
        }
        Ok(Flow::Next)
    }

    /// Waits until all but `left` bulk groups of the lane have read their sources. The writes follow later.
    fn bulk_wait_read(&mut self, warp: &Warp, lane: usize, left: usize) {
        let key = (warp.id, lane);
        let Some(groups) = self.bulk.groups.get_mut(&key) else {
            return;
        };
        let waited = groups.committed.len().saturating_sub(left);
        let waited = groups.committed.iter().take(waited);
        let Some((count, step)) = waited.fold(None, |all, &(n, at)| Some((all.map_or(0, |(sum, _)| sum) + n, at)))
        else {
            return;
        };
        // Groups that have landed need not be tracked any more.
        while groups.committed.len() > left && groups.committed.front().is_some_and(|&(n, _)| n == 0) {
            groups.committed.pop_front();
        }
        let of_lane = |p: &(usize, &Pending)| p.1.group == Some(key);
        let first = self.bulk.pending.iter().enumerate().filter(of_lane).take(count);
        let unread = first.filter(|(_, p)| p.read.is_empty()).map(|(at, _)| at);
        for at in unread.collect::<Vec<_>>() {
            let pieces = &self.bulk.pending[at].pieces;
            let read = pieces.iter().map(|piece| self.fetch(piece.from, piece.bytes)).collect();
            let landing = Landing::Tick(self.tick + 1 + self.rng.below(WRITE_STEPS));
            let pending = &mut self.bulk.pending[at];
            pending.read = read;
            if pending.landing == Landing::AtWait {
                pending.landing = landing;
            }
        }
        self.watch.complete(warp.id, Engine::Bulk, step);
    }

    /// Waits until at most `left` bulk groups of the lane are pending.
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
        // The lane's oldest operations come first among its operations in the queue.
        while finish > 0 {
            let Some(at) = self.bulk.pending.iter().position(|p| p.group == Some(key)) else {
                break;
            };
            let done = self.bulk.pending.remove(at);
            self.land_bulk(done);
            finish -= 1;
        }
        if step > 0 {
            self.watch.complete(warp.id, Engine::Bulk, step);
        }
    }

    /// Lands the operations that are due, or all of them. Returns true if any landed.
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

    /// Records that a member of a bulk group landed before its wait, which then has one operation less to finish.
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
        let mut done = done;
        self.refuse_ended(&done);
        let mut read = std::mem::take(&mut done.read).into_iter();
        for piece in &done.pieces {
            let bytes = read.next().unwrap_or_else(|| self.fetch(piece.from, piece.bytes));
            self.move_piece(piece, bytes, &done);
        }
        for (object, bytes) in &done.barriers {
            self.complete_tx(done.actor, done.line, *object, *bytes, &done.known);
        }
        self.progress += 1;
    }

    /// Makes a finding of an operation that lands in a block all of whose threads have ended.
    fn refuse_ended(&mut self, done: &Pending) {
        let ended = done.pieces.iter().find_map(|piece| match piece.to {
            End::Shared(cta, at) if self.ctas[cta].live_threads == 0 => Some((cta, at)),
            _ => None,
        });
        if let Some((cta, at)) = ended {
            let block = self.block_name(cta);
            let place = (None, Some(at as u64));
            self.report(FindingKind::UseAfterFree, done.line, done.actor, place, || {
                format!("lands in the shared memory of block {block} after its threads ended")
            });
        }
    }

    fn fetch(&self, from: End, bytes: usize) -> Fetched {
        let undefined = self.undefined_bytes(from, bytes);
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
        Fetched { bytes: out, undefined }
    }

    fn move_piece(&mut self, piece: &Piece, fetched: Fetched, of: &Pending) {
        let Fetched { mut bytes, undefined } = fetched;
        if let (Some(element), End::Global(..)) = (of.element, piece.from)
            && element.bytes() == 4
        {
            for word in bytes.chunks_exact_mut(4) {
                let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                word.copy_from_slice(&element.loaded(value).to_le_bytes());
            }
        }
        if let Some(Reduction { op, ty }) = of.reduction {
            if let Some(first) = undefined.first() {
                self.report(FindingKind::Uninitialized, of.line, of.actor, (None, None), || {
                    format!("reduces {} bytes, of which byte {first} was never written", piece.bytes)
                });
            }
            return self.reduce_piece(piece, &bytes, op, ty);
        }
        match piece.to {
            End::Global(allocation, at) => {
                self.ctx.view.allocations[allocation].copy_in(at, &bytes);
            }
            End::Shared(cta, at) => self.ctas[cta].shared.write(at, &bytes),
            End::Fill(_) | End::Value(_) => {}
        }
        for index in undefined {
            let origin = Origin {
                line: of.line,
                computed: false,
            };
            self.unmark(piece.to, index, origin);
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
}
