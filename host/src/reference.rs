//! Attention as its definition says, to compare with: slow, readable, and holding all the scores of a query.
//!
//! [`forward`] and [`backward`] are the oracle, in f64. [`standard`] and [`standard_backward`] are what a framework
//! computes in the dtype of its tensors; how far it is from the oracle says how far any kernel of that dtype may be.

use flash_attention_kernels::mask::Mask;

use crate::element::Element;
use crate::options::Attention;

/// The sizes and options of a problem whose tensors are contiguous slices.
///
/// q and out are `[batch, heads_q, seqlen_q, head_dim]`, k and v `[batch, heads_kv, seqlen_k, head_dim]`, lse is
/// `[batch, heads_q, seqlen_q]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    /// Independent sequences.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Key and value heads; divides `heads_q`.
    pub heads_kv: usize,
    /// Length of the query sequence.
    pub seqlen_q: usize,
    /// Length of the key sequence.
    pub seqlen_k: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Whether query i sees only the keys up to `i + seqlen_k - seqlen_q`.
    pub causal: bool,
    /// What scores are multiplied by before the softmax.
    pub softmax_scale: f32,
}

impl Dims {
    /// The sizes of q and of k, as their shapes, and the options of a call.
    pub fn new(attention: &Attention, q: [usize; 4], k: [usize; 4]) -> Self {
        let ([batch, heads_q, seqlen_q, head_dim], [_, heads_kv, seqlen_k, _]) = (q, k);
        let (causal, softmax_scale) = (attention.is_causal(), attention.scale_for(head_dim));
        Self {
            batch,
            heads_q,
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            causal,
            softmax_scale,
        }
    }

    /// Keys that a query sees, from the first.
    fn visible(&self, row: usize) -> usize {
        let (seqlen_q, seqlen_k, row) = (self.seqlen_q as u32, self.seqlen_k as u32, row as u32);
        let end = if self.causal {
            Mask::<true>::new(seqlen_q, seqlen_k).keys_of(row).end
        } else {
            Mask::<false>::new(seqlen_q, seqlen_k).keys_of(row).end
        };
        end as usize
    }

    /// For every query, in order: its row in q, the keys it sees and their values.
    fn queries<'a, T>(&self, q: &'a [T], k: &'a [T], v: &'a [T]) -> impl Iterator<Item = Query<'a, T>> + use<'a, T> {
        let dims = *self;
        let rows = dims.batch * dims.heads_q * dims.seqlen_q;
        let row_of = move |tensor: &'a [T], row: usize| &tensor[row * dims.head_dim..][..dims.head_dim];
        (0..rows).map(move |row| {
            let (heads, position) = (row / dims.seqlen_q, row % dims.seqlen_q);
            let (batch, head) = (heads / dims.heads_q, heads % dims.heads_q);
            let kv_head = batch * dims.heads_kv + head / (dims.heads_q / dims.heads_kv);
            let first = kv_head * dims.seqlen_k;
            let keys = (first..first + dims.visible(position))
                .map(|key| row_of(k, key))
                .collect();
            let values = (first..first + dims.visible(position))
                .map(|key| row_of(v, key))
                .collect();
            Query {
                row,
                heads,
                first_key: first,
                q: row_of(q, row),
                keys,
                values,
            }
        })
    }
}

/// One query and what it sees.
struct Query<'a, T> {
    /// Its row in q, out and their gradients, all heads counted.
    row: usize,
    /// Its head, all batches counted.
    heads: usize,
    /// The row of its first key in k, v and their gradients, all heads counted.
    first_key: usize,
    q: &'a [T],
    keys: Vec<&'a [T]>,
    values: Vec<&'a [T]>,
}

/// Attention in f64: `(out, lse)`.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn forward(dims: &Dims, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let scale = f64::from(dims.softmax_scale);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in dims.queries(q, k, v) {
        if query.keys.is_empty() {
            out.extend(std::iter::repeat_n(0.0, dims.head_dim));
            lse.push(f64::NEG_INFINITY);
            continue;
        }
        let dot = |key: &&[f64]| query.q.iter().zip(*key).map(|(x, y)| x * y).sum::<f64>();
        let scores: Vec<f64> = query.keys.iter().map(|key| scale * dot(key)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend((0..dims.head_dim).map(|d| {
            weights
                .iter()
                .zip(&query.values)
                .map(|(weight, value)| weight / sum * value[d])
                .sum::<f64>()
        }));
        lse.push(log_sum_exp(scores, max, sum));
    }
    (out, lse)
}

/// Standard attention in the dtype `T`, `(out, lse)`, as PyTorch's math backend computes it: scores are rounded to `T`,
/// the softmax is taken in f32 and rounded to `T`, products are summed in f32 and rounded to `T`.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn standard<T: Element>(dims: &Dims, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in dims.queries(q, k, v) {
        if query.keys.is_empty() {
            out.extend(std::iter::repeat_n(T::from_f32(0.0), dims.head_dim));
            lse.push(f32::NEG_INFINITY);
            continue;
        }
        let (weights, query_lse) = probabilities(dims, &query);
        out.extend((0..dims.head_dim).map(|d| {
            T::from_f32(
                weights
                    .iter()
                    .zip(&query.values)
                    .map(|(weight, value)| weight * value[d].to_f32())
                    .sum(),
            )
        }));
        lse.push(query_lse);
    }
    (out, lse)
}

