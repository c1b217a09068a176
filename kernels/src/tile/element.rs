//! Element types, as 16-byte chunks of four words.

use crate::ptx::{math::fma, matrix::Half};
pub use crate::shape::{Bf16, F16};

/// An element type of q, k, v and out.
pub trait Element: Copy {
    /// Bytes of one element.
    const BYTES: u32;
    /// Each element of a chunk times `factor`.
    fn scale(words: [u32; 4], factor: f32) -> [u32; 4];
    /// The sum of the products of two chunks' elements, in f32.
    fn dot(a: [u32; 4], b: [u32; 4]) -> f32;
}

/// IEEE binary32.
#[derive(Clone, Copy)]
pub struct F32;

impl Element for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    fn scale(words: [u32; 4], factor: f32) -> [u32; 4] {
        words.map(|x| (f32::from_bits(x) * factor).to_bits())
    }

    #[inline(always)]
    fn dot(a: [u32; 4], b: [u32; 4]) -> f32 {
        let mut sum = 0.0;
        for i in 0..4 {
            sum = fma(f32::from_bits(a[i]), f32::from_bits(b[i]), sum);
        }
        sum
    }
}

macro_rules! half_element {
    ($type:ident) => {
        impl Element for $type {
            const BYTES: u32 = 2;

            #[inline(always)]
            fn scale(words: [u32; 4], factor: f32) -> [u32; 4] {
                let factor = Self::pack(factor, factor);
                words.map(|pair| <Self as Half>::scale(pair, factor))
            }

            #[inline(always)]
            fn dot(a: [u32; 4], b: [u32; 4]) -> f32 {
                let mut sum = 0.0;
                for i in 0..4 {
                    let (x, y) = (Self::unpack(a[i]), Self::unpack(b[i]));
                    sum = fma(x[1], y[1], fma(x[0], y[0], sum));
                }
                sum
            }
        }
    };
}

half_element!(F16);
half_element!(Bf16);
