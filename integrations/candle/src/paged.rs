//! The op over keys and values in pages, which it reads in place: on the CPU, without gradients.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use flash_attention::{Device, KvCache};

use crate::op::{Scalar, on_host, rows, with_scalar};
use crate::options::Recipe;
use crate::views::wrap;

/// Attention of packed queries, `[total_q, heads_q, head_dim]`, over k and v in pages, `[pages, page_size, heads_kv, head_dim]`.
pub(crate) struct PagedOp {
    recipe: Recipe,
    cache: KvCache,
}

impl PagedOp {
    pub(crate) fn new(recipe: Recipe, cache: KvCache) -> Self {
        Self { recipe, cache }
    }

    /// True if the op takes these tensors: they are on the CPU, and no gradient goes to them.
    pub(crate) fn takes(tensors: [&Tensor; 3]) -> bool {
        tensors
            .iter()
            .all(|tensor| tensor.device().is_cpu() && !tensor.track_op())
    }

    /// Applies the op to tensors whose last axis may have any stride.
    ///
    /// # Errors
    /// The host's errors for the problem, as candle's.
    pub(crate) fn apply(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        rows(q)?.apply_op3_no_bwd(&rows(k)?, &rows(v)?, self)
    }

    fn forward<T: Scalar>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let device = Device::cpu();
        let attention = self.recipe.on(&device)?;
        let [q, k, v] = on_host::<T, 3>(inputs)?
            // SAFETY: the slices outlive the call, which returns when its work is done, and are only read.
            .map(|(memory, layout)| unsafe { memory.whole::<T>(&device, layout) });
        let output = attention.forward_cached(&q?, &k?, &v?, &self.cache).map_err(wrap)?;
        let out = output.out.to_vec().map_err(wrap)?;
        Ok((T::to_cpu_storage_owned(out), inputs[0].1.shape().clone()))
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
        with_scalar!(q.dtype(), T => self.forward::<T>(inputs))
    }
}
