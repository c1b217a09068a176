//! Attention of one query, if there are too few for lanes: lanes are elements of a head, and rows of K and V are read
//! in the order of memory.

use flash_attention_kernels::entries::Dtype;

use super::MAX_LANES;
use crate::device::cpu::vector::Vector;

/// One tile of keys passing one query, where there are too few queries for lanes: here lanes are elements of a head.
pub(in crate::device::cpu) struct One {
    /// Number of keys of the tile that the query sees.
    pub keys: usize,
    pub dtype: Dtype,
    /// Rows of K and V, in the order of memory.
    pub k: *const u8,
    pub k_stride_bytes: usize,
    pub v: *const u8,
    pub v_stride_bytes: usize,
    pub head_dim: usize,
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

/// Rows between one that is read and one that is asked for, to be there when its turn comes.
const AHEAD: usize = 16;

/// [`One`], for a dtype: 0 is f32, 1 f16, 2 bf16.
#[inline(always)]
pub(super) unsafe fn one<V: Vector, const DTYPE: u8>(o: &One) {
    // SAFETY: passed on to the caller.
    unsafe {
        for key in 0..o.keys {
            let row = o.k.add(key * o.k_stride_bytes);
            let ahead = row.wrapping_add(AHEAD * o.k_stride_bytes);
            let mut sums = V::splat(0.0);
            let mut d = 0;
            while d + V::LANES <= o.head_dim {
                V::prefetch(ahead.wrapping_add(d * bytes::<DTYPE>()));
                let k = whole::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                sums = k.fma(V::load(o.query.add(d)), sums);
                d += V::LANES;
            }
            if d < o.head_dim {
                sums = last::<V, DTYPE>(row, d, o.head_dim).fma(V::load(o.query.add(d)), sums);
            }
            *o.scores.add(key) = sums.sum();
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
        let mut d = 0;
        while d < o.head_dim {
            if d + 4 * V::LANES <= o.head_dim {
                weigh::<V, DTYPE, 4>(o, d, rescale);
                d += 4 * V::LANES;
            } else {
                weigh::<V, DTYPE, 1>(o, d, rescale);
                d += V::LANES;
            }
        }
    }
}

/// Adds exponentials times values to `N` registers of the output, from element `first` of the head.
#[inline(always)]
unsafe fn weigh<V: Vector, const DTYPE: u8, const N: usize>(o: &One, first: usize, rescale: V) {
    // SAFETY: passed on to the caller; the output has room for whole registers.
    unsafe {
        let mut sums = [rescale; N];
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = V::load(o.output.add(first + n * V::LANES)).mul(rescale);
        }
        for key in 0..o.keys {
            let row = o.v.add(key * o.v_stride_bytes);
            let exponential = V::splat(*o.scores.add(key));
            if first + N * V::LANES > o.head_dim {
                sums[0] = last::<V, DTYPE>(row, first, o.head_dim).fma(exponential, sums[0]); // N is 1
                continue;
            }
            let row = row.add(first * bytes::<DTYPE>());
            let ahead = row.wrapping_add(AHEAD * o.v_stride_bytes);
            for (n, sum) in sums.iter_mut().enumerate() {
                let place = n * V::LANES * bytes::<DTYPE>();
                V::prefetch(ahead.wrapping_add(place));
                *sum = whole::<V, DTYPE>(row.add(place)).fma(exponential, *sum);
            }
        }
        for (n, sum) in sums.iter().enumerate() {
            sum.store(o.output.add(first + n * V::LANES));
        }
    }
}

const fn bytes<const DTYPE: u8>() -> usize {
    if DTYPE == 0 { 4 } else { 2 }
}

/// What a row has from element `first` on, less than a register, and zeros.
#[inline(always)]
unsafe fn last<V: Vector, const DTYPE: u8>(row: *const u8, first: usize, head_dim: usize) -> V {
    let mut elements = [0.0_f32; MAX_LANES];
    // SAFETY: the elements are there, says the caller, and fewer than the array's.
    unsafe {
        let (from, count) = (row.add(first * bytes::<DTYPE>()), (head_dim - first) * bytes::<DTYPE>());
        std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr().cast(), count);
        whole::<V, DTYPE>(elements.as_ptr().cast())
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
