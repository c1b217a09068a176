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
    /// As it is issued.
    Now,
    /// When this many scheduler steps have passed, or at its wait.
    Tick(u64),
    /// When it is waited for.
    AtWait,
}

impl Landing {
    /// Whether an operation with this landing is due at `tick`.
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
