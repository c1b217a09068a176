//! Checks of kernels with programs in them: no spill that is not listed, no warning.

use std::fmt::Write as _;

use super::Figure;
use crate::Outcome;

/// A spill that is allowed: the kernel's name, the target, the program, and the most bytes.
struct Spill(&'static str, &'static str, &'static str, u32);

/// Kernels that may spill with a program, and by how much: what they do today, so that no spill grows or is added unseen. Backward's
/// tiles were chosen for plain attention, and a program's values are alive beside their accumulators. Most of these are outside the main
/// loops; `benches/results/programs.md` counts those within. None was looked at by itself yet.
#[rustfmt::skip]
const SPILLS: &[Spill] = &[
    Spill("score_backward_dkv_f16_d128", "sm_80", "alibi", 8),
    Spill("score_backward_dkv_f16_d128", "sm_80", "dropout", 8),
    Spill("score_backward_dkv_f16_d128", "sm_80", "softcap", 48),
    Spill("score_backward_dkv_f16_d128", "sm_90", "all", 92),
    Spill("score_backward_dkv_f16_d128", "sm_90", "softcap", 104),
    Spill("score_backward_dkv_f16_d64", "sm_80", "all", 16),
    Spill("score_backward_dkv_f16_d96", "sm_80", "all", 56),
    Spill("score_backward_dq_f16_d128", "sm_80", "all", 48),
    Spill("score_backward_dq_f16_d128", "sm_90", "all", 72),
    Spill("score_backward_dq_f16_d192", "sm_80", "all", 44),
    Spill("score_backward_dq_f16_d256", "sm_80", "all", 36),
    Spill("score_backward_dq_f16_d64", "sm_80", "all", 12),
    Spill("score_backward_dq_f16_d64", "sm_90", "all", 204),
    Spill("score_backward_dq_f16_d96", "sm_80", "all", 44),
    Spill("score_forward_f16_d128", "sm_80", "alibi", 20),
    Spill("score_forward_f16_d128", "sm_80", "all", 20),
    Spill("score_forward_f16_d128", "sm_80", "bias", 28),
    Spill("score_forward_f16_d128", "sm_80", "documents", 28),
    Spill("score_forward_f16_d128", "sm_80", "dropout", 316),
    Spill("score_forward_f16_d128", "sm_80", "window", 28),
    Spill("score_forward_f16_d192", "sm_80", "all", 20),
    Spill("score_forward_f16_d256", "sm_80", "all", 72),
    Spill("score_forward_f16_d32", "sm_80", "all", 320),
    Spill("score_forward_f16_d64", "sm_80", "all", 156),
    Spill("score_forward_f16_d64", "sm_80", "bias", 148),
    Spill("score_forward_f16_d64", "sm_80", "dropout", 240),
    Spill("score_forward_f16_d96", "sm_80", "all", 40),
    Spill("score_forward_f32_d128", "sm_80", "all", 428),
    Spill("score_forward_f32_d64", "sm_80", "all", 204),
    Spill("score_hopper_forward_f16_d192", "sm_90a", "all", 40),
    Spill("score_hopper_forward_f16_d256", "sm_90a", "all", 128),
    Spill("score_hopper_forward_f16_d256", "sm_90a", "bias", 48),
    Spill("score_hopper_forward_f16_d256", "sm_90a", "dropout", 60),
];

/// Fails with one sentence for each figure that has a fault.
pub fn judge(figures: &[Figure]) -> Outcome {
    let faults: Vec<String> = figures.iter().filter_map(fault).collect();
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

fn fault(figure: &Figure) -> Option<String> {
    let is_listed = |spill: &&Spill| (spill.0, spill.1, spill.2) == (figure.entry.name, figure.target, figure.program);
    let most = SPILLS.iter().find(is_listed).map_or(0, |spill| spill.3);
    if figure.spilled > most {
        return Some(format!(
            "{}: {} bytes spilled, {most} allowed",
            figure.name(),
            figure.spilled
        ));
    }
    let warning = figure.warnings.first()?;
    Some(format!("{}: {warning}", figure.name()))
}

/// Writes the number of spills that are allowed.
pub fn table_of_exceptions() -> String {
    let mut page = String::new();
    let _ = writeln!(
        page,
        "\n{} spills are listed in `xtask/src/programs/judge.rs`.",
        SPILLS.len()
    );
    page
}
