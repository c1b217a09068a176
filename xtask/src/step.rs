//! Counts and records of one step of a main loop.

use crate::machine_code::{Instruction, Loop};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Class of an instruction, by its effect or its pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Class {
    /// HMMA, HGMMA, QGMMA.
    Tensor,
    /// MUFU.EX2.
    Exp2,
    /// MUFU of any other function.
    Mufu,
    Ffma,
    Fmul,
    Fadd,
    Fmnmx,
    /// FSEL, FSETP.
    Fsel,
    /// F2FP: two f32 to a pair of f16 or bf16.
    F2fp,
    Shfl,
    Stsm,
    Sts,
    Ldsm,
    Lds,
    /// LDGSTS, LDG and waits for them: copies from device memory by threads.
    Copy,
    /// Waits for, and arrivals at, barriers in shared memory.
    Syncs,
    /// Named barriers.
    Bar,
    /// WARPGROUP.ARRIVE and waits for products.
    Warpgroup,
    /// FENCE, MEMBAR.
    Fence,
    /// LDL, STL: spilled registers.
    Local,
    R2ur,
    /// Instructions on uniform registers.
    Uniform,
    /// Branches, convergence instructions and NOP.
    Branch,
    /// Integers, moves, predicates and special registers.
    Integer,
}

impl Class {
    /// All classes with their titles in tables.
    pub const TITLES: &[(Self, &str)] = &[
        (Self::Tensor, "HGMMA"),
        (Self::Exp2, "MUFU.EX2"),
        (Self::Mufu, "other MUFU"),
        (Self::Ffma, "FFMA"),
        (Self::Fmul, "FMUL"),
        (Self::Fadd, "FADD"),
        (Self::Fmnmx, "FMNMX"),
        (Self::Fsel, "FSEL, FSETP"),
        (Self::F2fp, "F2FP"),
        (Self::Shfl, "SHFL"),
        (Self::Stsm, "STSM"),
        (Self::Sts, "STS"),
        (Self::Ldsm, "LDSM"),
        (Self::Lds, "LDS"),
        (Self::Copy, "LDGSTS, LDG"),
        (Self::Syncs, "SYNCS"),
        (Self::Bar, "BAR"),
        (Self::Warpgroup, "WARPGROUP.*"),
        (Self::Fence, "FENCE, MEMBAR"),
        (Self::Local, "LDL, STL: spills"),
        (Self::R2ur, "R2UR"),
        (Self::Uniform, "uniform datapath"),
        (Self::Branch, "branches, NOP"),
        (Self::Integer, "integer, MOV, LDC, S2R"),
    ];

    fn of(instruction: &Instruction) -> Self {
        match instruction.name() {
            _ if instruction.is_tensor() => Self::Tensor,
            "MUFU" if instruction.opcode() == "MUFU.EX2" => Self::Exp2,
            "MUFU" => Self::Mufu,
            "FFMA" => Self::Ffma,
            "FMUL" => Self::Fmul,
            "FADD" => Self::Fadd,
            "FMNMX" => Self::Fmnmx,
            "FSEL" | "FSETP" => Self::Fsel,
            "F2FP" => Self::F2fp,
            "SHFL" => Self::Shfl,
            "STSM" => Self::Stsm,
            "STS" => Self::Sts,
            "LDSM" => Self::Ldsm,
            "LDS" => Self::Lds,
            "LDGSTS" | "LDG" | "LDGDEPBAR" | "DEPBAR" => Self::Copy,
            "SYNCS" => Self::Syncs,
            "BAR" => Self::Bar,
            "WARPGROUP" => Self::Warpgroup,
            "FENCE" | "MEMBAR" => Self::Fence,
            "LDL" | "STL" => Self::Local,
            "R2UR" => Self::R2ur,
            "BRA" | "NOP" | "BSSY" | "BSYNC" | "CALL" | "EXIT" | "WARPSYNC" | "YIELD" => Self::Branch,
            name if name.starts_with('U') => Self::Uniform,
            _ => Self::Integer,
        }
    }
}

