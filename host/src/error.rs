//! Errors: each names the argument, the value it had and the limit.
//!
//! Bad input is found before anything is allocated or launched. Later only the device can fail: its driver, its
//! memory, a launch, or the emulator's checks.

use std::fmt;

use crate::element::DataType;

/// The reason why a call was refused or failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another number of axes than attention takes.
    Rank {
        /// Name of the tensor.
        argument: &'static str,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Number of axes it has.
        rank: usize,
        /// Number of axes it needs.
        expected: usize,
    },

    /// Two tensors have different sizes along an axis on which they must agree.
    ShapeMismatch {
        /// Name of the tensor that disagrees.
        argument: &'static str,
        /// Name of the axis.
        axis: &'static str,
        /// Size of the axis in `argument`.
        got: usize,
        /// Name of the tensor it is compared with.
        other: &'static str,
        /// Size of the axis in `other`.
        expected: usize,
    },

    /// A tensor has the wrong element type. Typed tensors cannot cause this; only a hand-made
    /// [`TensorInfo`](crate::problem::TensorInfo) can.
    DtypeMismatch {
        /// Name of the tensor.
        argument: &'static str,
        /// Element type it has.
        got: DataType,
        /// Element type it must have.
        expected: DataType,
    },

    /// Tensors of one call lie on different devices.
    DeviceMismatch {
        /// Name of the tensor.
        argument: &'static str,
        /// Device of the tensor.
        got: String,
        /// Device of `q`.
        expected: String,
    },

    /// The number of query heads is not a multiple of the number of key/value heads.
    HeadsNotDivisible {
        /// Number of heads of `q`.
        heads_q: usize,
        /// Number of heads of `k` and `v`.
        heads_kv: usize,
    },

    /// A list that describes the sequences of a ragged batch has the wrong length.
    SequenceCount {
        /// The list.
        argument: &'static str,
        /// Its length.
        len: usize,
        /// The length it must have.
        expected: usize,
    },

    /// A number that describes a sequence of a ragged batch is out of range.
    Sequence {
        /// The list.
        argument: &'static str,
        /// The sequence.
        sequence: usize,
        /// The number.
        value: i64,
        /// The numbers that are allowed.
        expected: String,
    },

    /// No kernel serves this head_dim.
    HeadDim {
        /// Name of the tensor.
        argument: &'static str,
        /// head_dim it has.
        head_dim: usize,
        /// Number that head_dim must be a multiple of.
        multiple_of: usize,
        /// Largest head_dim allowed.
        max: usize,
    },

    /// The elements of a row are not contiguous.
    LastAxisStride {
        /// Name of the tensor.
        argument: &'static str,
        /// Stride of its last axis, in elements.
        stride: usize,
        /// Strides of all its axes, in elements.
        strides: Vec<usize>,
    },

    /// A sequence is longer than the kernels' position type can count.
    SequenceTooLong {
        /// Name of the tensor.
        argument: &'static str,
        /// Sequence length it has.
        seqlen: usize,
        /// Largest sequence length allowed.
        max: usize,
    },

    /// A tensor that must be contiguous is not.
    NotContiguous {
        /// Name of the tensor.
        argument: &'static str,
        /// Strides it has, in elements.
        strides: Vec<usize>,
        /// Strides it must have, in elements.
        expected: Vec<usize>,
    },

    /// Two indices of an output share one element of memory.
    OverlappingStrides {
        /// Name of the tensor.
        argument: &'static str,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Strides of the tensor, in elements.
        strides: Vec<usize>,
    },

    /// An output shares memory with another argument.
    Aliased {
        /// Name of the output.
        argument: &'static str,
        /// Name of the tensor it shares memory with.
        other: &'static str,
    },

    /// The spans of an output and another argument interleave, and their elements could not be proven apart.
    Interleaved {
        /// Name of the output.
        argument: &'static str,
        /// Name of the tensor whose span interleaves with it.
        other: &'static str,
    },

    /// A tensor's bytes cannot be counted or addressed.
    SizeOverflow {
        /// Name of the tensor, or `shape`.
        argument: &'static str,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Size of one element, in bytes.
        element_bytes: usize,
        /// Largest span allowed, in bytes.
        limit: usize,
    },

    /// The softmax scale is infinite or NaN.
    SoftmaxScale {
        /// Value of the scale.
        value: f32,
    },

    /// A tensor holds NaN where a number is needed.
    NotANumber {
        /// Name of the tensor.
        argument: &'static str,
        /// Index of the first NaN, in logical order.
        index: usize,
    },

    /// A score program, or an option that is compiled to one, is invalid.
    Program(ProgramError),

    /// The device does not support a feature of the call yet.
    Unsupported {
        /// Name of the feature.
        feature: &'static str,
        /// Device of the call.
        device: String,
        /// Reason, for example what can run it instead.
        reason: &'static str,
    },

    /// The problem needs more blocks than one launch can have.
    GridTooLarge {
        /// Number of blocks needed.
        blocks: u128,
        /// Number of blocks that a launch can have.
        limit: u32,
    },

    /// The slice has another length than the shape.
    DataLength {
        /// Number of elements given.
        len: usize,
        /// Number of elements needed.
        expected: usize,
        /// Shape asked for.
        shape: Vec<usize>,
    },

    /// Shape and strides have different numbers of axes.
    StridesRank {
        /// Number of entries of `strides`.
        strides: usize,
        /// Number of entries of `shape`.
        rank: usize,
    },

    /// The tensor has no such axis.
    Axis {
        /// Axis asked for.
        axis: usize,
        /// Number of axes of the tensor.
        rank: usize,
    },

    /// A range reaches past the end of its axis.
    Range {
        /// Axis of the range.
        axis: usize,
        /// First index asked for.
        start: usize,
        /// Number of entries asked for.
        len: usize,
        /// Number of entries of the axis.
        size: usize,
    },

    /// The address of foreign memory is null or not aligned to an element.
    Address {
        /// Address given.
        address: u64,
        /// Alignment needed, in bytes.
        align: usize,
    },

    /// The workspace of a backward pass is too small.
    Workspace {
        /// Size of the workspace, in bytes.
        bytes: u64,
        /// Bytes needed: [`Plan::workspace_bytes`](crate::Plan::workspace_bytes).
        needed: u64,
    },

    /// The text of a device could not be parsed.
    ParseDevice {
        /// Text given.
        text: String,
        /// Architectures that have kernels.
        archs: String,
    },

    /// The processor does not support the instructions asked for, by a device's text or by `FLASH_ATTENTION_CPU`.
    CpuInstructions {
        /// Source of the name: `device` for a device's text, `FLASH_ATTENTION_CPU` for the environment variable.
        argument: &'static str,
        /// Name of the instructions asked for.
        name: String,
        /// Names of the supported instructions, best first.
        available: String,
    },

    /// A CPU device was asked for with 0 threads, or its threads could not be started.
    Threads {
        /// Number of threads asked for.
        threads: usize,
        /// Reason of the failure.
        reason: String,
    },

    /// A CPU device was asked for with more threads than are of use.
    TooManyThreads {
        /// Number of threads asked for.
        threads: usize,
        /// Largest number of threads allowed: four a core, and at least 256.
        limit: usize,
    },

    /// CUDA cannot be used on this machine.
    CudaUnavailable {
        /// The part of CUDA that is missing.
        reason: CudaUnavailable,
    },

    /// The device needs a feature of the crate that this build leaves out.
    NotBuilt {
        /// Device asked for.
        device: String,
        /// Name of the feature.
        feature: &'static str,
    },

    /// There is no GPU with this number.
    UnknownDevice {
        /// Number asked for.
        ordinal: usize,
        /// Number of GPUs of the machine.
        count: usize,
    },

    /// No compiled kernel runs this problem on this device.
    NoKernel {
        /// Device of the problem.
        device: String,
        /// Pass, dtype and head_dim of the problem.
        wanted: String,
        /// Property that the device lacks.
        reason: String,
    },

    /// The device has too little free memory.
    OutOfMemory {
        /// Device without enough memory.
        device: String,
        /// Number of bytes asked for.
        requested: u64,
        /// Number of bytes that were free when it failed, if the device can tell.
        free: Option<u64>,
    },

    /// A call of the CUDA driver failed.
    Driver {
        /// Device of the call.
        device: String,
        /// Name of the driver's function.
        call: &'static str,
        /// The driver's name and description of the error.
        message: String,
    },

    /// A kernel could not be loaded or launched.
    Launch {
        /// Device of the launch.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// Message of the device.
        message: String,
    },

    /// The emulator's checks found an error in a kernel. The outputs were written, but are not to be trusted.
    #[cfg(feature = "emulator")]
    Findings {
        /// Device of the launch.
        device: String,
        /// Name of the kernel.
        kernel: &'static str,
        /// Findings and counters of the launch.
        report: Box<ptx_emulator::Report>,
    },
}

