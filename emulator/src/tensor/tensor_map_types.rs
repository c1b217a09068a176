//! Enumerations of `cuTensorMapEncodeTiled`, with the driver's numbers, and its rules as error variants.

use super::swizzle::Swizzle;
use crate::numeric::Rounding;
use crate::numeric::float16::OOB_NAN;
use crate::numeric::format::TF32;

/// Element types, with the numbers of `CUtensorMapDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the driver's")]
pub enum ElementType {
    U8 = 0,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    Bf16,
    F32Ftz,
    Tf32,
    Tf32Ftz,
}

impl ElementType {
    const ALL: [ElementType; 13] = {
        use ElementType::*;
        [U8, U16, U32, S32, U64, S64, F16, F32, F64, Bf16, F32Ftz, Tf32, Tf32Ftz]
    };

    /// Returns the bytes of an element.
    pub const fn bytes(self) -> u32 {
        use ElementType::*;
        match self {
            U8 => 1,
            U16 | F16 | Bf16 => 2,
            U32 | S32 | F32 | F32Ftz | Tf32 | Tf32Ftz => 4,
            U64 | S64 | F64 => 8,
        }
    }

    /// Returns true for a floating-point type.
    pub const fn is_float(self) -> bool {
        use ElementType::*;
        matches!(self, F16 | F32 | F64 | Bf16 | F32Ftz | Tf32 | Tf32Ftz)
    }

    /// Returns the type with this number in `CUtensorMapDataType`.
    ///
    /// # Errors
    ///
    /// [`TensorMapError::Unsupported`] for the packed 4- and 6-bit types of later architectures and for unknown
    /// numbers.
    pub fn from_number(number: u32) -> Result<ElementType, TensorMapError> {
        let found = Self::ALL.get(number as usize).copied();
        found.ok_or(TensorMapError::Unsupported {
            argument: "tensorDataType",
            value: number.into(),
        })
    }

    /// Returns the type with this number in the `elemtype` field of `tensormap.replace`, which has another order than
    /// the driver.
    ///
    /// # Errors
    ///
    /// The variant of this number, if there is one; see [`from_number`](Self::from_number).
    pub fn from_ptx(number: u64) -> Result<ElementType, TensorMapError> {
        use ElementType::*;
        let all = [U8, U16, U32, S32, U64, S64, F16, F32, F32Ftz, F64, Bf16, Tf32, Tf32Ftz];
        let found = usize::try_from(number).ok().and_then(|n| all.get(n).copied());
        found.ok_or(TensorMapError::Unsupported {
            argument: "elemtype",
            value: number,
        })
    }

    /// Converts an in-bounds 32-bit element as a load does: `.tf32` maps round to tf32 (to nearest, ties away; the
    /// manual does not say), with NaN 0x7fffe000; every other type copies bits.
    pub const fn loaded(self, bits: u32) -> u32 {
        match self {
            ElementType::Tf32 | ElementType::Tf32Ftz => {
                let x = f32::from_bits(bits);
                if x.is_nan() {
                    return 0x7fff_e000;
                }
                TF32.encode(x as f64, Rounding::NearestAway, false) << 13
            }
            _ => bits,
        }
    }
}

/// Fields of a tensor map that `tensormap.replace` can change; some have one entry per dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the instruction's")]
pub enum Field {
    GlobalAddress,
    /// Number of dimensions minus one.
    Rank,
    BoxDim(u8),
    GlobalDim(u8),
    /// Strides; entry 0 is the stride of dimension 1.
    GlobalStride(u8),
    ElementStride(u8),
    ElementType,
    Interleave,
    Swizzle,
    Fill,
}

/// Interleaved layouts, with the numbers of `CUtensorMapInterleave`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Interleave {
    /// No interleave.
    #[default]
    None = 0,
    /// NC/8HWC8: slices of 16 bytes. It can be encoded, but copies through it are not emulated.
    B16,
    /// NC/16HWC16: slices of 32 bytes. It can be encoded, but copies through it are not emulated.
    B32,
}

