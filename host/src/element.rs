//! Element types: those that tensors hold, and the three of attention, with their conversions to the f32 that all
//! arithmetic is done in.

mod float8;

use std::fmt::{Debug, Display};

use flash_attention_kernels::entries::Dtype;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use float8::F8E4M3;

/// The element types that tensors may have: those of attention, of quantised inputs, and the integers of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// A float of 8 bits, [`F8E4M3`].
    F8E4M3,
    /// A signed integer of 32 bits.
    I32,
    /// An unsigned integer of 32 bits.
    U32,
}

impl DataType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 => 1,
        }
    }

    /// Tells if its values are real numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4M3)
    }

    /// The name that Rust and PyTorch give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::I32 => "i32",
            Self::U32 => "u32",
        }
    }
}

impl From<Dtype> for DataType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl PartialEq<Dtype> for DataType {
    fn eq(&self, other: &Dtype) -> bool {
        *self == Self::from(*other)
    }
}

impl DataType {
    /// Returns this type as a dtype of attention, or `None` for an integer or a quantised number.
    pub(crate) const fn of_attention(self) -> Option<Dtype> {
        match self {
            Self::F32 => Some(Dtype::F32),
            Self::F16 => Some(Dtype::F16),
            Self::Bf16 => Some(Dtype::Bf16),
            Self::F8E4M3 | Self::I32 | Self::U32 => None,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for i32 {}
    impl Sealed for u32 {}
}

impl sealed::Sealed for F8E4M3 {}

/// A type that tensors hold: an [`Element`] of attention, [`F8E4M3`] for quantised inputs, or `i32` or `u32` for the tables of
/// score programs.
///
/// Every bit pattern of such a type is a valid value, so tensors can be copied as bytes.
pub trait Scalar:
    sealed::Sealed
    + FromBytes
    + IntoBytes
    + Immutable
    + Copy
    + Default
    + PartialEq
    + PartialOrd
    + Debug
    + Display
    + Send
    + Sync
    + 'static
{
    /// Name of the type at run time.
    const DATA_TYPE: DataType;
}

macro_rules! scalars {
    ($($type:ident $data_type:ident),*) => {$(
        impl Scalar for $type {
            const DATA_TYPE: DataType = DataType::$data_type;
        }
    )*};
}

scalars! { f32 F32, f16 F16, bf16 Bf16, F8E4M3 F8E4M3, i32 I32, u32 U32 }

/// An element type that kernels are compiled for: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: Scalar {
    /// Name of the type at run time.
    const DTYPE: Dtype;

    /// Rounds to the nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Rounds to the nearest value, ties to even, in one rounding.
    fn from_f64(value: f64) -> Self;
    /// Converts to f32, exactly.
    fn to_f32(self) -> f32;
    /// Converts to f64, exactly.
    fn to_f64(self) -> f64;

    /// Widens a slice of elements; both slices have the same length.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Rounds a slice of elements; both slices have the same length.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

macro_rules! half_element {
    ($type:ident, $dtype:ident) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;

            fn from_f32(value: f32) -> Self {
                $type::from_f32(value)
            }
            fn from_f64(value: f64) -> Self {
                $type::from_f64(value)
            }
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            fn to_f64(self) -> f64 {
                self.to_f64()
            }
            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }
            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
            }
        }
    };
}

half_element!(f16, F16);
half_element!(bf16, Bf16);

/// An [`Element`] of 16 bits, [`half::f16`] or [`half::bf16`]: the results of attention over quantised inputs.
pub trait Half: Element {}

impl Half for f16 {}
impl Half for bf16 {}
