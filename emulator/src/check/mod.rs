//! The checks: observers of what the executor does to memory and of how threads meet.

pub(crate) mod clock;
pub(crate) mod definedness;
pub(crate) mod global_race;
pub(crate) mod guess;
pub(crate) mod shared_race;

use crate::report::FindingKind;

/// Which checks are on. The accesses themselves stay safe for the host whatever is switched off: an access outside
/// all memory then ends the launch, as it would on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Out-of-bounds accesses and uses after free.
    pub bounds: bool,
    /// Addresses that are not naturally aligned.
    pub alignment: bool,
    /// Branches, addresses, operands and results that depend on bytes of global, shared or local memory which were never
    /// written.
    pub uninitialized: bool,
    /// Unordered accesses to shared memory, asynchronous ones and their proxies included.
    pub shared_races: bool,
    /// Unordered accesses of different blocks to global memory.
    pub global_races: bool,
    /// Registers of asynchronous operations touched before their wait.
    pub registers: bool,
    /// Divergent barriers and mbarrier misuse.
    pub barriers: bool,
}

impl Checks {
    /// True if findings of this kind are wanted. Deadlocks, limits and operands without a meaning always are.
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

    /// Every check.
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

    /// No check.
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
