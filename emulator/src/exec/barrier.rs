//! Barriers of a block and of a cluster, and the register pool of `setmaxnreg`.

use super::warp::{Wait, Warp};
use super::{Cluster, Flow, Step};
use crate::check::clock::Knowledge;
use crate::isa::types::{Pred, Slot};
use crate::isa::{BarrierOp, BarrierRed, Instr};
use crate::report::FindingKind;

/// Number of barriers of a block.
pub(crate) const BARRIERS: usize = 16;

/// A named barrier of a block.
#[derive(Debug, Default)]
pub(crate) struct BlockBarrier {
    /// Number of completed phases.
    pub generation: u64,
    arrived: u32,
    /// Number of threads expected, if the instructions give one.
    expected: Option<u32>,
    /// Knowledge of the warps that have arrived in the current phase.
    arriving: Knowledge,
    /// Knowledge of the completed phase, for the warps that pass the barrier.
    pub left: Knowledge,
    all: bool,
    any: bool,
    votes: u32,
    /// Results of `and`, `or` and `popc` of the completed phase.
    result: (bool, bool, u32),
}

/// Barrier of a cluster.
#[derive(Debug, Default)]
pub(crate) struct ClusterBarrier {
    pub generation: u64,
    arrived: u32,
    arriving: Knowledge,
    pub left: Knowledge,
}

/// An arrival at a block barrier.
struct Arrival {
    id: u32,
    threads: u32,
    expected: Option<u32>,
    /// Lanes that arrive and lanes whose predicate holds, for reductions.
    votes: Option<(u32, u32)>,
}

impl<'m> Cluster<'m> {
    pub(super) fn block_barrier(&mut self, warp: &mut Warp, instr: &Instr, op: &BarrierOp, mask: u32) -> Step {
        match op {
            BarrierOp::Sync { id, count, aligned } => {
                let arrival = self.arrival(warp, instr, mask, *id, *count, *aligned)?;
                let Some(arrival) = arrival else {
                    return Ok(Flow::Next);
                };
                self.wait_at(warp, instr, arrival, true)
            }
            BarrierOp::Arrive { id, count, aligned } => {
                let arrival = self.arrival(warp, instr, mask, *id, Some(*count), *aligned)?;
                if let Some(arrival) = arrival {
                    self.arrive_at(warp, instr, &arrival);
                }
                Ok(Flow::Next)
            }
            BarrierOp::Red {
                op,
                id,
                count,
                aligned,
                dst,
                src,
            } => self.barrier_reduce(warp, instr, mask, (*op, *id, *count, *aligned), *dst, *src),
            BarrierOp::ClusterArrive { .. } => {
                let known = self.watch.release(warp.id);
                warp.cluster_arrival = self.barrier.generation;
                self.barrier.arrived += mask.count_ones();
                self.barrier.arriving.join(&known);
                self.counters.barrier_waits += 1;
                self.progress += 1;
                self.complete_cluster_barrier();
                Ok(Flow::Next)
            }
            BarrierOp::ClusterWait { .. } => {
                if self.barrier.generation > warp.cluster_arrival {
                    self.watch.acquire(warp.id, &self.barrier.left);
                    return Ok(Flow::Next);
                }
                let generation = warp.cluster_arrival;
                let group = warp.group();
                group.wait = Wait::ClusterBarrier { generation };
                group.pc += 1;
                Ok(Flow::Moved)
            }
            BarrierOp::SetMaxReg { increase, count } => self.set_registers(warp, instr, *increase, *count),
        }
    }

    fn arrival(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
    ) -> Result<Option<Arrival>, crate::error::Error> {
        let lane = mask.trailing_zeros() as usize;
        let frame = warp.frame();
        let id = frame.row(id)[lane] as u32;
        let expected = count.map(|slot| frame.row(slot)[lane] as u32);
        if id as usize >= BARRIERS {
            let message = format!("barrier {id}: a block has {BARRIERS}");
            return Err(self.fault(warp, instr.line, message));
        }
        let max = self.ctas[warp.cta].threads.next_multiple_of(32);
        if let Some(expected) = expected
            && (expected == 0 || expected % 32 != 0 || expected > max)
        {
            let actor = self.actor(warp);
            self.report(FindingKind::InvalidOperand, instr.line, actor, (None, None), || {
                format!("barrier count {expected}: it is a multiple of 32 up to {max}")
            });
        }
        // A barrier with a thread count counts whole warps if its threads arrive together.
        let threads = if aligned && expected.is_some() {
            32
        } else {
            mask.count_ones()
        };
        self.counters.barrier_waits += 1;
        Ok(Some(Arrival {
            id,
            threads,
            expected,
            votes: None,
        }))
    }

