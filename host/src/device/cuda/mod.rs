//! An NVIDIA GPU, through the driver, which is loaded when the program runs.
//!
//! The driver's library is opened only if it is installed, so a machine without one builds and runs everything else.
//! Each GPU is opened once, with one memory pool, and kept to the end of the process. Each context keeps the kernels
//! that were loaded into it. [`Device::cuda`] works on a stream of its own in the GPU's primary context, which it
//! shares with other CUDA code of the process. [`Device::cuda_on`] and [`Device::cuda_from_raw`] work on a stream of
//! the caller. Calls are asynchronous: launches and frees follow each other on the stream, and only copies and
//! `synchronize` wait.

mod calls;
pub mod driver;

use std::any::Any;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::CudaStream;
use cudarc::driver::result::stream;
use cudarc::driver::sys;

use self::calls::{Calls, CudaCalls, Function, Queue};
use self::driver::{DriverError, Geometry, Gpu, failed};
use super::lists::Lists;
use super::modules::{Loaded, Modules};
use super::{Backend, Device, DeviceKind, Run};
use crate::error::{CudaUnavailable, Error};
use crate::plan::{AnyPlan, Launch, PassType, Rotary, Template};
use crate::progress::Reporter;
use crate::target::{DeviceInfo, MIN_COMPUTE_CAPABILITY};

/// A device: a stream of a GPU.
struct Cuda {
    context: Arc<Context>,
    queue: Queue,
    calls: &'static dyn Calls,
    lists: Lists,
    /// Owner that keeps a foreign context and stream alive.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

/// A CUDA context and the kernels that were loaded into it.
struct Context {
    ordinal: usize,
    name: String,
    info: DeviceInfo,
    pool: Option<sys::CUmemoryPool>,
    /// Functions of the modules loaded so far. A module is never unloaded.
    functions: Modules<Function>,
}

// SAFETY: the pool is a driver's handle, which may be used from any thread, like those in `Queue`. It is never
// destroyed.
unsafe impl Send for Context {}
// SAFETY: the reason given for `Send`.
unsafe impl Sync for Context {}

impl Device {
    /// Returns GPU number `ordinal`, in the driver's order (`CUDA_VISIBLE_DEVICES` applies). Calls with the same
    /// number return the same device.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`] if there is no driver, no GPU, or either is too old; [`Error::UnknownDevice`] if
    /// there are fewer GPUs; [`Error::Driver`] if the GPU cannot be opened.
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

    /// Makes a device whose work goes to a stream of cudarc, in the order of the calls. candle's
    /// `CudaDevice::cuda_stream()` returns such a stream.
    ///
    /// The device keeps the stream and its context alive. Every call makes a new device with a memory count of its
    /// own, and all tensors of one attention call must come from one device. Kernels are loaded once a context and
    /// shared by all its devices.
    ///
    /// # Errors
    /// The errors of [`cuda`](Self::cuda).
    pub fn cuda_on(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context().cu_ctx().cast();
        // SAFETY: the stream keeps its context, the device keeps the stream.
        unsafe { Self::cuda_from_raw(context, stream.cu_stream().cast(), Some(stream.clone())) }
    }

    /// Makes a device whose work goes to a stream given by the driver's handles. `context` is a `CUcontext`, or null
    /// for the context that is current on this thread. `stream` is a `CUstream` (or `cudaStream_t`) of that context,
    /// or null for its default stream.
    ///
    /// Work follows the stream's order: what was launched there before has finished when our kernels read it, without
    /// any wait on the host. `owner`, if given, is dropped with the device. Kernels and memory are as for
    /// [`cuda_on`](Self::cuda_on).
    ///
    /// ## In a CUDA graph
    ///
    /// A stream capture can record a call that neither allocates nor waits:
    /// [`forward_into_with`](crate::Attention::forward_into_with),
    /// [`backward_into_with`](crate::Attention::backward_into_with), and in a workspace of the caller's
    /// [`forward_ragged_into`](crate::Attention::forward_ragged_into),
    /// [`backward_ragged_into`](crate::Attention::backward_ragged_into) and
    /// [`forward_cached_into`](crate::Attention::forward_cached_into). Before the capture, load the kernels and lists of
    /// work with [`prepare`](Self::prepare), or by the same call. Lists that a captured call reads stay in the device's
    /// memory as long as the device. During the capture, drop neither this device
    /// nor a tensor of it that owns memory or has an owner: dropping a tensor that owns memory frees it, dropping one
    /// that has an owner waits for the device. The graph stores the addresses of its tensors, so their memory has to
    /// outlive it.
    ///
    /// # Errors
    /// The errors of [`cuda`](Self::cuda).
    ///
    /// # Safety
    /// Context and stream exist until `owner` is dropped; without an owner, until the device, its clones and its
    /// tensors are dropped. The stream is of this context.
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
    /// Opens a GPU with its primary context and a stream of our own. The driver has started and counts more than
    /// `ordinal` GPUs.
    fn open(ordinal: usize) -> Result<Self, Error> {
        let failed_here = |error| driver_error(spec(ordinal), error);
        let gpu = Gpu::open(ordinal).map_err(failed_here)?;
        let handle = gpu.primary_context().map_err(failed_here)?;
        // SAFETY: the context was just retained, to the end of the process.
        let _entered = unsafe { driver::enter(handle) }.map_err(failed_here)?;
        let context = Context::current(handle)?;
        // A stream of the default kind and the null stream wait for each other, so memory that other code filled
        // without naming a stream is ready when our kernels read it.
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
        // SAFETY: the caller promises that the context exists. The driver refuses null.
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
            lists: Lists::default(),
            _owner: owner,
        }
    }

