//! Named features that read no table: closures like those of a user, each with its formula and origin.
//!
//! `p` is the query's position among the keys, `query + seqlen_k - seqlen_q`.

use super::compose::Fragment;
use super::{Dropout, ProgramError};

/// `cap * tanh(score / cap)`.
pub(crate) fn softcap(cap: f32) -> Fragment {
    if !(cap.is_finite() && cap > 0.0) {
        return refused("softcap", cap, "a finite number above 0");
    }
    Fragment::score(|s, _| (s * (1.0 / cap)).tanh() * cap)
}

/// `p - left <= key <= p + right`; a side that is `None` has no limit, and at least one side has.
pub(crate) fn window(left: Option<usize>, right: Option<usize>) -> Fragment {
    Fragment::mask(|at| {
        let not_before = |keys| at.distance().at_most(saturated(keys));
        let not_after = |keys| at.distance().at_least(-saturated(keys));
        match (left, right) {
            (Some(left), Some(right)) => not_before(left) & not_after(right),
            (Some(left), None) => not_before(left),
            (None, right) => not_after(right.unwrap_or(usize::MAX)),
        }
    })
}

/// `key < n or key <= p`.
pub(crate) fn prefix(n: usize) -> Fragment {
    Fragment::mask(|at| at.key.less_than(saturated(n)) | at.distance().at_least(0))
}

/// `key <= p and key / n == p / n`.
pub(crate) fn chunked(n: usize) -> Fragment {
    if n == 0 {
        return refused("chunked", n, "at least 1");
    }
    Fragment::mask(|at| at.distance().at_least(0) & (at.key / saturated(n)).equals(at.position() / saturated(n)))
}

/// `(p - key) % step == 0`.
pub(crate) fn dilated(step: usize) -> Fragment {
    if step == 0 {
        return refused("dilated", step, "at least 1");
    }
    Fragment::mask(|at| (at.distance() % saturated(step)).equals(0))
}

/// `key <= query`.
pub(crate) fn top_left() -> Fragment {
    Fragment::mask(|at| at.key.at_most(at.query))
}

/// Dropout with probability p; none if p is 0.
pub(crate) fn dropout(p: f32, seed: u64) -> Result<Option<Dropout>, ProgramError> {
    match p {
        0.0 => Ok(None),
        _ if (0.0..1.0).contains(&p) => Ok(Some(Dropout { probability: p, seed })),
        _ => Err(ProgramError::Argument {
            argument: "dropout",
            value: p.to_string(),
            expected: "a probability, at least 0 and below 1",
        }),
    }
}

/// A number of keys as an index. No distance is larger than the largest.
fn saturated(keys: usize) -> i32 {
    i32::try_from(keys).unwrap_or(i32::MAX)
}

fn refused(argument: &'static str, value: impl ToString, expected: &'static str) -> Fragment {
    Fragment::refused(ProgramError::Argument {
        argument,
        value: value.to_string(),
        expected,
    })
}
