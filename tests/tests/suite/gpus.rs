//! Tests of every compiled kernel on every GPU of the run. Without a GPU they only check that the cases reach every
//! kernel, and the printed list of devices says that none ran. `forward.rs`, `backward.rs` and `emulator.rs` run the
//! kernels on the emulator.

use std::collections::BTreeSet;

use flash_attention::device::DeviceInfo;
use flash_attention::{Device, Dtype, Element, Output, Plan, Tensor};
use flash_attention_kernels::entries::{Arch, ENTRIES, Entry, Pass};
use flash_attention_tests::gpu::loads_arch;
use flash_attention_tests::{Case, devices, for_dtype};

/// Number of runs of a case whose results must be equal to the bit.
const REPEATS: usize = 20;

/// Returns a case for each forward kernel that a GPU of this compute capability runs. Its backward pass uses the
/// kernels of the same architecture, dtype, mask and width.
fn cases(capability: (u32, u32)) -> impl Iterator<Item = (&'static Entry, Case)> {
    let kernels = ENTRIES
        .iter()
        .filter(move |entry| entry.pass == Pass::Forward && loads_arch(entry.arch, capability));
    kernels.map(|entry| (entry, case(entry)))
}

/// Makes a case for this kernel: several tiles of queries and of keys, the last ones partly filled, and grouped
/// heads. The tiles of queries are an odd number, or fill the clusters of a kernel in clusters.
fn case(entry: &Entry) -> Case {
    let long = match entry.cluster {
        1 => 2 * entry.block_m + 5,
        blocks => blocks * entry.block_m - 5,
    } as usize;
    let wide = 3 * entry.block_n as usize + 11;
    let shape = |heads, seqlen| [1, heads, seqlen, entry.head_dim as usize];
    let case = Case::new(entry.dtype, shape(2, long), shape(1, wide)).masked(entry.causal);
    match entry.arch {
        Arch::Sm80 => {
            let attention = case.attention.clone().arch(Arch::Sm80);
            case.with(attention)
        }
        Arch::Sm90a => case,
    }
}

fn on_every_gpu(check: impl Fn(&Device, &Case)) {
    for gpu in devices().gpus() {
        let DeviceInfo::Gpu { compute_capability, .. } = gpu.info() else {
            panic!("{gpu} is not a GPU");
        };
        cases(compute_capability).for_each(|(_, case)| check(gpu, &case));
    }
}

/// Lists the kernels that a case launches on an emulated Hopper GPU, forward and backward.
fn kernels<T: Element>(case: &Case) -> Vec<&'static str> {
    let device = Device::emulator(Arch::Sm90a);
    let empty = |shape: [usize; 4]| Tensor::<T>::empty(&device, shape).expect("it fits");
    let (q, k, v, dout) = (empty(case.q), empty(case.kv), empty(case.kv), empty(case.q));
    let output = Output::new(empty(case.q), Tensor::empty(&device, &case.q[..3]).expect("it fits"));
    let attention = case.attention.clone();
    let forward = attention.plan(&q, &k, &v).expect("a plan");
    let backward = [
        attention.plan_backward(&q, &k, &v, &output, &dout),
        attention.deterministic().plan_backward(&q, &k, &v, &output, &dout),
    ];
    let backward = backward.map(|plan| plan.expect("a plan"));
    let entries = forward.entries().chain(backward.iter().flat_map(Plan::entries));
    entries.map(|entry| entry.name).collect()
}

#[test]
fn the_cases_reach_every_kernel() {
    let mut reached = BTreeSet::new();
    for (entry, case) in cases((9, 0)) {
        let kernels = for_dtype!(entry.dtype, T => kernels::<T>(&case));
        assert_eq!(kernels[0], entry.name, "{case:?}");
        reached.extend(kernels);
    }
    // `cached` tests the splits that the combine kernels are for, and `rotary` those of its name, on every device.
    let is_elsewhere = |pass| matches!(pass, Pass::Combine | Pass::Rotary);
    for entry in ENTRIES.iter().filter(|entry| !is_elsewhere(entry.pass)) {
        assert!(reached.contains(entry.name), "{} is not reached", entry.name);
    }
}

#[test]
fn every_forward_kernel_is_right() {
    on_every_gpu(|gpu, case| case.check_on([gpu]));
}

#[test]
fn every_backward_kernel_is_right() {
    on_every_gpu(|gpu, case| {
        for attention in [case.attention.clone(), case.attention.clone().deterministic()] {
            case.clone().with(attention).check_gradients_on([gpu]);
        }
    });
}

/// Tests that results are equal in every run: a difference is a race.
#[test]
fn every_forward_kernel_gives_the_same_bits() {
    fn check<T: Element>(case: &Case, gpu: &Device) {
        let inputs = case.inputs::<T>();
        let bits = || -> Vec<u64> {
            let outcome = case.run(gpu, &inputs).1;
            let out = outcome.out.iter().map(|x| x.to_f64().to_bits());
            out.chain(outcome.lse.iter().map(|x| u64::from(x.to_bits()))).collect()
        };
        let first = bits();
        for run in 1..REPEATS {
            assert!(bits() == first, "run {run} on {gpu}: {case:?}");
        }
    }
    on_every_gpu(|gpu, case| for_dtype!(case.dtype, T => check::<T>(case, gpu)));
}

#[test]
fn every_backward_kernel_gives_the_same_bits_when_asked_to() {
    fn check<T: Element>(case: &Case, gpu: &Device) {
        let (inputs, dout) = (case.inputs::<T>(), case.dout::<T>());
        let bits = || case.run_backward::<T>(gpu, &inputs, &dout).1.bits();
        let first = bits();
        for run in 1..REPEATS {
            assert!(bits() == first, "run {run} on {gpu}: {case:?}");
        }
    }
    on_every_gpu(|gpu, case| {
        let case = case.clone().with(case.attention.clone().deterministic());
        for_dtype!(case.dtype, T => check::<T>(&case, gpu));
    });
}

/// Tests more tiles than resident blocks: some thousand tiles on 132 multiprocessors.
#[test]
fn more_tiles_than_a_gpu_holds() {
    for gpu in devices().gpus() {
        for (dtype, causal) in [(Dtype::F16, false), (Dtype::Bf16, true)] {
            let case = Case::new(dtype, [9, 20, 260, 64], [9, 4, 140, 64]).masked(causal);
            case.check_on([gpu]);
            case.check_gradients_on([gpu]);
        }
    }
}
