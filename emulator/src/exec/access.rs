//! Memory accesses: finds the memory of an address and applies the checks that every access must pass.

use super::warp::Warp;
use super::{Cluster, is_narrow};
use crate::check::event::{Actor, Effect, Engine, MemoryAccess, Place, Site};
use crate::error::Error;
use crate::isa::Instr;
use crate::isa::types::{Addr, Order, Space};
use crate::isa::window;
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

/// Facts about an access beside its address and size, for the checks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Act<'a> {
    pub engine: Engine,
    pub effect: Effect,
    pub order: Order,
    /// Bytes that a store writes; empty if they are not known yet.
    pub stored: &'a [u8],
}

impl Act<'_> {
    /// Returns an ordinary load or store by the warp itself.
    #[inline]
    pub fn of(access: Access) -> Self {
        Self {
            engine: Engine::Warp,
            effect: Effect::of(access.write),
            order: Order::Weak,
            stored: &[],
        }
    }
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
        match found {
            None => self.outside(warp, instr, access, space, offset)?,
            Some(Target::Shared { cta, .. }) if cta != warp.cta && self.ctas[cta].live_threads == 0 => {
                self.ended(warp, instr, access, cta);
            }
            Some(_) => {}
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

    /// Makes a finding of an access to the shared memory of another block, all of whose threads have ended.
    #[cold]
    fn ended(&mut self, warp: &Warp, instr: &Instr, access: Access, cta: usize) {
        let (actor, block) = (self.actor(warp), self.block_name(cta));
        let place = (Some(access.lane), Some(access.address));
        self.report(FindingKind::UseAfterFree, instr.line, actor, place, || {
            format!(
                "access to {} bytes of the shared memory of block {block} after its threads ended",
                access.bytes
            )
        });
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

    /// Publishes an access whose memory was found, by the instruction at `site`, to the checks.
    #[inline]
    pub fn observe(&mut self, warp: &Warp, instr: &Instr, site: Site, access: Access, target: Target, act: Act<'_>) {
        let place = match target {
            Target::Global { allocation, at } => Place::Global {
                allocation,
                at,
                address: access.address,
            },
            Target::Shared { cta, at } => {
                let memory = &self.ctas[cta].shared;
                Place::Shared { cta, at, memory }
            }
            Target::Local { .. } | Target::Param { .. } => return,
        };
        if !self.watch.watches(&place) {
            return;
        }
        let Act {
            engine,
            effect,
            order,
            stored,
        } = act;
        self.watch.access(&MemoryAccess {
            warp: warp.id,
            engine,
            actor: Actor {
                cta: warp.cta,
                warp: warp.index,
            },
            site,
            line: instr.line,
            lane: Some(access.lane),
            place,
            bytes: access.bytes,
            effect,
            order,
            stored,
        });
    }
}

fn verb(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}
