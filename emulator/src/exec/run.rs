//! Running a cluster: the choice of the next warp, the end of waits, and deadlocks.

use super::Cluster;
use super::control::place;
use super::warp::{Group, LocalState, Wait, Warp};
use crate::check::event::{Actor, Site};
use crate::error::Error;
use crate::report::FindingKind;

/// Most instructions that a warp runs before another warp gets a turn.
const QUANTUM: u64 = 64;
/// Number of rounds in which every wait fails and nothing else happens, after which the cluster is deadlocked.
const PATIENCE: u32 = 64;

impl<'m> Cluster<'m> {
    /// Makes the warps of all blocks, at the entry.
    pub fn warps(&mut self) -> Result<Vec<Warp>, Error> {
        let mut out = Vec::new();
        for cta in 0..self.ctas.len() {
            for index in 0..self.warps_per_cta {
                let first = index as u32 * 32;
                let n = (self.ctas[cta].threads - first).min(32);
                let mask = u32::MAX >> (32 - n);
                let id = cta * self.warps_per_cta + index;
                let registers = self.ctx.registers.unwrap_or(255);
                let mut warp = Warp::new(LocalState {
                    cta,
                    index: index as u32,
                    id,
                    live: mask,
                    registers,
                });
                let frame = self.make_frame(&mut warp, self.ctx.entry, mask, None);
                let Some(frame) = frame else {
                    return Err(Error::Launch {
                        entry: self.ctx.launch.entry.to_owned(),
                        argument: "local memory of a thread",
                        value: self.ctx.program.functions[self.ctx.entry as usize]
                            .frame_bytes
                            .to_string(),
                        limit: format!("the limit is {} bytes", crate::memory::local::LIMIT),
                    });
                };
                let frame = place(&mut warp, frame);
                warp.groups.push(Group {
                    pc: 0,
                    frame,
                    depth: 0,
                    mask,
                    wait: Wait::Ready,
                    forced: false,
                    resumed: false,
                });
                out.push(warp);
            }
        }
        Ok(out)
    }

    /// Runs all warps to their ends, or until `budget` steps have passed; true if they ended.
    pub fn run(&mut self, warps: &mut [Warp], budget: u64) -> Result<bool, Error> {
        let alive = |at: &usize| !warps[*at].groups.is_empty();
        let mut running: Vec<usize> = (0..warps.len()).filter(alive).collect();
        let deadline = self.tick.saturating_add(budget);
        let mut patience = PATIENCE;
        let mut seen = 0;
        while !running.is_empty() {
            if self.tick > deadline {
                return Ok(false);
            }
            self.tick += 1;
            self.land_bulk_due(false);
            let start = self.rng.below(running.len() as u64) as usize;
            let mut ran = false;
            for step in 0..running.len() {
                let at = (start + step) % running.len();
                let warp = &mut warps[running[at]];
                self.wake(warp);
                if !warp.choose() {
                    continue;
                }
                self.turn(warp)?;
                self.charge(warp)?;
                ran = true;
                if warp.groups.is_empty() {
                    let lanes = u32::MAX;
                    self.wait_all(warp, lanes);
                    running.swap_remove(at);
                }
                break;
            }
            if ran {
                continue;
            }
            if self.progress != seen {
                seen = self.progress;
                patience = PATIENCE;
            }
            if !self.unblock(warps, &running, &mut patience) {
                self.deadlock(warps, &running);
                break;
            }
        }
        self.land_bulk_due(true);
        Ok(true)
    }

    /// Runs a warp for one turn.
    fn turn(&mut self, warp: &mut Warp) -> Result<(), Error> {
        let quantum = 1 + self.rng.below(QUANTUM);
        self.land_due(warp);
        self.land_products(warp)?;
        for _ in 0..quantum {
            self.step(warp)?;
            let simple = warp.groups.len() == 1 && warp.groups[0].wait == Wait::Ready;
            if !simple && !warp.choose() {
                return Ok(());
            }
            self.tick += 1;
        }
        Ok(())
    }

