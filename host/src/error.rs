//! Everything that can go wrong, each with the argument's name, the value it had and what was allowed.
//!
//! Bad input is found before anything is allocated or launched. What can fail later is the device: its driver, its
//! memory, a launch, or the emulator's checks.

use std::fmt;

use flash_attention_kernels::entries::Dtype;

/// Why a call was refused or failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the number of axes that attention takes.
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
    ZeroSize {
        /// The tensor.
        argument: &'static str,
        /// The empty axis.
        axis: &'static str,
        /// The tensor's shape.
        shape: Vec<usize>,
    },

    /// Two tensors that must agree on an axis do not.
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
    DtypeMismatch {
        /// The tensor.
        argument: &'static str,
        /// Its element type.
        got: Dtype,
        /// The element type it must have.
        expected: Dtype,
    },

    /// Tensors of one call lie on different devices.
    DeviceMismatch {
        /// The tensor.
        argument: &'static str,
        /// Where it is.
        got: String,
        /// Where `q` is.
        expected: String,
    },

    /// Query heads can not be shared out evenly among key/value heads.
    HeadsNotDivisible {
        /// Heads of `q`.
        heads_q: usize,
        /// Heads of `k` and `v`.
        heads_kv: usize,
    },

    /// No kernel serves this head_dim.
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
    LastAxisStride {
        /// The tensor.
        argument: &'static str,
        /// Stride of its last axis, in elements.
        stride: usize,
        /// All its strides, in elements.
        strides: Vec<usize>,
    },

    /// A sequence is longer than positions can count.
    SequenceTooLong {
        /// The tensor.
        argument: &'static str,
        /// Its sequence length.
        seqlen: usize,
        /// The largest allowed.
        max: usize,
    },

    /// A tensor that must be contiguous is not.
    NotContiguous {
        /// The tensor.
        argument: &'static str,
        /// Its strides, in elements.
        strides: Vec<usize>,
        /// The strides it must have.
        expected: Vec<usize>,
    },

    /// An output would write one element of memory from two places.
    OverlappingStrides {
        /// The tensor.
        argument: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
    },

    /// An output shares memory with another argument.
    Aliased {
        /// The output.
        argument: &'static str,
        /// The tensor it shares memory with.
        other: &'static str,
    },

    /// The spans of an output and another argument interleave, and their elements could not be proven apart.
    Interleaved {
        /// The output.
        argument: &'static str,
        /// The tensor whose span interleaves with it.
        other: &'static str,
    },

    /// A tensor's bytes can not be counted or addressed.
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
    SoftmaxScale {
        /// The scale.
        value: f32,
    },

    /// A number that must be one is not.
    NotANumber {
        /// The tensor.
        argument: &'static str,
        /// The first such element, counted in order.
        index: usize,
    },

    /// A score program, or an option that is one, is not as it must be.
    Program(ProgramError),

    /// A device cannot do yet what was asked for.
    Unsupported {
        /// What it cannot do.
        feature: &'static str,
        /// The device.
        device: String,
        /// What can be done instead.
        reason: &'static str,
    },

    /// The problem needs more blocks than one launch has.
    GridTooLarge {
        /// Blocks needed.
        blocks: u128,
        /// Blocks a launch can have.
        limit: u32,
    },

    /// The slice does not hold what the shape says.
    DataLength {
        /// Elements given.
        len: usize,
        /// Elements needed.
        expected: usize,
        /// The shape asked for.
        shape: Vec<usize>,
    },

    /// Shape and strides do not have the same number of axes.
    StridesRank {
        /// Entries of `strides`.
        strides: usize,
        /// Entries of `shape`.
        rank: usize,
    },

    /// The tensor has no such axis.
    Axis {
        /// The axis asked for.
        axis: usize,
        /// Axes there are.
        rank: usize,
    },

    /// A range reaches past the end of its axis.
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
    Address {
        /// The address.
        address: u64,
        /// What it must be a multiple of.
        align: usize,
    },

    /// The workspace of a backward pass is too small.
    Workspace {
        /// Bytes it has.
        bytes: u64,
        /// [`Plan::workspace_bytes`](crate::Plan::workspace_bytes).
        needed: u64,
    },

    /// A device's name could not be read.
    ParseDevice {
        /// What was given.
        text: String,
        /// The architectures there are kernels for.
        archs: String,
    },

    /// A CPU device was asked for instructions, by its text or by `FLASH_ATTENTION_CPU`, that this processor has not.
    CpuInstructions {
        /// `device` for the text of a device, `FLASH_ATTENTION_CPU` for the environment variable.
        argument: &'static str,
        /// What was asked for.
        name: String,
        /// What there is, best first.
        available: String,
    },

    /// A CPU device was asked to run on no threads, or its threads could not be started.
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },

    /// A CPU device was asked to run on more threads than are of use.
    TooManyThreads {
        /// Threads asked for.
        threads: usize,
        /// Most threads: four a core, at least 256.
        limit: usize,
    },

    /// CUDA can not be used on this machine.
    CudaUnavailable {
        /// What is missing.
        reason: CudaUnavailable,
    },

    /// A device was asked for that this program was built without.
    NotBuilt {
        /// What was asked for.
        device: String,
        /// The feature of the crate.
        feature: &'static str,
    },

    /// There is no GPU with this number.
    UnknownDevice {
        /// The number asked for.
        ordinal: usize,
        /// GPUs there are.
        count: usize,
    },

    /// No compiled kernel runs this problem on this device.
    NoKernel {
        /// The device.
        device: String,
        /// Pass, dtype and head_dim.
        wanted: String,
        /// What the device lacks.
        reason: String,
    },

    /// The device has too little free memory.
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free when it failed, where the device can tell.
        free: Option<u64>,
    },

    /// A call of the CUDA driver failed.
    Driver {
        /// The device.
        device: String,
        /// The driver's function.
        call: &'static str,
        /// The driver's name and description of the error.
        message: String,
    },

    /// A kernel could not be loaded or launched.
    Launch {
        /// The device.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// What the device said.
        message: String,
    },

    /// The emulator's checks found something wrong with a kernel. The outputs were written, and are not to be trusted.
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

