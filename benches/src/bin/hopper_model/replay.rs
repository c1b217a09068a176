//! Replays a decoded main loop on one scheduler of a multiprocessor, with one warp of each multiplying warpgroup. The
//! scheduler issues one instruction a cycle.
//!
//! Stall counts and scoreboards are those that ptxas wrote. Products of all warps queue for the tensor cores in the
//! order of issue; the queue is unlimited here, unlike in hardware. Tiles have always arrived. Warpgroups take turns
//! at barriers whose number is in a register. At a numbered barrier only the multiplying warpgroups are expected.

use std::collections::HashMap;

use crate::Failure;
use crate::program::{Action, Op, Pipe, Program};

/// Cycles until an instruction has read its operands, if a scoreboard tracks that. Assumed.
const READING: u64 = 10;

/// Cycles from the end of a product to the issue of the warp that waits for it. Assumed.
const PRODUCT_LATENCY: u64 = 13;

/// Choice among the warps that can issue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arbitration {
    /// The warp that issued last, then the next in order. A loop without stalls would never let another warp issue.
    Greedy,
    /// The warp after the one that issued last.
    RoundRobin,
}

/// State of a warp in a cycle: it issues, or the reason why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The warp issues.
    Issues,
    /// Stall count of its last instruction.
    Stall,
    /// A held scoreboard.
    Scoreboard,
    /// Another instruction in the pipe.
    Pipe,
    /// A pending product.
    Product,
    /// A turn or a barrier.
    Barrier,
    /// Another warp issues.
    Other,
}

impl Reason {
    /// All reasons with their names in tables.
    pub const TITLES: [(Self, &str); 7] = [
        (Self::Issues, "issues"),
        (Self::Stall, "stall counts"),
        (Self::Scoreboard, "scoreboards"),
        (Self::Pipe, "pipes"),
        (Self::Product, "products"),
        (Self::Barrier, "turns, barriers"),
        (Self::Other, "another warp issues"),
    ];
}

/// Time of a loop.
#[derive(Clone, Copy, Debug)]
pub struct Replay {
    /// Cycles in which every warp makes one step.
    pub cycles: f64,
    /// Fraction of a warp's time for each of [`Reason::TITLES`], averaged over the warps.
    pub shares: [f64; 7],
}

/// Number of steps of each warp before the measurement, and during it.
const STEPS: (usize, usize) = (12, 24);

/// Cycles after which a replay is stopped; loops here need about 100,000.
const LONGEST: u64 = 10_000_000;

/// Replays a loop in `warps` warps.
///
/// # Errors
/// If no warp can ever issue again, or one warp never issues.
pub fn replay(program: &Program, warps: usize, arbitration: Arbitration) -> Result<Replay, Failure> {
    let mut scheduler = Scheduler::new(program, warps);
    scheduler.run(STEPS.0, arbitration)?;
    let (begin, before) = (scheduler.now, scheduler.spent);
    scheduler.run(STEPS.0 + STEPS.1, arbitration)?;
    let cycles = scheduler.now - begin;
    let mut shares = [0.0; 7];
    for (share, (after, before)) in shares.iter_mut().zip(scheduler.spent.iter().zip(before)) {
        *share = (after - before) as f64 / (cycles * warps as u64) as f64;
    }
    Ok(Replay {
        cycles: cycles as f64 / STEPS.1 as f64,
        shares,
    })
}

#[derive(Clone, Default)]
struct Warp {
    next: usize,
    steps: usize,
    ready: u64,
    /// Cycle at which each scoreboard becomes free.
    scoreboards: [u64; 6],
    /// Cycle at which each ended group of products is complete.
    groups: Vec<u64>,
    turns: usize,
    /// Generation of the numbered barrier at which the warp has arrived and waits.
    waiting: Option<u64>,
}

/// A numbered barrier: number of arrivals and of completions.
#[derive(Clone, Copy, Default)]
struct Barrier {
    arrived: usize,
    generation: u64,
}

struct Scheduler<'a> {
    ops: &'a [Op],
    warps: Vec<Warp>,
    barriers: HashMap<u32, Barrier>,
    pipes: HashMap<Pipe, u64>,
    /// Cycle at which the last product ends.
    tensor: u64,
    last: usize,
    now: u64,
    /// Cycles of all warps for each reason.
    spent: [u64; 7],
}

impl<'a> Scheduler<'a> {
    fn new(program: &'a Program, warps: usize) -> Self {
        let mut all = vec![Warp::default(); warps];
        all[0].turns = 1;
        Self {
            ops: &program.0,
            warps: all,
            barriers: HashMap::new(),
            pipes: HashMap::new(),
            tensor: 0,
            last: 0,
            now: 0,
            spent: [0; 7],
        }
    }