    /// Readies the groups of a warp whose wait has ended.
    fn wake(&mut self, warp: &mut Warp) {
        for at in 0..warp.groups.len() {
            let group = warp.groups[at];
            let over = match group.wait {
                Wait::Ready => continue,
                Wait::Converge { required } => required & warp.live & !group.mask == 0,
                Wait::WarpSync { members } => {
                    let here = warp.groups.iter().filter(|g| matches!(g.wait, Wait::WarpSync { .. }));
                    let here = here.fold(0, |m, g| m | g.mask);
                    members & warp.live & !here == 0
                }
                Wait::Barrier { id, generation } => {
                    let barrier = &self.ctas[warp.cta].barriers[id as usize];
                    let over = barrier.generation > generation;
                    if over {
                        self.watch.acquire(warp.id, &barrier.left);
                    }
                    over
                }
                Wait::ClusterBarrier { generation } => {
                    let over = self.barrier.generation > generation;
                    if over {
                        self.watch.acquire(warp.id, &self.barrier.left);
                    }
                    over
                }
                Wait::Mbarrier { cta, offset, phase } => {
                    let barrier = self.ctas[cta as usize].mbarriers.get(&offset);
                    let over = barrier.is_none_or(|b| b.phase >= phase);
                    if !over {
                        self.bulk.hurry();
                    }
                    over
                }
                Wait::Sleep { until } => self.tick >= until,
                Wait::Registers { count } => self.ctas[warp.cta].pool >= count,
            };
            if over {
                if let Wait::WarpSync { members } = group.wait {
                    self.release_sync(warp, members);
                } else {
                    warp.groups[at].wait = Wait::Ready;
                }
            }
        }
    }

    /// Ends a `bar.warp.sync` at which all lanes have arrived. They may be at several instructions; each continues
    /// after its own.
    fn release_sync(&mut self, warp: &mut Warp, members: u32) {
        for group in &mut warp.groups {
            if matches!(group.wait, Wait::WarpSync { .. }) && group.mask & members != 0 {
                group.wait = Wait::Ready;
                group.pc += 1;
            }
        }
    }

    /// Handles the case that no warp is ready: lands work in flight, or ends a wait that may be ended. Returns false
    /// if all warps are stuck.
    fn unblock(&mut self, warps: &mut [Warp], running: &[usize], patience: &mut u32) -> bool {
        if self.land_bulk_due(true) {
            return true;
        }
        let mut wake = None;
        for index in running {
            for group in &warps[*index].groups {
                if let Wait::Sleep { until } = group.wait {
                    wake = Some(wake.map_or(until, |w: u64| w.min(until)));
                }
            }
        }
        if let Some(until) = wake {
            self.tick = self.tick.max(until);
            return true;
        }
        for index in running {
            let warp = &mut warps[*index];
            let stuck = warp
                .groups
                .iter_mut()
                .find(|g| matches!(g.wait, Wait::Converge { .. } | Wait::WarpSync { .. }));
            if let Some(group) = stuck {
                group.wait = Wait::Ready;
                group.forced = true;
                warp.slice = 0;
                return true;
            }
        }
        if *patience == 0 {
            return false;
        }
        *patience -= 1;
        let mut any = false;
        for index in running {
            for group in &mut warps[*index].groups {
                if matches!(group.wait, Wait::Mbarrier { .. }) {
                    group.wait = Wait::Ready;
                    group.forced = true;
                    any = true;
                }
            }
        }
        any
    }

    /// Reports a deadlock: every waiting group and its wait.
    fn deadlock(&mut self, warps: &[Warp], running: &[usize]) {
        for index in running {
            let warp = &warps[*index];
            for group in &warp.groups {
                let function = warp.frame_at(group.frame).function;
                // A wait at a barrier has already advanced past its instruction.
                let back = u32::from(
                    matches!(group.wait, Wait::Barrier { .. } | Wait::ClusterBarrier { .. }) && !group.resumed,
                );
                let pc = group.pc.saturating_sub(back);
                let line = self.line_at(Site { function, pc });
                let what = match group.wait {
                    Wait::Barrier { id, .. } => format!("barrier {id}"),
                    Wait::ClusterBarrier { .. } => "the cluster barrier".to_owned(),
                    Wait::Mbarrier { offset, phase, .. } => {
                        format!("phase {} of the mbarrier at {offset:#x}", phase.saturating_sub(1))
                    }
                    Wait::Registers { count } => {
                        format!("{count} registers of the block's pool (setmaxnreg)")
                    }
                    Wait::Converge { required } | Wait::WarpSync { members: required } => {
                        format!("lanes {required:#010x} of its warp")
                    }
                    Wait::Ready | Wait::Sleep { .. } => "nothing".to_owned(),
                };
                let kind = match group.wait {
                    Wait::Registers { .. } => FindingKind::Limit,
                    _ => FindingKind::Deadlock,
                };
                let actor = Actor {
                    cta: warp.cta,
                    warp: warp.index,
                };
                let lanes = group.mask;
                self.report(kind, line, actor, (None, None), || {
                    format!("lanes {lanes:#010x} wait for {what}, and no other thread can end the wait")
                });
            }
        }
    }
}
