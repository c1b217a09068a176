//! `min` and `max` of floating-point numbers (manual sections "min", "max", full and half precision).
//!
//! PTX differs from IEEE 754-2019 in three ways: a NaN operand loses to a number unless `.NaN` is given; -0 is less
//! than +0; and `.xorsign.abs` compares magnitudes and then multiplies the signs. All formats go through f64, which
//! holds their values exactly.

/// `min` or `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extremum {
    /// `min`.
    Min,
    /// `max`.
    Max,
}

/// Modifiers of `min` and `max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MinMaxMode {
    /// `.ftz`: subnormal inputs and results become zero.
    pub ftz: bool,
    /// `.NaN`: the result is NaN if either input is.
    pub nan: bool,
    /// `.xorsign.abs`: magnitude of the extremum of the magnitudes, sign of the product.
    pub xorsign_abs: bool,
}

/// Returns the extremum of two values, or `None` for the canonical NaN. Subnormals must have been flushed before.
#[inline]
pub fn extremum(which: Extremum, a: f64, b: f64, mode: MinMaxMode) -> Option<f64> {
    let sign = a.is_sign_negative() != b.is_sign_negative();
    let (a, b) = if mode.xorsign_abs { (a.abs(), b.abs()) } else { (a, b) };
    let chosen = if a.is_nan() || b.is_nan() {
        if mode.nan || (a.is_nan() && b.is_nan()) {
            return None;
        }
        if a.is_nan() { b } else { a }
    } else {
        let a_first = a < b || (a == b && a.is_sign_negative());
        match which {
            Extremum::Min if a_first => a,
            Extremum::Min => b,
            Extremum::Max if a_first => b,
            Extremum::Max => a,
        }
    };
    Some(if mode.xorsign_abs && sign { -chosen } else { chosen })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_ordered_and_nans_lose() {
        let mode = MinMaxMode::default();
        for (a, b) in [(0.0, -0.0), (-0.0, 0.0)] {
            assert!(extremum(Extremum::Min, a, b, mode).unwrap().is_sign_negative());
            assert!(extremum(Extremum::Max, a, b, mode).unwrap().is_sign_positive());
        }
        assert_eq!(extremum(Extremum::Min, f64::NAN, 1.0, mode), Some(1.0));
        assert_eq!(extremum(Extremum::Max, 1.0, f64::NAN, mode), Some(1.0));
        assert_eq!(extremum(Extremum::Max, f64::NAN, f64::NAN, mode), None);
        let nan = MinMaxMode { nan: true, ..mode };
        assert_eq!(extremum(Extremum::Max, 1.0, f64::NAN, nan), None);
        assert_eq!(extremum(Extremum::Max, f64::NEG_INFINITY, -1.0, nan), Some(-1.0));
    }

    #[test]
    fn xorsign_abs_multiplies_signs() {
        let mode = MinMaxMode {
            xorsign_abs: true,
            ..Default::default()
        };
        assert_eq!(extremum(Extremum::Max, -3.0, 2.0, mode), Some(-3.0));
        assert_eq!(extremum(Extremum::Min, -3.0, 2.0, mode), Some(-2.0));
        assert_eq!(extremum(Extremum::Min, -3.0, -2.0, mode), Some(2.0));
        assert_eq!(extremum(Extremum::Max, -3.0, f64::NAN, mode), Some(-3.0));
    }
}
