//! An NVIDIA GPU, through the driver that is found when the program runs.
//!
//! The driver's library is opened only if it is there, so a machine without one builds and runs everything else. Each
//! GPU is opened once and kept to the end of the process, with its primary context (which other CUDA code in the process
//! shares), one stream, one memory pool and the kernels loaded so far. Calls are asynchronous: launches and frees follow
//! each other on the stream, and only copies to the host and `synchronize` wait.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError, ctx, device, function, mem_pool, primary_ctx, stream};
use cudarc::driver::sys;
use flash_attention_kernels::abi::TensorMap;
use flash_attention_kernels::entries::{Dtype, Entry};

use super::{Backend, Device, DeviceInfo, DeviceKind};
use crate::plan::{Launch, MIN_COMPUTE_CAPABILITY, Plan, Results, TileMap};
use crate::progress::Reporter;
use crate::{CudaUnavailable, Error};

/// Oldest driver that loads the compiled PTX, as CUDA counts: 1000 x major + 10 x minor.
const MIN_DRIVER: c_int = 12_000;

/// Room for what the driver says about PTX that it can not load.
const JIT_LOG_BYTES: usize = 4096;

/// One GPU.
pub(super) struct Cuda {
    ordinal: usize,
    name: String,
    info: DeviceInfo,
    handles: Handles,
    /// Functions by the name of their entry. A module is loaded once and never unloaded.
    functions: Mutex<HashMap<&'static str, Function>>,
}

/// What the driver gave us, all of it valid to the end of the process.
struct Handles {
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Absent where the driver has no pools (some virtual GPUs); memory then comes from plain calls that wait.
    pool: Option<sys::CUmemoryPool>,
}

// SAFETY: the driver's handles may be used from any thread, each call having made the context current there; none is
// ever destroyed.
unsafe impl Send for Handles {}
// SAFETY: as for Send; the driver does its own locking.
unsafe impl Sync for Handles {}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: as for `Handles`: its module is never unloaded.
unsafe impl Send for Function {}

impl Device {
    /// GPU number `ordinal`, counted as the driver does (`CUDA_VISIBLE_DEVICES` applies). The same number is the same
    /// device.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] if there is no driver, no GPU, or either is too old; [`Error::UnknownDevice`] if there
    /// are fewer GPUs; [`Error::Driver`] if the GPU can not be opened.
    pub fn cuda(ordinal: usize) -> Result<Self, Error> {
        static OPEN: Mutex<Vec<(usize, Device)>> = Mutex::new(Vec::new());
        let mut open = lock(&OPEN);
        if let Some((_, device)) = open.iter().find(|(number, _)| *number == ordinal) {
            return Ok(device.clone());
        }
        let device = Self::new(DeviceKind::Cuda, Box::new(Cuda::open(ordinal)?));
        open.push((ordinal, device.clone()));
        Ok(device)
    }
}

