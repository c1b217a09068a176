//! The backend extension: attention over a backend's tensors, and over those of burn's autodiff on top of it.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, ExtensionType, backend_extension};
use flash_attention::Attention;

/// Results of a forward pass.
#[derive(Clone, Debug, ExtensionType)]
pub struct Forward<B: Backend> {
    /// `[batch, heads_q, seqlen_q, head_dim]`.
    pub out: FloatTensor<B>,
    /// f32 `[batch, heads_q, seqlen_q]`, natural logarithm. No gradient flows through it, nor through the next two.
    pub lse: FloatTensor<B>,
    /// `row_max` of the library's [`Statistics`](flash_attention::Statistics), shaped as lse.
    pub row_max: FloatTensor<B>,
    /// `row_sum` of the library's [`Statistics`](flash_attention::Statistics), shaped as lse.
    pub row_sum: FloatTensor<B>,
}

/// Results of a backward pass, shaped as q, k and v.
#[derive(Clone, Debug, ExtensionType)]
pub struct QkvGradients<B: Backend> {
    /// Gradient of q.
    pub dq: FloatTensor<B>,
    /// Gradient of k, summed over the query heads that share it.
    pub dk: FloatTensor<B>,
    /// Gradient of v, summed over the query heads that share it.
    pub dv: FloatTensor<B>,
}

/// A backend that attends.
///
/// [`attention`](crate::attention) is the way in: it proves the arguments valid, and the methods panic where they are not, as burn's
/// own operations do.
#[backend_extension(Flex, Autodiff)]
pub trait FlashBackend: Backend {
    /// Results of q, `[batch, heads_q, seqlen_q, head_dim]`, over k and v, `[batch, heads_kv, seqlen_k, head_dim]`.
    fn flash_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        attention: Attention,
    ) -> Forward<Self>;

    /// Gradients of q, k and v, from what a forward pass gave and the gradient of its out.
    fn flash_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] forward: Forward<Self>,
        dout: FloatTensor<Self>,
        attention: Attention,
    ) -> QkvGradients<Self>;
}

/// The node of a forward pass in burn's graph.
#[derive(Debug)]
struct FlashNode;

/// Values that a node keeps for its backward pass: q, k and v as nodes of the graph, its results, its options.
#[derive(Clone, Debug)]
struct Kept<B: Backend> {
    inputs: [NodeId; 3],
    forward: Forward<B>,
    attention: Attention,
}

impl<B: FlashBackend> Backward<B, 3> for FlashNode {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let Kept {
            inputs,
            forward,
            attention,
        } = ops.state;
        let dout = grads.consume::<B>(&ops.node);
        let [q, k, v] = inputs.map(|input| checkpointer.retrieve_node_output(input));
        let QkvGradients { dq, dk, dv } = B::flash_backward(q, k, v, forward, dout, attention);
        for (parent, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: FlashBackend, C: CheckpointStrategy> FlashBackend for Autodiff<B, C> {
    fn flash_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        attention: Attention,
    ) -> Forward<Self> {
        let node = FlashNode
            .prepare::<C>([q.node(), k.node(), v.node()])
            .compute_bound()
            .stateful();
        let of = |tensor: &FloatTensor<Self>| tensor.primitive().clone();
        let forward = B::flash_forward(of(&q), of(&k), of(&v), attention.clone());
        let Forward {
            out,
            lse,
            row_max,
            row_sum,
        } = forward.clone();
        let out = match node {
            OpsKind::Tracked(mut node) => {
                let inputs = [&q, &k, &v].map(|input| node.checkpoint(input));
                let kept = Kept {
                    inputs,
                    forward,
                    attention,
                };
                node.finish(kept, out)
            }
            OpsKind::UnTracked(node) => node.finish(out),
        };
        Forward {
            out,
            lse: Self::from_inner(lse),
            row_max: Self::from_inner(row_max),
            row_sum: Self::from_inner(row_sum),
        }
    }

    fn flash_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        forward: Forward<Self>,
        dout: FloatTensor<Self>,
        attention: Attention,
    ) -> QkvGradients<Self> {
        let of = |tensor: FloatTensor<Self>| tensor.into_primitive();
        let forward = Forward {
            out: of(forward.out),
            lse: of(forward.lse),
            row_max: of(forward.row_max),
            row_sum: of(forward.row_sum),
        };
        let QkvGradients { dq, dk, dv } = B::flash_backward(of(q), of(k), of(v), forward, of(dout), attention);
        QkvGradients {
            dq: Self::from_inner(dq),
            dk: Self::from_inner(dk),
            dv: Self::from_inner(dv),
        }
    }
}
