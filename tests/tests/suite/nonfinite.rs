//! Tests of infinities and NaN: they give the results of IEEE arithmetic in standard attention, cause no hang, and
//! stay in the rows and columns that they belong to.

use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Element};
use flash_attention_tests::{Case, Inputs, devices, files};

const ROWS: usize = 20;
const KEYS: usize = 70;
const HEAD_DIM: usize = 16;

/// Returns the class of a number.
fn class(x: f64) -> &'static str {
    match x {
        x if x.is_nan() => "NaN",
        f64::INFINITY => "inf",
        f64::NEG_INFINITY => "-inf",
        _ => "finite",
    }
}

/// Tests full attention after a change of the inputs: every element has the class that the definition gives, and
/// finite ones are close to it.
fn check<T: Element>(name: &str, change: impl Fn(&mut Inputs<T>)) {
    let case = Case::one_head(T::DTYPE, ROWS, KEYS, HEAD_DIM);
    let mut inputs = case.inputs::<T>();
    change(&mut inputs);
    let (out, lse) = inputs.oracle(&case.dims());
    for device in devices().all() {
        let (_, outcome) = case.run(device, &inputs);
        let results = outcome.out.iter().map(|x| x.to_f64()).zip(&out).enumerate();
        for (i, (got, &want)) in results {
            let place = format!(
                "{name}, {} on {device}: out[{}, {}]",
                T::DTYPE.name(),
                i / HEAD_DIM,
                i % HEAD_DIM
            );
            assert_eq!(class(got), class(want), "{place}: got {got}, want {want}");
            assert!(
                !want.is_finite() || (got - want).abs() < 2e-2,
                "{place}: got {got}, want {want}"
            );
        }
        for (row, (&got, &want)) in outcome.lse.iter().zip(&lse).enumerate() {
            let place = format!("{name}, {} on {device}: lse[{row}]", T::DTYPE.name());
            assert_eq!(class(got.into()), class(want), "{place}: got {got}, want {want}");
        }
    }
}

fn check_all(name: &str, which: char, index: usize, value: f32) {
    fn set<T: Element>(inputs: &mut Inputs<T>, which: char, index: usize, value: f32) {
        let tensor = match which {
            'q' => &mut inputs.q,
            'k' => &mut inputs.k,
            _ => &mut inputs.v,
        };
        tensor[index] = T::from_f32(value);
    }
    check::<f32>(name, |inputs| set(inputs, which, index, value));
    check::<f16>(name, |inputs| set(inputs, which, index, value));
    check::<bf16>(name, |inputs| set(inputs, which, index, value));
}

#[test]
fn nan_stays_in_its_query() {
    check_all("NaN in q", 'q', 3 * HEAD_DIM + 5, f32::NAN);
}

#[test]
fn nan_in_a_key_reaches_every_query() {
    check_all("NaN in the first key", 'k', 5, f32::NAN);
    check_all("NaN in the last key", 'k', KEYS * HEAD_DIM - 1, f32::NAN);
}

#[test]
fn nan_and_infinity_in_a_value_stay_in_their_column() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        check_all("in an early value", 'v', 3 * HEAD_DIM + 2, value);
        check_all("in the last value", 'v', KEYS * HEAD_DIM - 1, value);
    }
}

/// Tests an infinite score: plus infinity gives infinity minus infinity, minus infinity gives weight 0.
#[test]
fn infinity_in_a_query_or_a_key() {
    for value in [f32::INFINITY, f32::NEG_INFINITY] {
        check_all("in a query", 'q', 3 * HEAD_DIM + 5, value);
        check_all("in an early key", 'k', 5, value);
        check_all("in the last key", 'k', KEYS * HEAD_DIM - 1, value);
    }
}

/// Tests queries whose scores are all minus infinity. Standard attention gives NaN: such a row differs from one that
/// sees no key.
#[test]
fn scores_that_are_all_minus_infinity() {
    fn set<T: Element>(inputs: &mut Inputs<T>) {
        inputs.q.fill(T::from_f32(1.0));
        inputs.k.fill(T::from_f32(f32::NEG_INFINITY));
    }
    check::<f32>("all scores -inf", set);
    check::<f16>("all scores -inf", set);
    check::<bf16>("all scores -inf", set);
}

/// Tests a first key block without weight before a later one with weight: minus infinity must not have become NaN.
#[test]
fn a_first_block_without_weight() {
    fn set<T: Element>(inputs: &mut Inputs<T>) {
        inputs.q.fill(T::from_f32(1.0));
        inputs.k[..64 * HEAD_DIM].fill(T::from_f32(f32::NEG_INFINITY));
    }
    check::<f32>("first block -inf", set);
    check::<f16>("first block -inf", set);
    check::<bf16>("first block -inf", set);
}

/// Tests that under a causal mask a hidden key does not affect earlier queries.
#[test]
fn hidden_keys_do_not_reach_earlier_queries() {
    let n = 80;
    for device in devices().all() {
        let case = Case::one_head(f32::DTYPE, n, n, HEAD_DIM).with(Attention::new().causal());
        let clean = case.inputs::<f32>();
        let mut spoilt = clean.clone();
        spoilt.k[(n - 1) * HEAD_DIM..].copy_from_slice(&files::normal(HEAD_DIM, 1e30, 9));
        let (clean, spoilt) = (case.run(device, &clean).1, case.run(device, &spoilt).1);
        let before = (n - 1) * HEAD_DIM;
        assert_eq!(clean.out[..before], spoilt.out[..before], "{device}");
        assert_eq!(clean.lse[..n - 1], spoilt.lse[..n - 1], "{device}");
    }
}

/// Tests numbers at the ends of their range: no hang, and every element is written (the harness's NaN would show as
/// one).
#[test]
fn extremes_of_the_range() {
    check::<f16>("largest values", |inputs| inputs.v.fill(f16::from_f32(6e4)));
    check::<bf16>("largest values", |inputs| inputs.v.fill(bf16::from_f32(1.0)));
    check::<f16>("subnormal inputs", |inputs| inputs.q.fill(f16::from_f32(1e-7)));
    check::<f32>("subnormal inputs", |inputs| inputs.q.fill(1e-40));
}
