//! Comparison of a device's results with the expected ones.

use std::fmt;

use flash_attention::Element;

/// Error of a comparison, with the worst element.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// Name of the results compared.
    pub what: String,
    /// Index of the worst element.
    pub index: Vec<usize>,
    /// Value of the worst element.
    pub got: f64,
    /// Expected value of the worst element.
    pub want: f64,
    /// Largest distance allowed.
    pub bound: f64,
    /// Number of elements whose distance exceeds the bound.
    pub count: usize,
    /// Number of elements compared.
    pub len: usize,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            index,
            got,
            want,
            bound,
            count,
            len,
        } = self;
        write!(
            f,
            "{what}: {count} of {len} elements are off by more than {bound:e}; worst at {index:?}: got {got:e}, want {want:e}"
        )
    }
}

/// Returns the distance of two numbers: 0 for equal infinities and for two NaN, infinite for any other NaN or
/// infinity.
fn error(got: f64, want: f64) -> f64 {
    if got == want || (got.is_nan() && want.is_nan()) {
        return 0.0;
    }
    let error = (got - want).abs();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Returns the largest distance between elements of two slices of equal length.
///
/// # Panics
/// If the lengths differ.
pub fn largest_error<T: Element>(got: &[T], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "results of two lengths");
    got.iter()
        .zip(want)
        .map(|(got, &want)| error(got.to_f64(), want))
        .fold(0.0, f64::max)
}

/// Checks that every element of `got` is within `bound` of `want`; both are in logical order of `shape`.
///
/// # Errors
/// A [`Mismatch`] with the worst element, if a distance exceeds the bound.
///
/// # Panics
/// If the lengths differ, or the bound is not finite.
pub fn compare<T: Element>(what: &str, shape: &[usize], got: &[T], want: &[f64], bound: f64) -> Result<(), Mismatch> {
    assert_eq!(got.len(), want.len(), "{what}: results of two lengths");
    assert!(bound.is_finite(), "{what}: a bound of {bound} allows anything");
    let errors = || {
        got.iter()
            .zip(want)
            .map(|(got, &want)| error(got.to_f64(), want))
            .enumerate()
    };
    let count = errors().filter(|&(_, error)| error > bound).count();
    match errors().max_by(|(_, a), (_, b)| a.total_cmp(b)) {
        Some((worst, error)) if error > bound => Err(Mismatch {
            what: what.to_owned(),
            index: unravel(worst, shape),
            got: got[worst].to_f64(),
            want: want[worst],
            bound,
            count,
            len: want.len(),
        }),
        _ => Ok(()),
    }
}

/// Returns the index in a tensor of the element at a place in logical order.
fn unravel(mut place: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let i = place % size;
            place /= size;
            i
        })
        .collect();
    index.reverse();
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_element_is_named() {
        let (got, want) = ([0.0_f32, 1.0, 2.5, 3.25, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let mismatch = compare("out", &[2, 3], &got, &want, 0.1).expect_err("two are off");
        assert_eq!((mismatch.index.as_slice(), mismatch.count), ([0, 2].as_slice(), 2));
        assert_eq!(
            mismatch.to_string(),
            "out: 2 of 6 elements are off by more than 1e-1; worst at [0, 2]: got 2.5e0, want 2e0"
        );
        assert_eq!(compare("out", &[2, 3], &got, &want, 0.5), Ok(()));
    }

    #[test]
    fn what_is_not_a_number_must_match() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert_eq!(largest_error(&[f32::NAN, f32::INFINITY], &[nan, inf]), 0.0);
        for (got, want) in [
            (f32::NAN, 0.0),
            (0.0, nan),
            (f32::INFINITY, -inf),
            (1.0, inf),
            (f32::NAN, inf),
        ] {
            assert_eq!(largest_error(&[got], &[want]), inf, "{got} {want}");
        }
    }
}
