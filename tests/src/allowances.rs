//! [`Allowances`]: errors that a case at the ends of the range may have beside the rule.

use flash_attention::reference::{self, Dims};
use flash_attention::{Element, half::f16};

use crate::{Case, Inputs, largest_error};

/// Errors that a case may have beside the rule. A test names those that its cases cannot do without; docs/numbers.md
/// lists these tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowances {
    /// The rule counts the largest error of standard attention over four orders of head_dim's columns. Where scores are large, few
    /// queries weigh more than one key, so that the largest error in one order is a matter of luck.
    pub orders: bool,
    /// The rounding of delta. It shows where one key has all the weight of a query: the gradient of its score, `dP - delta`, is
    /// then zero in standard attention.
    pub delta: bool,
    /// The rule counts standard attention in f32, rounded to f16, where standard attention in f16 gives no finite number,
    /// because scores are above 65504.
    pub overflow: bool,
}

impl Allowances {
    /// The rounding of delta alone.
    pub const DELTA: Self = Self {
        orders: false,
        delta: true,
        overflow: false,
    };

    /// Returns the largest errors allowed for out and lse.
    pub(crate) fn bounds<T: Element>(self, inputs: &Inputs<T>, dims: &Dims, out: &[f64], lse: &[f64]) -> [f64; 2] {
        self.twice_largest(|order| {
            let (inputs, out) = (inputs.rotated(dims, order), rotated(out, dims.head_dim_v, order));
            let errors = inputs.standard_errors(dims, &out, lse);
            if !self.overflow || errors.iter().all(|error| error.is_finite()) {
                return errors;
            }
            let inputs = inputs.in_f32();
            let (standard_out, standard_lse) = reference::standard(dims, &inputs.q, &inputs.k, &inputs.v);
            [
                largest_error(&to_f16(&standard_out), &out),
                largest_error(&standard_lse, lse),
            ]
        })
    }

    /// Returns the largest errors allowed for dq, dk and dv.
    pub(crate) fn gradient_bounds<T: Element>(
        self,
        case: &Case,
        inputs: &Inputs<T>,
        dout: &[T],
        oracle: &[Vec<f64>; 3],
    ) -> [f64; 3] {
        let dims = case.dims();
        let mut bounds = self.twice_largest(|order| {
            let (inputs, dout) = (inputs.rotated(&dims, order), rotated(dout, dims.head_dim_v, order));
            let [dq, dk, dv] = oracle;
            let oracle = [(dq, dims.head_dim), (dk, dims.head_dim), (dv, dims.head_dim_v)]
                .map(|(gradient, head_dim)| rotated(gradient, head_dim, order));
            let errors = inputs.standard_gradient_errors(case, &dout, &oracle);
            if !self.overflow || errors.iter().all(|error| error.is_finite()) {
                return errors;
            }
            let inputs = inputs.in_f32();
            let dout: Vec<f32> = dout.iter().map(|x| x.to_f32()).collect();
            let standard = reference::standard_backward(&case.dims(), &inputs.q, &inputs.k, &inputs.v, &dout);
            std::array::from_fn(|i| largest_error(&to_f16(&standard[i]), &oracle[i]))
        });
        if self.delta {
            let limits = inputs.delta_limits(case, dout);
            bounds[0] += limits[0];
            bounds[1] += limits[1];
        }
        bounds
    }

    /// Applies the rule to the largest of the errors that standard attention has in each order of columns.
    fn twice_largest<const N: usize>(self, errors: impl Fn(usize) -> [f64; N]) -> [f64; N] {
        let orders = if self.orders { 4 } else { 1 };
        let errors: Vec<[f64; N]> = (0..orders).map(errors).collect();
        std::array::from_fn(|i| 2.0 * errors.iter().fold(0.0, |largest, errors| errors[i].max(largest)) + 1e-5)
    }
}

fn to_f16(numbers: &[f32]) -> Vec<f16> {
    numbers.iter().map(|&x| f16::from_f32(x)).collect()
}

/// Rotates the columns of every row by `order` quarters of it.
fn rotated<E: Copy>(rows: &[E], head_dim: usize, order: usize) -> Vec<E> {
    let mut rows = rows.to_vec();
    rows.chunks_mut(head_dim)
        .for_each(|row| row.rotate_left(order * head_dim / 4));
    rows
}

