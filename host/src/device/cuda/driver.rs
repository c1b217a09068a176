//! The CUDA driver, as far as this project calls it: one function a task, an error that names the call that failed.
//!
//! The device stands on it, and so do the tests that run micro-kernels without the rest of the library in between. Hidden
//! from the documentation because it is no promise to other crates: those take cudarc.

use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;

use cudarc::driver::result::{self, device, primary_ctx};
use cudarc::driver::sys;

use crate::error::CudaUnavailable;
use crate::target::DeviceInfo;

/// Oldest driver that loads the compiled PTX, as CUDA counts: 1000 x major + 10 x minor.
const MIN_DRIVER: c_int = 12_000;

/// Bytes for what the driver says about PTX that it cannot load.
const JIT_LOG_BYTES: usize = 4096;

/// File names of the driver's library. cudarc looks for each of them too, so that its calls, which panic without the
/// library, find it where one of these is found.
const LIBRARIES: &[&str] = if cfg!(windows) {
    &["nvcuda.dll"]
} else {
    &["libcuda.so.1", "libcuda.so"]
};

/// A call of the driver that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverError {
    /// The driver's function.
    pub call: &'static str,
    /// What it returned.
    pub code: sys::CUresult,
    /// The driver's name for that and what it says of it.
    pub message: String,
}

/// `cuInit: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)`.
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
/// cudarc has such a function only where it loads the library itself. Where another crate of the build has it linked
/// (candle does), this one is right too: the program would not have started without the library.
pub fn is_present() -> bool {
    LIBRARIES.iter().any(|name| {
        // SAFETY: opens the driver's library, whose initialisers are the driver's.
        let library = unsafe { libloading::Library::new(*name) };
        // Kept open: the driver is not made to be unloaded.
        library.map(std::mem::forget).is_ok()
    })
}

/// Starts the driver and counts the GPUs; there is at least one.
///
/// # Errors
/// Which part of CUDA is missing or too old.
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

/// Newest CUDA version that the driver knows: major, minor. The library is present.
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

/// A GPU that the driver found.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// The driver's handle.
    pub handle: sys::CUdevice,
    /// The driver's name for it.
    pub name: String,
    /// Compute capability and sizes.
    pub info: DeviceInfo,
}

impl Gpu {
    /// GPU number `ordinal` of those that [`start`] counted.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn open(ordinal: usize) -> Result<Self, DriverError> {
        Self::describe(device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?)
    }

    /// The GPU of a handle that the driver gave.
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

    /// Primary context, retained to the end of the process.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn primary_context(&self) -> Result<sys::CUcontext, DriverError> {
        // SAFETY: the handle is of a device that the driver gave us.
        unsafe { primary_ctx::retain(self.handle) }.map_err(failed("cuDevicePrimaryCtxRetain"))
    }

    /// A memory pool of our own, which keeps what is freed for the next call instead of handing it back to the system;
    /// `None` where the driver has no pools (some virtual GPUs).
    pub(super) fn make_pool(&self) -> Result<Option<sys::CUmemoryPool>, DriverError> {
        let supported = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        if attribute(self.handle, supported)? == 0 {
            return Ok(None);
        }
        let mut keep = u64::MAX;
        // SAFETY: zero bytes are a value of every field of the properties. A location is a type and a device number in all
        // versions of the driver's interface, though later ones have a union in the number's place, where no field of one
        // name is common to all. The attribute is one u64.
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

/// A context that is current on this thread until the value is dropped, and then the one that was before.
#[derive(Debug)]
#[must_use]
pub struct Entered(PhantomData<*const ()>);

/// Makes a context current on this thread.
///
/// # Errors
/// The error of the driver.
///
/// # Safety
/// The context exists, and does until what is returned is dropped.
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
        // SAFETY: pops what `enter` pushed; it only fails where the driver has failed before, which later calls report.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// Hands PTX to the driver, which compiles it for the GPU of the current context.
///
/// # Errors
/// The message of the driver's compiler, for PTX that it cannot load.
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

/// The kernel of this name.
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

/// Text as C has it.
fn terminated(text: &str, call: &'static str) -> Result<CString, DriverError> {
    CString::new(text).map_err(|_| DriverError {
        call,
        code: sys::CUresult::CUDA_ERROR_INVALID_VALUE,
        message: "the text holds a zero byte".to_owned(),
    })
}

/// Sizes of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, all along x.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Blocks of a cluster, along x; GPUs before Hopper have no clusters but of 1.
    pub cluster: u32,
}

/// Launches a kernel.
///
/// # Errors
/// The error of the driver.
///
/// # Safety
/// The function is loaded into the current context and the stream is of that context. `arguments` are pointers to one value
/// for each of its parameters, of the parameter's type, and every address in them is valid until the kernel has finished.
pub unsafe fn launch(
    function: sys::CUfunction,
    geometry: Geometry,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    // SAFETY: a struct of plain numbers and a union of such, for which zero bytes are values.
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
    /// Element type.
    pub element: sys::CUtensorMapDataType,
    /// Device address of the first element.
    pub address: u64,
    /// Elements along each axis.
    pub dims: &'a [u64],
    /// Bytes from one index to the next, for each axis but the innermost.
    pub strides: &'a [u64],
    /// Elements of the box along each axis.
    pub box_dims: &'a [u32],
    /// Order of 16-byte chunks in shared memory.
    pub swizzle: sys::CUtensorMapSwizzle,
    /// Bytes that the L2 cache fetches at a time.
    pub l2_promotion: sys::CUtensorMapL2promotion,
}

/// The driver's encoding of a tensor map.
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
    // SAFETY: every array has as many entries as the rank asks for, as was just asserted, and the map is this function's
    // own; the address is only written down.
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
