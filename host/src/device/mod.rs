//! Devices: where tensors live and problems are solved.
//!
//! One small seam, the trait `Backend`, has three implementations. A GPU and the emulator take a [`Plan`] and launch its
//! kernels; the CPU takes the same plan and solves the [`Problem`](crate::problem::Problem) in it with native code.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulator")]
mod emulated;

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
use crate::plan::{Plan, Results};
use crate::progress::Reporter;
pub use crate::target::DeviceInfo;

/// What every kind of device can do. Addresses are the device's own; on the CPU they are pointers.
pub(crate) trait Backend: Send + Sync {
    /// What plans depend on.
    fn info(&self) -> DeviceInfo;

    /// The text that [`Device::from_str`] makes this device from.
    fn spec(&self) -> String;

    /// What the device is, for people.
    fn name(&self) -> String;

    /// Memory for `bytes` > 0, aligned to 64 bytes at least, its content undefined but readable.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;

    /// Gives memory back. Work that was launched before may still use it; the backend sees to that.
    ///
    /// # Safety
    /// `address` came from `alloc(bytes)` and was not freed.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies to the device.
    ///
    /// # Safety
    /// `address .. address + data.len()` is memory of this device that nobody else touches meanwhile.
    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error>;

    /// Copies from the device, after all work launched before.
    ///
    /// # Safety
    /// `address .. address + data.len()` is memory of this device that nobody writes meanwhile.
    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error>;

    /// Fills memory with zero bytes.
    ///
    /// # Safety
    /// As for [`upload`](Self::upload).
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error>;

    /// Carries out a plan; on a GPU, launches the work and returns. A device that waits for its work says how far it is.
    ///
    /// # Safety
    /// The tensors lie where the plan says, and `results`, which are those of the plan's pass, are the addresses of memory
    /// laid out as it says, all of it memory of this device. Nobody writes the inputs or touches the results meanwhile.
    unsafe fn run(&self, plan: &Plan, results: Results, reporter: &Reporter<'_>) -> Result<(), Error>;

    /// Loads what a plan needs, on a device that loads anything.
    fn prepare(&self, _plan: &Plan) -> Result<(), Error> {
        Ok(())
    }

    /// Waits until everything launched has finished.
    fn synchronize(&self) -> Result<(), Error>;

    /// The stream that work is launched on, on a device that has streams.
    fn stream(&self) -> Option<*mut c_void> {
        None
    }

    /// What launches executed and moved, on a device that counts it.
    #[cfg(feature = "emulator")]
    fn counters(&self) -> Option<Counters> {
        None
    }

    /// Lets the counters start from zero.
    #[cfg(feature = "emulator")]
    fn reset_counters(&self) {}
}

/// A device and its memory; a clone is the same device.
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

/// The kinds of device there are.
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

/// Bytes that tensors hold on one device, by the library's own count.
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
    /// The first GPU if there is a driver and a GPU that the kernels run on, else the CPU.
    ///
    /// # Errors
    /// Only if a GPU is there and fails: a machine without one gets the CPU.
    pub fn best() -> Result<Self, Error> {
        match Self::cuda(0) {
            Err(Error::CudaUnavailable { .. }) => Ok(Self::cpu()),
            result => result,
        }
    }

    /// The host's cores, all of them or as many as `RAYON_NUM_THREADS` says. Always the same device.
    ///
    /// A call works on the thread it comes from, helped by the rayon pool that this thread is in, else by the global one;
    /// alone where the system grants no threads for that pool.
    /// It runs the best instructions the processor has, or those that the environment variable `FLASH_ATTENTION_CPU`
    /// names when devices are made: `amx`, `avx512bf16`, `avx512`, `avx2` or `portable`. A name that the processor has nothing
    /// of makes every use of the device an [`Error::CpuInstructions`]; [`name`](Self::name) says what it runs.
    pub fn cpu() -> Self {
        static CPU: OnceLock<Device> = OnceLock::new();
        CPU.get_or_init(|| Self::new(DeviceKind::Cpu, Box::new(cpu::Cpu::all_cores())))
            .clone()
    }

