//! The CPU device: the tiled algorithm in native code, with rayon for tasks and vector instructions chosen at run
//! time.
//!
//! A task owns the queries of one tile of one head, like a block of a GPU, and processes the keys in the same way.
//! The extra memory is a few tiles per thread, and 32 bytes per task.

#[cfg(target_arch = "aarch64")]
mod arm;
mod backward;
#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
mod bf16;
mod empty;
mod forward;
mod kernels;
mod memory;
mod program;
mod rotary;
mod team;
mod tensor;
mod vector;

use std::error::Error as _;
use std::num::NonZeroUsize;
use std::panic::catch_unwind;
use std::sync::OnceLock;

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;
use rayon_core::{ThreadPool, ThreadPoolBuilder};

use super::{Backend, Run};
use crate::error::Error;
use crate::plan::{BackwardResults, Cost, ForwardResults, Launch, Rotary};
use crate::problem::BackwardTensors;
use crate::progress::Reporter;
use crate::target::{DeviceInfo, Instructions};
use kernels::{available, kernels};
use team::Team;

/// The CPU device.
pub(super) struct Cpu {
    threads: usize,
    /// Instructions in use, or the name in `FLASH_ATTENTION_CPU` that the processor does not support, which is an
    /// error of every use.
    instructions: Result<Instructions, String>,
    /// True if the instructions were asked for by name.
    named: bool,
    /// Threads of the device's own. Without them, helpers come from the caller's rayon pool, else from the global
    /// one.
    pool: Option<ThreadPool>,
}

impl Cpu {
    /// Makes a device with as many threads as rayon would start: `RAYON_NUM_THREADS`, or one per core.
    pub(super) fn all_cores() -> Self {
        let asked = std::env::var("RAYON_NUM_THREADS")
            .ok()
            .and_then(|count| count.parse().ok());
        let threads = asked
            .filter(|&count| count > 0)
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
        Self {
            threads,
            instructions: default_instructions(),
            named: false,
            pool: None,
        }
    }

    pub(super) fn with_threads(threads: usize) -> Result<Self, Error> {
        if threads == 0 {
            return Err(Error::Threads {
                threads,
                reason: "at least 1 is needed".to_owned(),
            });
        }
        let limit = max_threads();
        if threads > limit {
            return Err(Error::TooManyThreads { threads, limit });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("attention-{index}"))
            .build()
            .map_err(|error| Error::Threads {
                threads,
                reason: error.to_string(),
            })?;
        Ok(Self {
            threads,
            instructions: default_instructions(),
            named: false,
            pool: Some(pool),
        })
    }

    /// Makes a device with all cores and the instructions of this name.
    pub(super) fn with_instructions(name: &str) -> Result<Self, Error> {
        let instructions = instructions_named(name).ok_or_else(|| no_instructions("device", name))?;
        Ok(Self {
            instructions: Ok(instructions),
            named: true,
            ..Self::all_cores()
        })
    }

    fn instructions(&self) -> Result<Instructions, Error> {
        self.instructions
            .as_ref()
            .copied()
            .map_err(|name| no_instructions(VARIABLE, name))
    }

    /// Returns the threads of one call.
    fn team(&self) -> Result<Team<'_>, Error> {
        let threads = match (&self.pool, rayon_core::current_thread_index()) {
            (Some(_), _) => self.threads,
            (None, Some(_)) => rayon_core::current_num_threads(),
            (None, None) if self.threads > 1 && has_global_pool() => self.threads,
            (None, None) => 1,
        };
        Ok(Team {
            kernels: kernels(self.instructions()?),
            threads,
            pool: self.pool.as_ref(),
        })
    }
}

/// Returns the largest number of threads of a CPU device. More than a few threads per core only wait for each other,
/// and a pool of thousands takes long to start: 37 s for 2000 threads on two cores.
fn max_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (4 * cores).max(256)
}

/// Least work of each thread of a call, in nanoseconds. A thread woken for less starts when the work is nearly done, and takes
/// the core of another caller.
const WORK_OF_THREAD: u128 = 50_000;

/// Operations and bytes per nanosecond of one thread: 76 GFLOP/s at [1, 12, 64, 64] in f32, measured on a Zen 4 core; and for one
/// query with keys and values of 2 to 16 MB what gives its time on a Xeon within a quarter, 64 GB/s on Zen 4. On a slower core a call
/// gets its threads at a longer time than 100 us, on a faster one at a shorter time.
const FLOPS_IN_A_NANOSECOND: u128 = 64;
const BYTES_IN_A_NANOSECOND: u128 = 32;

