//! Situations of public bug reports of other libraries, each as a property of drawn problems. `numbers.rs` has those of large scores and
//! of hidden values.

use flash_attention::{Attention, Device, Dtype, Element, Error, Gradients, Output, Tensor};
use flash_attention_tests::{Case, Inputs, devices, drawn, for_dtype};
use proptest::prelude::*;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

fn dtype() -> impl Strategy<Value = Dtype> {
    (0..3_usize).prop_map(|i| DTYPES[i])
}

/// Axes of a packed tensor before head_dim, as it names them.
const PART: usize = 3;

/// Returns part `index` of a packed tensor as `[batch, heads, seqlen, head_dim]`. `order` lists the axes batch 0, heads 1, seqlen 2 and
/// [`PART`] as they lie in memory.
fn part<T: Element>(packed: &Tensor<T>, order: &[usize], index: usize) -> Tensor<T> {
    let axis = order.iter().position(|&axis| axis == PART).expect("one of the axes");
    let mut part = packed.select(axis, index).expect("in range");
    let mut left: Vec<usize> = order.iter().copied().filter(|&axis| axis != PART).collect();
    for axis in 0..PART {
        let place = left.iter().position(|&name| name == axis).expect("one of the axes");
        part = part.transpose(axis, place).expect("axes");
        left.swap(axis, place);
    }
    part
}

/// Tests q, k, v and out as parts of one tensor, and dq, dk and dv as parts of another, against results in memory of their own.
fn check_packed<T: Element>(device: &Device, sizes: [usize; 3], head_dim: usize, order: &[usize], causal: bool) {
    let attention = Attention::new().deterministic();
    let attention = if causal { attention.causal() } else { attention };
    let shape = |parts: usize| -> Vec<usize> {
        let sizes = [sizes[0], sizes[1], sizes[2], parts];
        order.iter().map(|&axis| sizes[axis]).chain([head_dim]).collect()
    };
    let data: Vec<T> = (0..shape(4).iter().product::<usize>())
        .map(|i| T::from_f32((i as f32 * 0.37).sin()))
        .collect();
    let packed = Tensor::from_slice(device, shape(4), &data).expect("small");
    let [q, k, v, out] = [0, 1, 2, 3].map(|index| part(&packed, order, index));
    let dout = out.contiguous().expect("small");
    let apart = attention.forward(&q, &k, &v).expect("valid");
    let lse = Tensor::empty(device, &q.shape()[..3]).expect("small");
    let mut output = Output::new(out, lse);
    output.statistics = apart.statistics.clone();
    let name = format!(
        "{} {sizes:?} x {head_dim} in order {order:?} on {device}",
        T::DTYPE.name()
    );
    let same = |part: &str, got: &Tensor<T>, want: &Tensor<T>| {
        assert_eq!(
            got.to_vec().expect("read"),
            want.to_vec().expect("read"),
            "{part}, {name}"
        );
    };
    attention
        .forward_into_output(&q, &k, &v, &mut output)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    same("out", &output.out, &apart.out);
    let inputs: Vec<T> = data.clone();
    let of_input = |index| {
        part(
            &Tensor::from_slice(device, shape(4), &inputs).expect("small"),
            order,
            index,
        )
    };
    for (index, input) in [(0, &q), (1, &k), (2, &v)] {
        same("an input beside out", input, &of_input(index));
    }

    let want = attention.backward(&q, &k, &v, &output, &dout).expect("valid");
    let room = Tensor::zeros(device, shape(3)).expect("small");
    let [dq, dk, dv] = [0, 1, 2].map(|index| part(&room, order, index));
    let mut gradients = Gradients::new(dq, dk, dv);
    attention
        .backward_into(&q, &k, &v, &output, &dout, &mut gradients)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    same("dq", &gradients.dq, &want.dq);
    same("dk", &gradients.dk, &want.dk);
    same("dv", &gradients.dv, &want.dv);
}

/// The class of a number.
fn class(x: f64) -> &'static str {
    match x {
        x if x.is_nan() => "NaN",
        x if x.is_infinite() => "infinite",
        _ => "finite",
    }
}

