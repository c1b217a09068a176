//! Calls over a rectangle of few queries and many keys, as a step of decoding without a cache has them: GPUs split them over keys.

use flash_attention::device::{DeviceInfo, DeviceKind};
use flash_attention::half::f16;
use flash_attention::problem::{Problem, TensorInfo};
use flash_attention::{Arch, Attention, Device, Dtype, Element, Error, KvCache, Output, Plan, Tensor};
use flash_attention_tests::{Case, Layout, Order, check_traffic, devices, emulator, files, for_dtype};

/// Seeds of the orders of warps.
const SEEDS: std::ops::Range<u64> = 0..6;

/// GPUs with few and many multiprocessors, without and with kernels of their own.
const CARDS: [DeviceInfo; 3] = [
    DeviceInfo::gpu((8, 0), 108, 163 * 1024),
    DeviceInfo::gpu((8, 6), 82, 99 * 1024),
    DeviceInfo::gpu((9, 0), 132, 227 * 1024),
];

/// Makes the plan of a case with contiguous tensors.
fn plan(case: &Case, card: &DeviceInfo) -> Plan {
    let info = |shape: [usize; 4]| {
        TensorInfo::contiguous(Device::cpu().id(), case.dtype, shape, 4096).expect("a size that can be counted")
    };
    let (q, k, v) = (info(case.q), info(case.kv), info(case.v_shape()));
    let problem = Problem::new(&case.attention, &q, &k, &v, None).expect("valid");
    Plan::new(&problem, card).expect("every card has a kernel")
}

fn is_split(case: &Case, card: &DeviceInfo) -> bool {
    let plan = plan(case, card);
    let has_line = plan.to_string().contains("\nsplits    ");
    assert_eq!(has_line, plan.launches().len() == 2, "{plan}");
    assert_eq!(has_line, plan.workspace_bytes() > 0, "{plan}");
    has_line
}

/// Steps of decoding for every dtype: one query, some queries, heads that share keys, and both masks.
fn steps() -> Vec<Case> {
    let mut cases = Vec::new();
    for (dtype, head_dim) in [(Dtype::F16, 128), (Dtype::Bf16, 64), (Dtype::F32, 40)] {
        for (seqlen_q, heads, causal) in [
            (1, [8, 2], false),
            (2, [3, 1], true),
            (7, [4, 2], true),
            (7, [2, 2], false),
        ] {
            let case = Case::new(dtype, [2, heads[0], seqlen_q, head_dim], [2, heads[1], 1203, head_dim]);
            cases.push(case.masked(causal));
        }
    }
    cases
}

#[test]
fn steps_of_decoding_are_split_and_right() {
    for case in steps() {
        for card in &CARDS {
            assert!(is_split(&case, card), "{case:?}\n{}", plan(&case, card));
        }
        case.check();
    }
}

/// Tests values of another head_dim, score programs, scales that are not positive, and any memory.
#[test]
fn splits_take_what_any_call_takes() {
    let step = |dtype| Case::new(dtype, [2, 4, 3, 64], [2, 2, 1100, 64]);
    let layouts = [
        Layout::new(Order::Bshd, 3, 1),
        Layout::new(Order::Bshd, 0, 0),
        Layout::new(Order::Bhsd, 8, 8),
        Layout::new(Order::Bshd, 8, 0),
    ];
    for case in [
        step(Dtype::F16).with_head_dim_v(96).laid_out(layouts),
        step(Dtype::Bf16).with(Attention::new().softmax_scale(-0.5)),
        step(Dtype::F32).with(Attention::new().softmax_scale(0.0).causal()),
        step(Dtype::F16)
            .with(Attention::new().causal().softcap(3.0))
            .laid_out(layouts),
        step(Dtype::Bf16).with(Attention::new().causal().window(900, None)),
        step(Dtype::F32)
            .with(Attention::new().score(|s, at| s - 0.01 * at.distance().abs() * (at.batch + at.head + 1))),
        step(Dtype::F16).with(Attention::new().dropout(0.25, 7)),
    ] {
        for card in &CARDS {
            assert!(is_split(&case, card), "{case:?}\n{}", plan(&case, card));
        }
        case.check();
    }
}

