//! The checks that follow a cluster's events. The executor publishes each event once, to [`Watchers`]; a check
//! implements [`Watcher`] and has a field there.

use super::Checks;
use super::clock::{Clocks, Knowledge};
use super::event::{Engine, Fence, MemoryAccess, Place};
use super::global_race::GlobalShadow;
use super::races::{GlobalRaces, SharedRaces};
use super::reports::Reports;
use crate::program::Program;

/// A check that follows events. The calls are dispatched statically: an event that a check ignores costs nothing.
pub(crate) trait Watcher {
    /// Returns true if the check follows accesses to this memory.
    fn watches(&self, _place: &Place<'_>) -> bool {
        false
    }

    /// Follows an access to memory that the check watches.
    fn access(&mut self, _access: &MemoryAccess<'_>, _scene: Scene<'_, '_>) {}

    /// Follows a fence.
    fn fence(&mut self, _fence: Fence) {}
}

/// The state that a check may use beside an event.
pub(crate) struct Scene<'a, 'm> {
    /// Knowledge of each warp about what is done.
    pub clocks: &'a mut Clocks,
    /// Receives findings.
    pub reports: &'a mut Reports<'m>,
}

/// A check that is on or off.
impl<W: Watcher> Watcher for Option<W> {
    #[inline]
    fn watches(&self, place: &Place<'_>) -> bool {
        self.as_ref().is_some_and(|check| check.watches(place))
    }

    #[inline]
    fn access(&mut self, access: &MemoryAccess<'_>, scene: Scene<'_, '_>) {
        if let Some(check) = self
            && check.watches(&access.place)
        {
            check.access(access, scene);
        }
    }

    #[inline]
    fn fence(&mut self, fence: Fence) {
        if let Some(check) = self {
            check.fence(fence);
        }
    }
}

/// The checks of a cluster, the clocks that they share, and their findings.
///
/// Synchronisation objects and operations in flight hold the [`Knowledge`] that [`release`](Self::release) and
/// [`completion`](Self::completion) return, until a warp that waits for them gives it to [`acquire`](Self::acquire).
pub(crate) struct Watchers<'m> {
    pub reports: Reports<'m>,
    clocks: Clocks,
    shared: Option<SharedRaces>,
    global: Option<GlobalRaces<'m>>,
}

/// A cluster, as its checks see it.
pub(crate) struct Setting<'m> {
    pub program: &'m Program,
    pub checks: Checks,
    pub max_findings: usize,
    /// Blocks of the grid by axis.
    pub grid: [u32; 3],
    /// Coordinates of the cluster's blocks.
    pub blocks: Vec<[u32; 3]>,
    pub warps_per_block: usize,
    /// Size of a block's shared memory, in bytes.
    pub shared_bytes: usize,
    /// Shadow of global memory, if races between blocks are checked.
    pub global: Option<&'m GlobalShadow>,
}

impl<'m> Watchers<'m> {
    pub fn new(setting: Setting<'m>) -> Self {
        let warps = setting.blocks.len() * setting.warps_per_block;
        let shared = setting.checks.shared_races;
        Self {
            clocks: Clocks::new(warps),
            shared: shared.then(|| SharedRaces::new(setting.blocks.len(), setting.shared_bytes, warps)),
            global: setting
                .global
                .map(|shadow| GlobalRaces::new(shadow, setting.grid, &setting.blocks)),
            reports: Reports::new(setting),
        }
    }

    /// Returns true if any check follows accesses to this memory.
    #[inline]
    pub fn watches(&self, place: &Place<'_>) -> bool {
        self.shared.watches(place) || self.global.watches(place)
    }

    /// Publishes an access.
    #[inline]
    pub fn access(&mut self, access: &MemoryAccess<'_>) {
        let Self {
            reports,
            clocks,
            shared,
            global,
        } = self;
        shared.access(access, Scene { clocks, reports });
        global.access(access, Scene { clocks, reports });
    }

    /// Publishes a fence.
    pub fn fence(&mut self, fence: Fence) {
        self.clocks.fence(fence);
        self.shared.fence(fence);
        self.global.fence(fence);
    }

    /// Publishes a release, such as the arrival at a barrier: returns what the warp knows, to be stored at the
    /// synchronisation object.
    pub fn release(&mut self, warp: usize) -> Knowledge {
        self.clocks.release(warp)
    }

    /// Publishes an acquire, such as the end of a wait: the warp learns what was stored at the synchronisation object.
    pub fn acquire(&mut self, warp: usize, left: &Knowledge) {
        self.clocks.acquire(warp, left);
    }

    /// Publishes the issue of an asynchronous operation; returns its number among those of the engine.
    pub fn issue(&mut self, warp: usize, engine: Engine) -> u32 {
        self.clocks.issue(warp, engine)
    }

