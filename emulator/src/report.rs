//! Results of a launch: a bounded list of findings, and counters.

use std::collections::HashMap;
use std::fmt;

use crate::counters::Counters;

/// Kind of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// An access outside of every allocation, or outside of the shared, local or parameter memory.
    OutOfBounds,
    /// An address that is not a multiple of the alignment that the instruction needs.
    Misaligned,
    /// An access to memory that was freed, or to the shared memory of a block that has ended.
    UseAfterFree,
    /// A branch, an address, an operand or a stored result that depends on bytes that were never written.
    Uninitialized,
    /// Two accesses to shared memory that are not ordered.
    SharedRace,
    /// Accesses of two blocks to global memory that are not ordered.
    GlobalRace,
    /// Data written through the generic proxy and used by the async proxy without `fence.proxy.async`.
    MissingProxyFence,
    /// An access to a register or memory of an asynchronous operation before its wait.
    UnawaitedAsync,
    /// Threads that had to arrive together at a barrier did not.
    BarrierDivergence,
    /// No thread can continue.
    Deadlock,
    /// An mbarrier used against its rules.
    Mbarrier,
    /// A limit of the device or of the launch was exceeded.
    Limit,
    /// An operand for which the instruction is not defined.
    InvalidOperand,
}

impl FindingKind {
    /// Returns the short name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::OutOfBounds => "out of bounds",
            FindingKind::Misaligned => "misaligned",
            FindingKind::UseAfterFree => "use after free",
            FindingKind::Uninitialized => "uninitialised value",
            FindingKind::SharedRace => "shared-memory race",
            FindingKind::GlobalRace => "global-memory race",
            FindingKind::MissingProxyFence => "missing proxy fence",
            FindingKind::UnawaitedAsync => "unawaited async operation",
            FindingKind::BarrierDivergence => "barrier divergence",
            FindingKind::Deadlock => "deadlock",
            FindingKind::Mbarrier => "mbarrier misuse",
            FindingKind::Limit => "limit exceeded",
            FindingKind::InvalidOperand => "invalid operand",
        }
    }
}

/// A fault and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Kind of finding.
    pub kind: FindingKind,
    /// Name of the module's file.
    pub file: String,
    /// Line of the instruction.
    pub line: u32,
    /// Text of the line, trimmed.
    pub text: String,
    /// Block coordinates.
    pub block: [u32; 3],
    /// Warp within the block.
    pub warp: u32,
    /// Lane within the warp, if one lane is at fault.
    pub lane: Option<u32>,
    /// Address in its state space.
    pub address: Option<u64>,
    /// Description of the fault, including the earlier access of a conflict.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "{}: {}:{}: {}", self.kind.name(), self.file, self.line, self.message)?;
        write!(f, "\n    block {x},{y},{z} warp {}", self.warp)?;
        if let Some(lane) = self.lane {
            write!(f, " lane {lane}")?;
        }
        if let Some(address) = self.address {
            write!(f, " address {address:#x}")?;
        }
        write!(f, "\n    {}", self.text)
    }
}

/// Results of a launch that ran to its end.
#[derive(Debug, Clone)]
pub struct Report {
    /// The first findings, in order of block; see [`Options::max_findings`](crate::Options).
    pub findings: Vec<Finding>,
    /// Number of all findings, including those not kept.
    pub total_findings: u64,
    /// Counters of instructions executed and bytes moved.
    pub counters: Counters,
}

impl Report {
    /// Returns true if no check found anything.
    pub fn is_clean(&self) -> bool {
        self.total_findings == 0
    }
}

/// Number of findings of one kind at one line that are kept, so that one loop does not displace the others.
const PER_LINE: u32 = 4;

/// A bounded list of findings.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub kept: Vec<Finding>,
    pub total: u64,
    max: usize,
    seen: HashMap<(FindingKind, u32), u32>,
}

impl Findings {
    pub fn new(max: usize) -> Self {
        Self { max, ..Self::default() }
    }

    /// Counts a finding, and keeps the one that `make` returns if there is room.
    pub fn add(&mut self, kind: FindingKind, line: u32, make: impl FnOnce() -> Finding) {
        self.total += 1;
        if self.kept.len() >= self.max {
            return;
        }
        let seen = self.seen.entry((kind, line)).or_insert(0);
        *seen += 1;
        if *seen <= PER_LINE {
            self.kept.push(make());
        }
    }

    /// Appends the findings of a later block.
    pub fn merge(&mut self, other: Findings) {
        let kept = other.kept.len() as u64;
        self.total += other.total - kept;
        for finding in other.kept {
            let (kind, line) = (finding.kind, finding.line);
            self.add(kind, line, || finding);
        }
    }
}
