//! The softmax scale in the forms that kernels take.

/// The softmax scale, and the numbers that kernels use in its place.
///
/// Forward kernels multiply q by the sign, so that the largest product is the largest score, and scores by the
/// magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Factor of the scores, as the caller gave it.
    pub value: f32,
    /// `value * log2(e)`, clamped to the largest f32: converts a product of q and k to a base-2 exponent.
    pub log2: f32,
    /// `|value|`; 1 where `value` is 0.
    pub magnitude: f32,
    /// `magnitude * log2(e)`.
    pub magnitude_log2: f32,
    /// 1, -1, or 0 where `value` is 0: scores are then products of zeros for any magnitude.
    pub sign: f32,
}

impl Scale {
    /// Computes the forms of a finite scale.
    pub(super) fn new(value: f32) -> Self {
        let most = f64::from(f32::MAX);
        let log2 = |x: f32| (f64::from(x) * std::f64::consts::LOG2_E).clamp(-most, most) as f32;
        let (magnitude, sign) = if value == 0.0 {
            (1.0, 0.0)
        } else {
            (value.abs(), value.signum())
        };
        Self {
            value,
            log2: log2(value),
            magnitude,
            magnitude_log2: log2(magnitude),
            sign,
        }
    }
}
