//! A warp: its lanes, grouped by position.
//!
//! Lanes at the same instruction of the same frame form a [`Group`] and execute together. A divergent branch splits a
//! group, and groups that meet again merge. Usually there is one group, and no search is needed.

use crate::check::definedness::Shadow;
use crate::isa::types::{PRED_TRUE, Pred, Slot};
use crate::memory::local::LocalMemory;

use super::async_copy::LaneCopies;
use super::wgmma::WgmmaQueue;

/// One register row: one value per lane.
pub(crate) type Lanes = [u64; 32];

/// Mask of all lanes.
pub(crate) const FULL: u32 = u32::MAX;

/// Iterates over the set bits of a mask, lowest first.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let lane = left.trailing_zeros() as usize;
        left &= left - 1;
        Some(lane)
    })
}

/// Registers of one call, shared by the lanes that made it together.
#[derive(Debug)]
pub(crate) struct Frame {
    pub function: u32,
    pub values: Vec<Lanes>,
    pub preds: Vec<u32>,
    /// Carry flag of each lane.
    pub carry: u32,
    /// Start of the frame in each lane's local memory.
    pub base: Lanes,
    /// Return position: the caller's frame and instruction.
    pub caller: Option<(u32, u32)>,
    /// Index of the call instruction, for passing back results.
    pub call_pc: u32,
    /// Lanes that have not returned.
    pub inside: u32,
    /// Time at which an ordinary instruction last wrote each row, kept only for kernels with `wgmma`.
    pub written: Vec<u64>,
    /// Undefined registers; `None` if all are defined.
    pub shadow: Option<Box<Shadow>>,
}

impl Frame {
    #[inline]
    pub fn row(&self, slot: Slot) -> &Lanes {
        &self.values[slot as usize]
    }

    #[inline]
    pub fn row_mut(&mut self, slot: Slot) -> &mut Lanes {
        &mut self.values[slot as usize]
    }

    #[inline]
    pub fn pred(&self, pred: Pred) -> u32 {
        let mask = self.preds[pred.slot as usize];
        if pred.negated { !mask } else { mask }
    }

    #[inline]
    pub fn set_pred(&mut self, slot: Slot, mask: u32, value: u32) {
        if slot != PRED_TRUE {
            let row = &mut self.preds[slot as usize];
            *row = (*row & !mask) | (value & mask);
        }
    }
}

/// Condition that a group waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    Ready,
    /// Lanes that must arrive before the instruction can execute.
    Converge {
        required: u32,
    },
    /// `bar.warp.sync`: lanes that must arrive at any such instruction.
    WarpSync {
        members: u32,
    },
    /// Block barrier, and its phase at the time of arrival.
    Barrier {
        id: u32,
        generation: u64,
    },
    ClusterBarrier {
        generation: u64,
    },
    /// An mbarrier of block `cta` at `offset`, until the phase `parity` completes.
    Mbarrier {
        cta: u32,
        offset: u32,
        phase: u64,
    },
    /// Until a scheduler tick.
    Sleep {
        until: u64,
    },
    /// `setmaxnreg.inc`, until the block's pool has enough registers.
    Registers {
        count: u32,
    },
}

/// Lanes that execute together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub pc: u32,
    pub frame: u32,
    pub depth: u32,
    pub mask: u32,
    pub wait: Wait,
    /// True if the scheduler ended the wait without its condition.
    pub forced: bool,
    /// True for the second half of an instruction that waited in its middle.
    pub resumed: bool,
}

/// A warp of a block.
#[derive(Debug)]
pub(crate) struct Warp {
    /// Block within the cluster.
    pub cta: usize,
    /// Warp within the block.
    pub index: u32,
    /// Warp within the cluster.
    pub id: usize,
    /// Lanes that have not exited.
    pub live: u32,
    pub groups: Vec<Group>,
    pub current: usize,
    /// Number of instructions that the current group of a diverged warp may still run before another group gets a
    /// turn.
    pub slice: u32,
    pub frames: Vec<Option<Box<Frame>>>,
    pub local: LocalMemory,
    /// First unused byte of each lane's local memory.
    pub local_top: Lanes,
    pub copies: LaneCopies,
    pub wgmma: WgmmaQueue,
    /// Number of registers that a thread may use (`setmaxnreg`).
    pub registers: u32,
    /// Phase of the cluster barrier when the warp last arrived.
    pub cluster_arrival: u64,
    /// Allocation in which the last global access was found.
    pub hint: usize,
}

