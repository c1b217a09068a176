//! Operations of one lane on registers.

use super::types::{FloatMode, FloatTy, IntTy, Pred, Slot, Space};
use crate::numeric::cvt::{CvtMode, Fp8, NarrowMode, PackType, Scalar};
use crate::numeric::float16::Half;
use crate::numeric::float32::Property;
use crate::numeric::integer::{Permute, Video, VideoMode};
use crate::numeric::video::ScalarVideo;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int1 {
    Abs,
    Neg,
    Not,
    Cnot,
    Popc,
    Clz,
    Brev,
    Bfind,
    BfindShift,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int2 {
    Add,
    AddSat,
    Sub,
    SubSat,
    MulLo,
    MulHi,
    MulWide,
    Mul24Lo,
    Mul24Hi,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    /// `bmsk.clamp` and `bmsk.wrap`.
    BmskClamp,
    BmskWrap,
    /// `szext.clamp` and `szext.wrap`.
    SzextClamp,
    SzextWrap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int3 {
    MadLo,
    MadHi,
    MadHiSat,
    MadWide,
    Mad24Lo,
    Mad24Hi,
    Sad,
    Bfe,
    ShfLeftClamp,
    ShfLeftWrap,
    ShfRightClamp,
    ShfRightWrap,
    Lop3(u8),
    Fns,
    Prmt(Permute),
    /// `dp4a`, with the signedness of a and b.
    Dp4a(bool, bool),
    /// `dp2a`, with the signedness of a and b, and `.hi`.
    Dp2a(bool, bool, bool),
    Video(Video, VideoMode),
    ScalarVideo(ScalarVideo),
}

/// Packed 16-bit integer operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed {
    Add,
    Min,
    Max,
}

/// Carry-chain operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carry {
    Add,
    Sub,
    MadLo,
    MadHi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BoolOp {
    And,
    Or,
    Xor,
}

/// Comparisons; the unordered forms are true if an operand is NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

/// Type of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CmpTy {
    Int(IntTy),
    Float(FloatTy, bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float1 {
    Abs,
    Neg,
    Rcp,
    RcpApprox,
    Sqrt,
    SqrtApprox,
    RsqrtApprox,
    SinApprox,
    CosApprox,
    Lg2Approx,
    Ex2Approx,
    TanhApprox,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Float2 {
    Add,
    Sub,
    Mul,
    Div,
    DivApprox,
    DivFull,
    Min(MinMax),
    Max(MinMax),
    Copysign,
}

/// Modifiers of floating-point min and max.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MinMax {
    pub nan: bool,
    pub xorsign_abs: bool,
}

/// Special registers that are not constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counter {
    Clock,
    ClockHi,
    Clock64,
    GlobalTimer,
    GlobalTimerLo,
    GlobalTimerHi,
}

#[derive(Debug, Clone)]
pub(crate) enum Alu {
    Mov {
        dst: Slot,
        src: Slot,
        bits: u32,
    },
    MovPred {
        dst: Slot,
        src: Pred,
    },
    /// `mov.b64 d, {a, b}`: equal parts, low first.
    Pack {
        dst: Slot,
        parts: Box<[Slot]>,
        part_bits: u32,
    },
    /// `mov.b64 {a, b}, d`
    Unpack {
        dsts: Box<[Slot]>,
        src: Slot,
        part_bits: u32,
    },
    Int1 {
        op: Int1,
        ty: IntTy,
        dst: Slot,
        a: Slot,
    },
    Int2 {
        op: Int2,
        ty: IntTy,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    Int3 {
        op: Int3,
        ty: IntTy,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// `max.relu.s32` and `min.relu.s32`.
    Relu32 {
        max: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    Bfi {
        ty: IntTy,
        dst: Slot,
        a: Slot,
        b: Slot,
        pos: Slot,
        len: Slot,
    },
    Packed16 {
        op: Packed,
        signed: bool,
        relu: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    Carry {
        op: Carry,
        ty: IntTy,
        reads_carry: bool,
        writes_carry: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    PredLogic {
        op: BoolOp,
        dst: Slot,
        a: Pred,
        b: Pred,
    },
    /// `lop3.BoolOp.b32 d|p, a, b, c, lut, q`
    Lop3Pred {
        lut: u8,
        or: bool,
        dst: Slot,
        pred: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        q: Pred,
    },
    Setp {
        cmp: Cmp,
        ty: CmpTy,
        p: Slot,
        q: Slot,
        a: Slot,
        b: Slot,
        combine: Option<(BoolOp, Pred)>,
    },
    Set {
        cmp: Cmp,
        ty: CmpTy,
        /// Value for true: all ones for integers, 1.0 for floats.
        one: u64,
        dst: Slot,
        a: Slot,
        b: Slot,
        combine: Option<(BoolOp, Pred)>,
    },
    Selp {
        dst: Slot,
        a: Slot,
        b: Slot,
        p: Pred,
    },
    Slct {
        /// True for an f32 selector, false for an s32.
        float: bool,
        ftz: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Float1 {
        op: Float1,
        ty: FloatTy,
        mode: FloatMode,
        dst: Slot,
        a: Slot,
    },
    Float2 {
        op: Float2,
        ty: FloatTy,
        mode: FloatMode,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    /// Three-input `min.f32` / `max.f32`.
    MinMax3 {
        max: bool,
        abs: bool,
        kind: MinMax,
        mode: FloatMode,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Fma {
        ty: FloatTy,
        mode: FloatMode,
        relu: bool,
        oob: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// `fma.f32.f16`: half inputs, f32 arithmetic.
    MixedFma {
        bf16: bool,
        mode: FloatMode,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    MixedAdd {
        bf16: bool,
        subtract: bool,
        mode: FloatMode,
        dst: Slot,
        a: Slot,
        c: Slot,
    },
    TestP {
        op: Property,
        ty: FloatTy,
        dst: Slot,
        a: Slot,
    },
    Cvt {
        to: Scalar,
        from: Scalar,
        mode: CvtMode,
        /// Width of the destination register in bits, to which a narrower signed result is extended.
        dst_bits: u32,
        dst: Slot,
        a: Slot,
    },
    CvtTf32 {
        mode: NarrowMode,
        dst: Slot,
        a: Slot,
    },
    /// `cvt.f16x2.f32 d, a, b`: `a` is the upper half.
    CvtHalf2 {
        half: Half,
        mode: NarrowMode,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    CvtFp8FromF32 {
        kind: Fp8,
        relu: bool,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    CvtFp8FromHalf2 {
        kind: Fp8,
        half: Half,
        relu: bool,
        dst: Slot,
        a: Slot,
    },
    CvtHalf2FromFp8 {
        kind: Fp8,
        relu: bool,
        dst: Slot,
        a: Slot,
    },
    /// `cvt.pack.sat`
    CvtPack {
        to: PackType,
        dst: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// A counter that changes while the kernel runs.
    Clock {
        dst: Slot,
        counter: Counter,
    },
    /// A generic address from an address in `space`, or back.
    Cvta {
        dst: Slot,
        src: Slot,
        space: Space,
        to_space: bool,
        bits: u32,
    },
    Isspacep {
        space: Space,
        dst: Slot,
        src: Slot,
    },
    /// `mapa`: address of the same shared location in block `rank` of the cluster.
    Mapa {
        dst: Slot,
        src: Slot,
        rank: Slot,
        generic: bool,
    },
    /// `getctarank`
    CtaRank {
        dst: Slot,
        src: Slot,
        generic: bool,
    },
}
