//! What is compiled: each table of kernels, for one target, to one archive.

use flash_attention_kernels::entries::{Arch, ENTRIES, Entry, Pass};
use flash_attention_kernels::study::KERNELS;

/// A compiled kernel of any table; those of the study have no pass.
pub type Row = Entry<Option<Pass>>;

/// The kernels that are compiled together.
pub struct Table {
    /// Name of the archive's file, and feature of `kernels/` that has them compiled.
    pub name: &'static str,
    /// Target they are compiled for.
    pub arch: Arch,
    /// The kernels.
    pub rows: Vec<Row>,
}

/// The tables: a target's kernels each, and the study's.
pub fn tables() -> Vec<Table> {
    let product = Arch::ALL.iter().map(|&arch| Table {
        name: arch.name(),
        arch,
        rows: (ENTRIES.iter().filter(|entry| entry.arch == arch))
            .map(|entry| entry.with_pass(Some(entry.pass)))
            .collect(),
    });
    let study = Table {
        name: "study",
        arch: Arch::Sm80,
        rows: KERNELS.iter().map(|kernel| kernel.with_pass(None)).collect(),
    };
    product.chain([study]).collect()
}