impl Cuda {
    fn open(ordinal: usize) -> Result<Self, Error> {
        let count = start_driver().map_err(|reason| Error::CudaUnavailable { reason })?;
        if ordinal >= count {
            return Err(Error::UnknownDevice { ordinal, count });
        }
        let failed = |call| move |error| driver_error(spec(ordinal), call, error);
        let gpu = device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?;
        let name = device::get_name(gpu).map_err(failed("cuDeviceGetName"))?;
        let info = gpu_info(gpu).map_err(failed("cuDeviceGetAttribute"))?;
        if let DeviceInfo::Gpu {
            compute_capability: found,
            ..
        } = info
            && found < MIN_COMPUTE_CAPABILITY
        {
            let reason = CudaUnavailable::GpuTooOld {
                name,
                found,
                needed: MIN_COMPUTE_CAPABILITY,
            };
            return Err(Error::CudaUnavailable { reason });
        }
        // SAFETY: `gpu` is a device that the driver just gave us; the context is kept to the end of the process.
        let context = unsafe { primary_ctx::retain(gpu) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context was just retained.
        unsafe { ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        // A stream of the default kind waits for the null stream and it for ours: foreign memory that was filled by code
        // which knows no streams is ready when we read it.
        let stream = stream::create(stream::StreamKind::Default).map_err(failed("cuStreamCreate"))?;
        let pool = make_pool(gpu, ordinal).map_err(failed("cuMemPoolCreate"))?;
        let handles = Handles { context, stream, pool };
        Ok(Self {
            ordinal,
            name,
            info,
            handles,
            functions: Mutex::new(HashMap::new()),
        })
    }

    /// Makes the context current on this thread, which every call below relies on.
    fn enter(&self) -> Result<&Handles, Error> {
        // SAFETY: the context is retained to the end of the process.
        unsafe { ctx::set_current(self.handles.context) }.map_err(self.failed("cuCtxSetCurrent"))?;
        Ok(&self.handles)
    }

    fn failed(&self, call: &'static str) -> impl FnOnce(DriverError) -> Error + use<> {
        let ordinal = self.ordinal;
        move |error| driver_error(spec(ordinal), call, error)
    }

    fn try_alloc(&self, bytes: usize) -> Result<u64, DriverError> {
        // SAFETY: pool and stream are valid; `alloc` made the context current.
        unsafe {
            match self.handles.pool {
                Some(pool) => mem_pool::alloc_async(pool, bytes, self.handles.stream),
                None => result::malloc_sync(bytes),
            }
        }
    }

    /// The kernel's function, loaded at its first use.
    fn function(&self, entry: &'static Entry) -> Result<Function, Error> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(entry.name) {
            return Ok(*function);
        }
        let failed = |message| Error::Launch {
            device: self.spec(),
            kernel: entry.name,
            message,
        };
        let function = load(entry).map_err(failed)?;
        functions.insert(entry.name, function);
        Ok(function)
    }

    /// # Safety
    /// `params` are the bytes of the struct that the entry takes, and every address in them is valid.
    unsafe fn launch(&self, launch: &Launch, params: &[u8]) -> Result<(), Error> {
        let handles = self.enter()?;
        let function = self.function(launch.entry)?;
        let ([x, y, z], threads) = (launch.grid, (launch.threads, 1, 1));
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the function is loaded and takes one struct by value, which the driver copies before it returns; grid,
        // threads and shared memory come from the plan, which took them from the table the kernel was compiled from.
        unsafe {
            result::launch_kernel(
                function.0,
                (x, y, z),
                threads,
                launch.shared_bytes,
                handles.stream,
                &mut arguments,
            )
        }
        .map_err(|error| Error::Launch {
            device: self.spec(),
            kernel: launch.entry.name,
            message: describe(error),
        })
    }
}

impl Backend for Cuda {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn spec(&self) -> String {
        spec(self.ordinal)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let handles = self.enter()?;
        let mut address = self.try_alloc(bytes);
        if let (Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)), Some(pool)) = (&address, handles.pool) {
            // What was freed may still be in use by work under way, and in pieces of other sizes.
            self.synchronize()?;
            // SAFETY: the pool is valid.
            unsafe { mem_pool::trim_to(pool, 0) }.map_err(self.failed("cuMemPoolTrimTo"))?;
            address = self.try_alloc(bytes);
        }
        address.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory {
                device: self.spec(),
                requested: bytes as u64,
                free: result::mem_get_info().ok().map(|(free, _)| free as u64),
            },
            _ => self.failed("cuMemAlloc")(error),
        })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        let Ok(handles) = self.enter() else { return };
        // SAFETY: `alloc` made the allocation, from the pool if there is one. In stream order, after the work that uses
        // it; the plain call waits for that work. It only fails where a kernel failed before, which every later call reports.
        let _ = unsafe {
            match handles.pool {
                Some(_) => result::free_async(address, handles.stream),
                None => result::free_sync(address),
            }
        };
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        let handles = self.enter()?;
        // SAFETY: the memory is as long as `data`, says the caller; `data` is borrowed until the copy is over.
        unsafe { result::memcpy_htod_async(address, data, handles.stream) }
            .map_err(self.failed("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        let handles = self.enter()?;
        // SAFETY: as for `upload`.
        unsafe { result::memcpy_dtoh_async(data, address, handles.stream) }
            .map_err(self.failed("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        let handles = self.enter()?;
        // SAFETY: the memory is this long, says the caller.
        unsafe { result::memset_d8_async(address, 0, bytes, handles.stream) }.map_err(self.failed("cuMemsetD8Async"))
    }

    unsafe fn run(&self, plan: &Plan, results: Results, _reporter: &Reporter<'_>) -> Result<(), Error> {
        for launch in plan.launches() {
            let refused = |error| Error::Launch {
                device: self.spec(),
                kernel: launch.entry.name,
                message: describe(error),
            };
            let params = launch
                .params(results, encode)
                .map_err(refused)?
                .ok_or_else(|| launch.wrong_results(self.spec()))?;
            // SAFETY: the parameters are the plan's own; the addresses in them are valid, says the caller.
            unsafe { self.launch(launch, params.as_bytes())? };
        }
        Ok(())
    }

    fn stream(&self) -> Option<*mut c_void> {
        Some(self.handles.stream.cast())
    }

    fn synchronize(&self) -> Result<(), Error> {
        let handles = self.enter()?;
        // SAFETY: the stream is never destroyed.
        unsafe { stream::synchronize(handles.stream) }.map_err(self.failed("cuStreamSynchronize"))
    }
}

fn spec(ordinal: usize) -> String {
    format!("cuda:{ordinal}")
}

/// Starts the driver and counts the GPUs; there is at least one.
fn start_driver() -> Result<usize, CudaUnavailable> {
    // SAFETY: opens the driver's library, whose initialisers are the driver's. Asked first, because every other call
    // panics where the library is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaUnavailable::NoDriver);
    }
    let broken = |error| CudaUnavailable::Broken(describe(error));
    let mut version = 0;
    // SAFETY: writes one integer, and may be called before the driver is started.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(broken)?;
    let split = |version: c_int| ((version / 1000) as u32, (version % 1000 / 10) as u32);
    if version < MIN_DRIVER {
        return Err(CudaUnavailable::DriverTooOld {
            found: split(version),
            needed: split(MIN_DRIVER),
        });
    }
    let count = result::init()
        .and_then(|()| device::get_count())
        .map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaUnavailable::NoGpu,
            _ => broken(error),
        })?;
    if count > 0 {
        Ok(count as usize)
    } else {
        Err(CudaUnavailable::NoGpu)
    }
}

