//! Score programs on the CPU, with every instruction set, against the oracle.

use flash_attention::program::Table;
use flash_attention::reference;
use flash_attention::{Attention, Device, Element, Tensor};
use half::{bf16, f16};

use crate::common::{self, instruction_sets, largest_error, noise};

/// Forward and backward with every instruction set; programs are of a device, as their tables are.
fn check_on_all<T: Element>(of: impl Fn(&Device) -> Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    for device in instruction_sets() {
        common::check::<T>(device, of(device), q_shape, k_shape);
        common::check_backward::<T>(device, of(device), q_shape, k_shape);
    }
}

fn check<T: Element>(attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    check_on_all::<T>(|_| attention.clone(), q_shape, k_shape);
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
        ("dropout", new().dropout(0.3, 77)),
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
                .mask(|at| !at.key.equals(5) | at.query.less_than(3))
                .dropout(0.2, 5),
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

/// A tensor of numbers that look random, on a device.
fn floats<T: Element>(device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
    let data: Vec<T> = noise(shape.iter().product(), seed)
        .into_iter()
        .map(T::from_f64)
        .collect();
    Tensor::from_slice(device, shape, &data).expect("small")
}

/// Document ids that grow along a sequence.
fn documents(device: &Device, [batch, seqlen]: [usize; 2], length: usize) -> Tensor<i32> {
    let ids: Vec<i32> = (0..batch * seqlen).map(|i| (i % seqlen / length) as i32).collect();
    Tensor::from_slice(device, [batch, seqlen], &ids).expect("small")
}

/// A program with tables of every kind, of a device and the shapes of q and k.
type Tabled = fn(&Device, [usize; 4], [usize; 4]) -> Attention;

const TABLED: [(&str, Tabled); 9] = [
    ("ALiBi", |device, q, _| {
        Attention::new().causal().alibi(&floats::<f32>(device, &[q[1]], 31))
    }),
    ("ALiBi of batches", |device, q, _| {
        Attention::new().alibi(&floats::<f32>(device, &q[..2], 32))
    }),
    ("bias", |device, q, k| {
        Attention::new().bias(&floats::<f32>(device, &[q[0], q[1], q[2], k[2]], 33))
    }),
    ("bias of bf16, repeated", |device, q, k| {
        Attention::new()
            .window(30, 9)
            .bias(&floats::<bf16>(device, &[1, q[1], 1, k[2]], 34))
    }),
    ("bias of f16, of queries", |device, q, _| {
        Attention::new().bias(&floats::<f16>(device, &[q[0], 1, q[2], 1], 35))
    }),
    ("documents", |device, q, k| {
        Attention::new().documents(&documents(device, [1, q[2]], 23), &documents(device, [q[0], k[2]], 31))
    }),
    ("sinks", |device, q, _| {
        Attention::new().causal().sinks(&floats::<f32>(device, &[q[1]], 36))
    }),
    // So large that runs of keys add to its gradient in place, and its last column is of most keys.
    ("clamped", |device, _, _| {
        let table = Table::<f32, 2>::new(&floats::<f32>(device, &[300, 120], 42)).expect("a table");
        Attention::new().score(move |s, at| s + table.at_clamped(at.query, at.key))
    }),
    ("all", |device, q, k| {
        let relative = Table::<f32, 2>::new(&floats::<f32>(device, &[q[1], 9], 37)).expect("a table");
        Attention::new()
            .causal()
            .window(70, None)
            .softcap(3.0)
            .alibi(&floats::<f32>(device, &[q[1]], 38))
            .bias(&floats::<f32>(device, &[1, q[1], q[2], k[2]], 39))
            .sinks(&floats::<f32>(device, &[q[1]], 40))
            .documents(&documents(device, [1, q[2]], 61), &documents(device, [1, k[2]], 61))
            .score(move |s, at| s + relative.at(at.head, at.distance().min(4).max(-4) + 4))
            .dropout(0.1, 41)
    }),
];

#[test]
fn programs_with_tables() {
    for (name, of) in TABLED {
        println!("{name}");
        let (q, k) = ([2, 4, 61, 24], [2, 2, 83, 24]);
        check_on_all::<f32>(|device| of(device, q, k), q, k);
        let (q, k) = ([1, 2, 133, 64], [1, 1, 150, 64]);
        check_on_all::<bf16>(|device| of(device, q, k), q, k);
        check_on_all::<f16>(|device| of(device, q, k), q, k);
    }
}

/// The gradients of all tables and sinks of a program on a device, in the program's order, the sinks last.
fn table_gradients(device: &Device, attention: &Attention, q: [usize; 4], k: [usize; 4]) -> Vec<Vec<f32>> {
    let [queries, keys, values, dout] =
        [(q, 1), (k, 2), (k, 3), (q, 4)].map(|(shape, seed)| floats::<f32>(device, &shape, seed));
    let output = attention.forward(&queries, &keys, &values).expect("valid");
    let gradients = attention
        .backward(&queries, &keys, &values, &output, &dout)
        .expect("valid");
    let all = gradients.tables().map(|gradient| gradient.to_vec().expect("cpu"));
    all.collect()
}

#[test]
fn gradients_of_tables() {
    for (name, of) in TABLED {
        let (q, k) = ([2, 4, 61, 24], [2, 2, 83, 24]);
        for device in instruction_sets() {
            let attention = of(device, q, k).table_gradients();
            let got = table_gradients(device, &attention, q, k);
            let dims = common::dims(&attention, q, k);
            let draw = |shape: [usize; 4], seed| {
                let data = noise(shape.iter().product(), seed);
                data.into_iter().map(|x| f64::from(x as f32)).collect::<Vec<f64>>()
            };
            let [queries, keys, values, dout] = [(q, 1), (k, 2), (k, 3), (q, 4)].map(|(shape, seed)| draw(shape, seed));
            let want = reference::backward_with_tables(&dims, &queries, &keys, &values, &dout, true);
            let floats = attention.program().expect("valid").expect("a program").clone();
            let wanted: Vec<&Vec<f64>> = (floats.tables().iter().zip(&want.tables))
                .filter(|(table, _)| table.element.is_float())
                .map(|(_, gradient)| gradient)
                .chain(&want.sinks)
                .collect();
            assert_eq!(got.len(), wanted.len(), "{name}");
            for (got, want) in got.iter().zip(wanted) {
                let largest = want.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
                let error = largest_error(got, want);
                assert!(
                    error <= 2e-6 + 1e-5 * largest,
                    "{device}, {name}: off by {error:e} of {largest:e}"
                );
            }
        }
    }
}

/// Sums over heads, and over tasks that take turns, are the same bits on any number of threads.
#[test]
fn gradients_of_tables_do_not_depend_on_threads() {
    for (name, of) in TABLED {
        let (q, k) = ([2, 4, 300, 16], [2, 2, 600, 16]);
        let run = |threads| {
            let device = Device::cpu_with_threads(threads).expect("threads");
            table_gradients(&device, &of(&device, q, k).table_gradients(), q, k)
        };
        let one = run(1);
        assert!(run(2) == one && run(5) == one, "{name}");
    }
}

/// Numbers that are not finite have no effect where a mask hides them; visible ones have the effect of the formula.
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
    let mut backward = 0;
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
                    let dims = common::dims(attention, shape, shape);
                    let (out, lse) = reference::forward(&dims, &widen(&base), &widen(k), &widen(v));
                    let (got, got_lse) = (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"));
                    let case = format!("{device}, {attention:?}, {value} in row {row}");
                    assert!(largest_error(&got, &out) < 1e-5, "{case}");
                    assert!(largest_error(&got_lse, &lse) < 1e-5, "{case}");
                    if got_lse.iter().any(|lse| lse.is_nan()) {
                        continue; // which backward refuses
                    }
                    backward += 1;
                    let got = common::gradients(device, attention.clone(), [shape; 2], [&base, k, v, &base]);
                    let want = reference::backward(&dims, &widen(&base), &widen(k), &widen(v), &widen(&base));
                    for (got, want) in got.iter().zip(&want) {
                        let error = largest_error(got, want);
                        assert!(error < 1e-4, "{case}: gradients are off by {error:e}");
                    }
                }
            }
        }
    }
    assert!(backward > 30 * instruction_sets().len(), "{backward}");
}

