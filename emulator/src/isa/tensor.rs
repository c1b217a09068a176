//! Operations of tensor cores.

use super::types::{Addr, Pred, Slot, Ty};

#[derive(Debug, Clone)]
pub(crate) enum TensorOp {
    Ldmatrix {
        addr: Addr,
        trans: bool,
        dsts: Box<[Slot]>,
    },
    Stmatrix {
        addr: Addr,
        trans: bool,
        srcs: Box<[Slot]>,
    },
    /// `movmatrix.sync.aligned.m8n8.trans.b16`
    Movmatrix {
        dst: Slot,
        src: Slot,
    },
    Mma {
        mma: crate::tensor::mma::Mma,
        d: Box<[Slot]>,
        a: Box<[Slot]>,
        b: Box<[Slot]>,
        c: Box<[Slot]>,
    },
}

#[derive(Debug, Clone)]
pub(crate) enum WmmaOp {
    /// `wmma.load` and `wmma.store`.
    Move {
        wmma: crate::tensor::wmma::Wmma,
        operand: crate::tensor::wmma::Operand,
        column_major: bool,
        addr: Addr,
        stride: Option<Slot>,
        rows: Box<[Slot]>,
        store: bool,
    },
    Mma {
        wmma: crate::tensor::wmma::Wmma,
        d: Box<[Slot]>,
        a: Box<[Slot]>,
        b: Box<[Slot]>,
        c: Box<[Slot]>,
    },
}

/// Source of A.
#[derive(Debug, Clone)]
pub(crate) enum WgmmaA {
    Descriptor(Slot),
    Registers(Box<[Slot]>),
}

#[derive(Debug, Clone)]
pub(crate) enum WgmmaOp {
    Fence,
    Commit,
    Wait { left: u32 },
    Mma(Box<Wgmma>),
}

/// A `wgmma.mma_async`.
#[derive(Debug, Clone)]
pub(crate) struct Wgmma {
    pub n: u32,
    pub k: u32,
    /// Accumulator type: F32, F16 or S32.
    pub d_ty: Ty,
    pub a_ty: Ty,
    pub b_ty: Ty,
    pub d: Box<[Slot]>,
    pub a: WgmmaA,
    pub b: Slot,
    pub scale_d: Pred,
    pub negate_a: bool,
    pub negate_b: bool,
    pub trans_a: bool,
    pub trans_b: bool,
    /// True to clamp integer sums instead of wrapping them.
    pub satfinite: bool,
}
