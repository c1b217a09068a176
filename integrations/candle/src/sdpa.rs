//! Attention over `[batch, heads, seqlen, head_dim]` tensors: candle_nn's function, and a module for all of the host's options.

use candle_core::{Result, Tensor};
use flash_attention::Attention;

use crate::op::FlashOp;
use crate::options::Options;
use crate::views::Batch;

/// candle_nn's `ops::sdpa`, which runs on Metal alone, on the CPU and on CUDA, and with gradients.
///
/// * q: `[batch, heads_q, seqlen_q, head_dim]`; k, v: `[batch, heads_kv, seqlen_k, head_dim]`, heads_kv a divisor of heads_q.
/// * mask: is added to the scaled scores, `[batch, heads_q, seqlen_q, seqlen_k]`, where an axis of 1 repeats and leading axes may be
///   left out. It has no gradient, as in candle_nn.
/// * do_causal: query i sees key j only if `j <= i + seqlen_k - seqlen_q`.
/// * softcapping: `softcapping * tanh(score / softcapping)` takes the place of each scaled score. 1 is no cap, as in candle_nn.
///
/// The result is contiguous, of q's shape.
///
/// # Errors
/// The errors of [`flash_attn`](crate::flash_attn), and a mask of another shape.
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    let options = Options::new(scale, do_causal).softcap(Some(softcapping).filter(|&cap| cap != 1.0));
    let recipe = options.recipe(k.dim(2)?);
    let recipe = match mask {
        Some(mask) => recipe.bias(mask)?,
        None => recipe,
    };
    FlashOp::new(recipe, Batch::HeadsSeqlen).apply(q, k, v)
}

/// Attention as a layer: an [`Attention`] with all of the host's options, for candle's tensors.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flash_attention_candle::{Attention, FlashAttention};
///
/// let layer = FlashAttention::new(Attention::new().causal()); // scaled by 1 / sqrt(head_dim)
/// let x = Tensor::randn(0f32, 1.0, (2, 8, 100, 64), &Device::Cpu)?; // batch, heads, seqlen, head_dim
/// let out = layer.forward(&x, &x, &x)?;
/// assert_eq!(out.dims(), x.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct FlashAttention {
    attention: Attention,
}

impl FlashAttention {
    /// A layer that attends as `attention` says.
    pub fn new(attention: Attention) -> Self {
        Self { attention }
    }

    /// The options.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Attention of q, `[batch, heads_q, seqlen_q, head_dim]`, over k and v, `[batch, heads_kv, seqlen_k, head_dim]`, with gradients.
    /// The result is contiguous, of q's shape.
    ///
    /// # Errors
    /// The errors of [`Attention::forward`] and another dtype, as candle's error.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.over(Batch::HeadsSeqlen, q, k, v)
    }

    /// [`forward`](Self::forward) over `[batch, seqlen, heads, head_dim]` tensors, as a projection's `reshape` gives them.
    ///
    /// # Errors
    /// The errors of [`forward`](Self::forward).
    pub fn forward_seqlen_heads(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.over(Batch::SeqlenHeads, q, k, v)
    }

    fn over(&self, batch: Batch, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        FlashOp::new(self.attention.clone(), batch).apply(q, k, v)
    }
}
