//! The forward pass of an op, on the CPU and on a GPU.

use candle_core::{CpuStorage, Layout, Result, Shape};
use flash_attention::Device;

use crate::op::{Scalar, on_host};
use crate::views::Memory;

/// An op that computes a result of q's shape from q, k and v.
pub(crate) trait Forward {
    /// Launches the forward pass, which writes every element of `out`.
    ///
    /// # Safety
    /// The memories are those of storages with these layouts, `out` with a contiguous one of q's shape, and the contract of
    /// [`Memory::tensor`] holds for each.
    unsafe fn forward<T: Scalar>(&self, device: &Device, inputs: [(Memory, &Layout); 3], out: Memory) -> Result<()>;

    /// Computes the forward pass in candle's memory on the host.
    ///
    /// # Errors
    /// The host's errors, as candle's.
    fn forward_on_cpu<T: Scalar>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let shape = inputs[0].1.shape().clone();
        let mut out = vec![T::default(); shape.elem_count()];
        let inputs = on_host::<T, 3>(inputs)?;
        // SAFETY: the slices outlive the call, which returns when its work is done, and out is this function's own.
        unsafe { self.forward::<T>(&Device::cpu(), inputs, Memory::written(&mut out))? };
        Ok((T::to_cpu_storage_owned(out), shape))
    }
}
