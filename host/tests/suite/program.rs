//! Score programs without a device: what closures are traced to, what the named features mean, what is refused.

use flash_attention::error::ProgramError;
use flash_attention::problem::{BackwardInputs, BackwardProblem, Problem, TensorInfo};
use flash_attention::program::{At, Evaluator, Pair, Score};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Dtype, Error};

const SEQLENS: [(i32, i32); 3] = [(9, 9), (5, 12), (12, 5)];

fn evaluator(attention: &Attention) -> Evaluator {
    let program = attention.program().expect("a valid program").expect("a program");
    Evaluator::new(program.clone(), Vec::new(), None)
}

fn pairs() -> impl Iterator<Item = Pair> {
    SEQLENS.into_iter().flat_map(|(seqlen_q, seqlen_k)| {
        (0..seqlen_q * seqlen_k).map(move |i| Pair {
            batch: i % 3,
            head: i % 4,
            kv_head: i % 4 / 2,
            query: i / seqlen_k,
            key: i % seqlen_k,
            seqlen_q,
            seqlen_k,
        })
    })
}

/// Evaluates a program of one closure.
fn score(f: impl for<'g> FnOnce(Score<'g>, At<'g>) -> Score<'g>) -> impl Fn(&Pair, f64) -> f64 {
    let evaluator = evaluator(&Attention::new().score(f));
    move |pair, s| evaluator.score(pair, s, |x| x)
}

#[test]
fn named_masks_are_their_formulas() {
    type Formula = fn(i32, &Pair) -> bool; // of p and the pair
    let cases: [(&str, Attention, Formula); 9] = [
        ("window(3, 1)", Attention::new().window(3, 1), |p, at| {
            p - 3 <= at.key && at.key <= p + 1
        }),
        ("window(2, None)", Attention::new().window(2, None), |p, at| {
            p - 2 <= at.key
        }),
        ("window(None, 0)", Attention::new().window(None, 0), |p, at| at.key <= p),
        (
            "window(huge)",
            Attention::new().window(usize::MAX, usize::MAX),
            |_, _| true,
        ),
        ("prefix(4)", Attention::new().prefix(4), |p, at| {
            at.key < 4 || at.key <= p
        }),
        ("chunked(3)", Attention::new().chunked(3), |p, at| {
            at.key <= p && at.key.div_euclid(3) == p.div_euclid(3)
        }),
        ("dilated(2)", Attention::new().dilated(2), |p, at| {
            (p - at.key).rem_euclid(2) == 0
        }),
        ("top_left", Attention::new().top_left(), |_, at| at.key <= at.query),
        (
            "window and dilated",
            Attention::new().window(5, 0).dilated(3),
            |p, at| p - 5 <= at.key && at.key <= p && (p - at.key) % 3 == 0,
        ),
    ];
    for (name, attention, formula) in cases {
        let evaluator = evaluator(&attention);
        for pair in pairs() {
            let p = pair.query + pair.seqlen_k - pair.seqlen_q;
            assert_eq!(evaluator.sees(&pair), formula(p, &pair), "{name}: {pair:?}");
        }
    }
    assert_eq!(Attention::new().window(None, None), Attention::new());
}

#[test]
fn scores_pass_in_the_documented_order() {
    let attention = Attention::new()
        .score(|s, _| s + 1.0)
        .softcap(2.0)
        .score(|s, _| s * 10.0);
    let evaluator = evaluator(&attention);
    for s in [-30.0, -1.0, 0.0, 0.5, 3.0] {
        let got = evaluator.score(&pairs().next().expect("a pair"), s, |x| x);
        assert!((got - (2.0 * (s / 2.0).tanh() + 1.0) * 10.0).abs() < 1e-6, "{s}: {got}");
    }
}

