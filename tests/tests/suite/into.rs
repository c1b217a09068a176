//! Batches with results in the caller's memory: the bits of calls that make their own, in any strides, and nothing beside them.

use flash_attention::device::DeviceKind;
use flash_attention::error::Error;
use flash_attention::half::bf16;
use flash_attention::plan::{PassType, Plan};
use flash_attention::{Arch, Attention, Device, Element, Gradients, KvCache, Output, Sequences, Statistics, Tensor};
use flash_attention_tests::{devices, files};

/// A tensor of drawn numbers.
fn drawn<T: Element>(device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
    let numbers = files::normal(shape.iter().product(), 1.0, seed);
    Tensor::from_slice(device, shape, &numbers.into_iter().map(T::from_f32).collect::<Vec<_>>()).expect("it fits")
}

/// NaN with room for one more element in each row, and the view of the rest.
fn poisoned<T: Element>(device: &Device, shape: &[usize]) -> [Tensor<T>; 2] {
    let last = shape.len() - 1;
    let mut wide = shape.to_vec();
    wide[last] += 1;
    let poison = vec![T::from_f32(f32::NAN); wide.iter().product()];
    let memory = Tensor::from_slice(device, &wide, &poison).expect("it fits");
    let view = memory.narrow(last, 0, shape[last]).expect("in range");
    [memory, view]
}

/// Elements of a tensor, those of the memory behind its rows checked to be NaN.
fn read<T: Element>([memory, view]: &[Tensor<T>; 2]) -> Vec<f64> {
    let last = view.shape().len() - 1;
    let gap = memory
        .narrow(last, view.shape()[last], 1)
        .and_then(|gap| gap.to_vec())
        .expect("in range");
    assert!(gap.iter().all(|x| x.to_f64().is_nan()), "a gap was written");
    elements(view)
}

fn elements<T: Element>(tensor: &Tensor<T>) -> Vec<f64> {
    tensor.to_vec().expect("read").into_iter().map(T::to_f64).collect()
}

/// An output of the caller's memory: out in rows with gaps.
fn output<T: Element>(device: &Device, out: &[usize], rows: &[usize], keeps: bool) -> ([Tensor<T>; 2], Output<T>) {
    let out = poisoned::<T>(device, out);
    let of_rows = || Tensor::from_slice(device, rows, &vec![f32::NAN; rows.iter().product()]).expect("it fits");
    let mut output = Output::new(out[1].clone(), of_rows());
    if keeps {
        output.statistics = Some(Statistics {
            row_max: of_rows(),
            row_sum: of_rows(),
        });
    }
    (out, output)
}

fn check_same_numbers<T: Element>(device: &Device, got: &Output<T>, want: &Output<T>) {
    assert_eq!(elements(&got.lse), elements(&want.lse), "{device}");
    if let Some(Statistics { row_max, row_sum }) = &got.statistics {
        let want = want.statistics.as_ref().expect("always kept");
        assert_eq!(elements(row_max), elements(&want.row_max), "{device}");
        assert_eq!(elements(row_sum), elements(&want.row_sum), "{device}");
    }
}

/// A workspace that is exactly as large as plans say, full of NaN.
fn workspace(device: &Device, plans: &[Plan<impl PassType>]) -> Tensor<f32> {
    let bytes: u64 = plans
        .iter()
        .map(|plan| plan.workspace_bytes().next_multiple_of(64))
        .sum();
    let words = bytes as usize / size_of::<f32>();
    Tensor::from_slice(device, [words], &vec![f32::NAN; words]).expect("it fits")
}

/// Sequences of 3, 0, 40 and 5 queries, keys that do not count, and rows that belong to none.
fn sequences() -> Sequences {
    let sequences = Sequences::new(&[0, 3, 3, 43, 48], &[0, 30, 34, 34, 90]);
    sequences
        .and_then(|sequences| sequences.seqused_k(&[29, 4, 0, 56]))
        .expect("offsets grow")
}