    /// Runs until every warp has made this many steps.
    fn run(&mut self, steps: usize, arbitration: Arbitration) -> Result<(), Failure> {
        while self.warps.iter().any(|warp| warp.steps < steps) {
            self.cycle(arbitration)?;
            if self.now > LONGEST {
                return Err("a warp never comes to issue".into());
            }
        }
        Ok(())
    }

    /// Runs one cycle, in which at most one warp issues.
    fn cycle(&mut self, arbitration: Arbitration) -> Result<(), Failure> {
        let count = self.warps.len();
        let first = match arbitration {
            Arbitration::Greedy => self.last,
            Arbitration::RoundRobin => self.last + 1,
        };
        let mut issued = false;
        let mut is_stuck = true;
        for warp in (first..first + count).map(|warp| warp % count) {
            let mut reason = self.obstacle(warp);
            if reason == Reason::Issues {
                if issued {
                    reason = Reason::Other;
                } else {
                    self.issue(warp);
                    issued = true;
                }
            }
            is_stuck &= reason == Reason::Barrier;
            self.spent[reason as usize] += 1;
        }
        if is_stuck {
            return Err(format!("every warp waits at a barrier in cycle {}", self.now).into());
        }
        self.now += 1;
        Ok(())
    }

    /// Returns the reason why a warp cannot issue now.
    fn obstacle(&mut self, warp: usize) -> Reason {
        let Self {
            ops,
            warps,
            barriers,
            pipes,
            now,
            ..
        } = self;
        let now = *now;
        let count = warps.len();
        let state = &mut warps[warp];
        let op = &ops[state.next];
        if state.ready > now {
            return Reason::Stall;
        }
        let is_held = |(number, &free): (usize, &u64)| op.waits >> number & 1 == 1 && free > now;
        if state.scoreboards.iter().enumerate().any(is_held) {
            return Reason::Scoreboard;
        }
        if op
            .pipe
            .is_some_and(|(pipe, _)| pipes.get(&pipe).is_some_and(|&free| free > now))
        {
            return Reason::Pipe;
        }
        match op.action {
            Action::Wait(most) => {
                let last = state.groups.len().checked_sub(most + 1).map(|last| state.groups[last]);
                if last.is_some_and(|end| end + PRODUCT_LATENCY > now) {
                    return Reason::Product;
                }
            }
            Action::TakeTurn if state.turns == 0 => return Reason::Barrier,
            Action::Barrier(id, groups, true) => {
                let barrier = barriers.entry(id).or_default();
                let generation = match state.waiting {
                    Some(generation) => generation,
                    None => {
                        let generation = barrier.generation;
                        state.waiting = Some(generation);
                        barrier.arrive(groups.clamp(1, count));
                        generation
                    }
                };
                if barrier.generation == generation {
                    return Reason::Barrier;
                }
            }
            _ => {}
        }
        Reason::Issues
    }

    fn issue(&mut self, warp: usize) {
        let count = self.warps.len();
        let op = &self.ops[self.warps[warp].next];
        let state = &mut self.warps[warp];
        match op.action {
            Action::Product(cycles, ends) => {
                self.tensor = self.tensor.max(self.now) + cycles;
                if ends {
                    state.groups.push(self.tensor);
                }
            }
            Action::Wait(most) => {
                let done = state.groups.len().saturating_sub(most);
                state.groups.drain(..done);
            }
            Action::TakeTurn => state.turns -= 1,
            Action::PassTurn => self.warps[(warp + 1) % count].turns += 1,
            Action::Barrier(id, groups, is_waited) => match is_waited {
                true => state.waiting = None,
                false => self.barriers.entry(id).or_default().arrive(groups.clamp(1, count)),
            },
            Action::Plain => {}
        }
        if let Some((pipe, cycles)) = op.pipe {
            self.pipes.insert(pipe, self.now + cycles);
        }
        let state = &mut self.warps[warp];
        for (scoreboard, cycles) in [(op.result, op.latency), (op.operands, READING)] {
            if let Some(scoreboard) = scoreboard {
                let free = &mut state.scoreboards[scoreboard];
                *free = (*free).max(self.now + cycles);
            }
        }
        state.ready = self.now + op.stall;
        state.next += 1;
        if state.next == self.ops.len() {
            state.next = 0;
            state.steps += 1;
        }
        self.last = warp;
    }
}