/// A sentence with the argument's name, its value and what was allowed. One line a variant.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank {
                argument,
                shape,
                rank,
                expected,
            } => write!(f, "`{argument}` has rank {rank} (shape {shape:?}), expected {expected}"),
            Self::ZeroSize { argument, axis, shape } => write!(
                f,
                "`{argument}` has {axis} = 0 (shape {shape:?}), every size must be at least 1"
            ),
            Self::ShapeMismatch {
                argument,
                axis,
                got,
                other,
                expected,
            } => write!(
                f,
                "`{argument}` has {axis} = {got}, expected {expected} as in `{other}`"
            ),
            Self::DtypeMismatch {
                argument,
                got,
                expected,
            } => write!(f, "`{argument}` has dtype {}, expected {}", got.name(), expected.name()),
            Self::DeviceMismatch {
                argument,
                got,
                expected,
            } => write!(
                f,
                "`{argument}` is on {got}, expected {expected} as `q` (two devices of one name are two memories)"
            ),
            Self::HeadsNotDivisible { heads_q, heads_kv } => write!(
                f,
                "`q` has {heads_q} heads, expected a multiple of the {heads_kv} heads of `k` and `v`"
            ),
            Self::HeadDim {
                argument,
                head_dim,
                multiple_of,
                max,
            } => write!(
                f,
                "`{argument}` has head_dim = {head_dim}, expected a multiple of {multiple_of} up to {max}"
            ),
            Self::LastAxisStride {
                argument,
                stride,
                strides,
            } => write!(
                f,
                "`{argument}` has stride {stride} on its last axis, expected 1 (strides {strides:?})"
            ),
            Self::SequenceTooLong { argument, seqlen, max } => {
                write!(f, "`{argument}` has seqlen = {seqlen}, expected at most {max}")
            }
            Self::NotContiguous {
                argument,
                strides,
                expected,
            } => write!(
                f,
                "`{argument}` has strides {strides:?}, expected {expected:?} (contiguous)"
            ),
            Self::OverlappingStrides {
                argument,
                shape,
                strides,
            } => write!(
                f,
                "`{argument}` has strides {strides:?} over shape {shape:?}: its elements overlap, each needs its own memory"
            ),
            Self::Aliased { argument, other } => write!(
                f,
                "`{argument}` shares memory with `{other}`, an output needs memory of its own"
            ),
            Self::Interleaved { argument, other } => write!(
                f,
                "the spans of `{argument}` and `{other}` interleave and could not be proven apart, an output needs memory of its own"
            ),
            Self::SizeOverflow {
                argument,
                shape,
                element_bytes,
                limit,
            } => write!(
                f,
                "`{argument}` with shape {shape:?} and {element_bytes}-byte elements spans more than {limit} bytes"
            ),
            Self::SoftmaxScale { value } => write!(f, "`softmax_scale` is {value}, expected a finite number"),
            Self::NotANumber { argument, index } => write!(f, "`{argument}` holds a NaN at element {index}"),
            Self::Program(error) => error.fmt(f),
            Self::Unsupported {
                feature,
                device,
                reason,
            } => write!(f, "{feature} cannot run on {device} yet: {reason}"),
            Self::GridTooLarge { blocks, limit } => write!(
                f,
                "`q` needs a grid of {blocks} blocks (tiles x heads x batch), at most {limit} can be launched"
            ),
            Self::DataLength { len, expected, shape } => {
                write!(f, "`data` has {len} elements, shape {shape:?} needs {expected}")
            }
            Self::StridesRank { strides, rank } => write!(f, "`strides` has {strides} entries, shape has {rank}"),
            Self::Axis { axis, rank } => write!(f, "`axis` is {axis}, the tensor has {rank} axes"),
            Self::Range { axis, start, len, size } => write!(
                f,
                "`start` {start} and `len` {len} reach past the end of axis {axis}, which has {size} entries"
            ),
            Self::Address { address, align } => {
                write!(f, "`address` is {address:#x}, expected a non-null multiple of {align}")
            }
            Self::Workspace { bytes, needed } => write!(f, "`workspace` has {bytes} bytes, the plan needs {needed}"),
            Self::ParseDevice { text, archs } => write!(
                f,
                "`device` is {text:?}, expected best, cpu, cuda, cuda:N, emulator or emulator:ARCH with ARCH one of {archs}"
            ),
            Self::CpuInstructions {
                argument,
                name,
                available,
            } => write!(
                f,
                "`{argument}` asks for the CPU's instructions {name:?}, expected one of those that this processor has: \
                 {available}"
            ),
            Self::Threads { threads, reason } => {
                write!(f, "a cpu device with {threads} threads can not be had: {reason}")
            }
            Self::TooManyThreads { threads, limit } => {
                write!(f, "`threads` is {threads}, at most {limit} can be had on this machine")
            }
            Self::CudaUnavailable { reason } => write!(f, "CUDA is not available: {reason}"),
            Self::NotBuilt { device, feature } => write!(
                f,
                "`device` is {device:?}, which needs the feature `{feature}` of flash-attention, left out of this build"
            ),
            Self::UnknownDevice { ordinal, count } => write!(
                f,
                "`ordinal` is {ordinal}, this machine has {count} CUDA device(s), numbered from 0"
            ),
            Self::NoKernel { device, wanted, reason } => write!(f, "no kernel for {wanted} on {device}: {reason}"),
            Self::OutOfMemory {
                device,
                requested,
                free,
            } => write!(
                f,
                "out of memory on {device}: {requested} bytes asked, {} free",
                free.map_or("an unknown number".into(), |f| f.to_string())
            ),
            Self::Driver { device, call, message } => write!(f, "{call} failed on {device}: {message}"),
            Self::Launch {
                device,
                kernel,
                message,
            } => write!(f, "kernel {kernel} failed on {device}: {message}"),
            #[cfg(feature = "emulator")]
            Self::Findings { device, kernel, report } => write!(
                f,
                "kernel {kernel} failed {} check(s) on {device}:{}",
                report.total_findings,
                list(&report.findings)
            ),
        }
    }
}

