//! Devices: they hold tensors and run calls.
//!
//! The trait `Backend` has three implementations. A GPU and the emulator take a [`Plan`] and launch its kernels. The
//! CPU takes the same plan and solves the [`Problem`](crate::problem::Problem) in it with native code.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulator")]
mod emulated;
#[cfg(any(feature = "cuda", feature = "emulator"))]
mod lists;
#[cfg(any(feature = "cuda", feature = "emulator"))]
mod modules;

use std::ffi::c_void;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use cuda::driver;
#[cfg(feature = "emulator")]
pub use emulated::EmulatorOptions;
use flash_attention_kernels::entries::Arch;
#[cfg(feature = "emulator")]
use ptx_emulator::Counters;

#[cfg(not(feature = "cuda"))]
use crate::error::CudaUnavailable;
use crate::error::Error;
pub use crate::layout::DeviceId;
use crate::plan::{AnyPlan, Backward, BackwardResults, ForwardResults, Launch, Plan, Rotary};
use crate::progress::Reporter;
pub use crate::target::{DeviceInfo, Instructions};

/// A plan to carry out, and the addresses of its results.
#[derive(Clone, Copy)]
pub(crate) enum Run<'a> {
    Forward(&'a Plan, ForwardResults),
    Backward(&'a Plan<Backward>, BackwardResults),
}

/// Operations of every kind of device. Addresses are the device's own; on the CPU they are pointers.
pub(crate) trait Backend: Send + Sync {
    /// Returns the numbers that plans depend on.
    fn info(&self) -> DeviceInfo;

    /// Returns the text that [`Device::from_str`] reads for this device.
    fn spec(&self) -> String;

    /// Returns the device's name for people.
    fn name(&self) -> String;

    /// Allocates `bytes` > 0, aligned to at least 64 bytes. The content is undefined but readable.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;

    /// Frees memory once the work launched before, which may still use it, has finished.
    ///
    /// # Safety
    /// `address` came from `alloc(bytes)` and was not freed.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies to the device.
    ///
    /// # Safety
    /// `address .. address + data.len()` is memory of this device that nothing else accesses during the copy.
    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error>;

    /// Copies from the device, after all work launched before has finished.
    ///
    /// # Safety
    /// `address .. address + data.len()` is memory of this device that nothing else writes during the copy.
    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error>;

    /// Fills memory with zero bytes.
    ///
    /// # Safety
    /// `address .. address + bytes` is memory of this device that nothing else accesses meanwhile.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error>;

    /// Carries out a plan. A GPU launches the work and returns. A device that waits for its work reports progress.
    ///
    /// # Safety
    /// The tensors lie where the plan says. The addresses of the results are memory of this device, laid out as the plan
    /// says. Nothing else writes the inputs or accesses the results meanwhile.
    unsafe fn run(&self, run: Run<'_>, reporter: &Reporter<'_>) -> Result<(), Error>;

    /// Carries out plans of one batch, none of which reads what another writes. Only a device that computes them in one pass
    /// reports progress.
    ///
    /// # Safety
    /// The contract of [`run`](Self::run) for each plan; no two write the same memory.
    unsafe fn run_batch(&self, runs: &[Run<'_>], _reporter: &Reporter<'_>) -> Result<(), Error> {
        runs.iter().try_for_each(|&run| {
            // SAFETY: passed on to the caller.
            unsafe { self.run(run, &Reporter::silent()) }
        })
    }

    /// Moves rows of tokens as a launch of [`Launch::rotary`] describes it.
    ///
    /// # Safety
    /// The tensors lie at the addresses of the launch's parameters, hold the rows of its tokens, and share no memory; the angles of its
    /// pairs exist at the position of each token. Nothing else writes what is read or accesses what is written meanwhile.
    unsafe fn move_tokens(&self, launch: &Launch<Rotary>) -> Result<(), Error>;

    /// Loads the kernels of a plan, on a device that has kernels to load.
    fn prepare(&self, _plan: AnyPlan<'_>) -> Result<(), Error> {
        Ok(())
    }

    /// Waits until everything launched has finished.
    fn synchronize(&self) -> Result<(), Error>;

    /// Returns the stream that work is launched on, or `None` on a device without streams.
    fn stream(&self) -> Option<*mut c_void> {
        None
    }

    /// Returns counts of executed instructions and moved bytes, or `None` on a device that does not count.
    #[cfg(feature = "emulator")]
    fn counters(&self) -> Option<Counters> {
        None
    }

    /// Resets the counters to zero.
    #[cfg(feature = "emulator")]
    fn reset_counters(&self) {}
}

/// A device and its memory. A clone is the same device.
///
/// Devices are equal if they share their memory: [`Device::cpu`] is always one device, and so is `Device::cuda(n)`.
/// Every call of another constructor makes a new one.
#[derive(Clone)]
pub struct Device(Arc<Shared>);

struct Shared {
    id: DeviceId,
    kind: DeviceKind,
    backend: Box<dyn Backend>,
    in_use: AtomicU64,
    peak: AtomicU64,
}

/// Kinds of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// Native code on the host's cores.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The PTX emulator.
    Emulator,
}

/// Bytes that tensors hold on one device, as the library counts them.
///
/// Foreign memory is not counted, and neither are the scratch tiles that the CPU device keeps per thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryUse {
    /// Bytes held now.
    pub in_use: u64,
    /// Most bytes held at one time since the device was made or [`Device::reset_peak_memory`] was called.
    pub peak: u64,
}

