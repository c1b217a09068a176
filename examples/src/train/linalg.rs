//! Matrix products on all cores.

use ndarray::linalg::general_mat_mul;
use ndarray::parallel::prelude::*;
use ndarray::{Array2, ArrayView2, Axis};

/// Computes `a b`. Each thread of rayon computes some of its rows.
pub fn product(a: ArrayView2<f32>, b: ArrayView2<f32>) -> Array2<f32> {
    let mut result = Array2::zeros((a.nrows(), b.ncols()));
    let rows = a.nrows().div_ceil(rayon::current_num_threads()).max(1);
    result
        .axis_chunks_iter_mut(Axis(0), rows)
        .into_par_iter()
        .zip(a.axis_chunks_iter(Axis(0), rows))
        .for_each(|(mut result, a)| general_mat_mul(1.0, &a, &b, 0.0, &mut result));
    result
}
