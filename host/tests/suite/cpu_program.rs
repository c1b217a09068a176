//! Score programs on the CPU, with every instruction set, against the oracle.

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Element, Tensor};
use half::{bf16, f16};

use crate::common::{self, instruction_sets, largest_error, noise};

fn check<T: Element>(attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    for device in instruction_sets() {
        common::check::<T>(device, attention.clone(), q_shape, k_shape);
    }
}

/// Programs without tables, each with a name.
fn programs() -> Vec<(&'static str, Attention)> {
    let new = Attention::new;
    vec![
        ("causal of a program", new().causal().score(|s, _| s * 0.5)),
        ("window", new().window(20, 7)),
        ("left window", new().causal().window(33, None)),
        ("softcap", new().softcap(1.5)),
        ("prefix", new().prefix(9)),
        ("chunked", new().chunked(16)),
        ("dilated", new().dilated(3)),
        ("top left", new().top_left()),
        ("distance", new().score(|s, at| s - 0.05 * at.distance().abs())),
        (
            "of heads",
            new().score(|s, at| s * (at.head + 1).to_score() - at.batch.to_score()),
        ),
        (
            "every operation",
            new().score(|s, at| {
                let x = (s.abs() + 1.0).log() + (s * 0.1).exp() - s.min(0.3).max(-0.4);
                x * (s * s + 0.5).sqrt().reciprocal() + ((at.key / 7) % 5).to_score() * 0.1
            }),
        ),
        (
            "everything",
            new()
                .causal()
                .window(40, None)
                .softcap(2.0)
                .score(|s, at| s - 0.03 * at.distance())
                .mask(|at| !at.key.equals(5) | at.query.less_than(3)),
        ),
    ]
}

#[test]
fn programs_without_tables() {
    for (name, attention) in programs() {
        println!("{name}");
        check::<f32>(attention.clone(), [2, 4, 61, 24], [2, 2, 83, 24]);
        check::<bf16>(attention.clone(), [1, 2, 133, 64], [1, 1, 150, 64]);
        check::<f16>(attention, [1, 2, 133, 64], [1, 1, 70, 64]);
    }
}

/// What a mask hides reaches no result, whatever it is; what it shows goes where arithmetic takes it.
#[test]
fn hidden_keys_that_are_not_finite() {
    let shape = [1, 1, 150, 8];
    let base: Vec<f32> = noise(150 * 8, 11).into_iter().map(|x| x as f32).collect();
    let masks = [
        Attention::new().window(3, 2),
        Attention::new().dilated(4),
        Attention::new().mask(|at| !at.key.equals(70)),
        Attention::new()
            .softcap(2.0)
            .causal()
            .mask(|at| at.query.less_than(70) | at.key.less_than(60)),
    ];
    for device in instruction_sets() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (attention, row) in masks.iter().flat_map(|mask| [0, 70, 149].map(|row| (mask, row))) {
                let mut odd = base.clone();
                odd[row * 8 + 3] = value;
                for (k, v) in [(&odd, &base), (&base, &odd)] {
                    let tensor = |data: &[f32]| Tensor::from_slice(device, shape, data).expect("small");
                    let output = attention
                        .forward(&tensor(&base), &tensor(k), &tensor(v))
                        .expect("valid");
                    let widen = |data: &[f32]| data.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
                    let dims = Dims::new(attention, shape, shape);
                    let (out, lse) = reference::forward(&dims, &widen(&base), &widen(k), &widen(v));
                    let (got, got_lse) = (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"));
                    let case = format!("{device}, {attention:?}, {value} in row {row}");
                    assert!(largest_error(&got, &out) < 1e-5, "{case}");
                    assert!(largest_error(&got_lse, &lse) < 1e-5, "{case}");
                }
            }
        }
    }
}

/// A query that sees no key has out 0 and lse -inf.
#[test]
fn queries_that_see_nothing() {
    let attention = Attention::new().mask(|at| at.query.less_than(3) & at.key.less_than(40));
    check::<f32>(attention.clone(), [1, 2, 50, 16], [1, 1, 130, 16]);
    check::<bf16>(attention, [1, 2, 50, 64], [1, 1, 130, 64]);
}

/// Many tiles of keys, most of which no query of a tile sees, in segments that tasks share.
#[test]
fn tiles_that_nobody_sees_are_skipped() {
    for attention in [
        Attention::new().window(100, 30),
        Attention::new().chunked(700),
        Attention::new().mask(|at| (at.key / 64).equals((at.query * 7) % 61)),
    ] {
        check::<f32>(attention.clone(), [1, 1, 90, 16], [1, 1, 5000, 16]);
        check::<bf16>(attention, [1, 1, 500, 32], [1, 1, 3000, 32]);
    }
}

#[test]
fn few_queries_of_a_program() {
    for attention in [
        Attention::new().window(9, None).softcap(3.0),
        Attention::new().causal().dilated(2),
    ] {
        check::<f32>(attention.clone(), [2, 6, 1, 24], [2, 2, 150, 24]);
        check::<f16>(attention, [1, 4, 3, 64], [1, 1, 333, 64]);
    }
}
