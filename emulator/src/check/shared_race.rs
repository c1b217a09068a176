//! Races in shared memory.
//!
//! For each 4-byte cell of a block's shared memory the detector keeps the last write (agent, step, bytes of the cell,
//! instruction) and, for every agent, the step and the bytes of its last read. An access races with an earlier access
//! to the same byte if at least one of them is a write and the earlier one is not in the accessing agent's
//! [`Clock`](super::clock::Clock).
//!
//! Compilers let several warps write the same value to replicated data. Such a store, which leaves the bytes as they
//! are, conflicts with no access, and an access ordered after it may read the bytes. Such stores are kept as echoes
//! of the last write. A store that changes the bytes must be ordered after the last write and all its echoes.
//!
//! Agents are warps and their asynchronous engines. Lanes of one warp count as ordered: races between them are not
//! detected.

use std::collections::HashMap;

use super::clock::{Agent, Knowledge};
use super::event::{Engine, Site};

/// Number of bits in a read's record that tell which bytes of the cell it covered.
const MASK_BITS: u32 = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    agent: Agent,
    step: u32,
    site: Site,
    /// Bytes that the write covered; 0 if there was none.
    bytes: u8,
    /// True for an atomic update.
    update: bool,
    read_site: Site,
}

/// A store of the bytes that were already there, by an agent that is not ordered after their writer.
#[derive(Debug, Clone, Copy)]
struct Echo {
    agent: Agent,
    step: u32,
    site: Site,
    bytes: u8,
}

/// An earlier access that is not ordered before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub agent: Agent,
    pub site: Site,
    pub was_write: bool,
    /// True if the accesses are ordered and only the proxy fence is missing.
    pub only_proxy: bool,
    /// True if the write was an atomic update.
    pub was_update: bool,
}

/// Shadow of one block's shared memory.
#[derive(Debug)]
pub(crate) struct SharedShadow {
    cells: Vec<Cell>,
    /// Last reads, `agents` entries a cell: the step and, in the low bits, the bytes read in it.
    reads: Vec<u32>,
    /// Echoes by cell.
    echoes: HashMap<usize, Vec<Echo>>,
    agents: usize,
}

/// The accessing agent, its step, and its knowledge.
#[derive(Clone, Copy)]
pub(crate) struct Accessor<'a> {
    pub agent: Agent,
    pub step: u32,
    pub known: &'a Knowledge,
    pub site: Site,
    /// True for an atomic update.
    pub update: bool,
}

impl SharedShadow {
    pub fn new(bytes: usize, agents: usize) -> Self {
        let cells = bytes.div_ceil(4);
        Self {
            cells: vec![Cell::default(); cells],
            reads: vec![0; cells * agents],
            echoes: HashMap::new(),
            agents,
        }
    }

    /// Records a read of a range and returns a conflicting write.
    pub fn read(&mut self, at: usize, bytes: usize, who: Accessor<'_>) -> Option<Conflict> {
        let mut found = None;
        for (index, mask) in cells(at, bytes) {
            let cell = &mut self.cells[index];
            if cell.bytes & mask != 0 && found.is_none() {
                found = write_conflict(cell, who).filter(|_| !heard(&self.echoes, index, mask, who));
            }
            cell.read_site = who.site;
            let last = &mut self.reads[index * self.agents + who.agent as usize];
            let same = *last >> MASK_BITS == who.step;
            *last = who.step << MASK_BITS | u32::from(mask) | if same { *last & 0xf } else { 0 };
        }
        found
    }

    /// Records a write of a range and returns a conflicting read or write. `silent`: the bytes do not change.
    pub fn write(&mut self, at: usize, bytes: usize, who: Accessor<'_>, silent: bool) -> Option<Conflict> {
        let mut found = None;
        for (index, mask) in cells(at, bytes) {
            let cell = &mut self.cells[index];
            if silent && cell.bytes & mask == mask && echoes(cell, who) {
                let echo = Echo {
                    agent: who.agent,
                    step: who.step,
                    site: who.site,
                    bytes: mask,
                };
                let all = self.echoes.entry(index).or_default();
                all.retain(|e| e.agent != echo.agent);
                all.push(echo);
                continue;
            }
            if cell.bytes & mask != 0 && found.is_none() {
                found = write_conflict(cell, who);
            }
            if !silent
                && !self.echoes.is_empty()
                && let Some(echoes) = self.echoes.remove(&index)
                && found.is_none()
            {
                found = echoes
                    .iter()
                    .find(|e| e.bytes & mask != 0)
                    .and_then(|e| echo_conflict(e, who));
            }
            if found.is_none() {
                let row = &self.reads[index * self.agents..][..self.agents];
                found = read_conflict(row, mask, who, silent).map(|agent| Conflict {
                    agent,
                    site: cell.read_site,
                    was_write: false,
                    only_proxy: false,
                    was_update: false,
                });
            }
            // The other bytes of the cell keep their writer only if it is this one.
            let same = cell.agent == who.agent && cell.step == who.step;
            cell.bytes = if same { cell.bytes | mask } else { mask };
            cell.agent = who.agent;
            cell.step = who.step;
            cell.site = who.site;
            cell.update = who.update;
        }
        found
    }
}

