//! An NVIDIA GPU without the library, through the library's driver calls. It runs PTX and returns words, with
//! clusters and with tensor maps of any rank, which the library does not use.

use std::ffi::c_void;

use cudarc::driver::result::{self, stream};
use cudarc::driver::sys;
use flash_attention::device::DeviceInfo;
use flash_attention::device::driver::{self, DriverError, Geometry, Tiled, failed};
use flash_attention_kernels::entries::{Arch, Entry};

use crate::micro::{Element, MAP_BYTES, Map, Micro};

/// A GPU whose primary context is current on the thread that opened it.
#[derive(Debug)]
pub struct Gpu {
    /// Name that the driver gives the GPU.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Newest CUDA version that the driver supports: major, minor.
    pub driver: (u32, u32),
}

/// Properties of a kernel compiled by the driver.
#[derive(Clone, Copy, Debug)]
pub struct Compiled {
    /// Registers per thread.
    pub registers: i32,
    /// Local memory per thread in bytes: spills and stack.
    pub local_bytes: i32,
    /// Most threads that a block may have.
    pub max_threads: i32,
}

/// A loaded module, unloaded when dropped.
struct Module(sys::CUmodule);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the module was loaded, and none of its kernels still runs: every caller waits for its launch. After
        // a failed kernel this call fails, as every later one does.
        let _ = unsafe { sys::cuModuleUnload(self.0) };
    }
}

impl Gpu {
    /// Opens GPU number `ordinal` and makes its context current on this thread, to the end of the process.
    ///
    /// # Errors
    /// A sentence with what is missing (driver or GPU), or with the call that failed.
    pub fn open(ordinal: usize) -> Result<Self, String> {
        let count = driver::start().map_err(|reason| reason.to_string())?;
        if ordinal >= count {
            return Err(format!("no GPU number {ordinal}: there are {count}"));
        }
        let gpu = driver::Gpu::open(ordinal).map_err(said)?;
        let context = gpu.primary_context().map_err(said)?;
        // SAFETY: the context was just retained, to the end of the process.
        std::mem::forget(unsafe { driver::enter(context) }.map_err(said)?);
        let DeviceInfo::Gpu { compute_capability, .. } = gpu.info else {
            return Err(format!("{} is not a GPU", gpu.name));
        };
        Ok(Self {
            name: gpu.name,
            capability: compute_capability,
            driver: driver::version().map_err(said)?,
        })
    }

    /// Compiles a kernel of the table with the driver, as the library does, and returns its properties.
    ///
    /// # Errors
    /// The driver's message for PTX that it cannot load.
    pub fn compile(&self, entry: &Entry) -> Result<Compiled, String> {
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, CU_FUNC_ATTRIBUTE_NUM_REGS,
        };
        let module = Module(driver::load(&entry.ptx()).map_err(said)?);
        // SAFETY: the module is loaded.
        let function = unsafe { driver::function(module.0, entry.name) }.map_err(said)?;
        let attribute = |which| {
            // SAFETY: the function belongs to the loaded module.
            unsafe { result::function::get_function_attribute(function, which) }
                .map_err(|error| said(failed("cuFuncGetAttribute")(error)))
        };
        Ok(Compiled {
            registers: attribute(CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_threads: attribute(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }

    /// Runs a micro-kernel with an output buffer of 0xa5 bytes; returns the words of the buffer afterwards.
    ///
    /// # Errors
    /// The call that failed, with the driver's message.
    pub fn run(&self, micro: &Micro) -> Result<Vec<u32>, String> {
        let module = Module(driver::load(&micro.text).map_err(said)?);
        // SAFETY: the module is loaded.
        let function = unsafe { driver::function(module.0, "test") }.map_err(said)?;
        let failed = |call: &'static str| move |error| said(failed(call)(error));
        let bytes = |words: &[u32]| (4 * words.len()).max(4);
        let mut got = vec![0_u32; micro.output.len()];
        // SAFETY: each buffer is as long as the data copied to or from it, and is freed after the kernel has finished
        // or failed. The kernel takes the parameters that its header names, with addresses of memory that outlives
        // the launch.
        unsafe {
            let input = result::malloc_sync(bytes(&micro.input)).map_err(failed("cuMemAlloc"))?;
            let output = result::malloc_sync(bytes(&micro.output)).map_err(failed("cuMemAlloc"))?;
            result::memcpy_htod_sync(input, &micro.input).map_err(failed("cuMemcpyHtoD"))?;
            result::memset_d8_sync(output, 0xa5, bytes(&micro.output)).map_err(failed("cuMemsetD8"))?;
            let params = micro.params(input, output, encode).map_err(said)?;
            let geometry = Geometry {
                grid: [micro.cluster, 1, 1],
                threads: micro.block,
                shared_bytes: 0,
                cluster: micro.cluster,
            };
            let mut arguments: Vec<*mut c_void> = params.iter().map(|param| param.as_ptr().cast_mut().cast()).collect();
            driver::launch(function, geometry, std::ptr::null_mut(), &mut arguments).map_err(said)?;
            stream::synchronize(std::ptr::null_mut()).map_err(failed("the kernel"))?;
            result::memcpy_dtoh_sync(&mut got, output).map_err(failed("cuMemcpyDtoH"))?;
            result::free_sync(input).map_err(failed("cuMemFree"))?;
            result::free_sync(output).map_err(failed("cuMemFree"))?;
        }
        Ok(got)
    }
}

/// Returns true if a GPU of this compute capability loads PTX for a target like `sm_80` or `sm_90a`. A target with a
/// letter is for that compute capability alone.
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

/// Returns true if a GPU of this compute capability loads the kernels of an architecture.
pub fn loads_arch(arch: Arch, capability: (u32, u32)) -> bool {
    loads(arch.name(), capability)
}

/// Encodes a tensor map with the driver.
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
    let words = driver::encode(&Tiled {
        element,
        address,
        dims: &map.dims,
        strides: &map.strides(),
        box_dims: &map.box_dims,
        swizzle,
        l2_promotion: sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
    })?;
    let mut bytes = [0; MAP_BYTES];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    Ok(bytes)
}

/// Writes an error as a sentence.
fn said(error: DriverError) -> String {
    error.to_string()
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