/// Tests which calls are split: those whose queries fit in a tile of a head, and leave much of the card idle.
#[test]
fn only_few_queries_that_leave_the_card_idle_are_split() {
    let case = |batch, seqlen_q, seqlen_k| Case::new(Dtype::F16, [batch, 32, seqlen_q, 128], [batch, 8, seqlen_k, 128]);
    for card in &CARDS {
        let split = |case: &Case| is_split(case, card);
        assert!(split(&case(1, 1, 512)) && split(&case(1, 128, 1 << 20)));
        assert!(!split(&case(1, 1, 511)), "few keys");
        assert!(!split(&case(1, 129, 1 << 20)), "more than a tile of queries");
        assert!(!split(&case(64, 1, 8192)), "tiles for every block of the card");
        assert!(!split(&case(0, 1, 8192)) && !split(&case(1, 0, 8192)), "no queries");
        let window = case(1, 1, 8192).with(Attention::new().causal().window(100, None));
        assert!(!split(&window), "few visible keys");
    }
    let [ampere, _, hopper] = &CARDS;
    // Hopper's own kernel has a tile for each head that has keys; more than half of 132 multiprocessors have one from batch 9 on.
    assert!(is_split(&case(8, 1, 8192), hopper) && !is_split(&case(9, 1, 8192), hopper));
    let forced = |arch| case(1, 1, 8192).with(Attention::new().arch(arch));
    assert!(!is_split(&forced(Arch::Sm90a), hopper) && is_split(&forced(Arch::Sm80), hopper));
    // Without a split, heads that share keys still read them once.
    let full = plan(&case(64, 1, 8192), ampere);
    assert_eq!((full.tiles().packed_heads, full.launches().len()), (4, 1), "{full}");
    assert_eq!(full.cost().bytes_read, 64 * (32 + 2 * 8 * 8192) * 128 * 2);
    assert_eq!(full.launches()[0].grid[0], 64 * 8);
}

/// Tests that a step reads its keys once, and that the plan has the bytes that it moves.
#[test]
fn plans_have_the_bytes_that_steps_move() {
    fn check<T: Element>(arch: Arch, case: &Case) {
        let device = Device::emulator(arch); // of its own, whose counters no other test changes
        let zeros = |shape: [usize; 4]| Tensor::<T>::zeros(&device, shape).expect("it fits");
        let (q, k) = (zeros(case.q), zeros(case.kv));
        let plan = case.attention.plan(&q, &k, &k).expect("a plan");
        case.attention.forward(&q, &k, &k).expect("no finding");
        check_traffic(case, &plan, &device);
        let elements = |shape: [usize; 4]| shape.into_iter().product::<usize>();
        let of_inputs = (elements(case.q) + 2 * elements(case.kv)) * case.dtype.bytes();
        let parts = plan.workspace_bytes(); // which the second kernel reads
        assert_eq!(plan.cost().bytes_read, of_inputs as u128 + u128::from(parts), "{plan}");
    }
    if devices().emulation() {
        for case in steps() {
            for &arch in Arch::ALL {
                for_dtype!(case.dtype, T => check::<T>(arch, &case));
            }
        }
    }
}

/// A tensor of drawn numbers.
fn drawn<T: Element>(device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
    let numbers = files::normal(shape.iter().product(), 1.0, seed);
    Tensor::from_slice(device, shape, &numbers.into_iter().map(T::from_f32).collect::<Vec<_>>()).expect("it fits")
}

/// The bits of all results.
fn bits<T: Element>(output: &Output<T>) -> Vec<u64> {
    let of_rows = |tensor: &Tensor<f32>| {
        tensor
            .to_vec()
            .expect("read")
            .into_iter()
            .map(|x| u64::from(x.to_bits()))
    };
    let out = output
        .out
        .to_vec()
        .expect("read")
        .into_iter()
        .map(|x| x.to_f64().to_bits());
    let mut bits: Vec<u64> = out.chain(of_rows(&output.lse)).collect();
    if let Some(statistics) = &output.statistics {
        bits.extend(of_rows(&statistics.row_max).chain(of_rows(&statistics.row_sum)));
    }
    bits
}

