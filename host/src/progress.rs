//! How far a call is, for those who wait for it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two reports at least, but for the last one.
const INTERVAL: Duration = Duration::from_millis(10);

/// How much of one call has been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Units of work that have been done.
    pub done: u64,
    /// Units of the whole call, at least 1. They take about the same time each: on the CPU a tile of queries against a tile
    /// of keys, on the emulator a block of a grid.
    pub total: u64,
}

impl Progress {
    /// The part that has been done, from 0 to 1.
    pub fn fraction(&self) -> f64 {
        self.done as f64 / self.total as f64
    }
}

/// What a device tells of one call. Without anybody to tell it to, it does nothing.
pub(crate) struct Reporter<'a> {
    report: Option<&'a (dyn Fn(Progress) + Sync)>,
    /// 0 until the device has said how much there is to do.
    total: AtomicU64,
    done: AtomicU64,
    reports: Mutex<Reports>,
}

/// What has been reported.
#[derive(Default)]
struct Reports {
    /// When the last report returned.
    last: Option<Instant>,
    done: u64,
    panic: Option<Box<dyn Any + Send>>,
}

impl<'a> Reporter<'a> {
    /// Nobody is told.
    pub(crate) fn silent() -> Self {
        Self {
            report: None,
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            reports: Mutex::default(),
        }
    }

    pub(crate) fn new(report: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self {
            report: Some(report),
            ..Self::silent()
        }
    }

    /// How much there is to do, at least 1; to be said once and first, by a device that reports.
    pub(crate) fn begin(&self, total: impl FnOnce() -> u64) {
        if self.report.is_some() {
            self.total.store(total(), Ordering::Relaxed);
        }
    }

    /// So many units more have been done.
    pub(crate) fn add(&self, units: u64) {
        let Some(report) = self.report else { return };
        self.done.fetch_add(units, Ordering::Relaxed);
        // Whoever reports now will do for all.
        let Ok(mut reports) = self.reports.try_lock() else {
            return;
        };
        if reports.panic.is_some() || reports.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return;
        }
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        // The last report is made when the results are there.
        if reports.done < done && done < total {
            reports.done = done;
            reports.panic = catch_unwind(AssertUnwindSafe(|| report(Progress { done, total }))).err();
            reports.last = Some(Instant::now());
        }
    }

    /// Reports that the call has ended, or lets the panic of an earlier report go on.
    pub(crate) fn end(self) {
        let total = self.total.into_inner();
        let Some(report) = self.report.filter(|_| total > 0) else {
            return;
        };
        let done = self.done.into_inner();
        debug_assert_eq!(done, total, "units of work add up");
        let reports = self.reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        match reports.panic {
            Some(panic) => resume_unwind(panic),
            None => report(Progress { done: total, total }),
        }
    }

    /// What is left of a call that failed: the panic of a report, if there was one.
    pub(crate) fn abandon(self) {
        let reports = self.reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = reports.panic {
            resume_unwind(panic);
        }
    }
}