/// Gradients of attention in f64, `[dq, dk, dv]`, for the gradient `dout` of its output. dk and dv are summed over the
/// query heads that share a key head; a query that sees no key has and gives none.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn backward(dims: &Dims, q: &[f64], k: &[f64], v: &[f64], dout: &[f64]) -> [Vec<f64>; 3] {
    let (scale, head_dim) = (f64::from(dims.softmax_scale), dims.head_dim);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|tensor| vec![0.0; tensor.len()]);
    for query in dims.queries(q, k, v) {
        let dout = &dout[query.row * head_dim..][..head_dim];
        let scores: Vec<f64> = query.keys.iter().map(|key| scale * dot(query.q, key)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let p: Vec<f64> = scores.iter().map(|score| (score - max).exp() / sum).collect();
        let dp: Vec<f64> = query.values.iter().map(|value| dot(dout, value)).collect();
        let delta = dot(&p, &dp); // which is dot(dout, out)
        let ds: Vec<f64> = p.iter().zip(&dp).map(|(p, dp)| p * (dp - delta)).collect();

        let dq = &mut dq[query.row * head_dim..][..head_dim];
        for (j, key) in query.keys.iter().enumerate() {
            let of_key = (query.first_key + j) * head_dim;
            for d in 0..head_dim {
                dq[d] += scale * ds[j] * key[d];
                dk[of_key + d] += scale * ds[j] * query.q[d];
                dv[of_key + d] += p[j] * dout[d];
            }
        }
    }
    [dq, dk, dv]
}

/// Standard attention's gradients in the dtype `T`, `[dq, dk, dv]`, as PyTorch's math backend computes them: P, dP, dS
/// and dS times the scale are each rounded to `T`, the softmax and its gradient are taken in f32, products are summed in
/// f32 and rounded to `T`. Where query heads share a key head, each has its gradients rounded before they are added up.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn standard_backward<T: Element>(dims: &Dims, q: &[T], k: &[T], v: &[T], dout: &[T]) -> [Vec<T>; 3] {
    let (scale, head_dim) = (dims.softmax_scale, dims.head_dim);
    let round = |x: f32| T::from_f32(x).to_f32();
    let of_queries = dims.batch * dims.heads_q * dims.seqlen_k * head_dim;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; of_queries], vec![0.0; of_queries]);
    for query in dims.queries(q, k, v) {
        if query.keys.is_empty() {
            continue;
        }
        let dout = &dout[query.row * head_dim..][..head_dim];
        let (p, _) = probabilities(dims, &query);
        let dp: Vec<f32> = query.values.iter().map(|value| round(dot(dout, value))).collect();
        let delta: f32 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        let ds: Vec<f32> = p
            .iter()
            .zip(&dp)
            .map(|(p, dp)| round(round(p * (dp - delta)) * scale))
            .collect();

        let dq = &mut dq[query.row * head_dim..][..head_dim];
        for (j, key) in query.keys.iter().enumerate() {
            let of_key = (query.heads * dims.seqlen_k + j) * head_dim;
            for d in 0..head_dim {
                dq[d] += ds[j] * key[d].to_f32();
                dk[of_key + d] += ds[j] * query.q[d].to_f32();
                dv[of_key + d] += p[j] * dout[d].to_f32();
            }
        }
    }
    let head = dims.seqlen_k * head_dim;
    let add_up = |gradient: Vec<f32>| -> Vec<T> {
        let groups = gradient.chunks(head * (dims.heads_q / dims.heads_kv));
        let sum = |group: &[f32], i: usize| group.chunks(head).map(|gradient| round(gradient[i])).sum::<f32>();
        groups
            .flat_map(|group| (0..head).map(move |i| T::from_f32(sum(group, i))))
            .collect()
    };
    [dq.into_iter().map(T::from_f32).collect(), add_up(dk), add_up(dv)]
}

/// The probabilities of a query's keys as a framework computes them in `T`, and lse. At least one key is visible.
fn probabilities<T: Element>(dims: &Dims, query: &Query<'_, T>) -> (Vec<f32>, f32) {
    let round = |x: f32| T::from_f32(x).to_f32();
    let scores: Vec<f32> = query
        .keys
        .iter()
        .map(|key| round(round(dot(query.q, key)) * dims.softmax_scale))
        .collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    let probabilities = exponentials.iter().map(|x| round(x / sum)).collect();
    let lse = log_sum_exp(scores.into_iter().map(f64::from), max.into(), sum.into());
    (probabilities, lse as f32)
}

/// A product summed in f32.
fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x.to_f32() * y.to_f32()).sum()
}

/// The logarithm of the sum of exponentials, `sum` being taken relative to the largest score. Where every score is minus
/// infinity that difference is NaN, but the sum is 0.
fn log_sum_exp(scores: impl IntoIterator<Item = f64>, max: f64, sum: f64) -> f64 {
    let nothing = scores.into_iter().all(|score| score == f64::NEG_INFINITY);
    if nothing { f64::NEG_INFINITY } else { max + sum.ln() }
}