fn gpu_info(gpu: sys::CUdevice) -> Result<DeviceInfo, DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    };
    // SAFETY: `gpu` is a device that the driver gave us.
    let attribute = |which| unsafe { device::get_attribute(gpu, which) }.map(|value| value as u32);
    Ok(DeviceInfo::Gpu {
        compute_capability: (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// A memory pool of our own, which keeps what is freed for the next call instead of handing it back to the system.
fn make_pool(gpu: sys::CUdevice, ordinal: usize) -> Result<Option<sys::CUmemoryPool>, DriverError> {
    let supported = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    // SAFETY: `gpu` is a device that the driver gave us.
    if unsafe { device::get_attribute(gpu, supported) }? == 0 {
        return Ok(None);
    }
    let props = sys::CUmemPoolProps {
        allocType: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        handleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: ordinal as c_int,
        },
        win32SecurityAttributes: std::ptr::null_mut(),
        maxSize: 0,
        usage: 0,
        reserved: [0; 54],
    };
    let mut keep = u64::MAX;
    // SAFETY: the properties are complete, and the attribute is one u64.
    unsafe {
        let pool = mem_pool::create(&props)?;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast())?;
        Ok(Some(pool))
    }
}

/// The driver's tensor map.
fn encode(tile: &TileMap) -> Result<TensorMap, DriverError> {
    let element = match tile.dtype {
        Dtype::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
    // SAFETY: every array has as many entries as the rank asks for, and the map is this function's own; the address is
    // only written down.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            element,
            tile.dims.len() as u32,
            tile.address as *mut c_void,
            tile.dims.as_ptr(),
            tile.strides.as_ptr(),
            tile.box_dims.as_ptr(),
            [1; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(TensorMap(map.opaque))
}

/// Hands a kernel's PTX to the driver, which compiles it for this GPU. The context is current.
fn load(entry: &'static Entry) -> Result<Function, String> {
    let image = CString::new(entry.ptx()).map_err(|_| "its PTX holds a zero byte".to_owned())?;
    let name = CString::new(entry.name).map_err(|_| "its name holds a zero byte".to_owned())?;
    let mut log = [0_u8; JIT_LOG_BYTES];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values = [
        log.as_mut_ptr().cast::<c_void>(),
        std::ptr::without_provenance_mut(JIT_LOG_BYTES),
    ];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image ends in a zero byte; the options are a buffer and, as a value in a pointer's place, its size.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.result().map_err(|error| {
        let log = CStr::from_bytes_until_nul(&log)
            .map(CStr::to_string_lossy)
            .unwrap_or_default();
        format!("its PTX does not load: {}. {}", describe(error), log.trim())
    })?;
    // SAFETY: the module was just loaded, and is never unloaded.
    let function = unsafe { result::module::get_function(module, name) }.map_err(describe)?;
    let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function exists. More than 48 KiB must be asked for; the plan knows that the device grants it.
    unsafe { function::set_function_attribute(function, limit, entry.shared_bytes as i32) }.map_err(describe)?;
    Ok(Function(function))
}

fn driver_error(device: String, call: &'static str, error: DriverError) -> Error {
    Error::Driver {
        device,
        call,
        message: describe(error),
    }
}

/// The driver's name for an error, and what it says of it.
fn describe(error: DriverError) -> String {
    let name = error.error_name().map_or("unknown".into(), CStr::to_string_lossy);
    let meaning = error
        .error_string()
        .map_or("no description".into(), CStr::to_string_lossy);
    format!("{name} ({meaning})")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
