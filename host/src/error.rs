//! Everything that can go wrong, each with the argument's name, the value it had and what was allowed.
//!
//! Bad input is found before anything is allocated or launched. What can fail later is the device: its driver, its
//! memory, a launch, or the emulator's checks.

use flash_attention_kernels::entries::Dtype;

/// Why a call was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the number of axes that attention takes.
    #[error("`{argument}` has rank {rank} (shape {shape:?}), expected {expected}")]
    Rank {
        /// The tensor.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Axes it has.
        rank: usize,
        /// Axes it needs.
        expected: usize,
    },

    /// A tensor has no elements.
    #[error("`{argument}` has {axis} = 0 (shape {shape:?}), every size must be at least 1")]
    ZeroSize {
        /// The tensor.
        argument: &'static str,
        /// The empty axis.
        axis: &'static str,
        /// The tensor's shape.
        shape: Vec<usize>,
    },

    /// Two tensors that must agree on an axis do not.
    #[error("`{argument}` has {axis} = {got}, expected {expected} as in `{other}`")]
    ShapeMismatch {
        /// The tensor that disagrees.
        argument: &'static str,
        /// The axis.
        axis: &'static str,
        /// Its size in `argument`.
        got: usize,
        /// The tensor it is compared with.
        other: &'static str,
        /// Its size in `other`.
        expected: usize,
    },

    /// A tensor has another element type than it must. Typed tensors can not cause this, only a hand-made
    /// [`TensorInfo`](crate::problem::TensorInfo) can.
    #[error("`{argument}` has dtype {}, expected {}", got.name(), expected.name())]
    DtypeMismatch {
        /// The tensor.
        argument: &'static str,
        /// Its element type.
        got: Dtype,
        /// The element type it must have.
        expected: Dtype,
    },

    /// Tensors of one call lie on different devices.
    #[error("`{argument}` is on {got}, expected {expected} as `q` (two devices of one name are two memories)")]
    DeviceMismatch {
        /// The tensor.
        argument: &'static str,
        /// Where it is.
        got: String,
        /// Where `q` is.
        expected: String,
    },

    /// Query heads can not be shared out evenly among key/value heads.
    #[error("`q` has {heads_q} heads, expected a multiple of the {heads_kv} heads of `k` and `v`")]
    HeadsNotDivisible {
        /// Heads of `q`.
        heads_q: usize,
        /// Heads of `k` and `v`.
        heads_kv: usize,
    },

    /// No kernel serves this head_dim.
    #[error("`{argument}` has head_dim = {head_dim}, expected a multiple of {multiple_of} up to {max}")]
    HeadDim {
        /// The tensor.
        argument: &'static str,
        /// Its head_dim.
        head_dim: usize,
        /// What it must be a multiple of.
        multiple_of: usize,
        /// The largest allowed.
        max: usize,
    },

    /// The elements of a row do not lie side by side.
    #[error("`{argument}` has stride {stride} on its last axis, expected 1 (strides {strides:?})")]
    LastAxisStride {
        /// The tensor.
        argument: &'static str,
        /// Stride of its last axis, in elements.
        stride: usize,
        /// All its strides, in elements.
        strides: Vec<usize>,
    },

    /// A sequence is longer than positions can count.
    #[error("`{argument}` has seqlen = {seqlen}, expected at most {max}")]
    SequenceTooLong {
        /// The tensor.
        argument: &'static str,
        /// Its sequence length.
        seqlen: usize,
        /// The largest allowed.
        max: usize,
    },

    /// A tensor that must be contiguous is not.
    #[error("`{argument}` has strides {strides:?}, expected {expected:?} (contiguous)")]
    NotContiguous {
        /// The tensor.
        argument: &'static str,
        /// Its strides, in elements.
        strides: Vec<usize>,
        /// The strides it must have.
        expected: Vec<usize>,
    },

    /// An output would write one element of memory from two places.
    #[error(
        "`{argument}` has strides {strides:?} over shape {shape:?}: its elements overlap, each needs its own memory"
    )]
    OverlappingStrides {
        /// The tensor.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
    },

    /// An output shares memory with another argument.
    #[error("`{argument}` shares memory with `{other}`, an output needs memory of its own")]
    Aliased {
        /// The output.
        argument: &'static str,
        /// The tensor it shares memory with.
        other: &'static str,
    },

    /// A tensor's bytes can not be counted or addressed.
    #[error("`{argument}` with shape {shape:?} and {element_bytes}-byte elements spans more than {limit} bytes")]
    SizeOverflow {
        /// The tensor, or `shape`.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes of one element.
        element_bytes: usize,
        /// The largest span, in bytes.
        limit: usize,
    },

    /// The softmax scale is not a number that can scale.
    #[error("`softmax_scale` is {value}, expected a finite number")]
    SoftmaxScale {
        /// The scale.
        value: f32,
    },

    /// A number that must be one is not.
    #[error("`{argument}` holds a NaN at element {index}")]
    NotANumber {
        /// The tensor.
        argument: &'static str,
        /// The first such element, counted in order.
        index: usize,
    },

    /// The problem needs more blocks than one launch has.
    #[error("`q` needs a grid of {blocks} blocks (tiles x heads x batch), at most {limit} can be launched")]
    GridTooLarge {
        /// Blocks needed.
        blocks: u128,
        /// Blocks a launch can have.
        limit: u32,
    },

    /// The slice does not hold what the shape says.
    #[error("`data` has {len} elements, shape {shape:?} needs {expected}")]
    DataLength {
        /// Elements given.
        len: usize,
        /// Elements needed.
        expected: usize,
        /// The shape asked for.
        shape: Vec<usize>,
    },

    /// Shape and strides do not have the same number of axes.
    #[error("`strides` has {strides} entries, shape has {rank}")]
    StridesRank {
        /// Entries of `strides`.
        strides: usize,
        /// Entries of `shape`.
        rank: usize,
    },

    /// The tensor has no such axis.
    #[error("`axis` is {axis}, the tensor has {rank} axes")]
    Axis {
        /// The axis asked for.
        axis: usize,
        /// Axes there are.
        rank: usize,
    },

    /// A range reaches past the end of its axis.
    #[error("`start` {start} and `len` {len} reach past the end of axis {axis}, which has {size} entries")]
    Range {
        /// The axis.
        axis: usize,
        /// First index asked for.
        start: usize,
        /// Entries asked for.
        len: usize,
        /// Entries there are.
        size: usize,
    },

    /// Foreign memory starts at an address where no element can.
    #[error("`address` is {address:#x}, expected a non-null multiple of {align}")]
    Address {
        /// The address.
        address: u64,
        /// What it must be a multiple of.
        align: usize,
    },

    /// The workspace of a backward pass is too small.
    #[error("`workspace` has {bytes} bytes, the plan needs {needed}")]
    Workspace {
        /// Bytes it has.
        bytes: u64,
        /// [`Plan::workspace_bytes`](crate::Plan::workspace_bytes).
        needed: u64,
    },

    /// A device's name could not be read.
    #[error(
        "`device` is {text:?}, expected best, cpu, cuda, cuda:N, emulator or emulator:ARCH with ARCH one of {archs}"
    )]
    ParseDevice {
        /// What was given.
        text: String,
        /// The architectures there are kernels for.
        archs: String,
    },

    /// A CPU device was asked for instructions, by its text or by `FLASH_ATTENTION_CPU`, that this processor has not.
    #[error("the CPU's instructions are to be {name:?}, expected one of those that this processor has: {available}")]
    CpuInstructions {
        /// What was asked for.
        name: String,
        /// What there is, best first.
        available: String,
    },

    /// A CPU device was asked to run on no threads, or its threads could not be started.
    #[error("a cpu device with {threads} threads can not be had: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },

    /// A CPU device was asked to run on more threads than are of use.
    #[error("`threads` is {threads}, at most {limit} can be had on this machine")]
    TooManyThreads {
        /// Threads asked for.
        threads: usize,
        /// Most threads: four a core, at least 256.
        limit: usize,
    },

    /// CUDA can not be used on this machine.
    #[error("CUDA is not available: {reason}")]
    CudaUnavailable {
        /// What is missing.
        reason: CudaUnavailable,
    },

    /// A device was asked for that this program was built without.
    #[error("`device` is {device:?}, which needs the feature `{feature}` of flash-attention, left out of this build")]
    NotBuilt {
        /// What was asked for.
        device: String,
        /// The feature of the crate.
        feature: &'static str,
    },

    /// There is no GPU with this number.
    #[error("`ordinal` is {ordinal}, this machine has {count} CUDA device(s), numbered from 0")]
    UnknownDevice {
        /// The number asked for.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },

    /// No compiled kernel runs this problem on this device.
    #[error("no kernel for {wanted} on {device}: {reason}")]
    NoKernel {
        /// The device.
        device: String,
        /// Pass, dtype and head_dim.
        wanted: String,
        /// What the device lacks.
        reason: String,
    },

    /// The device has too little free memory.
    #[error("out of memory on {device}: {requested} bytes asked, {} free", free.map_or("an unknown number".into(), |f| f.to_string()))]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free when it failed, where the device can tell.
        free: Option<u64>,
    },

    /// A call of the CUDA driver failed.
    #[error("{call} failed on {device}: {message}")]
    Driver {
        /// The device.
        device: String,
        /// The driver's function.
        call: &'static str,
        /// The driver's name and description of the error.
        message: String,
    },

    /// A kernel could not be loaded or launched.
    #[error("kernel {kernel} failed on {device}: {message}")]
    Launch {
        /// The device.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// What the device said.
        message: String,
    },

    /// The emulator's checks found something wrong with a kernel. The outputs were written, and are not to be trusted.
    #[error("kernel {kernel} failed {} check(s) on {device}:{}", report.total_findings, list(&report.findings))]
    #[cfg(feature = "emulator")]
    Findings {
        /// The device.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// What was found, and the counters.
        report: Box<ptx_emulator::Report>,
    },
}

