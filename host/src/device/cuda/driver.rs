//! The part of the CUDA driver that this project calls: one function a task, and an error that names the call that
//! failed.
//!
//! The CUDA device is built on it, and so are the tests that run micro-kernels without the rest of the library. It is
//! hidden from the documentation because it is no stable interface: other crates should use cudarc.

use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;

use cudarc::driver::result::{self, device, primary_ctx};
use cudarc::driver::sys;

use crate::error::CudaUnavailable;
use crate::target::DeviceInfo;

/// Oldest driver that loads the compiled PTX, as CUDA encodes versions: 1000 x major + 10 x minor.
const MIN_DRIVER: c_int = 12_000;

/// Size of the buffer for the driver's messages about PTX that it cannot load, in bytes.
const JIT_LOG_BYTES: usize = 4096;

/// File names of the driver's library. cudarc tries each of them too, so its calls, which panic without the library,
/// find it where one of these files is found.
const LIBRARIES: &[&str] = if cfg!(windows) {
    &["nvcuda.dll"]
} else {
    &["libcuda.so.1", "libcuda.so"]
};

/// A call of the driver that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverError {
    /// Name of the driver's function.
    pub call: &'static str,
    /// Error code that it returned.
    pub code: sys::CUresult,
    /// The driver's name and description of the code.
    pub message: String,
}

/// Writes, for example, `cuInit: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)`.
impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.message)
    }
}

impl std::error::Error for DriverError {}

/// The error of a call, described by the driver.
pub fn failed(call: &'static str) -> impl FnOnce(result::DriverError) -> DriverError {
    move |error| {
        let name = error.error_name().map_or("unknown".into(), CStr::to_string_lossy);
        let meaning = error
            .error_string()
            .map_or("no description".into(), CStr::to_string_lossy);
        DriverError {
            call,
            code: error.0,
            message: format!("{name} ({meaning})"),
        }
    }
}

/// Returns true if the driver's library can be opened.
///
/// cudarc offers this test only where it loads the library itself. Where another crate of the build, such as candle,
/// links the library, this function is right too: without the library the program would not have started.
pub fn is_present() -> bool {
    LIBRARIES.iter().any(|name| {
        // SAFETY: opens the driver's library, whose initialisers are the driver's.
        let library = unsafe { libloading::Library::new(*name) };
        // Kept open: the driver does not support being unloaded.
        library.map(std::mem::forget).is_ok()
    })
}

/// Starts the driver and counts the GPUs. The count is at least 1.
///
/// # Errors
/// [`CudaUnavailable`] names the part of CUDA that is missing or too old.
pub fn start() -> Result<usize, CudaUnavailable> {
    if !is_present() {
        return Err(CudaUnavailable::NoDriver);
    }
    let broken = |error: DriverError| CudaUnavailable::Broken(error.message);
    let found = version().map_err(broken)?;
    let needed = split(MIN_DRIVER);
    if found < needed {
        return Err(CudaUnavailable::DriverTooOld { found, needed });
    }
    let count = result::init()
        .and_then(|()| device::get_count())
        .map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaUnavailable::NoGpu,
            _ => broken(failed("cuInit")(error)),
        })?;
    if count > 0 {
        Ok(count as usize)
    } else {
        Err(CudaUnavailable::NoGpu)
    }
}

/// Returns the newest CUDA version that the driver supports: major, minor. The library must be present.
///
/// # Errors
/// The error of the driver.
pub fn version() -> Result<(u32, u32), DriverError> {
    let mut version = 0;
    // SAFETY: writes one integer, and may be called before the driver is started.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(failed("cuDriverGetVersion"))?;
    Ok(split(version))
}

fn split(version: c_int) -> (u32, u32) {
    ((version / 1000) as u32, (version % 1000 / 10) as u32)
}

/// A GPU that the driver lists.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// Handle of the driver.
    pub handle: sys::CUdevice,
    /// Name that the driver gives the GPU.
    pub name: String,
    /// Compute capability and sizes.
    pub info: DeviceInfo,
}

impl Gpu {
    /// Opens GPU number `ordinal` of those that [`start`] counted.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn open(ordinal: usize) -> Result<Self, DriverError> {
        Self::describe(device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?)
    }

    /// Describes the GPU of a handle that the driver gave.
    pub(super) fn describe(handle: sys::CUdevice) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        };
        let attribute = |which| attribute(handle, which).map(|value| value as u32);
        let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Self {
            handle,
            name: device::get_name(handle).map_err(failed("cuDeviceGetName"))?,
            info: DeviceInfo::gpu(
                (major, minor),
                attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            ),
        })
    }

    /// Retains the primary context to the end of the process and returns it.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn primary_context(&self) -> Result<sys::CUcontext, DriverError> {
        // SAFETY: the handle is of a device that the driver gave us.
        unsafe { primary_ctx::retain(self.handle) }.map_err(failed("cuDevicePrimaryCtxRetain"))
    }

    /// Makes a memory pool of our own. It keeps freed memory for the next allocation instead of returning it to the
    /// system. `None` where the driver has no pools, as on some virtual GPUs.
    pub(super) fn make_pool(&self) -> Result<Option<sys::CUmemoryPool>, DriverError> {
        let supported = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        if attribute(self.handle, supported)? == 0 {
            return Ok(None);
        }
        let mut keep = u64::MAX;
        // SAFETY: zero bytes are a valid value of every field of the properties. A location is a type followed by a
        // device number in all versions of the driver's interface. Later versions declare the number as a union and
        // its field has another name, hence the write by offset. The attribute is one u64.
        unsafe {
            let mut props: sys::CUmemPoolProps = std::mem::zeroed();
            props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            props.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
            (&raw mut props.location).cast::<c_int>().add(1).write(self.handle);
            let pool = result::mem_pool::create(&props).map_err(failed("cuMemPoolCreate"))?;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast())
                .map_err(failed("cuMemPoolSetAttribute"))?;
            Ok(Some(pool))
        }
    }
}

