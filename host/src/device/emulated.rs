//! The emulator: executes the plans and the PTX of a GPU on the host, under memory checks.
//!
//! A finding of the checks is an error of the call, so a passing test shows that its kernels have none of the errors
//! that the checks look for. Instructions and bytes are counted, and summed over all launches of a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flash_attention_kernels::abi::{StridedTensor, TensorMap};
use flash_attention_kernels::entries::{Arch, Dtype};
use ptx_emulator::tensor::swizzle::Swizzle;
use ptx_emulator::tensor::tensor_map::{self, ElementType, Fill, Interleave, L2Promotion, TensorMapError, Tiled};
use ptx_emulator::{Counters, DeviceMemory, DevicePtr, Finding, MemoryError, Module};

use super::lists::Lists;
use super::modules::{Loaded, Modules};
use super::{Backend, Device, DeviceKind, Run};
use crate::element::DataType;
use crate::error::Error;
use crate::plan::{Backward, BackwardResults, ForwardResults, Launch, PassType, Plan, Rotary, Template, TileMap};
use crate::problem::{Problem, ROWS};
use crate::program::NodeId;
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
    /// Modules, parsed once.
    modules: Modules<Arc<Module>>,
    lists: Lists,
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
            modules: Modules::new(),
            lists: Lists::default(),
            counters: Mutex::new(Counters::default()),
            options,
        };
        Self::new(DeviceKind::Emulator, Box::new(emulated))
    }
}

