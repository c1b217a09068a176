//! Quantised inputs: their numbers in f64, and attention as a kernel of 8-bit products computes it.

use super::{Dims, log_sum_exp};
use crate::element::{F8E4M3, Half};
use crate::problem::FP8_SCALE_ROWS;

/// A contiguous quantised tensor: its codes, and the scales of its heads in order.
pub type Codes<'a> = (&'a [F8E4M3], &'a [f32]);

/// Number of keys after which a kernel may raise the reference of its exponentials.
const TILE: usize = 128;

/// Returns the numbers that a quantised tensor of this shape stands for, without rounding.
///
/// # Panics
/// If the codes or the scales are fewer than the shape needs.
pub fn dequantized(shape: [usize; 4], (codes, scales): Codes<'_>) -> Vec<f64> {
    let scale_of_row = row_scales(shape, scales);
    let head_dim = shape[3];
    let numbers = codes.iter().enumerate();
    numbers
        .map(|(index, &code)| f64::from(code) * scale_of_row(index / head_dim))
        .collect()
}

/// The scale of each row, all heads counted.
fn row_scales([batch, heads, seqlen, _]: [usize; 4], scales: &[f32]) -> impl Fn(usize) -> f64 {
    let blocks = scales.len() / (batch * heads).max(1);
    let rows = if blocks == 1 { seqlen } else { FP8_SCALE_ROWS as usize };
    move |row| scales[row / seqlen * blocks + row % seqlen / rows].into()
}

/// Computes attention as a kernel does that multiplies 8-bit numbers, `(out, lse)`: exponentials times the scales of their
/// values are rounded to e4m3 in units of a 256th of the largest one so far, in tiles of 128 keys, and out is rounded to `O`.
/// All else is in f64. Its distance from the oracle bounds the error allowed for such a kernel.
///
/// # Panics
/// If a slice is shorter than its shape, or there is a score program.
pub fn standard_fp8<O: Half>(dims: &Dims, q: Codes<'_>, k: Codes<'_>, v: Codes<'_>) -> (Vec<O>, Vec<f32>) {
    assert!(dims.program.is_none(), "kernels of 8 bits take no program");
    let q_shape = [dims.batch, dims.heads_q, dims.seqlen_q, dims.head_dim];
    let k_shape = [dims.batch, dims.heads_kv, dims.seqlen_k, dims.head_dim];
    let v_scale = row_scales(k_shape, v.1);
    let (q, k) = (dequantized(q_shape, q), dequantized(k_shape, k));
    let codes: Vec<f64> = v.0.iter().map(|&code| code.into()).collect();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in dims.queries(&q, &k, &codes) {
        let score = |key: &&[f64]| -> f64 {
            let product: f64 = query.q.iter().zip(*key).map(|(q, k)| q * k).sum();
            product * f64::from(dims.softmax_scale)
        };
        let scores: Vec<f64> = query.keys.iter().map(score).collect();
        let scales: Vec<f64> = (query.pairs.iter())
            .map(|pair| v_scale(query.first_key + pair.key as usize))
            .collect();
        let (mut max, mut sum, mut row) = (f64::NEG_INFINITY, 0.0, vec![0.0; dims.head_dim]);
        for first in (0..scores.len()).step_by(TILE) {
            let tile = first..(first + TILE).min(scores.len());
            let shares = || tile.clone().map(|i| scores[i] + scales[i].ln());
            let raised = shares().fold(max, f64::max);
            let rescale = if raised == max { 1.0 } else { (max - raised).exp() };
            max = raised;
            sum *= rescale;
            row.iter_mut().for_each(|x| *x *= rescale);
            for (i, share) in tile.clone().zip(shares()) {
                let weight = 256.0 * (share - max).exp();
                sum += weight / scales[i];
                let weight = f64::from(F8E4M3::from_f32(weight as f32));
                (row.iter_mut().zip(query.values[i])).for_each(|(x, value)| *x += weight * value);
            }
        }
        let inverse = if scores.is_empty() { 0.0 } else { 1.0 / sum };
        out.extend(row.iter().map(|x| O::from_f64(x * inverse)));
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        lse.push(log_sum_exp(scores, largest, total) as f32);
    }
    (out, lse)
}
