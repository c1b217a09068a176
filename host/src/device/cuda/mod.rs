//! An NVIDIA GPU, through the driver that is found when the program runs.
//!
//! The driver's library is opened only if it is there, so a machine without one builds and runs everything else. Each
//! GPU is opened once and kept to the end of the process, with one memory pool; each context with the kernels loaded into
//! it so far. [`Device::cuda`] works on a stream of its own in the GPU's primary context, which other CUDA code in the
//! process shares; [`Device::cuda_on`] and [`Device::cuda_from_raw`] on a stream that belongs to somebody else. Calls are
//! asynchronous: launches and frees follow each other on the stream, and only copies and `synchronize` wait.

mod calls;
pub mod driver;

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::CudaStream;
use cudarc::driver::result::stream;
use cudarc::driver::sys;
use flash_attention_kernels::entries::Entry;

use self::calls::{Calls, CudaCalls, Function, Queue};
use self::driver::{DriverError, Geometry, Gpu, failed};
use super::{Backend, Device, DeviceKind};
use crate::error::{CudaUnavailable, Error};
use crate::plan::{Launch, Plan, Results};
use crate::progress::Reporter;
use crate::target::{DeviceInfo, MIN_COMPUTE_CAPABILITY};

/// A stream of a GPU.
struct Cuda {
    context: Arc<Context>,
    queue: Queue,
    calls: &'static dyn Calls,
    /// Owner that keeps a foreign context and stream alive.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

/// A context, with the kernels that were loaded into it.
struct Context {
    ordinal: usize,
    name: String,
    info: DeviceInfo,
    pool: Option<sys::CUmemoryPool>,
    /// Functions by the name of their entry. A module is loaded once and never unloaded.
    functions: Mutex<HashMap<&'static str, Function>>,
}

// SAFETY: the pool is the driver's handle, as those in `Queue`; it is never destroyed.
unsafe impl Send for Context {}
// SAFETY: as for Send.
unsafe impl Sync for Context {}

impl Device {
    /// GPU number `ordinal`, counted as the driver does (`CUDA_VISIBLE_DEVICES` applies). The same number is the same
    /// device.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] if there is no driver, no GPU, or either is too old; [`Error::UnknownDevice`] if there
    /// are fewer GPUs; [`Error::Driver`] if the GPU cannot be opened.
    pub fn cuda(ordinal: usize) -> Result<Self, Error> {
        static OPEN: Mutex<Vec<(usize, Device)>> = Mutex::new(Vec::new());
        let mut open = lock(&OPEN);
        if let Some((_, device)) = open.iter().find(|(number, _)| *number == ordinal) {
            return Ok(device.clone());
        }
        let count = start()?;
        if ordinal >= count {
            return Err(Error::UnknownDevice { ordinal, count });
        }
        let device = Self::new(DeviceKind::Cuda, Box::new(Cuda::open(ordinal)?));
        open.push((ordinal, device.clone()));
        Ok(device)
    }

    /// A GPU whose work goes to a stream of cudarc's, in the order in which calls are made; candle's `CudaDevice` gives its
    /// own by `cuda_stream()`.
    ///
    /// The device keeps the stream and its context. It has a count of memory of its own, and each call makes a new device:
    /// tensors of one attention call come from one of them. Kernels are loaded once a context, whichever device first needs
    /// them.
    ///
    /// # Errors
    /// The errors of [`cuda`](Self::cuda).
    pub fn cuda_on(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context().cu_ctx().cast();
        // SAFETY: the stream keeps its context, the device keeps the stream.
        unsafe { Self::cuda_from_raw(context, stream.cu_stream().cast(), Some(stream.clone())) }
    }

