//! Operations on 16-byte chunks (four words) of elements of each type.

use crate::element::F32;
use crate::ptx::{math::fma, matrix::Half, memory};

/// An element type of q, k, v and out.
pub trait Element: Copy {
    /// Size of one element, in bytes.
    const BYTES: u32;
    /// Multiplies each element of a chunk by `factor`.
    fn scale(words: [u32; 4], factor: f32) -> [u32; 4];
    /// Returns the dot product of two chunks, in f32.
    fn dot(a: [u32; 4], b: [u32; 4]) -> f32;
    /// Loads the element at a device address.
    ///
    /// # Safety
    /// The address is readable and aligned to an element.
    unsafe fn load(address: u64) -> f32;
    /// Stores an element, rounded.
    ///
    /// # Safety
    /// The address is writable and aligned to an element, and no other thread accesses it.
    unsafe fn store(address: u64, x: f32);
    /// Copies the bits of an element.
    ///
    /// # Safety
    /// The contracts of [`load`](Self::load) and [`store`](Self::store).
    unsafe fn copy(from: u64, to: u64);
    /// Stores two neighbouring elements, rounded.
    ///
    /// # Safety
    /// Both are writable and aligned to an element, and no other thread accesses them.
    unsafe fn store_pair(address: u64, pair: [f32; 2]);
    /// Mask of the exponent fields of a word's elements, which are all ones in NaN and infinity.
    const EXPONENTS: u32;
    /// Lowest bits of those fields.
    const LOWEST: u32;
    /// Largest finite number.
    const MAX: f32;

    /// Returns the highest bit of each element that is NaN or infinite: there the addition to the exponent carries.
    #[inline(always)]
    fn nonfinite(word: u32) -> u32 {
        ((word & Self::EXPONENTS) + Self::LOWEST) & 0x8000_8000
    }

    /// Returns the word with zeros in place of NaN and infinity.
    #[inline(always)]
    fn finite(word: u32) -> u32 {
        let nonfinite = Self::nonfinite(word);
        let ones = if Self::BYTES == 4 { u32::MAX } else { 0xffff };
        let lowest = if Self::BYTES == 4 {
            nonfinite >> 31
        } else {
            nonfinite >> 15
        };
        word & !(lowest * ones)
    }

    /// Clamps an average of elements to the type's range: rounding alone can have moved it past the largest.
    #[inline(always)]
    fn mean(x: f32) -> f32 {
        if Self::BYTES == 2 && x.abs() > Self::MAX && x.abs() < f32::INFINITY {
            Self::MAX.copysign(x)
        } else {
            x
        }
    }
}

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

    #[inline(always)]
    unsafe fn load(address: u64) -> f32 {
        // SAFETY: the caller's contract.
        f32::from_bits(unsafe { memory::ld_global_u32(address) })
    }

    #[inline(always)]
    unsafe fn store(address: u64, x: f32) {
        // SAFETY: the caller's contract.
        unsafe { memory::st_global_u32(address, x.to_bits()) }
    }

    #[inline(always)]
    unsafe fn copy(from: u64, to: u64) {
        // SAFETY: the caller's contract.
        unsafe { memory::st_global_u32(to, memory::ld_global_u32(from)) }
    }

    #[inline(always)]
    unsafe fn store_pair(address: u64, pair: [f32; 2]) {
        // SAFETY: the caller's contract.
        unsafe {
            memory::st_global_u32(address, pair[0].to_bits());
            memory::st_global_u32(address + 4, pair[1].to_bits());
        }
    }

    const EXPONENTS: u32 = 0x7f80_0000;
    const LOWEST: u32 = 0x0080_0000;
    const MAX: f32 = f32::MAX;
}

impl<T: Half> Element for T {
    const BYTES: u32 = 2;

    #[inline(always)]
    fn scale(words: [u32; 4], factor: f32) -> [u32; 4] {
        let factor = T::pack(factor, factor);
        words.map(|pair| <T as Half>::scale(pair, factor))
    }

    #[inline(always)]
    fn dot(a: [u32; 4], b: [u32; 4]) -> f32 {
        let mut sum = 0.0;
        for i in 0..4 {
            let (x, y) = (T::unpack(a[i]), T::unpack(b[i]));
            sum = fma(x[1], y[1], fma(x[0], y[0], sum));
        }
        sum
    }

    #[inline(always)]
    unsafe fn load(address: u64) -> f32 {
        // SAFETY: the caller's contract.
        T::unpack(unsafe { memory::ld_global_u16(address) } as u32)[0]
    }

    #[inline(always)]
    unsafe fn store(address: u64, x: f32) {
        // SAFETY: the caller's contract.
        unsafe { memory::st_global_u16(address, T::pack(x, x) as u16) }
    }

    #[inline(always)]
    unsafe fn copy(from: u64, to: u64) {
        // SAFETY: the caller's contract.
        unsafe { memory::st_global_u16(to, memory::ld_global_u16(from)) }
    }

    #[inline(always)]
    unsafe fn store_pair(address: u64, pair: [f32; 2]) {
        let word = T::pack(pair[0], pair[1]);
        // SAFETY: the caller's contract.
        unsafe {
            memory::st_global_u16(address, word as u16);
            memory::st_global_u16(address + 2, (word >> 16) as u16);
        }
    }

    const EXPONENTS: u32 = T::EXPONENT as u32 * 0x0001_0001;
    const LOWEST: u32 = (T::EXPONENT & !(T::EXPONENT << 1)) as u32 * 0x0001_0001;
    const MAX: f32 = T::MAX;
}