/// Hidden values change no bit of an output, with products of f32: an infinity in a tile has the sums of the tile made pair
/// by pair, in the same order.
#[test]
fn hidden_values_leave_no_trace() {
    let shape = [1, 1, 150, 8];
    let base: Vec<f32> = noise(150 * 8, 11).into_iter().map(|x| x as f32).collect();
    // AMX makes sums of bf16 parts where all values are finite, in another order.
    for device in instruction_sets()
        .iter()
        .filter(|device| !device.name().contains("AMX"))
    {
        for attention in [Attention::new().causal(), Attention::new().window(90, 7)] {
            let tensor = |data: &[f32]| Tensor::from_slice(device, shape, data).expect("small");
            let out = |attention: &Attention, v: &[f32]| {
                let output = attention.forward(&tensor(&base), &tensor(&base), &tensor(v));
                output.expect("valid").out.to_vec().expect("cpu")
            };
            let mut odd = base.clone();
            odd[140 * 8..141 * 8].fill(f32::INFINITY);
            // Queries up to 132 see no key past 139.
            let unseeing = ..133 * 8;
            let (finite, infinite) = (out(&attention, &base), out(&attention, &odd));
            assert!(finite[unseeing] == infinite[unseeing], "{device}, {attention:?}");
            assert!(infinite[140 * 8].is_infinite(), "{device}, {attention:?}");
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

/// Without keys, lse is that of the sink.
#[test]
fn sinks_alone() {
    for device in instruction_sets() {
        let attention = Attention::new().sinks(&floats::<f32>(device, &[3], 1));
        common::check::<f32>(device, attention, [2, 3, 4, 8], [2, 1, 0, 8]);
    }
}
