//! Machine code in the output of `nvdisasm -c -hex`: instructions, the scheduling fields that ptxas wrote for each,
//! and the loops with tensor-core products.

use crate::Outcome;
use std::collections::HashMap;
use std::ops::RangeInclusive;

/// An instruction of 128 bits. Bits 41 to 57 of its second word are the scheduling fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Opcode and operands, without the guard.
    pub text: String,
    /// True for an instruction with a guard, such as `@!P0`.
    pub guarded: bool,
    /// Stall count: least number of cycles before the warp's next instruction.
    pub stall: u8,
    /// Scoreboard that is held until the result is available.
    pub result: Option<u8>,
    /// Scoreboard that is held until the operands have been read.
    pub operands: Option<u8>,
    /// Mask of the scoreboards that must be free before this instruction is issued.
    pub waits: u8,
    /// Index of the target of a branch.
    target: Option<usize>,
}

impl Instruction {
    /// Returns the opcode with its modifiers: `FADD`, `HGMMA.64x128x16.F32`.
    pub fn opcode(&self) -> &str {
        self.text.split(' ').next().unwrap_or_default()
    }

    /// Returns the opcode without modifiers.
    pub fn name(&self) -> &str {
        self.opcode().split('.').next().unwrap_or_default()
    }

    /// Returns true for a tensor-core product.
    pub fn is_tensor(&self) -> bool {
        matches!(self.name(), "HMMA" | "HGMMA" | "QGMMA")
    }

    fn decode(text: &str, control: u64) -> Self {
        let (guarded, text) = match text.strip_prefix('@').and_then(|guarded| guarded.split_once(' ')) {
            Some((_, text)) => (true, text.trim_start()),
            None => (false, text),
        };
        let bits = |first: u32, count: u32| (control >> first & ((1 << count) - 1)) as u8;
        let scoreboard = |number: u8| (number < 6).then_some(number);
        Self {
            text: text.to_owned(),
            guarded,
            stall: bits(41, 4),
            result: scoreboard(bits(46, 3)),
            operands: scoreboard(bits(49, 3)),
            waits: bits(52, 6),
            target: None,
        }
    }

    /// Makes an instruction that waits for nothing and takes no cycle.
    #[cfg(test)]
    pub fn unscheduled(text: &str) -> Self {
        Self::decode(text, 7 << 46 | 7 << 49)
    }

    /// Returns true for a branch that may fall through: it has a guard, or an operand beside its target.
    fn is_conditional(&self) -> bool {
        let operands = self.text.strip_prefix(self.opcode()).unwrap_or_default();
        self.guarded || !operands.trim_start().starts_with('`')
    }
}

/// A loop with tensor-core products and no inner loop that has any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    /// Path that skips as much as possible: a step without mask and exceptions.
    pub leanest: Vec<Instruction>,
    /// Path that skips as little as possible.
    pub longest: Vec<Instruction>,
}

impl Loop {
    /// Returns the number of tensor instructions of a step.
    pub fn products(&self) -> usize {
        products(&self.leanest)
    }
}

fn products(way: &[Instruction]) -> usize {
    way.iter().filter(|instruction| instruction.is_tensor()).count()
}

/// Instructions of a kernel, in the order of their addresses.
pub struct Listing(Vec<Instruction>);

impl Listing {
    /// Parses the output of `nvdisasm -c -hex`.
    pub fn parse(code: &str) -> Outcome<Self> {
        let (mut instructions, mut names) = (Vec::new(), Vec::new());
        let mut labels = HashMap::new();
        let mut lines = code.lines();
        while let Some(line) = lines.next() {
            if let Some(name) = line.strip_prefix(".L_x_").and_then(|rest| rest.strip_suffix(':')) {
                labels.insert(name, instructions.len());
            }
            let Some(rest) = after_address(line) else { continue };
            let text = text_of(rest).ok_or_else(|| format!("nvdisasm printed no instruction: {line}"))?;
            let control = lines.next().and_then(last_word);
            let control = control.ok_or_else(|| format!("nvdisasm printed no second word of '{text}'"))?;
            instructions.push(Instruction::decode(text, control));
            names.push(text.split_once("`(.L_x_").and_then(|(_, rest)| rest.split(')').next()));
        }
        for (instruction, name) in instructions.iter_mut().zip(names) {
            instruction.target = name.and_then(|name| labels.get(name).copied());
        }
        Ok(Self(instructions))
    }