impl std::error::Error for Error {}

impl From<ProgramError> for Error {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}

/// What is wrong with a score program.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgramError {
    /// A named feature was given a number that it has no meaning for.
    Argument {
        /// The feature.
        argument: &'static str,
        /// The number.
        value: String,
        /// The numbers it takes.
        expected: &'static str,
    },

    /// An index is divided by a number that is not positive.
    Divisor {
        /// The number.
        value: i32,
    },

    /// A program has more operations, or numbers, than there is room for.
    TooLarge {
        /// What it has too many of.
        what: &'static str,
        /// The most it may have.
        limit: usize,
    },

    /// Backward needs a derivative that an operation does not have.
    NotDifferentiable {
        /// The operation.
        operation: &'static str,
    },
}

/// A sentence with the argument's name, its value and what was allowed. One line a variant.
impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument {
                argument,
                value,
                expected,
            } => write!(f, "`{argument}` is {value}, expected {expected}"),
            Self::Divisor { value } => write!(
                f,
                "the score program divides an index by {value}, expected a number above 0"
            ),
            Self::TooLarge { what, limit } => write!(f, "the score program has more than {limit} {what}"),
            Self::NotDifferentiable { operation } => write!(
                f,
                "the score program has no derivative: it takes `{operation}` of what depends on the score or on a table \
                 whose gradient is asked for"
            ),
        }
    }
}

