//! Tests of f32 numbers of all sizes on the CPU: with every instruction set the relative error is bounded.

use crate::common::{gradients, instruction_sets, noise};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Tensor};

const SHAPE: [usize; 4] = [1, 2, 100, 40];
const HEAD_DIM: usize = SHAPE[3];

/// Returns numbers around 1, each times a factor of its row and column.
fn draw(seed: u64, factor: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    let numbers = noise(SHAPE.iter().product(), seed).into_iter().enumerate();
    numbers
        .map(|(i, x)| 2.0 * x as f32 * factor(i / HEAD_DIM, i % HEAD_DIM))
        .collect()
}

fn wide(data: &[f32]) -> Vec<f64> {
    data.iter().map(|&x| f64::from(x)).collect()
}

/// Returns the largest error of a column relative to the column's largest number, for the worst column.
fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    let of_column = |column: usize| {
        let places = || (column..want.len()).step_by(HEAD_DIM);
        let error = places()
            .map(|i| (f64::from(got[i]) - want[i]).abs())
            .fold(0.0, f64::max);
        error / places().map(|i| want[i].abs()).fold(0.0, f64::max)
    };
    (0..HEAD_DIM).map(of_column).fold(0.0, f64::max)
}

fn check_forward(device: &Device, attention: Attention, case: &str, [q, k, v]: [&[f32]; 3]) {
    let (want, _) = reference::forward(&Dims::new(&attention, SHAPE, SHAPE), &wide(q), &wide(k), &wide(v));
    let [q, k, v] = [q, k, v].map(|data| Tensor::from_slice(device, SHAPE, data).expect("small"));
    let got = attention.forward(&q, &k, &v).expect("valid").out.to_vec().expect("cpu");
    let error = relative_error(&got, &want);
    assert!(error <= 2e-6, "{device}, {case}: out is off by a share of {error:e}");
}

#[test]
fn values_of_every_size() {
    let [q, k] = [1, 2].map(|seed| draw(seed, |_, _| 1.0));
    for device in instruction_sets() {
        for attention in [Attention::new(), Attention::new().causal()] {
            let check = |case: &str, factor: &dyn Fn(usize, usize) -> f32| {
                check_forward(device, attention.clone(), case, [&q, &k, &draw(3, factor)]);
            };
            check("all are 1e-36", &|_, _| 1e-36);
            check("all are 1e36", &|_, _| 1e36);
            check("every column its own", &|_, column| 10_f32.powi(20 - column as i32));
            check("one in seven is 1e-20", &|row, _| {
                if row % 7 == 3 { 1e-20 } else { 1.0 }
            });
            check("the last is 1e30", &|row, _| if row % 100 == 99 { 1e30 } else { 1.0 });
        }
    }
}

#[test]
fn queries_and_keys_of_every_size() {
    let v = draw(3, |_, _| 1.0);
    for device in instruction_sets() {
        for attention in [Attention::new(), Attention::new().causal()] {
            let check = |case: &str, of_q: &dyn Fn(usize, usize) -> f32, of_k: &dyn Fn(usize, usize) -> f32| {
                check_forward(device, attention.clone(), case, [&draw(1, of_q), &draw(2, of_k), &v]);
            };
            check("small with large", &|_, _| 1e-18, &|_, _| 1e18);
            check(
                "large with small",
                &|_, column| 10_f32.powi(column as i32 - 20),
                &|_, column| 10_f32.powi(20 - column as i32),
            );
            check("some keys", &|_, _| 1.0, &|row, _| {
                if row % 9 == 4 { 1e-30 } else { 1.0 }
            });
            check(
                "some queries",
                &|row, _| if row % 9 == 4 { 1e-30 } else { 1.0 },
                &|_, _| 1.0,
            );
        }
    }
}

#[test]
fn gradients_of_every_size() {
    for device in instruction_sets() {
        for (q_is, v_is, dout_is) in [
            (1.0, 1.0, 1e-30),
            (1.0, 1e-18, 1e-18),
            (1e-15, 1.0, 1.0),
            (1.0, 1e20, 1e-20),
        ] {
            let [q, k] = [draw(1, |_, _| q_is), draw(2, |_, _| 1.0 / q_is)];
            let [v, dout] = [draw(3, |_, _| v_is), draw(4, |_, _| dout_is)];
            let attention = Attention::new().causal();
            let dims = Dims::new(&attention, SHAPE, SHAPE);
            let want = reference::backward(&dims, &wide(&q), &wide(&k), &wide(&v), &wide(&dout));
            let got = gradients(device, attention, [SHAPE, SHAPE], [&q, &k, &v, &dout]);
            for (name, (got, want)) in ["dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                let error = relative_error(got, want);
                assert!(
                    error <= 1e-5,
                    "{device}, q {q_is:e}, v {v_is:e}, dout {dout_is:e}: {name} is off by a share of {error:e}"
                );
            }
        }
    }
}