    /// A GPU whose work goes to a stream given by the driver's handles: a `CUcontext`, or null for the context that is
    /// current on this thread, and a `CUstream` (or `cudaStream_t`) of that context, where null is its default stream.
    ///
    /// Work follows the stream's order, so what was launched there before is finished when ours reads it, and no one has to
    /// wait. `owner`, if given, is dropped with the device. [`cuda_on`](Self::cuda_on) says the rest.
    ///
    /// ## In a CUDA graph
    ///
    /// A call is captured with the stream if it neither allocates nor waits, and so do
    /// [`forward_into`](crate::Attention::forward_into) and
    /// [`backward_into_with`](crate::Attention::backward_into_with). Before the capture, [`prepare`](Self::prepare) loads
    /// the kernels. During it, drop no tensor of this device that has memory of ours or an owner: the first is freed, the
    /// second waited for. The graph has the addresses of all tensors in it, so their memory has to outlive it.
    ///
    /// # Errors
    /// The errors of [`cuda`](Self::cuda).
    ///
    /// # Safety
    /// Context and stream exist until `owner` is dropped; without an owner, until the device, its clones and its tensors
    /// are dropped. The stream is of this context.
    pub unsafe fn cuda_from_raw(
        context: *mut c_void,
        stream: *mut c_void,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self, Error> {
        start()?;
        // SAFETY: passed on to the caller.
        let cuda = unsafe { Cuda::on_foreign(context.cast(), stream.cast(), owner) }?;
        Ok(Self::new(DeviceKind::Cuda, Box::new(cuda)))
    }
}

fn start() -> Result<usize, Error> {
    driver::start().map_err(|reason| Error::CudaUnavailable { reason })
}

impl Cuda {
    /// A GPU's primary context and a stream of our own. The driver has started and there are more than `ordinal` GPUs.
    fn open(ordinal: usize) -> Result<Self, Error> {
        let failed_here = |error| driver_error(spec(ordinal), error);
        let gpu = Gpu::open(ordinal).map_err(failed_here)?;
        let handle = gpu.primary_context().map_err(failed_here)?;
        // SAFETY: the context was just retained, to the end of the process.
        let _entered = unsafe { driver::enter(handle) }.map_err(failed_here)?;
        let context = Context::current(handle)?;
        // A stream of the default kind waits for the null stream and it for ours: foreign memory that was filled by code
        // which knows no streams is ready when we read it.
        let stream = stream::create(stream::StreamKind::Default)
            .map_err(failed("cuStreamCreate"))
            .map_err(failed_here)?;
        Ok(Self::new(context, handle, stream, &CudaCalls, None))
    }

    /// # Safety
    /// The contract of [`Device::cuda_from_raw`]; the driver has started.
    unsafe fn on_foreign(
        context: sys::CUcontext,
        stream: sys::CUstream,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self, Error> {
        let failed_here = |error| driver_error("a GPU of a foreign context".to_owned(), error);
        let handle = if context.is_null() {
            let current = cudarc::driver::result::ctx::get_current().map_err(failed("cuCtxGetCurrent"));
            current.map_err(failed_here)?.unwrap_or(context)
        } else {
            context
        };
        // SAFETY: the context exists, says the caller, or is null, which the driver refuses.
        let _entered = unsafe { driver::enter(handle) }.map_err(failed_here)?;
        Ok(Self::new(Context::current(handle)?, handle, stream, &CudaCalls, owner))
    }

    fn new(
        context: Arc<Context>,
        handle: sys::CUcontext,
        stream: sys::CUstream,
        calls: &'static dyn Calls,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Self {
        let queue = Queue {
            context: handle,
            stream,
            pool: context.pool,
        };
        Self {
            context,
            queue,
            calls,
            _owner: owner,
        }
    }

    fn failed(&self, error: DriverError) -> Error {
        driver_error(self.spec(), error)
    }

    fn launch_error(&self, entry: &'static Entry) -> impl Fn(DriverError) -> Error + use<> {
        let (device, kernel) = (self.spec(), entry.name);
        move |error| Error::Launch {
            device: device.clone(),
            kernel,
            message: error.to_string(),
        }
    }

    /// The kernel's function, loaded at its first use.
    fn function(&self, entry: &'static Entry) -> Result<Function, Error> {
        let mut functions = lock(&self.context.functions);
        if let Some(function) = functions.get(entry.name) {
            return Ok(*function);
        }
        let function = self
            .calls
            .load(self.queue, &entry.ptx(), entry.name, entry.shared_bytes)
            .map_err(self.launch_error(entry))?;
        functions.insert(entry.name, function);
        Ok(function)
    }

    /// # Safety
    /// The contract of [`Backend::run`].
    unsafe fn launch(&self, launch: &Launch, results: Results) -> Result<(), Error> {
        let refused = self.launch_error(launch.entry);
        let params = launch
            .params(results, |tile| self.calls.encode(tile))
            .map_err(&refused)?
            .ok_or_else(|| launch.wrong_results(self.spec()))?;
        let function = self.function(launch.entry)?;
        let geometry = Geometry {
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            cluster: 1,
        };
        // SAFETY: the parameters are the plan's own, of the struct that the entry takes; the addresses in them are valid,
        // says the caller.
        unsafe { self.calls.launch(self.queue, function, geometry, params.as_bytes()) }.map_err(refused)
    }
}

impl Context {
    /// The context that is current on this thread, which is `handle`. One that was seen before has its kernels already.
    fn current(handle: sys::CUcontext) -> Result<Arc<Self>, Error> {
        /// Contexts by the number that the driver gives each of them, and no other one after it.
        static SEEN: Mutex<Vec<(u64, Arc<Context>)>> = Mutex::new(Vec::new());
        let failed_here = |error| driver_error("a GPU".to_owned(), error);
        let (mut id, mut gpu) = (0, 0);
        // SAFETY: the context is current; each call writes one integer.
        unsafe { sys::cuCtxGetId(handle, &mut id) }
            .result()
            .map_err(failed("cuCtxGetId"))
            .map_err(failed_here)?;
        let mut seen = lock(&SEEN);
        if let Some((_, context)) = seen.iter().find(|(number, _)| *number == id) {
            return Ok(context.clone());
        }
        // SAFETY: as above.
        unsafe { sys::cuCtxGetDevice(&mut gpu) }
            .result()
            .map_err(failed("cuCtxGetDevice"))
            .map_err(failed_here)?;
        let ordinal = gpu as usize;
        let gpu = Gpu::describe(gpu).map_err(|error| driver_error(spec(ordinal), error))?;
        if let DeviceInfo::Gpu {
            compute_capability: found,
            ..
        } = gpu.info
            && found < MIN_COMPUTE_CAPABILITY
        {
            let reason = CudaUnavailable::GpuTooOld {
                name: gpu.name,
                found,
                needed: MIN_COMPUTE_CAPABILITY,
            };
            return Err(Error::CudaUnavailable { reason });
        }
        // One pool a GPU, whichever of its contexts allocates.
        let pool = match seen.iter().find(|(_, context)| context.ordinal == ordinal) {
            Some((_, context)) => context.pool,
            None => gpu.make_pool().map_err(|error| driver_error(spec(ordinal), error))?,
        };
        let context = Arc::new(Self {
            ordinal,
            name: gpu.name,
            info: gpu.info,
            pool,
            functions: Mutex::default(),
        });
        seen.push((id, context.clone()));
        Ok(context)
    }
}

impl Backend for Cuda {
    fn info(&self) -> DeviceInfo {
        self.context.info
    }