/// Writes a sentence with the argument's name, its value and the limit.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rank {
                argument,
                shape,
                rank,
                expected,
            } => write!(f, "`{argument}` has rank {rank} (shape {shape:?}), expected {expected}"),
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
            Self::SequenceCount {
                argument,
                len,
                expected,
            } => write!(f, "`{argument}` has {len} entries, expected {expected}"),
            Self::Sequence {
                argument,
                sequence,
                value,
                expected,
            } => write!(
                f,
                "`{argument}` is {value} for sequence {sequence}, expected {expected}"
            ),
            Self::HeadDim {
                argument,
                head_dim,
                multiple_of,
                max,
            } => write!(
                f,
                "`{argument}` has head_dim = {head_dim}, expected a multiple of {multiple_of} up to {max}, and not 0"
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
                write!(f, "`threads` is {threads}, and the threads cannot be started: {reason}")
            }
            Self::TooManyThreads { threads, limit } => {
                write!(f, "`threads` is {threads}, at most {limit} are allowed on this machine")
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
                "out of memory on {device}: {requested} bytes asked for, {} free",
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

/// The reason why a score program is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgramError {
    /// A named feature was given a number outside of its range.
    Argument {
        /// Name of the feature.
        argument: &'static str,
        /// Number given.
        value: String,
        /// Range of numbers it takes.
        expected: &'static str,
    },

    /// The program divides an index by a number that is not positive.
    Divisor {
        /// Divisor given.
        value: i32,
    },

    /// The program has too many operations or numbers.
    TooLarge {
        /// Name of what it has too many of.
        what: &'static str,
        /// Largest number allowed.
        limit: usize,
    },

    /// A tensor cannot be a table of the feature: it has a wrong number of axes, or a size of 0.
    TableShape {
        /// Name of the feature.
        argument: &'static str,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Shapes that the feature takes.
        expected: &'static str,
    },

    /// A table is, or may be, read outside of its bounds: over the pairs of the call the index goes from `low` to
    /// `high`.
    Index {
        /// Name of the table.
        table: &'static str,
        /// Axis of the index.
        axis: usize,
        /// Size of the axis.
        size: usize,
        /// Smallest index.
        low: i32,
        /// Largest index.
        high: i32,
    },

    /// Lists of visible tiles reach past what there is.
    BlockList {
        /// `offsets` or `columns`.
        list: &'static str,
        /// The row of tiles.
        row: usize,
        /// The value that it has there.
        value: usize,
        /// The largest allowed.
        limit: usize,
    },

    /// The number of sinks is not the number of query heads.
    Sinks {
        /// Shape of the sinks.
        shape: Vec<usize>,
        /// Number of query heads.
        heads: usize,
    },

    /// Backward needs a derivative that an operation does not have.
    NotDifferentiable {
        /// Name of the operation.
        operation: &'static str,
    },
}

