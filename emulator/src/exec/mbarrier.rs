//! mbarrier objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").
//!
//! A phase completes when no arrival and no transaction byte is pending. The object is opaque to the program, so its
//! state is kept beside shared memory, by address.

use super::access::{Access, Act, Target, effective};
use super::warp::{Wait, Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::clock::Knowledge;
use crate::check::event::Actor;
use crate::isa::types::{Addr, Slot};
use crate::isa::{Instr, MbarrierOp, Phase};
use crate::report::FindingKind;

/// Largest arrival count, and largest transaction count either way.
const MAX_COUNT: i64 = (1 << 20) - 1;

/// State of one object.
#[derive(Debug, Default)]
pub(crate) struct Mbarrier {
    /// Number of arrivals that each phase expects.
    expected: i64,
    pending: i64,
    /// Number of pending transaction bytes.
    tx: i64,
    /// Number of completed phases.
    pub phase: u64,
    arriving: Knowledge,
    pub left: Knowledge,
}

impl Mbarrier {
    fn complete(&mut self) -> bool {
        if self.pending > 0 || self.tx != 0 {
            return false;
        }
        self.pending = self.expected;
        self.phase += 1;
        self.left = self.arriving.clone();
        true
    }
}

impl<'m> Cluster<'m> {
    pub(super) fn mbarrier(&mut self, warp: &mut Warp, instr: &Instr, op: &MbarrierOp, mask: u32) -> Step {
        match op {
            MbarrierOp::PendingCount { dst, state } => {
                let states = *warp.frame().row(*state);
                for lane in lanes(mask) {
                    warp.frame_mut().row_mut(*dst)[lane] = states[lane] & MAX_COUNT as u64;
                }
                Ok(Flow::Next)
            }
            MbarrierOp::Wait { addr, phase, done, .. } => self.mbarrier_wait(warp, instr, mask, addr, *phase, *done),
            MbarrierOp::Init { addr, count } => {
                for lane in lanes(mask) {
                    let count = warp.frame().row(*count)[lane] as u32;
                    self.mbarrier_init(warp, instr, lane, addr, count)?;
                }
                Ok(Flow::Next)
            }
            MbarrierOp::Inval { addr } => {
                for lane in lanes(mask) {
                    if let Some((cta, at)) = self.object(warp, instr, lane, addr, true)? {
                        self.ctas[cta].mbarriers.remove(&at);
                    }
                }
                Ok(Flow::Next)
            }
            MbarrierOp::Arrive { .. } => self.mbarrier_arrive(warp, instr, op, mask),
            MbarrierOp::ExpectTx { addr, bytes } => {
                for lane in lanes(mask) {
                    let bytes = warp.frame().row(*bytes)[lane] as u32;
                    if let Some((cta, at)) = self.object(warp, instr, lane, addr, false)? {
                        self.add_tx(self.actor(warp), instr.line, (cta, at), i64::from(bytes));
                    }
                }
                Ok(Flow::Next)
            }
            MbarrierOp::CompleteTx { addr, bytes } => {
                for lane in lanes(mask) {
                    let bytes = warp.frame().row(*bytes)[lane] as u32;
                    if let Some(object) = self.object(warp, instr, lane, addr, false)? {
                        let known = self.watch.release(warp.id);
                        self.complete_tx(self.actor(warp), instr.line, object, bytes, &known);
                    }
                }
                Ok(Flow::Next)
            }
            MbarrierOp::CpAsyncArrive { addr, no_increment } => {
                self.cp_async_arrive(warp, instr, mask, addr, *no_increment)
            }
        }
    }

    /// Returns the object at a lane's address, as block and offset. The access is checked for races: a read, or a
    /// write for `init` and `inval`.
    pub(super) fn object(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        addr: &Addr,
        write: bool,
    ) -> Result<Option<(usize, u32)>, crate::error::Error> {
        let access = Access {
            lane,
            address: effective(addr, warp.frame().row(addr.base)[lane]),
            space: addr.space,
            bytes: 8,
            align: 8,
            write,
        };
        let Some(target) = self.locate(warp, instr, access)? else {
            return Ok(None);
        };
        let Target::Shared { cta, at } = target else {
            let message = "an mbarrier that is not in shared memory";
            return Err(self.fault(warp, instr.line, message));
        };
        let site = self.site(warp);
        self.observe(warp, instr, site, access, target, Act::of(access));
        Ok(Some((cta, at as u32)))
    }

    fn misuse(&mut self, actor: Actor, line: u32, at: u32, message: impl FnOnce() -> String) {
        self.report(FindingKind::Mbarrier, line, actor, (None, Some(u64::from(at))), message);
    }

    fn mbarrier_init(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        addr: &Addr,
        count: u32,
    ) -> Result<(), crate::error::Error> {
        let Some((cta, at)) = self.object(warp, instr, lane, addr, true)? else {
            return Ok(());
        };
        let actor = self.actor(warp);
        if count == 0 || i64::from(count) > MAX_COUNT {
            self.misuse(actor, instr.line, at, || {
                format!("init with count {count}: it is 1 to {MAX_COUNT}")
            });
        }
        if self.ctas[cta].mbarriers.contains_key(&at) {
            self.misuse(actor, instr.line, at, || {
                "init of an mbarrier that is in use: it was not invalidated".to_owned()
            });
        }
        let fresh = Mbarrier {
            expected: i64::from(count),
            pending: i64::from(count),
            ..Mbarrier::default()
        };
        self.ctas[cta].mbarriers.insert(at, fresh);
        self.ctas[cta].shared.store(at as usize, 8, u64::from(count));
        Ok(())
    }

    fn missing(&mut self, actor: Actor, line: u32, at: u32) {
        self.misuse(actor, line, at, || "there is no initialised mbarrier here".to_owned());
    }

    fn mbarrier_arrive(&mut self, warp: &mut Warp, instr: &Instr, op: &MbarrierOp, mask: u32) -> Step {
        let MbarrierOp::Arrive {
            addr,
            count,
            expect,
            drop,
            state,
        } = op
        else {
            return Ok(Flow::Next);
        };
        let known = self.watch.release(warp.id);
        for lane in lanes(mask) {
            let value = |slot: &Slot| warp.frame().row(*slot)[lane] as u32;
            let n = count.as_ref().map_or(1, value);
            let expected = expect.as_ref().map(value);
            let Some(object) = self.object(warp, instr, lane, addr, false)? else {
                continue;
            };
            let actor = self.actor(warp);
            if let Some(bytes) = expected {
                self.add_tx(actor, instr.line, object, i64::from(bytes));
            }
            let token = self.arrive_on(actor, instr.line, object, n, *drop, &known);
            warp.frame_mut().row_mut(*state)[lane] = token;
        }
        Ok(Flow::Next)
    }

    /// Arrives `n` times; returns the previous state.
    pub(super) fn arrive_on(
        &mut self,
        actor: Actor,
        line: u32,
        object: (usize, u32),
        n: u32,
        drop: bool,
        known: &Knowledge,
    ) -> u64 {
        let (cta, at) = object;
        let Some(barrier) = self.ctas[cta].mbarriers.get_mut(&at) else {
            self.missing(actor, line, at);
            return 0;
        };
        let token = barrier.phase << 20 | barrier.pending as u64 & MAX_COUNT as u64;
        let pending = barrier.pending;
        barrier.pending = (pending - i64::from(n)).max(0);
        barrier.expected -= i64::from(drop && barrier.expected > 0);
        barrier.arriving.join(known);
        barrier.complete();
        self.progress += 1;
        if i64::from(n) > pending || n == 0 {
            self.misuse(actor, line, at, || format!("{n} arrivals where {pending} are pending"));
        }
        token
    }

    /// Adds to the pending transaction bytes.
    pub(super) fn add_tx(&mut self, actor: Actor, line: u32, object: (usize, u32), bytes: i64) {
        let (cta, at) = object;
        let Some(barrier) = self.ctas[cta].mbarriers.get_mut(&at) else {
            return self.missing(actor, line, at);
        };
        barrier.tx += bytes;
        let tx = barrier.tx;
        if tx.abs() > MAX_COUNT {
            self.misuse(actor, line, at, || {
                format!("the transaction count became {tx}; it stays within {MAX_COUNT} of zero")
            });
        }
    }

    /// Subtracts completed bytes from the transaction count, and completes the phase if nothing is pending any more.
    pub(super) fn complete_tx(&mut self, actor: Actor, line: u32, object: (usize, u32), bytes: u32, known: &Knowledge) {
        let (cta, at) = object;
        self.add_tx(actor, line, object, -i64::from(bytes));
        if let Some(barrier) = self.ctas[cta].mbarriers.get_mut(&at) {
            barrier.arriving.join(known);
            barrier.complete();
            self.progress += 1;
        }
    }

    fn mbarrier_wait(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        addr: &Addr,
        phase: Phase,
        done: Slot,
    ) -> Step {
        let forced = std::mem::take(&mut warp.group().forced);
        let mut answer = 0;
        let mut wait = None;
        for lane in lanes(mask) {
            let Some((cta, at)) = self.object(warp, instr, lane, addr, false)? else {
                answer |= 1 << lane;
                continue;
            };
            let Some(barrier) = self.ctas[cta].mbarriers.get(&at) else {
                self.missing(self.actor(warp), instr.line, at);
                answer |= 1 << lane;
                continue;
            };
            let now = barrier.phase;
            let waited = match phase {
                // The phase before the current one has the other parity and is complete.
                Phase::Parity(slot) => now + (warp.frame().row(slot)[lane] & 1 ^ now & 1 ^ 1),
                Phase::Token(slot) => (warp.frame().row(slot)[lane] >> 20) + 1,
            };
            if now >= waited {
                answer |= 1 << lane;
                self.watch.acquire(warp.id, &barrier.left);
            } else {
                wait = Some(Wait::Mbarrier {
                    cta: cta as u32,
                    offset: at,
                    phase: waited,
                });
            }
        }
        // No lane can continue yet: sleep until one may, instead of spinning.
        if let Some(wait) = wait
            && answer == 0
            && !forced
        {
            self.bulk.hurry();
            warp.group().wait = wait;
            return Ok(Flow::Moved);
        }
        warp.frame_mut().set_pred(done, mask, answer);
        Ok(Flow::Next)
    }
}
