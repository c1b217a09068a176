//! The op that candle's graph holds: forward fills lse and its statistics, backward reads them.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor as CandleTensor, WithDType};
use flash_attention::{Attention, Device, Element, Gradients, Output, Statistics, Tensor};

use crate::forward::Forward;
use crate::options::Recipe;
use crate::views::{Batch, Memory, wrap};

/// Attention of one op of a graph.
///
/// candle's ops have one result, and the backward pass needs lse and its statistics too. So each op is applied once and keeps them:
/// three f32 a query and head, in the memory of the device, for as long as the graph has the op.
pub(crate) struct FlashOp {
    recipe: Recipe,
    batch: Batch,
    /// Results of the forward pass that the backward pass reads.
    kept: OnceLock<Kept>,
}

/// The attention of a forward pass, on its device, and its results for each query and head.
struct Kept {
    attention: Attention,
    lse: Tensor<f32>,
    statistics: Statistics,
}

/// An element type that both libraries have.
#[cfg(not(feature = "cuda"))]
pub(crate) trait Scalar: Element + WithDType {}
#[cfg(feature = "cuda")]
pub(crate) trait Scalar: Element + WithDType + crate::cuda::OnCuda {}
impl Scalar for f32 {}
impl Scalar for half::f16 {}
impl Scalar for half::bf16 {}

/// Runs `$body` with `$T` as the element type that a dtype names.
macro_rules! with_scalar {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => candle_core::bail!("flash-attention takes f32, f16 and bf16, not {other:?}"),
        }
    };
}
pub(crate) use with_scalar;

impl FlashOp {
    pub(crate) fn new(recipe: impl Into<Recipe>, batch: Batch) -> Self {
        Self {
            recipe: recipe.into(),
            batch,
            kept: OnceLock::new(),
        }
    }

    /// Applies the op to tensors whose last axis may have any stride.
    ///
    /// # Errors
    /// The host's errors for the problem, as candle's.
    pub(crate) fn apply(self, q: &CandleTensor, k: &CandleTensor, v: &CandleTensor) -> Result<CandleTensor> {
        rows(q)?.apply_op3(&rows(k)?, &rows(v)?, self)
    }

    /// Launches the backward pass, after the forward pass. It writes every element of the gradients.
    ///
    /// # Safety
    /// The memories are those of storages with these layouts, the gradients with contiguous ones of the shapes of q, k and v,
    /// and the contract of [`Memory::tensor`] holds for each.
    pub(crate) unsafe fn backward<T: Element>(
        &self,
        [q, k, v]: [(Memory, &Layout); 3],
        [out, dout]: [(Memory, &Layout); 2],
        [dq, dk, dv]: [Memory; 3],
    ) -> Result<()> {
        let Some(Kept {
            attention,
            lse,
            statistics,
        }) = self.kept.get()
        else {
            candle_core::bail!("the backward pass of a flash-attention op follows its forward pass")
        };
        let [like_q, like_k, like_v] = [q, k, v].map(|(_, layout)| Layout::contiguous(layout.shape()));
        // SAFETY: passed on to the caller.
        let tensor = |part| unsafe { self.batch.tensor::<T>(lse.device(), part) };
        let mut output = Output::new(tensor(out)?, lse.clone());
        output.statistics = Some(statistics.clone());
        let mut gradients = Gradients::new(tensor((dq, &like_q))?, tensor((dk, &like_k))?, tensor((dv, &like_v))?);
        let (q, k, v, dout) = (tensor(q)?, tensor(k)?, tensor(v)?, tensor(dout)?);
        match &self.batch {
            Batch::Ragged(sequences) => {
                attention.backward_ragged_into(&q, &k, &v, &output, &dout, sequences, &mut gradients, None)
            }
            _ => attention.backward_into(&q, &k, &v, &output, &dout, &mut gradients),
        }
        .map_err(wrap)
    }

    fn backward_on_cpu<T: Scalar>(
        &self,
        inputs: [(&CpuStorage, &Layout); 3],
        above: [(&CpuStorage, &Layout); 2],
    ) -> Result<[Storage; 3]> {
        let mut gradients = inputs.map(|(_, layout)| vec![T::default(); layout.shape().elem_count()]);
        let memories = gradients.each_mut().map(|gradient| Memory::written(gradient));
        let (inputs, above) = (on_host::<T, 3>(inputs)?, on_host::<T, 2>(above)?);
        // SAFETY: the slices outlive the call, which returns when its work is done, and the gradients are this function's own.
        unsafe { self.backward::<T>(inputs, above, memories)? };
        Ok(gradients.map(|gradient| Storage::Cpu(T::to_cpu_storage_owned(gradient))))
    }
}

