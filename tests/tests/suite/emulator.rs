//! Tests that only the emulator can run: kernels have no finding in any order of warps, and move exactly the bytes
//! that plans predict.

use flash_attention::device::EmulatorOptions;
use flash_attention::half::{bf16, f16};
use flash_attention::problem::{Problem, TensorInfo};
use flash_attention::{Arch, Attention, Device, Dtype, Element, Plan, Tensor};
use flash_attention_kernels::entries::{ENTRIES, Pass};
use flash_attention_tests::{Case, Layout, Order, Outcome, check_traffic, devices, drawn, emulator};
use proptest::prelude::*;

/// Seeds of the orders of warps.
const SEEDS: std::ops::Range<u64> = 1..16;

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

/// Tests that a case gives the same bits for every seed; a finding is an error, and `run` panics.
fn check_seeds<T: Element>(arch: Arch, case: &Case) {
    let inputs = case.inputs::<T>();
    let first = bits(&case.run(&emulator(arch, 0, 2), &inputs).1);
    for seed in SEEDS {
        let outcome = case.run(&emulator(arch, seed, 2), &inputs).1;
        assert_eq!(bits(&outcome), first, "seed {seed}: {case:?}");
    }
}

/// Returns the kernel that is planned for a case with contiguous tensors.
fn kernel(arch: Arch, case: &Case) -> &'static str {
    let device = Device::emulator(arch);
    let info = |shape| TensorInfo::contiguous(device.id(), case.dtype, shape, 4096).expect("small");
    let (q, k, v) = (info(&case.q), info(&case.kv), info(&case.v_shape()));
    let problem = Problem::new(&case.attention, &q, &k, &v, None).expect("valid");
    let plan = Plan::new(&problem, &device.info()).expect("a kernel");
    plan.launches()[0].entry.name
}

