//! The instruction table: one variant for each instruction form, grouped by its operands.
//!
//! The executor matches on [`Op`] exhaustively: an instruction without a variant cannot be decoded, and one with a
//! variant cannot be forgotten by the executor.

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
    /// Index into the module's table of opcode names, for counters.
    pub name: u32,
    /// Floating-point operations of one lane, without tensor cores.
    pub flops: u32,
    /// Value rows that are read and written, for checks on registers that asynchronous operations own.
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
    /// An instruction without an observable effect here: prefetch, hints.
    Nop,
}

/// Argument or result of a call.
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
    /// Stack allocation (`alloca`) and its release.
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
