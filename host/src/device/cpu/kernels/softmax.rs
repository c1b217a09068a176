//! Online softmax of a panel of queries, and the merge of two partial softmaxes.

use std::ops::Range;

use super::MAX_LANES;
use super::parts::store_parts;
use crate::device::cpu::vector::Vector;

/// Scores of keys that some queries of a panel do not see: minus infinity takes the place of those.
pub(in crate::device::cpu) struct Hide {
    /// The keys of the tile that not every query sees.
    pub keys: Range<usize>,
    /// Number of queries, a multiple of the lanes of a register.
    pub lanes: usize,
    /// Scores, `keys x stride`, from the tile's first key on.
    pub scores: *mut f32,
    pub stride: usize,
    /// Number of keys of the tile that each query sees.
    pub visible: *const f32,
}

/// One tile of keys for one panel of queries: scores become exponentials relative to the largest score so far.
pub(in crate::device::cpu) struct Softmax {
    /// Number of keys of the tile.
    pub keys: usize,
    /// Number of queries, a multiple of the lanes of a register.
    pub lanes: usize,
    /// Scores, `keys x stride`.
    pub scores: *mut f32,
    pub stride: usize,
    pub scale_log2: f32,
    /// Largest score of each query so far, and the sum of exponentials relative to it.
    pub max: *mut f32,
    pub sum: *mut f32,
    /// Output, `head_dim x stride`: the earlier sums, which are rescaled to the new largest score.
    pub output: *mut f32,
    pub head_dim: usize,
    /// Exponentials as bf16 pairs, two keys per word, `keys / 2 x stride` for each part. Without it they are f32 in
    /// the place of the scores.
    pub pairs: *mut u32,
    /// Number of bf16 parts of the exponentials; 0 for f32.
    pub parts: usize,
    /// Number of words from one part to the next.
    pub part: usize,
    /// True if the exponentials are wanted as f32 as well.
    pub both: bool,
}

/// Merges a partial softmax into another, each relative to its own largest score: two runs of keys for one panel.
pub(in crate::device::cpu) struct Merge {
    pub lanes: usize,
    pub stride: usize,
    pub head_dim: usize,
    pub scale_log2: f32,
    pub max: *mut f32,
    pub sum: *mut f32,
    pub output: *mut f32,
    pub other_max: *const f32,
    pub other_sum: *const f32,
    pub other_output: *const f32,
}

/// Runs [`Hide`].
#[inline(always)]
pub(super) unsafe fn hide<V: Vector>(h: &Hide) {
    // SAFETY: passed on to the caller.
    unsafe {
        let minus_infinity = V::splat(f32::NEG_INFINITY);
        for lane in (0..h.lanes).step_by(V::LANES) {
            let visible = V::load(h.visible.add(lane));
            for key in h.keys.clone() {
                let score = h.scores.add(key * h.stride + lane);
                let place = V::splat(key as i32 as f32);
                let seen = V::load(score).where_less(place, visible, minus_infinity);
                seen.store(score);
            }
        }
    }
}

/// Runs [`Softmax`].
///
/// While every score of a query is minus infinity, any finite number serves as the largest: exponentials relative to
/// it are 0, and relative to minus infinity they would be NaN.
#[inline(always)]
pub(super) unsafe fn softmax<V: Vector>(s: &Softmax) {
    // SAFETY: passed on to the caller.
    unsafe {
        let scale = V::splat(s.scale_log2);
        let minus_infinity = V::splat(f32::NEG_INFINITY);
        for lane in (0..s.lanes).step_by(V::LANES) {
            let scores = s.scores.add(lane);
            let old = V::load(s.max.add(lane));
            // Several accumulators, since each operation waits for the one before it.
            let mut largest = [old; 4];
            for key in (0..s.keys).step_by(4) {
                for (i, largest) in largest.iter_mut().enumerate() {
                    *largest = V::load(scores.add((key + i) * s.stride)).max(*largest);
                }
            }
            let max = largest[0].max(largest[1]).max(largest[2].max(largest[3]));
            max.store(s.max.add(lane));
            let origin = max.select_greater(minus_infinity, max, V::splat(0.0));
            let sum = match s.parts {
                1 if V::PARTS >= 1 => exponentials_in_parts::<V, 1>(s, lane, origin),
                2 if V::PARTS >= 2 => exponentials_in_parts::<V, 2>(s, lane, origin),
                3 if V::PARTS >= 3 => exponentials_in_parts::<V, 3>(s, lane, origin),
                _ => exponentials::<V>(s, lane, origin),
            };
            let [rescale] = V::exp2_each([old.sub(origin)], scale);
            let total = V::load(s.sum.add(lane)).fma(rescale, sum);
            total.store(s.sum.add(lane));
            if !all_one::<V>(rescale) {
                for d in 0..s.head_dim {
                    let output = s.output.add(d * s.stride + lane);
                    V::load(output).mul(rescale).store(output);
                }
            }
        }
    }
}