    /// A CPU device with threads and a memory count of its own. Results do not depend on how many threads, to the bit.
    ///
    /// # Errors
    /// [`Error::Threads`] for 0 threads, or if the threads cannot be started; [`Error::TooManyThreads`] for more than 256 where
    /// that is also more than four a core.
    pub fn cpu_with_threads(threads: usize) -> Result<Self, Error> {
        Ok(Self::new(DeviceKind::Cpu, Box::new(cpu::Cpu::with_threads(threads)?)))
    }

    /// The error of a build without the feature `cuda`.
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

    /// The device's identity, by which tensors are compared: a [`TensorInfo`](crate::problem::TensorInfo) holds it.
    pub fn id(&self) -> &DeviceId {
        &self.0.id
    }

    /// Which kind of device it is.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// What the device is, for people: `NVIDIA H200`, `CPU, 8 threads, AVX-512`.
    pub fn name(&self) -> String {
        self.0.backend.name()
    }

    /// What plans depend on.
    pub fn info(&self) -> DeviceInfo {
        self.0.backend.info()
    }

    /// Bytes that tensors hold on this device.
    pub fn memory(&self) -> MemoryUse {
        MemoryUse {
            in_use: self.0.in_use.load(Ordering::Relaxed),
            peak: self.0.peak.load(Ordering::Relaxed),
        }
    }

    /// Lets [`MemoryUse::peak`] start afresh from what is held now.
    pub fn reset_peak_memory(&self) {
        self.0
            .peak
            .store(self.0.in_use.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Waits until everything that was launched on this device has finished.
    ///
    /// # Errors
    /// [`Error::Driver`] if a launch that was under way failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.0.backend.synchronize()
    }

    /// Loads the kernels of a plan, so that the first call finds them: on a GPU its driver compiles each of them once a
    /// context, which takes milliseconds and cannot be done while a stream is captured in a CUDA graph. Nothing on other
    /// devices.
    ///
    /// # Errors
    /// [`Error::Launch`] if the driver cannot load a kernel.
    pub fn prepare(&self, plan: &Plan) -> Result<(), Error> {
        self.0.backend.prepare(plan)
    }

    /// The stream that a GPU's work is launched on, a `CUstream`; `None` on other devices. That of `Device::cuda(n)` is of the
    /// GPU's primary context and exists to the end of the process. Code that shares the GPU records events on it, to time
    /// our work or to wait for it.
    pub fn cuda_stream(&self) -> Option<*mut c_void> {
        self.0.backend.stream()
    }

    /// What the launches of an emulated GPU executed and moved, all together; `None` on other devices.
    #[cfg(feature = "emulator")]
    pub fn counters(&self) -> Option<Counters> {
        self.0.backend.counters()
    }

    /// Lets [`counters`](Self::counters) start from zero.
    #[cfg(feature = "emulator")]
    pub fn reset_counters(&self) {
        self.0.backend.reset_counters();
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0.backend
    }

    /// Memory for `bytes` > 0, counted.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let address = self.0.backend.alloc(bytes)?;
        let in_use = self.0.in_use.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.0.peak.fetch_max(in_use, Ordering::Relaxed);
        Ok(address)
    }

    /// Gives memory back.
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

/// The text that [`Device::from_str`] reads: `cpu`, `cuda:0`, `emulator:sm_80`.
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

/// `best`, `cpu`, `cuda`, `cuda:1`, `emulator`, `emulator:sm_80`, `emulator:sm_90a`; and `cpu:amx`, `cpu:avx512bf16`,
/// `cpu:avx512`, `cpu:avx2`, `cpu:portable`, a new CPU device that runs these instructions, if the processor has them.
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
