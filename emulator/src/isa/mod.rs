//! The instruction table: one variant an instruction form, grouped by what it touches.
//!
//! [`Op`] is what the executor matches on, exhaustively; an instruction that has no variant here cannot
//! be decoded, and one that has a variant cannot be forgotten by the executor.

mod alu;
mod memory;
mod special;
mod sync;
mod tensor;
pub(crate) mod types;
pub(crate) mod window;

pub(crate) use alu::*;
pub(crate) use memory::*;
pub(crate) use special::*;
pub(crate) use sync::*;
pub(crate) use tensor::*;

use types::{Pred, Slot};

/// A decoded instruction.
#[derive(Debug, Clone)]
pub(crate) struct Instr {
    pub op: Op,
    pub guard: Option<Pred>,
    pub line: u32,
    /// Index into the module's table of opcode names (for counters).
    pub name: u32,
    /// Ordinary floating-point operations of one lane.
    pub flops: u32,
    /// Value rows read and written, for checks on registers owned by asynchronous operations.
    pub reads: Box<[Slot]>,
    pub writes: Box<[Slot]>,
}

/// Operation of an instruction.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// Arithmetic of one lane: registers to registers.
    Alu(Alu),
    Control(Control),
    Memory(Memory),
    Warp(WarpOp),
    Barrier(BarrierOp),
    Mbarrier(MbarrierOp),
    Async(AsyncOp),
    Tensor(TensorOp),
    Wmma(WmmaOp),
    Wgmma(WgmmaOp),
    /// Has no effect that can be observed here: prefetch, hints.
    Nop,
}

/// A value passed by a call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Passed {
    /// Bytes of the caller's or callee's frame, at an offset.
    Bytes { offset: u32, size: u32 },
    /// A register.
    Register { slot: Slot },
}

#[derive(Debug, Clone)]
pub(crate) enum Control {
    Bra {
        target: u32,
    },
    Brx {
        index: Slot,
        targets: Box<[u32]>,
    },
    Call {
        target: CallTarget,
        args: Box<[Passed]>,
        returns: Box<[Passed]>,
    },
    Ret,
    Exit,
    Trap,
    /// Stack allocation and its release.
    Alloca {
        dst: Slot,
        size: Slot,
        align: u64,
    },
    StackSave {
        dst: Slot,
    },
    StackRestore {
        src: Slot,
    },
    Nanosleep,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum CallTarget {
    /// Index into the module's functions.
    Direct(u32),
    /// A register that holds a function's address.
    Indirect(Slot),
}
