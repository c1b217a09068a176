//! Tests of a workspace of the caller: for any content, gradients equal those with a workspace of ours.

use crate::common::noise;
use flash_attention::error::Error;
use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Element, Gradients, Output, Statistics, Tensor};

/// Runs backward twice in one dirty workspace, larger than needed, and once in one of ours: the bits must be equal.
fn check<T: Element>(device: &Device) {
    let draw = |shape: [usize; 4], seed| {
        let data: Vec<T> = noise(shape.iter().product(), seed)
            .into_iter()
            .map(T::from_f64)
            .collect();
        Tensor::from_slice(device, shape, &data).expect("small")
    };
    let (q, dout) = (draw([1, 2, 70, 64], 1), draw([1, 2, 70, 64], 2));
    let (k, v) = (draw([1, 1, 90, 64], 3), draw([1, 1, 90, 64], 4));
    let attention = Attention::new().causal().deterministic();
    let output = attention.forward(&q, &k, &v).expect("valid");
    let want = attention.backward(&q, &k, &v, &output, &dout).expect("valid");

    let plan = attention.plan_backward(&q, &k, &v, &output, &dout).expect("valid");
    let words = plan.workspace_bytes() as usize / 4;
    assert!(words > 0, "{device} needs none: nothing would be seen here");
    let mut workspace = Tensor::from_slice(device, [words + 5], &vec![f32::NAN; words + 5]).expect("small");
    let mut got = Gradients::new(
        draw([1, 2, 70, 64], 5),
        draw([1, 1, 90, 64], 6),
        draw([1, 1, 90, 64], 7),
    );
    for _ in 0..2 {
        attention
            .backward_into_with(&q, &k, &v, &output, &dout, &mut got, &mut workspace)
            .expect("valid");
        for (got, want) in [(&got.dq, &want.dq), (&got.dk, &want.dk), (&got.dv, &want.dv)] {
            assert_eq!(
                got.to_vec().expect("readable"),
                want.to_vec().expect("readable"),
                "{device}"
            );
        }
    }
}

#[test]
fn a_dirty_workspace_gives_the_same_gradients() {
    for device in [
        Device::cpu(),
        Device::emulator(Arch::Sm80),
        Device::emulator(Arch::Sm90a),
    ] {
        check::<f32>(&device);
        check::<f16>(&device);
    }
}

#[test]
fn a_workspace_is_apart_from_statistics_and_tables() {
    let device = Device::cpu();
    let zeros = |shape: &[usize]| Tensor::<f32>::zeros(&device, shape).expect("small");
    let (q, dout) = (zeros(&[1, 1, 64, 8]), zeros(&[1, 1, 64, 8]));
    let slopes = zeros(&[1]);
    let attention = Attention::new().alibi(&slopes);
    let mut output = attention.forward(&q, &q, &q).expect("valid");
    let Some(Statistics { row_max, row_sum }) = output.statistics.clone() else {
        panic!("forward gives statistics");
    };
    let plan = attention.plan_backward(&q, &q, &q, &output, &dout).expect("valid");
    let words = plan.workspace_bytes() as usize / 4;
    let room = zeros(&[words + 64]);
    let refused = |output: &Output<f32>, attention: &Attention| {
        let mut gradients = Gradients::new(zeros(&[1, 1, 64, 8]), zeros(&[1, 1, 64, 8]), zeros(&[1, 1, 64, 8]));
        let mut workspace = room.clone();
        let result = attention.backward_into_with(&q, &q, &q, output, &dout, &mut gradients, &mut workspace);
        match result {
            Err(Error::Aliased { argument, other }) => Some((argument, other)),
            Err(other) => panic!("{other}"),
            Ok(()) => None,
        }
    };
    assert_eq!(refused(&output, &attention), None);

    let shared = room
        .narrow(0, 0, 64)
        .and_then(|part| part.unsqueeze(0))
        .and_then(|part| part.unsqueeze(0));
    let shared = shared.expect("64 of them");
    let inside = |row_max: &Tensor<f32>, row_sum: &Tensor<f32>| {
        let (row_max, row_sum) = (row_max.clone(), row_sum.clone());
        Some(Statistics { row_max, row_sum })
    };
    output.statistics = inside(&shared, &row_sum);
    assert_eq!(refused(&output, &attention), Some(("workspace", "row_max")));
    output.statistics = inside(&row_max, &shared);
    assert_eq!(refused(&output, &attention), Some(("workspace", "row_sum")));
    output.statistics = inside(&row_max, &row_sum);

    let slopes = room.narrow(0, 0, 1).expect("one of them");
    let attention = Attention::new().alibi(&slopes);
    assert_eq!(refused(&output, &attention), Some(("workspace", "alibi_slopes")));
}