#[test]
fn every_operation_does_what_it_says() {
    let each = |f: &dyn Fn(&Pair, f64) -> f64, want: &dyn Fn(&Pair, f64) -> f64| {
        for pair in pairs() {
            for s in [-2.5, -1.0, 0.25, 3.75] {
                let (got, want) = (f(&pair, s), want(&pair, s));
                assert!(
                    got == want || (got - want).abs() < 1e-6 || got.is_nan() && want.is_nan(),
                    "{got} {want}"
                );
            }
        }
    };
    let real = |x: i32| f64::from(x);
    each(&score(|s, _| -s.abs() + 1.5 * s - s / 4.0), &|_, s| {
        -s.abs() + 1.5 * s - s / 4.0
    });
    each(&score(|s, _| s.exp() + s.tanh() + s.floor()), &|_, s| {
        s.exp() + s.tanh() + s.floor()
    });
    each(&score(|s, _| s.sqrt() * s.log() + s.reciprocal()), &|_, s| {
        s.sqrt() * s.ln() + 1.0 / s
    });
    each(&score(|s, _| s.min(0.5) - (2.0 - s).max(s)), &|_, s| {
        s.min(0.5) - (2.0 - s).max(s)
    });
    each(&score(|s, at| s * at.head + at.kv_head - s), &|at, s| {
        s * real(at.head) + real(at.kv_head) - s
    });
    each(&score(|s, at| (at.query - at.key).abs() + s), &|at, s| {
        real((at.query - at.key).abs()) + s
    });
    each(
        &score(|s, at| s + (at.distance() / 3 + at.distance_top_left() % 4)),
        &|at, s| {
            let p = at.query + at.seqlen_k - at.seqlen_q;
            s + real((p - at.key).div_euclid(3) + (at.query - at.key).rem_euclid(4))
        },
    );
    each(
        &score(|s, at| s + ((at.key << 2 | 1) ^ (at.query & 6) ^ !(at.batch >> 1))),
        &|at, s| s + real((at.key << 2 | 1) ^ (at.query & 6) ^ !(at.batch >> 1)),
    );
    each(&score(|s, at| s + s.to_index().min(2).max(-at.key * 2)), &|at, s| {
        s + real((s.floor() as i32).min(2).max(-at.key * 2))
    });
    each(
        &score(|s, at| {
            let odd = (at.key % 2).equals(1) ^ at.query.greater_than(at.key);
            let near = !at.query.at_least(4) | s.less_than(0.0) & s.at_most(s);
            (odd & near).select(s, odd.select(at.batch, 7).to_score())
        }),
        &|at, s| {
            let odd = (at.key % 2 == 1) ^ (at.query > at.key);
            let near = at.query < 4 || s < 0.0;
            if odd && near {
                s
            } else {
                real(if odd { at.batch } else { 7 })
            }
        },
    );
    each(
        &score(|s, at| (at.key.differs_from(at.query) & true).select(s, f32::NEG_INFINITY)),
        &|at, s| if at.key == at.query { f64::NEG_INFINITY } else { s },
    );
}

#[test]
fn a_changed_number_is_the_same_program_text() {
    let [a, b] = [(30.0, 4), (50.0, 1024)].map(|(cap, keys)| Attention::new().softcap(cap).window(keys, 0));
    let [a, b] = [&a, &b].map(|attention| attention.program().expect("valid").expect("a program"));
    assert_eq!(a.expression(), b.expression());
    assert_ne!(a, b);
    assert_ne!(a.constants(), b.constants());
}

#[test]
fn a_causal_mask_joins_the_others() {
    let attention = Attention::new().window(2, None);
    let program = attention.program().expect("valid").expect("a program");
    let both = Evaluator::new(program.with_causal_mask().into(), Vec::new(), None);
    for pair in pairs() {
        let p = pair.query + pair.seqlen_k - pair.seqlen_q;
        assert_eq!(both.sees(&pair), p - 2 <= pair.key && pair.key <= p);
    }
}

fn info(shape: [usize; 4]) -> TensorInfo {
    TensorInfo::contiguous(Device::cpu().id(), Dtype::F32, shape, 64).expect("a small tensor")
}

fn problem(attention: &Attention) -> Result<Problem, Error> {
    let q = info([1, 2, 8, 8]);
    Problem::new(attention, &q, &q, &q, None)
}

#[test]
fn bad_programs_are_typed_errors() {
    let refused = [
        (
            Attention::new().softcap(0.0),
            "`softcap` is 0, expected a finite number above 0",
        ),
        (
            Attention::new().softcap(f32::NAN),
            "`softcap` is NaN, expected a finite number above 0",
        ),
        (Attention::new().chunked(0), "`chunked` is 0, expected at least 1"),
        (Attention::new().dilated(0), "`dilated` is 0, expected at least 1"),
        (
            Attention::new().score(|s, at| s + at.key / -2),
            "the score program divides an index by -2, expected a number above 0",
        ),
        (
            Attention::new().score(|s, at| (0..5000).fold(s, |s, _| s + at.key)),
            "the score program has more than 4096 operations",
        ),
        (
            Attention::new().score(|s, _| (0..300).fold(s, |s, _| s + 1.0)),
            "the score program has more than 256 numbers",
        ),
    ];
    for (attention, sentence) in refused {
        let error = problem(&attention).expect_err(sentence);
        assert!(matches!(error, Error::Program(_)), "{error:?}");
        assert_eq!(error.to_string(), sentence);
    }
}

