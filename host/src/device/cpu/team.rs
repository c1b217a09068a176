//! Distribution of tasks over threads, and the aligned memory of a thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rayon_core::ThreadPool;

use super::kernels::Kernels;

/// Threads that solve a problem, and the inner loops they run.
pub(super) struct Team<'a> {
    pub kernels: &'static Kernels,
    /// Largest number of threads that work at a time, including the caller's.
    pub threads: usize,
    /// Pool of the helpers; `None` for the rayon pool of the caller, else the global one.
    pub pool: Option<&'a ThreadPool>,
}

impl Team<'_> {
    /// Runs the tasks `0 .. tasks`, each once. A thread makes its scratch once, and takes the next task in order when
    /// it has finished one.
    ///
    /// The caller takes tasks as well, and at the end waits only for tasks that helpers are running. Meanwhile it
    /// never runs other jobs of its pool: one of them could call us again, and wait for ever for a tensor that this
    /// call holds locked.
    pub(super) fn share<S>(&self, tasks: usize, scratch: impl Fn() -> S + Sync, run: impl Fn(&mut S, usize) + Sync) {
        let next = AtomicUsize::new(0);
        let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&task| task < tasks);
        let work = || {
            let Some(first) = take() else { return };
            let mut scratch = scratch();
            run(&mut scratch, first);
            while let Some(task) = take() {
                run(&mut scratch, task);
            }
        };
        let helpers = self.threads.min(tasks).saturating_sub(1);
        if helpers == 0 {
            return work();
        }
        let work: &(dyn Fn() + Sync) = &work;
        // SAFETY: only the lifetime changes. Helpers call it between `enter` and `leave` alone, and before this
        // function returns or unwinds, `Closing` lets no more of them enter and waits until all have left.
        let work: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(work) };
        let gate = Arc::new(Gate::default());
        for _ in 0..helpers {
            let gate = gate.clone();
            let help = move || gate.help(work);
            match self.pool {
                Some(pool) => pool.spawn(help),
                None => rayon_core::spawn(help),
            }
        }
        let closing = Closing(&gate);
        work();
        drop(closing);
        let panic = gate.lock().panic.take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Gate through which helpers enter the caller's work.
#[derive(Default)]
struct Gate {
    state: Mutex<Passage>,
    left: Condvar,
}

#[derive(Default)]
struct Passage {
    closed: bool,
    inside: usize,
    panic: Option<Box<dyn Any + Send>>,
}

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, Passage> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the tasks, if the caller has not finished.
    fn help(&self, work: &(dyn Fn() + Sync)) {
        let mut passage = self.lock();
        if passage.closed {
            return;
        }
        passage.inside += 1;
        drop(passage);
        let result = catch_unwind(AssertUnwindSafe(work));
        let mut passage = self.lock();
        passage.inside -= 1;
        passage.panic = passage.panic.take().or(result.err());
        self.left.notify_all();
    }
}

/// Closes the gate when dropped, and waits until no helper is inside.
struct Closing<'a>(&'a Gate);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut passage = self.0.lock();
        passage.closed = true;
        while passage.inside > 0 {
            passage = self.0.left.wait(passage).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// f32 memory that starts at a cache line: no register is loaded from two lines, and no two threads write to one
/// line.
pub(super) struct Lines(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Lines {
    /// Allocates at least `count` zeros.
    pub(super) fn new(count: usize) -> Self {
        Self(vec![Line([0.0; 16]); count.div_ceil(16)])
    }

    pub(super) fn as_ptr(&self) -> *const f32 {
        self.0.as_ptr().cast()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        // SAFETY: a line is sixteen f32 and nothing else.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), 16 * self.0.len()) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: a line is sixteen f32 and nothing else.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), 16 * self.0.len()) }
    }
}
