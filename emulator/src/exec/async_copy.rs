//! `cp.async`: copies from global to shared memory, which a lane issues, commits to groups and waits for.

use std::collections::VecDeque;

use super::access::{Access, Act, Target, effective};
use super::bulk::End;
use super::memory_ops::Touched;
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::event::Engine;
use crate::isa::types::{Addr, Pred, Slot};
use crate::isa::{AsyncOp, Instr};
use crate::schedule::Landing;

/// A lane's copy of up to 16 bytes.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    cta: usize,
    at: usize,
    bytes: usize,
    /// Allocation, offset and length of the source; the rest of the copy is zero.
    source: Option<(usize, usize, usize)>,
    landing: Landing,
    landed: bool,
    /// Step of the warp's copy engine for this copy.
    step: u32,
    line: u32,
}

/// Copies of each lane before their wait: those not yet in a group, then the groups, oldest first.
#[derive(Debug)]
pub(crate) struct LaneCopies {
    open: Vec<Vec<Copy>>,
    groups: Vec<VecDeque<Vec<Copy>>>,
    /// Number of copies that have not landed; nothing is searched while it is 0.
    flying: usize,
}

impl LaneCopies {
    pub fn new() -> Self {
        Self {
            open: vec![Vec::new(); 32],
            groups: vec![VecDeque::new(); 32],
            flying: 0,
        }
    }
}

/// Operands of a `cp.async`.
struct CopyArgs {
    dst: Addr,
    src: Addr,
    size: u32,
    src_size: Option<Slot>,
    ignore: Option<Pred>,
}

impl<'m> Cluster<'m> {
    pub(super) fn asynchronous(&mut self, warp: &mut Warp, instr: &Instr, op: &AsyncOp, mask: u32) -> Step {
        match op {
            AsyncOp::Copy {
                dst,
                src,
                size,
                src_size,
                ignore,
            } => {
                let args = CopyArgs {
                    dst: *dst,
                    src: *src,
                    size: *size,
                    src_size: *src_size,
                    ignore: *ignore,
                };
                self.cp_async(warp, instr, mask, &args)
            }
            AsyncOp::Commit => {
                for lane in lanes(mask) {
                    let group = std::mem::take(&mut warp.copies.open[lane]);
                    warp.copies.groups[lane].push_back(group);
                }
                Ok(Flow::Next)
            }
            AsyncOp::WaitGroup { left } => {
                self.wait_groups(warp, mask, *left as usize);
                Ok(Flow::Next)
            }
            AsyncOp::WaitAll => {
                self.wait_all(warp, mask);
                Ok(Flow::Next)
            }
            _ => self.bulk(warp, instr, op, mask),
        }
    }

    fn cp_async(&mut self, warp: &mut Warp, instr: &Instr, mask: u32, args: &CopyArgs) -> Step {
        let site = self.site(warp);
        let step = self.watch.issue(warp.id, Engine::CpAsync);
        let landing = self.temper.landing(&mut self.rng, self.tick);
        let ignored = args.ignore.map_or(0, |p| warp.frame().pred(p));
        let bytes = args.size as usize;
        let (to, from) = (*warp.frame().row(args.dst.base), *warp.frame().row(args.src.base));
        let mut read = Touched::default();
        for lane in lanes(mask) {
            let mut wanted = args
                .src_size
                .map_or(bytes, |s| warp.frame().row(s)[lane] as u32 as usize);
            if wanted > bytes {
                let message = format!("cp.async reads {wanted} bytes of a copy of {bytes}");
                return Err(self.fault(warp, instr.line, message));
            }
            if ignored >> lane & 1 != 0 {
                wanted = 0;
            }
            let write = Access {
                lane,
                address: effective(&args.dst, to[lane]),
                space: args.dst.space,
                bytes,
                align: bytes as u64,
                write: true,
            };
            let Some(place @ Target::Shared { cta, at }) = self.locate(warp, instr, write)? else {
                continue;
            };
            let act = |access| Act {
                engine: Engine::CpAsync,
                ..Act::of(access)
            };
            let mut source = None;
            if wanted > 0 {
                let access = Access {
                    lane,
                    address: effective(&args.src, from[lane]),
                    space: args.src.space,
                    bytes: wanted,
                    align: bytes as u64,
                    write: false,
                };
                let target = self.locate(warp, instr, access)?;
                if let Some(target @ Target::Global { allocation, at }) = target {
                    self.observe(warp, instr, site, access, target, act(access));
                    self.counters.global_read_bytes += wanted as u64;
                    read.add(target, access.address);
                    source = Some((allocation, at, wanted));
                }
            }
            self.observe(warp, instr, site, write, place, act(write));
            let mut copy = Copy {
                cta,
                at,
                bytes,
                source,
                landing,
                landed: false,
                step,
                line: instr.line,
            };
            if landing.due(self.tick) {
                self.land(&mut copy);
            } else {
                warp.copies.flying += 1;
            }
            warp.copies.open[lane].push(copy);
        }
        // The bytes were added lane by lane. Sectors are counted for the whole warp.
        let before = self.counters.global_read_bytes;
        self.count_access(&read, bytes as u64, false);
        self.counters.global_read_bytes = before;
        Ok(Flow::Next)
    }