    fn failed(&self, error: DriverError) -> Error {
        driver_error(self.spec(), error)
    }

    /// Returns the function of a kernel, which is loaded at its first use.
    fn function(&self, launch: &Launch<impl PassType>) -> Result<Loaded<Function>, Error> {
        let entry = launch.entry;
        let load = |ptx: &str| self.calls.load(self.queue, ptx, entry.name, entry.shared_bytes);
        self.context.functions.get(launch, || self.spec(), load)
    }

    /// Loads the kernels of launches, and the lists that they read.
    fn load(&self, launches: &[Launch<impl PassType>]) -> Result<(), Error> {
        launches.iter().try_for_each(|launch| {
            self.lists.of(self, launch)?.iter().for_each(|list| list.pin());
            self.function(launch).map(drop)
        })
    }

    /// # Safety
    /// The contract of [`Backend::run`].
    unsafe fn launch_all<P: PassType>(&self, launches: &[Launch<P>], results: P::Results) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        let launch = |launch| unsafe { self.launch(launch, results) };
        launches.iter().try_for_each(launch)
    }

    /// # Safety
    /// The contract of [`Backend::run`].
    unsafe fn launch<P: PassType>(&self, launch: &Launch<P>, results: P::Results) -> Result<(), Error> {
        let refused = |error| launch.error(self.spec(), error);
        let params = launch
            .params(results, |tile| self.calls.encode(tile))
            .map_err(refused)?;
        // Held until the kernel is launched, so that no other call frees them before. A graph launches it again at any time.
        let lists = self.lists.of(self, launch)?;
        if !lists.is_empty()
            && self
                .calls
                .is_capturing(self.queue)
                .map_err(|error| self.failed(error))?
        {
            lists.iter().for_each(|list| list.pin());
        }
        let params = params.with_lists(&lists.iter().map(|list| list.address).collect::<Vec<_>>());
        let Loaded {
            module: function,
            slots,
            ..
        } = self.function(launch)?;
        let numbers = launch.numbers(&slots, &results);
        let geometry = Geometry {
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            cluster: launch.cluster,
        };
        let params = [params.bytes(), &numbers];
        let params = if numbers.is_empty() { &params[..1] } else { &params[..] };
        // SAFETY: the parameters are the plan's own, of the struct that the entry takes, and the numbers those that its text
        // reads; the addresses in them are valid, says the caller.
        unsafe { self.calls.launch(self.queue, function, geometry, params) }.map_err(refused)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        for (address, bytes) in self.lists.take() {
            // SAFETY: `alloc` made it, and no call of this device comes any more.
            unsafe { self.free(address, bytes) }
        }
    }
}

impl Context {
    /// Returns the context `handle`, which is current on this thread. A context that was seen before has its kernels
    /// already.
    fn current(handle: sys::CUcontext) -> Result<Arc<Self>, Error> {
        /// Contexts by the id that the driver gives them. The driver never gives an id twice.
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
        // SAFETY: the context is current; the call writes one integer.
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
        // All contexts of a GPU share one pool.
        let pool = match seen.iter().find(|(_, context)| context.ordinal == ordinal) {
            Some((_, context)) => context.pool,
            None => gpu.make_pool().map_err(|error| driver_error(spec(ordinal), error))?,
        };
        let context = Arc::new(Self {
            ordinal,
            name: gpu.name,
            info: gpu.info,
            pool,
            functions: Modules::new(),
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
            // Freed memory may still be in use by unfinished work, and lie in the pool in pieces of other sizes.
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
        // SAFETY: passed on to the caller. It fails only after a kernel has failed, which every later call reports.
        let _ = unsafe { self.calls.free(self.queue, address) };
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory is as long as `data`, which is borrowed until the copy has
        // finished.
        unsafe { self.calls.upload(self.queue, address, data) }.map_err(|error| self.failed(error))?;
        self.synchronize()
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory is as long as `data`, which is borrowed until the copy has
        // finished.
        unsafe { self.calls.download(self.queue, address, data) }.map_err(|error| self.failed(error))?;
        self.synchronize()
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory has this length.
        unsafe { self.calls.zero(self.queue, address, bytes) }.map_err(|error| self.failed(error))
    }

    unsafe fn run(&self, run: Run<'_>, _reporter: &Reporter<'_>) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        unsafe {
            match run {
                Run::Forward(plan, results) => self.launch_all(plan.launches(), results),
                Run::Backward(plan, results) => self.launch_all(plan.launches(), results),
            }
        }
    }

    unsafe fn move_tokens(&self, launch: &Launch<Rotary>) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        unsafe { self.launch(launch, ()) }
    }

    fn prepare(&self, plan: AnyPlan<'_>) -> Result<(), Error> {
        match plan {
            AnyPlan::Forward(plan) => self.load(plan.launches()),
            AnyPlan::Backward(plan) => self.load(plan.launches()),
        }
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