impl Device {
    /// Returns the first GPU that can run the kernels if a driver is installed, else the CPU.
    ///
    /// # Errors
    /// The errors of a GPU that is present and fails. A machine without a GPU gets the CPU.
    pub fn best() -> Result<Self, Error> {
        match Self::cuda(0) {
            Err(Error::CudaUnavailable { .. }) => Ok(Self::cpu()),
            result => result,
        }
    }

    /// Returns the CPU device: all cores, or as many threads as `RAYON_NUM_THREADS` says. It is always the same
    /// device.
    ///
    /// A call runs on the calling thread and on the rayon pool that this thread belongs to, else on the global pool.
    /// It runs on the calling thread alone where the system grants the pool no threads. The device uses the best
    /// instructions that the processor has, or those that the environment variable `FLASH_ATTENTION_CPU` names when
    /// devices are made: `amx`, `avx512bf16`, `avx512`, `avx2` or `portable`. If the processor does not support the
    /// named ones, every use of the device is an [`Error::CpuInstructions`]. [`name`](Self::name) tells which are in
    /// use.
    pub fn cpu() -> Self {
        static CPU: OnceLock<Device> = OnceLock::new();
        CPU.get_or_init(|| Self::new(DeviceKind::Cpu, Box::new(cpu::Cpu::all_cores())))
            .clone()
    }

    /// Makes a CPU device with its own threads and memory count. Results are the same bits for any number of threads.
    ///
    /// # Errors
    /// [`Error::Threads`] for 0 threads, or if the threads cannot be started. [`Error::TooManyThreads`] for more than
    /// 256 threads if that is also more than four a core.
    pub fn cpu_with_threads(threads: usize) -> Result<Self, Error> {
        Ok(Self::new(DeviceKind::Cpu, Box::new(cpu::Cpu::with_threads(threads)?)))
    }