/// Counts of the instructions that one warp issues in a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Number of all instructions.
    pub instructions: u32,
    /// Sum of the stall counts of ptxas, in cycles: the least time in which one warp issues its step.
    pub stalls: u32,
    /// Number of instructions by class; a class without an entry has none.
    pub classes: BTreeMap<Class, u32>,
    /// Number of exponentials before the first wait for products, between that and the next, and so on up to the
    /// backward branch.
    pub exponentials_between_waits: Vec<u32>,
}

impl Step {
    /// Counts the instructions of one path through a loop.
    pub fn of(way: &[Instruction]) -> Self {
        let mut classes = BTreeMap::new();
        let mut exponentials = vec![0];
        for instruction in way {
            let class = Class::of(instruction);
            *classes.entry(class).or_default() += 1;
            if class == Class::Exp2 {
                *exponentials.last_mut().expect("one at least") += 1;
            }
            if instruction.opcode() == "WARPGROUP.DEPBAR.LE" {
                exponentials.push(0);
            }
        }
        Self {
            instructions: way.len() as u32,
            stalls: way.iter().map(|instruction| u32::from(instruction.stall)).sum(),
            classes,
            exponentials_between_waits: exponentials,
        }
    }

    /// Returns the number of instructions of a class.
    pub fn count(&self, class: Class) -> u32 {
        self.classes.get(&class).copied().unwrap_or(0)
    }

    /// Returns the number of instructions other than tensor-core products.
    pub fn others(&self) -> u32 {
        self.instructions - self.count(Class::Tensor)
    }
}

/// Record of a loop.
#[derive(Serialize)]
pub struct Recorded {
    /// The shortest path: no mask, no exceptions.
    pub step: Step,
    /// The longest path: with the mask, if it is in the loop, and with exceptions.
    pub longest: Longest,
    /// The shortest path in the notation of [`code`]; empty if it is not replayed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub code: String,
}

/// Counts of the longest path through a loop.
#[derive(Serialize)]
pub struct Longest {
    /// Number of all instructions.
    pub instructions: u32,
    /// Sum of stall counts, in cycles.
    pub stalls: u32,
    /// Number of loads and stores of spilled registers.
    pub local: u32,
}

impl Recorded {
    /// Counts a loop, and with `replayed` also records its code.
    pub fn of(found: &Loop, replayed: bool) -> Self {
        let longest = Step::of(&found.longest);
        Self {
            step: Step::of(&found.leanest),
            longest: Longest {
                instructions: longest.instructions,
                stalls: longest.stalls,
                local: longest.count(Class::Local),
            },
            code: if replayed { code(&found.leanest) } else { String::new() },
        }
    }
}

/// Writes instructions in the notation that `hopper_model` replays, separated by blanks.
///
/// Each is `NAME/stall`, followed by `>s` if scoreboard `s` is held until the result is available, `<s` if it is held
/// until the operands have been read, and `?m` if the instruction waits for the scoreboards of the hexadecimal mask
/// `m`. A prefix `n*` repeats it. Names are opcodes without modifiers, with these exceptions:
///
/// - `HGMMA:n:ss` or `:rs`: a product of 64 x n with A in shared memory or in registers; `:c` is added if it ends a
///   group.
/// - `WAIT:n`: a wait until at most n groups are pending.
/// - `SYNC:b:t` and `ARRIVE:b:t`: named barrier b of t threads. b is `turn` if a register holds it; t is 0 for all
///   threads.
pub fn code(way: &[Instruction]) -> String {
    let notes: Vec<String> = way.iter().map(note).collect();
    let runs = notes.chunk_by(|a, b| a == b).map(|same| match same.len() {
        1 => same[0].clone(),
        times => format!("{times}*{}", same[0]),
    });
    runs.collect::<Vec<_>>().join(" ")
}

