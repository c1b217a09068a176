//! An NVIDIA GPU without the library in between: PTX in, words out. What the library does with the driver is not needed
//! here, and what it does not do (clusters, maps of any rank) is.

use std::ffi::{CStr, CString, c_int, c_void};

use cudarc::driver::result::{self, DriverError, ctx, device, primary_ctx, stream};
use cudarc::driver::sys;
use flash_attention_kernels::entries::{Arch, Entry};

use crate::micro::{Element, MAP_BYTES, Map, Micro};

/// Room for what the driver says about PTX that it can not load.
const JIT_LOG_BYTES: usize = 4096;

/// One GPU, its primary context current on the thread that opened it.
#[derive(Debug)]
pub struct Gpu {
    /// What the driver calls it.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Newest CUDA version that the driver knows: major, minor.
    pub driver: (u32, u32),
}

/// What the driver's compiler made of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Compiled {
    /// Registers of a thread.
    pub registers: i32,
    /// Bytes of local memory of a thread: spills and stack.
    pub local_bytes: i32,
    /// Most threads a block may have.
    pub max_threads: i32,
}

/// A loaded module, unloaded when dropped.
struct Module(sys::CUmodule);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the module was loaded, and nothing of it runs any more: whoever launched has waited. Where a kernel
        // failed the call fails too, as every later one.
        let _ = unsafe { sys::cuModuleUnload(self.0) };
    }
}

impl Gpu {
    /// GPU number `ordinal`, its context made current on this thread.
    ///
    /// # Errors
    /// A sentence that says what is missing: driver, GPU, or what call failed.
    pub fn open(ordinal: c_int) -> Result<Self, String> {
        // SAFETY: opens the driver's library, whose initialisers are the driver's.
        if !unsafe { sys::is_culib_present() } {
            return Err("no NVIDIA driver on this machine: libcuda is not found".to_owned());
        }
        let failed = |call: &'static str| move |error| format!("{call}: {}", describe(error));
        result::init().map_err(failed("no NVIDIA GPU that the driver can start, cuInit"))?;
        let count = device::get_count().map_err(failed("cuDeviceGetCount"))?;
        if ordinal >= count {
            return Err(format!("no GPU number {ordinal}: there are {count}"));
        }
        let gpu = device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        let attribute = |which| {
            // SAFETY: `gpu` is a device that the driver just gave us.
            let value = unsafe { device::get_attribute(gpu, which) };
            value.map(|value| value as u32).map_err(failed("cuDeviceGetAttribute"))
        };
        let mut driver = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver) }
            .result()
            .map_err(failed("cuDriverGetVersion"))?;
        // SAFETY: a device the driver gave us; the context is kept to the end of the process, and was just retained.
        let current = unsafe { primary_ctx::retain(gpu).and_then(|context| ctx::set_current(context)) };
        current.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        Ok(Self {
            name: device::get_name(gpu).map_err(failed("cuDeviceGetName"))?,
            capability: (
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            driver: (driver as u32 / 1000, driver as u32 % 1000 / 10),
        })
    }

    /// Has the driver compile a kernel of the table, as the library does, and says what came of it.
    ///
    /// # Errors
    /// What the driver says of PTX that it can not load.
    pub fn compile(&self, entry: &Entry) -> Result<Compiled, String> {
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, CU_FUNC_ATTRIBUTE_NUM_REGS,
        };
        let module = load(&entry.ptx())?;
        let function = function(&module, entry.name)?;
        // SAFETY: the function is of a module that is loaded.
        let attribute = |which| unsafe { result::function::get_function_attribute(function, which) }.map_err(describe);
        Ok(Compiled {
            registers: attribute(CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_threads: attribute(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }

    /// Runs a micro-kernel over an output buffer that holds 0xa5 bytes; the words it leaves there.
    ///
    /// # Errors
    /// The call that failed, and what the driver says.
    pub fn run(&self, micro: &Micro) -> Result<Vec<u32>, String> {
        let module = load(&micro.text)?;
        let function = function(&module, "test")?;
        let failed = |call: &'static str| move |error| format!("{call}: {}", describe(error));
        let bytes = |words: &[u32]| (4 * words.len()).max(4);
        let mut got = vec![0_u32; micro.output.len()];
        // SAFETY: each buffer is as long as what is copied to or from it, and is freed after the kernel has finished or
        // failed; the kernel takes the parameters that its header names, by addresses of memory that outlives the launch.
        unsafe {
            let input = result::malloc_sync(bytes(&micro.input)).map_err(failed("cuMemAlloc"))?;
            let output = result::malloc_sync(bytes(&micro.output)).map_err(failed("cuMemAlloc"))?;
            result::memcpy_htod_sync(input, &micro.input).map_err(failed("cuMemcpyHtoD"))?;
            result::memset_d8_sync(output, 0xa5, bytes(&micro.output)).map_err(failed("cuMemsetD8"))?;
            let params = micro
                .params(input, output, encode)
                .map_err(failed("cuTensorMapEncodeTiled"))?;
            launch(function, micro, &params).map_err(failed("cuLaunchKernelEx"))?;
            stream::synchronize(std::ptr::null_mut()).map_err(failed("the kernel"))?;
            result::memcpy_dtoh_sync(&mut got, output).map_err(failed("cuMemcpyDtoH"))?;
            result::free_sync(input).map_err(failed("cuMemFree"))?;
            result::free_sync(output).map_err(failed("cuMemFree"))?;
        }
        Ok(got)
    }
}

/// Whether a card of this compute capability loads PTX for a target like `sm_80` or `sm_90a`, which with its letter is for
/// that card alone.
pub fn loads(target: &str, (major, minor): (u32, u32)) -> bool {
    let Some(number) = target.strip_prefix("sm_") else {
        return false;
    };
    let capability = 10 * major + minor;
    match number.strip_suffix('a') {
        Some(exact) => exact.parse() == Ok(capability),
        None => number.parse().is_ok_and(|least: u32| least <= capability),
    }
}

/// Whether a card of this compute capability loads the kernels of an architecture.
pub fn loads_arch(arch: Arch, capability: (u32, u32)) -> bool {
    loads(arch.name(), capability)
}

fn load(ptx: &str) -> Result<Module, String> {
    let image = CString::new(ptx).map_err(|_| "the PTX holds a zero byte".to_owned())?;
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
        format!("cuModuleLoadDataEx: {}. {}", describe(error), log.trim())
    })?;
    Ok(Module(module))
}