/// Writes a sentence with the argument's name, its value and the limit.
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
            Self::TableShape {
                argument,
                shape,
                expected,
            } => write!(f, "`{argument}` has shape {shape:?}, expected {expected}"),
            Self::Index {
                table,
                axis,
                size,
                low,
                high,
            } => write!(
                f,
                "`{table}` has {size} entries on axis {axis}, the index reaches {low} ..= {high}"
            ),
            Self::BlockList {
                list,
                row,
                value,
                limit,
            } => write!(
                f,
                "`{list}` has {value} for row {row}, expected rising numbers up to {limit}"
            ),
            Self::Sinks { shape, heads } => write!(
                f,
                "`sinks` has shape {shape:?}, expected one number for each of the {heads} heads of `q`"
            ),
            Self::NotDifferentiable { operation } => write!(
                f,
                "the score program has no derivative: it applies `{operation}` to a value that depends on the score or on a \
                 table whose gradient is asked for"
            ),
        }
    }
}

impl std::error::Error for ProgramError {}

/// Lists findings, one a line.
#[cfg(feature = "emulator")]
fn list(findings: &[ptx_emulator::Finding]) -> String {
    findings.iter().map(|finding| format!("\n{finding}")).collect()
}

/// The part of CUDA that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// The program was built without the feature `cuda`.
    NotBuilt,
    /// The driver's library is not installed.
    NoDriver,
    /// The driver is installed, but there is no GPU.
    NoGpu,
    /// The driver is older than the kernels need.
    DriverTooOld {
        /// CUDA version of the driver: major, minor.
        found: (u32, u32),
        /// Oldest CUDA version that is supported: major, minor.
        needed: (u32, u32),
    },
    /// The GPU is older than the kernels need.
    GpuTooOld {
        /// Name of the GPU.
        name: String,
        /// Compute capability of the GPU: major, minor.
        found: (u32, u32),
        /// Oldest compute capability that is supported: major, minor.
        needed: (u32, u32),
    },
    /// The driver is installed but does not start; the text is its error.
    Broken(String),
}

/// Writes the part that is missing.
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
