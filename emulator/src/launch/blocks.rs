//! Runs the clusters of a launch on the host's cores and merges their results.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::check::event::ENGINES;
use crate::check::guess::{AllGuesses, Guesses};
use crate::check::watch::{Setting, Watchers};
use crate::counters::Counters;
use crate::error::Error;
use crate::exec::warp::Warp;
use crate::exec::{Cluster, Context, Cta};
use crate::memory::shared::SharedMemory;
use crate::program::Program;
use crate::report::{Findings, Report};
use crate::request::Launch;
use crate::schedule::{Rng, Temper, Turns};

/// Results of a cluster's run.
struct Outcome {
    findings: Findings,
    guesses: Guesses,
    counters: Counters,
    counts: Vec<Vec<[u64; 2]>>,
    result: Result<(), Error>,
}

/// Runs all clusters and calls `ended` after each. Results are merged in the order of clusters, for any number of
/// host threads.
pub(super) fn run_clusters(
    context: &Context<'_>,
    clusters: u64,
    threads: usize,
    ordered: bool,
    ended: &(dyn Fn() + Sync),
) -> Result<Report, Error> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let merged = Mutex::new(Merge::new(context));
    // Blocks that may wait for each other take turns; the others run to their end.
    let work = || {
        let mut turns = ordered.then(|| Turns::draw(context.seed, cluster_bytes(context)));
        let mut resident: Vec<Resident<'_>> = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let mut fresh = None;
            if resident.len() < turns.as_ref().map_or(1, Turns::most) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                fresh = (index as u64 <= clusters.saturating_sub(1)).then_some(index);
            }
            let mut now = match fresh {
                Some(index) => Resident::start(context, index),
                None if resident.is_empty() => return,
                None => resident.remove(turns.as_mut().map_or(0, |t| t.choose(resident.len()))),
            };
            let budget = turns.as_mut().map_or(u64::MAX, |t| t.length(fresh.is_some()));
            let result = now.run(budget);
            if let Ok(false) = result {
                resident.push(now);
                continue;
            }
            if let Some(turns) = &mut turns {
                turns.ended();
            }
            let outcome = now.end(result.map(|_| ()));
            if outcome.1.result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let mut merged = merged.lock().unwrap_or_else(PoisonError::into_inner);
            merged.add(outcome.0, outcome.1);
            drop(merged);
            ended();
        }
    };
    let helpers = threads.min(clusters as usize).saturating_sub(1);
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(work);
        }
        work();
    });
    let merged = merged.into_inner().unwrap_or_else(PoisonError::into_inner);
    merged.finish(context)
}

/// Merges results in the order of clusters, and holds back those that come early.
struct Merge {
    findings: Findings,
    counters: Counters,
    counts: Vec<Vec<[u64; 2]>>,
    guesses: AllGuesses,
    max_findings: usize,
    early: HashMap<usize, (Findings, Guesses)>,
    next: usize,
    error: Option<(usize, Error)>,
}

impl Merge {
    fn new(context: &Context<'_>) -> Self {
        Self {
            findings: Findings::new(context.max_findings),
            counters: Counters::default(),
            counts: blank_counts(context.program),
            guesses: AllGuesses::default(),
            max_findings: context.max_findings,
            early: HashMap::new(),
            next: 0,
            error: None,
        }
    }

    fn add(&mut self, index: usize, outcome: Outcome) {
        self.counters.add(&outcome.counters);
        for (mine, theirs) in self.counts.iter_mut().flatten().zip(outcome.counts.iter().flatten()) {
            mine[0] += theirs[0];
            mine[1] += theirs[1];
        }
        if let Err(error) = outcome.result
            && self.error.as_ref().is_none_or(|(at, _)| *at > index)
        {
            self.error = Some((index, error));
        }
        self.early.insert(index, (outcome.findings, outcome.guesses));
        while let Some((findings, guesses)) = self.early.remove(&self.next) {
            self.findings.merge(findings);
            self.guesses.merge(guesses, self.max_findings);
            self.next += 1;
        }
    }