fn check_ragged<T: Element>(device: &Device, attention: &Attention) {
    let (sequences, [total_q, total_k, heads_q, heads_kv, head_dim]) = (sequences(), [50, 93, 4, 2, 16]);
    let q = drawn::<T>(device, &[total_q, heads_q, head_dim], 1);
    let [k, v] = [2, 3].map(|seed| drawn::<T>(device, &[total_k, heads_kv, head_dim], seed));
    let dout = drawn::<T>(device, &[total_q, heads_q, head_dim], 4);
    let want = attention.forward_ragged(&q, &k, &v, &sequences).expect("it fits");
    let plans = attention.plan_ragged(&q, &k, &v, &sequences).expect("it fits");
    for (keeps, brings) in [(true, false), (true, true), (false, true)] {
        let (out, mut output) = output::<T>(device, &[total_q, heads_q, head_dim], &[heads_q, total_q], keeps);
        let mut own = workspace(device, &plans);
        let workspace = brings.then_some(&mut own);
        (attention.forward_ragged_into(&q, &k, &v, &sequences, &mut output, workspace)).expect("it fits");
        assert_eq!(read(&out), elements(&want.out), "{device}");
        check_same_numbers(device, &output, &want);
    }

    let of_library = attention
        .backward_ragged(&q, &k, &v, &want, &dout, &sequences)
        .expect("it fits");
    for brings in [false, true] {
        let memory = [&q, &k, &v].map(|tensor| poisoned::<T>(device, tensor.shape()));
        let [dq, dk, dv] = memory.each_ref().map(|[_, view]| view.clone());
        let mut gradients = Gradients::new(dq, dk, dv);
        let plans = attention.plan_backward_ragged(&q, &k, &v, &want, &dout, &sequences, &gradients);
        let mut own = workspace(device, &plans.expect("it fits"));
        let workspace = brings.then_some(&mut own);
        attention
            .backward_ragged_into(&q, &k, &v, &want, &dout, &sequences, &mut gradients, workspace)
            .expect("it fits");
        let Gradients { dq, dk, dv, .. } = &of_library;
        for (got, want) in memory.iter().zip([dq, dk, dv]) {
            assert_eq!(read(got), elements(want), "{device}");
        }
    }
}

#[test]
fn ragged_batches_write_to_the_callers_memory() {
    for device in devices().all() {
        let attention = Attention::new().causal().deterministic();
        check_ragged::<f32>(device, &attention);
        check_ragged::<bf16>(device, &attention);
        check_ragged::<f32>(device, &attention.softcap(2.0));
    }
}

#[test]
fn gradients_of_tables_come_with_those_of_the_callers_memory() {
    for device in devices().all() {
        let slopes = Tensor::from_slice(device, [2], &[0.5_f32, 0.25]).expect("it fits");
        let attention = Attention::new().alibi(&slopes).table_gradients();
        let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| drawn::<f32>(device, &[20, 2, 8], seed));
        let sequences = Sequences::new(&[0, 7, 20], &[0, 7, 20]).expect("offsets grow");
        let output = attention.forward_ragged(&q, &k, &v, &sequences).expect("it fits");
        let want = attention
            .backward_ragged(&q, &k, &v, &output, &dout, &sequences)
            .expect("it fits");
        let mut gradients = Gradients::new(q.clone(), k.clone(), v.clone());
        let [dq, dk, dv] = [0, 1, 2].map(|_| drawn::<f32>(device, &[20, 2, 8], 9));
        (gradients.dq, gradients.dk, gradients.dv) = (dq, dk, dv);
        let plans = attention.plan_backward_ragged(&q, &k, &v, &output, &dout, &sequences, &gradients);
        let mut own = workspace(device, &plans.expect("it fits"));
        attention
            .backward_ragged_into(&q, &k, &v, &output, &dout, &sequences, &mut gradients, Some(&mut own))
            .expect("it fits");
        let of = |gradients: &Gradients<f32>| elements(gradients.tables().next().expect("asked for"));
        for (got, want) in of(&gradients).into_iter().zip(of(&want)) {
            assert!((got - want).abs() < 1e-4, "{device}: {got}, want {want}");
        }
    }
}

