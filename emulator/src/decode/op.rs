//! The instruction table: one variant an instruction form, grouped by what it touches.
//!
//! [`Op`] is what the executor matches on, exhaustively; an instruction that has no variant here cannot
//! be decoded, and one that has a variant cannot be forgotten by the executor.

use super::types::*;
use crate::numeric::cvt::{CvtMode, Fp8, NarrowMode, PackType, Scalar};
use crate::numeric::float16::Half;
use crate::numeric::float32::Property;
use crate::numeric::integer::{Permute, Video, VideoMode};
use crate::tensor::tensor_map::Field;

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

/// What an instruction does.
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
    /// `bmsk.clamp` / `bmsk.wrap`
    BmskClamp,
    BmskWrap,
    /// `szext.clamp` / `szext.wrap`
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
    /// `dp4a` with signedness of a and b.
    Dp4a(bool, bool),
    /// `dp2a` with signedness of a and b, and `.hi`.
    Dp2a(bool, bool, bool),
    Video(Video, VideoMode),
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

/// Comparison; the unordered forms are true when an operand is NaN.
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

/// The special registers that are not constant.
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
    /// `max.relu.s32` / `min.relu.s32`
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
        /// The selector is an f32 (else an s32).
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
        /// Bits of the destination register, to which a narrower signed result is extended.
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
        /// One per element of a vector form; `None` for `red`.
        dsts: Option<Box<[Slot]>>,
        /// Operand b of each element.
        b: Box<[Slot]>,
        /// Operand c (cas), by 64-bit word.
        c: Box<[Slot]>,
    },
    /// `fence`, `membar`; with effect on the async proxy if `async_proxy`, on other blocks if `device`.
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
    /// f32 flushes subnormals only when `red`/`atom` says so (global add.f32 keeps them).
    Float(FloatTy),
    B128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReduxOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone)]
pub(crate) enum WarpOp {
    Shfl {
        mode: ShflMode,
        dst: Slot,
        p: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        members: Slot,
    },
    Vote {
        mode: VoteMode,
        /// Value row for ballot, else predicate row.
        dst: Slot,
        src: Pred,
        members: Slot,
    },
    MatchAny {
        bits: u32,
        dst: Slot,
        a: Slot,
        members: Slot,
    },
    MatchAll {
        bits: u32,
        dst: Slot,
        p: Slot,
        a: Slot,
        members: Slot,
    },
    Redux {
        op: ReduxOp,
        signed: bool,
        dst: Slot,
        a: Slot,
        members: Slot,
    },
    Activemask {
        dst: Slot,
    },
    Elect {
        dst: Slot,
        p: Slot,
        members: Slot,
    },
    Sync {
        members: Slot,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BarrierRed {
    And,
    Or,
    Popc,
}

#[derive(Debug, Clone)]
pub(crate) enum BarrierOp {
    Sync {
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
    },
    Arrive {
        id: Slot,
        count: Slot,
        aligned: bool,
    },
    Red {
        op: BarrierRed,
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
        /// Predicate row, or value row for popc.
        dst: Slot,
        src: Pred,
    },
    ClusterArrive {
        aligned: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    /// `setmaxnreg.inc` / `.dec`
    SetMaxReg {
        increase: bool,
        count: u32,
    },
}

/// Which phase a wait asks about.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Phase {
    /// A state token returned by an arrive.
    Token(Slot),
    Parity(Slot),
}

#[derive(Debug, Clone)]
pub(crate) enum MbarrierOp {
    Init {
        addr: Addr,
        count: Slot,
    },
    Inval {
        addr: Addr,
    },
    Arrive {
        addr: Addr,
        /// Arrivals: a register, or one.
        count: Option<Slot>,
        /// Bytes expected, for `.expect_tx`.
        expect: Option<Slot>,
        drop: bool,
        state: Slot,
    },
    ExpectTx {
        addr: Addr,
        bytes: Slot,
    },
    CompleteTx {
        addr: Addr,
        bytes: Slot,
    },
    Wait {
        addr: Addr,
        phase: Phase,
        done: Slot,
    },
    PendingCount {
        dst: Slot,
        state: Slot,
    },
    /// `cp.async.mbarrier.arrive`
    CpAsyncArrive {
        addr: Addr,
        no_increment: bool,
    },
}

/// How a bulk operation reports its end.
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
    /// `cp.async.ca/cg`: `size` bytes, of which `src_size` are read and the rest zero.
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
    /// With or without `.read`: waiting for the reads alone lands the whole operation.
    BulkWait {
        left: u32,
    },
}

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
    /// `wmma.load` or `wmma.store`.
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

/// Where A comes from.
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

/// One `wgmma.mma_async`.
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
    /// Integer sums are clamped instead of wrapped.
    pub satfinite: bool,
}

impl AsyncOp {
    /// Whether it combines with what is at its destination.
    pub fn reduces(&self) -> bool {
        match self {
            AsyncOp::Bulk { reduction, .. } => reduction.is_some(),
            AsyncOp::TensorStore { reduction, .. } => reduction.is_some(),
            _ => false,
        }
    }

    /// Whether it sums floats in global memory, where the order of blocks shows in the last bit.
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
