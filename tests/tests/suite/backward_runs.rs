//! Runs of backward passes: the same bits in every run and, where they are asked for, in any order of warps; the bytes that plans
//! predict; and memory that grows with the length alone.

use std::collections::HashSet;

use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Dtype, Element, Tensor};
use flash_attention_tests::{Case, check_traffic, devices, drawn, emulator, for_dtype};
use proptest::prelude::*;

use crate::backward::{DTYPES, cases_of_kernels};

/// Returns the bits of a case's gradients.
fn bits(case: &Case, device: &Device) -> Vec<u64> {
    for_dtype!(case.dtype, T => case.run_backward::<T>(device, &case.inputs(), &case.dout()).1.bits())
}

/// Tests that a case gives the same bits on each of these devices.
fn check_same_bits(case: &Case, devices: impl IntoIterator<Item = Device>) {
    let mut first = None;
    for (i, device) in devices.into_iter().enumerate() {
        let bits = bits(case, &device);
        let first = first.get_or_insert_with(|| bits.clone());
        assert!(*first == bits, "run {i} on {device}: {case:?}");
    }
}

/// Returns the case without and with `.deterministic()`; only some kernels for Hopper differ.
fn both_modes(case: &Case) -> [Case; 2] {
    [case.clone(), asking_for_bits(case)]
}

/// Returns the case with `.deterministic()`.
fn asking_for_bits(case: &Case) -> Case {
    case.clone().with(case.attention.clone().deterministic())
}

