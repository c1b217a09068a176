//! What an adapter for candle stands on: one cudarc for both, candle's stream, memory that candle allocated.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use flash_attention::{Attention, Device, Error, Tensor};

/// The device that launches on candle's own stream.
///
/// # Errors
/// Those of [`Device::cuda_on`].
pub fn device(candle: &CudaDevice) -> Result<Device, Error> {
    Device::cuda_on(&candle.cuda_stream())
}

/// Forward over one slice of contiguous q, k and v each, into slices that candle allocated: on candle's stream, with no
/// allocation and no waiting of ours.
///
/// # Errors
/// Those of [`Attention::forward_into`], as candle's.
pub fn forward(
    candle: &CudaDevice,
    attention: Attention,
    shape: [usize; 4],
    [q, k, v]: [&CudaSlice<f32>; 3],
) -> candle_core::Result<[CudaSlice<f32>; 2]> {
    let elements: usize = shape.iter().product();
    let lengths = [elements, elements / shape[3].max(1)];
    assert!(
        [q, k, v].iter().all(|slice| slice.len() == elements),
        "q, k and v have this shape"
    );
    let stream = candle.cuda_stream();
    let device = device(candle).map_err(candle_core::Error::wrap)?;
    // SAFETY: forward writes every element of both.
    let [mut out, mut lse] = unsafe {
        [
            stream.alloc::<f32>(lengths[0]).w()?,
            stream.alloc::<f32>(lengths[1]).w()?,
        ]
    };
    {
        let ((q, _q), (k, _k), (v, _v)) = (q.device_ptr(&stream), k.device_ptr(&stream), v.device_ptr(&stream));
        let ((out, _out), (lse, _lse)) = (out.device_ptr_mut(&stream), lse.device_ptr_mut(&stream));
        let strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
        // SAFETY: the slices are as long as the shapes, of candle's device, borrowed for the call, and their guards order other
        // streams after it.
        let tensor = |address| unsafe { Tensor::<f32>::from_raw_parts(&device, address, shape, strides, None) };
        // SAFETY: as above.
        let lse = unsafe {
            Tensor::<f32>::from_raw_parts(&device, lse, &shape[..3], [shape[1] * shape[2], shape[2], 1], None)
        };
        let launch = || attention.forward_into(&tensor(q)?, &tensor(k)?, &tensor(v)?, &mut tensor(out)?, &mut lse?);
        launch().map_err(candle_core::Error::wrap)?;
    }
    Ok([out, lse])
}