/// Returns true if a silent store copies a write that its agent is not ordered after.
fn echoes(cell: &Cell, who: Accessor<'_>) -> bool {
    let plain = Engine::of(cell.agent) == Engine::Warp && Engine::of(who.agent) == Engine::Warp;
    plain && cell.agent != who.agent && who.known.generic.get(cell.agent) < cell.step
}

/// Returns true if an echo of the bytes is ordered before this access, for every proxy involved.
fn heard(echoes: &HashMap<usize, Vec<Echo>>, index: usize, mask: u8, who: Accessor<'_>) -> bool {
    let covers = |e: &Echo| e.bytes & mask == mask && (e.agent == who.agent || ordered(e, who));
    echoes.get(&index).is_some_and(|all| all.iter().any(covers))
}

fn ordered(echo: &Echo, who: Accessor<'_>) -> bool {
    let fenced = !Engine::of(who.agent).is_async_proxy() || who.known.fenced.get(echo.agent) >= echo.step;
    who.known.generic.get(echo.agent) >= echo.step && fenced
}

fn echo_conflict(echo: &Echo, who: Accessor<'_>) -> Option<Conflict> {
    let unknown = echo.agent != who.agent && who.known.generic.get(echo.agent) < echo.step;
    unknown.then_some(Conflict {
        agent: echo.agent,
        site: echo.site,
        was_write: true,
        only_proxy: false,
        was_update: false,
    })
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
            was_update: cell.update,
        })
    };
    if who.known.generic.get(cell.agent) < cell.step {
        return conflict(false);
    }
    // Data of a `cp.async` that was waited for is accepted without a proxy fence: Triton up to 3.4 passes it to wgmma
    // so.
    let crosses = Engine::of(who.agent).is_async_proxy() && Engine::of(cell.agent) == Engine::Warp;
    if crosses && who.known.fenced.get(cell.agent) < cell.step {
        return conflict(true);
    }
    None
}

/// Returns an agent whose last read of these bytes is not ordered before this access. A silent store conflicts only
/// with reads still to come, those of asynchronous engines.
fn read_conflict(row: &[u32], mask: u8, who: Accessor<'_>, silent: bool) -> Option<Agent> {
    let known = who.known.generic.steps();
    let quiet = silent && Engine::of(who.agent) == Engine::Warp;
    let late = |(agent, read): (usize, &u32)| {
        let seen = known.get(agent).copied().unwrap_or(0);
        let unknown = *read >> MASK_BITS > seen && read & u32::from(mask) != 0 && agent != who.agent as usize;
        let agent = agent as Agent;
        (unknown && !(quiet && Engine::of(agent) == Engine::Warp)).then_some(agent)
    };
    row.iter().enumerate().find_map(late)
}

/// Returns the cells of a range, each with the bytes of it that the range covers.
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
            update: false,
        };
        let found = if write {
            shadow.write(8, 4, who, false)
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
            update: false,
        };
        let second = Accessor {
            agent: 4,
            step: 1,
            known: &b,
            site,
            update: false,
        };
        assert!(shadow.write(8, 1, first, false).is_none());
        assert!(shadow.write(9, 1, second, false).is_none());
    }

    #[test]
    fn copies_of_a_value_conflict_only_with_a_change() {
        let mut shadow = SharedShadow::new(64, 16);
        let who = |agent, known| Accessor {
            agent,
            step: 1,
            known,
            site: Site::default(),
            update: false,
        };
        let [a, b] = [0, 4].map(|agent| knowing(&[(agent, 1)]));
        assert!(shadow.write(8, 4, who(0, &a), false).is_none());
        assert!(shadow.write(8, 4, who(4, &b), true).is_none());
        // Each agent may read its own copy; a third one must be ordered after one of them.
        assert!(shadow.read(8, 4, who(0, &a)).is_none());
        assert!(shadow.read(8, 4, who(4, &b)).is_none());
        let (informed, lone) = (knowing(&[(8, 1), (4, 1)]), knowing(&[(8, 1)]));
        assert!(shadow.read(8, 4, who(8, &informed)).is_none());
        assert!(shadow.read(8, 4, who(8, &lone)).is_some());
        // A store that changes the bytes must be ordered after both writers and all readers.
        let all = knowing(&[(0, 1), (4, 1), (8, 1), (12, 1)]);
        let some = knowing(&[(0, 1), (8, 1), (12, 1)]);
        let mut twin = SharedShadow::new(64, 16);
        twin.write(8, 4, who(0, &a), false);
        twin.write(8, 4, who(4, &b), true);
        assert!(twin.write(8, 4, who(12, &some), false).is_some());
        assert!(shadow.write(8, 4, who(12, &all), false).is_none());
    }
}
