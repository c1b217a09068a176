//! Errors that take the place of a report: text that is not PTX, an unknown instruction, an invalid launch, and
//! kernels that trap or do not end.

use thiserror::Error;

/// The reason why a module could not be read, launched or run to its end.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not well-formed PTX.
    #[error("{file}:{line}: {message}\n    {text}")]
    Syntax {
        /// Name given to [`Module::parse`](crate::Module::parse).
        file: String,
        /// Line, counted from 1.
        line: u32,
        /// Text that was expected, and the text found.
        message: String,
        /// Text of the line.
        text: String,
    },
    /// An instruction, or this combination of modifiers and operands, is not implemented.
    #[error("{file}:{line}: unknown instruction: {message}\n    {text}")]
    UnknownInstruction {
        /// Name given to [`Module::parse`](crate::Module::parse).
        file: String,
        /// Line, counted from 1.
        line: u32,
        /// The part that is not known.
        message: String,
        /// Text of the line.
        text: String,
    },
    /// The module has no kernel of this name.
    #[error("no entry `{name}` in {file}; it has: {available}")]
    NoEntry {
        /// Name asked for.
        name: String,
        /// Name of the module.
        file: String,
        /// Names of the module's entries.
        available: String,
    },
    /// A launch argument is outside of the limits of the device or the kernel.
    #[error("unusable launch of `{entry}`: {argument} is {value}, but {limit}")]
    Launch {
        /// Name of the kernel.
        entry: String,
        /// Name of the argument.
        argument: &'static str,
        /// Value of the argument.
        value: String,
        /// Allowed values.
        limit: String,
    },
    /// The kernel executed `trap`.
    #[error("{file}:{line}: trap executed by block {block}, warp {warp}, lanes {lanes:#010x}")]
    Trap {
        /// Name of the module.
        file: String,
        /// Line of the `trap`.
        line: u32,
        /// Block coordinates, written x,y,z.
        block: String,
        /// Warp within the block.
        warp: u32,
        /// Mask of the lanes that executed it.
        lanes: u32,
    },
    /// The launch executed more thread instructions than it was allowed to.
    #[error("stopped after {executed} thread instructions (limit {limit}); last at {file}:{line}, block {block}")]
    Runaway {
        /// Limit that was exceeded.
        limit: u64,
        /// Number of thread instructions executed when this was noticed.
        executed: u64,
        /// Name of the module.
        file: String,
        /// Line of an instruction that was being executed.
        line: u32,
        /// Block coordinates, written x,y,z.
        block: String,
    },
    /// The kernel did something after which it cannot continue.
    #[error("{file}:{line}: {message} (block {block}, warp {warp})")]
    Fault {
        /// Name of the module.
        file: String,
        /// Line, counted from 1.
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

/// Errors of allocating, freeing and copying device memory on the host.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryError {
    /// Less memory is free than was asked for.
    #[error("out of device memory: asked for {asked} bytes, {free} free")]
    OutOfMemory {
        /// Number of bytes asked for.
        asked: u64,
        /// Number of free bytes.
        free: u64,
    },
    /// A pointer that was not returned by `alloc`, or was freed already.
    #[error("{address:#x} is not the start of a live allocation")]
    NotAllocated {
        /// Value of the pointer.
        address: u64,
    },
    /// A copy reaches outside of its allocation.
    #[error("copy of {bytes} bytes at {address:#x} does not fit in one live allocation")]
    OutOfBounds {
        /// Address of the first byte of the copy.
        address: u64,
        /// Length of the copy, in bytes.
        bytes: u64,
    },
}
