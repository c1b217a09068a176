//! Results of a call: [`Output`] of a forward pass, [`Gradients`] of a backward pass.

use crate::element::Element;
use crate::tensor::Tensor;

/// Results of a forward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Output<T: Element> {
    /// The attention output, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub out: Tensor<T>,
    /// For each query the natural logarithm of the sum of exponentials of its scaled scores, f32 `[batch, heads_q,
    /// seqlen_q]`. A query that sees no key has minus infinity. The backward pass needs it, and out and lse are all that is
    /// needed to merge attention over two sets of keys.
    pub lse: Tensor<f32>,
    /// lse in two numbers, without its rounding error. `None`: a backward pass has lse alone, and recomputes weights with
    /// a relative error of up to `|lse| * 2^-24`, none of them above 1.
    pub statistics: Option<Statistics>,
}

impl<T: Element> Output<T> {
    /// The results of a forward pass as the backward pass takes them, for callers who kept out and lse themselves.
    pub fn new(out: Tensor<T>, lse: Tensor<f32>) -> Self {
        Self {
            out,
            lse,
            statistics: None,
        }
    }
}

/// Both parts of lse, for each query: key j weighs `exp(softmax_scale * (q.k_j - row_max)) / row_sum`.
///
/// lse is `softmax_scale * row_max + ln(row_sum)`, rounded to 24 bits; where lse is large, few of them describe `row_sum`.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Product q.k, before it is scaled, of the key that weighs most, contiguous `[batch, heads_q, seqlen_q]`. A query that
    /// sees no key has minus infinity.
    pub row_max: Tensor<f32>,
    /// Sum of the weights relative to that key's, contiguous `[batch, heads_q, seqlen_q]`. A query that sees no key has 0.
    pub row_sum: Tensor<f32>,
}

/// Results of a backward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gradients<T: Element> {
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub dq: Tensor<T>,
    /// Gradient of k, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dk: Tensor<T>,
    /// Gradient of v, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dv: Tensor<T>,
}

impl<T: Element> Gradients<T> {
    /// The caller's own tensors, for [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn new(dq: Tensor<T>, dk: Tensor<T>, dv: Tensor<T>) -> Self {
        Self { dq, dk, dv }
    }
}
