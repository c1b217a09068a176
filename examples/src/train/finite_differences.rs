//! Compares a gradient with the slope between two nearby points.

use ndarray::Array2;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;

/// Half the distance of the two points. It is large because an f32 loss has seven digits: the slope then has five,
/// and the third derivative adds less than that if arguments and derivatives are about 1.
const STEP: f32 = 1e-2;

/// Largest distance of a derivative from the slope, relative to the largest derivative of the tensor.
const TOLERANCE: f64 = 3e-3;

/// Checks every element of `gradient` against the slope of `loss` at `point`; `parameters` lists the tensors of both.
pub fn check<P>(mut point: P, parameters: fn(&mut P) -> Vec<&mut [f32]>, gradient: &mut P, loss: impl Fn(&P) -> f64) {
    for tensor in 0..parameters(&mut point).len() {
        let derivatives = parameters(gradient)[tensor].to_vec();
        assert_eq!(
            derivatives.len(),
            parameters(&mut point)[tensor].len(),
            "tensor {tensor}"
        );
        let largest = derivatives.iter().fold(0.0_f32, |largest, d| largest.max(d.abs()));
        for (i, &derivative) in derivatives.iter().enumerate() {
            let value = parameters(&mut point)[tensor][i];
            let mut loss_at = |value: f32| {
                parameters(&mut point)[tensor][i] = value;
                loss(&point)
            };
            let (right, left) = (value + STEP, value - STEP);
            let slope = (loss_at(right) - loss_at(left)) / f64::from(right - left);
            loss_at(value);
            let error = (slope - f64::from(derivative)).abs();
            assert!(
                error <= TOLERANCE * f64::from(largest) + 1e-5,
                "tensor {tensor}, element {i}: derivative {derivative}, slope {slope}, largest {largest}"
            );
        }
    }
}

/// Returns normally distributed numbers.
pub fn random(seed: u64, rows: usize, columns: usize) -> Array2<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || rng.sample(StandardNormal))
}

/// Computes a loss whose gradient is `weights`.
pub fn weighted_sum(y: &Array2<f32>, weights: &Array2<f32>) -> f64 {
    y.iter().zip(weights).map(|(&y, &w)| f64::from(y) * f64::from(w)).sum()
}

/// Lists the tensors of a matrix, for [`check`].
pub fn matrix(x: &mut Array2<f32>) -> Vec<&mut [f32]> {
    vec![x.as_slice_memory_order_mut().expect("it owns its memory")]
}