impl Emulated {
    fn launch<P: PassType>(
        &self,
        launch: &Launch<P>,
        results: P::Results,
        reporter: &Reporter<'_>,
    ) -> Result<(), Error> {
        let kernel = launch.entry.name;
        let params = launch
            .params(results, encode)
            .map_err(|error| launch.error(self.spec(), error))?;
        // Held until the kernel is launched, so that no other call frees them before.
        let lists = self.lists.of(self, launch)?;
        let params = params.with_lists(&lists.iter().map(|list| list.address).collect::<Vec<_>>());
        let parse = |ptx: &str| Module::parse(ptx, &format!("{kernel}.ptx")).map(Arc::new);
        let Loaded { module, slots, lines } = self.modules.get(launch, || self.spec(), parse)?;
        let params = [params.bytes(), &launch.numbers(&slots, &results)].concat();
        let emulated = ptx_emulator::Launch {
            entry: kernel,
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            cluster: [launch.cluster, 1, 1],
            shared_bytes: launch.shared_bytes,
            params: &params,
        };
        let mut report = module
            .launch_watched(&self.memory, &emulated, &self.options.launch, &|blocks| {
                reporter.add(blocks)
            })
            .map_err(|error| launch.error(self.spec(), error))?;
        lock(&self.counters).add(&report.counters);
        if report.is_clean() {
            Ok(())
        } else {
            report
                .findings
                .iter_mut()
                .for_each(|finding| name_node(finding, &lines, launch));
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

/// Adds to a finding in a launch's score program the node of the program that its line computes.
fn name_node(finding: &mut Finding, lines: &[(usize, Option<NodeId>)], launch: &Launch<impl PassType>) {
    let Ok(place) = lines.binary_search_by_key(&(finding.line as usize), |(line, _)| *line) else {
        return;
    };
    finding.message += match lines[place].1.and_then(|node| launch.formula(node)) {
        Some(formula) => format!("; this is `{formula}` of the score program"),
        None => "; this is in the score program".to_owned(),
    }
    .as_str();
}

/// A tensor that a call writes.
struct Written {
    name: &'static str,
    tensor: StridedTensor,
    heads: usize,
    seqlen: u32,
    /// Elements of a row.
    row: usize,
    dtype: Dtype,
}

impl Written {
    /// A result of a row of `row` elements of the problem's dtype for each query.
    fn of_queries(name: &'static str, problem: &Problem, tensor: StridedTensor, address: u64, row: u32) -> Self {
        Self {
            name,
            tensor: StridedTensor { address, ..tensor },
            heads: problem.heads_q(),
            seqlen: problem.seqlen_q(),
            row: row as usize,
            dtype: problem.dtype(),
        }
    }

    /// A result of a row of `row` elements of the problem's dtype for each key.
    fn of_keys(name: &'static str, problem: &Problem, tensor: StridedTensor, address: u64, row: u32) -> Self {
        Self {
            heads: problem.heads_kv(),
            seqlen: problem.seqlen_k(),
            ..Self::of_queries(name, problem, tensor, address, row)
        }
    }
}

/// The results of a forward plan at these addresses.
fn written_by_forward(problem: &Problem, results: &ForwardResults) -> Vec<Written> {
    let kept = problem.statistics().zip(results.statistics);
    let kept = kept
        .into_iter()
        .flat_map(|(tensors, addresses)| tensors.into_iter().zip(addresses));
    let rows = [(problem.lse(), results.lse)].into_iter().chain(kept).zip(ROWS);
    let rows = rows.map(|((tensor, address), name)| Written {
        dtype: Dtype::F32,
        ..Written::of_queries(name, problem, tensor, address, 1)
    });
    let out = Written::of_queries("out", problem, problem.out(), results.out, problem.head_dim_v());
    [out].into_iter().chain(rows).collect()
}

/// The results of a backward plan at these addresses.
fn written_by_backward(plan: &Plan<Backward>, results: &BackwardResults) -> Vec<Written> {
    let (problem, tensors) = (plan.problem(), plan.tensors());
    let (head_dim, head_dim_v) = (problem.head_dim(), problem.head_dim_v());
    vec![
        Written::of_queries("dq", problem, tensors.dq, results.dq, head_dim),
        Written::of_keys("dk", problem, tensors.dk, results.dk, head_dim),
        Written::of_keys("dv", problem, tensors.dv, results.dv, head_dim_v),
    ]
}

impl Emulated {
    /// Returns an error if the kernels left an element of a result unwritten. It can tell only in memory that was new.
    fn check_written(&self, plan: &Plan<impl PassType>, result: &Written) -> Result<(), Error> {
        let Written {
            tensor, heads, seqlen, ..
        } = result;
        for row in 0..plan.problem().batch() * heads * *seqlen as usize {
            let (head, position) = (row / *seqlen as usize, row % *seqlen as usize);
            let (batch, head) = (head / heads, head % heads);
            let elements = batch as u64 * tensor.batch_stride
                + head as u64 * tensor.head_stride
                + position as u64 * tensor.row_stride;
            let bytes = result.dtype.bytes();
            let first = DevicePtr(tensor.address + elements * bytes as u64);
            let written = self.memory.is_initialized(first, bytes * result.row);
            if !written.map_err(self.failed("is_initialized"))? {
                return Err(Error::Launch {
                    device: self.spec(),
                    kernel: plan.launches().last().map_or("", |launch| launch.entry.name),
                    message: format!("`{}` was not written at [{batch}, {head}, {position}]", result.name),
                });
            }
        }
        Ok(())
    }

    /// Launches the kernels of a plan, which write these results.
    fn carry_out<P: PassType>(
        &self,
        plan: &Plan<P>,
        results: P::Results,
        written: &[Written],
        reporter: &Reporter<'_>,
    ) -> Result<(), Error> {
        let blocks = |launch: &Launch<P>| launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
        if plan.launches().is_empty() {
            reporter.begin(|| 1);
            reporter.add(1);
            return Ok(()); // there is nothing to write
        }
        reporter.begin(|| plan.launches().iter().map(blocks).sum());
        plan.launches()
            .iter()
            .try_for_each(|launch| self.launch(launch, results, reporter))?;
        written.iter().try_for_each(|result| self.check_written(plan, result))
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

    unsafe fn run(&self, run: Run<'_>, reporter: &Reporter<'_>) -> Result<(), Error> {
        match run {
            Run::Forward(plan, results) => {
                let written = written_by_forward(plan.problem(), &results);
                self.carry_out(plan, results, &written, reporter)
            }
            Run::Backward(plan, results) => {
                self.carry_out(plan, results, &written_by_backward(plan, &results), reporter)
            }
        }
    }

    unsafe fn move_tokens(&self, launch: &Launch<Rotary>) -> Result<(), Error> {
        self.launch(launch, (), &Reporter::silent())
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
        DataType::F32 => ElementType::F32,
        DataType::F16 => ElementType::F16,
        DataType::Bf16 => ElementType::Bf16,
        DataType::F8E4M3 => ElementType::U8,
        DataType::I32 => ElementType::S32,
        DataType::U32 => ElementType::U32,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Attention;
    use crate::problem::Outputs;
    use crate::tensor::Tensor;

    #[test]
    fn a_result_that_no_kernel_wrote_is_an_error() {
        let emulated = Emulated {
            memory: DeviceMemory::with_capacity(1 << 30),
            modules: Modules::new(),
            lists: Lists::default(),
            counters: Mutex::new(Counters::default()),
            options: EmulatorOptions::new(Arch::Sm80),
        };
        let device = Device::cpu();
        let q = Tensor::<f32>::zeros(&device, [1, 2, 3, 8]).expect("small");
        let lse = Tensor::<f32>::zeros(&device, [1, 2, 3]).expect("small");
        let outputs = Outputs::new(q.info(), lse.info());
        let apart = Tensor::<f32>::zeros(&device, [1, 2, 3, 8]).expect("small");
        let info = apart.info();
        let problem = Problem::new(&Attention::new(), info, info, info, Some(outputs)).expect("valid");
        let plan = Plan::new(&problem, &emulated.info()).expect("a kernel");
        let out = emulated.alloc(2 * 3 * 8 * 4).expect("small");
        let lse = emulated.alloc(2 * 3 * 4).expect("small");
        let results = ForwardResults {
            out,
            lse,
            statistics: None,
            workspace: 0,
        };
        let [of_out, of_lse] = &written_by_forward(plan.problem(), &results)[..] else {
            panic!("out and lse")
        };
        // SAFETY: the allocations are as long.
        unsafe {
            emulated.zero(out, 2 * 3 * 8 * 4).expect("small");
            emulated.zero(lse, 5 * 4).expect("small");
        }
        assert!(emulated.check_written(&plan, of_out).is_ok());
        let error = emulated
            .check_written(&plan, of_lse)
            .expect_err("the last was not written");
        assert!(
            error.to_string().contains("`lse` was not written at [0, 1, 2]"),
            "{error}"
        );
    }
}
