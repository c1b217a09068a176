//! The checks. The executor publishes memory accesses and synchronisation as events, which the checks for races follow
//! ([`watch`]). [`definedness`] is no watcher: it is a property of values, and moves with them.

pub(crate) mod clock;
pub(crate) mod definedness;
pub(crate) mod event;
pub(crate) mod global_race;
pub(crate) mod guess;
mod races;
mod reports;
mod shared_race;
pub(crate) mod watch;

use crate::report::FindingKind;

/// Selection of checks. Accesses are memory-safe for the host in any case: with `bounds` off, an access outside of
/// all memory ends the launch, as it would on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Out-of-bounds accesses and uses after free.
    pub bounds: bool,
    /// Addresses that are not naturally aligned.
    pub alignment: bool,
    /// Branches, addresses, operands and results that depend on bytes of global, shared or local memory that were
    /// never written.
    pub uninitialized: bool,
    /// Unordered accesses to shared memory, including asynchronous ones and missing proxy fences.
    pub shared_races: bool,
    /// Unordered accesses of different blocks to global memory.
    pub global_races: bool,
    /// Accesses to registers of asynchronous operations before their wait.
    pub registers: bool,
    /// Divergent barriers and mbarrier misuse.
    pub barriers: bool,
}

impl Checks {
    /// Returns true if findings of this kind are reported. Deadlocks, limits and invalid operands always are.
    pub(crate) const fn covers(&self, kind: FindingKind) -> bool {
        match kind {
            FindingKind::OutOfBounds | FindingKind::UseAfterFree => self.bounds,
            FindingKind::Misaligned => self.alignment,
            FindingKind::Uninitialized => self.uninitialized,
            FindingKind::SharedRace | FindingKind::MissingProxyFence => self.shared_races,
            FindingKind::GlobalRace => self.global_races,
            FindingKind::UnawaitedAsync => self.shared_races || self.registers,
            FindingKind::BarrierDivergence | FindingKind::Mbarrier => self.barriers,
            FindingKind::Deadlock | FindingKind::Limit | FindingKind::InvalidOperand => true,
        }
    }

    /// Returns the selection of all checks.
    pub const fn all() -> Self {
        Self {
            bounds: true,
            alignment: true,
            uninitialized: true,
            shared_races: true,
            global_races: true,
            registers: true,
            barriers: true,
        }
    }

    /// Returns the empty selection.
    pub const fn none() -> Self {
        Self {
            bounds: false,
            alignment: false,
            uninitialized: false,
            shared_races: false,
            global_races: false,
            registers: false,
            barriers: false,
        }
    }
}

impl Default for Checks {
    fn default() -> Self {
        Self::all()
    }
}