/// About the time that one thread takes for a plan of this cost.
fn nanoseconds(cost: &Cost) -> u128 {
    cost.flops / FLOPS_IN_A_NANOSECOND + cost.bytes_read / BYTES_IN_A_NANOSECOND
}

/// Number of threads that a call of so many nanoseconds uses, `threads` at most.
fn worthwhile_threads(nanoseconds: u128, threads: usize) -> usize {
    usize::try_from(nanoseconds / WORK_OF_THREAD)
        .unwrap_or(threads)
        .clamp(1, threads)
}

/// Returns true if rayon's global pool runs; starts it if needed. If the system grants no threads, the pool is
/// missing for the rest of the process, and a call runs on the calling thread alone.
fn has_global_pool() -> bool {
    static STARTED: OnceLock<bool> = OnceLock::new();
    *STARTED.get_or_init(|| match ThreadPoolBuilder::new().build_global() {
        Ok(()) => true,
        Err(error) if error.source().is_some() => false,
        // Other code started it before. If that attempt failed, the pool is missing, and using it panics.
        Err(_) => catch_unwind(rayon_core::current_num_threads).is_ok(),
    })
}

/// Returns the instructions of this name, if the processor has them.
fn instructions_named(name: &str) -> Option<Instructions> {
    available()
        .iter()
        .copied()
        .find(|instructions| instructions.key() == name)
}

/// Returns the best instructions of the processor, or those that `FLASH_ATTENTION_CPU` names. The error is a name of instructions that
/// the processor does not have.
fn default_instructions() -> Result<Instructions, String> {
    match std::env::var(VARIABLE) {
        Ok(name) if !name.is_empty() => instructions_named(&name).ok_or(name),
        _ => Ok(available()[0]),
    }
}

/// Name of the environment variable with the instructions of every CPU device whose text names none. An empty value
/// counts as unset.
const VARIABLE: &str = "FLASH_ATTENTION_CPU";

fn no_instructions(argument: &'static str, name: &str) -> Error {
    let available: Vec<_> = available().iter().map(|instructions| instructions.key()).collect();
    Error::CpuInstructions {
        argument,
        name: name.to_owned(),
        available: available.join(", "),
    }
}

impl Backend for Cpu {
    fn info(&self) -> DeviceInfo {
        // Without instructions nothing can be allocated, so there are no tensors to plan for.
        let instructions = self.instructions.as_ref().copied();
        DeviceInfo::cpu(self.threads, instructions.unwrap_or(Instructions::Portable))
    }

    fn spec(&self) -> String {
        match &self.instructions {
            Ok(instructions) if self.named => format!("cpu:{}", instructions.key()),
            _ => "cpu".to_owned(),
        }
    }

