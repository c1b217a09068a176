//! The emulator: executes the plans and the PTX of a GPU on the host, under memory checks.
//!
//! A finding of the checks is an error of the call, so a passing test shows that its kernels have none of the errors
//! that the checks look for. Instructions and bytes are counted, and summed over all launches of a device.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flash_attention_kernels::abi::TensorMap;
use flash_attention_kernels::entries::{Arch, Dtype, Entry};
use ptx_emulator::tensor::swizzle::Swizzle;
use ptx_emulator::tensor::tensor_map::{self, ElementType, Fill, Interleave, L2Promotion, TensorMapError, Tiled};
use ptx_emulator::{Counters, DeviceMemory, DevicePtr, MemoryError, Module};

use super::{Backend, Device, DeviceKind};
use crate::error::Error;
use crate::plan::{Launch, Plan, Results, TileMap};
use crate::progress::Reporter;
use crate::target::DeviceInfo;

/// Options of an emulated GPU.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EmulatorOptions {
    /// Architecture to emulate.
    pub arch: Arch,
    /// Size of the device memory, in bytes.
    pub memory_bytes: u64,
    /// Options of every launch: checks, the seed for the order of warps, limits, host threads.
    pub launch: ptx_emulator::Options,
}

impl EmulatorOptions {
    /// All checks on, seed 0, 64 GiB of memory.
    pub fn new(arch: Arch) -> Self {
        Self {
            arch,
            memory_bytes: 64 << 30,
            launch: ptx_emulator::Options::default(),
        }
    }
}

/// An emulated GPU.
pub(super) struct Emulated {
    options: EmulatorOptions,
    memory: DeviceMemory,
    /// Modules by the name of their entry, parsed once.
    modules: Mutex<HashMap<&'static str, Arc<Module>>>,
    counters: Mutex<Counters>,
}

impl Device {
    /// Makes an emulated GPU that runs the PTX compiled for `arch`, with all checks on.
    ///
    /// Every call makes a new device with its own memory. It runs some thousand times slower than a GPU. In return, a
    /// wrong access, a race or a missing wait is an [`Error::Findings`], and every byte and instruction is
    /// [counted](Self::counters).
    pub fn emulator(arch: Arch) -> Self {
        Self::emulator_with(EmulatorOptions::new(arch))
    }

    /// Makes an emulated GPU with these options.
    pub fn emulator_with(options: EmulatorOptions) -> Self {
        let emulated = Emulated {
            memory: DeviceMemory::with_capacity(options.memory_bytes),
            modules: Mutex::new(HashMap::new()),
            counters: Mutex::new(Counters::default()),
            options,
        };
        Self::new(DeviceKind::Emulator, Box::new(emulated))
    }
}

impl Emulated {
    fn module(&self, entry: &'static Entry) -> Result<Arc<Module>, ptx_emulator::Error> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(entry.name) {
            return Ok(module.clone());
        }
        let module = Arc::new(Module::parse(&entry.ptx(), &format!("{}.ptx", entry.name))?);
        modules.insert(entry.name, module.clone());
        Ok(module)
    }

    fn launch(&self, launch: &Launch, results: Results, reporter: &Reporter<'_>) -> Result<(), Error> {
        let kernel = launch.entry.name;
        let failed = |error: ptx_emulator::Error| Error::Launch {
            device: self.spec(),
            kernel,
            message: error.to_string(),
        };
        let refused = |error: TensorMapError| Error::Launch {
            device: self.spec(),
            kernel,
            message: error.to_string(),
        };
        let params = launch
            .params(results, encode)
            .map_err(refused)?
            .ok_or_else(|| launch.wrong_results(self.spec()))?;
        let module = self.module(launch.entry).map_err(failed)?;
        let launch = ptx_emulator::Launch {
            entry: kernel,
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: launch.shared_bytes,
            params: params.as_bytes(),
        };
        let report = module
            .launch_watched(&self.memory, &launch, &self.options.launch, &|blocks| {
                reporter.add(blocks)
            })
            .map_err(failed)?;
        lock(&self.counters).add(&report.counters);
        if report.is_clean() {
            Ok(())
        } else {
            Err(Error::Findings {
                device: self.spec(),
                kernel,
                report: Box::new(report),
            })
        }
    }

    /// Makes the error of a failed copy. A copy fails only if foreign memory is not allocated.
    fn failed(&self, call: &'static str) -> impl FnOnce(MemoryError) -> Error + use<> {
        let device = self.spec();
        move |error| match error {
            MemoryError::OutOfMemory { asked, free } => Error::OutOfMemory {
                device,
                requested: asked,
                free: Some(free),
            },
            error => Error::Driver {
                device,
                call,
                message: error.to_string(),
            },
        }
    }
}

impl Backend for Emulated {
    fn info(&self) -> DeviceInfo {
        match self.options.arch {
            Arch::Sm80 => DeviceInfo::gpu((8, 0), 108, 163 * 1024),  // A100
            Arch::Sm90a => DeviceInfo::gpu((9, 0), 132, 227 * 1024), // H100, H200
        }
    }

    fn spec(&self) -> String {
        format!("emulator:{}", self.options.arch.name())
    }

    fn name(&self) -> String {
        format!("PTX emulator, {}", self.options.arch.name())
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.memory
            .alloc(bytes)
            .map(|address| address.0)
            .map_err(self.failed("alloc"))
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // Fails only for an address that is not an allocation, which the caller rules out.
        let _ = self.memory.free(DevicePtr(address));
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        self.memory
            .write(DevicePtr(address), data)
            .map_err(self.failed("write"))
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        self.memory.read(DevicePtr(address), data).map_err(self.failed("read"))
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        self.memory
            .write(DevicePtr(address), &vec![0; bytes])
            .map_err(self.failed("write"))
    }

    unsafe fn run(&self, plan: &Plan, results: Results, reporter: &Reporter<'_>) -> Result<(), Error> {
        let blocks = |launch: &Launch| launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
        if plan.launches().is_empty() {
            reporter.begin(|| 1);
            reporter.add(1);
            return Ok(()); // there is nothing to write
        }
        reporter.begin(|| plan.launches().iter().map(blocks).sum());
        plan.launches()
            .iter()
            .try_for_each(|launch| self.launch(launch, results, reporter))
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(()) // every launch has finished when it returns
    }

    fn counters(&self) -> Option<Counters> {
        Some(lock(&self.counters).clone())
    }

    fn reset_counters(&self) {
        *lock(&self.counters) = Counters::default();
    }
}

/// Encodes a tensor map as the emulator reads it.
fn encode(tile: &TileMap) -> Result<TensorMap, TensorMapError> {
    let element = match tile.dtype {
        Dtype::F32 => ElementType::F32,
        Dtype::F16 => ElementType::F16,
        Dtype::Bf16 => ElementType::Bf16,
    };
    let map = tensor_map::TensorMap::tiled(&Tiled {
        element,
        address: tile.address,
        dims: &tile.dims,
        strides: &tile.strides,
        box_dims: &tile.box_dims,
        element_strides: &[1; 5],
        interleave: Interleave::None,
        swizzle: Swizzle::B128,
        l2_promotion: L2Promotion::B256,
        fill: Fill::Zero,
    })?;
    Ok(TensorMap(zerocopy::transmute!(map.encode())))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