    /// Arrives; returns true if this completed the phase.
    fn arrive_at(&mut self, warp: &Warp, instr: &Instr, arrival: &Arrival) -> bool {
        let known = self.watch.release(warp.id);
        let barrier = &mut self.ctas[warp.cta].barriers[arrival.id as usize];
        let clash = barrier.arrived > 0 && barrier.expected != arrival.expected;
        if barrier.arrived == 0 {
            (barrier.all, barrier.any, barrier.votes) = (true, false, 0);
            barrier.expected = arrival.expected;
        }
        barrier.arrived += arrival.threads;
        barrier.arriving.join(&known);
        if let Some((mask, votes)) = arrival.votes {
            barrier.all &= votes == mask;
            barrier.any |= votes != 0;
            barrier.votes += votes.count_ones();
        }
        self.progress += 1;
        if clash {
            let earlier = self.ctas[warp.cta].barriers[arrival.id as usize].expected;
            let actor = self.actor(warp);
            let id = arrival.id;
            let own = arrival.expected;
            self.report(FindingKind::BarrierDivergence, instr.line, actor, (None, None), || {
                let show = |e: Option<u32>| e.map_or("all".to_owned(), |n| n.to_string());
                format!(
                    "barrier {id} for {} threads, but others wait there for {}",
                    show(own),
                    show(earlier)
                )
            });
        }
        self.complete_barrier(warp.cta, arrival.id)
    }

    /// Completes the phase if all expected threads have arrived.
    fn complete_barrier(&mut self, cta: usize, id: u32) -> bool {
        let live = self.ctas[cta].live_threads;
        let barrier = &mut self.ctas[cta].barriers[id as usize];
        let needed = barrier.expected.unwrap_or(live);
        if barrier.arrived == 0 || barrier.arrived < needed {
            return false;
        }
        barrier.arrived = 0;
        barrier.generation += 1;
        barrier.left = std::mem::take(&mut barrier.arriving);
        barrier.result = (barrier.all, barrier.any, barrier.votes);
        self.progress += 1;
        true
    }

    fn complete_cluster_barrier(&mut self) {
        let live: u32 = self.ctas.iter().map(|c| c.live_threads).sum();
        if self.barrier.arrived > 0 && self.barrier.arrived >= live {
            self.barrier.arrived = 0;
            self.barrier.generation += 1;
            self.barrier.left = std::mem::take(&mut self.barrier.arriving);
            self.progress += 1;
        }
    }

    /// Handles the exit of threads: it may complete barriers that expect all threads.
    pub(super) fn exited(&mut self, cta: usize) {
        for id in 0..BARRIERS as u32 {
            if self.ctas[cta].barriers[id as usize].expected.is_none() {
                self.complete_barrier(cta, id);
            }
        }
        self.complete_cluster_barrier();
    }

    /// Arrives and waits. `passes` is true if the instruction ends with the wait.
    fn wait_at(&mut self, warp: &mut Warp, instr: &Instr, arrival: Arrival, passes: bool) -> Step {
        let generation = self.ctas[warp.cta].barriers[arrival.id as usize].generation;
        self.arrive_at(warp, instr, &arrival);
        let group = warp.group();
        group.wait = Wait::Barrier {
            id: arrival.id,
            generation,
        };
        group.pc += u32::from(passes);
        Ok(Flow::Moved)
    }

    fn barrier_reduce(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        what: (BarrierRed, Slot, Option<Slot>, bool),
        dst: Slot,
        src: Pred,
    ) -> Step {
        let (op, id, count, aligned) = what;
        if !warp.group().resumed {
            let votes = warp.frame().pred(src) & mask;
            let arrival = self.arrival(warp, instr, mask, id, count, aligned)?;
            let Some(mut arrival) = arrival else {
                return Ok(Flow::Next);
            };
            arrival.votes = Some((mask, votes));
            warp.group().resumed = true;
            return self.wait_at(warp, instr, arrival, false);
        }
        warp.group().resumed = false;
        let lane = mask.trailing_zeros() as usize;
        let id = warp.frame().row(id)[lane] as usize;
        let (all, any, votes) = self.ctas[warp.cta].barriers[id].result;
        let frame = warp.frame_mut();
        let truth = |yes: bool| if yes { u32::MAX } else { 0 };
        match op {
            BarrierRed::And => frame.set_pred(dst, mask, truth(all)),
            BarrierRed::Or => frame.set_pred(dst, mask, truth(any)),
            BarrierRed::Popc => {
                for lane in super::warp::lanes(mask) {
                    frame.row_mut(dst)[lane] = u64::from(votes);
                }
            }
        }
        Ok(Flow::Next)
    }

    /// `setmaxnreg`: returns registers to the block's pool, or waits for them.
    fn set_registers(&mut self, warp: &mut Warp, instr: &Instr, increase: bool, count: u32) -> Step {
        let have = warp.registers;
        let wrong = if increase { count < have } else { count > have };
        if wrong {
            let actor = self.actor(warp);
            let verb = if increase { "raises" } else { "lowers" };
            self.report(FindingKind::Limit, instr.line, actor, (None, None), || {
                format!("setmaxnreg {verb} the registers of a thread from {have} to {count}")
            });
            warp.registers = count;
            return Ok(Flow::Next);
        }
        let pool = &mut self.ctas[warp.cta].pool;
        if !increase {
            *pool += (have - count) * 32;
            warp.registers = count;
            self.progress += 1;
            return Ok(Flow::Next);
        }
        let need = (count - have) * 32;
        if *pool >= need {
            *pool -= need;
            warp.registers = count;
            self.progress += 1;
            return Ok(Flow::Next);
        }
        warp.group().wait = Wait::Registers { count: need };
        Ok(Flow::Moved)
    }
}