#[test]
fn what_has_no_derivative_is_refused_in_backward_only() {
    let attention = Attention::new().score(|s, _| s + s.floor());
    problem(&attention).expect("forward needs no derivative");
    let (q, lse) = (info([1, 2, 8, 8]), info([1, 2, 8, 1]));
    let lse = TensorInfo::contiguous(q.device(), Dtype::F32, [1, 2, 8], lse.address()).expect("a small tensor");
    let inputs = BackwardInputs::new(&q, &lse, &q);
    let error = BackwardProblem::new(&attention, &q, &q, &q, inputs, None).expect_err("floor");
    let operation = "floor";
    assert!(
        matches!(
            error,
            Error::Program(ProgramError::NotDifferentiable { operation: "floor" })
        ),
        "{operation}: {error}"
    );
    let of_coordinates = Attention::new().score(|s, at| s * (0.5 * at.key).floor());
    BackwardProblem::new(&of_coordinates, &q, &q, &q, inputs, None).expect("floor of a coordinate is a constant");
}

/// Numbers without a pattern, in -1 .. 1.
pub fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as f64 / (1_u64 << 30) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn gradients_are_finite_differences_through_every_differentiable_operation() {
    let programs = [
        Attention::new().softcap(0.7),
        Attention::new().score(|s, at| s - 0.25 * at.distance().abs()),
        Attention::new().score(|s, _| (2.0 + s).log() + (s * 0.5).exp() + (3.0 + s).sqrt()),
        Attention::new().score(|s, _| (s + 2.0).reciprocal() * s - (s * s) / (2.5 - s) - (-s).tanh()),
        Attention::new().score(|s, _| s.abs() + s.min(0.1) * s.max(s * s - 0.2)),
        Attention::new().score(|s, at| (at.key % 2).equals(0).select(s * s, 0.5 * s).tanh() / 0.3),
        Attention::new()
            .score(|s, at| s.at_least(0.0).select(s.sqrt(), 0.1 * s) + at.key)
            .causal(),
        Attention::new()
            .score(|s, at| at.key.equals(at.query).select(f32::NEG_INFINITY, s))
            .window(3, 2),
    ];
    let (q_shape, k_shape) = ([2, 4, 5, 8], [2, 2, 6, 8]);
    let tensor = |shape: [usize; 4], seed| numbers(shape.iter().product(), seed);
    let [q, k, v] = [(q_shape, 1), (k_shape, 2), (k_shape, 3)].map(|(shape, seed)| tensor(shape, seed));
    let dout = tensor(q_shape, 4);
    for attention in programs {
        let dims = Dims::new(&attention, q_shape, k_shape);
        let loss = |[q, k, v]: [&[f64]; 3]| -> f64 {
            let (out, _) = reference::forward(&dims, q, k, v);
            out.iter().zip(&dout).map(|(x, y)| x * y).sum()
        };
        let gradients = reference::backward(&dims, &q, &k, &v, &dout);
        let inputs = [&q, &k, &v];
        for (which, gradient) in gradients.iter().enumerate() {
            for element in (0..gradient.len()).step_by(7) {
                let step = 1e-5;
                let at = |moved: f64| {
                    let mut changed = inputs.map(|tensor| tensor.clone());
                    changed[which][element] += moved;
                    let [q, k, v] = &changed;
                    loss([q, k, v])
                };
                let want = (at(step) - at(-step)) / (2.0 * step);
                let got = gradient[element];
                assert!(
                    (got - want).abs() < 1e-6,
                    "{attention:?} {which} {element}: {got} {want}"
                );
            }
        }
    }
}

#[test]
fn a_value_not_taken_has_no_influence_on_a_gradient() {
    // The derivative of log at 0 is infinite, and 0 times infinity would be NaN.
    let attention = Attention::new().score(|s, _| s.greater_than(0.0).select(s.log(), s));
    let dims = Dims::new(&attention, [1, 1, 2, 8], [1, 1, 2, 8]);
    let zeros = vec![0.0; 16];
    let gradients = reference::backward(&dims, &zeros, &zeros, &numbers(16, 1), &numbers(16, 2));
    assert!(gradients.iter().flatten().all(|x| x.is_finite()));
}