/// Tests every forward kernel with every seed, with enough tiles for its pipeline to wrap around.
fn check_every_kernel(arch: Arch) {
    if !devices().emulation() {
        return;
    }
    let kernels = ENTRIES
        .iter()
        .filter(|entry| entry.pass == Pass::Forward && entry.arch == arch);
    for entry in kernels {
        let (m, n) = (entry.block_m as usize, entry.block_n as usize);
        // A tile for every block of a cluster, the last one partly filled.
        let rows = (entry.cluster as usize - 1) * m + m / 2 + 3;
        let case = Case::one_head(entry.dtype, rows, 2 * n + 9, entry.head_dim as usize).masked(entry.causal);
        assert_eq!(kernel(arch, &case), entry.name);
        for_dtype(
            entry.dtype,
            || check_seeds::<f32>(arch, &case),
            || check_seeds::<f16>(arch, &case),
            || check_seeds::<bf16>(arch, &case),
        );
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

/// Tests memory that rules out 16-byte copies, which takes another path through the loaders.
#[test]
fn unaligned_copies_are_clean_in_any_order() {
    if !devices().emulation() {
        return;
    }
    let odd = Layout::new(Order::Bshd, 3, 1);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let case = Case::new(dtype, [1, 2, 21, 40], [1, 1, 140, 40])
            .laid_out([odd; 4])
            .masked(true);
        for_dtype(
            dtype,
            || check_seeds::<f32>(Arch::Sm80, &case),
            || check_seeds::<f16>(Arch::Sm80, &case),
            || check_seeds::<bf16>(Arch::Sm80, &case),
        );
    }
}

/// Tests that results and counters do not depend on the number of host threads.
#[test]
fn host_threads_do_not_show() {
    if !devices().emulation() {
        return;
    }
    let case = Case::new(Dtype::F16, [2, 3, 150, 32], [2, 3, 90, 32]).masked(true);
    let inputs = case.inputs::<f16>();
    for &arch in Arch::ALL {
        let run = |threads| {
            let device = emulator(arch, 5, threads);
            let outcome = case.run(&device, &inputs).1;
            (bits(&outcome), device.counters().expect("the emulator counts"))
        };
        let one = run(1);
        for threads in [2, 3, 8] {
            assert_eq!(run(threads), one, "{arch:?}, {threads} threads");
        }
    }
}

/// Runs a forward pass on an emulated GPU, and checks the bytes that it moves.
fn check_bytes<T: Element>(arch: Arch, case: &Case) {
    let device = Device::emulator(arch);
    let inputs = case.inputs::<T>();
    let place = |layout: Layout, shape, elements: &[T]| -> Tensor<T> {
        layout.input(&device, shape, elements).expect("small").tensor
    };
    let q = place(case.layouts[0], case.q, &inputs.q);
    let k = place(case.layouts[1], case.kv, &inputs.k);
    let v = place(case.layouts[2], case.v_shape(), &inputs.v);
    let plan = case.attention.plan(&q, &k, &v).expect("a plan");
    case.attention.forward(&q, &k, &v).expect("no finding");
    check_traffic(case, &plan, &device);
}

proptest! {
    #![proptest_config(drawn::config(48))]

    #[test]
    fn plans_predict_the_bytes_that_move(case in drawn::case(200, drawn::SMALL)) {
        if !devices().emulation() {
            return Ok(());
        }
        for &arch in Arch::ALL {
            for_dtype(
                case.dtype,
                || check_bytes::<f32>(arch, &case),
                || check_bytes::<f16>(arch, &case),
                || check_bytes::<bf16>(arch, &case),
            );
        }
    }

    #[test]
    fn no_order_changes_a_bit(case in drawn::case(80, drawn::SMALL / 8), seed in any::<u64>()) {
        if !devices().emulation() {
            return Ok(());
        }
        fn check<T: Element>(case: &Case, seed: u64) -> bool {
            let inputs = case.inputs::<T>();
            Arch::ALL.iter().all(|&arch| {
                let outcome = |seed| bits(&case.run(&emulator(arch, seed, 1), &inputs).1);
                outcome(0) == outcome(seed)
            })
        }
        prop_assert!(for_dtype(
            case.dtype,
            || check::<f32>(&case, seed),
            || check::<f16>(&case, seed),
            || check::<bf16>(&case, seed),
        ));
    }
}

/// Tests that with full tiles the tensor cores execute exactly the operations that the plan counts.
#[test]
fn full_tiles_waste_no_products() {
    if !devices().emulation() {
        return;
    }
    for (arch, seqlen_q, seqlen_k, head_dim) in [
        (Arch::Sm80, 256, 128, 32),
        (Arch::Sm80, 256, 128, 64),
        (Arch::Sm80, 256, 128, 128),
        (Arch::Sm90a, 384, 128, 64),
        (Arch::Sm90a, 256, 352, 128),
    ] {
        let device = Device::emulator(arch);
        let case = Case::one_head(Dtype::F16, seqlen_q, seqlen_k, head_dim);
        case.run(&device, &case.inputs::<f16>());
        let flops = 4 * seqlen_q as u64 * seqlen_k as u64 * head_dim as u64;
        assert_eq!(device.counters().expect("the emulator counts").tensor_flops, flops);
    }
}

/// Tests that with swizzled tiles no access of a warp has a bank conflict in shared memory.
#[test]
fn shared_memory_has_no_bank_conflicts() {
    if !devices().emulation() {
        return;
    }
    for entry in ENTRIES
        .iter()
        .filter(|e| e.pass == Pass::Forward && e.dtype == Dtype::F16)
    {
        let device = Device::emulator(entry.arch);
        let (m, n) = ((entry.block_m * entry.cluster) as usize, entry.block_n as usize);
        let case = Case::one_head(entry.dtype, m, 2 * n, entry.head_dim as usize).masked(entry.causal);
        case.run(&device, &case.inputs::<f16>());
        let counters = device.counters().expect("the emulator counts");
        assert_eq!(counters.shared_bank_conflicts, 0, "{}", entry.name);
    }
}

/// Tests more tiles than blocks: on Hopper blocks are persistent, and their pipelines continue from tile to tile.
/// Heads that share keys, batch entries, and a causal mask determine the next tile.
#[test]
fn blocks_that_stay_take_every_tile() {
    if !devices().emulation() {
        return;
    }
    let device = emulator(Arch::Sm90a, 7, 2);
    for causal in [false, true] {
        // One tile per head; three, where blocks share the last round by tiles; three, where they share it by pairs
        // of tiles.
        for (batch, heads, seqlen_q) in [(9, 20, 70), (7, 20, 400), (5, 20, 400)] {
            Case::new(Dtype::Bf16, [batch, heads, seqlen_q, 64], [batch, 4, 40, 64])
                .masked(causal)
                .check_on([&device]);
        }
    }
}

/// Tests heads with few queries on Hopper, where heads that share keys are packed into one tile: tiles that end
/// between two queries or within one, batch entries, both layouts, both masks, every order of warps.
#[test]
fn heads_that_share_keys_are_packed() {
    if !devices().emulation() {
        return;
    }
    let shapes = [(8, 1, 130), (2, 5, 70), (64, 7, 40), (16, 13, 150), (4, 40, 33)];
    for (i, (sharing, seqlen_q, seqlen_k)) in shapes.into_iter().enumerate() {
        for causal in [false, true] {
            let device = emulator(Arch::Sm90a, 2 * i as u64 + u64::from(causal), 2);
            let dtype = [Dtype::F16, Dtype::Bf16][i % 2];
            let head_dim = [64, 128, 72][i % 3];
            let order = [Order::Bhsd, Order::Bshd][usize::from(causal)];
            let case = Case::new(dtype, [2, 2 * sharing, seqlen_q, head_dim], [2, 2, seqlen_k, head_dim])
                .masked(causal)
                .laid_out([Layout::new(order, 0, 0); 4]);
            assert_eq!(packed_heads(&case, &device), sharing as u32, "{case:?}");
            case.check_on([&device]);
        }
    }
    let device = Device::emulator(Arch::Sm90a);
    let unpacked = [(6, 1), (128, 1), (4, 1500)]; // not a power of two, too many, no gain
    for (sharing, seqlen_q) in unpacked {
        let case = Case::new(Dtype::F16, [1, sharing, seqlen_q, 64], [1, 1, 40, 64]);
        assert_eq!(packed_heads(&case, &device), 1, "{case:?}");
    }
    let forced = Case::new(Dtype::F16, [1, 8, 1, 64], [1, 1, 40, 64]).with(Attention::new().arch(Arch::Sm80));
    assert_eq!(packed_heads(&forced, &device), 1);
}

/// Returns the number of query heads that share a tile in the case's forward pass.
fn packed_heads(case: &Case, device: &Device) -> u32 {
    let info = |shape| TensorInfo::contiguous(device.id(), case.dtype, shape, 4096).expect("small");
    let (q, k) = (info(case.q), info(case.kv));
    let problem = Problem::new(&case.attention, &q, &k, &k, None).expect("valid");
    Plan::new(&problem, &device.info())
        .expect("a plan")
        .tiles()
        .packed_heads
}

/// Tests the choice of kernels. The portable kernels get tensors that tensor maps cannot describe, scales that are
/// not positive, and every call with `.arch(Arch::Sm80)`. A call that asks for Hopper's kernels but cannot use them
/// is an error with the reason.
#[test]
fn hoppers_kernels_are_chosen_where_they_serve() {
    let device = Device::emulator(Arch::Sm90a);
    let tensor = |layout: Layout| {
        let elements = vec![f16::ONE; 2 * 16 * 64];
        layout.input(&device, [1, 2, 16, 64], &elements).expect("small").tensor
    };
    let plain = tensor(Layout::new(Order::Bhsd, 0, 0));
    let shifted = tensor(Layout::new(Order::Bhsd, 3, 1));
    let kernel = |attention: Attention, q: &Tensor<f16>| {
        let plan = attention.plan(q, &plain, &plain)?;
        Ok::<_, flash_attention::Error>(plan.launches()[0].entry.name)
    };
    let attention = Attention::new();
    assert_eq!(
        kernel(attention.clone(), &plain).expect("a plan"),
        "hopper_forward_f16_d64"
    );
    let portable = "forward_f16_d64";
    assert_eq!(kernel(attention.clone(), &shifted).expect("a plan"), portable);
    assert_eq!(
        kernel(attention.clone().softmax_scale(-1.0), &plain).expect("a plan"),
        portable
    );
    assert_eq!(
        kernel(attention.clone().softmax_scale(0.0), &plain).expect("a plan"),
        portable
    );
    assert_eq!(
        kernel(attention.clone().arch(Arch::Sm80), &plain).expect("a plan"),
        portable
    );

    let forced = attention.arch(Arch::Sm90a);
    assert_eq!(
        kernel(forced.clone(), &plain).expect("a plan"),
        "hopper_forward_f16_d64"
    );
    let refused = |result: Result<&str, flash_attention::Error>| result.expect_err("no kernel").to_string();
    assert!(refused(kernel(forced.clone(), &shifted)).contains("16-byte aligned rows"));
    let older = Device::emulator(Arch::Sm80);
    let info = TensorInfo::contiguous(older.id(), Dtype::F16, [1, 2, 16, 64], 4096).expect("small");
    let problem = Problem::new(&forced, &info, &info, &info, None).expect("valid");
    let error = Plan::new(&problem, &older.info()).expect_err("no kernel").to_string();
    assert!(error.contains("compute capability 9.0"), "{error}");
}

/// Tests that all checks are on, since the suite relies on them.
#[test]
fn all_checks_are_on() {
    let options = EmulatorOptions::new(Arch::Sm80);
    assert_eq!(options.launch.checks, flash_attention::ptx_emulator::Checks::all());
}

/// A finding in a score program names the node: here a bias whose memory is not allocated.
#[test]
fn a_finding_in_a_score_program_names_its_node() {
    if !devices().emulation() {
        return;
    }
    let device = emulator(Arch::Sm80, 1, 1);
    let q = Tensor::<f16>::zeros(&device, [1, 2, 20, 64]).expect("small");
    // SAFETY: the emulator refuses to read the memory.
    let bias = unsafe { Tensor::<f32>::from_raw_parts(&device, 64, [1, 2, 20, 20], [800, 400, 20, 1], None) };
    let attention = Attention::new().bias(&bias.expect("aligned"));
    let error = attention.forward(&q, &q, &q).expect_err("there is no bias");
    let message = error.to_string();
    assert!(message.contains("out of bounds"), "{message}");
    assert!(
        message.contains("; this is `bias[0, head, query, key]` of the score program"),
        "{message}"
    );
}
