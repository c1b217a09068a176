//! Tests of the oracle against values computed by hand, and of standard attention against the oracle.

use flash_attention::Attention;
use flash_attention::reference::{Dims, backward, forward, standard, standard_backward};
use half::{bf16, f16};

use crate::common::{largest_error, noise};

/// Makes the Dims of one head.
fn one_head(attention: Attention, seqlen_q: usize, seqlen_k: usize, head_dim: usize) -> Dims {
    Dims::new(&attention, [1, 1, seqlen_q, head_dim], [1, 1, seqlen_k, head_dim])
}

#[test]
fn two_keys_worked_out_by_hand() {
    // Scores ln 3 and 0: weights 3/4 and 1/4, and a sum of exponentials of 4.
    let dims = one_head(Attention::new().softmax_scale(1.0), 1, 2, 2);
    let (out, lse) = forward(
        &dims,
        &[3.0_f64.ln(), 0.0],
        &[1.0, 7.0, 0.0, 7.0],
        &[4.0, 8.0, 0.0, -8.0],
    );
    assert!((out[0] - 3.0).abs() < 1e-15 && (out[1] - 4.0).abs() < 1e-15, "{out:?}");
    assert!((lse[0] - 4.0_f64.ln()).abs() < 1e-15, "{lse:?}");
}

#[test]
fn equal_scores_average_what_is_visible() {
    let (q, k, v) = ([0.0; 4], [1.0; 3], [3.0, 6.0, 12.0]);
    let full = one_head(Attention::new(), 4, 3, 1);
    assert_eq!(forward(&full, &q, &k, &v).0, [7.0; 4]);
    // Four queries, three keys: the first sees none, the last all.
    let causal = one_head(Attention::new().causal(), 4, 3, 1);
    let (out, lse) = forward(&causal, &q, &k, &v);
    assert_eq!(out, [0.0, 3.0, 4.5, 7.0]);
    assert_eq!(lse, [f64::NEG_INFINITY, 0.0, 2.0_f64.ln(), 3.0_f64.ln()]);
}

