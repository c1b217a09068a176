//! The enumerations of `cuTensorMapEncodeTiled`, numbered as the driver numbers them, and the rules it enforces as
//! error variants.

use super::swizzle::Swizzle;
use crate::numeric::Rounding;
use crate::numeric::float16::OOB_NAN;
use crate::numeric::format::TF32;

/// Element types (`CUtensorMapDataType`, numbered alike).
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

    /// Bytes of an element.
    pub const fn bytes(self) -> u32 {
        use ElementType::*;
        match self {
            U8 => 1,
            U16 | F16 | Bf16 => 2,
            U32 | S32 | F32 | F32Ftz | Tf32 | Tf32Ftz => 4,
            U64 | S64 | F64 => 8,
        }
    }

    /// True if the type is a floating-point one.
    pub const fn is_float(self) -> bool {
        use ElementType::*;
        matches!(self, F16 | F32 | F64 | Bf16 | F32Ftz | Tf32 | Tf32Ftz)
    }

    /// The type numbered as `CUtensorMapDataType` does.
    ///
    /// # Errors
    ///
    /// [`TensorMapError::Unsupported`] for the packed 4- and 6-bit types of later architectures and for unknown numbers.
    pub fn from_number(number: u32) -> Result<ElementType, TensorMapError> {
        let found = Self::ALL.get(number as usize).copied();
        found.ok_or(TensorMapError::Unsupported {
            argument: "tensorDataType",
            value: number.into(),
        })
    }

    /// The type numbered as the `elemtype` field of `tensormap.replace` does, which is not the driver's order.
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

    /// Value that a load writes for an in-bounds 32-bit element: `.tf32` maps round to tf32 (to nearest, ties away: the manual
    /// does not say), with NaN 0x7fffe000; every other type copies bits.
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

/// A field of a tensor map that `tensormap.replace` can change; some have an entry a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the instruction's")]
pub enum Field {
    GlobalAddress,
    /// The number of dimensions less one.
    Rank,
    BoxDim(u8),
    GlobalDim(u8),
    /// Entry 0 is the stride of dimension 1.
    GlobalStride(u8),
    ElementStride(u8),
    ElementType,
    Interleave,
    Swizzle,
    Fill,
}

/// Interleaved layouts (`CUtensorMapInterleave`, numbered alike).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Interleave {
    /// None.
    #[default]
    None = 0,
    /// NC/8HWC8: slices of 16 bytes. Can be encoded; copies through it are not emulated.
    B16,
    /// NC/16HWC16: slices of 32 bytes. Can be encoded; copies through it are not emulated.
    B32,
}

/// L2 promotion (`CUtensorMapL2promotion`, numbered alike): a hint that changes nothing here.
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

/// Bytes that a load writes for elements outside the tensor (`CUtensorMapFloatOOBfill`, numbered alike).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Fill {
    /// Zeros.
    #[default]
    Zero = 0,
    /// The out-of-bounds NaN, [`OOB_NAN`] in every 16 bits, which `fma.oob` turns into zero.
    Nan,
}

impl Fill {
    /// The byte written at an offset from the start of a 16-byte aligned fill.
    pub const fn byte(self, offset: usize) -> u8 {
        match self {
            Fill::Zero => 0,
            Fill::Nan => OOB_NAN.to_le_bytes()[offset % 2],
        }
    }
}

/// The number `CUtensorMapSwizzle` gives a mode, and back.
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
    /// A count of dimensions outside the allowed range.
    #[error("tensorRank is {rank}, must be {min} to 5")]
    Rank {
        /// The rank given.
        rank: usize,
        /// 1, or 3 if interleaved.
        min: usize,
    },
    /// An array whose length is not that of the rank (or, for strides, one less).
    #[error("{argument} has {length} entries, must have {expected}")]
    Length {
        /// The argument's name.
        argument: &'static str,
        /// Length found.
        length: usize,
        /// The length it must have.
        expected: usize,
    },
    /// A value outside its range.
    #[error("{argument}[{index}] is {value}, must be {min} to {max}")]
    Range {
        /// The argument's name.
        argument: &'static str,
        /// The entry.
        index: usize,
        /// Value found.
        value: u64,
        /// The least allowed.
        min: u64,
        /// The greatest allowed.
        max: u64,
    },
    /// A value that is not a multiple of what it must be.
    #[error("{argument}[{index}] is {value}, must be a multiple of {multiple}")]
    Multiple {
        /// The argument's name.
        argument: &'static str,
        /// The entry; 0 for the address.
        index: usize,
        /// Value found.
        value: u64,
        /// Divisor that it must have.
        multiple: u64,
    },
    /// An inner box row that is not a multiple of 16 bytes.
    #[error("boxDim[0] is {bytes} bytes, must be a multiple of 16")]
    InnerBytes {
        /// Bytes of a row of the box.
        bytes: u64,
    },
    /// An inner box row longer than the swizzle's span.
    #[error("boxDim[0] is {bytes} bytes, must be at most the swizzle's {span}")]
    InnerExceedsSwizzle {
        /// Bytes of a row of the box.
        bytes: u64,
        /// The swizzle's span.
        span: u64,
    },
    /// 32-byte interleave with another swizzle than 32 bytes.
    #[error("interleave of 32 bytes needs the 32-byte swizzle, not {swizzle:?}")]
    InterleaveSwizzle {
        /// The swizzle given.
        swizzle: Swizzle,
    },
    /// A NaN fill of a type that has none.
    #[error("oobFill NaN needs a floating-point type, not {element:?}")]
    NanFill {
        /// The type given.
        element: ElementType,
    },
    /// A value of a later architecture, or of none.
    #[error("{argument} {value} is not supported for sm_90")]
    Unsupported {
        /// The argument's name.
        argument: &'static str,
        /// Value found.
        value: u64,
    },
    /// 128 bytes that this emulator did not write.
    #[error("these 128 bytes are not a tensor map of this emulator")]
    Foreign,
}
