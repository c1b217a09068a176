//! The three element types and their conversions to and from f32, in which all arithmetic is done.

use std::fmt::{Debug, Display};

use flash_attention_kernels::entries::Dtype;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable, IntoBytes};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type that kernels are compiled for: `f32`, [`half::f16`] or [`half::bf16`].
///
/// Every bit pattern of such a type is a valid value, so tensors can be copied as bytes.
pub trait Element:
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