fn note(instruction: &Instruction) -> String {
    let opcode = instruction.opcode();
    let operands: Vec<&str> = instruction
        .text
        .strip_prefix(opcode)
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .collect();
    let number = |operand: Option<&&str>| {
        let digits = operand.and_then(|operand| operand.strip_prefix("0x"));
        digits
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .unwrap_or(0)
    };
    let barrier = |name: &str| {
        let id = operands[0].strip_prefix("0x").unwrap_or("turn");
        format!("{name}:{id}:{}", number(operands.get(1)))
    };
    let mut note = match instruction.name() {
        name @ ("HGMMA" | "QGMMA") => {
            let columns = opcode.split('x').nth(1).unwrap_or_default();
            let is_shared = operands.get(1).is_some_and(|a| a.starts_with("gdesc"));
            let a = if is_shared { "ss" } else { "rs" };
            let ends = if operands.contains(&"gsb0") { ":c" } else { "" };
            format!("{name}:{columns}:{a}{ends}")
        }
        "WARPGROUP" if opcode == "WARPGROUP.DEPBAR.LE" => format!("WAIT:{}", number(operands.get(1))),
        "BAR" if opcode.starts_with("BAR.SYNC") => barrier("SYNC"),
        "BAR" if opcode.starts_with("BAR.ARV") => barrier("ARRIVE"),
        name => name.to_owned(),
    };
    let _ = write!(note, "/{}", instruction.stall);
    if let Some(scoreboard) = instruction.result {
        let _ = write!(note, ">{scoreboard}");
    }
    if let Some(scoreboard) = instruction.operands {
        let _ = write!(note, "<{scoreboard}");
    }
    if instruction.waits != 0 {
        let _ = write!(note, "?{:x}", instruction.waits);
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(lines: &[(&str, u8, Option<u8>, u8)]) -> Vec<Instruction> {
        let instruction = |&(text, stall, result, waits): &(&str, u8, Option<u8>, u8)| {
            let mut instruction = Instruction::unscheduled(text);
            (instruction.stall, instruction.result, instruction.waits) = (stall, result, waits);
            instruction
        };
        lines.iter().map(instruction).collect()
    }

    #[test]
    fn a_step_is_counted() {
        let step = Step::of(&way(&[
            ("HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0", 1, None, 0),
            ("MUFU.EX2 R1, R1", 8, Some(3), 0),
            ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 2, None, 0),
            ("MUFU.EX2 R2, R2", 8, Some(3), 0),
            ("MUFU.EX2 R3, R3", 8, Some(3), 0),
            ("MUFU.RCP R4, R4", 8, Some(3), 0),
            ("UIADD3 UR4, UR4, 0x1, URZ", 1, None, 0),
        ]));
        assert_eq!((step.instructions, step.stalls, step.others()), (7, 36, 6));
        assert_eq!(step.exponentials_between_waits, [1, 2]);
        let classes = [Class::Exp2, Class::Mufu, Class::Uniform, Class::Warpgroup, Class::Local];
        assert_eq!(classes.map(|class| step.count(class)), [3, 1, 1, 1, 0]);
    }

    #[test]
    fn code_keeps_what_a_replay_needs() {
        let text = code(&way(&[
            ("BAR.SYNC.DEFER_BLOCKING R8, 0x100", 1, None, 0),
            ("HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT", 1, None, 0),
            ("HGMMA.64x64x16.F32 R88, R120, gdesc[UR8].tnspB, R88, gsb0", 1, None, 0),
            ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 2, None, 0),
            ("FADD R1, R2, R3", 4, None, 0),
            ("FADD R1, R1, R3", 4, None, 0),
            ("MUFU.EX2 R1, R1", 8, Some(3), 0x24),
            ("BAR.SYNC.DEFER_BLOCKING 0x3, 0x100", 6, None, 0),
            ("BAR.ARV R5, 0x100", 6, None, 0),
        ]));
        assert_eq!(
            text,
            "SYNC:turn:256/1 HGMMA:128:ss/1 HGMMA:64:rs:c/1 WAIT:1/2 2*FADD/4 MUFU/8>3?24 SYNC:3:256/6 ARRIVE:turn:256/6"
        );
    }
}
