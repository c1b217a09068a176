//! A `tracing` span for each call; nothing without the feature.

use crate::device::Device;
#[cfg(feature = "tracing")]
use crate::plan::Backward;
use crate::plan::{PassType, Plan};

/// Begins the span of a call, which ends when the value is dropped. Its fields come from the plan and are computed
/// only if a subscriber takes the span.
#[cfg(feature = "tracing")]
pub(crate) fn enter<P: PassType>(plan: &Plan<P>, device: &Device) -> tracing::span::EnteredSpan {
    macro_rules! span {
        ($name:literal) => {
            tracing::info_span!(
                $name,
                device = display(device),
                kernel = kernels(plan),
                dtype = plan.problem().dtype().name(),
                q = debug(shape(plan, plan.problem().heads_q(), plan.problem().seqlen_q())),
                k = debug(shape(plan, plan.problem().heads_kv(), plan.problem().seqlen_k())),
                causal = plan.problem().causal(),
                workspace_bytes = plan.workspace_bytes(),
                bytes_read = plan.cost().bytes_read,
                bytes_written = plan.cost().bytes_written,
                flops = plan.cost().flops,
            )
        };
    }
    let span = if P::NAME == Backward::NAME {
        span!("flash_attention.backward")
    } else {
        span!("flash_attention.forward")
    };
    span.entered()
}

/// The span of a build without the feature: nothing.
#[cfg(not(feature = "tracing"))]
pub(crate) struct NoSpan;

/// Does nothing in a build without the feature.
#[cfg(not(feature = "tracing"))]
pub(crate) fn enter(_plan: &Plan<impl PassType>, _device: &Device) -> NoSpan {
    NoSpan
}

/// Lists the names of the launched kernels in order; `native` on the CPU.
#[cfg(feature = "tracing")]
fn kernels(plan: &Plan<impl PassType>) -> String {
    let names: Vec<_> = plan.launches().iter().map(|launch| launch.entry.name).collect();
    if names.is_empty() {
        "native".to_owned()
    } else {
        names.join(", ")
    }
}

#[cfg(feature = "tracing")]
fn shape(plan: &Plan<impl PassType>, heads: usize, seqlen: u32) -> [usize; 4] {
    let problem = plan.problem();
    [problem.batch(), heads, seqlen as usize, problem.head_dim() as usize]
}