fn attribute(gpu: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<c_int, DriverError> {
    // SAFETY: `gpu` is a device that the driver gave us.
    unsafe { device::get_attribute(gpu, which) }.map_err(failed("cuDeviceGetAttribute"))
}

/// Guard of a current context. When it is dropped, the context that was current before becomes current again.
#[derive(Debug)]
#[must_use]
pub struct Entered(PhantomData<*const ()>);

/// Makes a context current on this thread.
///
/// # Errors
/// The error of the driver.
///
/// # Safety
/// The context exists until the returned guard is dropped.
pub unsafe fn enter(context: sys::CUcontext) -> Result<Entered, DriverError> {
    // SAFETY: passed on to the caller.
    unsafe { sys::cuCtxPushCurrent_v2(context) }
        .result()
        .map_err(failed("cuCtxPushCurrent"))?;
    Ok(Entered(PhantomData))
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed. It fails only after another failure of the driver, which later calls
        // report.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// Loads PTX: the driver compiles it for the GPU of the current context.
///
/// # Errors
/// The messages of the driver's compiler, for PTX that it cannot load.
pub fn load(ptx: &str) -> Result<sys::CUmodule, DriverError> {
    let image = terminated(ptx, "cuModuleLoadDataEx")?;
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
        let mut error = failed("cuModuleLoadDataEx")(error);
        let log = CStr::from_bytes_until_nul(&log)
            .map(CStr::to_string_lossy)
            .unwrap_or_default();
        error.message += &format!(". {}", log.trim());
        error
    })?;
    Ok(module)
}

/// Returns the kernel called `name`.
///
/// # Errors
/// The error of the driver, also for a module without such a kernel.
///
/// # Safety
/// The module is loaded.
pub unsafe fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, DriverError> {
    let name = terminated(name, "cuModuleGetFunction")?;
    // SAFETY: passed on to the caller.
    unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))
}

/// Converts text to a C string; text with a zero byte is an error of `call`.
fn terminated(text: &str, call: &'static str) -> Result<CString, DriverError> {
    CString::new(text).map_err(|_| DriverError {
        call,
        code: sys::CUresult::CUDA_ERROR_INVALID_VALUE,
        message: "the text holds a zero byte".to_owned(),
    })
}

/// Size of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Number of blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads per block, all along x.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// Blocks per cluster, along x. It is 1 on GPUs before Hopper, which have no clusters.
    pub cluster: u32,
}

/// Launches a kernel.
///
/// # Errors
/// The error of the driver.
///
/// # Safety
/// The function is loaded into the current context and the stream is of that context. `arguments` are pointers to one
/// value for each parameter of the function, of the parameter's type, and every address in these values is valid
/// until the kernel has finished.
pub unsafe fn launch(
    function: sys::CUfunction,
    geometry: Geometry,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    // SAFETY: the struct holds plain numbers and a union of plain numbers, for which zero bytes are valid values.
    let mut cluster: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    cluster.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
        x: geometry.cluster,
        y: 1,
        z: 1,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: geometry.grid[0],
        gridDimY: geometry.grid[1],
        gridDimZ: geometry.grid[2],
        blockDimX: geometry.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: geometry.shared_bytes,
        hStream: stream,
        attrs: &mut cluster,
        numAttrs: u32::from(geometry.cluster > 1),
    };
    // SAFETY: passed on to the caller; the driver copies the arguments before it returns.
    unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .map_err(failed("cuLaunchKernelEx"))
}

/// Description of a tensor map: a tensor, innermost axis first, and the box of it that one copy takes.
#[derive(Clone, Copy, Debug)]
pub struct Tiled<'a> {
    /// Element type of the tensor.
    pub element: sys::CUtensorMapDataType,
    /// Device address of the first element.
    pub address: u64,
    /// Number of elements along each axis.
    pub dims: &'a [u64],
    /// Stride of each axis but the innermost, in bytes.
    pub strides: &'a [u64],
    /// Number of elements of the box along each axis.
    pub box_dims: &'a [u32],
    /// Swizzle: the order of 16-byte chunks in shared memory.
    pub swizzle: sys::CUtensorMapSwizzle,
    /// Bytes that L2 fetches at a time.
    pub l2_promotion: sys::CUtensorMapL2promotion,
}

/// Encodes a tensor map with the driver.
///
/// # Errors
/// The error of the driver, for a map that no copy can take.
pub fn encode(tiled: &Tiled<'_>) -> Result<[u64; 16], DriverError> {
    let rank = tiled.dims.len();
    assert!(
        rank <= 5 && tiled.strides.len() + 1 >= rank && tiled.box_dims.len() == rank,
        "a map's arrays have an entry for each axis"
    );
    let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
    // SAFETY: every array has as many entries as the rank, as was just asserted, and the map is a local variable. The
    // driver only stores the address, it does not read from it.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            tiled.element,
            rank as u32,
            tiled.address as *mut c_void,
            tiled.dims.as_ptr(),
            tiled.strides.as_ptr(),
            tiled.box_dims.as_ptr(),
            [1; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            tiled.swizzle,
            tiled.l2_promotion,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed("cuTensorMapEncodeTiled"))?;
    Ok(map.opaque)
}
