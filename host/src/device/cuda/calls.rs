//! Calls that a device makes to the driver while it works. Tests replace the driver behind this trait by one that
//! only records the calls.

use std::ffi::c_void;

use crate::element::DataType;
use cudarc::driver::result::{self, mem_pool};
use cudarc::driver::sys;
use flash_attention_kernels::abi::TensorMap;

use super::driver::{self, DriverError, Geometry, Tiled, failed};
use crate::plan::TileMap;

/// Context, stream and memory pool that a device's work goes through. The handles stay valid as long as the device
/// and may be used from any thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub context: sys::CUcontext,
    pub stream: sys::CUstream,
    /// Pool of a device's memory. Without a pool, plain calls allocate and free, which wait for all work of the GPU.
    pub pool: Option<sys::CUmemoryPool>,
}

// SAFETY: the driver's handles may be used from any thread. Each call makes the context current on its thread, and
// the driver does its own locking.
unsafe impl Send for Queue {}
// SAFETY: the reason given for `Send`.
unsafe impl Sync for Queue {}

/// A loaded kernel, valid as long as its context exists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(pub sys::CUfunction);

// SAFETY: a driver's handle, which may be used from any thread, like those in `Queue`.
unsafe impl Send for Function {}

/// Driver calls of a device. Only `synchronize`, and without a pool `alloc` and `free`, wait for work on the stream.
pub(super) trait Calls: Send + Sync {
    /// Allocates `bytes` > 0 and returns their address.
    fn alloc(&self, queue: Queue, bytes: usize) -> Result<u64, DriverError>;

    /// Frees memory once the work launched before has finished.
    ///
    /// # Safety
    /// `alloc` gave the address for this queue, and it was not freed.
    unsafe fn free(&self, queue: Queue, address: u64) -> Result<(), DriverError>;

    /// Returns memory that the pool holds unused to the system.
    fn trim(&self, queue: Queue) -> Result<(), DriverError>;

    /// Returns the free bytes of the GPU's memory.
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

    /// Compiles PTX for the GPU and returns its kernel `name`, which may use `shared_bytes` of dynamic shared memory
    /// per block.
    fn load(&self, queue: Queue, ptx: &str, name: &str, shared_bytes: u32) -> Result<Function, DriverError>;

    /// Encodes a tensor map with the driver.
    fn encode(&self, tile: &TileMap) -> Result<TensorMap, DriverError>;

    /// Launches a kernel that takes structs by value.
    ///
    /// # Safety
    /// `params` are the bytes of the structs that the function takes, and every address in them is valid.
    unsafe fn launch(
        &self,
        queue: Queue,
        function: Function,
        geometry: Geometry,
        params: &[&[u8]],
    ) -> Result<(), DriverError>;

    /// Tells if the stream is being captured in a CUDA graph.
    fn is_capturing(&self, queue: Queue) -> Result<bool, DriverError>;

    /// Waits for all work on the stream.
    fn synchronize(&self, queue: Queue) -> Result<(), DriverError>;
}

/// Calls of the CUDA driver.
pub(super) struct CudaCalls;

impl CudaCalls {
    /// Runs a call with the queue's context current, and makes the context that was current before current again.
    fn inside<T>(&self, queue: Queue, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DriverError> {
        // SAFETY: a device keeps its context alive, or keeps the owner of a foreign one.
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
            // SAFETY: `alloc` made the allocation, from the pool if there is one. `free_async` frees in stream order,
            // after the work that uses the memory; `free_sync` waits for that work.
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
            // SAFETY: the function exists. A kernel needs this attribute for more than 48 KiB, and the plan asks for
            // no more than the device allows.
            unsafe { result::function::set_function_attribute(function, limit, shared_bytes as i32) }
                .map_err(failed("cuFuncSetAttribute"))?;
            Ok(Function(function))
        })
    }

    fn encode(&self, tile: &TileMap) -> Result<TensorMap, DriverError> {
        driver::encode(&Tiled {
            element: match tile.dtype {
                DataType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                DataType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                DataType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                DataType::F8E4M3 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                DataType::I32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
                DataType::U32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
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
        params: &[&[u8]],
    ) -> Result<(), DriverError> {
        let mut arguments: Vec<_> = params
            .iter()
            .map(|struct_| struct_.as_ptr().cast_mut().cast::<c_void>())
            .collect();
        self.inside(queue, || {
            // SAFETY: passed on to the caller.
            unsafe { driver::launch(function.0, geometry, queue.stream, &mut arguments) }
        })
    }

    fn is_capturing(&self, queue: Queue) -> Result<bool, DriverError> {
        self.inside(queue, || {
            // SAFETY: a device keeps its stream alive, or keeps the owner of a foreign one.
            let status =
                unsafe { result::stream::is_capturing(queue.stream) }.map_err(failed("cuStreamIsCapturing"))?;
            Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
        })
    }

    fn synchronize(&self, queue: Queue) -> Result<(), DriverError> {
        self.inside(queue, || {
            // SAFETY: a device keeps its stream alive, or keeps the owner of a foreign one.
            unsafe { result::stream::synchronize(queue.stream) }.map_err(failed("cuStreamSynchronize"))
        })
    }
}
