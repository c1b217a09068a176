//! Memory accesses: finds the memory of an address and applies the checks that every access must pass.

use super::warp::Warp;
use super::{Cluster, Write, is_narrow};
use crate::check::global_race::Who;
use crate::check::guess::Location;
use crate::check::shared_race::{Engine, Site};
use crate::error::Error;
use crate::isa::types::{Addr, Order, Space};
use crate::isa::window;
use crate::isa::{Instr, Memory, Op};
use crate::memory::global::Outside;
use crate::report::FindingKind;

/// Location of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Allocation of the view, and the offset in it.
    Global { allocation: usize, at: usize },
    /// Block of the cluster, and the offset in its shared memory.
    Shared { cta: usize, at: usize },
    /// Offset in the lane's local memory.
    Local { at: usize },
    /// Offset in the kernel's parameters.
    Param { at: usize },
}

/// One lane's access.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub lane: usize,
    pub address: u64,
    pub space: Space,
    pub bytes: usize,
    pub align: u64,
    pub write: bool,
}

/// Adds a lane's base register and the instruction's offset.
#[inline]
pub(crate) fn effective(addr: &Addr, base: u64) -> u64 {
    let address = base.wrapping_add_signed(addr.offset);
    if is_narrow(addr.space) {
        address & 0xffff_ffff
    } else {
        address
    }
}

impl<'m> Cluster<'m> {
    /// Finds the memory of an access. If there is none, or the address is misaligned, it makes a finding and returns
    /// `None`.
    ///
    /// # Errors
    ///
    /// A fault, if the check that would make the finding is off.
    pub fn locate(&mut self, warp: &mut Warp, instr: &Instr, access: Access) -> Result<Option<Target>, Error> {
        let Access {
            space,
            address,
            bytes,
            align,
            ..
        } = access;
        if !address.is_multiple_of(align) {
            self.misaligned(warp, instr, access)?;
            return Ok(None);
        }
        let (space, offset) = match space {
            Space::Generic => window::resolve(address),
            other => (other, address),
        };
        let at = offset as usize;
        let fits = |len: usize| at.checked_add(bytes).is_some_and(|end| end <= len);
        let found = match space {
            Space::Global | Space::Const | Space::Generic => {
                let found = self.ctx.view.find(offset, bytes, warp.hint);
                found.map(|allocation| {
                    warp.hint = allocation;
                    let base = self.ctx.view.allocations[allocation].base();
                    Target::Global {
                        allocation,
                        at: (offset - base) as usize,
                    }
                })
            }
            Space::Shared | Space::SharedCluster => self.shared_target(warp.cta, offset, bytes),
            Space::Local => fits(warp.local.len(access.lane)).then_some(Target::Local { at }),
            Space::Param => {
                let readable = fits(self.ctx.launch.params.len()) && !access.write;
                readable.then_some(Target::Param { at })
            }
        };
        if found.is_none() {
            self.outside(warp, instr, access, space, offset)?;
        }
        Ok(found)
    }

    /// Returns the block and offset of a shared address. Rank 0 in its upper bits means the executing block.
    pub fn shared_target(&self, own: usize, address: u64, bytes: usize) -> Option<Target> {
        let rank = (address >> window::RANK_SHIFT) as usize;
        let cta = if rank == 0 { own } else { rank - 1 };
        let at = (address & window::OFFSET_MASK) as usize;
        let shared = &self.ctas.get(cta)?.shared;
        let inside = at as u64 >= self.ctx.shared_start && at.checked_add(bytes).is_some_and(|end| end <= shared.len());
        inside.then_some(Target::Shared { cta, at })
    }

    #[cold]
    fn misaligned(&mut self, warp: &Warp, instr: &Instr, access: Access) -> Result<(), Error> {
        let Access { address, align, .. } = access;
        let message = format!(
            "{} of {} bytes at {address:#x}, which is not a multiple of {align}",
            verb(access.write),
            access.bytes
        );
        let actor = self.actor(warp);
        let at = (Some(access.lane), Some(address));
        if !self.report(FindingKind::Misaligned, instr.line, actor, at, || message.clone()) {
            return Err(self.fault(warp, instr.line, format!("misaligned address: {message}")));
        }
        Ok(())
    }

