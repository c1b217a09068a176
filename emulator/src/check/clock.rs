//! Vector clocks: for each agent, how much of the others' past is known to be done.
//!
//! An agent is a warp, or one of a warp's asynchronous engines. Every agent counts its own steps. A clock holds, for
//! every agent, the step up to which its effects are known to be done. Synchronisation joins clocks. An access is
//! ordered after an earlier one if its clock includes the step of the earlier one (Lamport's happens-before).

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