impl Forward for FlashOp {
    /// It keeps lse and statistics.
    unsafe fn forward<T: Scalar>(&self, device: &Device, [q, k, v]: [(Memory, &Layout); 3], out: Memory) -> Result<()> {
        let out_layout = Layout::contiguous(q.1.shape());
        let attention = self.recipe.on(device)?;
        // SAFETY: passed on to the caller.
        let tensor = |part| unsafe { self.batch.tensor::<T>(device, part) };
        let (q, k, v, out) = (tensor(q)?, tensor(k)?, tensor(v)?, tensor((out, &out_layout))?);
        let rows = match (&self.batch, q.shape()) {
            (Batch::Ragged(_), &[total, heads, _]) => vec![heads, total],
            (_, shape) => shape[..3].to_vec(),
        };
        let new = || Tensor::empty(device, &rows).map_err(wrap);
        let (lse, statistics) = (
            new()?,
            Statistics {
                row_max: new()?,
                row_sum: new()?,
            },
        );
        let mut output = Output::new(out, lse.clone());
        output.statistics = Some(statistics.clone());
        match &self.batch {
            Batch::Ragged(sequences) => attention.forward_ragged_into(&q, &k, &v, sequences, &mut output, None),
            _ => attention.forward_into_output(&q, &k, &v, &mut output),
        }
        .map_err(wrap)?;
        let kept = Kept {
            attention,
            lse,
            statistics,
        };
        if self.kept.set(kept).is_err() {
            candle_core::bail!("a flash-attention op is applied once")
        }
        Ok(())
    }
}

impl CustomOp3 for FlashOp {
    fn name(&self) -> &'static str {
        "flash-attention"
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
        with_scalar!(candle_core::backend::BackendStorage::dtype(q), T => self.forward_on_cpu::<T>(inputs))
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
        with_scalar!(candle_core::backend::BackendStorage::dtype(q), T => crate::cuda::forward::<T>(self, inputs))
    }

    fn bwd(
        &self,
        q: &CandleTensor,
        k: &CandleTensor,
        v: &CandleTensor,
        out: &CandleTensor,
        dout: &CandleTensor,
    ) -> Result<(Option<CandleTensor>, Option<CandleTensor>, Option<CandleTensor>)> {
        let dout = rows(dout)?;
        let shapes = [q, k, v].map(|tensor| tensor.shape().clone());
        let tensors = [q, k, v, out, &dout].map(CandleTensor::storage_and_layout);
        let [q, k, v, out, dout] = tensors.each_ref().map(|(storage, layout)| (&**storage, *layout));
        let gradients = match (q.0, k.0, v.0, out.0, dout.0) {
            (Storage::Cpu(q_), Storage::Cpu(k_), Storage::Cpu(v_), Storage::Cpu(out_), Storage::Cpu(dout_)) => {
                let inputs = [(q_, q.1), (k_, k.1), (v_, v.1)];
                let above = [(out_, out.1), (dout_, dout.1)];
                with_scalar!(q.0.dtype(), T => self.backward_on_cpu::<T>(inputs, above))?
            }
            #[cfg(feature = "cuda")]
            (Storage::Cuda(q_), Storage::Cuda(k_), Storage::Cuda(v_), Storage::Cuda(out_), Storage::Cuda(dout_)) => {
                let inputs = [(q_, q.1), (k_, k.1), (v_, v.1)];
                let above = [(out_, out.1), (dout_, dout.1)];
                with_scalar!(q.0.dtype(), T => self.backward_on_cuda::<T>(inputs, above))?
            }
            _ => candle_core::bail!("flash-attention runs on the CPU and, with the feature `cuda`, on CUDA devices"),
        };
        let mut gradients = gradients
            .into_iter()
            .zip(shapes)
            .map(|(storage, shape)| CandleTensor::from_storage(storage, shape, BackpropOp::none(), false));
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

/// A tensor with a contiguous last axis: itself where it has one.
pub(crate) fn rows(tensor: &CandleTensor) -> Result<CandleTensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(&size), Some(&stride)) if size > 1 && stride != 1 => tensor.contiguous(),
        _ => Ok(tensor.clone()),
    }
}

/// Memories of storages that are read, with their layouts.
pub(crate) fn on_host<'a, T: Scalar, const N: usize>(
    storages: [(&CpuStorage, &'a Layout); N],
) -> Result<[(Memory, &'a Layout); N]> {
    let mut memories = storages.map(|(_, layout)| (Memory::read::<T>(&[]), layout));
    for (memory, (storage, _)) in memories.iter_mut().zip(storages) {
        memory.0 = Memory::read(storage.as_slice::<T>()?);
    }
    Ok(memories)
}
