//! What only the emulator can show: that kernels are clean under its checks whatever the order of warps, and that they
//! move the bytes that plans predict.

use flash_attention::half::{bf16, f16};
use flash_attention::{Arch, Device, Dtype, Element, EmulatorOptions, Tensor};
use flash_attention_kernels::entries::{ENTRIES, Pass};
use flash_attention_tests::{Case, Layout, Order, Outcome, drawn};
use proptest::prelude::*;

/// Orders of execution that are tried.
const SEEDS: std::ops::Range<u64> = 1..5;

fn emulator(seed: u64, threads: usize) -> Device {
    let mut options = EmulatorOptions::new(Arch::Sm80);
    options.launch.seed = seed;
    options.launch.threads = Some(threads);
    Device::emulator_with(options)
}

/// Runs a function for the element type of a case.
fn for_dtype<R>(dtype: Dtype, f32s: impl FnOnce() -> R, f16s: impl FnOnce() -> R, bf16s: impl FnOnce() -> R) -> R {
    match dtype {
        Dtype::F32 => f32s(),
        Dtype::F16 => f16s(),
        Dtype::Bf16 => bf16s(),
    }
}

fn bits<T: Element>(outcome: &Outcome<T>) -> (Vec<u64>, Vec<u32>) {
    let out = outcome.out.iter().map(|x| x.to_f64().to_bits()).collect();
    (out, outcome.lse.iter().map(|x| x.to_bits()).collect())
}

/// A case gives the same bits for every seed; a finding is an error, which `run` does not forgive.
fn check_seeds<T: Element>(case: &Case) {
    let inputs = case.inputs::<T>();
    let first = bits(&case.run(&emulator(0, 2), &inputs).1);
    for seed in SEEDS {
        let outcome = case.run(&emulator(seed, 2), &inputs).1;
        assert_eq!(bits(&outcome), first, "seed {seed}: {case:?}");
    }
}

/// Every forward kernel, with a ring of tiles that goes round, in every order that is tried.
#[test]
fn every_kernel_is_clean_in_any_order() {
    for entry in ENTRIES.iter().filter(|entry| entry.pass == Pass::Forward) {
        let seqlen_k = 3 * entry.block_n as usize + 9;
        let case = Case::one_head(
            entry.dtype,
            entry.block_m as usize / 2 + 3,
            seqlen_k,
            entry.head_dim as usize,
        )
        .masked(entry.causal);
        for_dtype(
            entry.dtype,
            || check_seeds::<f32>(&case),
            || check_seeds::<f16>(&case),
            || check_seeds::<bf16>(&case),
        );
    }
}

/// Memory that forbids 16-byte copies takes another way through the loaders.
#[test]
fn unaligned_copies_are_clean_in_any_order() {
    let odd = Layout::new(Order::Bshd, 3, 1);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let case = Case::new(dtype, [1, 2, 21, 40], [1, 1, 140, 40])
            .laid_out([odd; 4])
            .masked(true);
        for_dtype(
            dtype,
            || check_seeds::<f32>(&case),
            || check_seeds::<f16>(&case),
            || check_seeds::<bf16>(&case),
        );
    }
}

/// Blocks run on as many threads as the host has; what they compute and what is counted does not depend on it.
#[test]
fn host_threads_do_not_show() {
    let case = Case::new(Dtype::F16, [2, 3, 150, 32], [2, 3, 90, 32]).masked(true);
    let inputs = case.inputs::<f16>();
    let run = |threads| {
        let device = emulator(5, threads);
        let outcome = case.run(&device, &inputs).1;
        (bits(&outcome), device.counters().expect("the emulator counts"))
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

/// Bytes of global memory, predicted and counted: `(read, written)` each.
fn traffic<T: Element>(case: &Case) -> [(u128, u128); 2] {
    let device = Device::emulator(Arch::Sm80);
    let inputs = case.inputs::<T>();
    let place = |layout: Layout, shape, elements: &[T]| -> Tensor<T> {
        layout.input(&device, shape, elements).expect("small").tensor
    };
    let q = place(case.layouts[0], case.q, &inputs.q);
    let k = place(case.layouts[1], case.kv, &inputs.k);
    let v = place(case.layouts[2], case.kv, &inputs.v);
    let cost = case.attention.plan(&q, &k, &v).expect("a plan").cost();
    case.attention.forward(&q, &k, &v).expect("no finding");
    let counters = device.counters().expect("the emulator counts");
    [
        (cost.bytes_read, cost.bytes_written),
        (counters.global_read_bytes.into(), counters.global_written_bytes.into()),
    ]
}

proptest! {
    #![proptest_config(drawn::config(48))]

    #[test]
    fn plans_predict_the_bytes_that_move(case in drawn::case(200, drawn::SMALL)) {
        let [predicted, counted] = for_dtype(
            case.dtype,
            || traffic::<f32>(&case),
            || traffic::<f16>(&case),
            || traffic::<bf16>(&case),
        );
        prop_assert_eq!(predicted, counted);
    }

    #[test]
    fn no_order_changes_a_bit(case in drawn::case(80, drawn::SMALL / 8), seed in any::<u64>()) {
        fn check<T: Element>(case: &Case, seed: u64) -> bool {
            let inputs = case.inputs::<T>();
            let outcome = |seed| bits(&case.run(&emulator(seed, 1), &inputs).1);
            outcome(0) == outcome(seed)
        }
        prop_assert!(for_dtype(
            case.dtype,
            || check::<f32>(&case, seed),
            || check::<f16>(&case, seed),
            || check::<bf16>(&case, seed),
        ));
    }
}

/// Where tiles are full, the tensor cores do exactly the operations that the plan counts.
#[test]
fn full_tiles_waste_no_products() {
    for head_dim in [32, 64, 128] {
        let device = Device::emulator(Arch::Sm80);
        let case = Case::one_head(Dtype::F16, 256, 128, head_dim);
        case.run(&device, &case.inputs::<f16>());
        let flops = 4 * 256 * 128 * head_dim as u64;
        assert_eq!(device.counters().expect("the emulator counts").tensor_flops, flops);
    }
}

/// Swizzled tiles: no access of a warp meets itself in a bank of shared memory.
#[test]
fn shared_memory_has_no_bank_conflicts() {
    for entry in ENTRIES
        .iter()
        .filter(|e| e.pass == Pass::Forward && e.dtype == Dtype::F16)
    {
        let device = Device::emulator(Arch::Sm80);
        let (m, n) = (entry.block_m as usize, entry.block_n as usize);
        let case = Case::one_head(entry.dtype, m, 2 * n, entry.head_dim as usize).masked(entry.causal);
        case.run(&device, &case.inputs::<f16>());
        let counters = device.counters().expect("the emulator counts");
        assert_eq!(counters.shared_bank_conflicts, 0, "{}", entry.name);
    }
}

/// The checks are what "clean" rests on, so they must be on wherever the suite runs.
#[test]
fn all_checks_are_on() {
    let options = EmulatorOptions::new(Arch::Sm80);
    assert_eq!(options.launch.checks, flash_attention::ptx_emulator::Checks::all());
}