impl Barrier {
    fn arrive(&mut self, needed: usize) {
        self.arrived += 1;
        if self.arrived == needed {
            self.arrived = 0;
            self.generation += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycles(code: &str, warps: usize) -> f64 {
        let program = Program::parse(code).expect("a loop");
        let replay = replay(&program, warps, Arbitration::RoundRobin);
        replay.expect("no deadlock").cycles
    }

    #[test]
    fn stalls_and_scoreboards_are_waited_for() {
        assert_eq!(cycles("4*FADD/4", 1), 16.0);
        // The exponential takes 20 cycles.
        assert_eq!(cycles("MUFU/1>2 FADD/4?4", 1), 24.0);
        // The second warp uses the cycles that the first leaves free.
        assert_eq!(cycles("4*FADD/4", 2), 16.0);
        assert_eq!(cycles("4*FADD/1", 2), 8.0);
    }

    #[test]
    fn pipes_are_shared_by_warps() {
        assert_eq!(cycles("MUFU/1 FADD/1", 3), 24.0);
        let program = Program::parse("3*MUFU/1 FADD/1").expect("a loop");
        assert_eq!(
            (program.pipe_cycles(Pipe::Mufu), program.pipe_cycles(Pipe::Alu)),
            (24, 0)
        );
        assert_eq!(program.instructions(), 4);
    }

    #[test]
    fn products_queue_and_are_waited_for() {
        // 64 x 128 with A in registers: 64 cycles. 64 x 32 with both operands in shared memory: 3072 bytes, 24
        // cycles.
        assert_eq!(
            cycles("HGMMA:128:rs:c/1 WAIT:0/1", 1),
            64.0 + PRODUCT_LATENCY as f64 + 1.0
        );
        assert_eq!(Program::parse("HGMMA:32:ss/1").expect("a loop").tensor_cycles(), 24);
        // Two warps keep the tensor cores busy, and so does one that does not wait for its product.
        assert_eq!(cycles("HGMMA:128:rs:c/1 WAIT:0/1", 2), 128.0);
        assert_eq!(cycles("HGMMA:128:rs:c/1 WAIT:1/1", 1), 64.0);
        let program = Program::parse("HGMMA:128:rs:c/1 WAIT:1/1").expect("a loop");
        assert_eq!(program.with_fast_products().tensor_cycles(), 32);
    }

    #[test]
    fn turns_go_round_and_barriers_wait_for_all() {
        // Each warp holds the turn for 10 cycles.
        assert_eq!(cycles("SYNC:turn:256/10 ARRIVE:turn:256/1", 3), 33.0);
        // The last warp to arrive continues first, the other one or two cycles later.
        assert!((11.0..=12.0).contains(&cycles("SYNC:3:256/1 FADD/9", 2)));
        let greedy = replay(&Program::parse("FADD/1").expect("a loop"), 2, Arbitration::Greedy);
        assert!(
            greedy
                .expect_err("the first warp keeps the scheduler")
                .to_string()
                .contains("never")
        );
        let stuck = Program::parse("SYNC:turn:256/1").expect("a loop");
        let failure = replay(&stuck, 2, Arbitration::RoundRobin).expect_err("nobody arrives");
        assert!(failure.to_string().contains("barrier"));
    }

    /// Loops of an earlier version of the kernels (commit 7be4680, ptxas 13.5.37), which another program replayed
    /// with these rules: name, warpgroups, and cycles (greedy, round-robin, one warpgroup alone, greedy with fast
    /// products).
    const REPLAYED: [(&str, usize, [f64; 4]); 5] = [
        ("forward 64", 3, [2185.0, 1871.0, 1280.0, 2164.0]),
        ("forward 128", 2, [2048.0, 2048.0, 1555.0, 1623.0]),
        ("forward 256", 2, [2560.0, 2560.0, 1565.0, 1438.0]),
        ("backward 64", 2, [3211.0, 3176.0, 1963.0, 2588.0]),
        ("backward 128", 2, [2569.0, 2560.0, 1430.0, 1720.0]),
    ];

    #[test]
    fn another_replay_of_the_same_loops_agrees() {
        let loops = include_str!("replayed_loops.txt");
        for (name, warps, others) in REPLAYED {
            let code = loops
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            let program = Program::parse(code.expect(name)).expect(name);
            let cycles = |program: &Program, warps, by| replay(program, warps, by).expect(name).cycles;
            let ours = [
                cycles(&program, warps, Arbitration::Greedy),
                cycles(&program, warps, Arbitration::RoundRobin),
                cycles(&program, 1, Arbitration::Greedy),
                cycles(&program.with_fast_products(), warps, Arbitration::Greedy),
            ];
            for (ours, other) in ours.iter().zip(others) {
                assert!((ours / other - 1.0).abs() < 0.015, "{name}: {ours} and {other}");
            }
        }
    }

    #[test]
    fn shares_are_of_the_whole_time() {
        let program = Program::parse("2*MUFU/1>0 HGMMA:64:rs:c/1 WAIT:0/1 FADD/4?1").expect("a loop");
        for arbitration in [Arbitration::Greedy, Arbitration::RoundRobin] {
            let shares = replay(&program, 2, arbitration).expect("no deadlock").shares;
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{shares:?}");
        }
    }
}
