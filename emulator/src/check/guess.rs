//! Ordinary reads that may be the first guess of a compare-and-swap loop.
//!
//! Such a read races with the updates of other threads, but does no harm: the compare-and-swap fails if the guess was
//! wrong. A read counts as a guess in two cases: a compare-and-swap on the same address register follows it in the
//! text (`Load::guess`), or some thread of the launch that read there then updated what it had read. All other such
//! reads become findings when the launch ends.

use std::collections::{HashMap, HashSet};

use super::event::Site;
use crate::report::{Finding, Findings};

/// Number of guesses that a cluster remembers. Further ones become findings at once.
const MAX_GUESSES: usize = 1 << 12;

/// Place of a read: an address of global memory, or a block and an offset in its shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Location {
    Global(u64),
    Shared(usize, usize),
}

/// A read that races with an update, unless it proves to be a guess.
#[derive(Debug)]
struct Guess {
    site: Site,
    /// The reading block for global memory, the reading agent for shared memory.
    reader: u32,
    location: Location,
    finding: Finding,
}

/// Reads of a cluster that may still prove to be guesses.
#[derive(Debug, Default)]
pub(crate) struct Guesses {
    open: Vec<Guess>,
    confirmed: HashSet<Site>,
}

impl Guesses {
    /// Remembers a read; returns the finding if there is no room left.
    pub fn add(&mut self, site: Site, reader: u32, location: Location, finding: Finding) -> Option<Finding> {
        if self.open.len() >= MAX_GUESSES {
            return Some(finding);
        }
        self.open.push(Guess {
            site,
            reader,
            location,
            finding,
        });
        None
    }

    /// Records that `reader` updates a location: an earlier read by it there was a guess.
    pub fn updated(&mut self, reader: u32, location: Location) {
        let confirmed = &mut self.confirmed;
        self.open.retain(|guess| {
            let mine = guess.reader == reader && guess.location == location;
            if mine {
                confirmed.insert(guess.site);
            }
            !mine
        });
    }
}

/// Possible guesses of all clusters of a launch, by the place of the read.
#[derive(Debug, Default)]
pub(crate) struct AllGuesses {
    open: HashMap<Site, Findings>,
    confirmed: HashSet<Site>,
}

impl AllGuesses {
    /// Adds the reads of a cluster that has ended, and keeps at most `max` findings of them.
    pub fn merge(&mut self, other: Guesses, max: usize) {
        self.confirmed.extend(other.confirmed);
        for guess in other.open {
            let findings = self.open.entry(guess.site).or_insert_with(|| Findings::new(max));
            let Finding { kind, line, .. } = guess.finding;
            findings.add(kind, line, || guess.finding);
        }
    }

    /// Returns the findings of reads that were no guesses, in the order of the text.
    pub fn finish(mut self) -> Vec<Findings> {
        self.open.retain(|site, _| !self.confirmed.contains(site));
        let mut open: Vec<(Site, Findings)> = self.open.into_iter().collect();
        open.sort_by_key(|(site, _)| *site);
        open.into_iter().map(|(_, findings)| findings).collect()
    }
}