    fn name(&self) -> String {
        match &self.instructions {
            Ok(instructions) => format!("CPU, {} threads, {instructions}", self.threads),
            Err(name) => format!("CPU, {} threads, without the instructions `{name}`", self.threads),
        }
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.instructions()?;
        let first = memory::allocate(bytes).map_err(|free| Error::OutOfMemory {
            device: self.spec(),
            requested: bytes as u64,
            free,
        })?;
        Ok(first.expose_provenance() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller promises that `alloc` made the allocation, of so many bytes.
        unsafe { memory::free(pointer_mut(address), bytes) };
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory is as long as `data` and no other thread accesses it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointer_mut(address), data.len()) };
        Ok(())
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory is as long as `data` and no other thread writes it.
        unsafe { std::ptr::copy_nonoverlapping(pointer_mut::<u8>(address), data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller promises that the memory has this length and no other thread accesses it.
        unsafe { pointer_mut::<u8>(address).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn run(&self, run: Run<'_>, reporter: &Reporter<'_>) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        unsafe { self.run_batch(&[run], reporter) }
    }

    unsafe fn run_batch(&self, runs: &[Run<'_>], reporter: &Reporter<'_>) -> Result<(), Error> {
        let mut team = self.team()?;
        let plans = || {
            runs.iter().map(|run| match run {
                Run::Forward(plan, _) => (plan.problem(), plan.cost()),
                Run::Backward(plan, _) => (plan.problem(), plan.cost()),
            })
        };
        // The cost leaves out the operations of a score program, so a call with one uses every thread.
        if plans().all(|(problem, _)| problem.program().is_none()) {
            let time = plans().map(|(_, cost)| nanoseconds(&cost)).sum();
            team.threads = worthwhile_threads(time, team.threads);
        }
        // SAFETY: passed on to the caller.
        unsafe { run_all(&team, runs, reporter) };
        Ok(())
    }

    unsafe fn move_tokens(&self, launch: &Launch<Rotary>) -> Result<(), Error> {
        let params = launch.rotary_params();
        let lists: Vec<_> = launch.lists().collect();
        let run = match launch.entry.dtype {
            Dtype::F32 => rotary::move_tokens::<f32>,
            Dtype::F16 => rotary::move_tokens::<half::f16>,
            Dtype::Bf16 => rotary::move_tokens::<half::bf16>,
        };
        // SAFETY: passed on to the caller.
        unsafe { run(params, &lists) };
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(()) // every call has finished when it returns
    }
}

/// Carries out plans of one batch, each in one pass over the tasks of all of them.
///
/// # Safety
/// The contract of [`Backend::run_batch`].
unsafe fn run_all(team: &Team<'_>, runs: &[Run<'_>], reporter: &Reporter<'_>) {
    let at = |tensor, address| StridedTensor { address, ..tensor };
    let (mut forwards, mut backwards) = (Vec::new(), Vec::new());
    for run in runs {
        match *run {
            Run::Forward(plan, results) => {
                let ForwardResults {
                    out, lse, statistics, ..
                } = results;
                let problem = plan.problem();
                let (out, lse) = (at(problem.out(), out), at(problem.lse(), lse));
                let statistics = (problem.statistics().zip(statistics))
                    .map(|([max, sum], [row_max, row_sum])| [at(max, row_max), at(sum, row_sum)]);
                if problem.has_pairs() {
                    forwards.push(forward::Call {
                        plan,
                        out,
                        lse,
                        statistics,
                    });
                } else {
                    // SAFETY: passed on to the caller.
                    unsafe { empty::forward(team.kernels, problem, out, lse, statistics) };
                }
            }
            Run::Backward(plan, results) => {
                let BackwardResults { dq, dk, dv, .. } = results;
                let (problem, tensors) = (plan.problem(), plan.tensors());
                let tensors = BackwardTensors {
                    dq: at(tensors.dq, dq),
                    dk: at(tensors.dk, dk),
                    dv: at(tensors.dv, dv),
                    ..*tensors
                };
                if problem.has_pairs() {
                    backwards.push(backward::Call {
                        plan,
                        tensors,
                        delta: results.workspace,
                        tables: results.tables,
                    });
                } else {
                    // SAFETY: passed on to the caller.
                    unsafe { empty::backward(team.kernels, problem, &tensors) };
                }
            }
        }
    }
    if forwards.is_empty() && backwards.is_empty() {
        reporter.begin(|| 1);
        reporter.add(1);
    }
    // SAFETY: passed on to the caller.
    unsafe {
        if !forwards.is_empty() {
            forward::forward(team, &forwards, reporter);
        }
        if !backwards.is_empty() {
            backward::backward(team, &backwards, reporter);
        }
    }
}

/// Returns the pointer for an address of this device.
fn pointer_mut<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(flops: u128, bytes_read: u128) -> Cost {
        Cost {
            bytes_read,
            bytes_written: 0,
            flops,
        }
    }

    #[test]
    fn threads_are_woken_for_50_microseconds_each() {
        // [1, 2, 64, 64] of 64: 30 us on one thread. [1, 12, 64, 64]: 165 us.
        assert_eq!(worthwhile_threads(nanoseconds(&cost(2_097_152, 200_704)), 2), 1);
        assert_eq!(worthwhile_threads(nanoseconds(&cost(12_582_912, 786_432)), 2), 2);
        assert_eq!(worthwhile_threads(nanoseconds(&cost(12_582_912, 786_432)), 64), 4);
        assert_eq!(worthwhile_threads(nanoseconds(&cost(0, 0)), 1), 1);
        // One query of one head and 16384 keys of 32 in f32: 155 us, whose bytes count.
        assert_eq!(worthwhile_threads(nanoseconds(&cost(2_097_152, 4_194_432)), 2), 2);
        // One query of 32 heads and 4096 keys of 128: as many threads as there are.
        assert_eq!(worthwhile_threads(nanoseconds(&cost(67_108_864, 134_234_112)), 16), 16);
        assert_eq!(
            worthwhile_threads(nanoseconds(&cost(u128::MAX / 2, u128::MAX / 4)), 256),
            256
        );
    }
}
