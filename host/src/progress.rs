//! Progress of a call, reported to a callback.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two reports, except before the last one.
const INTERVAL: Duration = Duration::from_millis(10);

/// Progress of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Units of work done so far.
    pub done: u64,
    /// Units of the whole call, at least 1. Each takes about the same time: on the CPU a tile of queries against a
    /// tile of keys, on the emulator a block of a grid.
    pub total: u64,
}

impl Progress {
    /// Returns the fraction that is done, from 0 to 1.
    pub fn fraction(&self) -> f64 {
        self.done as f64 / self.total as f64
    }
}

/// Reports the progress of one call. Without a callback it does nothing.
pub(crate) struct Reporter<'a> {
    report: Option<&'a (dyn Fn(Progress) + Sync)>,
    /// Units of the whole call; 0 until the device has called `begin`.
    total: AtomicU64,
    done: AtomicU64,
    reports: Mutex<Reports>,
}

/// State of the reports made so far.
#[derive(Default)]
struct Reports {
    /// Time when the last report returned.
    last: Option<Instant>,
    done: u64,
    panic: Option<Box<dyn Any + Send>>,
}

impl<'a> Reporter<'a> {
    /// Makes a reporter without a callback, which discards all progress.
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

    /// Sets the units of the whole call, at least 1. A device that reports calls it once, before `add`.
    pub(crate) fn begin(&self, total: impl FnOnce() -> u64) {
        if self.report.is_some() {
            self.total.store(total(), Ordering::Relaxed);
        }
    }

    /// Adds units that have been done, and reports if it is time to.
    pub(crate) fn add(&self, units: u64) {
        let Some(report) = self.report else { return };
        self.done.fetch_add(units, Ordering::Relaxed);
        // One thread reports at a time. Its report covers the work of the others.
        let Ok(mut reports) = self.reports.try_lock() else {
            return;
        };
        if reports.panic.is_some() || reports.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            return;
        }
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        // `end` makes the last report, when the results are there.
        if reports.done < done && done < total {
            reports.done = done;
            reports.panic = catch_unwind(AssertUnwindSafe(|| report(Progress { done, total }))).err();
            reports.last = Some(Instant::now());
        }
    }

    /// Makes the last report, or resumes the panic of an earlier one.
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

    /// Ends a call that failed, and resumes the panic of a report if there was one.
    pub(crate) fn abandon(self) {
        let reports = self.reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = reports.panic {
            resume_unwind(panic);
        }
    }
}