    /// Returns an error: this build lacks the feature `cuda`.
    ///
    /// # Errors
    /// [`Error::CudaUnavailable`], always.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_ordinal: usize) -> Result<Self, Error> {
        let reason = CudaUnavailable::NotBuilt;
        Err(Error::CudaUnavailable { reason })
    }

    fn new(kind: DeviceKind, backend: Box<dyn Backend>) -> Self {
        Self(Arc::new(Shared {
            id: DeviceId::new(backend.spec()),
            kind,
            backend,
            in_use: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }))
    }

    /// Returns the device's identity, by which tensors are compared. A [`TensorInfo`](crate::problem::TensorInfo)
    /// holds it.
    pub fn id(&self) -> &DeviceId {
        &self.0.id
    }

    /// Returns the kind of the device.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// Returns the device's name for people: `NVIDIA H200`, `CPU, 8 threads, AVX-512`.
    pub fn name(&self) -> String {
        self.0.backend.name()
    }

    /// Returns the numbers that plans depend on.
    pub fn info(&self) -> DeviceInfo {
        self.0.backend.info()
    }

    /// Returns the bytes that tensors hold on this device.
    pub fn memory(&self) -> MemoryUse {
        MemoryUse {
            in_use: self.0.in_use.load(Ordering::Relaxed),
            peak: self.0.peak.load(Ordering::Relaxed),
        }
    }

    /// Resets [`MemoryUse::peak`] to the bytes held now.
    pub fn reset_peak_memory(&self) {
        self.0
            .peak
            .store(self.0.in_use.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Waits until all work launched on this device has finished.
    ///
    /// # Errors
    /// [`Error::Driver`] if a launch failed while it ran.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.0.backend.synchronize()
    }

    /// Loads the kernels of a plan before their first use, and the lists of tiles that the mask of a score program leaves. On a GPU
    /// the driver compiles each kernel once a context, which takes milliseconds and cannot be done while a stream is captured in a CUDA
    /// graph. Lists that were loaded here stay in the device's memory as long as the device. On other devices it does nothing.
    ///
    /// # Errors
    /// [`Error::Launch`] if the driver cannot load a kernel.
    pub fn prepare<'a>(&self, plan: impl Into<AnyPlan<'a>>) -> Result<(), Error> {
        self.0.backend.prepare(plan.into())
    }

    /// Returns the stream that a GPU's work is launched on, a `CUstream`, or `None` on other devices. The stream of
    /// `Device::cuda(n)` belongs to the GPU's primary context and exists to the end of the process. Code that shares
    /// the GPU can record events on it, to time our work or to wait for it.
    pub fn cuda_stream(&self) -> Option<*mut c_void> {
        self.0.backend.stream()
    }

    /// Returns the counters of an emulated GPU, summed over its launches, or `None` on other devices.
    #[cfg(feature = "emulator")]
    pub fn counters(&self) -> Option<Counters> {
        self.0.backend.counters()
    }

    /// Resets [`counters`](Self::counters) to zero.
    #[cfg(feature = "emulator")]
    pub fn reset_counters(&self) {
        self.0.backend.reset_counters();
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0.backend
    }

    /// Allocates `bytes` > 0 and counts them.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let address = self.0.backend.alloc(bytes)?;
        let in_use = self.0.in_use.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.0.peak.fetch_max(in_use, Ordering::Relaxed);
        Ok(address)
    }

    /// Frees memory.
    ///
    /// # Safety
    /// `address` came from `alloc(bytes)` of this device and was not freed.
    pub(crate) unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: passed on to the caller.
        unsafe { self.0.backend.free(address, bytes) };
        self.0.in_use.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

/// Writes the text that [`Device::from_str`] reads: `cpu`, `cuda:0`, `emulator:sm_80`.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.id.fmt(f)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

/// Reads `best`, `cpu`, `cuda`, `cuda:1`, `emulator`, `emulator:sm_80` or `emulator:sm_90a`. `cpu:amx`,
/// `cpu:avx512bf16`, `cpu:avx512`, `cpu:avx2` and `cpu:portable` make a new CPU device with these instructions, if
/// the processor has them.
impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let unknown = || Error::ParseDevice {
            text: text.to_owned(),
            archs: Arch::ALL.iter().map(|arch| arch.name()).collect::<Vec<_>>().join(", "),
        };
        match text.split_once(':') {
            None if text == "best" => Self::best(),
            None if text == "cpu" => Ok(Self::cpu()),
            None if text == "cuda" => Self::cuda(0),
            None if text == "emulator" => Self::emulator_of(Arch::Sm80),
            Some(("cpu", instructions)) => {
                let cpu = cpu::Cpu::with_instructions(instructions)?;
                Ok(Self::new(DeviceKind::Cpu, Box::new(cpu)))
            }
            Some(("cuda", ordinal)) => Self::cuda(ordinal.parse().map_err(|_| unknown())?),
            Some(("emulator", arch)) => {
                let arch = Arch::ALL
                    .iter()
                    .find(|known| known.name() == arch)
                    .ok_or_else(unknown)?;
                Self::emulator_of(*arch)
            }
            _ => Err(unknown()),
        }
    }
}

impl Device {
    #[cfg(feature = "emulator")]
    fn emulator_of(arch: Arch) -> Result<Self, Error> {
        Ok(Self::emulator(arch))
    }

    #[cfg(not(feature = "emulator"))]
    fn emulator_of(arch: Arch) -> Result<Self, Error> {
        Err(Error::NotBuilt {
            device: format!("emulator:{}", arch.name()),
            feature: "emulator",
        })
    }
}
