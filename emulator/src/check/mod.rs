//! The checks: observers of what the executor does to memory and of how threads meet.

pub(crate) mod clock;
pub(crate) mod definedness;
pub(crate) mod global_race;
pub(crate) mod guess;
pub(crate) mod shared_race;

/// Which checks are on. The accesses themselves stay safe for the host whatever is switched off: an access outside
/// all memory then ends the launch, as it would on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Out-of-bounds accesses and uses after free.
    pub bounds: bool,
    /// Addresses that are not naturally aligned.
    pub alignment: bool,
    /// Reads of bytes that were never written, in global, shared and local memory.
    pub uninitialized: bool,
    /// Unordered accesses to shared memory, asynchronous ones and their proxies included.
    pub shared_races: bool,
    /// Unordered accesses of different blocks to global memory.
    pub global_races: bool,
    /// Registers of asynchronous operations touched before their wait.
    pub registers: bool,
    /// Divergent barriers, mbarrier misuse, limits.
    pub barriers: bool,
}

impl Checks {
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