/// Findings, one below the other.
#[cfg(feature = "emulator")]
fn list(findings: &[ptx_emulator::Finding]) -> String {
    findings.iter().map(|finding| format!("\n{finding}")).collect()
}

/// Which part of CUDA is missing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// The program was built without the feature `cuda`.
    #[error("this build leaves out the feature `cuda` of flash-attention")]
    NotBuilt,
    /// The driver's library is not installed.
    #[error("no NVIDIA driver is installed (libcuda was not found)")]
    NoDriver,
    /// The driver is there, a GPU is not.
    #[error("the NVIDIA driver finds no GPU")]
    NoGpu,
    /// The driver is older than the kernels need.
    #[error("the NVIDIA driver supports CUDA {}.{}, {}.{} or newer is needed", found.0, found.1, needed.0, needed.1)]
    DriverTooOld {
        /// CUDA version of the driver: major, minor.
        found: (u32, u32),
        /// Oldest CUDA version that will do.
        needed: (u32, u32),
    },
    /// The GPU is older than the kernels need.
    #[error("{name} has compute capability {}.{}, {}.{} or newer is needed", found.0, found.1, needed.0, needed.1)]
    GpuTooOld {
        /// The GPU's name.
        name: String,
        /// Its compute capability: major, minor.
        found: (u32, u32),
        /// The oldest that will do.
        needed: (u32, u32),
    },
    /// The driver is there but does not start.
    #[error("the NVIDIA driver does not start: {0}")]
    Broken(String),
}
