//! Connection of the executor to the race detector: the clocks of warps, and reports of unordered accesses.

use super::{Actor, Cluster, Write};
use crate::check::clock::Knowledge;
use crate::check::guess::Location;
use crate::check::shared_race::{Accessor, ENGINES, Engine, Site};
use crate::report::FindingKind;

impl<'m> Cluster<'m> {
    /// Describes an agent of the race detector for messages.
    pub fn describe_agent(&self, agent: u32) -> String {
        let id = agent as usize / ENGINES;
        let warp = id % self.warps_per_cta;
        let block = self.block_name((id / self.warps_per_cta).min(self.ctas.len() - 1));
        let what = match Engine::of(agent) {
            Engine::Warp => "",
            Engine::CpAsync => "an asynchronous copy (cp.async) of ",
            Engine::Bulk => "a bulk copy of ",
            Engine::Wgmma => "a wgmma of ",
        };
        if self.ctas.len() > 1 {
            format!("{what}warp {warp} of block {block}")
        } else {
            format!("{what}warp {warp}")
        }
    }

    /// Releases: returns the warp's vector clock, to be stored at a synchronisation object, and starts the warp's
    /// next step.
    pub fn release(&mut self, id: usize) -> Knowledge {
        let known = self.known[id].clone();
        let agent = Engine::Warp.agent(id);
        self.steps[agent as usize] += 1;
        let step = self.steps[agent as usize];
        self.known[id].generic.set(agent, step);
        known
    }

    /// Acquires: joins the clock stored at a synchronisation object into the warp's clock.
    pub fn acquire(&mut self, id: usize, left: &Knowledge) {
        self.known[id].join(left);
    }

    /// Starts a new step of one of a warp's engines, with the warp's current clock.
    pub fn engine_step(&mut self, id: usize, engine: Engine) -> u32 {
        let agent = engine.agent(id) as usize;
        self.steps[agent] += 1;
        self.steps[agent]
    }

    /// Passes a shared-memory access to the race detector.
    #[expect(clippy::too_many_arguments, reason = "an access is all of these")]
    pub fn watch_shared(
        &mut self,
        warp_id: usize,
        agent: u32,
        actor: Actor,
        site: Site,
        cta: usize,
        range: (usize, usize),
        write: Write,
        lane: Option<usize>,
    ) {
        let (at, bytes) = range;
        let who = Accessor {
            agent,
            step: self.steps[agent as usize],
            known: &self.known[warp_id],
            site,
            update: write == Write::Update,
        };
        if write == Write::Update {
            self.guesses.updated(agent, Location::Shared(cta, at));
        }
        let Some(shadow) = &mut self.ctas[cta].shadow else {
            return;
        };
        let conflict = match write {
            Write::No => shadow.read(at, bytes, who),
            write => shadow.write(at, bytes, who, write == Write::Silent),
        };
        if let Some(conflict) = conflict {
            // If one access is a read and the other an update, the read may be a guess.
            let read = match write {
                Write::Update if !conflict.was_write => Some((conflict.site, conflict.agent)),
                Write::No if conflict.was_update => Some((site, agent)),
                _ => None,
            };
            let read = read.map(|(site, reader)| (site, reader, Location::Shared(cta, at)));
            let write = write != Write::No;
            self.report_conflict(conflict, actor, site, (at, bytes), write, lane, agent, read);
        }
    }

    #[cold]
    #[expect(clippy::too_many_arguments, reason = "a conflict is all of these")]
    fn report_conflict(
        &mut self,
        conflict: crate::check::shared_race::Conflict,
        actor: Actor,
        site: Site,
        range: (usize, usize),
        write: bool,
        lane: Option<usize>,
        agent: u32,
        read: Option<(Site, u32, Location)>,
    ) {
        let earlier = self.describe_agent(conflict.agent);
        let earlier_line = self.line_at(conflict.site);
        let line = self.line_at(site);
        let verb = |w: bool| if w { "write" } else { "read" };
        let (at, bytes) = range;
        let kind = if conflict.only_proxy {
            FindingKind::MissingProxyFence
        } else if Engine::of(conflict.agent) != Engine::Warp {
            FindingKind::UnawaitedAsync
        } else {
            FindingKind::SharedRace
        };
        let own = match Engine::of(agent) {
            Engine::Warp => "",
            Engine::CpAsync => "asynchronous copy: ",
            Engine::Bulk => "bulk copy: ",
            Engine::Wgmma => "wgmma: ",
        };
        let message = || {
            let why = match kind {
                FindingKind::MissingProxyFence => "which no fence.proxy.async made visible to the async proxy",
                FindingKind::UnawaitedAsync => "which was not waited for",
                _ => "which nothing orders before it",
            };
            format!(
                "{own}{} of {bytes} bytes of shared memory at {at:#x} after a {} by {earlier} at line {earlier_line}, {why}",
                verb(write),
                verb(conflict.was_write),
            )
        };
        let place = (lane, Some(at as u64));
        match read {
            Some(read) => self.report_guess(kind, line, actor, place, read, message),
            None => {
                self.report(kind, line, actor, place, message);
            }
        }
    }

    /// Acquires before a strong operation on shared memory: joins the clocks that earlier ones left at the address.
    pub fn acquire_shared(&mut self, id: usize, cta: usize, at: u64) {
        if let Some(left) = self.released.get(&(cta, at / 4)) {
            let left = left.clone();
            self.acquire(id, &left);
        }
    }

    /// Releases after the operation: stores the warp's clock, which includes the operation, at the address.
    pub fn release_shared(&mut self, id: usize, cta: usize, at: u64) {
        let known = self.release(id);
        self.released.entry((cta, at / 4)).or_default().join(&known);
    }
}