#[test]
fn query_heads_share_key_heads_in_order() {
    let dims = Dims::new(&Attention::new(), [2, 4, 1, 1], [2, 2, 1, 1]);
    let (out, _) = forward(&dims, &[0.0; 8], &[0.0; 4], &[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(out, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
}

#[test]
fn large_scores_do_not_overflow() {
    let dims = one_head(Attention::new().softmax_scale(1.0), 1, 2, 1);
    let (out, lse) = forward(&dims, &[1e3], &[1e3, 1e3 - 1.0], &[1.0, 0.0]);
    assert_eq!((out[0], lse[0]), (1.0, 1e6));
}

#[test]
fn standard_attention_rounds_as_its_dtype_does() {
    let dims = one_head(Attention::new(), 1, 3, 1);
    let third = |x: f64| f16::from_f64(x);
    let (out, lse) = standard(
        &dims,
        &[f16::ZERO],
        &[f16::ZERO; 3],
        &[third(1.0), third(1.0), third(1.0)],
    );
    // Each weight is 1/3 rounded to f16, so the output is 3 times that, rounded again; lse is taken in f32.
    let weight = f16::from_f32(1.0 / 3.0).to_f32();
    assert_eq!(out[0], f16::from_f32(3.0 * weight));
    assert_eq!(lse[0], 3.0_f32.ln());
    let (out, lse) = standard(&dims, &[0.0_f32], &[0.0; 3], &[1.0, 2.0, 3.0]);
    assert!((out[0] - 2.0).abs() < 1e-6 && (lse[0] - 3.0_f32.ln()).abs() < 1e-6);
}

/// Returns q, k, v and dout of a problem.
fn tensors(q: [usize; 4], k: [usize; 4]) -> [Vec<f64>; 4] {
    let size = |shape: [usize; 4]| shape.iter().product::<usize>();
    [
        noise(size(q), 1),
        noise(size(k), 2),
        noise(size(k), 3),
        noise(size(q), 4),
    ]
}

#[test]
fn gradients_are_the_slopes_of_forward() {
    for (q_shape, k_shape) in [
        ([1, 1, 5, 3], [1, 1, 7, 3]),
        ([1, 1, 7, 3], [1, 1, 4, 3]),
        ([2, 4, 3, 2], [2, 2, 4, 2]),
        ([1, 3, 4, 2], [1, 1, 4, 2]),
    ] {
        for scale in [1.0, -0.7, 0.0, 2.5] {
            for attention in [Attention::new(), Attention::new().causal()] {
                let dims = Dims::new(&attention.softmax_scale(scale), q_shape, k_shape);
                check_slopes(&dims, tensors(q_shape, k_shape));
            }
        }
    }
}

/// Checks gradients against central differences of dot(dout, out) in every element of q, k and v.
fn check_slopes(dims: &Dims, [q, k, v, dout]: [Vec<f64>; 4]) {
    const STEP: f64 = 1e-5; // error: about STEP^2, and about 1e-15 / STEP
    let gradients = backward(dims, &q, &k, &v, &dout);
    let inputs = [q, k, v];
    for (which, gradient) in gradients.iter().enumerate() {
        assert_eq!(gradient.len(), inputs[which].len());
        for (index, &got) in gradient.iter().enumerate() {
            let loss_at = |step: f64| {
                let mut moved = inputs.clone();
                moved[which][index] += step;
                let (out, _) = forward(dims, &moved[0], &moved[1], &moved[2]);
                out.iter().zip(&dout).map(|(out, dout)| out * dout).sum::<f64>()
            };
            let slope = (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP);
            assert!(
                (got - slope).abs() < 1e-8,
                "d{} element {index}: {got}, slope {slope}, {dims:?}",
                ["q", "k", "v"][which]
            );
        }
    }
}

#[test]
fn what_sees_nothing_has_no_gradient() {
    // Four queries, two keys: the first two queries see none.
    let dims = one_head(Attention::new().causal(), 4, 2, 2);
    let [q, k, v, dout] = tensors([1, 1, 4, 2], [1, 1, 2, 2]);
    let [dq, dk, dv] = backward(&dims, &q, &k, &v, &dout);
    assert_eq!(dq[..4], [0.0; 4]);
    let later = one_head(Attention::new().causal(), 2, 2, 2);
    let of_later = backward(&later, &q[4..], &k, &v, &dout[4..]);
    assert_eq!([dq[4..].to_vec(), dk, dv], of_later);
}

#[test]
fn standard_gradients_are_off_by_their_dtype() {
    fn check<T: flash_attention::Element>(bounds: std::ops::Range<f64>) {
        let (q_shape, k_shape) = ([2, 4, 33, 16], [2, 2, 40, 16]);
        let dims = Dims::new(&Attention::new().causal(), q_shape, k_shape);
        let rounded = tensors(q_shape, k_shape).map(|data| data.into_iter().map(T::from_f64).collect::<Vec<T>>());
        let [q, k, v, dout] = rounded
            .each_ref()
            .map(|data| data.iter().map(|x| x.to_f64()).collect::<Vec<f64>>());
        let want = backward(&dims, &q, &k, &v, &dout);
        let [q, k, v, dout] = &rounded;
        let got = standard_backward(&dims, q, k, v, dout);
        for (got, want) in got.iter().zip(&want) {
            let largest = want.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
            let error = largest_error(got, want) / largest;
            assert!(bounds.contains(&error), "{}: {error:e}", T::DTYPE.name());
        }
    }
    // A few rounding errors of the largest gradient, for types of 24, 11 and 8 bits.
    check::<f32>(1e-9..1e-6);
    check::<f16>(1e-5..3e-3);
    check::<bf16>(1e-4..2e-2);
}

#[test]
fn standard_gradients_round_as_their_dtype_does() {
    // One query, three equal keys: P is 1/3 rounded, dP is dout * v, and dV is P * dout.
    let dims = one_head(Attention::new(), 1, 3, 1);
    let half = f16::from_f32;
    let [dq, dk, dv] = standard_backward(&dims, &[half(2.0)], &[half(1.0); 3], &[half(3.0); 3], &[half(1.0)]);
    let third = half(1.0 / 3.0).to_f32();
    assert_eq!(dv, [half(third); 3]);
    let ds = half(third * (3.0 - 3.0 * (third * 3.0))).to_f32(); // not 0, because the probabilities do not add up to 1
    assert_eq!(dk, [half(2.0 * ds); 3]);
    assert_eq!(dq, [half(3.0 * ds)]);
}