fn function(module: &Module, name: &str) -> Result<sys::CUfunction, String> {
    let name = CString::new(name).map_err(|_| "the name holds a zero byte".to_owned())?;
    // SAFETY: the module is loaded.
    unsafe { result::module::get_function(module.0, name) }
        .map_err(|error| format!("cuModuleGetFunction: {}", describe(error)))
}

/// Launches a micro-kernel as one cluster of blocks.
///
/// # Safety
/// `function` takes these parameters, and they hold valid addresses.
unsafe fn launch(function: sys::CUfunction, micro: &Micro, params: &[Vec<u8>]) -> Result<(), DriverError> {
    // SAFETY: a struct of plain numbers and a union of such, for which zero bytes are values.
    let mut cluster: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    cluster.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
        x: micro.cluster,
        y: 1,
        z: 1,
    };
    let config = sys::CUlaunchConfig {
        gridDimX: micro.cluster,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: micro.block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: std::ptr::null_mut(),
        attrs: &mut cluster,
        // Cards before Hopper know no clusters.
        numAttrs: u32::from(micro.cluster > 1),
    };
    let mut addresses: Vec<*mut c_void> = params.iter().map(|param| param.as_ptr().cast_mut().cast()).collect();
    // SAFETY: passed on to the caller; the driver copies the parameters before it returns.
    unsafe { sys::cuLaunchKernelEx(&config, function, addresses.as_mut_ptr(), std::ptr::null_mut()) }.result()
}

/// The driver's form of a map.
fn encode(map: &Map, address: u64) -> Result<[u8; MAP_BYTES], DriverError> {
    use sys::CUtensorMapSwizzle as Swizzle;
    let element = match map.element {
        Element::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Element::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Element::U32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
    };
    let swizzle = match map.span {
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let mut encoded = sys::CUtensorMap_st { opaque: [0; 16] };
    // SAFETY: every array has as many entries as the rank asks for; the address is only written down.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            element,
            map.dims.len() as u32,
            address as *mut c_void,
            map.dims.as_ptr(),
            map.strides().as_ptr(),
            map.box_dims.as_ptr(),
            vec![1; map.dims.len()].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    let mut bytes = [0; MAP_BYTES];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(encoded.opaque) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    Ok(bytes)
}

/// The driver's name for an error, and what it says of it.
fn describe(error: DriverError) -> String {
    let name = error.error_name().map_or("unknown".into(), CStr::to_string_lossy);
    let meaning = error
        .error_string()
        .map_or("no description".into(), CStr::to_string_lossy);
    format!("{name} ({meaning})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_with_a_letter_are_for_one_card() {
        assert!(loads("sm_80", (8, 0)) && loads("sm_80", (9, 0)) && loads("sm_80", (12, 0)));
        assert!(!loads("sm_89", (8, 6)) && loads("sm_89", (9, 0)));
        assert!(loads("sm_90a", (9, 0)) && !loads("sm_90a", (8, 9)) && !loads("sm_90a", (10, 0)));
        assert!(!loads("compute_90", (9, 0)) && !loads("", (9, 0)));
        assert!(loads_arch(Arch::Sm90a, (9, 0)) && !loads_arch(Arch::Sm90a, (10, 0)));
    }
}
