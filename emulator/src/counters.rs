//! Counters of a launch, like those of a profiler: instructions executed and bytes moved.
//!
//! Instructions are counted by index while the kernel runs and summed by opcode at the end, so counting costs two
//! additions an instruction. Memory is counted at each access.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// Number of executions of one opcode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpcodeCount {
    /// Number of times a warp issued it.
    pub warp: u64,
    /// Number of lanes that executed it, without predicated-off lanes.
    pub thread: u64,
}

/// Totals over all blocks of a launch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Executions by opcode with its modifiers.
    pub opcodes: BTreeMap<String, OpcodeCount>,
    /// Number of instructions that warps issued.
    pub warp_instructions: u64,
    /// Number of instructions that lanes executed.
    pub thread_instructions: u64,
    /// Floating-point operations outside the tensor cores; an fma counts two.
    pub flops: u64,
    /// Floating-point and integer operations of tensor-core instructions.
    pub tensor_flops: u64,
    /// Bytes of global memory that loads and copies request.
    pub global_read_bytes: u64,
    /// Bytes of global memory that stores and copies wrote.
    pub global_written_bytes: u64,
    /// 32-byte sectors that reads touched, counted for each instruction of a warp.
    pub global_read_sectors: u64,
    /// 32-byte sectors that writes touched, counted for each instruction of a warp.
    pub global_written_sectors: u64,
    /// Bytes of shared memory read.
    pub shared_read_bytes: u64,
    /// Bytes of shared memory written.
    pub shared_written_bytes: u64,
    /// Shared-memory wavefronts: one for each access of a warp, more with bank conflicts.
    pub shared_wavefronts: u64,
    /// Shared-memory wavefronts beyond those needed without bank conflicts.
    pub shared_bank_conflicts: u64,
    /// Atomic operations of lanes, including `red`.
    pub atomics: u64,
    /// Number of arrivals of warps at block or cluster barriers.
    pub barrier_waits: u64,
}

impl Counters {
    /// Adds the counts of another launch (or block), opcode by opcode.
    pub fn add(&mut self, other: &Counters) {
        for (name, count) in &other.opcodes {
            let mine = self.opcodes.entry(name.clone()).or_default();
            mine.warp += count.warp;
            mine.thread += count.thread;
        }
        for ((_, mine), (_, theirs)) in self.scalars_mut().into_iter().zip(other.scalars()) {
            *mine += theirs;
        }
    }

    fn scalars_mut(&mut self) -> [(&'static str, &mut u64); 14] {
        [
            ("warp_instructions", &mut self.warp_instructions),
            ("thread_instructions", &mut self.thread_instructions),
            ("flops", &mut self.flops),
            ("tensor_flops", &mut self.tensor_flops),
            ("global_read_bytes", &mut self.global_read_bytes),
            ("global_written_bytes", &mut self.global_written_bytes),
            ("global_read_sectors", &mut self.global_read_sectors),
            ("global_written_sectors", &mut self.global_written_sectors),
            ("shared_read_bytes", &mut self.shared_read_bytes),
            ("shared_written_bytes", &mut self.shared_written_bytes),
            ("shared_wavefronts", &mut self.shared_wavefronts),
            ("shared_bank_conflicts", &mut self.shared_bank_conflicts),
            ("atomics", &mut self.atomics),
            ("barrier_waits", &mut self.barrier_waits),
        ]
    }

    /// Lists all totals with their names, without opcodes.
    pub fn scalars(&self) -> Vec<(&'static str, u64)> {
        let mut copy = Counters {
            opcodes: BTreeMap::new(),
            ..*self
        };
        copy.scalars_mut().map(|(name, value)| (name, *value)).into()
    }

    /// Formats the counters as a JSON document.
    pub fn to_json(&self) -> String {
        let mut out = String::from("{\n");
        for (name, value) in self.scalars() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "  \"{name}\": {value},");
        }
        out.push_str("  \"opcodes\": {");
        for (index, (name, count)) in self.opcodes.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(
                out,
                "{comma}\n    \"{name}\": {{\"warp\": {}, \"thread\": {}}}",
                count.warp, count.thread
            );
        }
        out.push_str("\n  }\n}");
        out
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.scalars() {
            writeln!(f, "{:<24} {value:>16}", name.replace('_', " "))?;
        }
        writeln!(f, "\n{:<56} {:>14} {:>16}", "opcode", "warp", "thread")?;
        let mut opcodes: Vec<_> = self.opcodes.iter().collect();
        opcodes.sort_by_key(|(name, count)| (std::cmp::Reverse(count.warp), (*name).clone()));
        for (name, count) in opcodes {
            writeln!(f, "{name:<56} {:>14} {:>16}", count.warp, count.thread)?;
        }
        Ok(())
    }
}

