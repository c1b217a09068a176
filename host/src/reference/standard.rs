//! Standard attention: computed as a framework does, in the dtype of its tensors.

use super::{AllGradients, Dims, Query, Slopes, log_sum_exp};
use crate::element::Element;
use crate::program::Pair;

/// Computes standard attention in the dtype `T`, `(out, lse)`, like PyTorch's math backend: scores are rounded to
/// `T`, the softmax is taken in f32 and rounded to `T`, products are summed in f32 and rounded to `T`.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn standard<T: Element>(dims: &Dims, q: &[T], k: &[T], v: &[T]) -> (Vec<T>, Vec<f32>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in dims.queries(q, k, v) {
        let Probabilities {
            kept: weights,
            lse: query_lse,
            ..
        } = probabilities(dims, &query);
        out.extend((0..dims.head_dim_v).map(|d| {
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

/// Computes the gradients of standard attention in the dtype `T`, `[dq, dk, dv]`, like PyTorch's math backend: P, dP,
/// dS and dS times the scale are each rounded to `T`, the softmax and its gradient are computed in f32, products are
/// summed in f32 and rounded to `T`. Query heads that share a key head have their gradients rounded before they are
/// added.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn standard_backward<T: Element>(dims: &Dims, q: &[T], k: &[T], v: &[T], dout: &[T]) -> [Vec<T>; 3] {
    let AllGradients { dq, dk, dv, .. } = standard_backward_with_tables(dims, q, k, v, dout, false);
    [dq, dk, dv]
}

/// [`standard_backward`], with the gradients of sinks and, if they are asked for, of the program's tables: sums of dS
/// as it was rounded to `T`.
///
/// # Panics
/// If a slice is shorter than its shape, or the program has no derivative.
pub fn standard_backward_with_tables<T: Element>(
    dims: &Dims,
    q: &[T],
    k: &[T],
    v: &[T],
    dout: &[T],
    of_tables: bool,
) -> AllGradients<T> {
    let (scale, head_dim, head_dim_v) = (dims.softmax_scale, dims.head_dim, dims.head_dim_v);
    let round = |x: f32| T::from_f32(x).to_f32();
    let rows = dims.batch * dims.heads_q * dims.seqlen_k; // of keys for each query head
    let (mut dq, mut dk, mut dv) = (
        vec![0.0; q.len()],
        vec![0.0; rows * head_dim],
        vec![0.0; rows * head_dim_v],
    );
    let mut slopes = Slopes::new(dims, of_tables);
    let mut dsinks = vec![0.0; dims.heads_q];
    for query in dims.queries(q, k, v) {
        let dout = &dout[query.row * head_dim_v..][..head_dim_v];
        let Probabilities {
            scaled,
            weights: p,
            kept,
            of_sink,
            ..
        } = probabilities(dims, &query);
        let of_pairs = query.values.iter().zip(&query.kept);
        let dp: Vec<f32> = of_pairs
            .map(|(value, &kept)| round(round(dot(dout, value)) * kept as f32))
            .collect();
        let delta: f32 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        dsinks[query.heads % dims.heads_q] -= f64::from(of_sink * delta);

        let dq = &mut dq[query.row * head_dim..][..head_dim];
        for (j, (key, pair)) in query.keys.iter().zip(&query.pairs).enumerate() {
            let row = query.heads * dims.seqlen_k + pair.key as usize;
            let (of_key, of_value) = (row * head_dim, row * head_dim_v);
            let dy = round(p[j] * (dp[j] - delta));
            let ds = round(round(slopes.pull_back(pair, scaled[j].into(), dy.into()) as f32) * scale);
            for d in 0..head_dim {
                dq[d] += ds * key[d].to_f32();
                dk[of_key + d] += ds * query.q[d].to_f32();
            }
            for d in 0..head_dim_v {
                dv[of_value + d] += kept[j] * dout[d].to_f32();
            }
        }
    }
    let add_up = |gradient: Vec<f32>, width: usize| -> Vec<T> {
        let head = dims.seqlen_k * width;
        let groups = gradient.chunks((head * (dims.heads_q / dims.heads_kv)).max(1));
        let sum = |group: &[f32], i: usize| group.chunks(head).map(|gradient| round(gradient[i])).sum::<f32>();
        groups
            .flat_map(|group| (0..head).map(move |i| T::from_f32(sum(group, i))))
            .collect()
    };
    AllGradients {
        dq: dq.into_iter().map(T::from_f32).collect(),
        dk: add_up(dk, head_dim),
        dv: add_up(dv, head_dim_v),
        tables: slopes.tables,
        table_terms: slopes.terms,
        sinks: dims.has_sinks().then_some(dsinks),
    }
}

/// Softmax of a query, computed like a framework.
struct Probabilities {
    /// Scaled scores.
    scaled: Vec<f32>,
    /// One probability a pair.
    weights: Vec<f32>,
    /// Probabilities after dropout.
    kept: Vec<f32>,
    /// The probability of the sink.
    of_sink: f32,
    lse: f32,
}

/// Computes the probabilities of a query's keys like a framework in `T`, and lse. Programs are evaluated in f32.
fn probabilities<T: Element>(dims: &Dims, query: &Query<'_, T>) -> Probabilities {
    let round = |x: f32| T::from_f32(x).to_f32();
    let scaled: Vec<f32> = query
        .keys
        .iter()
        .map(|key| round(round(dot(query.q, key)) * dims.softmax_scale))
        .collect();
    let taken = |(pair, &score): (&Pair, &f32)| round(dims.score(pair, score.into(), |x| f64::from(x as f32)) as f32);
    let scores: Vec<f32> = query.pairs.iter().zip(&scaled).map(taken).collect();
    let sink = query.sink.map(|sink| sink as f32);
    let max = scores.iter().copied().chain(sink).fold(f32::NEG_INFINITY, f32::max);
    if scores.is_empty() || (dims.program.is_some() && max == f32::NEG_INFINITY) {
        return Probabilities {
            weights: vec![0.0; scores.len()],
            kept: vec![0.0; scores.len()],
            of_sink: sink.map_or(0.0, |_| 1.0),
            scaled,
            lse: sink.unwrap_or(f32::NEG_INFINITY),
        };
    }
    let exponentials: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let of_sink = sink.map_or(0.0, |sink| (sink - max).exp());
    let sum: f32 = exponentials.iter().sum::<f32>() + of_sink;
    let weights: Vec<f32> = exponentials.iter().map(|x| round(x / sum)).collect();
    let kept = weights
        .iter()
        .zip(&query.kept)
        .map(|(x, &kept)| round(x * kept as f32))
        .collect();
    let lse = log_sum_exp(scores.into_iter().chain(sink).map(f64::from), max.into(), sum.into());
    Probabilities {
        scaled,
        weights,
        kept,
        of_sink: of_sink / sum,
        lse: lse as f32,
    }
}

/// Computes a dot product in f32.
fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x.to_f32() * y.to_f32()).sum()
}
