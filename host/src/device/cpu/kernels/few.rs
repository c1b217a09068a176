//! Attention of one query, if there are too few for lanes: lanes are elements of a head, and rows of K and V are read
//! in the order of keys, wherever each lies.

use flash_attention_kernels::entries::Dtype;

use super::MAX_LANES;
use crate::device::cpu::vector::{Vector, prefetch_l2};

/// One tile of keys passing one query, where there are too few queries for lanes: here lanes are elements of a head.
pub(in crate::device::cpu) struct One {
    /// Number of keys of the tile that the query sees.
    pub keys: usize,
    pub dtype: Dtype,
    /// Rows of K and of V, and [`AHEAD`] rows after them, which are read soon.
    pub k: Rows,
    pub v: Rows,
    /// Elements of a row of K, and of V.
    pub head_dim: usize,
    pub head_dim_v: usize,
    /// Query in whole registers, with zeros past head_dim.
    pub query: *const f32,
    /// Room for the scores of the keys, in whole registers.
    pub scores: *mut f32,
    pub scale_log2: f32,
    pub max: *mut f32,
    pub sum: *mut f32,
    /// Key with the largest score so far, counted from the start of the sequence.
    pub best: *mut u32,
    /// Position of the tile's first key in the sequence.
    pub first_key: usize,
    /// Output in whole registers.
    pub output: *mut f32,
}

/// Rows by their addresses.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) enum Rows {
    Strided(Strided),
    Listed(Listed),
}

/// Rows at equal distances: address of the first one, and bytes from one to the next.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Strided(pub *const u8, pub usize);

/// Rows anywhere: a list of their addresses.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Listed(pub *const *const u8);

/// Addresses of rows. Loops over keys take them by type: reading addresses of rows at equal distances made decoding in f32 12 %
/// slower, and deciding at each row 3 %, measured on Zen 4.
trait Addresses: Copy {
    /// Returns the address of a row.
    ///
    /// # Safety
    /// A listed row is among those listed.
    unsafe fn at(self, row: usize) -> *const u8;
}

impl Addresses for Strided {
    #[inline(always)]
    unsafe fn at(self, row: usize) -> *const u8 {
        self.0.wrapping_add(row * self.1)
    }
}

impl Addresses for Listed {
    #[inline(always)]
    unsafe fn at(self, row: usize) -> *const u8 {
        // SAFETY: passed on to the caller.
        unsafe { *self.0.add(row) }
    }
}

/// Rows between one that is read and one that is asked for, to be in the L2 cache when its turn comes. Asked for as far as the L1
/// cache, rows come at three quarters of the rate: measured on Zen 4.
pub(in crate::device::cpu) const AHEAD: usize = 8;

/// [`One`], for a dtype: 0 is f32, 1 f16, 2 bf16.
#[inline(always)]
pub(super) unsafe fn one<V: Vector, const DTYPE: u8>(o: &One) {
    // SAFETY: passed on to the caller.
    unsafe {
        match o.k {
            Rows::Strided(k) => multiply::<V, DTYPE>(o, k),
            Rows::Listed(k) => multiply::<V, DTYPE>(o, k),
        }
        for key in o.keys..o.keys.next_multiple_of(V::LANES) {
            *o.scores.add(key) = f32::NEG_INFINITY;
        }
        let old = *o.max;
        let mut largest = V::splat(old);
        for key in (0..o.keys).step_by(V::LANES) {
            largest = V::load(o.scores.add(key)).max(largest);
        }
        let mut lanes = [0.0_f32; MAX_LANES];
        largest.store(lanes.as_mut_ptr());
        let max = lanes[..V::LANES]
            .iter()
            .fold(old, |max, &x| if x > max { x } else { max });
        *o.max = max;
        if max > old {
            let place = (0..o.keys).find(|&key| *o.scores.add(key) == max);
            *o.best = (o.first_key + place.unwrap_or(0)) as u32;
        }
        let origin = V::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let scale = V::splat(o.scale_log2);
        let mut sums = V::splat(0.0);
        for key in (0..o.keys).step_by(V::LANES) {
            let exponential = V::load(o.scores.add(key)).sub(origin).mul(scale).exp2();
            sums = sums.add(exponential);
            exponential.store(o.scores.add(key));
        }
        let rescale = V::splat(old).sub(origin).mul(scale).exp2();
        rescale.store(lanes.as_mut_ptr());
        *o.sum = *o.sum * lanes[0] + sums.sum();
        match o.v {
            Rows::Strided(v) => add_values::<V, DTYPE>(o, v, rescale),
            Rows::Listed(v) => add_values::<V, DTYPE>(o, v, rescale),
        }
    }
}

