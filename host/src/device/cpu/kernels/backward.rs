//! Inner loops of the backward pass: scores and dP become P and dS; and the sums of delta.

use crate::device::cpu::vector::Vector;

/// Turns the scores of one panel into probabilities, and dP into dS: `p = exp(scale * (s - row_max)) / row_sum` or,
/// if only lse is known, `p = exp(scale * s - lse)`; and `ds = p * (dp - delta)`.
pub(in crate::device::cpu) struct Backpropagate {
    pub keys: usize,
    pub lanes: usize,
    pub scores: *mut f32,
    pub dp: *mut f32,
    pub stride: usize,
    /// Number of keys of the tile that each query sees; null if all.
    pub visible: *const f32,
    pub scale: f32,
    /// `scale * log2(e)`.
    pub scale_log2: f32,
    /// row_max of each query, or lse, where plus infinity makes every probability 0.
    pub origin: *const f32,
    /// `1 / row_sum` of each query, where 0 makes every probability 0; null if the origin is lse.
    pub inverse_sum: *const f32,
    pub delta: *const f32,
}

/// Runs [`Backpropagate`].
#[inline(always)]
pub(super) unsafe fn backpropagate<V: Vector>(b: &Backpropagate) {
    // SAFETY: passed on to the caller.
    unsafe {
        if b.inverse_sum.is_null() {
            gradients::<V, false>(b);
        } else {
            gradients::<V, true>(b);
        }
    }
}

/// Runs [`backpropagate`] from row_max and row_sum, or from lse.
#[inline(always)]
unsafe fn gradients<V: Vector, const OF_MAX: bool>(b: &Backpropagate) {
    // SAFETY: passed on to the caller.
    unsafe {
        let (scale, scale_log2) = (V::splat(b.scale), V::splat(b.scale_log2));
        let (zero, log2_e) = (V::splat(0.0), V::splat(std::f32::consts::LOG2_E));
        for lane in (0..b.lanes).step_by(V::LANES) {
            let origin = V::load(b.origin.add(lane));
            let (negative_lse, inverse_sum) = if OF_MAX {
                (zero, V::load(b.inverse_sum.add(lane)))
            } else {
                (zero.sub(origin), zero)
            };
            let delta = V::load(b.delta.add(lane));
            let masked = !b.visible.is_null();
            let visible = if masked { V::load(b.visible.add(lane)) } else { zero };
            for key in 0..b.keys {
                let place = key * b.stride + lane;
                let score = V::load(b.scores.add(place));
                // The difference is computed first, with one rounding: near 0, where probabilities are large, it
                // keeps all its bits.
                let exponent = if OF_MAX {
                    score.sub(origin).mul(scale_log2)
                } else {
                    score.fma(scale, negative_lse)
                };
                // No probability exceeds 1, however large the rounding error of a large lse is. NaN stays NaN.
                let exponent = zero.min(exponent);
                let mut p = if OF_MAX {
                    exponent.exp2().mul(inverse_sum)
                } else {
                    exponent.mul(log2_e).exp2()
                };
                let mut ds = p.mul(V::load(b.dp.add(place)).sub(delta));
                if masked {
                    let key = V::splat(key as f32);
                    p = visible.select_greater(key, p, zero);
                    ds = visible.select_greater(key, ds, zero);
                }
                p.store(b.scores.add(place));
                ds.store(b.dp.add(place));
            }
        }
    }
}

/// Sums products of columns.
#[inline(always)]
pub(super) unsafe fn dot<V: Vector>(x: *const f32, y: *const f32, count: usize, in_order: bool, to: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [V::splat(0.0); 8];
        if in_order {
            for i in 0..count {
                sums[0] = V::load(x.add(i * V::LANES)).fma(V::load(y.add(i * V::LANES)), sums[0]);
            }
        } else {
            for first in (0..count).step_by(8) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let place = (first + i) * V::LANES;
                    *sum = V::load(x.add(place)).fma(V::load(y.add(place)), *sum);
                }
            }
        }
        for width in [4, 2, 1] {
            for i in 0..width {
                sums[i] = sums[i].add(sums[i + width]);
            }
        }
        sums[0].store(to);
    }
}
