//! The executor: runs the warps of a cluster's blocks, one instruction after another.
//!
//! A [`Cluster`] is the unit that runs on one host thread: its blocks share memory and barriers. [`run`] chooses the
//! next warp by the seed. Each instruction family is executed in the module of its name.

mod access;
mod alu;
pub(crate) mod async_copy;
mod atomics;
mod barrier;
mod bulk;
mod control;
mod float;
mod mbarrier;
mod memory_ops;
mod run;
pub(crate) mod tensor;
mod tensor_maps;
mod undefined;
pub(crate) mod warp;
mod warp_ops;
pub(crate) mod wgmma;
mod wmma;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::check::Checks;
use crate::check::event::{Actor, Site};
use crate::check::global_race::GlobalShadow;
use crate::check::watch::Watchers;
use crate::counters::Counters;
use crate::error::Error;
use crate::isa::types::Space;
use crate::isa::window;
use crate::isa::{Alu, Counter, Instr, Op};
use crate::memory::global::View;
use crate::memory::shared::SharedMemory;
use crate::program::Program;
use crate::report::FindingKind;
use crate::request::Launch;
use crate::schedule::{Rng, Temper};

pub(crate) use barrier::BARRIERS;
use barrier::{BlockBarrier, ClusterBarrier};
use bulk::BulkQueue;
pub(crate) use control::function_address;
use mbarrier::Mbarrier;
pub(crate) use memory_ops::may_be_global;
use warp::Warp;

/// State and settings that all blocks of a launch share.
pub(crate) struct Context<'m> {
    pub program: &'m Program,
    pub launch: &'m Launch<'m>,
    pub entry: u32,
    pub checks: Checks,
    pub max_findings: usize,
    pub seed: u64,
    pub view: View,
    pub shadow: Option<GlobalShadow>,
    /// Address of each module variable, in its own state space.
    pub variables: Vec<u64>,
    /// Address of the workspace for grid synchronisation; 0 if the kernel does not need one.
    pub workspace: u64,
    /// First address of shared memory that the kernel may touch.
    pub shared_start: u64,
    /// End of the block's shared memory.
    pub shared_end: u64,
    /// Registers that a thread has at the start, if the kernel's directives determine it.
    pub registers: Option<u32>,
    pub limit: Option<u64>,
    pub executed: AtomicU64,
    /// True if the kernel uses `wgmma`; the times of register writes are then recorded.
    pub uses_wgmma: bool,
}

/// A block.
pub(crate) struct Cta {
    pub coordinates: [u32; 3],
    /// Number of the block within the grid.
    pub linear: u32,
    pub shared: SharedMemory,
    pub barriers: Vec<BlockBarrier>,
    pub mbarriers: HashMap<u32, Mbarrier>,
    /// Registers returned by `setmaxnreg.dec`.
    pub pool: u32,
    pub threads: u32,
    pub live_threads: u32,
}

/// Blocks of a cluster, with all state that their warps share.
pub(crate) struct Cluster<'m> {
    pub ctx: &'m Context<'m>,
    pub ctas: Vec<Cta>,
    pub rng: Rng,
    pub temper: Temper,
    pub tick: u64,
    /// The checks that follow events.
    pub watch: Watchers<'m>,
    pub counters: Counters,
    /// Executions by function and instruction: issued by warps, executed by lanes.
    pub counts: Vec<Vec<[u64; 2]>>,
    pub barrier: ClusterBarrier,
    pub bulk: BulkQueue,
    pub warps_per_cta: usize,
    /// Number of thread instructions not yet added to the launch's total.
    pub pending: u64,
    /// Number of events that may let a waiting warp continue.
    pub progress: u64,
}

/// Next position of the group after an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next instruction.
    Next,
    /// No change: the group waits, or was moved already.
    Moved,
}

pub(crate) type Step = Result<Flow, Error>;

impl<'m> Cluster<'m> {
    /// Executes one instruction of the warp's current group.
    #[inline]
    pub fn step(&mut self, warp: &mut Warp) -> Result<(), Error> {
        let ctx = self.ctx;
        let group = warp.groups[warp.current];
        let frame = warp.frame();
        let function = frame.function as usize;
        let instr: &'m Instr = &ctx.program.functions[function].code[group.pc as usize];
        let mut mask = group.mask;
        if let Some(guard) = instr.guard {
            mask &= frame.pred(guard);
            if mask == 0 {
                if frame.shadow.is_some() {
                    self.follow(warp, instr);
                }
                self.counts[function][group.pc as usize][0] += 1;
                warp.group().pc += 1;
                return Ok(());
            }
        }
        if let Some(required) = tensor::required_lanes(warp, &instr.op, mask)
            && !self.converged(warp, instr, required, mask)
        {
            return Ok(());
        }
        if warp.frame().shadow.is_some() {
            self.follow(warp, instr);
        }
        let count = &mut self.counts[function][group.pc as usize];
        count[0] += 1;
        count[1] += u64::from(mask.count_ones());
        self.pending += u64::from(mask.count_ones());
        if ctx.uses_wgmma {
            self.track_registers(warp, instr)?;
        }
        let flow = self.dispatch(warp, instr, mask)?;
        if flow == Flow::Next {
            warp.group().pc += 1;
        }
        Ok(())
    }