/// Counts the 32-byte sectors that a warp's accesses of `bytes` bytes each touch.
pub(crate) fn sectors(addresses: &[u64], bytes: u64) -> u64 {
    let mut list = [0u64; 64];
    let mut n = 0;
    let mut sorted = true;
    for address in addresses {
        let (first, last) = (address / 32, (address + bytes - 1) / 32);
        for sector in first..=last {
            if n > 0 && list[n - 1] == sector {
                continue;
            }
            sorted &= n == 0 || list[n - 1] < sector;
            if n < list.len() {
                list[n] = sector;
                n += 1;
            }
        }
    }
    if sorted {
        return n as u64;
    }
    let list = &mut list[..n];
    list.sort_unstable();
    1 + list.windows(2).filter(|w| w[0] != w[1]).count() as u64
}

/// Counts the wavefronts through the 32 banks that a warp's accesses need, and those needed without conflicts. Wide
/// accesses are served in groups of lanes that read or write 128 bytes together.
pub(crate) fn wavefronts(addresses: &[u64], bytes: u64) -> (u64, u64) {
    let group = (128 / bytes.clamp(4, 128)) as usize;
    let (mut total, mut least) = (0, 0);
    for lanes in addresses.chunks(group) {
        let mut words = [0u64; 64];
        let mut n = 0;
        for address in lanes {
            for word in address / 4..=(address + bytes - 1) / 4 {
                if n < words.len() && (n == 0 || words[n - 1] != word) {
                    words[n] = word;
                    n += 1;
                }
            }
        }
        let words = &mut words[..n];
        if !words.is_sorted() {
            words.sort_unstable();
        }
        let mut banks = [0u8; 32];
        let (mut most, mut distinct, mut previous) = (0, 0, None);
        for word in words.iter() {
            if previous == Some(*word) {
                continue;
            }
            previous = Some(*word);
            distinct += 1;
            let bank = &mut banks[(*word % 32) as usize];
            *bank += 1;
            most = most.max(*bank);
        }
        total += u64::from(most);
        least += u64::div_ceil(distinct, 32).min(u64::from(most));
    }
    (total, least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_of_a_coalesced_and_a_strided_warp() {
        let dense: Vec<u64> = (0..32).map(|l| l * 4).collect();
        assert_eq!(sectors(&dense, 4), 4);
        let strided: Vec<u64> = (0..32).rev().map(|l| l * 128).collect();
        assert_eq!(sectors(&strided, 4), 32);
        assert_eq!(sectors(&[64; 32], 4), 1);
        assert_eq!(sectors(&[30], 4), 2);
    }

    #[test]
    fn wavefronts_count_bank_conflicts() {
        let dense: Vec<u64> = (0..32).map(|l| l * 4).collect();
        assert_eq!(wavefronts(&dense, 4), (1, 1));
        let column: Vec<u64> = (0..32).map(|l| l * 128).collect();
        assert_eq!(wavefronts(&column, 4), (32, 1));
        let wide: Vec<u64> = (0..32).map(|l| l * 16).collect();
        assert_eq!(wavefronts(&wide, 16), (4, 4));
        assert_eq!(wavefronts(&[4; 32], 4), (1, 1));
    }
}