    /// Returns what a thread learns that waits for an operation which the warp has issued.
    pub fn completion(&self, warp: usize, engine: Engine, operation: u32) -> Knowledge {
        self.clocks.completion(warp, engine, operation)
    }

    /// Publishes that the warp has waited for an operation of its engine, and with it for all earlier ones.
    pub fn complete(&mut self, warp: usize, engine: Engine, operation: u32) {
        self.clocks.complete(warp, engine, operation);
    }

    /// Returns what the warp knows.
    pub fn known(&self, warp: usize) -> &Knowledge {
        self.clocks.known(warp)
    }

    /// Makes the warp forget what it has learnt since it knew `before`.
    pub fn restore(&mut self, warp: usize, before: Knowledge) {
        self.clocks.restore(warp, before);
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::{Actor, Effect, Site};
    use super::*;
    use crate::isa::types::Order;
    use crate::memory::shared::SharedMemory;
    use crate::program::Source;
    use crate::report::FindingKind;

    /// Bytes of shared memory of a block, and of the allocation in global memory.
    const BYTES: usize = 64;

    /// Gives `test` the checks of two blocks of two warps each.
    fn watched(checks: Checks, test: impl FnOnce(&mut Watchers<'_>)) {
        let program = Program {
            source: Source::new("", "events.ptx"),
            target: "sm_90a".to_owned(),
            functions: Vec::new(),
            variables: Vec::new(),
            names: Vec::new(),
            entries: Vec::new(),
        };
        let global = checks.global_races.then(|| GlobalShadow::new([BYTES].into_iter()));
        test(&mut Watchers::new(Setting {
            program: &program,
            checks,
            max_findings: 10,
            grid: [2, 1, 1],
            blocks: vec![[0, 0, 0], [1, 0, 0]],
            warps_per_block: 2,
            shared_bytes: BYTES,
            global: global.as_ref(),
        }));
    }

    /// Publishes that a warp accesses the first four bytes of a memory.
    fn access(watch: &mut Watchers<'_>, warp: usize, place: Place<'_>, effect: Effect, order: Order) {
        watch.access(&MemoryAccess {
            warp,
            engine: Engine::Warp,
            actor: Actor {
                cta: warp / 2,
                warp: warp as u32 % 2,
            },
            site: Site::default(),
            line: 1,
            lane: Some(0),
            place,
            bytes: 4,
            effect,
            order,
            stored: &[],
        });
    }

    fn kinds(watch: &Watchers<'_>) -> Vec<FindingKind> {
        watch.reports.findings.kept.iter().map(|finding| finding.kind).collect()
    }

    #[test]
    fn a_release_and_an_acquire_order_accesses_to_shared_memory() {
        let memory = SharedMemory::new(BYTES);
        let place = Place::Shared {
            cta: 0,
            at: 0,
            memory: &memory,
        };
        for (ordered, expected) in [(true, vec![]), (false, vec![FindingKind::SharedRace])] {
            watched(Checks::all(), |watch| {
                access(watch, 0, place, Effect::Write, Order::Weak);
                let left = watch.release(0);
                if ordered {
                    watch.acquire(1, &left);
                }
                access(watch, 1, place, Effect::Read, Order::Weak);
                assert_eq!(kinds(watch), expected);
            });
        }
    }

    #[test]
    fn a_fence_before_a_flag_orders_accesses_to_global_memory() {
        let place = |at| Place::Global {
            allocation: 0,
            at,
            address: 1024 + at as u64,
        };
        let (data, flag) = (place(0), place(32));
        for (device, expected) in [(true, vec![]), (false, vec![FindingKind::GlobalRace])] {
            watched(Checks::all(), |watch| {
                access(watch, 0, data, Effect::Write, Order::Weak);
                watch.fence(Fence {
                    warp: 0,
                    cta: 0,
                    async_proxy: false,
                    device,
                });
                access(watch, 0, flag, Effect::Write, Order::Relaxed);
                access(watch, 2, flag, Effect::Read, Order::Relaxed);
                access(watch, 2, data, Effect::Read, Order::Weak);
                assert_eq!(kinds(watch), expected);
            });
        }
    }

    #[test]
    fn checks_that_are_off_follow_nothing() {
        let memory = SharedMemory::new(BYTES);
        let places = [
            Place::Shared {
                cta: 0,
                at: 0,
                memory: &memory,
            },
            Place::Global {
                allocation: 0,
                at: 0,
                address: 1024,
            },
        ];
        for (checks, expected) in [(Checks::all(), true), (Checks::none(), false)] {
            watched(checks, |watch| {
                assert_eq!(places.map(|place| watch.watches(&place)), [expected; 2]);
            });
        }
    }
}
