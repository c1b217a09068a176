//! Operands of decoded instructions: slots, types, state spaces.

use crate::numeric::Rounding;

/// Row of a frame's value registers. Constants and special registers are rows too, filled when the frame is made, so
/// every operand is a row.
pub(crate) type Slot = u32;

/// Row written by destinations that the program discards (`_`).
pub(crate) const SINK: Slot = 0;
/// Predicate row that is always true.
pub(crate) const PRED_TRUE: Slot = 0;
/// Predicate row for discarded predicate destinations.
pub(crate) const PRED_SINK: Slot = 1;

/// A predicate source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pred {
    pub slot: Slot,
    pub negated: bool,
}

/// Integer types of arithmetic.
pub(crate) use crate::numeric::integer::IntType as IntTy;

/// Floating-point types of arithmetic; packed forms hold two elements, low half first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FloatTy {
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

/// Any type word that can follow an opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    U16x2,
    S16x2,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    E4m3,
    E5m2,
    E4m3x2,
    E5m2x2,
    F32,
    F64,
}

impl Ty {
    pub fn parse(word: &str) -> Option<Ty> {
        Some(match word {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "b128" => Ty::B128,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "u16x2" => Ty::U16x2,
            "s16x2" => Ty::S16x2,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "tf32" => Ty::Tf32,
            "e4m3" => Ty::E4m3,
            "e5m2" => Ty::E5m2,
            "e4m3x2" => Ty::E4m3x2,
            "e5m2x2" => Ty::E5m2x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    pub fn bits(self) -> u32 {
        match self {
            Ty::Pred => 1,
            Ty::B8 | Ty::U8 | Ty::S8 | Ty::E4m3 | Ty::E5m2 => 8,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 | Ty::E4m3x2 | Ty::E5m2x2 => 16,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::U16x2 | Ty::S16x2 | Ty::F16x2 | Ty::Bf16x2 | Ty::Tf32 | Ty::F32 => 32,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 64,
            Ty::B128 => 128,
        }
    }

    pub fn bytes(self) -> u32 {
        self.bits().div_ceil(8)
    }

    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    /// Returns the type for integer arithmetic; untyped bits count as unsigned.
    pub fn int(self) -> Option<IntTy> {
        Some(match self {
            Ty::U8 | Ty::B8 => IntTy::U8,
            Ty::S8 => IntTy::S8,
            Ty::U16 | Ty::B16 => IntTy::U16,
            Ty::S16 => IntTy::S16,
            Ty::U32 | Ty::B32 => IntTy::U32,
            Ty::S32 => IntTy::S32,
            Ty::U64 | Ty::B64 => IntTy::U64,
            Ty::S64 => IntTy::S64,
            _ => return None,
        })
    }

    pub fn float(self) -> Option<FloatTy> {
        Some(match self {
            Ty::F16 => FloatTy::F16,
            Ty::F16x2 => FloatTy::F16x2,
            Ty::Bf16 => FloatTy::Bf16,
            Ty::Bf16x2 => FloatTy::Bf16x2,
            Ty::F32 => FloatTy::F32,
            Ty::F64 => FloatTy::F64,
            _ => return None,
        })
    }
}

/// State space of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    /// Shared memory of the executing block.
    Shared,
    /// Shared memory of any block of the cluster.
    SharedCluster,
    Local,
    /// Parameters of the kernel.
    Param,
    Const,
}

/// Ordering semantics of an access between threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// An ordinary access, which must not race.
    Weak,
    /// Volatile, relaxed, acquire: a strong operation, which may race. It passes on the writes that an earlier fence
    /// published.
    Relaxed,
    /// Release, acq_rel: a strong operation that passes on all earlier writes.
    Release,
}

impl Order {
    /// Returns true for a strong operation.
    pub fn is_strong(self) -> bool {
        self != Order::Weak
    }
}

/// Address of an access: `[base + offset]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addr {
    pub base: Slot,
    pub offset: i64,
    pub space: Space,
}

/// Rounding, flushing and clamping modifiers of a floating-point instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FloatMode {
    pub rounding: Rounding,
    pub ftz: bool,
    pub sat: bool,
}