    #[inline]
    fn dispatch(&mut self, warp: &mut Warp, instr: &'m Instr, mask: u32) -> Step {
        match &instr.op {
            Op::Alu(alu) => {
                match alu {
                    Alu::Clock { .. }
                    | Alu::Cvta { .. }
                    | Alu::Isspacep { .. }
                    | Alu::Mapa { .. }
                    | Alu::CtaRank { .. } => self.address_alu(warp, alu, mask),
                    _ => alu::execute(warp.frame_mut(), mask, alu),
                }
                Ok(Flow::Next)
            }
            Op::Control(op) => self.control(warp, instr, op, mask),
            Op::Memory(op) => self.memory(warp, instr, op, mask),
            Op::Warp(op) => self.warp_op(warp, instr, op, mask),
            Op::Barrier(op) => self.block_barrier(warp, instr, op, mask),
            Op::Mbarrier(op) => self.mbarrier(warp, instr, op, mask),
            Op::Async(op) => self.asynchronous(warp, instr, op, mask),
            Op::Tensor(op) => self.tensor(warp, instr, op, mask),
            Op::Wmma(op) => self.wmma(warp, instr, op, mask),
            Op::Wgmma(op) => self.wgmma(warp, instr, op, mask),
            Op::Nop => Ok(Flow::Next),
        }
    }

    /// Executes address conversions and reads of clocks.
    fn address_alu(&mut self, warp: &mut Warp, alu: &Alu, mask: u32) {
        let rank = warp.cta as u32;
        let tick = self.tick;
        let f = warp.frame_mut();
        match alu {
            Alu::Clock { dst, counter } => {
                let value = match counter {
                    Counter::Clock => tick & 0xffff_ffff,
                    Counter::ClockHi => tick >> 32,
                    Counter::Clock64 | Counter::GlobalTimer => tick,
                    Counter::GlobalTimerLo => tick & 0xffff_ffff,
                    Counter::GlobalTimerHi => tick >> 32,
                };
                for lane in warp::lanes(mask) {
                    f.row_mut(*dst)[lane] = value;
                }
            }
            Alu::Cvta {
                dst,
                src,
                space,
                to_space,
                bits,
            } => {
                let base = window::base(*space).unwrap_or(0);
                let (to_space, bits) = (*to_space, *bits);
                alu::map(f, mask, *dst, *src, |a| {
                    let moved = if to_space {
                        a.wrapping_sub(base)
                    } else {
                        a.wrapping_add(base)
                    };
                    alu::truncate(bits, moved)
                });
            }
            Alu::Isspacep { space, dst, src } => {
                let row = *f.row(*src);
                let mut value = 0;
                for (lane, address) in row.iter().enumerate() {
                    value |= u32::from(window::contains(*space, *address, rank)) << lane;
                }
                f.set_pred(*dst, mask, value);
            }
            Alu::Mapa {
                dst,
                src,
                rank,
                generic,
            } => {
                let base = if *generic { window::SHARED } else { 0 };
                alu::map2(f, mask, *dst, [*src, *rank], |a, r| {
                    let offset = a.wrapping_sub(base) & window::OFFSET_MASK;
                    base + (((r & 0xff) + 1) << window::RANK_SHIFT | offset)
                });
            }
            Alu::CtaRank { dst, src, generic } => {
                let base = if *generic { window::SHARED } else { 0 };
                alu::map(f, mask, *dst, *src, |a| {
                    let field = a.wrapping_sub(base) >> window::RANK_SHIFT & 0xff;
                    field.checked_sub(1).unwrap_or(u64::from(rank))
                });
            }
            _ => {}
        }
    }

    /// Returns the current place, for checks and for messages.
    pub fn site(&self, warp: &Warp) -> Site {
        Site {
            function: warp.frame().function,
            pc: warp.groups[warp.current].pc,
        }
    }

    /// Returns the line of an instruction.
    pub fn line_at(&self, site: Site) -> u32 {
        self.watch.reports.line_at(site)
    }

    /// Returns the coordinates of a block of the cluster as text.
    pub fn block_name(&self, cta: usize) -> String {
        self.watch.reports.block_name(cta)
    }

    /// Adds a finding made by `actor` at `line`; returns false if the check for such findings is off.
    pub fn report(
        &mut self,
        kind: FindingKind,
        line: u32,
        actor: Actor,
        at: (Option<usize>, Option<u64>),
        message: impl FnOnce() -> String,
    ) -> bool {
        self.watch.reports.report(kind, line, actor, at, message)
    }

    pub fn actor(&self, warp: &Warp) -> Actor {
        Actor {
            cta: warp.cta,
            warp: warp.index,
        }
    }

    /// Makes the error that ends the launch where a kernel cannot continue.
    pub fn fault(&self, warp: &Warp, line: u32, message: impl Into<String>) -> Error {
        Error::Fault {
            file: self.ctx.program.source.file.clone(),
            line,
            message: message.into(),
            block: self.block_name(warp.cta),
            warp: warp.index,
        }
    }

    /// Adds the instructions since the last call to the launch's total and checks the limit.
    pub fn charge(&mut self, warp: &Warp) -> Result<(), Error> {
        let executed = self.ctx.executed.fetch_add(self.pending, Ordering::Relaxed) + self.pending;
        self.pending = 0;
        match self.ctx.limit {
            Some(limit) if executed > limit => {
                let line = warp.groups.first().map_or(0, |g| {
                    let function = warp.frame_at(g.frame).function;
                    self.line_at(Site { function, pc: g.pc })
                });
                Err(Error::Runaway {
                    limit,
                    executed,
                    file: self.ctx.program.source.file.clone(),
                    line,
                    block: self.block_name(warp.cta),
                })
            }
            _ => Ok(()),
        }
    }
}

/// Returns true if addresses in `space` have 32 bits.
pub(crate) fn is_narrow(space: Space) -> bool {
    matches!(
        space,
        Space::Shared | Space::SharedCluster | Space::Local | Space::Param
    )
}
