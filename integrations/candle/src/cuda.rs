//! The ops on a GPU: on candle's stream, in candle's memory.
//!
//! Nothing here waits. lse and the workspace of a backward pass come from the library's own pool, by allocations in the order of the
//! same stream.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{CudaStorage, Layout, Result, Shape, Storage};
use flash_attention::Device;

use crate::forward::Forward;
use crate::op::{FlashOp, Scalar};
use crate::views::{Memory, wrap};

/// An element type that candle has CUDA slices of.
pub(crate) trait OnCuda: CudaDType + DeviceRepr + ValidAsZeroBits {}
impl OnCuda for f32 {}
impl OnCuda for half::f16 {}
impl OnCuda for half::bf16 {}

/// Memories of storages on candle's stream, with the guards that order other streams behind the launches.
type Guarded<'a, const N: usize> = ([(Memory, &'a Layout); N], Vec<SyncOnDrop<'a>>);

/// Computes the forward pass of an op in candle's memory, on candle's stream.
///
/// # Errors
/// The host's errors, as candle's.
pub(crate) fn forward<T: Scalar>(
    op: &impl Forward,
    inputs: [(&CudaStorage, &Layout); 3],
) -> Result<(CudaStorage, Shape)> {
    let candle = inputs[0].0.device().clone();
    let stream = candle.cuda_stream();
    let device = Device::cuda_on(&stream).map_err(wrap)?;
    let shape = inputs[0].1.shape().clone();
    let mut out = results::<T>(&candle, shape.elem_count())?;
    {
        let (inputs, _read) = on_device::<T, 3>(inputs, &stream)?;
        let (memory, _written) = written(&mut out, &stream);
        // SAFETY: candle's memory, borrowed for the call; what frees or reuses it later is ordered behind the launches, on
        // this stream by its order and on others by the guards' events.
        unsafe { op.forward::<T>(&device, inputs, memory)? };
    }
    Ok((CudaStorage::wrap_cuda_slice(out, candle), shape))
}

impl FlashOp {
    pub(crate) fn backward_on_cuda<T: Scalar>(
        &self,
        inputs: [(&CudaStorage, &Layout); 3],
        above: [(&CudaStorage, &Layout); 2],
    ) -> Result<[Storage; 3]> {
        let candle = inputs[0].0.device().clone();
        let stream = candle.cuda_stream();
        let [q, k, v] = inputs.map(|(_, layout)| layout.shape().elem_count());
        let mut dq = results::<T>(&candle, q)?;
        let mut dk = results::<T>(&candle, k)?;
        let mut dv = results::<T>(&candle, v)?;
        {
            let (inputs, _read) = on_device::<T, 3>(inputs, &stream)?;
            let (above, _above) = on_device::<T, 2>(above, &stream)?;
            let (dq, _dq) = written(&mut dq, &stream);
            let (dk, _dk) = written(&mut dk, &stream);
            let (dv, _dv) = written(&mut dv, &stream);
            // SAFETY: as in the forward pass.
            unsafe { self.backward::<T>(inputs, above, [dq, dk, dv])? };
        }
        Ok([dq, dk, dv].map(|gradient| Storage::Cuda(CudaStorage::wrap_cuda_slice(gradient, candle.clone()))))
    }
}

/// Memory for results, of which the calls write every element.
fn results<T: Scalar>(candle: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: the calls write every element.
    unsafe { candle.alloc::<T>(elements) }
}

fn on_device<'a, T: Scalar, const N: usize>(
    storages: [(&'a CudaStorage, &'a Layout); N],
    stream: &'a Arc<CudaStream>,
) -> Result<Guarded<'a, N>> {
    let mut memories = storages.map(|(_, layout)| (Memory::new(0, 0), layout));
    let mut guards = Vec::with_capacity(N);
    for (memory, (storage, _)) in memories.iter_mut().zip(storages) {
        let slice = storage.as_cuda_slice::<T>()?;
        let (address, guard) = slice.device_ptr(stream);
        memory.0 = Memory::new(address, slice.len());
        guards.push(guard);
    }
    Ok((memories, guards))
}

fn written<'a, T>(slice: &'a mut CudaSlice<T>, stream: &'a Arc<CudaStream>) -> (Memory, SyncOnDrop<'a>) {
    let elements = slice.len();
    let (address, guard) = slice.device_ptr_mut(stream);
    (Memory::new(address, elements), guard)
}
