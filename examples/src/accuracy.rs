//! Error of a result, and the bound on it.

use flash_attention::Element;

/// The error of a result beside that of standard attention computed in the same dtype.
///
/// The bound is that of FlashAttention's own tests: at most twice the error of standard attention, plus 1e-5. The
/// error of standard attention is its distance from attention in f64, so a wrong stored answer does not widen the
/// bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Largest distance of an element of the result from the stored answer.
    pub error: f64,
    /// Largest distance of an element of standard attention from attention in f64.
    pub standard: f64,
}

impl Accuracy {
    /// Compares a result with the stored answer, and standard attention with attention in f64.
    pub fn of<T: Element>(got: &[T], stored: &[f32], standard: &[T], exact: &[f64]) -> Self {
        Self {
            error: largest_error(got, stored),
            standard: largest_error(standard, exact),
        }
    }

    /// Returns the largest error allowed.
    pub fn bound(&self) -> f64 {
        2.0 * self.standard + 1e-5
    }

    /// Returns true if the error is within the bound.
    pub fn passes(&self) -> bool {
        self.error <= self.bound()
    }
}

impl std::fmt::Display for Accuracy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "error {:.2e}, {} bound {:.2e} (twice standard attention's {:.2e}, plus 1e-5)",
            self.error,
            if self.passes() { "within the" } else { "BEYOND THE" },
            self.bound(),
            self.standard
        )
    }
}

/// Returns the largest distance of two elements; infinite if exactly one of them is NaN.
fn largest_error<T: Element>(got: &[T], right: &[impl Copy + Into<f64>]) -> f64 {
    let error = |got: f64, right: f64| {
        let error = (got - right).abs();
        if got == right || (got.is_nan() && right.is_nan()) {
            0.0
        } else if error.is_nan() {
            f64::INFINITY
        } else {
            error
        }
    };
    let both_long = got.len() == right.len();
    let worst = got
        .iter()
        .zip(right)
        .map(|(got, &right)| error(got.to_f64(), right.into()));
    if both_long {
        worst.fold(0.0, f64::max)
    } else {
        f64::INFINITY
    }
}
