//! Checks for races: they pass accesses to the shadows of shared and global memory, and report conflicts.

use std::collections::HashMap;

use super::clock::Knowledge;
use super::event::{ENGINES, Effect, Engine, Fence, MemoryAccess, Place};
use super::global_race::{self, GlobalShadow, Who};
use super::guess::Location;
use super::reports::{RacingRead, Reports};
use super::shared_race::{self, Accessor, SharedShadow};
use super::watch::{Scene, Watcher};
use crate::isa::types::Order;
use crate::memory::shared::SharedMemory;
use crate::report::FindingKind;

/// Races in the shared memory of a cluster's blocks.
pub(super) struct SharedRaces {
    /// Shadow of each block.
    shadows: Vec<SharedShadow>,
    /// Knowledge that strong operations left at words of shared memory, by block and word.
    released: HashMap<(usize, usize), Knowledge>,
}

impl SharedRaces {
    /// Makes shadows for `blocks` blocks with this many bytes each. `warps` is the number of warps in the cluster.
    pub fn new(blocks: usize, bytes: usize, warps: usize) -> Self {
        Self {
            shadows: (0..blocks).map(|_| SharedShadow::new(bytes, warps * ENGINES)).collect(),
            released: HashMap::new(),
        }
    }

    fn check(
        &mut self,
        access: &MemoryAccess<'_>,
        cta: usize,
        at: usize,
        memory: &SharedMemory,
        scene: &mut Scene<'_, '_>,
    ) {
        let Scene { clocks, reports } = scene;
        let agent = access.engine.agent(access.warp);
        let update = matches!(access.effect, Effect::Update { .. });
        let who = Accessor {
            agent,
            step: clocks.step(agent),
            known: clocks.known(access.warp),
            site: access.site,
            update,
        };
        if update {
            reports.guesses.updated(agent, Location::Shared(cta, at));
        }
        let shadow = &mut self.shadows[cta];
        let conflict = match access.effect {
            Effect::Read => shadow.read(at, access.bytes, who),
            effect => {
                let known = effect == Effect::Write && !access.stored.is_empty();
                let silent = known && memory.holds(at, access.stored);
                shadow.write(at, access.bytes, who, silent)
            }
        };
        if let Some(conflict) = conflict {
            report_shared(reports, access, (cta, at), conflict);
        }
    }
}

impl Watcher for SharedRaces {
    #[inline]
    fn watches(&self, place: &Place<'_>) -> bool {
        matches!(place, Place::Shared { .. })
    }

    fn access(&mut self, access: &MemoryAccess<'_>, mut scene: Scene<'_, '_>) {
        let Place::Shared { cta, at, memory } = access.place else {
            return;
        };
        if !access.order.is_strong() {
            return self.check(access, cta, at, memory, &mut scene);
        }
        // A strong operation learns what earlier ones left at the word, and leaves what the warp knows, which includes
        // the operation.
        let word = (cta, at / 4);
        if let Some(left) = self.released.get(&word) {
            scene.clocks.acquire(access.warp, left);
        }
        self.check(access, cta, at, memory, &mut scene);
        let known = scene.clocks.release(access.warp);
        self.released.entry(word).or_default().join(&known);
    }
}

#[cold]
fn report_shared(
    reports: &mut Reports<'_>,
    access: &MemoryAccess<'_>,
    place: (usize, usize),
    conflict: shared_race::Conflict,
) {
    let (cta, at) = place;
    let agent = access.engine.agent(access.warp);
    let earlier = reports.agent_name(conflict.agent);
    let earlier_line = reports.line_at(conflict.site);
    let kind = if conflict.only_proxy {
        FindingKind::MissingProxyFence
    } else if Engine::of(conflict.agent) != Engine::Warp {
        FindingKind::UnawaitedAsync
    } else {
        FindingKind::SharedRace
    };
    let own = match access.engine {
        Engine::Warp => "",
        Engine::CpAsync => "asynchronous copy: ",
        Engine::Bulk => "bulk copy: ",
        Engine::Wgmma => "wgmma: ",
    };
    let MemoryAccess { bytes, effect, .. } = *access;
    let message = || {
        let why = match kind {
            FindingKind::MissingProxyFence => "which no fence.proxy.async made visible to the async proxy",
            FindingKind::UnawaitedAsync => "which was not waited for",
            _ => "which nothing orders before it",
        };
        format!(
            "{own}{} of {bytes} bytes of shared memory at {at:#x} after a {} by {earlier} at line {earlier_line}, {why}",
            verb(effect != Effect::Read),
            verb(conflict.was_write),
        )
    };
    // If one access is a read and the other an update, the read may be a guess.
    let read = match effect {
        Effect::Update { .. } if !conflict.was_write => Some((conflict.site, conflict.agent)),
        Effect::Read if conflict.was_update => Some((access.site, agent)),
        _ => None,
    };
    let place = (access.lane, Some(at as u64));
    match read {
        Some((site, reader)) => {
            let location = Location::Shared(cta, at);
            let read = RacingRead { site, reader, location };
            reports.report_guess(kind, access.line, access.actor, place, read, message);
        }
        None => {
            reports.report(kind, access.line, access.actor, place, message);
        }
    }
}

