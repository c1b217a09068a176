//! Results of a call: [`Output`] of a forward pass, [`Gradients`] of a backward pass.

use crate::element::Element;
use crate::tensor::Tensor;

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct Output<T: Element> {
    /// The attention output, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub out: Tensor<T>,
    /// For each query the natural logarithm of the sum of exponentials of its scaled scores, `[batch, heads_q,
    /// seqlen_q]`. A query that sees no key has minus infinity. The backward pass needs it, and it is all that is
    /// needed to merge attention over two sets of keys.
    pub lse: Tensor<f32>,
}

/// What a backward pass gives.
#[derive(Clone, Debug)]
pub struct Gradients<T: Element> {
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub dq: Tensor<T>,
    /// Gradient of k, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dk: Tensor<T>,
    /// Gradient of v, as that of k.
    pub dv: Tensor<T>,
}
