//! Errors that come before, or instead of, a report: text that is not PTX, an instruction nobody
//! knows, a launch that no device would accept, and kernels that trap or never end.

use thiserror::Error;

/// Why a module could not be read, launched or run to its end.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not well-formed PTX.
    #[error("{file}:{line}: {message}\n    {text}")]
    Syntax {
        /// Name given to [`Module::parse`](crate::Module::parse).
        file: String,
        /// One-based line.
        line: u32,
        /// Expected text, and the text that stood there.
        message: String,
        /// The source line.
        text: String,
    },
    /// An instruction, or this combination of modifiers and operands, is not implemented.
    #[error("{file}:{line}: unknown instruction: {message}\n    {text}")]
    UnknownInstruction {
        /// Name given to [`Module::parse`](crate::Module::parse).
        file: String,
        /// One-based line.
        line: u32,
        /// Which part is not known.
        message: String,
        /// The source line.
        text: String,
    },
    /// The module has no kernel of this name.
    #[error("no entry `{name}` in {file}; it has: {available}")]
    NoEntry {
        /// The name asked for.
        name: String,
        /// The module.
        file: String,
        /// The entries it does have.
        available: String,
    },
    /// A launch argument lies outside what the device or the kernel allows.
    #[error("unusable launch of `{entry}`: {argument} is {value}, but {limit}")]
    Launch {
        /// The kernel.
        entry: String,
        /// Which argument.
        argument: &'static str,
        /// Value of the argument.
        value: String,
        /// Allowed values.
        limit: String,
    },
    /// The kernel executed `trap`.
    #[error("{file}:{line}: trap executed by block {block}, warp {warp}, lanes {lanes:#010x}")]
    Trap {
        /// The module.
        file: String,
        /// Line of the `trap`.
        line: u32,
        /// Block coordinates, written x,y,z.
        block: String,
        /// Warp within the block.
        warp: u32,
        /// Mask of lanes that executed it.
        lanes: u32,
    },
    /// The launch executed more thread instructions than it was allowed to.
    #[error("stopped after {executed} thread instructions (limit {limit}); last at {file}:{line}, block {block}")]
    Runaway {
        /// The limit that was passed.
        limit: u64,
        /// Thread instructions executed when it was noticed.
        executed: u64,
        /// The module.
        file: String,
        /// A line that was being executed.
        line: u32,
        /// Block coordinates, written x,y,z.
        block: String,
    },
    /// The kernel did something that leaves no sensible way to go on.
    #[error("{file}:{line}: {message} (block {block}, warp {warp})")]
    Fault {
        /// The module.
        file: String,
        /// One-based line.
        line: u32,
        /// Description of the fault.
        message: String,
        /// Block coordinates, written x,y,z.
        block: String,
        /// Warp within the block.
        warp: u32,
    },
    /// Device memory could not be allocated, freed or copied.
    #[error("{0}")]
    Memory(#[from] MemoryError),
}

/// Failures of the host's side of device memory.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryError {
    /// More than the device has left.
    #[error("out of device memory: asked for {asked} bytes, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes left.
        free: u64,
    },
    /// A pointer that was not returned by `alloc`, or was freed already.
    #[error("{address:#x} is not the start of a live allocation")]
    NotAllocated {
        /// The pointer.
        address: u64,
    },
    /// A copy that leaves its allocation.
    #[error("copy of {bytes} bytes at {address:#x} does not fit in one live allocation")]
    OutOfBounds {
        /// First byte of the copy.
        address: u64,
        /// Length of the range in bytes.
        bytes: u64,
    },
}
