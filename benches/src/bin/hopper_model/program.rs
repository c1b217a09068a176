//! The instructions of a main loop as the replay reads them: each with its pipe, its latency and the waits that ptxas wrote.

use crate::Failure;

/// Cycles from the issue of an instruction to its result, if no stall count covers it. Assumed.
const LATENCIES: [(&str, u64); 4] = [("MUFU", 20), ("LDS", 30), ("SHFL", 24), ("SYNCS", 20)];

/// Latency of all other instructions that have a scoreboard, in cycles. Assumed.
const OTHER_LATENCY: u64 = 27;

/// Bytes of operands that the tensor cores read from shared memory per cycle.
const SHARED_BYTES: u64 = 128;

/// A pipe of a scheduler. An instruction of a warp occupies it for some cycles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pipe {
    /// Exponentials: 4 lanes a cycle.
    Mufu,
    /// FFMA, FMUL, FADD: 32 lanes a cycle.
    Fma,
    /// Integer multiply-adds: 16 lanes a cycle.
    Imad,
    /// Comparisons, selections, conversions, integers: 16 lanes a cycle.
    Alu,
    /// Shared memory and shuffles.
    Memory,
}

impl Pipe {
    /// Returns the pipe of an opcode and the cycles for which it is occupied; `None` for branches, uniform registers
    /// and barriers.
    fn of(name: &str) -> Option<(Self, u64)> {
        Some(match name {
            "MUFU" => (Self::Mufu, 8),
            "FFMA" | "FMUL" | "FADD" => (Self::Fma, 1),
            "IMAD" => (Self::Imad, 2),
            "FMNMX" | "FSEL" | "FSETP" | "F2FP" | "ISETP" | "LOP3" | "SHF" | "PLOP3" | "IADD3" | "VIADD" | "SEL"
            | "LEA" | "PRMT" | "MOV" | "VIMNMX" | "VIADDMNMX" => (Self::Alu, 2),
            "LDS" | "STS" | "STSM" | "LDSM" | "SHFL" => (Self::Memory, 2),
            _ => return None,
        })
    }
}

/// Special effect of an instruction on the schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// None beyond its pipe and its latency.
    Plain,
    /// A product: cycles on the tensor cores, and true if it ends a group.
    Product(u64, bool),
    /// A wait until at most this many groups are pending.
    Wait(usize),
    /// A wait for the warpgroup's turn.
    TakeTurn,
    /// Passes the turn to the next warpgroup.
    PassTurn,
    /// A numbered barrier: its number, the number of warpgroups, and true if the instruction waits.
    Barrier(u32, usize, bool),
}

/// An instruction of the loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    pub action: Action,
    pub pipe: Option<(Pipe, u64)>,
    pub stall: u64,
    pub latency: u64,
    pub result: Option<usize>,
    pub operands: Option<usize>,
    pub waits: u8,
}

impl Op {
    /// Parses an instruction as `cargo xtask sass` records it: `NAME:ARGUMENTS/stall>result<operands?waits`.
    fn parse(note: &str) -> Option<Self> {
        let (note, waits) = match note.split_once('?') {
            Some((note, mask)) => (note, u8::from_str_radix(mask, 16).ok()?),
            None => (note, 0),
        };
        let scoreboard = |number: &str| number.parse().ok().filter(|&number: &usize| number < 6);
        let (note, operands) = match note.split_once('<') {
            Some((note, number)) => (note, Some(scoreboard(number)?)),
            None => (note, None),
        };
        let (note, result) = match note.split_once('>') {
            Some((note, number)) => (note, Some(scoreboard(number)?)),
            None => (note, None),
        };
        let (name, stall) = note.split_once('/')?;
        let parts: Vec<&str> = name.split(':').collect();
        let groups = |threads: &str| threads.parse().ok().map(|threads: usize| threads / 128);
        let action = match parts[..] {
            ["HGMMA" | "QGMMA", columns, a, ref ends @ ..] => {
                let n: u64 = columns.parse().ok()?;
                let of_a = if a == "ss" { 64 * 32 } else { 0 };
                Action::Product((n / 2).max((of_a + n * 32) / SHARED_BYTES), ends == ["c"])
            }
            ["WAIT", groups] => Action::Wait(groups.parse().ok()?),
            ["SYNC", "turn", _] => Action::TakeTurn,
            ["ARRIVE", "turn", _] => Action::PassTurn,
            ["SYNC", id, threads] => Action::Barrier(u32::from_str_radix(id, 16).ok()?, groups(threads)?, true),
            ["ARRIVE", id, threads] => Action::Barrier(u32::from_str_radix(id, 16).ok()?, groups(threads)?, false),
            [_] => Action::Plain,
            _ => return None,
        };
        let own = LATENCIES.iter().find(|(other, _)| *other == name);
        Some(Self {
            action,
            pipe: Pipe::of(name),
            // An instruction with stall count 0 still takes the cycle of its issue.
            stall: stall.parse::<u64>().ok()?.max(1),
            latency: own.map_or(OTHER_LATENCY, |&(_, cycles)| cycles),
            result,
            operands,
            waits,
        })
    }
}