#[test]
fn the_same_call_gives_the_same_bits() {
    for dtype in DTYPES {
        let case = Case::new(dtype, [1, 2, 130, 40], [1, 1, 150, 40]).masked(true);
        for device in devices().native() {
            check_same_bits(&asking_for_bits(&case), std::iter::repeat_n(device.clone(), 5));
        }
        // The CPU is always deterministic.
        check_same_bits(&case, std::iter::repeat_n(Device::cpu(), 5));
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    for dtype in DTYPES {
        let case = Case::new(dtype, [2, 4, 200, 64], [2, 2, 233, 64]).masked(true);
        for case in both_modes(&case) {
            let threads = [1, 2, 3, 5, 8];
            check_same_bits(
                &case,
                threads.map(|threads| Device::cpu_with_threads(threads).expect("threads")),
            );
        }
    }
}

/// Iterates over emulators with 16 orders of warps, on one to three host threads.
fn every_order(arch: Arch) -> impl Iterator<Item = Device> {
    (0..16).map(move |seed| emulator(arch, seed, 1 + seed as usize % 3))
}

/// Tests every kernel on small cases in every order of warps: no check has a finding, and all bits are equal. A
/// problem has one tile of keys, so that no two blocks add to the same element of dQ.
fn check_every_kernel(arch: Arch) {
    if !devices().emulation() {
        return;
    }
    for (_, case) in cases_of_kernels().filter(|&(of, _)| of == arch) {
        check_same_bits(&case, every_order(arch));
    }
}

#[test]
fn every_portable_kernel_is_clean_in_any_order() {
    check_every_kernel(Arch::Sm80);
}

#[test]
fn every_kernel_for_hopper_is_clean_in_any_order() {
    check_every_kernel(Arch::Sm90a);
}

/// Tests the same with pipelines that wrap around and query heads that share keys.
#[test]
fn the_order_of_warps_does_not_show() {
    if !devices().emulation() {
        return;
    }
    for (arch, dtype, seqlen_q, seqlen_k) in [
        (Arch::Sm80, Dtype::F16, 90, 140),
        (Arch::Sm80, Dtype::Bf16, 90, 140),
        (Arch::Sm90a, Dtype::F16, 170, 270),
    ] {
        let case = Case::new(dtype, [1, 2, seqlen_q, 40], [1, 1, seqlen_k, 40]).masked(true);
        check_same_bits(&asking_for_bits(&case), every_order(arch));
    }
    for case in both_modes(&Case::new(Dtype::F32, [1, 2, 20, 40], [1, 1, 40, 40]).masked(true)) {
        check_same_bits(&case, every_order(Arch::Sm80).take(5));
    }
}

/// Tests the order in which blocks add to dQ: one order with `.deterministic()`, several without. A tile of dQ has
/// one square or two, and a head four tiles of keys.
#[test]
fn blocks_take_turns_where_bits_are_asked_for() {
    if !devices().emulation() {
        return;
    }
    let case = |dtype, seqlen_q, head_dim, causal| {
        Case::new(dtype, [1, 2, seqlen_q, head_dim], [1, 1, 400, head_dim]).masked(causal)
    };
    let free = case(Dtype::F16, 150, 64, false);
    let found: HashSet<_> = every_order(Arch::Sm90a).map(|device| bits(&free, &device)).collect();
    assert!(
        found.len() > 1,
        "every order gives the same bits, so there is nothing to see"
    );
    for (dtype, seqlen_q, head_dim, causal) in [
        (Dtype::F16, 150, 64, false),
        (Dtype::F16, 70, 128, true),
        (Dtype::Bf16, 70, 72, false),
        (Dtype::Bf16, 70, 64, true),
        (Dtype::F16, 70, 256, true),
        (Dtype::Bf16, 70, 136, false),
    ] {
        let case = case(dtype, seqlen_q, head_dim, causal);
        // The tiles of wider heads are more to emulate.
        let orders = if head_dim > 128 { 4 } else { 16 };
        check_same_bits(&asking_for_bits(&case), every_order(Arch::Sm90a).take(orders));
    }
}

/// Tests that gradients are correct for any order in which blocks add to dQ, with one square of dQ per tile and with
/// two, three and four.
#[test]
fn sums_of_blocks_are_right_in_any_order() {
    if !devices().emulation() {
        return;
    }
    for (seed, device) in every_order(Arch::Sm90a).enumerate() {
        let dtype = [Dtype::F16, Dtype::Bf16][seed % 2];
        let head_dim = [64, 72, 256, 192, 200][seed % 5];
        Case::new(dtype, [1, 2, 170, head_dim], [1, 1, 270, head_dim])
            .masked(seed % 4 < 2)
            .check_gradients_on([&device]);
    }
}

/// Tests more tiles than blocks: on Hopper blocks are persistent, and their pipelines continue from tile to tile.
#[test]
fn blocks_that_stay_take_every_tile() {
    if !devices().emulation() {
        return;
    }
    // One tile per head, for dQ and for dK and dV; three of either, where blocks share the last rounds by single tiles and,
    // of keys, take turns.
    for (batch, seqlen_q, seqlen_k, causal, deterministic) in [
        (7, 20, 20, false, false),
        (7, 20, 20, true, false),
        (5, 300, 10, true, false),
        (5, 10, 300, true, true),
    ] {
        let case = Case::new(Dtype::Bf16, [batch, 20, seqlen_q, 64], [batch, 20, seqlen_k, 64]).masked(causal);
        let [free, in_turns] = both_modes(&case);
        let case = if deterministic { in_turns } else { free };
        case.check_gradients_on([&emulator(Arch::Sm90a, 3, 2)]);
    }
}

/// Runs a backward pass on an emulated GPU, and checks the bytes that it moves.
fn check_bytes<T: Element>(case: &Case, arch: Arch) {
    let device = Device::emulator(arch);
    let mut prepared = case.prepare_backward::<T>(&device, &case.inputs(), &case.dout());
    if T::DTYPE == Dtype::F32 {
        // With them, the numbers decide which queries have their delta from the keys.
        prepared.output.statistics = None;
    }
    let [q, k, v] = prepared.inputs.each_ref().map(|input| &input.tensor);
    let plan = case
        .attention
        .plan_backward(q, k, v, &prepared.output, &prepared.dout.tensor)
        .expect("a plan");
    device.reset_counters();
    prepared.backward().expect("no finding");
    check_traffic(case, &plan, &device);
}

proptest! {
    #![proptest_config(drawn::config(32))]

    #[test]
    fn plans_predict_the_bytes_that_move(case in drawn::case(100, drawn::SMALL / 8)) {
        if !devices().emulation() {
            return Ok(());
        }
        for &arch in Arch::ALL {
            for_dtype!(case.dtype, T => check_bytes::<T>(&case, arch));
        }
    }
}

/// Tests that forward and backward hold eight tensors of rows (q, k, v, out, dout, dq, dk, dv), four with an f32 per
/// query (lse, row_max, row_sum, delta) and the plan's workspace, and never more: nothing has size seqlen x seqlen.
#[test]
fn memory_grows_with_the_length_alone() {
    fn peak<T: Element>(device: &Device, seqlen: usize, head_dim: usize) -> u64 {
        let zeros = || Tensor::<T>::zeros(device, [1, 1, seqlen, head_dim]).expect("it fits");
        let [q, k, v, dout] = [(); 4].map(|()| zeros());
        device.reset_peak_memory();
        let output = Attention::new().forward(&q, &k, &v).expect("valid");
        let _gradients = Attention::new().backward(&q, &k, &v, &output, &dout).expect("valid");
        device.memory().peak
    }
    let rows = |seqlen: usize, head_dim: usize, bytes: usize| (seqlen * (8 * head_dim * bytes + 4 * 4)) as u64;
    // lse in base 2 and a shift; one flag per 16 queries.
    let of_gpus = |seqlen: usize| (seqlen * 2 * 4 + seqlen / 16 * 4) as u64;
    let cpu = Device::cpu_with_threads(2).expect("threads");
    for seqlen in [1024, 2048, 4096] {
        assert_eq!(peak::<f32>(&cpu, seqlen, 32), rows(seqlen, 32, 4), "seqlen {seqlen}");
    }
    // On Hopper dQ is accumulated in f32, in whole panels of 64 columns.
    let sums = |seqlen: usize| (seqlen * 64 * 4) as u64;
    for seqlen in [128, 256, 512] {
        for arch in [Arch::Sm80, Arch::Sm90a] {
            let kept = if arch == Arch::Sm80 { 0 } else { sums(seqlen) };
            let peak = peak::<f16>(&Device::emulator(arch), seqlen, 32);
            assert_eq!(
                peak,
                rows(seqlen, 32, 2) + of_gpus(seqlen) + kept,
                "seqlen {seqlen} on {arch:?}"
            );
        }
    }
}
