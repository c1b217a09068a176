//! Events that the executor publishes to the checks: accesses to memory and fences, and who made them.

use super::clock::Agent;
use crate::isa::types::Order;
use crate::memory::shared::SharedMemory;

/// Kind of agent. Each warp has one agent of each kind; the last three run asynchronously.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// The warp's own instructions.
    Warp,
    /// The warp's `cp.async` copies.
    CpAsync,
    /// The warp's bulk and tensor copies.
    Bulk,
    /// The warp's `wgmma` products.
    Wgmma,
}

pub(crate) const ENGINES: usize = 4;

impl Engine {
    pub fn of(agent: Agent) -> Engine {
        match agent as usize % ENGINES {
            0 => Engine::Warp,
            1 => Engine::CpAsync,
            2 => Engine::Bulk,
            _ => Engine::Wgmma,
        }
    }

    pub fn agent(self, warp: usize) -> Agent {
        let engine = match self {
            Engine::Warp => 0,
            Engine::CpAsync => 1,
            Engine::Bulk => 2,
            Engine::Wgmma => 3,
        };
        (warp * ENGINES + engine) as Agent
    }

    /// Returns true if the engine accesses memory through the async proxy.
    pub fn is_async_proxy(self) -> bool {
        matches!(self, Engine::Bulk | Engine::Wgmma)
    }
}

/// Place of an instruction: function and instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Site {
    pub function: u32,
    pub pc: u32,
}

/// Block of the cluster and warp of the block that made an access, for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Actor {
    pub cta: usize,
    pub warp: u32,
}

/// Effect of an access on the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Read,
    Write,
    /// The access updates the bytes atomically; `returns` is true if the thread receives the old value.
    Update {
        returns: bool,
    },
}

impl Effect {
    /// Returns the effect of an ordinary access.
    #[inline]
    pub fn of(write: bool) -> Self {
        if write { Effect::Write } else { Effect::Read }
    }
}

/// Memory that an access touches.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// Allocation of the view, offset in it, and address.
    Global { allocation: usize, at: usize, address: u64 },
    /// Block of the cluster, offset in its shared memory, and that memory before the access.
    Shared {
        cta: usize,
        at: usize,
        memory: &'a SharedMemory,
    },
}

/// An access by a lane, or by an engine on its behalf, whose memory was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MemoryAccess<'a> {
    /// Number of the warp within the cluster.
    pub warp: usize,
    pub engine: Engine,
    pub actor: Actor,
    pub site: Site,
    pub line: u32,
    /// Lane that makes the access; `None` if the warp makes it as a whole.
    pub lane: Option<usize>,
    pub place: Place<'a>,
    pub bytes: usize,
    pub effect: Effect,
    pub order: Order,
    /// Bytes that a store writes; empty if they are not known yet.
    pub stored: &'a [u8],
}

/// A fence of a warp.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fence {
    /// Number of the warp within the cluster.
    pub warp: usize,
    /// Block of the cluster.
    pub cta: usize,
    /// True for a fence between the generic and the async proxy.
    pub async_proxy: bool,
    /// True if other blocks may rely on the fence.
    pub device: bool,
}
