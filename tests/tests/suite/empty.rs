//! Sequences, heads and batches of nothing: results are empty, or zeros with lse -inf, and gradients zeros, on every device.

use flash_attention::half::{bf16, f16};
use flash_attention::{Arch, Attention, Device, Element, Gradients, Output, Statistics, Tensor};
use flash_attention_tests::devices;

const HEAD_DIM: usize = 40;

/// Shapes of q and of k without head_dim: nothing of something, and something of nothing.
const SHAPES: [[[usize; 3]; 2]; 7] = [
    [[0, 2, 5], [0, 1, 7]],
    [[2, 0, 5], [2, 1, 7]],
    [[2, 0, 5], [2, 0, 7]],
    [[2, 4, 0], [2, 2, 7]],
    [[2, 4, 5], [2, 2, 0]],
    [[1, 4, 70], [1, 1, 0]],
    [[2, 4, 0], [2, 2, 0]],
];

/// A tensor of `value`, as `[batch, seqlen, heads, head_dim]` memory if `transposed`.
fn full<T: Element>(device: &Device, [batch, heads, seqlen]: [usize; 3], value: f32, transposed: bool) -> Tensor<T> {
    let data = vec![T::from_f32(value); batch * heads * seqlen * HEAD_DIM];
    if transposed {
        let tensor = Tensor::from_slice(device, [batch, seqlen, heads, HEAD_DIM], &data).expect("small");
        return tensor.transpose(1, 2).expect("an axis");
    }
    Tensor::from_slice(device, [batch, heads, seqlen, HEAD_DIM], &data).expect("small")
}

fn all<T: Element>(tensor: &Tensor<T>, value: f64) -> bool {
    tensor.to_vec().expect("read").iter().all(|x| x.to_f64() == value)
}

fn check_results<T: Element>(name: &str, output: &Output<T>, gradients: &Gradients<T>) {
    let nothing = f64::NEG_INFINITY;
    assert!(all(&output.out, 0.0), "{name}");
    assert!(all(&output.lse, nothing), "{name}");
    let Statistics { row_max, row_sum } = output.statistics.as_ref().expect("of every device");
    assert!(all(row_max, nothing) && all(row_sum, 0.0), "{name}");
    let Gradients { dq, dk, dv, .. } = gradients;
    assert!([dq, dk, dv].into_iter().all(|gradient| all(gradient, 0.0)), "{name}");
}

fn check<T: Element>(device: &Device, [q, kv]: [[usize; 3]; 2], attention: Attention) {
    let name = format!("{q:?} of {kv:?} in {} on {device}, {attention:?}", T::DTYPE.name());
    let inputs = |shape| full::<T>(device, shape, 0.5, false);
    let (q_in, k, v, dout) = (inputs(q), inputs(kv), inputs(kv), inputs(q));
    let output = attention.forward(&q_in, &k, &v).expect(&name);
    assert_eq!(
        (output.out.shape(), output.lse.shape()),
        (q_in.shape(), &q[..]),
        "{name}"
    );
    let gradients = attention.backward(&q_in, &k, &v, &output, &dout).expect(&name);
    assert_eq!(
        (gradients.dq.shape(), gradients.dv.shape()),
        (q_in.shape(), v.shape()),
        "{name}"
    );
    check_results(&name, &output, &gradients);

    // The caller's memory, whose rows lie apart, is written in place.
    let poisoned = |shape| full::<T>(device, shape, f32::NAN, true);
    let rows = || Tensor::from_slice(device, q, &vec![1.5_f32; q.iter().product()]).expect("small");
    let mut output = Output::new(poisoned(q), rows());
    output.statistics = Some(Statistics {
        row_max: rows(),
        row_sum: rows(),
    });
    attention.forward_into_output(&q_in, &k, &v, &mut output).expect(&name);
    let mut gradients = Gradients::new(poisoned(q), poisoned(kv), poisoned(kv));
    let plan = attention.plan_backward(&q_in, &k, &v, &output, &dout).expect(&name);
    let mut workspace = Tensor::empty(device, [plan.workspace_bytes() as usize / 4]).expect("small");
    attention
        .backward_into_with(&q_in, &k, &v, &output, &dout, &mut gradients, &mut workspace)
        .expect(&name);
    check_results(&name, &output, &gradients);

    let forward = attention.plan(&q_in, &k, &v).expect(&name);
    for printed in [forward.to_string(), plan.to_string()] {
        assert!(printed.contains("FLOPs     0.000 G"), "{name}: {printed}");
    }
}

#[test]
fn nothing_of_something() {
    for device in devices().all() {
        for shapes in SHAPES {
            for attention in [
                Attention::new(),
                Attention::new().causal(),
                Attention::new().softmax_scale(-1.0),
            ] {
                check::<f32>(device, shapes, attention.clone());
                check::<f16>(device, shapes, attention.clone());
                check::<bf16>(device, shapes, attention.deterministic());
            }
        }
    }
}

/// Empty views, and foreign memory of no bytes, which needs no address.
#[test]
fn tensors_of_nothing() {
    for device in devices().all() {
        let whole = full::<f32>(device, [1, 2, 6], 1.0, false);
        let none = whole.narrow(2, 6, 0).expect("in range");
        assert_eq!(
            (none.shape(), none.to_vec().expect("read")),
            (&[1, 2, 0, HEAD_DIM][..], vec![])
        );
        assert_eq!(
            none.transpose(1, 2)
                .and_then(|view| view.contiguous())
                .expect("nothing")
                .shape(),
            [1, 0, 2, HEAD_DIM]
        );
        // SAFETY: there is no element that could lie anywhere.
        let foreign =
            unsafe { Tensor::<f32>::from_raw_parts(device, 0, [1, 2, 0, HEAD_DIM], [0, 0, HEAD_DIM, 1], None) };
        let foreign = foreign.expect("no address is needed");
        let output = Attention::new().forward(&whole, &none, &foreign).expect("zeros");
        assert!(all(&output.out, 0.0) && all(&output.lse, f64::NEG_INFINITY), "{device}");
    }
}

/// An empty problem moves the bytes that its plan predicts.
#[test]
fn plans_of_nothing_predict_the_bytes_that_move() {
    if !devices().emulation() {
        return;
    }
    for device in &Arch::ALL.iter().map(|&arch| Device::emulator(arch)).collect::<Vec<_>>() {
        for [q, kv] in SHAPES {
            let inputs = |shape| full::<f16>(device, shape, 0.5, false);
            let (q, k, v, dout) = (inputs(q), inputs(kv), inputs(kv), inputs(q));
            let attention = Attention::new();
            let moved = || {
                let counters = device.counters().expect("it counts");
                device.reset_counters();
                (
                    u128::from(counters.global_read_bytes),
                    u128::from(counters.global_written_bytes),
                )
            };
            moved();
            let output = attention.forward(&q, &k, &v).expect("valid");
            let cost = attention.plan(&q, &k, &v).expect("valid").cost();
            assert_eq!(
                moved(),
                (cost.bytes_read, cost.bytes_written),
                "{device} {:?}",
                q.shape()
            );
            attention.backward(&q, &k, &v, &output, &dout).expect("valid");
            let cost = attention
                .plan_backward(&q, &k, &v, &output, &dout)
                .expect("valid")
                .cost();
            assert_eq!(
                moved(),
                (cost.bytes_read, cost.bytes_written),
                "{device} {:?}",
                q.shape()
            );
        }
    }
}