/// Tests that results have the same bits in any order of warps, for any strides, from a cache with the same keys, and in memory of the
/// caller, which may have too small or shared a workspace for them.
#[test]
fn results_have_the_same_bits_by_every_call() {
    for device in devices().all() {
        let (q, k) = (
            drawn::<f16>(device, &[2, 4, 2, 64], 1),
            drawn::<f16>(device, &[2, 1100, 2, 64], 2),
        );
        let v = drawn::<f16>(device, &[2, 1100, 2, 64], 3);
        let by_heads = |tensor: &Tensor<f16>| tensor.transpose(1, 2).and_then(|tensor| tensor.contiguous());
        let [of_k, of_v] = [&k, &v].map(|tensor| by_heads(tensor).expect("a copy"));
        let attention = Attention::new().causal();
        let want = attention.forward(&q, &of_k, &of_v).expect("valid");
        let views = [&k, &v].map(|tensor| tensor.transpose(1, 2).expect("four axes"));
        let same = attention.forward(&q, &views[0], &views[1]).expect("valid");
        assert_eq!(bits(&same), bits(&want), "{device}: strides");
        let cache = KvCache::rectangular([2, 1100], &[1100; 2]).expect("rows");
        let cached = attention.forward_cached(&q, &k, &v, &cache).expect("valid");
        assert_eq!(bits(&cached), bits(&want), "{device}: a cache");

        let plan = attention.plan(&q, &of_k, &of_v).expect("valid");
        let is_cpu = device.kind() == DeviceKind::Cpu;
        assert_eq!(plan.workspace_bytes() == 0, is_cpu, "{device}: {plan}");
        let mut output = Output::new(
            Tensor::from_slice(device, [2, 4, 2, 64], &[f16::NAN; 1024]).expect("it fits"),
            Tensor::from_slice(device, [2, 4, 2], &[f32::NAN; 16]).expect("it fits"),
        );
        let of_rows = |output: &Output<f16>| bits(&Output::new(output.out.clone(), output.lse.clone()));
        attention
            .forward_into(&q, &of_k, &of_v, &mut output.out.clone(), &mut output.lse.clone())
            .expect("valid");
        assert_eq!(bits(&output), of_rows(&want), "{device}: memory of the caller");
        let words = plan.workspace_bytes() as usize / 4;
        let mut workspace = Tensor::from_slice(device, [words], &vec![f32::NAN; words]).expect("it fits");
        attention
            .forward_into_with(&q, &of_k, &of_v, &mut output, &mut workspace)
            .expect("valid");
        assert_eq!(bits(&output), of_rows(&want), "{device}: a workspace of the caller");
        if is_cpu {
            continue;
        }
        let mut small = Tensor::zeros(device, [words - 1]).expect("it fits");
        let refused = attention.forward_into_with(&q, &of_k, &of_v, &mut output, &mut small);
        assert!(matches!(refused, Err(Error::Workspace { .. })), "{refused:?}");
        let mut shared = Output::new(output.out.clone(), workspace.narrow(0, 0, 16).expect("in range"));
        shared.lse = Tensor::from_slice(device, [2, 4, 2], &[0.0; 16]).expect("it fits");
        let mut lse = shared.lse.clone();
        let refused = attention.forward_into_with(&q, &of_k, &of_v, &mut shared, &mut lse);
        assert!(
            matches!(refused, Err(Error::NotContiguous { .. } | Error::Workspace { .. })),
            "{refused:?}"
        );
    }
    if devices().emulation() {
        let case = Case::new(Dtype::F16, [1, 4, 2, 64], [1, 1, 700, 64]).masked(true);
        let inputs = case.inputs::<f16>();
        for &arch in Arch::ALL {
            let want = case.run(&emulator(arch, 99, 1), &inputs).1;
            for seed in SEEDS {
                assert!(
                    case.run(&emulator(arch, seed, 2), &inputs).1 == want,
                    "seed {seed} on {arch:?}"
                );
            }
        }
    }
}

/// Tests that with `.batch_invariant()` an entry has the same bits alone and in a batch that fills the card.
#[test]
fn an_entry_has_its_bits_in_any_batch() {
    for device in devices().all() {
        for keys in [600, 1100] {
            let q = drawn::<f16>(device, &[140, 2, 1, 8], 1);
            let [k, v] = [2, 3].map(|seed| drawn::<f16>(device, &[140, 1, keys, 8], seed));
            let attention = Attention::new().batch_invariant();
            let all = attention.forward(&q, &k, &v).expect("valid");
            for batch in [1, 20] {
                let [q, k, v] = [&q, &k, &v].map(|tensor| tensor.narrow(0, 60, batch).expect("in range"));
                let part = attention.forward(&q, &k, &v).expect("valid");
                let of_all = Output::new(
                    all.out.narrow(0, 60, batch).expect("in range"),
                    all.lse.narrow(0, 60, batch).expect("in range"),
                );
                let part = Output::new(part.out, part.lse);
                assert!(
                    bits(&part) == bits(&of_all),
                    "{device}: {batch} of 140 entries of {keys} keys"
                );
            }
        }
    }
}
