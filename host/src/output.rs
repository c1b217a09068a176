//! Results of a call: [`Output`] of a forward pass, [`Gradients`] of a backward pass.

use crate::element::Element;
use crate::layout::TensorInfo;
use crate::tensor::Tensor;

/// Results of a forward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Output<T: Element> {
    /// Attention output, `[batch, heads_q, seqlen_q, head_dim]`. It is 0 for a query that sees no key.
    pub out: Tensor<T>,
    /// Natural logarithm of the sum of exponentials of each query's scaled scores, f32 `[batch, heads_q, seqlen_q]`.
    /// It is minus infinity for a query that sees no key. The backward pass needs it. `out` and `lse` suffice to
    /// merge attention over two sets of keys.
    pub lse: Tensor<f32>,
    /// Both parts of lse, without the rounding error of their sum. With `None` a backward pass uses lse alone. The
    /// weights it recomputes then have a relative error of up to `|lse| * 2^-24`, and none is above 1.
    pub statistics: Option<Statistics>,
}

impl<T: Element> Output<T> {
    /// Makes the results of a forward pass from `out` and `lse`, for callers who kept these themselves.
    pub fn new(out: Tensor<T>, lse: Tensor<f32>) -> Self {
        Self {
            out,
            lse,
            statistics: None,
        }
    }
}

/// Both parts of lse for each query: key j has the weight `exp(softmax_scale * (q.k_j - row_max)) / row_sum`.
///
/// lse is `softmax_scale * row_max + ln(row_sum)`, rounded to 24 bits. Where lse is large, few of these bits are left
/// for `row_sum`.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Largest product q.k, before scaling, of the key with the largest weight; contiguous `[batch, heads_q,
    /// seqlen_q]`. It is minus infinity for a query that sees no key.
    pub row_max: Tensor<f32>,
    /// Sum of the weights relative to the largest, contiguous `[batch, heads_q, seqlen_q]`. It is 0 for a query that
    /// sees no key.
    pub row_sum: Tensor<f32>,
}

impl Statistics {
    /// Descriptions of row_max and row_sum.
    pub(crate) fn infos(&self) -> [&TensorInfo; 2] {
        [self.row_max.info(), self.row_sum.info()]
    }
}

/// Results of a backward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gradients<T: Element> {
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`. It is 0 for a query that sees no key.
    pub dq: Tensor<T>,
    /// Gradient of k, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dk: Tensor<T>,
    /// Gradient of v, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dv: Tensor<T>,
}

impl<T: Element> Gradients<T> {
    /// Collects the caller's own tensors, for [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn new(dq: Tensor<T>, dk: Tensor<T>, dv: Tensor<T>) -> Self {
        Self { dq, dk, dv }
    }
}