/// Number of exponentials at a time; divides [`ROWS`](super::ROWS).
const GROUP: usize = 2;

/// Turns scores into exponentials and returns their sum.
#[inline(always)]
unsafe fn exponentials<V: Vector>(s: &Softmax, lane: usize, origin: V) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        let (scale, mut sum) = (V::splat(s.scale_log2), V::splat(0.0));
        let mut score = s.scores.add(lane);
        for _ in (0..s.keys).step_by(GROUP) {
            let mut x = [origin; GROUP];
            for (i, x) in x.iter_mut().enumerate() {
                // The difference is computed first: it is exact near 0, where exponentials are large.
                *x = V::load(score.add(i * s.stride)).sub(origin);
            }
            for (i, x) in V::exp2_each(x, scale).into_iter().enumerate() {
                sum = sum.add(x);
                x.store(score.add(i * s.stride));
            }
            score = score.add(GROUP * s.stride);
        }
        sum
    }
}

/// Turns scores into exponentials, written as bf16 pairs, and returns their sum.
#[inline(always)]
unsafe fn exponentials_in_parts<V: Vector, const PARTS: usize>(s: &Softmax, lane: usize, origin: V) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        let (scale, mut sum) = (V::splat(s.scale_log2), V::splat(0.0));
        for pair in 0..s.keys / 2 {
            let first = s.scores.add(2 * pair * s.stride + lane);
            let differences = [V::load(first).sub(origin), V::load(first.add(s.stride)).sub(origin)];
            let [x, y] = V::exp2_each(differences, scale);
            sum = sum.add(x).add(y);
            store_parts::<V, PARTS>(x, y, s.pairs.add(pair * s.stride + lane), s.part);
            if s.both {
                x.store(first);
                y.store(first.add(s.stride));
            }
        }
        sum
    }
}

/// Returns true if every lane is 1.
#[inline(always)]
unsafe fn all_one<V: Vector>(x: V) -> bool {
    let mut lanes = [0.0_f32; MAX_LANES];
    // SAFETY: no register is longer.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes[..V::LANES].iter().all(|&lane| lane == 1.0)
}

/// Runs [`Merge`].
#[inline(always)]
pub(super) unsafe fn merge<V: Vector>(m: &Merge) {
    // SAFETY: passed on to the caller.
    unsafe {
        let scale = V::splat(m.scale_log2);
        let minus_infinity = V::splat(f32::NEG_INFINITY);
        for lane in (0..m.lanes).step_by(V::LANES) {
            let (left, right) = (V::load(m.max.add(lane)), V::load(m.other_max.add(lane)));
            let max = left.max(right);
            max.store(m.max.add(lane));
            let origin = max.select_greater(minus_infinity, max, V::splat(0.0));
            let [of_left, of_right] = V::exp2_each([left.sub(origin), right.sub(origin)], scale);
            let (sum, other_sum) = (V::load(m.sum.add(lane)), V::load(m.other_sum.add(lane)));
            sum.mul(of_left).add(other_sum.mul(of_right)).store(m.sum.add(lane));
            for d in 0..m.head_dim {
                let place = d * m.stride + lane;
                let (output, other) = (V::load(m.output.add(place)), V::load(m.other_output.add(place)));
                output.mul(of_left).add(other.mul(of_right)).store(m.output.add(place));
            }
        }
    }
}