/// Multiplies the query with each key.
#[inline(always)]
unsafe fn multiply<V: Vector, const DTYPE: u8>(o: &One, k: impl Addresses) {
    // SAFETY: passed on to the caller.
    unsafe {
        for key in 0..o.keys {
            let (row, ahead) = (k.at(key), k.at(key + AHEAD));
            let mut sums = V::splat(0.0);
            let mut d = 0;
            while d + V::LANES <= o.head_dim {
                prefetch_l2(ahead.wrapping_add(d * bytes::<DTYPE>()));
                let k = whole::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                sums = k.fma(V::load(o.query.add(d)), sums);
                d += V::LANES;
            }
            if V::LANES > 8 && d < o.head_dim {
                let k = half::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                sums = k.fma(V::load(o.query.add(d)), sums);
            }
            *o.scores.add(key) = sums.sum();
        }
    }
}

/// Adds exponentials times values to the rescaled output.
#[inline(always)]
unsafe fn add_values<V: Vector, const DTYPE: u8>(o: &One, v: impl Addresses, rescale: V) {
    // SAFETY: passed on to the caller.
    unsafe {
        // In one pass over the values, where their sums stay in registers or not: two passes over halves of rows read memory
        // at two thirds of the rate.
        match o.head_dim_v / V::LANES {
            4 if o.head_dim_v.is_multiple_of(V::LANES) => weigh::<V, DTYPE, 4>(o, v, rescale),
            8 if o.head_dim_v.is_multiple_of(V::LANES) => weigh::<V, DTYPE, 8>(o, v, rescale),
            16 if V::ROWS == 8 && o.head_dim_v.is_multiple_of(V::LANES) => weigh::<V, DTYPE, 16>(o, v, rescale),
            _ => weigh_in_memory::<V, DTYPE>(o, v, rescale),
        }
    }
}

/// Adds exponentials times values to an output of `N` registers.
#[inline(always)]
unsafe fn weigh<V: Vector, const DTYPE: u8, const N: usize>(o: &One, v: impl Addresses, rescale: V) {
    // SAFETY: passed on to the caller; a head is `N` registers.
    unsafe {
        let mut sums = [rescale; N];
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = V::load(o.output.add(n * V::LANES)).mul(rescale);
        }
        for key in 0..o.keys {
            let (row, ahead) = (v.at(key), v.at(key + AHEAD));
            let exponential = V::splat(*o.scores.add(key));
            for (n, sum) in sums.iter_mut().enumerate() {
                let place = n * V::LANES * bytes::<DTYPE>();
                prefetch_l2(ahead.wrapping_add(place));
                *sum = whole::<V, DTYPE>(row.add(place)).fma(exponential, *sum);
            }
        }
        for (n, sum) in sums.iter().enumerate() {
            sum.store(o.output.add(n * V::LANES));
        }
    }
}

/// Adds exponentials times values to an output of any length, whose sums are in the L1 cache.
#[inline(always)]
unsafe fn weigh_in_memory<V: Vector, const DTYPE: u8>(o: &One, v: impl Addresses, rescale: V) {
    // SAFETY: passed on to the caller; the output has room for whole registers.
    unsafe {
        let whole_registers = o.head_dim_v / V::LANES * V::LANES;
        for d in (0..o.head_dim_v).step_by(V::LANES) {
            V::load(o.output.add(d)).mul(rescale).store(o.output.add(d));
        }
        for key in 0..o.keys {
            let (row, ahead) = (v.at(key), v.at(key + AHEAD));
            let exponential = V::splat(*o.scores.add(key));
            for d in (0..whole_registers).step_by(V::LANES) {
                prefetch_l2(ahead.wrapping_add(d * bytes::<DTYPE>()));
                let (value, sum) = (whole::<V, DTYPE>(row.add(d * bytes::<DTYPE>())), o.output.add(d));
                value.fma(exponential, V::load(sum)).store(sum);
            }
            if V::LANES > 8 && whole_registers < o.head_dim_v {
                let value = half::<V, DTYPE>(row.add(whole_registers * bytes::<DTYPE>()));
                let sum = o.output.add(whole_registers);
                value.fma(exponential, V::load(sum)).store(sum);
            }
        }
    }
}

const fn bytes<const DTYPE: u8>() -> usize {
    if DTYPE == 0 { 4 } else { 2 }
}

/// Eight elements, half a register, and zeros: what is left of a head whose length is a multiple of 8 and not of 16.
#[inline(always)]
unsafe fn half<V: Vector, const DTYPE: u8>(from: *const u8) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match DTYPE {
            0 => V::load_half(from.cast()),
            1 => V::load_half_f16(from.cast()),
            _ => V::load_half_bf16(from.cast()),
        }
    }
}

/// Loads a whole register of elements.
#[inline(always)]
unsafe fn whole<V: Vector, const DTYPE: u8>(from: *const u8) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match DTYPE {
            0 => V::load(from.cast()),
            1 => V::load_f16(from.cast()),
            _ => V::load_bf16(from.cast()),
        }
    }
}