    fn land(&mut self, copy: &mut Copy) {
        let mut bytes = [0u8; 16];
        if let Some((allocation, at, len)) = copy.source {
            self.ctx.view.allocations[allocation].copy_out(at, &mut bytes[..len]);
        }
        self.ctas[copy.cta].shared.write(copy.at, &bytes[..copy.bytes]);
        if let Some((allocation, at, len)) = copy.source {
            self.copy_undefined(
                End::Global(allocation, at),
                End::Shared(copy.cta, copy.at),
                len,
                copy.line,
            );
        }
        self.counters.shared_written_bytes += copy.bytes as u64;
        copy.landed = true;
    }

    /// Lands the warp's copies that are due.
    pub(super) fn land_due(&mut self, warp: &mut Warp) {
        if warp.copies.flying == 0 {
            return;
        }
        let tick = self.tick;
        let LaneCopies { open, groups, flying } = &mut warp.copies;
        let waiting = open.iter_mut().flatten();
        let waiting = waiting.chain(groups.iter_mut().flatten().flatten());
        for copy in waiting {
            if !copy.landed && copy.landing.due(tick) {
                self.land(copy);
                *flying -= 1;
            }
        }
    }

    /// Completes a group: lands the rest of it, and orders the warp after it.
    fn finish_copies(&mut self, warp: &mut Warp, copies: Vec<Copy>) {
        for mut copy in copies {
            if !copy.landed {
                self.land(&mut copy);
                warp.copies.flying -= 1;
            }
            self.watch.complete(warp.id, Engine::CpAsync, copy.step);
        }
    }

    fn wait_groups(&mut self, warp: &mut Warp, mask: u32, left: usize) {
        for lane in lanes(mask) {
            while warp.copies.groups[lane].len() > left {
                if let Some(group) = warp.copies.groups[lane].pop_front() {
                    self.finish_copies(warp, group);
                }
            }
        }
    }

    pub(super) fn wait_all(&mut self, warp: &mut Warp, mask: u32) {
        self.wait_groups(warp, mask, 0);
        for lane in lanes(mask) {
            let open = std::mem::take(&mut warp.copies.open[lane]);
            self.finish_copies(warp, open);
        }
    }

    /// `cp.async.mbarrier.arrive`: orders the barrier after the lane's copies so far.
    pub(super) fn cp_async_arrive(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        addr: &Addr,
        no_increment: bool,
    ) -> Step {
        let before = self.watch.known(warp.id).clone();
        self.wait_all(warp, mask);
        let known = self.watch.release(warp.id);
        // The thread itself is ordered after its copies only once it has waited on the barrier.
        self.watch.restore(warp.id, before);
        for lane in lanes(mask) {
            let Some(object) = self.object(warp, instr, lane, addr, false)? else {
                continue;
            };
            let actor = self.actor(warp);
            if no_increment {
                self.arrive_on(actor, instr.line, object, 1, false, &known);
            } else {
                // The pending count rises and falls again, so only the knowledge is passed on.
                self.complete_tx(actor, instr.line, object, 0, &known);
            }
        }
        Ok(Flow::Next)
    }
}
