//! The op that candle's graph holds: forward fills lse and its statistics, backward reads them.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor as CandleTensor, WithDType};
use flash_attention::{Attention, Device, Element, Gradients, Output, Statistics, Tensor};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use crate::options::Recipe;
use crate::views::{Batch, Call, Memory, wrap};

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

/// The attention of a forward pass, on its device, and the results of each call beside out.
struct Kept {
    attention: Attention,
    rows: Vec<Rows>,
}

/// Results of a call for each query and head.
#[derive(Clone)]
struct Rows {
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

    /// True if the calls write every element of the results.
    #[cfg(feature = "cuda")]
    pub(crate) fn writes_all(&self) -> bool {
        !matches!(self.batch, Batch::Ragged { .. })
    }

    /// Launches the forward pass of all calls and keeps their lse and statistics.
    ///
    /// # Safety
    /// The memories are those of storages with these layouts, `out` with a contiguous one of q's shape, and the contract of
    /// [`Memory::tensor`] holds for each.
    pub(crate) unsafe fn forward<T: Element>(
        &self,
        device: &Device,
        inputs: [(Memory, &Layout); 3],
        out: Memory,
    ) -> Result<()> {
        let [(q, q_layout), (k, k_layout), (v, v_layout)] = inputs;
        let out_layout = Layout::contiguous(q_layout.shape());
        let calls = self.batch.calls([q_layout, &out_layout], [k_layout, v_layout])?;
        let attention = self.recipe.on(device)?;
        let rows = on_each(device, &calls, |_, call| {
            // SAFETY: passed on to the caller; the calls write disjoint parts of out.
            let (q, k, v, out) = unsafe {
                (
                    q.tensor::<T>(device, &call.q[0])?,
                    k.tensor::<T>(device, &call.k[0])?,
                    v.tensor::<T>(device, &call.k[1])?,
                    out.tensor::<T>(device, &call.q[1])?,
                )
            };
            let new = || Tensor::empty(device, &q.shape()[..3]).map_err(wrap);
            let mut output = Output::new(out, new()?);
            let (row_max, row_sum) = (new()?, new()?);
            output.statistics = Some(Statistics { row_max, row_sum });
            (attention.forward_into_output(&q, &k, &v, &mut output)).map_err(wrap)?;
            let Output { lse, statistics, .. } = output;
            Ok(statistics.map(|statistics| Rows { lse, statistics }))
        })?;
        let rows = rows.into_iter().flatten().collect();
        if self.kept.set(Kept { attention, rows }).is_err() {
            candle_core::bail!("a flash-attention op is applied once")
        }
        Ok(())
    }

    /// Launches the backward pass of all calls, after their forward pass.
    ///
    /// # Safety
    /// The memories are those of storages with these layouts, the gradients with contiguous ones of the shapes of q, k and v,
    /// and the contract of [`Memory::tensor`] holds for each.
    pub(crate) unsafe fn backward<T: Element>(
        &self,
        inputs: [(Memory, &Layout); 3],
        [(out, out_layout), (dout, dout_layout)]: [(Memory, &Layout); 2],
        [dq, dk, dv]: [Memory; 3],
    ) -> Result<()> {
        let [(q, q_layout), (k, k_layout), (v, v_layout)] = inputs;
        let like_q = Layout::contiguous(q_layout.shape());
        let like_k = Layout::contiguous(k_layout.shape());
        let calls = self.batch.calls(
            [q_layout, out_layout, dout_layout, &like_q],
            [k_layout, v_layout, &like_k],
        )?;
        let Some(Kept { attention, rows }) = self.kept.get() else {
            candle_core::bail!("the backward pass of a flash-attention op follows its forward pass")
        };
        let Some(device) = rows.first().map(|rows| rows.lse.device()) else {
            return Ok(());
        };
        on_each(device, &calls, |index, call| {
            // SAFETY: passed on to the caller; the calls write disjoint parts of the gradients.
            unsafe {
                let tensor = |memory: Memory, view| memory.tensor::<T>(device, view);
                let Rows { lse, statistics } = rows[index].clone();
                let mut output = Output::new(tensor(out, &call.q[1])?, lse);
                output.statistics = Some(statistics);
                let dout = tensor(dout, &call.q[2])?;
                let mut gradients = Gradients::new(
                    tensor(dq, &call.q[3])?,
                    tensor(dk, &call.k[2])?,
                    tensor(dv, &call.k[2])?,
                );
                let (q, k, v) = (tensor(q, &call.q[0])?, tensor(k, &call.k[0])?, tensor(v, &call.k[1])?);
                attention
                    .backward_into(&q, &k, &v, &output, &dout, &mut gradients)
                    .map_err(wrap)
            }
        })?;
        Ok(())
    }

    fn forward_on_cpu<T: Scalar>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let shape = inputs[0].1.shape().clone();
        let mut out = vec![T::default(); shape.elem_count()];
        let inputs = on_host::<T, 3>(inputs)?;
        // SAFETY: the slices outlive the call, which returns when its work is done, and out is this function's own.
        unsafe { self.forward::<T>(&Device::cpu(), inputs, Memory::written(&mut out))? };
        Ok((T::to_cpu_storage_owned(out), shape))
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
        with_scalar!(candle_core::backend::BackendStorage::dtype(q), T => self.forward_on_cuda::<T>(inputs))
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

/// Runs all calls, on the CPU side by side, on a GPU in the stream's order.
fn on_each<R: Send, const Q: usize, const K: usize>(
    device: &Device,
    calls: &[Call<Q, K>],
    run: impl Fn(usize, &Call<Q, K>) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let run = |(index, call)| run(index, call);
    match device.kind() {
        flash_attention::device::DeviceKind::Cpu => {
            let calls: Vec<_> = calls.iter().enumerate().collect();
            calls.par_iter().map(|&call| run(call)).collect()
        }
        _ => calls.iter().enumerate().map(run).collect(),
    }
}
