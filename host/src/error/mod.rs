//! Errors: each names the argument, the value it had and the limit.
//!
//! Bad input is found before anything is allocated or launched. Later only the device can fail: its driver, its
//! memory, a launch, or the emulator's checks.

mod cuda;
mod message;
mod program;

pub use cuda::CudaUnavailable;
pub use program::ProgramError;

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
        /// Name of the tensor that it has to follow.
        other: &'static str,
        /// Device of that tensor.
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
        /// Length of the argument.
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

    /// The pages of a cache have a number of keys that no kernel takes.
    PageSize {
        /// Number of keys of a page.
        page_size: usize,
        /// Number that it must be a multiple of.
        multiple_of: usize,
    },

    /// A number that describes a rotary embedding is invalid.
    Rotary {
        /// Name of the argument.
        argument: &'static str,
        /// Value of the argument.
        value: f64,
        /// Values allowed.
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

    /// The scales of a quantised tensor are for another number of blocks of rows than it has.
    ScaleBlocks {
        /// Name of the scales.
        argument: &'static str,
        /// Number of scales of each head.
        blocks: usize,
        /// Number of blocks of a head; 1 is allowed too.
        expected: usize,
        /// Number of rows of a head.
        seqlen: usize,
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
        /// Name of the feature, with the part of the call that needs it.
        feature: String,
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

impl std::error::Error for Error {}

impl From<ProgramError> for Error {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}