impl std::error::Error for ProgramError {}

/// Findings, one below the other.
#[cfg(feature = "emulator")]
fn list(findings: &[ptx_emulator::Finding]) -> String {
    findings.iter().map(|finding| format!("\n{finding}")).collect()
}

/// Which part of CUDA is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// The program was built without the feature `cuda`.
    NotBuilt,
    /// The driver's library is not installed.
    NoDriver,
    /// The driver is there, a GPU is not.
    NoGpu,
    /// The driver is older than the kernels need.
    DriverTooOld {
        /// CUDA version of the driver: major, minor.
        found: (u32, u32),
        /// Oldest CUDA version that will do.
        needed: (u32, u32),
    },
    /// The GPU is older than the kernels need.
    GpuTooOld {
        /// The GPU's name.
        name: String,
        /// Its compute capability: major, minor.
        found: (u32, u32),
        /// The oldest that will do.
        needed: (u32, u32),
    },
    /// The driver is there but does not start.
    Broken(String),
}

/// The part that is missing.
impl fmt::Display for CudaUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => write!(f, "this build leaves out the feature `cuda` of flash-attention"),
            Self::NoDriver => write!(f, "no NVIDIA driver is installed (libcuda was not found)"),
            Self::NoGpu => write!(f, "the NVIDIA driver finds no GPU"),
            Self::DriverTooOld { found, needed } => write!(
                f,
                "the NVIDIA driver supports CUDA {}.{}, {}.{} or newer is needed",
                found.0, found.1, needed.0, needed.1
            ),
            Self::GpuTooOld { name, found, needed } => write!(
                f,
                "{name} has compute capability {}.{}, {}.{} or newer is needed",
                found.0, found.1, needed.0, needed.1
            ),
            Self::Broken(reason) => write!(f, "the NVIDIA driver does not start: {reason}"),
        }
    }
}

impl std::error::Error for CudaUnavailable {}
