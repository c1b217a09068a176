//! Messages of [`Error`].

use std::fmt;

use super::Error;

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
                other,
                expected,
            } => write!(
                f,
                "`{argument}` is on {got}, expected {expected} as `{other}` (two devices of one name are two memories)"
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
            Self::PageSize { page_size, multiple_of } => write!(
                f,
                "`page_size` is {page_size}, expected a multiple of {multiple_of}, and not 0"
            ),
            Self::Rotary {
                argument,
                value,
                expected,
            } => write!(f, "`{argument}` is {value}, expected {expected}"),
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
            Self::ScaleBlocks {
                argument,
                blocks,
                expected,
                seqlen,
            } => write!(
                f,
                "`{argument}` has {blocks} scales a head, expected 1, or {expected} for seqlen = {seqlen}"
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

/// Lists findings, one a line.
#[cfg(feature = "emulator")]
fn list(findings: &[ptx_emulator::Finding]) -> String {
    findings.iter().map(|finding| format!("\n{finding}")).collect()
}
