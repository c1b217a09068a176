//! Vector clocks: for each agent, how much of the others' past is known to be done.
//!
//! An agent is a warp, or one of a warp's asynchronous engines. Every agent counts its own steps. A clock holds, for
//! every agent, the step up to which its effects are known to be done. Synchronisation joins clocks. An access is
//! ordered after an earlier one if its clock includes the step of the earlier one (Lamport's happens-before).

use super::event::{ENGINES, Engine, Fence};

/// Identifies an agent within a cluster.
pub(crate) type Agent = u32;

/// Known steps by agent; missing entries are 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Clock {
    steps: Vec<u32>,
}

impl Clock {
    pub fn new(agents: usize) -> Self {
        Self { steps: vec![0; agents] }
    }

    #[inline]
    pub fn get(&self, agent: Agent) -> u32 {
        self.steps.get(agent as usize).copied().unwrap_or(0)
    }

    pub fn set(&mut self, agent: Agent, step: u32) {
        let at = agent as usize;
        if self.steps.len() <= at {
            self.steps.resize(at + 1, 0);
        }
        self.steps[at] = self.steps[at].max(step);
    }

    pub fn join(&mut self, other: &Clock) {
        if self.steps.len() < other.steps.len() {
            self.steps.resize(other.steps.len(), 0);
        }
        for (mine, theirs) in self.steps.iter_mut().zip(&other.steps) {
            *mine = (*mine).max(*theirs);
        }
    }

    pub fn steps(&self) -> &[u32] {
        &self.steps
    }
}

/// Clocks of a warp or a synchronisation object: the steps known through the generic proxy, and the generic writes
/// that a proxy fence has also made known to the async proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Knowledge {
    pub generic: Clock,
    pub fenced: Clock,
}

impl Knowledge {
    pub fn join(&mut self, other: &Knowledge) {
        self.generic.join(&other.generic);
        self.fenced.join(&other.fenced);
    }
}

/// Clocks and steps of a cluster's agents.
#[derive(Debug)]
pub(crate) struct Clocks {
    /// Knowledge of each warp.
    known: Vec<Knowledge>,
    /// Current step of every agent.
    steps: Vec<u32>,
}

impl Clocks {
    /// Makes the clocks of a cluster at its start: each warp knows its own first step.
    pub fn new(warps: usize) -> Self {
        let agents = warps * ENGINES;
        let known = (0..warps).map(|warp| {
            let mut generic = Clock::new(agents);
            generic.set(Engine::Warp.agent(warp), 1);
            Knowledge {
                generic,
                fenced: Clock::new(agents),
            }
        });
        Self {
            known: known.collect(),
            steps: vec![1; agents],
        }
    }

    #[inline]
    pub fn known(&self, warp: usize) -> &Knowledge {
        &self.known[warp]
    }

    #[inline]
    pub fn step(&self, agent: Agent) -> u32 {
        self.steps[agent as usize]
    }

    /// Returns what the warp knows, and starts the warp's next step.
    pub fn release(&mut self, warp: usize) -> Knowledge {
        let known = self.known[warp].clone();
        let step = self.issue(warp, Engine::Warp);
        self.known[warp].generic.set(Engine::Warp.agent(warp), step);
        known
    }

    /// Joins a clock into the warp's.
    pub fn acquire(&mut self, warp: usize, left: &Knowledge) {
        self.known[warp].join(left);
    }

    /// Starts a new step of an agent, and returns it. An engine works with the warp's current clock.
    pub fn issue(&mut self, warp: usize, engine: Engine) -> u32 {
        let agent = engine.agent(warp) as usize;
        self.steps[agent] += 1;
        self.steps[agent]
    }

    /// Adds an engine's step to what the warp knows.
    pub fn complete(&mut self, warp: usize, engine: Engine, step: u32) {
        self.known[warp].generic.set(engine.agent(warp), step);
    }

    /// Returns what the warp knows, with an engine's step.
    pub fn completion(&self, warp: usize, engine: Engine, step: u32) -> Knowledge {
        let mut known = self.known[warp].clone();
        known.generic.set(engine.agent(warp), step);
        known
    }

    /// Sets the warp's clock back, except for its own step.
    pub fn restore(&mut self, warp: usize, before: Knowledge) {
        let agent = Engine::Warp.agent(warp);
        let step = self.known[warp].generic.get(agent);
        self.known[warp] = before;
        self.known[warp].generic.set(agent, step);
    }

    /// Makes the generic writes that the warp knows known to the async proxy, if the fence is one between proxies.
    pub fn fence(&mut self, fence: Fence) {
        if fence.async_proxy {
            let Knowledge { generic, fenced } = &mut self.known[fence.warp];
            fenced.join(generic);
        }
    }
}
