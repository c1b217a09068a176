//! Races in shared memory.
//!
//! For each 4-byte cell of a block's shared memory the detector keeps the last write (agent, step, which of the four
//! bytes, instruction) and, for every agent, the step of its last read. An access races if an earlier one to the
//! same byte, at least one of the two being a write, is not in the accessing agent's [`Clock`](super::clock::Clock).
//!
//! Agents are warps and their asynchronous engines. Lanes of one warp count as ordered by the warp: a race between
//! them is not looked for.

use super::clock::{Agent, Clock, Knowledge};

/// What an agent is. Each warp has one of each; the last three act for it asynchronously.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// The warp's own instructions.
    Warp,
    /// Its `cp.async` copies.
    CpAsync,
    /// Its bulk and tensor copies.
    Bulk,
    /// Its `wgmma` products.
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

    /// Whether it accesses memory through the async proxy.
    pub fn is_async_proxy(self) -> bool {
        matches!(self, Engine::Bulk | Engine::Wgmma)
    }
}

/// Where an access was made: function and instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Site {
    pub function: u32,
    pub pc: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    agent: Agent,
    step: u32,
    site: Site,
    /// Bytes the write covered; zero if there was none.
    bytes: u8,
    read_bytes: u8,
    read_site: Site,
}

/// An earlier access that is not ordered before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub agent: Agent,
    pub site: Site,
    pub was_write: bool,
    /// Ordered, but the proxy fence is missing.
    pub only_proxy: bool,
}

/// The shadow of one block's shared memory.
#[derive(Debug)]
pub(crate) struct SharedShadow {
    cells: Vec<Cell>,
    /// Steps of reads: one row of `agents` a cell.
    reads: Vec<u32>,
    agents: usize,
}

/// Who accesses: agent, its step, and what it knows.
#[derive(Clone, Copy)]
pub(crate) struct Accessor<'a> {
    pub agent: Agent,
    pub step: u32,
    pub known: &'a Knowledge,
    pub site: Site,
}

impl SharedShadow {
    pub fn new(bytes: usize, agents: usize) -> Self {
        let cells = bytes.div_ceil(4);
        Self {
            cells: vec![Cell::default(); cells],
            reads: vec![0; cells * agents],
            agents,
        }
    }

    /// Records a read of a range; returns a conflicting write.
    pub fn read(&mut self, at: usize, bytes: usize, who: Accessor<'_>) -> Option<Conflict> {
        let mut found = None;
        for (index, mask) in cells(at, bytes) {
            let cell = &mut self.cells[index];
            if cell.bytes & mask != 0 && found.is_none() {
                found = write_conflict(cell, who);
            }
            cell.read_bytes |= mask;
            cell.read_site = who.site;
            self.reads[index * self.agents + who.agent as usize] = who.step;
        }
        found
    }

    /// Records a write of a range; returns a conflicting read or write.
    pub fn write(&mut self, at: usize, bytes: usize, who: Accessor<'_>) -> Option<Conflict> {
        let mut found = None;
        for (index, mask) in cells(at, bytes) {
            let cell = &mut self.cells[index];
            if cell.bytes & mask != 0 && found.is_none() {
                found = write_conflict(cell, who);
            }
            if cell.read_bytes & mask != 0 && found.is_none() {
                let row = &self.reads[index * self.agents..][..self.agents];
                found = read_conflict(row, &who.known.generic, who.agent).map(|agent| Conflict {
                    agent,
                    site: cell.read_site,
                    was_write: false,
                    only_proxy: false,
                });
            }
            // Bytes of the cell that this write leaves alone keep their writer only if it is the same.
            let same = cell.agent == who.agent && cell.step == who.step;
            cell.bytes = if same { cell.bytes | mask } else { mask };
            cell.agent = who.agent;
            cell.step = who.step;
            cell.site = who.site;
        }
        found
    }
}

fn write_conflict(cell: &Cell, who: Accessor<'_>) -> Option<Conflict> {
    if cell.agent == who.agent {
        return None;
    }
    let conflict = |only_proxy| {
        Some(Conflict {
            agent: cell.agent,
            site: cell.site,
            was_write: true,
            only_proxy,
        })
    };
    if who.known.generic.get(cell.agent) < cell.step {
        return conflict(false);
    }
    let crosses = Engine::of(who.agent).is_async_proxy() && !Engine::of(cell.agent).is_async_proxy();
    if crosses && who.known.fenced.get(cell.agent) < cell.step {
        return conflict(true);
    }
    None
}

/// An agent whose last read is not known of.
fn read_conflict(row: &[u32], known: &Clock, own: Agent) -> Option<Agent> {
    let known = known.steps();
    let late = |(agent, step): (usize, &u32)| {
        let seen = known.get(agent).copied().unwrap_or(0);
        (*step > seen && agent != own as usize).then_some(agent as Agent)
    };
    row.iter().enumerate().find_map(late)
}

/// The cells of a range with the bytes it covers in each.
fn cells(at: usize, bytes: usize) -> impl Iterator<Item = (usize, u8)> {
    let end = at + bytes;
    (at / 4..end.div_ceil(4)).map(move |index| {
        let low = at.max(index * 4) - index * 4;
        let high = end.min(index * 4 + 4) - index * 4;
        (index, ((1u16 << high) - (1u16 << low)) as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(shadow: &mut SharedShadow, write: bool, agent: Agent, known: &Knowledge) -> bool {
        let who = Accessor {
            agent,
            step: known.generic.get(agent),
            known,
            site: Site::default(),
        };
        let found = if write {
            shadow.write(8, 4, who)
        } else {
            shadow.read(8, 4, who)
        };
        found.is_some()
    }

    fn knowing(pairs: &[(Agent, u32)]) -> Knowledge {
        let mut known = Knowledge::default();
        for (agent, step) in pairs {
            known.generic.set(*agent, *step);
        }
        known
    }

    #[test]
    fn unordered_write_then_read_conflicts_and_ordered_does_not() {
        let mut shadow = SharedShadow::new(64, 8);
        assert!(!access(&mut shadow, true, 0, &knowing(&[(0, 1)])));
        assert!(access(&mut shadow, false, 4, &knowing(&[(4, 1)])));
        assert!(!access(&mut shadow, false, 4, &knowing(&[(4, 1), (0, 1)])));
    }

    #[test]
    fn write_after_unknown_read_conflicts() {
        let mut shadow = SharedShadow::new(64, 8);
        assert!(!access(&mut shadow, false, 0, &knowing(&[(0, 1)])));
        assert!(access(&mut shadow, true, 4, &knowing(&[(4, 1)])));
    }

    #[test]
    fn neighbouring_bytes_do_not_conflict() {
        let mut shadow = SharedShadow::new(64, 8);
        let (a, b) = (knowing(&[(0, 1)]), knowing(&[(4, 1)]));
        let site = Site::default();
        let first = Accessor {
            agent: 0,
            step: 1,
            known: &a,
            site,
        };
        let second = Accessor {
            agent: 4,
            step: 1,
            known: &b,
            site,
        };
        assert!(shadow.write(8, 1, first).is_none());
        assert!(shadow.write(9, 1, second).is_none());
    }
}
