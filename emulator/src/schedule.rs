//! The seeded part of a run: which warp goes next, for how long, and when asynchronous work lands.

/// A small generator (splitmix64), seeded by launch seed and block so that results do not depend on host threads.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// When an asynchronous operation takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Landing {
    /// At its issue.
    Now,
    /// When this many scheduler steps have passed, or at its wait.
    Tick(u64),
    /// When it is waited for.
    AtWait,
}

impl Landing {
    /// True if an operation with this landing is due at `tick`.
    pub fn due(self, tick: u64) -> bool {
        match self {
            Landing::Now => true,
            Landing::Tick(at) => tick >= at,
            Landing::AtWait => false,
        }
    }
}

/// How the landings of one block are drawn: each block leans one way, so that among a few seeds each extreme is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Temper {
    Eager,
    Late,
    Mixed,
}

impl Temper {
    pub fn draw(rng: &mut Rng) -> Self {
        match rng.below(3) {
            0 => Temper::Eager,
            1 => Temper::Late,
            _ => Temper::Mixed,
        }
    }

    pub fn landing(self, rng: &mut Rng, tick: u64) -> Landing {
        match self {
            Temper::Eager => Landing::Now,
            Temper::Late => Landing::AtWait,
            Temper::Mixed => match rng.below(4) {
                0 => Landing::Now,
                1 => Landing::AtWait,
                _ => Landing::Tick(tick + 1 + rng.below(512)),
            },
        }
    }
}

/// Steps a cluster runs before another gets a turn, at most.
const TURN: u64 = 1 << 16;
/// Clusters that take turns, at most: about what a large device holds.
const MAX_RESIDENT: usize = 160;
/// Host memory that clusters in turn may take before anybody has shown to wait for a later one.
const SOFT_BYTES: usize = 256 << 20;

/// Whose turn it is among clusters that may wait for each other. They start in order, as on a device, but from there
/// on each seed leans one way.
#[derive(Debug)]
pub(crate) struct Turns {
    rng: Rng,
    lean: Lean,
    /// Clusters that may be under way; grows as long as nobody ends, so that who waits for a later one gets it.
    most: usize,
    since_end: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lean {
    /// Long turns, one after another: the first ends first.
    Forward,
    /// Everybody starts, then the last goes first.
    Backward,
    /// Turns of any length, of anybody.
    Mixed,
}

impl Turns {
    pub fn draw(seed: u64, bytes: usize) -> Self {
        let mut rng = Rng::new(seed, u64::MAX);
        let lean = match rng.below(3) {
            0 => Lean::Forward,
            1 => Lean::Backward,
            _ => Lean::Mixed,
        };
        let most = match lean {
            Lean::Forward => MAX_RESIDENT,
            _ => (SOFT_BYTES / bytes.max(1)).clamp(2, MAX_RESIDENT),
        };
        Self {
            rng,
            lean,
            most,
            since_end: 0,
        }
    }

    /// Clusters that may be under way now.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Which of `n` waiting clusters goes next; they stand in the order of their last turns.
    pub fn choose(&mut self, n: usize) -> usize {
        self.since_end += 1;
        if self.since_end > 2 * self.most && self.most < MAX_RESIDENT {
            self.most += 1;
            self.since_end = 0;
        }
        match self.lean {
            Lean::Forward => 0,
            // The last, unless it only waits for others: then everybody gets a turn.
            Lean::Backward if self.since_end <= 1 => n - 1,
            Lean::Backward => 0,
            Lean::Mixed => self.rng.below(n as u64) as usize,
        }
    }

    /// Steps of the turn that begins; `fresh` if it is the cluster's first.
    pub fn length(&mut self, fresh: bool) -> u64 {
        match self.lean {
            Lean::Forward => TURN,
            Lean::Backward if fresh => 1,
            Lean::Backward => TURN,
            Lean::Mixed => 1 << self.rng.below(17),
        }
    }

    /// A cluster came to its end.
    pub fn ended(&mut self) {
        self.since_end = 0;
    }
}