/// Number of instructions that a group of a diverged warp runs before another group gets a turn.
const SLICE: u32 = 256;

impl Warp {
    /// Returns the lanes of `mask` that have not exited.
    pub fn expected(&self, mask: u32) -> u32 {
        mask & self.live
    }

    #[inline]
    pub fn frame(&self) -> &Frame {
        self.frame_at(self.groups[self.current].frame)
    }

    #[inline]
    pub fn frame_mut(&mut self) -> &mut Frame {
        let index = self.groups[self.current].frame;
        self.frame_at_mut(index)
    }

    #[inline]
    pub fn frame_at(&self, index: u32) -> &Frame {
        match &self.frames[index as usize] {
            Some(frame) => frame,
            None => unreachable!("a group holds its frame"),
        }
    }

    #[inline]
    pub fn frame_at_mut(&mut self, index: u32) -> &mut Frame {
        match &mut self.frames[index as usize] {
            Some(frame) => frame,
            None => unreachable!("a group holds its frame"),
        }
    }

    #[inline]
    pub fn group(&mut self) -> &mut Group {
        &mut self.groups[self.current]
    }

    /// Splits the lanes of `mask` off the current group and moves them to `pc`. The others stay current.
    pub fn split(&mut self, mask: u32, pc: u32) {
        let group = self.group();
        let part = Group {
            mask,
            pc,
            wait: Wait::Ready,
            forced: false,
            resumed: false,
            ..*group
        };
        group.mask &= !mask;
        self.groups.push(part);
        self.slice = SLICE;
    }

    /// Removes the current group, whose lanes exited or moved elsewhere.
    pub fn remove_current(&mut self) {
        self.groups.swap_remove(self.current);
        self.current = 0;
        self.slice = SLICE;
    }

    /// Merges groups at the same place in the same state.
    pub fn merge(&mut self) {
        let mut at = 0;
        while at < self.groups.len() {
            let a = self.groups[at];
            let mergeable = |w: Wait| matches!(w, Wait::Ready | Wait::Converge { .. });
            let twin = (at + 1..self.groups.len()).find(|&other| {
                let b = self.groups[other];
                b.pc == a.pc && b.frame == a.frame && b.resumed == a.resumed && mergeable(a.wait) && mergeable(b.wait)
            });
            match twin {
                Some(other) => {
                    let Group { mask, forced, .. } = self.groups[other];
                    let group = &mut self.groups[at];
                    group.wait = Wait::Ready;
                    group.forced |= forced;
                    group.mask |= mask;
                    if self.current == other {
                        self.current = at;
                    }
                    self.groups.swap_remove(other);
                    if self.current == self.groups.len() {
                        self.current = other;
                    }
                }
                None => at += 1,
            }
        }
        self.current = self.current.min(self.groups.len().saturating_sub(1));
    }

    /// Chooses the ready group to run: the deepest call, then the earliest instruction, so that groups wait for each
    /// other where paths join. From time to time it chooses another group, so that none starves.
    pub fn choose(&mut self) -> bool {
        self.merge();
        let ready = |g: &Group| g.wait == Wait::Ready;
        if self.slice > 0 && self.groups.get(self.current).is_some_and(ready) {
            self.slice -= 1;
            let key = |g: &Group| (std::cmp::Reverse(g.depth), g.pc);
            let best = (0..self.groups.len())
                .filter(|i| ready(&self.groups[*i]))
                .min_by_key(|i| key(&self.groups[*i]));
            if let Some(best) = best {
                self.current = best;
            }
            return true;
        }
        self.slice = SLICE;
        let n = self.groups.len();
        for step in 1..=n {
            let candidate = (self.current + step) % n;
            if ready(&self.groups[candidate]) {
                self.current = candidate;
                return true;
            }
        }
        false
    }
}

/// Fields that differ between new warps.
pub(crate) struct LocalState {
    pub cta: usize,
    pub index: u32,
    pub id: usize,
    pub live: u32,
    pub registers: u32,
}

impl Warp {
    /// A warp without frames or groups.
    pub fn new(state: LocalState) -> Self {
        Self {
            cta: state.cta,
            index: state.index,
            id: state.id,
            live: state.live,
            groups: Vec::new(),
            current: 0,
            slice: SLICE,
            frames: Vec::new(),
            local: LocalMemory::new(),
            local_top: [0; 32],
            copies: LaneCopies::new(),
            wgmma: WgmmaQueue::default(),
            registers: state.registers,
            cluster_arrival: 0,
            hint: 0,
        }
    }
}