/// Tests a head whose scores are all minus infinity, beside one of normal numbers: out and dv are NaN where the definition has NaN, and
/// finite elsewhere.
fn check_without_weight<T: Element>(rows: usize, keys: usize, head_dim: usize, causal: bool, of_queries: bool) {
    let case = Case::new(T::DTYPE, [1, 2, rows, head_dim], [1, 2, keys, head_dim]).masked(causal);
    let mut inputs: Inputs<T> = case.inputs();
    let (finite, infinite) = (T::from_f32(1.0), T::from_f32(f32::NEG_INFINITY));
    let [of_q, of_k] = if of_queries {
        [infinite, finite]
    } else {
        [finite, infinite]
    };
    inputs.q[..rows * head_dim].fill(of_q);
    inputs.k[..keys * head_dim].fill(of_k);
    let dout = case.dout::<T>();
    let (out, lse) = inputs.oracle(&case.dims());
    let [_, _, dv] = inputs.oracle_gradients(&case, &dout);
    for device in devices().of_every_instruction_set() {
        let outcome = case.run(device, &inputs).1;
        let gradients = case.run_backward(device, &inputs, &dout).1;
        let widened = |x: &[T]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
        let of_lse: Vec<f64> = outcome.lse.iter().map(|&x| x.into()).collect();
        for (name, got, want) in [
            ("out", widened(&outcome.out), &out),
            ("lse", of_lse, &lse),
            ("dv", widened(&gradients.dv), &dv),
        ] {
            for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
                assert_eq!(
                    class(got),
                    class(want),
                    "{case:?} on {device}: {name}[{i}] is {got}, want {want}"
                );
            }
        }
    }
}

/// Returns a tensor of one row, repeated `rows` times without memory of its own.
fn repeated<T: Element>(device: &Device, rows: usize) -> Tensor<T> {
    let row = vec![T::from_f32(1.0); 8];
    Tensor::from_slice_strided(device, [1, 1, rows, 8], [0, 0, 0, 1], &row).expect("one row")
}

proptest! {
    #![proptest_config(drawn::config(24))]

    /// xformers#456, flash-attention#2785: views of one tensor that share no element, though their spans interleave.
    #[test]
    fn parts_of_one_tensor_are_written_in_place(
        dtype in dtype(), batch in 1..=2_usize, heads in 1..=3_usize, seqlen in 1..=70_usize, eighths in 1..=6_usize,
        order in Just(vec![0, 1, 2, PART]).prop_shuffle(), causal in any::<bool>(),
    ) {
        for device in devices().all() {
            for_dtype!(dtype, T => check_packed::<T>(device, [batch, heads, seqlen], 8 * eighths, &order, causal));
        }
    }

    /// Tests that keys whose scores are all minus infinity give NaN, unlike keys that no query sees.
    #[test]
    fn a_head_without_weight_is_nan(
        dtype in dtype(), rows in 1..=70_usize, keys in 1..=140_usize, eighths in 1..=12_usize, causal in any::<bool>(),
        of_queries in any::<bool>(),
    ) {
        for_dtype!(dtype, T => check_without_weight::<T>(rows, keys, 8 * eighths, causal, of_queries));
    }

    /// A view may have more elements than memory: reading it is an error that says how many bytes it would take.
    #[test]
    fn what_fits_no_memory_is_an_error(power in 42.0..57.9_f64, dtype in dtype()) {
        fn check<T: Element>(device: &Device, rows: usize) {
            let bytes = (rows * 8 * T::DTYPE.bytes()) as u64;
            let view = repeated::<T>(device, rows);
            for error in [view.to_vec().expect_err("no memory"), view.contiguous().expect_err("no memory")] {
                assert!(
                    matches!(error, Error::OutOfMemory { requested, .. } if requested == bytes),
                    "{rows} rows on {device}: {error}"
                );
            }
        }
        for device in devices().all() {
            for_dtype!(dtype, T => check::<T>(device, power.exp2() as usize));
        }
    }

    /// A number of threads beyond the limit is refused, before any is started, and the error names the limit.
    #[test]
    fn absurd_numbers_of_threads_are_refused(power in 0.0..63.9_f64) {
        let threads = power.exp2() as usize;
        match Device::cpu_with_threads(threads) {
            Ok(_) => assert!(threads <= limit_of_threads(), "{threads}"),
            Err(Error::TooManyThreads { threads: got, limit }) => {
                assert_eq!((got, limit), (threads, limit_of_threads()));
                assert!(threads > limit);
            }
            Err(error) => panic!("{threads}: {error}"),
        }
    }
}

/// Largest number of threads of a CPU device.
fn limit_of_threads() -> usize {
    match Device::cpu_with_threads(usize::MAX) {
        Err(Error::TooManyThreads { limit, .. }) => limit,
        other => panic!("{other:?}"),
    }
}