    fn spec(&self) -> String {
        spec(self.context.ordinal)
    }

    fn name(&self) -> String {
        self.context.name.clone()
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let is_full = |error: &DriverError| error.code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let mut address = self.calls.alloc(self.queue, bytes);
        if address.as_ref().is_err_and(is_full) && self.queue.pool.is_some() {
            // What was freed may still be in use by work under way, and in pieces of other sizes.
            self.synchronize()?;
            self.calls.trim(self.queue).map_err(|error| self.failed(error))?;
            address = self.calls.alloc(self.queue, bytes);
        }
        address.map_err(|error| {
            if is_full(&error) {
                Error::OutOfMemory {
                    device: self.spec(),
                    requested: bytes as u64,
                    free: self.calls.free_bytes(self.queue).ok(),
                }
            } else {
                self.failed(error)
            }
        })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // SAFETY: passed on to the caller. It only fails where a kernel failed before, which every later call reports.
        let _ = unsafe { self.calls.free(self.queue, address) };
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: the memory is as long as `data`, says the caller; `data` is borrowed until the copy is over.
        unsafe { self.calls.upload(self.queue, address, data) }.map_err(|error| self.failed(error))?;
        self.synchronize()
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: as for `upload`.
        unsafe { self.calls.download(self.queue, address, data) }.map_err(|error| self.failed(error))?;
        self.synchronize()
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the memory is this long, says the caller.
        unsafe { self.calls.zero(self.queue, address, bytes) }.map_err(|error| self.failed(error))
    }

    unsafe fn run(&self, plan: &Plan, results: Results, _reporter: &Reporter<'_>) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        let launch = |launch| unsafe { self.launch(launch, results) };
        plan.launches().iter().try_for_each(launch)
    }

    fn prepare(&self, plan: &Plan) -> Result<(), Error> {
        plan.launches()
            .iter()
            .try_for_each(|launch| self.function(launch.entry).map(drop))
    }

    fn stream(&self) -> Option<*mut c_void> {
        Some(self.queue.stream.cast())
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.calls.synchronize(self.queue).map_err(|error| self.failed(error))
    }
}

fn spec(ordinal: usize) -> String {
    format!("cuda:{ordinal}")
}

fn driver_error(device: String, error: DriverError) -> Error {
    Error::Driver {
        device,
        call: error.call,
        message: error.message,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