    fn finish(mut self, context: &Context<'_>) -> Result<Report, Error> {
        if let Some((_, error)) = self.error {
            return Err(error);
        }
        for findings in std::mem::take(&mut self.guesses).finish() {
            self.findings.merge(findings);
        }
        let program = context.program;
        for (function, counts) in program.functions.iter().zip(&self.counts) {
            for (instr, [warps, lanes]) in function.code.iter().zip(counts) {
                if *warps == 0 {
                    continue;
                }
                let name = &program.names[instr.name as usize];
                let entry = self.counters.opcodes.entry(name.clone()).or_default();
                entry.warp += warps;
                entry.thread += lanes;
                self.counters.warp_instructions += warps;
                self.counters.thread_instructions += lanes;
                self.counters.flops += lanes * u64::from(instr.flops);
            }
        }
        Ok(Report {
            findings: self.findings.kept,
            total_findings: self.findings.total,
            counters: self.counters,
        })
    }
}

fn blank_counts(program: &Program) -> Vec<Vec<[u64; 2]>> {
    program.functions.iter().map(|f| vec![[0; 2]; f.code.len()]).collect()
}

/// Estimates the host memory of a running cluster: its shared memory and the shadow of it.
fn cluster_bytes(context: &Context<'_>) -> usize {
    let launch = context.launch;
    let blocks: u32 = launch.cluster.iter().product();
    let warps = launch.block.iter().product::<u32>().div_ceil(32) * blocks;
    let agents = warps as usize * ENGINES;
    context.shared_end as usize * blocks as usize * (8 + agents)
}

/// A cluster that has started and not ended.
struct Resident<'m> {
    index: usize,
    cluster: Cluster<'m>,
    warps: Result<Vec<Warp>, Error>,
}

impl<'m> Resident<'m> {
    fn start(context: &'m Context<'m>, index: usize) -> Self {
        let mut cluster = new_cluster(context, index as u32);
        let warps = cluster.warps();
        Self { index, cluster, warps }
    }

    /// Runs for up to `budget` steps; returns true if the cluster ended.
    fn run(&mut self, budget: u64) -> Result<bool, Error> {
        match &mut self.warps {
            Ok(warps) => self.cluster.run(warps, budget),
            Err(error) => Err(error.clone()),
        }
    }

    fn end(self, result: Result<(), Error>) -> (usize, Outcome) {
        let outcome = Outcome {
            findings: self.cluster.watch.reports.findings,
            guesses: self.cluster.watch.reports.guesses,
            counters: self.cluster.counters,
            counts: self.cluster.counts,
            result,
        };
        (self.index, outcome)
    }
}

fn new_cluster<'m>(context: &'m Context<'m>, index: u32) -> Cluster<'m> {
    let launch = context.launch;
    let threads: u32 = launch.block.iter().product();
    let warps_per_cta = threads.div_ceil(32) as usize;
    let size: u32 = launch.cluster.iter().product();
    let mut rng = Rng::new(context.seed, u64::from(index));
    let temper = Temper::draw(&mut rng);
    let ctas = (0..size).map(|rank| {
        let coordinates = coordinates(launch, index, rank);
        let [gx, gy, _] = launch.grid;
        let linear = coordinates[0] + gx * (coordinates[1] + gy * coordinates[2]);
        let shared = SharedMemory::new(context.shared_end as usize);
        Cta {
            coordinates,
            linear,
            shared,
            barriers: (0..crate::exec::BARRIERS).map(|_| Default::default()).collect(),
            mbarriers: HashMap::new(),
            pool: 0,
            threads,
            live_threads: threads,
        }
    });
    let ctas: Vec<Cta> = ctas.collect();
    let watch = Watchers::new(Setting {
        program: context.program,
        checks: context.checks,
        max_findings: context.max_findings,
        grid: launch.grid,
        blocks: ctas.iter().map(|cta| cta.coordinates).collect(),
        warps_per_block: warps_per_cta,
        shared_bytes: context.shared_end as usize,
        global: context.shadow.as_ref(),
    });
    Cluster {
        ctx: context,
        ctas,
        rng,
        temper,
        tick: 0,
        watch,
        counters: Counters::default(),
        counts: blank_counts(context.program),
        barrier: Default::default(),
        bulk: Default::default(),
        warps_per_cta,
        pending: 0,
        progress: 0,
    }
}

/// Returns the coordinates of the block of `rank` in a cluster.
fn coordinates(launch: &Launch<'_>, index: u32, rank: u32) -> [u32; 3] {
    let [cx, cy, _] = launch.cluster;
    let [gx, gy, _] = [0, 1, 2].map(|axis| launch.grid[axis] / launch.cluster[axis]);
    let cluster = [index % gx, index / gx % gy, index / gx / gy];
    let within = [rank % cx, rank / cx % cy, rank / cx / cy];
    std::array::from_fn(|axis| cluster[axis] * launch.cluster[axis] + within[axis])
}
