//! The op over keys and values in pages, which it reads in place, without gradients.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use flash_attention::{Device, KvCache, Output};

use crate::forward::Forward;
use crate::op::{Scalar, rows, with_scalar};
use crate::options::Recipe;
use crate::views::{Memory, wrap};

/// Attention of packed queries, `[total_q, heads_q, head_dim]`, over k and v in pages, `[pages, page_size, heads_kv, head_dim]`.
pub(crate) struct PagedOp {
    recipe: Recipe,
    cache: KvCache,
}

impl PagedOp {
    pub(crate) fn new(recipe: Recipe, cache: KvCache) -> Self {
        Self { recipe, cache }
    }

    /// True if the op takes these tensors: no gradient goes to them.
    pub(crate) fn takes(tensors: [&Tensor; 3]) -> bool {
        !tensors.iter().any(|tensor| tensor.track_op())
    }

    /// Applies the op to tensors whose last axis may have any stride.
    ///
    /// # Errors
    /// The host's errors for the problem, as candle's.
    pub(crate) fn apply(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        rows(q)?.apply_op3_no_bwd(&rows(k)?, &rows(v)?, self)
    }
}

impl Forward for PagedOp {
    unsafe fn forward<T: Scalar>(&self, device: &Device, [q, k, v]: [(Memory, &Layout); 3], out: Memory) -> Result<()> {
        let out_layout = Layout::contiguous(q.1.shape());
        let attention = self.recipe.on(device)?;
        // SAFETY: passed on to the caller.
        let tensor = |(memory, layout): (Memory, &Layout)| unsafe { memory.tensor::<T>(device, layout) };
        let (total, heads, _) = q.1.shape().dims3()?;
        let lse = flash_attention::Tensor::empty(device, [heads, total]).map_err(wrap)?;
        let mut output = Output::new(tensor((out, &out_layout))?, lse);
        let (q, k, v) = (tensor(q)?, tensor(k)?, tensor(v)?);
        (attention.forward_cached_into(&q, &k, &v, &self.cache, &mut output, None)).map_err(wrap)
    }
}

impl CustomOp3 for PagedOp {
    fn name(&self) -> &'static str {
        "flash-attention-paged"
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
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        with_scalar!(q.dtype(), T => self.forward_on_cpu::<T>(inputs))
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
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        with_scalar!(q.dtype(), T => crate::cuda::forward::<T>(self, inputs))
    }
}
