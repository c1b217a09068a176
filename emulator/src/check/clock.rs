//! Vector clocks: who knows of whose past.
//!
//! Every agent (a warp, or one of a warp's asynchronous engines) counts its own steps; a clock says, for every
//! agent, up to which step its effects are known to be done. Synchronisation joins clocks. An access is ordered
//! after an earlier one if its clock knows of the step in which that one was made (Lamport's happens-before).

/// Identifies an agent within a cluster.
pub(crate) type Agent = u32;

/// Steps known, by agent. Missing entries are zero.
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

/// Clocks that a synchronisation object or a warp carries: what is known through the generic proxy, and which generic
/// writes a proxy fence has made known to the async proxy as well.
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
