//! The CPU: the tiled algorithm in native code, rayon over tasks, vector instructions chosen when it runs.
//!
//! A task owns the queries of one tile of one head, as a block of a GPU does, and walks the keys the same way. Extra
//! memory is a few tiles per thread.

mod backward;
mod forward;
mod rows;
mod simd;

use std::alloc::Layout;
use std::num::NonZeroUsize;
use std::sync::OnceLock;

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;
use half::{bf16, f16};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{Backend, DeviceInfo, outside_rayon};
use crate::plan::{Plan, Results};
use crate::problem::BackwardTensors;
use crate::{Element, Error};

/// Addresses of tensors are multiples of a cache line.
const ALIGN: usize = 64;

/// An allocation this large is held against the machine's free memory first: the system may promise memory that it
/// does not have, and end the process when it is used.
const CHECKED_ALLOCATION: usize = 1 << 30;

/// The host's cores.
pub(super) struct Cpu {
    threads: usize,
    /// Threads of its own, started when they are first needed. They run nothing but tasks of this device.
    pool: OnceLock<ThreadPool>,
}

impl Cpu {
    /// As many threads as rayon would start: `RAYON_NUM_THREADS`, or one a core.
    pub(super) fn all_cores() -> Self {
        let asked = std::env::var("RAYON_NUM_THREADS")
            .ok()
            .and_then(|count| count.parse().ok());
        let threads = asked
            .filter(|&count| count > 0)
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
        Self {
            threads,
            pool: OnceLock::new(),
        }
    }

    pub(super) fn with_threads(threads: usize) -> Result<Self, Error> {
        if threads == 0 {
            return Err(Error::Threads {
                threads,
                reason: "at least 1 is needed".to_owned(),
            });
        }
        let cpu = Self {
            threads,
            pool: OnceLock::new(),
        };
        cpu.pool()?;
        Ok(cpu)
    }

    fn pool(&self) -> Result<&ThreadPool, Error> {
        if let Some(pool) = self.pool.get() {
            return Ok(pool);
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(|index| format!("attention-{index}"))
            .build()
            .map_err(|error| Error::Threads {
                threads: self.threads,
                reason: error.to_string(),
            })?;
        Ok(self.pool.get_or_init(|| pool))
    }
}

impl Backend for Cpu {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::Cpu { threads: self.threads }
    }

    fn spec(&self) -> String {
        "cpu".to_owned()
    }

    fn name(&self) -> String {
        format!("CPU, {} threads, {}", self.threads, simd::instruction_set())
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let out_of_memory = |free| Error::OutOfMemory {
            device: self.spec(),
            requested: bytes as u64,
            free,
        };
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| out_of_memory(available_memory()))?;
        if bytes >= CHECKED_ALLOCATION {
            let free = available_memory();
            if free.is_some_and(|free| free < bytes as u64) {
                return Err(out_of_memory(free));
            }
        }
        // SAFETY: callers ask for more than 0 bytes. Zeroed, because Rust must be able to read what nobody wrote.
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        if pointer.is_null() {
            return Err(out_of_memory(available_memory()));
        }
        Ok(pointer.expose_provenance() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: `alloc` made the allocation with this very layout, says the caller.
        unsafe {
            let layout = Layout::from_size_align_unchecked(bytes, ALIGN);
            std::alloc::dealloc(pointer_mut(address), layout);
        }
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: the memory is as long as `data` and nobody else touches it, says the caller.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointer_mut(address), data.len()) };
        Ok(())
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the memory is as long as `data` and nobody writes it, says the caller.
        unsafe { std::ptr::copy_nonoverlapping(pointer_mut::<u8>(address), data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: as for `upload`.
        unsafe { pointer_mut::<u8>(address).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn run(&self, plan: &Plan, results: Results) -> Result<(), Error> {
        let pool = self.pool()?;
        // SAFETY: passed on to the caller; each arm reads elements of the type the problem was proven to have.
        let work = || unsafe {
            match plan.problem().dtype() {
                Dtype::F32 => run::<f32>(plan, results),
                Dtype::F16 => run::<f16>(plan, results),
                Dtype::Bf16 => run::<bf16>(plan, results),
            }
        };
        outside_rayon(|| pool.install(work))
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(()) // every call has finished when it returns
    }
}

/// Carries out a plan whose elements are of type `T`.
///
/// # Safety
/// As for [`Backend::run`].
unsafe fn run<T: Element>(plan: &Plan, results: Results) {
    // SAFETY: passed on to the caller.
    unsafe {
        match results {
            Results::Forward { out, lse } => forward::forward::<T>(plan, out, lse),
            Results::Backward { dq, dk, dv, delta } => {
                let tensors = plan.backward_tensors().expect("results are of the plan's own pass");
                let at = |tensor, address| StridedTensor { address, ..tensor };
                let tensors = BackwardTensors {
                    dq: at(tensors.dq, dq),
                    dk: at(tensors.dk, dk),
                    dv: at(tensors.dv, dv),
                    ..*tensors
                };
                backward::backward::<T>(plan.problem(), &tensors, delta, plan.tiles());
            }
        }
    }
}

/// The pointer that an address of this device is.
fn pointer_mut<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

/// Bytes that can be had without swapping, where the system tells.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}
