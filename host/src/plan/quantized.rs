//! Plans over quantised inputs on a GPU: one kernel, Hopper's.

use flash_attention_kernels::entries::{Arch, Entry, Pass, find_fp8};

use super::choose::{fits_device, no_kernel};
use super::{Choice, Launch, tile_map};
use crate::error::Error;
use crate::problem::{Problem, ScaleBlocks};
use crate::target::DeviceInfo;

/// Plans the forward pass over inputs with these scales.
pub(super) fn forward(
    problem: &Problem,
    scales: [ScaleBlocks; 3],
    device: &DeviceInfo,
    multiprocessors: u32,
) -> Result<Choice, Error> {
    let entry = choose(problem, device)?;
    let launches = match problem.has_queries() {
        true => vec![Launch::fp8_forward(problem, entry, scales, multiprocessors)?],
        false => Vec::new(),
    };
    Ok(Choice::of_rectangle(problem, entry, launches))
}

/// Chooses the compiled kernel.
fn choose(problem: &Problem, device: &DeviceInfo) -> Result<&'static Entry, Error> {
    let refuse = |reason: &str| no_kernel(problem, Pass::Forward, device, reason.to_owned());
    let is_hopper = matches!(
        *device,
        DeviceInfo::Gpu {
            compute_capability: (9, 0),
            ..
        }
    );
    if !is_hopper || problem.arch() == Some(Arch::Sm80) {
        return Err(refuse(
            "FP8 kernels are compiled for sm_90a alone, which needs compute capability 9.0",
        ));
    }
    if problem.has_pairs() && problem.softmax_scale() <= 0.0 {
        return Err(refuse("FP8 kernels need a positive softmax_scale"));
    }
    if !fits(problem) {
        return Err(refuse(
            "FP8 kernels need tensors of 16-byte aligned rows and no broadcast axis",
        ));
    }
    let entry = find_fp8(Arch::Sm90a, problem.dtype(), problem.causal(), problem.head_dim());
    let entry = entry.ok_or_else(|| refuse("none is compiled for this dtype and head_dim"))?;
    fits_device(problem, entry, device)
}

/// Returns true if tensor maps can describe what the kernel copies.
fn fits(problem: &Problem) -> bool {
    let (inputs, results) = (problem.input_type(), problem.dtype().into());
    let queries = || {
        tile_map::fit(problem, inputs, &[problem.q()], &[]) && tile_map::fit(problem, results, &[problem.out()], &[])
    };
    let keys = || tile_map::fit(problem, inputs, &[], &[problem.k(), problem.v()]);
    !problem.has_queries() || queries() && (!problem.has_keys() || keys())
}
