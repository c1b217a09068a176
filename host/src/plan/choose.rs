//! The compiled kernel of each pass of a problem on a GPU.

use flash_attention_kernels::entries::{self, Arch, Entry, Pass};

use super::display::HeadDims;
use crate::error::Error;
use crate::problem::Problem;
use crate::target::{DeviceInfo, MIN_COMPUTE_CAPABILITY};

/// Chooses the compiled kernel of a pass for a problem on a GPU. `suits_hopper` is true if Hopper's own kernels can
/// run it; the portable ones run everything.
pub(super) fn choose(
    problem: &Problem,
    pass: Pass,
    device: &DeviceInfo,
    suits_hopper: bool,
) -> Result<&'static Entry, Error> {
    let DeviceInfo::Gpu {
        compute_capability: (major, minor),
        ..
    } = *device
    else {
        unreachable!("the CPU runs native code, which is not chosen")
    };
    let refuse = |reason| no_kernel(problem, pass, device, reason);
    if (major, minor) < MIN_COMPUTE_CAPABILITY {
        let (major, minor) = MIN_COMPUTE_CAPABILITY;
        return Err(refuse(format!(
            "kernels need compute capability {major}.{minor} or newer"
        )));
    }
    // Preprocess and postprocess kernels have no causal variant.
    let causal = problem.causal() && !matches!(pass, Pass::BackwardPreprocess | Pass::BackwardPostprocess);
    // Among the portable kernels, only those for lists and programs take a v of another head_dim.
    let has_uneven_dims = problem.head_dim() != problem.head_dim_v();
    let compiled = |arch| match problem.program() {
        None if pass != Pass::BackwardPreprocess
            && (problem.placed().is_some() || arch == Arch::Sm80 && has_uneven_dims) =>
        {
            entries::find_program(pass, arch, problem.dtype(), problem.widest_head_dim())
        }
        Some(_) => entries::find_program(pass, arch, problem.dtype(), problem.widest_head_dim()),
        None => entries::find(pass, arch, problem.dtype(), causal, problem.widest_head_dim()),
    };
    // sm_90a code runs on Hopper alone; sm_80 code on every later GPU too, and takes what has no pairs.
    let arch = problem.arch().filter(|_| problem.has_pairs());
    let hopper = match arch {
        Some(Arch::Sm80) => None,
        Some(Arch::Sm90a) if (major, minor) != (9, 0) => {
            return Err(refuse("sm_90a kernels need compute capability 9.0".to_owned()));
        }
        Some(Arch::Sm90a) if !suits_hopper => {
            return Err(refuse(
                "sm_90a kernels need tensors of 16-byte aligned rows, no broadcast axis, and in forward a positive scale"
                    .to_owned(),
            ));
        }
        Some(Arch::Sm90a) => compiled(Arch::Sm90a),
        None => compiled(Arch::Sm90a).filter(|_| (major, minor) == (9, 0) && suits_hopper),
    };
    let portable = || compiled(Arch::Sm80).filter(|_| arch != Some(Arch::Sm90a));
    let entry = hopper
        .or_else(portable)
        .ok_or_else(|| refuse("none is compiled for this dtype and head_dim".to_owned()))?;
    fits_device(problem, entry, device)
}

/// Returns a chosen kernel, if a block's shared memory is granted.
pub(super) fn fits_device(
    problem: &Problem,
    entry: &'static Entry,
    device: &DeviceInfo,
) -> Result<&'static Entry, Error> {
    match *device {
        DeviceInfo::Gpu {
            shared_bytes_per_block: granted,
            ..
        } if entry.shared_bytes > granted => {
            let needed = entry.shared_bytes;
            let reason = format!("a block needs {needed} bytes of shared memory, the device grants {granted}");
            Err(no_kernel(problem, entry.pass, device, reason))
        }
        _ => Ok(entry),
    }
}

/// The error of a problem that no kernel of a device serves.
pub(super) fn no_kernel(problem: &Problem, pass: Pass, device: &DeviceInfo, reason: String) -> Error {
    let device = match *device {
        DeviceInfo::Gpu {
            compute_capability: (major, minor),
            ..
        } => format!("a GPU of compute capability {major}.{minor}"),
        DeviceInfo::Cpu { .. } => "the CPU".to_owned(),
    };
    let quantized = if problem.scales().is_some() { "f8e4m3 to " } else { "" };
    Error::NoKernel {
        device,
        wanted: format!(
            "{pass:?} attention, {quantized}{}, head_dim {}",
            problem.dtype().name(),
            HeadDims(problem)
        ),
        reason,
    }
}