#[test]
fn cached_calls_write_to_the_callers_memory() {
    for device in devices().all() {
        let [k, v] = [1, 2].map(|seed| drawn::<f32>(device, &[40, 16, 1, 32], seed));
        // Both sequences have all pages, in an order of their own.
        let table: Vec<i32> = (0..40).rev().chain(0..40).collect();
        let cache = KvCache::paged([40, 16], &table, &[600, 7]).expect("pages");
        let packed = cache.clone().cu_seqlens_q(&[0, 1, 4]).expect("offsets grow");
        let attention = Attention::new().causal();
        let cases = [
            (cache, vec![2, 4, 1, 32], vec![2, 4, 1]),
            (packed, vec![5, 4, 32], vec![4, 5]),
        ];
        for (cache, shape, rows) in cases {
            let q = drawn::<f32>(device, &shape, 3);
            let want = attention.forward_cached(&q, &k, &v, &cache).expect("it fits");
            let plans = attention.plan_cached(&q, &k, &v, &cache).expect("it fits");
            let is_split = plans.iter().any(|plan| plan.workspace_bytes() > 0);
            assert_eq!(
                is_split,
                device.kind() != DeviceKind::Cpu,
                "{device}: long keys are split"
            );
            for brings in [false, true] {
                let (out, mut output) = output::<f32>(device, &shape, &rows, true);
                let mut own = workspace(device, &plans);
                let workspace = brings.then_some(&mut own);
                (attention.forward_cached_into(&q, &k, &v, &cache, &mut output, workspace)).expect("it fits");
                assert_eq!(read(&out), elements(&want.out), "{device}");
                check_same_numbers(device, &output, &want);
            }
        }
    }
}

#[test]
fn memory_that_will_not_do_is_refused() {
    for device in devices().all() {
        let attention = Attention::new();
        let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| drawn::<f32>(device, &[20, 2, 8], seed));
        let sequences = Sequences::new(&[0, 7, 20], &[0, 7, 20]).expect("offsets grow");
        let rows = |shape: &[usize]| Tensor::<f32>::zeros(device, shape).expect("it fits");
        let new = || Output::new(rows(&[20, 2, 8]), rows(&[2, 20]));
        let forward = |mut output: Output<f32>, mut workspace: Tensor<f32>| {
            attention
                .forward_ragged_into(&q, &k, &v, &sequences, &mut output, Some(&mut workspace))
                .err()
                .map(|error| error.to_string())
        };
        let refused = |output| forward(output, rows(&[0])).expect("refused");
        assert!(refused(Output::new(rows(&[21, 2, 8]), rows(&[2, 20]))).starts_with("`out` has total = 21"));
        assert!(refused(Output::new(rows(&[20, 2, 8]), rows(&[20, 2]))).starts_with("`lse` has heads = 20"));
        assert!(refused(Output::new(v.clone(), rows(&[2, 20]))).contains("`out` shares memory with `v`"));
        let repeated = Tensor::from_slice_strided(device, [20, 2, 8], [0, 8, 1], &[0.0; 16]).expect("it fits");
        assert!(refused(Output::new(repeated, rows(&[2, 20]))).starts_with("`out`"));
        assert_eq!(
            forward(new(), rows(&[0])),
            None,
            "short keys are not split, the CPU needs none"
        );

        let output = attention.forward_ragged(&q, &k, &v, &sequences).expect("it fits");
        let backward = |gradients: &mut Gradients<f32>, workspace: &mut Tensor<f32>| {
            attention
                .backward_ragged_into(&q, &k, &v, &output, &dout, &sequences, gradients, Some(workspace))
                .expect_err("refused")
        };
        let like = || rows(&[20, 2, 8]);
        let mut gradients = Gradients::new(like(), like(), like());
        let small = backward(&mut gradients, &mut rows(&[16]));
        assert!(matches!(small, Error::Workspace { bytes: 64, .. }), "{small}");
        let mut short = Gradients::new(like(), like(), rows(&[19, 2, 8]));
        let error = backward(&mut short, &mut rows(&[4096])).to_string();
        assert!(error.starts_with("`dv` has total = 19"), "{error}");
        let mut shared = Gradients::new(like(), dout.clone(), like());
        let error = backward(&mut shared, &mut rows(&[4096])).to_string();
        assert!(error.contains("`dk` shares memory with `dout`"), "{error}");

        if device.kind() == DeviceKind::Cpu {
            continue;
        }
        let forced = Attention::new().arch(Arch::Sm90a);
        let error = forced
            .forward_ragged_into(&q, &k, &v, &sequences, &mut new(), None)
            .expect_err("one by one");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}