/// Program of a main loop.
#[derive(Clone, Debug)]
pub struct Program(pub Vec<Op>);

impl Program {
    /// Parses a loop as `cargo xtask sass` records it: instructions separated by blanks, with `n*` before a repeated
    /// one.
    ///
    /// # Errors
    /// If an instruction is malformed.
    pub fn parse(code: &str) -> Result<Self, Failure> {
        let mut ops = Vec::new();
        for repeated in code.split_whitespace() {
            let (times, note) = match repeated.split_once('*') {
                Some((times, note)) => (times.parse()?, note),
                None => (1, repeated),
            };
            let op = Op::parse(note).ok_or_else(|| format!("no instruction: {note}"))?;
            ops.extend(std::iter::repeat_n(op, times));
        }
        Ok(Self(ops))
    }

    /// Returns this loop with tensor cores of twice the speed, which shows the next limit.
    pub fn with_fast_products(&self) -> Self {
        let halved = |op: &Op| {
            let action = match op.action {
                Action::Product(cycles, ends) => Action::Product(cycles / 2, ends),
                ref other => other.clone(),
            };
            Op { action, ..op.clone() }
        };
        Self(self.0.iter().map(halved).collect())
    }

    /// Returns this loop with one exponential of every `period` computed by multiply-adds: a multiple of the logarithm is split off by
    /// an addition and a subtraction, four multiply-adds evaluate a polynomial of degree 4 with an error of 4e-6, and a shift and an
    /// integer addition set the exponent. They are issued one a cycle, as if other elements filled their latencies.
    pub fn with_polynomials(&self, period: usize) -> Self {
        let polynomial = |waits| {
            let pipes = [(Pipe::Fma, 1); 6].into_iter().chain([(Pipe::Alu, 2); 2]);
            pipes.enumerate().map(move |(place, pipe)| Op {
                action: Action::Plain,
                pipe: Some(pipe),
                stall: 1,
                latency: OTHER_LATENCY,
                result: None,
                operands: None,
                waits: if place == 0 { waits } else { 0 },
            })
        };
        let mut exponentials = 0;
        let mut ops = Vec::new();
        for op in &self.0 {
            let is_exponential = matches!(op.pipe, Some((Pipe::Mufu, _)));
            exponentials += usize::from(is_exponential);
            if is_exponential && exponentials.is_multiple_of(period) {
                ops.extend(polynomial(op.waits));
            } else {
                ops.push(op.clone());
            }
        }
        Self(ops)
    }

    /// Returns the cycles for which a step of one warp occupies the tensor cores.
    pub fn tensor_cycles(&self) -> u64 {
        let of = |op: &Op| match op.action {
            Action::Product(cycles, _) => cycles,
            _ => 0,
        };
        self.0.iter().map(of).sum()
    }

    /// Returns the cycles for which a step of one warp occupies a pipe.
    pub fn pipe_cycles(&self, pipe: Pipe) -> u64 {
        let taken = self.0.iter().filter_map(|op| op.pipe);
        taken
            .filter(|&(other, _)| other == pipe)
            .map(|(_, cycles)| cycles)
            .sum()
    }

    /// Returns the number of instructions of a step of one warp.
    pub fn instructions(&self) -> u64 {
        self.0.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_note_is_refused() {
        for note in ["FADD", "FADD/x", "FADD/1>6", "HGMMA:x:ss/1", "FADD:1/1", "SYNC:turn/1"] {
            assert!(Program::parse(note).is_err(), "{note}");
        }
    }
}
