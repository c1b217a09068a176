//! candle-flash-attn's functions over batches of equally long sequences.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use crate::op::FlashOp;
use crate::options::Options;
use crate::views::Batch;

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, options: Options<'_>) -> Result<Tensor> {
    FlashOp::new(options.recipe(k.dim(1)?), Batch::SeqlenHeads).apply(q, k, v)
}

/// `softmax(softmax_scale * q k^T) v`, with gradients.
///
/// * q: `[batch, seqlen_q, heads_q, head_dim]`, f32, f16 or bf16; head_dim a multiple of 8 up to 256.
/// * k, v: `[batch, seqlen_k, heads_kv, head_dim]`; heads_kv divides heads_q (grouped and multi-query attention).
/// * causal: query i sees key j only if `j <= i + seqlen_k - seqlen_q`.
///
/// The result is contiguous, of q's shape. Views such as `transpose(1, 2)` of `[batch, heads, seqlen, head_dim]` tensors are read
/// in place; a tensor whose last axis is not contiguous is copied first.
///
/// # Errors
/// Shapes that disagree, another dtype, another head_dim: candle's error, which names argument, value and limit.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use flash_attention_candle::flash_attn;
///
/// let shape = (1, 128, 4, 64); // batch, seqlen, heads, head_dim
/// let q = Var::randn(0f32, 1.0, shape, &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
/// let out = flash_attn(&q, &k, &k, 0.125, true)?;
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    attend(q, k, v, Options::new(softmax_scale, causal))
}

/// [`flash_attn`] in which query i sees the keys from `i + seqlen_k - seqlen_q - window_size_left` to
/// `i + seqlen_k - seqlen_q + window_size_right` only; `None` sees all of that side.
///
/// # Errors
/// The errors of [`flash_attn`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right);
    attend(q, k, v, options)
}

/// [`flash_attn`] with ALiBi: `-slope * |i + seqlen_k - seqlen_q - j|` is added to the scaled scores of each head.
///
/// * alibi_slopes: f32 `[heads_q]`.
///
/// # Errors
/// The errors of [`flash_attn`], and slopes of another dtype or shape.
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let options = Options::new(softmax_scale, causal).alibi(Some(alibi_slopes));
    attend(q, k, v, options)
}

/// [`flash_attn_windowed`] with the bias of [`flash_attn_alibi`].
///
/// # Errors
/// The errors of both.
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right).alibi(Some(alibi_slopes));
    attend(q, k, v, options)
}

/// [`flash_attn_alibi_windowed`] with capped scores, as Gemma has them: `softcap * tanh(score / softcap)` takes the place of each
/// scaled score, before ALiBi is added. 0 is no cap.
///
/// # Errors
/// The errors of [`flash_attn_alibi_windowed`], and a cap that is negative or not finite.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right)
        .alibi(alibi_slopes)
        .softcap(Some(softcap));
    attend(q, k, v, options)
}

/// candle-flash-attn's op, for callers who apply it themselves: `q.apply_op3(&k, &v, op)` over tensors as those of
/// [`flash_attn_alibi_windowed_softcap`].
///
/// It holds nothing between the passes, so its backward pass begins with another forward pass; the functions' own op has none.
#[derive(Clone, Debug)]
pub struct FlashAttn {
    /// Factor of the scores.
    pub softmax_scale: f32,
    /// ALiBi's slope of each query head, f32 `[heads_q]`.
    pub alibi_slopes: Option<Tensor>,
    /// Keys seen before a query's own; `None` is all.
    pub window_size_left: Option<usize>,
    /// Keys seen after a query's own; `None` is all, and `Some(0)` with no limit to the left is a causal mask.
    pub window_size_right: Option<usize>,
    /// Cap of the scores; `None` and 0 are none.
    pub softcap: Option<f32>,
}

impl FlashAttn {
    fn op(&self, k: &Layout) -> Result<FlashOp> {
        let options = Options::windowed(self.softmax_scale, self.window_size_left, self.window_size_right)
            .alibi(self.alibi_slopes.as_ref())
            .softcap(self.softcap);
        let (_, seqlen_k, _, _) = k.shape().dims4()?;
        Ok(FlashOp::new(options.recipe(seqlen_k), Batch::SeqlenHeads))
    }
}

impl CustomOp3 for FlashAttn {
    fn name(&self) -> &'static str {
        "flash-attn"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.op(k_layout)?.cpu_fwd(q, q_layout, k, k_layout, v, v_layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.op(k_layout)?.cuda_fwd(q, q_layout, k, k_layout, v, v_layout)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let op = self.op(k.layout())?;
        let out = q.apply_op3_no_bwd(k, v, &op)?;
        op.bwd(q, k, v, &out, dout)
    }
}
