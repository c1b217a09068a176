//! Tests of a workspace of the caller: for any content, gradients equal those with a workspace of ours.

use crate::common::noise;
use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Element, Gradients, Tensor};

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
