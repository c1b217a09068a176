//! Calls that a device makes to the driver while it works: the seam at which tests put a driver that only writes down.

use std::ffi::c_void;

use cudarc::driver::result::{self, mem_pool};
use cudarc::driver::sys;
use flash_attention_kernels::abi::TensorMap;
use flash_attention_kernels::entries::Dtype;

use super::driver::{self, DriverError, Geometry, Tiled, failed};
use crate::plan::TileMap;

/// Where work goes: handles that stay valid as long as the device, and may be used from any thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub context: sys::CUcontext,
    pub stream: sys::CUstream,
    /// Where memory comes from; without a pool, from plain calls, which wait for all work of the GPU.
    pub pool: Option<sys::CUmemoryPool>,
}

// SAFETY: the driver's handles may be used from any thread; each call makes the context current there and the driver does
// its own locking.
unsafe impl Send for Queue {}
// SAFETY: as for Send.
unsafe impl Sync for Queue {}

/// A kernel that is loaded, as long as its context exists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(pub sys::CUfunction);

// SAFETY: as for `Queue`.
unsafe impl Send for Function {}

/// The calls. None but `alloc` and `free` without a pool, and `synchronize`, waits for work on the stream.
pub(super) trait Calls: Send + Sync {
    /// Memory for `bytes` > 0.
    fn alloc(&self, queue: Queue, bytes: usize) -> Result<u64, DriverError>;

    /// Gives memory back, after the work launched before.
    ///
    /// # Safety
    /// `alloc` gave the address for this queue, and it was not freed.
    unsafe fn free(&self, queue: Queue, address: u64) -> Result<(), DriverError>;

    /// Hands what the pool keeps back to the system.
    fn trim(&self, queue: Queue) -> Result<(), DriverError>;

    /// Bytes of the GPU's memory that are free.
    fn free_bytes(&self, queue: Queue) -> Result<u64, DriverError>;

    /// Starts a copy to the device.
    ///
    /// # Safety
    /// `address .. address + data.len()` is memory of the GPU; `data` stays until the copy is over.
    unsafe fn upload(&self, queue: Queue, address: u64, data: &[u8]) -> Result<(), DriverError>;

    /// Starts a copy from the device.
    ///
    /// # Safety
    /// The contract of [`upload`](Self::upload).
    unsafe fn download(&self, queue: Queue, address: u64, data: &mut [u8]) -> Result<(), DriverError>;

    /// Starts to fill memory with zero bytes.
    ///
    /// # Safety
    /// `address .. address + bytes` is memory of the GPU.
    unsafe fn zero(&self, queue: Queue, address: u64, bytes: usize) -> Result<(), DriverError>;

    /// Compiles PTX for the GPU and gives its kernel `name`, allowed to use so many bytes of dynamic shared memory.
    fn load(&self, queue: Queue, ptx: &str, name: &str, shared_bytes: u32) -> Result<Function, DriverError>;

    /// The driver's encoding of a tensor map.
    fn encode(&self, tile: &TileMap) -> Result<TensorMap, DriverError>;

    /// Launches a kernel that takes one struct by value.
    ///
    /// # Safety
    /// `params` are the bytes of the struct that the function takes, and every address in them is valid.
    unsafe fn launch(
        &self,
        queue: Queue,
        function: Function,
        geometry: Geometry,
        params: &[u8],
    ) -> Result<(), DriverError>;

    /// Waits for all work on the stream.
    fn synchronize(&self, queue: Queue) -> Result<(), DriverError>;
}

/// The driver itself.
pub(super) struct CudaCalls;

impl CudaCalls {
    /// Runs a call with the queue's context current, and the one that was current before after it.
    fn inside<T>(&self, queue: Queue, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DriverError> {
        // SAFETY: a device keeps its context, or the owner of its context.
        let _entered = unsafe { driver::enter(queue.context) }?;
        call()
    }
}

impl Calls for CudaCalls {
    fn alloc(&self, queue: Queue, bytes: usize) -> Result<u64, DriverError> {
        self.inside(queue, || {
            // SAFETY: pool and stream are valid and the context is current.
            unsafe {
                match queue.pool {
                    Some(pool) => mem_pool::alloc_async(pool, bytes, queue.stream),
                    None => result::malloc_sync(bytes),
                }
            }
            .map_err(failed("cuMemAlloc"))
        })
    }

    unsafe fn free(&self, queue: Queue, address: u64) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: `alloc` made the allocation, from the pool if there is one. In stream order, after the work that uses
            // it; the plain call waits for that work.
            unsafe {
                match queue.pool {
                    Some(_) => result::free_async(address, queue.stream),
                    None => result::free_sync(address),
                }
            }
            .map_err(failed("cuMemFree"))
        })
    }

    fn trim(&self, queue: Queue) -> Result<(), DriverError> {
        let Some(pool) = queue.pool else { return Ok(()) };
        self.inside(queue, || {
            // SAFETY: the pool is never destroyed.
            unsafe { mem_pool::trim_to(pool, 0) }.map_err(failed("cuMemPoolTrimTo"))
        })
    }

    fn free_bytes(&self, queue: Queue) -> Result<u64, DriverError> {
        let free = || result::mem_get_info().map_err(failed("cuMemGetInfo"));
        self.inside(queue, free).map(|(free, _)| free as u64)
    }

    unsafe fn upload(&self, queue: Queue, address: u64, data: &[u8]) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: passed on to the caller.
            unsafe { result::memcpy_htod_async(address, data, queue.stream) }.map_err(failed("cuMemcpyHtoDAsync"))
        })
    }

    unsafe fn download(&self, queue: Queue, address: u64, data: &mut [u8]) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: passed on to the caller.
            unsafe { result::memcpy_dtoh_async(data, address, queue.stream) }.map_err(failed("cuMemcpyDtoHAsync"))
        })
    }

    unsafe fn zero(&self, queue: Queue, address: u64, bytes: usize) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: passed on to the caller.
            unsafe { result::memset_d8_async(address, 0, bytes, queue.stream) }.map_err(failed("cuMemsetD8Async"))
        })
    }

    fn load(&self, queue: Queue, ptx: &str, name: &str, shared_bytes: u32) -> Result<Function, DriverError> {
        self.inside(queue, || {
            let module = driver::load(ptx)?;
            // SAFETY: the module was just loaded, and is never unloaded.
            let function = unsafe { driver::function(module, name) }?;
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists. More than 48 KiB must be asked for; the plan knows that the device grants it.
            unsafe { result::function::set_function_attribute(function, limit, shared_bytes as i32) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(Function(function))
        })
    }

    fn encode(&self, tile: &TileMap) -> Result<TensorMap, DriverError> {
        driver::encode(&Tiled {
            element: match tile.dtype {
                Dtype::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            },
            address: tile.address,
            dims: &tile.dims,
            strides: &tile.strides,
            box_dims: &tile.box_dims,
            swizzle: sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            l2_promotion: sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        })
        .map(TensorMap)
    }

    unsafe fn launch(
        &self,
        queue: Queue,
        function: Function,
        geometry: Geometry,
        params: &[u8],
    ) -> Result<(), DriverError> {
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        self.inside(queue, || {
            // SAFETY: passed on to the caller.
            unsafe { driver::launch(function.0, geometry, queue.stream, &mut arguments) }
        })
    }

    fn synchronize(&self, queue: Queue) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: a device keeps its stream, or the stream's owner.
            unsafe { result::stream::synchronize(queue.stream) }.map_err(failed("cuStreamSynchronize"))
        })
    }
}