/// Races between blocks in global memory.
pub(super) struct GlobalRaces<'m> {
    shadow: &'m GlobalShadow,
    /// Blocks of the grid by axis.
    grid: [u32; 3],
    blocks: Vec<Block>,
}

/// A block of the cluster.
struct Block {
    /// Number of the block within the grid.
    linear: u32,
    epoch: u32,
    /// True once a thread has executed a fence that other blocks may rely on.
    fenced: bool,
}

impl<'m> GlobalRaces<'m> {
    /// Makes the check for the blocks of these coordinates.
    pub fn new(shadow: &'m GlobalShadow, grid: [u32; 3], blocks: &[[u32; 3]]) -> Self {
        let block = |[x, y, z]: &[u32; 3]| Block {
            linear: x + grid[0] * (y + grid[1] * z),
            epoch: 0,
            fenced: false,
        };
        Self {
            shadow,
            grid,
            blocks: blocks.iter().map(block).collect(),
        }
    }

    #[cold]
    fn report(
        &self,
        reports: &mut Reports<'_>,
        access: &MemoryAccess<'_>,
        address: u64,
        conflict: global_race::Conflict,
    ) {
        let [x, y, _] = self.grid;
        let other = conflict.block;
        let (x, y, z) = (other % x, other / x % y, other / x / y);
        let message = || {
            format!(
                "{} of {} bytes after a {} by block {x},{y},{z} at line {}, which nothing orders before it",
                verb(access.effect != Effect::Read),
                access.bytes,
                verb(conflict.was_write),
                conflict.line
            )
        };
        let MemoryAccess { line, actor, .. } = *access;
        let place = (access.lane, Some(address));
        if conflict.guess {
            let read = RacingRead {
                site: access.site,
                reader: self.blocks[actor.cta].linear,
                location: Location::Global(address),
            };
            reports.report_guess(FindingKind::GlobalRace, line, actor, place, read, message);
        } else {
            reports.report(FindingKind::GlobalRace, line, actor, place, message);
        }
    }
}

impl Watcher for GlobalRaces<'_> {
    #[inline]
    fn watches(&self, place: &Place<'_>) -> bool {
        matches!(place, Place::Global { .. })
    }

    fn access(&mut self, access: &MemoryAccess<'_>, scene: Scene<'_, '_>) {
        let Place::Global {
            allocation,
            at,
            address,
        } = access.place
        else {
            return;
        };
        let block = &mut self.blocks[access.actor.cta];
        let (order, update) = match access.effect {
            // A plain `red` passes on nothing but the sum; an `atom` may be a lock or a ticket.
            Effect::Update { returns } => {
                let synchronizes = returns || access.order == Order::Release || block.fenced;
                (if synchronizes { access.order } else { Order::Weak }, true)
            }
            Effect::Read | Effect::Write => (access.order, false),
        };
        let mut epoch = block.epoch;
        if order.is_strong() {
            let release = order == Order::Release;
            epoch = self.shadow.synchronize(block.linear, address, release);
            block.epoch = epoch + u32::from(release);
        }
        let who = Who {
            block: block.linear,
            epoch,
            line: access.line,
            strong: update || order.is_strong(),
            update,
        };
        if update {
            scene.reports.guesses.updated(who.block, Location::Global(address));
        }
        let write = access.effect != Effect::Read;
        let conflict = self
            .shadow
            .access(allocation, at, access.bytes, write, who, access.stored);
        if let Some(conflict) = conflict {
            self.report(scene.reports, access, address, conflict);
        }
    }

    fn fence(&mut self, fence: Fence) {
        if fence.device {
            let block = &mut self.blocks[fence.cta];
            block.epoch = self.shadow.fence(block.linear);
            block.fenced = true;
        }
    }
}

fn verb(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}