    #[cold]
    fn outside(&mut self, warp: &Warp, instr: &Instr, access: Access, space: Space, offset: u64) -> Result<(), Error> {
        let Access { bytes, .. } = access;
        let mut kind = FindingKind::OutOfBounds;
        let place = match space {
            Space::Global | Space::Const | Space::Generic => match self.ctx.view.explain(offset, bytes) {
                Outside::Freed(base, len) => {
                    kind = FindingKind::UseAfterFree;
                    format!("global memory at {offset:#x}, in {len} bytes at {base:#x} that were freed")
                }
                Outside::Unmapped(text) => format!("global memory at {offset:#x}: {text}"),
            },
            Space::Shared | Space::SharedCluster => format!(
                "shared memory at {offset:#x}; the block has {:#x} to {:#x}",
                window::SHARED_BASE,
                self.ctas[warp.cta].shared.len()
            ),
            Space::Local => format!(
                "local memory at {offset:#x}; the thread has {} bytes",
                warp.local.len(access.lane)
            ),
            Space::Param => format!(
                "kernel parameters at {offset:#x}, of which there are {} bytes",
                self.ctx.launch.params.len()
            ),
        };
        let message = format!("{} of {bytes} bytes of {place}", verb(access.write));
        let actor = self.actor(warp);
        let at = (Some(access.lane), Some(access.address));
        if !self.report(kind, instr.line, actor, at, || message.clone()) {
            return Err(self.fault(warp, instr.line, format!("illegal address: {message}")));
        }
        Ok(())
    }

    /// Passes an access whose memory was found to the race detectors.
    #[inline]
    pub fn observe(&mut self, warp: &Warp, instr: &Instr, access: Access, target: Target, order: Order, site: Site) {
        self.observe_store(warp, instr, access, target, order, site, &[]);
    }

    /// Passes a store of `bytes` to the race detectors; `bytes` is empty if they are not known yet.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "a store is all of these")]
    pub fn observe_store(
        &mut self,
        warp: &Warp,
        instr: &Instr,
        access: Access,
        target: Target,
        order: Order,
        site: Site,
        bytes: &[u8],
    ) {
        match target {
            Target::Shared { cta, at } if self.ctas[cta].shadow.is_some() => {
                if order.is_strong() {
                    self.acquire_shared(warp.id, cta, at as u64);
                }
                let agent = Engine::Warp.agent(warp.id);
                let actor = self.actor(warp);
                let range = (at, access.bytes);
                let lane = Some(access.lane);
                let silent = !bytes.is_empty() && self.ctas[cta].shared.holds(at, bytes);
                let write = match &instr.op {
                    Op::Memory(Memory::Atomic { .. }) => Write::Update,
                    _ if silent => Write::Silent,
                    _ => access.write.into(),
                };
                self.watch_shared(warp.id, agent, actor, site, cta, range, write, lane);
                if order.is_strong() {
                    self.release_shared(warp.id, cta, at as u64);
                }
            }
            Target::Global { allocation, at } if self.ctx.shadow.is_some() => {
                let range = (allocation, at);
                self.watch_global(warp, instr, access, range, order, false, bytes);
            }
            _ => {}
        }
    }

    /// Passes a global access to the race detector.
    #[expect(clippy::too_many_arguments, reason = "an access is all of these")]
    pub fn watch_global(
        &mut self,
        warp: &Warp,
        instr: &Instr,
        access: Access,
        range: (usize, usize),
        order: Order,
        atomic: bool,
        stored: &[u8],
    ) {
        let Some(shadow) = &self.ctx.shadow else {
            return;
        };
        let (allocation, at) = range;
        let cta = &mut self.ctas[warp.cta];
        let mut epoch = cta.epoch;
        if order.is_strong() {
            let release = order == Order::Release;
            epoch = shadow.synchronize(cta.linear, access.address, release);
            cta.epoch = epoch + u32::from(release);
        }
        let who = Who {
            block: cta.linear,
            epoch,
            line: instr.line,
            strong: atomic || order.is_strong(),
            update: atomic,
        };
        if atomic {
            self.guesses.updated(who.block, Location::Global(access.address));
        }
        let conflict = shadow.access(allocation, at, access.bytes, access.write, who, stored);
        if let Some(conflict) = conflict {
            let actor = self.actor(warp);
            let place = (Some(access.lane), Some(access.address));
            let [x, y, z] = self.ctx.launch.block_coordinates(conflict.block);
            let message = move || {
                format!(
                    "{} of {} bytes after a {} by block {x},{y},{z} at line {}, which nothing orders before it",
                    verb(access.write),
                    access.bytes,
                    verb(conflict.was_write),
                    conflict.line
                )
            };
            if conflict.guess {
                let read = (self.site(warp), who.block, Location::Global(access.address));
                self.report_guess(FindingKind::GlobalRace, instr.line, actor, place, read, message);
            } else {
                self.report(FindingKind::GlobalRace, instr.line, actor, place, message);
            }
        }
    }
}

fn verb(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}
