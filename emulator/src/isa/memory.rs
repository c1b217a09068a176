//! Loads, stores, atomics, fences, and asynchronous copies.

use super::types::{Addr, FloatTy, IntTy, Order, Pred, Slot};
use crate::tensor::tensor_map::Field;

#[derive(Debug, Clone)]
pub(crate) enum Memory {
    Load {
        addr: Addr,
        order: Order,
        /// Bytes of one element, sign-extended to `dst_bits` if `signed`.
        bytes: u32,
        signed: bool,
        dst_bits: u32,
        dsts: Box<[Slot]>,
        /// True if a compare-and-swap on the same address follows this ordinary read: it is a first guess, which may
        /// race.
        guess: bool,
    },
    Store {
        addr: Addr,
        order: Order,
        bytes: u32,
        srcs: Box<[Slot]>,
    },
    Atomic {
        op: AtomicOp,
        ty: AtomicTy,
        order: Order,
        addr: Addr,
        /// Destinations, one for each element of a vector form; `None` for `red`.
        dsts: Option<Box<[Slot]>>,
        /// Operand b of each element.
        b: Box<[Slot]>,
        /// Operand c (cas), by 64-bit word.
        c: Box<[Slot]>,
    },
    /// `fence` and `membar`. `async_proxy`: it affects the async proxy; `device`: it affects other blocks.
    Fence { async_proxy: bool, device: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    And,
    Or,
    Xor,
    Cas,
    Exch,
    Add,
    Inc,
    Dec,
    Min,
    Max,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicTy {
    Int(IntTy),
    /// f32 flushes subnormals only if the instruction's type says so; `add.f32` on global memory keeps them.
    Float(FloatTy),
    B128,
}

/// Completion mechanism of a bulk operation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Completion {
    /// `complete_tx::bytes` on this barrier.
    Mbarrier(Addr),
    BulkGroup,
}

/// Element-wise operation of `cp.reduce.async.bulk`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reduction {
    pub op: AtomicOp,
    pub ty: AtomicTy,
}

#[derive(Debug, Clone)]
pub(crate) enum AsyncOp {
    /// `cp.async.ca` and `.cg`: `size` bytes, of which `src_size` are read and the rest is zero.
    Copy {
        dst: Addr,
        src: Addr,
        size: u32,
        src_size: Option<Slot>,
        ignore: Option<Pred>,
    },
    /// `st.async`: completes on the barrier.
    Store {
        addr: Addr,
        bytes: u32,
        srcs: Box<[Slot]>,
        barrier: Addr,
    },
    /// `red.async`
    Reduce {
        op: AtomicOp,
        ty: IntTy,
        addr: Addr,
        src: Slot,
        barrier: Addr,
    },
    Commit,
    /// `tensormap.replace`
    ReplaceField {
        addr: Addr,
        field: Field,
        value: Slot,
    },
    /// `tensormap.cp_fenceproxy`: a warp copies a map from shared to global memory.
    PublishMap {
        dst: Addr,
        src: Addr,
    },
    /// Waits until at most `left` groups are pending.
    WaitGroup {
        left: u32,
    },
    WaitAll,
    /// `cp.async.bulk` and `cp.reduce.async.bulk`.
    Bulk {
        dst: Addr,
        src: Addr,
        size: Slot,
        completion: Completion,
        multicast: Option<Slot>,
        reduction: Option<Reduction>,
    },
    /// `cp.async.bulk.tensor`, global to shared.
    TensorLoad {
        dst: Addr,
        map: Addr,
        coordinates: Box<[Slot]>,
        barrier: Addr,
        multicast: Option<Slot>,
    },
    /// `cp.async.bulk.tensor` and `cp.reduce.async.bulk.tensor`, shared to global.
    TensorStore {
        map: Addr,
        coordinates: Box<[Slot]>,
        src: Addr,
        reduction: Option<AtomicOp>,
    },
    BulkCommit,
    BulkWait {
        left: u32,
        /// True if the wait is for the reads alone.
        read: bool,
    },
}

impl AsyncOp {
    /// Returns true if the operation combines with the bytes at its destination.
    pub fn reduces(&self) -> bool {
        match self {
            AsyncOp::Bulk { reduction, .. } => reduction.is_some(),
            AsyncOp::TensorStore { reduction, .. } => reduction.is_some(),
            _ => false,
        }
    }

    /// Returns true if the operation sums floats in global memory, where the order of blocks changes the last bits.
    pub fn reduces_floats(&self) -> bool {
        match self {
            AsyncOp::Bulk {
                reduction: Some(reduction),
                ..
            } => !matches!(reduction.ty, AtomicTy::Int(_)),
            AsyncOp::TensorStore { reduction, .. } => reduction.is_some(),
            _ => false,
        }
    }
}