impl<T: Element> Inputs<T> {
    /// Returns q, k and v with rotated columns. Exact results are the same, with rotated columns.
    fn rotated(&self, dims: &Dims, order: usize) -> Self {
        let (head_dim, head_dim_v) = (dims.head_dim, dims.head_dim_v);
        let [q, k, v] = [(&self.q, head_dim), (&self.k, head_dim), (&self.v, head_dim_v)]
            .map(|(rows, head_dim)| rotated(rows, head_dim, order));
        Self { q, k, v }
    }

    /// Returns q, k and v in f32.
    fn in_f32(&self) -> Inputs<f32> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|elements| elements.iter().map(|x| x.to_f32()).collect());
        Inputs { q, k, v }
    }

    /// Returns the largest changes of dq and dk by the rounding of delta. The case has no score program.
    ///
    /// delta is `sum(dout * out)` with out in its dtype, where standard attention sums `P * dP`. The gradient of a score may
    /// differ by twice the [`delta_errors`] of its query times its weight.
    fn delta_limits(&self, case: &Case, dout: &[T]) -> [f64; 2] {
        let (dims, head_dim, head_dim_v) = (case.dims(), case.q[3], case.head_dim_v);
        let [q, k, dout] = [&self.q[..], &self.k, dout].map(|data| data.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
        let (out, _) = self.oracle(&dims);
        let row = |data: &[f64], head_dim: usize, row: usize| data[row * head_dim..][..head_dim].to_vec();
        let (mut largest_dq, mut dk) = (0.0_f64, vec![0.0; k.len()]);
        for query in 0..out.len() / head_dim_v {
            let [shared, own] = delta_errors::<T>(&row(&dout, head_dim_v, query), &row(&out, head_dim_v, query));
            let [shared, own] = [shared, own].map(|error| 2.0 * f64::from(dims.softmax_scale).abs() * error);
            let query_row = row(&q, head_dim, query);
            let (mut mean, mut mean_of_sizes) = (vec![0.0; head_dim], vec![0.0; head_dim]);
            for (key, weight) in weights(&dims, &query_row, &k, query) {
                for d in 0..head_dim {
                    mean[d] += weight * k[key * head_dim + d];
                    mean_of_sizes[d] += weight * k[key * head_dim + d].abs();
                    dk[key * head_dim + d] += (shared + own) * weight * query_row[d].abs();
                }
            }
            let dq = mean
                .iter()
                .zip(mean_of_sizes)
                .map(|(mean, size)| shared * mean.abs() + own * size);
            largest_dq = dq.fold(largest_dq, f64::max);
        }
        [largest_dq, dk.into_iter().fold(0.0, f64::max)]
    }
}

/// Returns errors of `dP - delta` of a query: what rounding takes from out, which all keys share, and an f32 rounding of each
/// product, which each key has of its own.
fn delta_errors<T: Element>(dout: &[f64], out: &[f64]) -> [f64; 2] {
    let pairs = || dout.iter().zip(out);
    let taken = |(x, &out): (&f64, &f64)| x * (T::from_f32(out as f32).to_f64() - out);
    let products: f64 = pairs().map(|(x, out)| (x * out).abs()).sum();
    [
        pairs().map(taken).sum::<f64>().abs(),
        products * f64::from(f32::EPSILON),
    ]
}

/// Returns the keys that a query sees, as rows of all keys, with the weight of each. Queries are counted over all heads.
fn weights(dims: &Dims, q: &[f64], k: &[f64], query: usize) -> Vec<(usize, f64)> {
    assert!(dims.program.is_none(), "weights of a score program");
    let (heads, position) = (query / dims.seqlen_q, query % dims.seqlen_q);
    let group = dims.heads_q / dims.heads_kv;
    let first = heads / group * dims.seqlen_k;
    let seen = match dims.causal {
        true => (position + 1 + dims.seqlen_k).saturating_sub(dims.seqlen_q),
        false => dims.seqlen_k,
    };
    let score = |key: usize| {
        let products = q.iter().zip(&k[key * dims.head_dim..]).map(|(q, k)| q * k);
        f64::from(dims.softmax_scale) * products.sum::<f64>()
    };
    let scores: Vec<f64> = (first..first + seen).map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let weight = |score: f64| (score - max).exp() / sum;
    (first..).zip(scores.into_iter().map(weight)).collect()
}
