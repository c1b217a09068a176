//! The seeded choices of a run: the next warp, the length of its turn, and the time at which asynchronous work lands.

/// A small generator (splitmix64). It is seeded by launch seed and block, so results do not depend on host threads.
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

    /// Returns a number below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Time at which an asynchronous operation takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Landing {
    /// At once, when it is issued.
    Now,
    /// After this many scheduler steps, or at its wait.
    Tick(u64),
    /// At its wait.
    AtWait,
}

impl Landing {
    /// Returns true if an operation with this landing is due at `tick`.
    pub fn due(self, tick: u64) -> bool {
        match self {
            Landing::Now => true,
            Landing::Tick(at) => tick >= at,
            Landing::AtWait => false,
        }
    }
}

/// Distribution of the landings of one block. Each block prefers one kind, so that a few seeds cover each extreme.
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

/// Most steps that a cluster runs before another gets a turn.
const TURN: u64 = 1 << 16;
/// Most clusters that take turns, about the number that a large device runs at a time.
const MAX_RESIDENT: usize = 160;
/// Host memory that clusters in turn may use while none is known to wait for a later one, in bytes.
const SOFT_BYTES: usize = 256 << 20;

/// Order of turns among clusters that may wait for each other. They start in order, as on a device; after that each
/// seed prefers one order.
#[derive(Debug)]
pub(crate) struct Turns {
    rng: Rng,
    lean: Lean,
    /// Number of clusters that may run at a time. It grows while none ends, so that a cluster that waits for a later
    /// one gets it.
    most: usize,
    since_end: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lean {
    /// Long turns in order: the first cluster ends first.
    Forward,
    /// All clusters start, then the last one goes first.
    Backward,
    /// Turns of any length, in any order.
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

    /// Returns the number of clusters that may run now.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Chooses the next of `n` waiting clusters, which are in the order of their last turns.
    pub fn choose(&mut self, n: usize) -> usize {
        self.since_end += 1;
        if self.since_end > 2 * self.most && self.most < MAX_RESIDENT {
            self.most += 1;
            self.since_end = 0;
        }
        match self.lean {
            Lean::Forward => 0,
            // The last cluster goes first. If it only waits for others, all get a turn.
            Lean::Backward if self.since_end <= 1 => n - 1,
            Lean::Backward => 0,
            Lean::Mixed => self.rng.below(n as u64) as usize,
        }
    }

    /// Returns the steps of the turn that begins; `fresh` is true for the cluster's first turn.
    pub fn length(&mut self, fresh: bool) -> u64 {
        match self.lean {
            Lean::Forward => TURN,
            Lean::Backward if fresh => 1,
            Lean::Backward => TURN,
            Lean::Mixed => 1 << self.rng.below(17),
        }
    }

    /// Records that a cluster ended.
    pub fn ended(&mut self) {
        self.since_end = 0;
    }
}