/// L2 promotion, with the numbers of `CUtensorMapL2promotion`. It is a hint without effect here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the driver's")]
pub enum L2Promotion {
    #[default]
    None = 0,
    B64,
    B128,
    B256,
}

/// Bytes that a load writes for elements outside of the tensor, with the numbers of `CUtensorMapFloatOOBfill`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Fill {
    /// Zeros.
    #[default]
    Zero = 0,
    /// Out-of-bounds NaN: [`OOB_NAN`] in every 16 bits, which `fma.oob` turns into zero.
    Nan,
}

impl Fill {
    /// Returns the byte at an offset from the start of a 16-byte aligned fill.
    pub const fn byte(self, offset: usize) -> u8 {
        match self {
            Fill::Zero => 0,
            Fill::Nan => OOB_NAN.to_le_bytes()[offset % 2],
        }
    }
}

/// Returns the mode with this number in `CUtensorMapSwizzle`.
///
/// # Errors
///
/// [`TensorMapError::Unsupported`] for the atom-size variants of later architectures and for unknown numbers.
pub fn swizzle_from_number(number: u32) -> Result<Swizzle, TensorMapError> {
    match number {
        0 => Ok(Swizzle::None),
        1 => Ok(Swizzle::B32),
        2 => Ok(Swizzle::B64),
        3 => Ok(Swizzle::B128),
        _ => Err(TensorMapError::Unsupported {
            argument: "swizzle",
            value: number.into(),
        }),
    }
}

/// A rule of `cuTensorMapEncodeTiled` that an argument breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorMapError {
    /// The number of dimensions is out of range.
    #[error("tensorRank is {rank}, must be {min} to 5")]
    Rank {
        /// Rank given.
        rank: usize,
        /// Least rank: 1, or 3 if interleaved.
        min: usize,
    },
    /// An array has another length than the rank (for strides, one less than the rank).
    #[error("{argument} has {length} entries, must have {expected}")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// Length found.
        length: usize,
        /// Length that it must have.
        expected: usize,
    },
    /// A value is out of range.
    #[error("{argument}[{index}] is {value}, must be {min} to {max}")]
    Range {
        /// Name of the argument.
        argument: &'static str,
        /// Index of the entry.
        index: usize,
        /// Value found.
        value: u64,
        /// Least value allowed.
        min: u64,
        /// Greatest value allowed.
        max: u64,
    },
    /// A value is not a multiple of the number that it must be a multiple of.
    #[error("{argument}[{index}] is {value}, must be a multiple of {multiple}")]
    Multiple {
        /// Name of the argument.
        argument: &'static str,
        /// Index of the entry; 0 for the address.
        index: usize,
        /// Value found.
        value: u64,
        /// Number that it must be a multiple of.
        multiple: u64,
    },
    /// A row of the box is not a multiple of 16 bytes.
    #[error("boxDim[0] is {bytes} bytes, must be a multiple of 16")]
    InnerBytes {
        /// Bytes of a row of the box.
        bytes: u64,
    },
    /// A row of the box is longer than the span of the swizzle.
    #[error("boxDim[0] is {bytes} bytes, must be at most the swizzle's {span}")]
    InnerExceedsSwizzle {
        /// Bytes of a row of the box.
        bytes: u64,
        /// Span of the swizzle, in bytes.
        span: u64,
    },
    /// 32-byte interleave is combined with another swizzle than 32 bytes.
    #[error("interleave of 32 bytes needs the 32-byte swizzle, not {swizzle:?}")]
    InterleaveSwizzle {
        /// Swizzle given.
        swizzle: Swizzle,
    },
    /// A NaN fill is combined with a type that has no NaN.
    #[error("oobFill NaN needs a floating-point type, not {element:?}")]
    NanFill {
        /// Element type given.
        element: ElementType,
    },
    /// A value belongs to a later architecture, or to none.
    #[error("{argument} {value} is not supported for sm_90")]
    Unsupported {
        /// Name of the argument.
        argument: &'static str,
        /// Value found.
        value: u64,
    },
    /// The 128 bytes were not written by this emulator.
    #[error("these 128 bytes are not a tensor map of this emulator")]
    Foreign,
}
