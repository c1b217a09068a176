//! Bytes of global memory that a call on the emulator moves, beside those that its plan predicts.

use flash_attention::Device;
use flash_attention::plan::{PassType, Plan};

use crate::Case;

/// Checks the bytes that an emulated GPU has counted since its counters were reset against those of the plan. Bytes that are written
/// are equal. Kernels that follow lists of work read these beside the tensors, which the plan does not count: each thread its work,
/// 60 bytes, and at most 3 runs of 12 bytes, some times a head.
///
/// # Panics
/// If the numbers differ, or the device does not count.
pub fn check_traffic(case: &Case, plan: &Plan<impl PassType>, device: &Device) {
    let counters = device.counters().expect("the emulator counts");
    let cost = plan.cost();
    assert_eq!(
        cost.bytes_written,
        counters.global_written_bytes.into(),
        "{case:?}: {plan}"
    );
    let listed = plan.launches().iter().filter(|launch| launch.entry.program);
    let threads: u128 = listed
        .map(|launch| u128::from(launch.grid[0]) * u128::from(launch.threads))
        .sum();
    let heads = (case.q[1] / case.kv[1].max(1)) as u128;
    let of_lists = threads * heads * (4 * 60 + 8 * 3 * 12);
    let read = u128::from(counters.global_read_bytes);
    assert!(
        (cost.bytes_read..=cost.bytes_read + of_lists).contains(&read),
        "{read} bytes and at most {of_lists} of lists, {case:?}: {plan}"
    );
}
