//! Tables of the kernels to compile: one for each archive, with one target each.

use flash_attention_kernels::entries::{Arch, ENTRIES, Entry, FP8_ENTRIES, PROGRAM_ENTRIES, Pass};
use flash_attention_kernels::study::KERNELS;

/// A compiled kernel of any table; kernels of the traffic study have no pass.
pub type Row = Entry<Option<Pass>>;

/// Kernels that are compiled together.
pub struct Table {
    /// Name of the archive's file, and of the feature of `kernels/` that compiles them.
    pub name: &'static str,
    /// Target architecture.
    pub arch: Arch,
    /// Kernels of the table.
    pub rows: Vec<Row>,
}

/// Returns the tables: for each target its plain kernels and its kernels for score programs, those over e4m3 inputs, and that of the
/// traffic study.
pub fn tables() -> Vec<Table> {
    let of_arch = |name, entries: &[Entry], arch| Table {
        name,
        arch,
        rows: (entries.iter().filter(|entry| entry.arch == arch))
            .map(|entry| entry.with_pass(Some(entry.pass)))
            .collect(),
    };
    let product = Arch::ALL.iter().flat_map(|&arch| {
        let programs = match arch {
            Arch::Sm80 => "program_sm_80",
            Arch::Sm90a => "program_sm_90a",
        };
        [
            of_arch(arch.name(), ENTRIES, arch),
            of_arch(programs, PROGRAM_ENTRIES, arch),
        ]
    });
    let study = Table {
        name: "study",
        arch: Arch::Sm80,
        rows: KERNELS.iter().map(|kernel| kernel.with_pass(None)).collect(),
    };
    let fp8 = of_arch("fp8_sm_90a", FP8_ENTRIES, Arch::Sm90a);
    product.chain([fp8, study]).collect()
}
