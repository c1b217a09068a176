//! How far an answer is from the right one, and how far it may be.

use flash_attention::Element;

/// The error of an answer beside that of standard attention computed in the same dtype.
///
/// The rule is the one FlashAttention tests itself by: at most twice the error of standard attention, plus 1e-5. Standard
/// attention's error is its distance from attention in f64, so that a stored answer that is wrong excuses nobody.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Largest distance of an element from the stored answer.
    pub error: f64,
    /// Largest distance of an element of standard attention from attention in f64.
    pub standard: f64,
}

impl Accuracy {
    /// Compares an answer with the stored one, and standard attention with attention in f64.
    pub fn of<T: Element>(got: &[T], stored: &[f32], standard: &[T], exact: &[f64]) -> Self {
        Self {
            error: largest_error(got, stored),
            standard: largest_error(standard, exact),
        }
    }

    /// The largest error allowed.
    pub fn bound(&self) -> f64 {
        2.0 * self.standard + 1e-5
    }

    /// Whether the answer is as good as it has to be.
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

/// The largest distance of elements; infinite where one is not a number and the other is.
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