    /// Returns the number of tensor instructions of the whole kernel.
    pub fn products(&self) -> usize {
        products(&self.0)
    }

    /// Returns the innermost loops with tensor instructions, those with the fewest other instructions first.
    ///
    /// A loop extends from the target of a backward branch to that branch. ptxas may move the rare part of a wait
    /// behind the end of the kernel. The branch back from there is no loop: the span from its target to it starts
    /// inside another loop and ends outside.
    pub fn tensor_loops(&self) -> Vec<Loop> {
        let back = |(at, branch): (usize, &Instruction)| {
            let start = branch.target.filter(|&start| branch.name() == "BRA" && start <= at)?;
            (products(&self.0[start..=at]) > 0).then_some(start..=at)
        };
        let all: Vec<_> = self.0.iter().enumerate().filter_map(back).collect();
        let inside = |at: usize, range: &RangeInclusive<usize>| range.contains(&at);
        let is_loop = |body: &&RangeInclusive<usize>| {
            all.iter().filter(|other| other != body).all(|other| {
                let returns =
                    other.start() < body.start() && inside(*body.start(), other) && !inside(*body.end(), other);
                let encloses = inside(*other.start(), body) && inside(*other.end(), body);
                !returns && !encloses
            })
        };
        let mut loops: Vec<Loop> = all
            .iter()
            .filter(is_loop)
            .filter_map(|body| {
                let way = |leanest| self.way(body.clone(), leanest);
                Some(Loop {
                    leanest: way(true)?,
                    longest: way(false)?,
                })
            })
            .collect();
        let ratio = |body: &Loop| body.leanest.len() as f64 / body.products() as f64;
        loops.sort_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        loops
    }

    /// Returns the path through a loop with the most products, and among those paths with the fewest or the most
    /// other instructions.
    fn way(&self, body: RangeInclusive<usize>, leanest: bool) -> Option<Vec<Instruction>> {
        let (first, last) = body.into_inner();
        // For each instruction, the best path to the backward branch: products, instructions, and the next
        // instruction.
        let mut ways: Vec<Option<(usize, usize, usize)>> = vec![None; last - first + 1];
        ways[last - first] = Some((0, 1, last + 1));
        for at in (first..last).rev() {
            let instruction = &self.0[at];
            let is_branch = instruction.name() == "BRA";
            let jump = instruction
                .target
                .filter(|target| is_branch && (at + 1..=last).contains(target));
            let next = (!is_branch || instruction.is_conditional()).then_some(at + 1);
            let of = |next: usize| ways[next - first].map(|(products, length, _)| (products, length, next));
            let better = |a: (usize, usize, usize), b: (usize, usize, usize)| {
                let second = match a.0 == b.0 {
                    true => (b.1 < a.1) == leanest,
                    false => b.0 > a.0,
                };
                if second { b } else { a }
            };
            let best = next.into_iter().chain(jump).filter_map(of).reduce(better);
            let is_tensor = usize::from(instruction.is_tensor());
            ways[at - first] = best.map(|(products, length, next)| (products + is_tensor, length + 1, next));
        }
        let mut way = Vec::new();
        let mut at = first;
        while at <= last {
            way.push(self.0[at].clone());
            at = ways[at - first]?.2;
        }
        Some(way)
    }
}

/// Returns the part of a line after its address: `/*0010*/  @P0 FADD R1, R1, R2 ;  /* 0x… */`.
fn after_address(line: &str) -> Option<&str> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    let is_address = !address.is_empty() && address.chars().all(|c| c.is_ascii_hexdigit());
    is_address.then_some(rest)
}

/// Returns the text of an instruction, without its first word and without a note such as `(*"SpillRefill"*)`.
fn text_of(rest: &str) -> Option<&str> {
    let (text, _) = rest.rsplit_once("/*")?;
    let text = text.trim().strip_suffix(';')?;
    Some(text.split("(*").next().unwrap_or_default().trim())
}

