//! Operations across lanes and warps: shuffles, votes, barriers, mbarriers.

use super::types::{Addr, Pred, Slot};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

impl ShflMode {
    /// Executes `shfl.sync`: returns each lane's value from its source lane, and true where the source was in range.
    pub fn shuffle(self, a: &[u64; 32], b: &[u64; 32], c: &[u64; 32], here: u32) -> ([u64; 32], u32) {
        let mut out = *a;
        let mut valid = 0;
        for lane in (0..32).filter(|lane| here >> lane & 1 != 0) {
            let own = lane as i64;
            let by = (b[lane] & 0x1f) as i64;
            let clamp = (c[lane] & 0x1f) as i64;
            let segment = (c[lane] >> 8 & 0x1f) as i64;
            let (max, min) = ((own & segment) | (clamp & !segment), own & segment);
            let (source, fits) = match self {
                ShflMode::Up => (own - by, own - by >= max),
                ShflMode::Down => (own + by, own + by <= max),
                ShflMode::Bfly => (own ^ by, (own ^ by) <= max),
                ShflMode::Idx => {
                    let source = min | (by & !segment);
                    (source, source <= max)
                }
            };
            let source = if fits { source } else { own };
            // A source lane that does not take part leaves the value undefined in PTX; hardware returns its register.
            out[lane] = a[source as usize & 31];
            valid |= u32::from(fits) << lane;
        }
        (out, valid)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReduxOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone)]
pub(crate) enum WarpOp {
    Shfl {
        mode: ShflMode,
        dst: Slot,
        p: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        members: Slot,
    },
    Vote {
        mode: VoteMode,
        /// Value row for ballot, predicate row for the other votes.
        dst: Slot,
        src: Pred,
        members: Slot,
    },
    MatchAny {
        bits: u32,
        dst: Slot,
        a: Slot,
        members: Slot,
    },
    MatchAll {
        bits: u32,
        dst: Slot,
        p: Slot,
        a: Slot,
        members: Slot,
    },
    Redux {
        op: ReduxOp,
        signed: bool,
        dst: Slot,
        a: Slot,
        members: Slot,
    },
    Activemask {
        dst: Slot,
    },
    Elect {
        dst: Slot,
        p: Slot,
        members: Slot,
    },
    Sync {
        members: Slot,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BarrierRed {
    And,
    Or,
    Popc,
}

#[derive(Debug, Clone)]
pub(crate) enum BarrierOp {
    Sync {
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
    },
    Arrive {
        id: Slot,
        count: Slot,
        aligned: bool,
    },
    Red {
        op: BarrierRed,
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
        /// Predicate row, or value row for popc.
        dst: Slot,
        src: Pred,
    },
    ClusterArrive {
        aligned: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    /// `setmaxnreg.inc` and `setmaxnreg.dec`.
    SetMaxReg {
        increase: bool,
        count: u32,
    },
}

/// Phase that a wait is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Phase {
    /// State token returned by an arrival.
    Token(Slot),
    Parity(Slot),
}

#[derive(Debug, Clone)]
pub(crate) enum MbarrierOp {
    Init {
        addr: Addr,
        count: Slot,
    },
    Inval {
        addr: Addr,
    },
    Arrive {
        addr: Addr,
        /// Number of arrivals: a register, or 1.
        count: Option<Slot>,
        /// Number of bytes expected, for `.expect_tx`.
        expect: Option<Slot>,
        drop: bool,
        state: Slot,
    },
    ExpectTx {
        addr: Addr,
        bytes: Slot,
    },
    CompleteTx {
        addr: Addr,
        bytes: Slot,
    },
    Wait {
        addr: Addr,
        phase: Phase,
        done: Slot,
    },
    PendingCount {
        dst: Slot,
        state: Slot,
    },
    /// `cp.async.mbarrier.arrive`
    CpAsyncArrive {
        addr: Addr,
        no_increment: bool,
    },
}