/// Returns the word in the comment at the end of a line.
fn last_word(line: &str) -> Option<u64> {
    let word = line.trim_end().strip_suffix("*/")?.rsplit("/*").next()?.trim();
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a listing of `lines`: each is a label, or an instruction of 2 cycles without scoreboards.
    fn listing(lines: &[&str]) -> Listing {
        let control: u64 = 2 << 41 | 7 << 46 | 7 << 49;
        let print = |line: &&str| match line.ends_with(':') {
            true => format!("{line}\n"),
            false => format!("        /*0010*/   {line} ;   /* 0x0000000000000000 */\n   /* {control:#018x} */\n"),
        };
        Listing::parse(&lines.iter().map(print).collect::<String>()).expect("a listing")
    }

    fn names(way: &[Instruction]) -> Vec<&str> {
        way.iter().map(Instruction::name).collect()
    }

    #[test]
    fn control_words_of_ptxas_are_decoded() {
        // From the forward kernel of head_dim 64, ptxas 13.5.37.
        let code = "
.L_x_74:
        /*3550*/                   SHFL.BFLY PT, R153, R152, 0x1, 0x1f ;   /* 0x0c201f0098997f89 */
                                                                           /* 0x000e6400000e0000 */
        /*3560*/              @!P1 BRA `(.L_x_74) ;                        /* 0x0000000000009947 */
                                                                           /* 0x004fea0003800000 */
";
        let Listing(code) = Listing::parse(code).expect("a listing");
        let scheduled = |it: &Instruction| (it.stall, it.result, it.operands, it.waits);
        assert_eq!((code[0].opcode(), code[0].name()), ("SHFL.BFLY", "SHFL"));
        assert_eq!(scheduled(&code[0]), (2, Some(1), None, 0));
        assert_eq!((code[1].guarded, code[1].target), (true, Some(0)));
        assert_eq!(scheduled(&code[1]), (5, None, None, 4));
        let spilled =
            "/*45c0*/ LDL.64 R228, [R1]  (*\"SpillRefill\"*); /* 0x0000000001e47983 */\n/* 0x004fea0003800000 */";
        let Listing(code) = Listing::parse(spilled).expect("a listing");
        assert_eq!((code[0].text.as_str(), code[0].name()), ("LDL.64 R228, [R1]", "LDL"));
        for broken in ["/*0000*/ NOP ; /* 0x0 */\nno word", "/*0000*/ NOP\n/* 0x0 */"] {
            assert!(Listing::parse(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn innermost_loops_with_products_are_found() {
        let found = listing(&[
            ".L_x_0:",
            "HGMMA.64x128x16.F32 R24, gdesc[UR4], !UPT",
            ".L_x_1:",
            "HGMMA.64x128x16.F32 R24, R4, gdesc[UR8], R24",
            "@!P0 BRA `(.L_x_5)",
            ".L_x_4:",
            "FFMA R1, R2, R3, R4",
            "@P1 BRA `(.L_x_1)",
            ".L_x_3:",
            "NOP",
            "@P2 BRA `(.L_x_3)",
            "@P3 BRA `(.L_x_0)",
            "EXIT",
            // The rare part of a wait.
            ".L_x_5:",
            "BRA `(.L_x_4)",
        ])
        .tensor_loops();
        assert_eq!(found.len(), 1);
        assert_eq!(names(&found[0].leanest), ["HGMMA", "BRA", "FFMA", "BRA"]);
        assert_eq!(found[0].leanest, found[0].longest);
        assert_eq!(listing(&[]).tensor_loops(), []);
    }

    #[test]
    fn a_way_leaves_out_what_a_branch_jumps_over() {
        let loops = listing(&[
            ".L_x_0:",
            "HMMA.16816.F32 R4, R8, R12, R4",
            "@P0 BRA `(.L_x_1)",
            "LDG.E.U16 R1, [R2.64]",
            "STS.U16 [R3], R1",
            "BRA `(.L_x_2)",
            ".L_x_1:",
            "LDGSTS.E.128 [R3], [R2.64]",
            ".L_x_2:",
            "BRA `(.L_x_0)",
        ])
        .tensor_loops();
        assert_eq!(names(&loops[0].leanest), ["HMMA", "BRA", "LDGSTS", "BRA"]);
        assert_eq!(names(&loops[0].longest), ["HMMA", "BRA", "LDG", "STS", "BRA", "BRA"]);
        // Products are never skipped, however long the path to them.
        let loops = listing(&[
            ".L_x_0:",
            "@P0 BRA `(.L_x_1)",
            "HMMA.16816.F32 R4, R8, R12, R4",
            "NOP",
            ".L_x_1:",
            "BRA `(.L_x_0)",
        ])
        .tensor_loops();
        assert_eq!(names(&loops[0].leanest), ["BRA", "HMMA", "NOP", "BRA"]);
    }
}
