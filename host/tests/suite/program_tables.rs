//! Programs that read tables, sinks and dropout, without a device: their formulas, their gradients, what is refused.

use flash_attention::error::ProgramError;
use flash_attention::half::{bf16, f16};
use flash_attention::problem::{Outputs, Problem, TensorInfo};
use flash_attention::program::{Dropout, Evaluator, HostTable, Pair, Table};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Dtype, Error, Scalar, Tensor};

use crate::program::numbers;

const BATCH: usize = 2;
const HEADS: usize = 4;
const SEQLEN_Q: usize = 5;
const SEQLEN_K: usize = 6;

fn tensor<T: Scalar>(shape: &[usize], of: impl Fn(usize) -> T) -> Tensor<T> {
    let data: Vec<T> = (0..shape.iter().product()).map(of).collect();
    Tensor::from_slice(&Device::cpu(), shape, &data).expect("a small tensor")
}

fn floats(shape: &[usize], seed: u64) -> Tensor<f32> {
    let data = numbers(shape.iter().product(), seed);
    tensor(shape, |i| data[i] as f32)
}

fn pairs() -> impl Iterator<Item = Pair> {
    (0..BATCH * HEADS * SEQLEN_Q * SEQLEN_K).map(|i| Pair {
        batch: (i / SEQLEN_K / SEQLEN_Q / HEADS) as i32,
        head: (i / SEQLEN_K / SEQLEN_Q % HEADS) as i32,
        kv_head: (i / SEQLEN_K / SEQLEN_Q % HEADS / 2) as i32,
        query: (i / SEQLEN_K % SEQLEN_Q) as i32,
        key: (i % SEQLEN_K) as i32,
        seqlen_q: SEQLEN_Q as i32,
        seqlen_k: SEQLEN_K as i32,
    })
}

fn evaluator(attention: &Attention) -> Evaluator {
    attention.evaluator().expect("a valid program").expect("a program")
}

/// Returns the offset of an index in a table of this shape.
fn at(shape: &[usize], index: &[i32]) -> usize {
    let inside = |size: usize, i: i32| if size == 1 { 0 } else { i as usize };
    shape
        .iter()
        .zip(index)
        .fold(0, |offset, (&size, &i)| offset * size + inside(size, i))
}

#[test]
fn alibi_is_its_formula_for_slopes_of_heads_and_of_batches() {
    for shape in [vec![HEADS], vec![BATCH, HEADS]] {
        let slopes = floats(&shape, 1);
        let values = slopes.to_vec().expect("host memory");
        let evaluator = evaluator(&Attention::new().alibi(&slopes));
        for pair in pairs() {
            let slope = match shape.len() {
                1 => values[pair.head as usize],
                _ => values[at(&shape, &[pair.batch, pair.head])],
            };
            let distance = (pair.query + 1 - pair.key).abs();
            let want = 0.75 - f64::from(slope) * f64::from(distance);
            assert_eq!(evaluator.score(&pair, 0.75, |x| x), want, "{pair:?}");
        }
    }
}

#[test]
fn a_bias_repeats_along_axes_of_one_entry_and_has_any_float_type() {
    let whole = [BATCH, HEADS, SEQLEN_Q, SEQLEN_K];
    for repeats in 0..16 {
        let shape: Vec<usize> = (0..4)
            .map(|axis| if repeats >> axis & 1 == 1 { 1 } else { whole[axis] })
            .collect();
        let values = numbers(shape.iter().product(), 2);
        let (f32s, f16s) = (
            tensor(&shape, |i| values[i] as f32),
            tensor(&shape, |i| f16::from_f64(values[i])),
        );
        let bf16s = tensor(&shape, |i| bf16::from_f64(values[i]));
        let wide = |i: usize| {
            [
                values[i] as f32 as f64,
                f16::from_f64(values[i]).into(),
                bf16::from_f64(values[i]).into(),
            ]
        };
        let attentions = [
            Attention::new().bias(&f32s),
            Attention::new().bias(&f16s),
            Attention::new().bias(&bf16s),
        ];
        for (which, attention) in attentions.iter().enumerate() {
            let evaluator = evaluator(attention);
            for pair in pairs() {
                let index = at(&shape, &[pair.batch, pair.head, pair.query, pair.key]);
                let want = -0.5 + wide(index)[which];
                assert_eq!(evaluator.score(&pair, -0.5, |x| x), want, "{shape:?} {pair:?}");
            }
        }
    }
}

#[test]
fn documents_hide_other_documents() {
    for batch in [1, BATCH] {
        let q = tensor(&[batch, SEQLEN_Q], |i| (i / 2) as i32 - 1);
        let k = tensor(&[1, SEQLEN_K], |i| (i / 3) as i32 - 1);
        let (of_q, of_k) = (q.to_vec().expect("host memory"), k.to_vec().expect("host memory"));
        let evaluator = evaluator(&Attention::new().documents(&q, &k));
        for pair in pairs() {
            let want = of_q[at(&[batch, SEQLEN_Q], &[pair.batch, pair.query])] == of_k[pair.key as usize];
            assert_eq!(evaluator.sees(&pair), want, "{pair:?}");
        }
    }
}

#[test]
fn a_users_table_is_read_at_computed_indices() {
    let bias = floats(&[HEADS, 7], 3);
    let values = bias.to_vec().expect("host memory");
    let order = tensor(&[SEQLEN_K], |i| (SEQLEN_K - 1 - i) as u32);
    let (bias, order) = (Table::<f32, 2>::new(&bias), Table::<u32, 1>::new(&order));
    let (bias, order) = (bias.expect("two axes"), order.expect("one axis"));
    let attention = Attention::new()
        .score(|s, at| s + bias.at(at.head, at.distance().max(-3).min(3) + 3))
        .score(|s, at| s + bias.at_clamped(at.constant(1), order.at(at.key) + 4));
    let evaluator = evaluator(&attention);
    assert_eq!(
        evaluator.program().tables().len(),
        2,
        "a table that is read twice is there once"
    );
    for pair in pairs() {
        let first = values[at(&[HEADS, 7], &[pair.head, (pair.query + 1 - pair.key).clamp(-3, 3) + 3])];
        let second = values[at(&[HEADS, 7], &[1, (SEQLEN_K as i32 - 1 - pair.key + 4).min(6)])];
        let want = 1.5 + f64::from(first) + f64::from(second);
        assert_eq!(evaluator.score(&pair, 1.5, |x| x), want, "{pair:?}");
    }
}

fn problem(attention: &Attention, out: Option<&TensorInfo>) -> Result<Problem, Error> {
    let info = |shape: [usize; 4]| TensorInfo::contiguous(Device::cpu().id(), Dtype::F32, shape, 64).expect("small");
    let (q, k) = (info([BATCH, HEADS, SEQLEN_Q, 8]), info([BATCH, 2, SEQLEN_K, 8]));
    let lse = TensorInfo::contiguous(q.device(), Dtype::F32, [BATCH, HEADS, SEQLEN_Q], 64 << 20).expect("small");
    Problem::new(attention, &q, &k, &k, out.map(|out| Outputs::new(out, &lse)))
}

#[test]
fn bad_tables_are_typed_errors() {
    let bias = floats(&[HEADS, 7], 3);
    let table = Table::<f32, 2>::new(&bias).expect("two axes");
    let refused = [
        (
            Attention::new().score(|s, at| s + table.at(at.head, at.key + 2)),
            "`table` has 7 entries on axis 1, the index reaches 2 ..= 7",
        ),
        (
            Attention::new().score(|s, at| s + table.at(at.batch - 1, at.key)),
            "`table` has 4 entries on axis 0, the index reaches -1 ..= 0",
        ),
        (
            Attention::new().alibi(&floats(&[HEADS - 1], 1)),
            "`alibi_slopes` has 3 entries on axis 0, the index reaches 0 ..= 3",
        ),
        (
            Attention::new().alibi(&floats(&[1, 1, HEADS], 1)),
            "`alibi_slopes` has shape [1, 1, 4], expected [heads] or [batch, heads]",
        ),
        (
            Attention::new().bias(&floats(&[1, 1, SEQLEN_Q, SEQLEN_K - 1], 1)),
            "`bias` has 5 entries on axis 3, the index reaches 0 ..= 5",
        ),
        (
            Attention::new().bias(&floats(&[SEQLEN_Q, SEQLEN_K], 1)),
            "`bias` has shape [5, 6], expected [batch, heads, seqlen_q, seqlen_k], each of them or 1",
        ),
        (
            Attention::new().sinks(&floats(&[HEADS + 1], 1)),
            "`sinks` has shape [5], expected one number for each of the 4 heads of `q`",
        ),
        (
            Attention::new().sinks(&floats(&[1, HEADS], 1)),
            "`sinks` has shape [1, 4], expected [heads]",
        ),
        (
            Attention::new().documents(&tensor(&[SEQLEN_Q], |_| 0), &tensor(&[1, SEQLEN_K], |_| 0)),
            "`documents_q` has shape [5], expected [batch, seqlen_q] or [1, seqlen_q]",
        ),
        (
            Attention::new().documents(&tensor(&[1, SEQLEN_Q], |_| 0), &tensor(&[1, 2], |_| 0)),
            "`documents_k` has 2 entries on axis 1, the index reaches 0 ..= 5",
        ),
        (
            Attention::new().dropout(1.0, 0),
            "`dropout` is 1, expected a probability, at least 0 and below 1",
        ),
        (
            Attention::new().score(|s, at| {
                let tables = (0..17).map(|n| Table::<f32, 1>::new(&floats(&[HEADS], n)).expect("one axis"));
                tables.fold(s, |s, table| s + table.at(at.head))
            }),
            "the score program has more than 16 tables",
        ),
    ];
    for (attention, sentence) in refused {
        let error = problem(&attention, None).expect_err(sentence);
        assert!(matches!(error, Error::Program(_)), "{error:?}");
        assert_eq!(error.to_string(), sentence);
    }
    let error = Table::<f32, 1>::new(&bias).expect_err("it has two axes");
    assert!(
        matches!(error, Error::Program(ProgramError::TableShape { .. })),
        "{error}"
    );
}

#[test]
fn a_table_of_another_device_is_refused_and_so_is_one_that_is_written() {
    let elsewhere = Device::cpu_with_threads(1).expect("a thread");
    let slopes = Tensor::from_slice(&elsewhere, [HEADS], &[0.5_f32; HEADS]).expect("a small tensor");
    let error = problem(&Attention::new().alibi(&slopes), None).expect_err("another device");
    assert!(
        matches!(
            error,
            Error::DeviceMismatch {
                argument: "alibi_slopes",
                ..
            }
        ),
        "{error}"
    );
    let bias = floats(&[1, 1, SEQLEN_Q, SEQLEN_K], 1);
    let shape = [BATCH, HEADS, SEQLEN_Q, 8];
    let out = TensorInfo::contiguous(bias.device().id(), Dtype::F32, shape, bias.address()).expect("small");
    let error = problem(&Attention::new().bias(&bias), Some(&out)).expect_err("out is the bias");
    let names = ("out", "bias");
    assert!(
        matches!(error, Error::Aliased { argument, other } if (argument, other) == names),
        "{error}"
    );
}

#[test]
fn a_sink_takes_its_share_and_has_no_value() {
    let sinks = floats(&[HEADS], 5);
    let attention = Attention::new().sinks(&sinks).causal();
    let (q_shape, k_shape) = ([1, HEADS, 3, 8], [1, HEADS, 2, 8]);
    let dims = Dims::with_program(&attention, q_shape, k_shape, attention.evaluator().expect("a program"));
    let [q, k, v] =
        [(q_shape, 1), (k_shape, 2), (k_shape, 3)].map(|(shape, seed)| numbers(shape.iter().product(), seed));
    let (out, lse) = reference::forward(&dims, &q, &k, &v);
    let plain = Dims::new(&Attention::new().causal(), q_shape, k_shape);
    let (plain_out, plain_lse) = reference::forward(&plain, &q, &k, &v);
    for (row, (&lse, &plain_lse)) in lse.iter().zip(&plain_lse).enumerate() {
        let sink = f64::from(sinks.to_vec().expect("host memory")[row / 3]);
        let want = (plain_lse.exp() + sink.exp()).ln(); // plain_lse is -inf where no key is visible
        assert!((lse - want).abs() < 1e-12, "{row}: {lse} {want}");
        let share = (plain_lse - lse).exp();
        for d in row * 8..row * 8 + 8 {
            assert!((out[d] - share * plain_out[d]).abs() < 1e-12);
        }
    }
}

#[test]
fn dropout_drops_what_its_mask_says_after_normalisation() {
    let dropout = Dropout {
        probability: 0.4,
        seed: 77,
    };
    let attention = Attention::new().dropout(0.4, 77);
    let shape = [2, 1, 20, 8];
    let dims = Dims::new(&attention, shape, shape);
    let [q, k] = [1, 2].map(|seed| numbers(320, seed));
    let ones = vec![1.0; 320];
    let (out, lse) = reference::forward(&dims, &q, &k, &ones);
    let (_, plain_lse) = reference::forward(&Dims::new(&Attention::new(), shape, shape), &q, &k, &ones);
    assert_eq!(lse, plain_lse, "lse is that of all weights");
    let mask = dropout.keep_mask([2, 1, 20, 20]);
    for row in 0..40 {
        let score = |key: usize| -> f64 {
            let dot: f64 = (0..8).map(|d| q[row * 8 + d] * k[(row / 20 * 20 + key) * 8 + d]).sum();
            dot * f64::from(1.0 / 8_f32.sqrt())
        };
        let want: f64 = (0..20)
            .map(|key| f64::from(mask[row * 20 + key]) * (score(key) - lse[row]).exp() / (1.0 - f64::from(0.4_f32)))
            .sum();
        assert!((out[row * 8] - want).abs() < 1e-6, "{row}: {} {want}", out[row * 8]);
    }
    assert!(Attention::new().dropout(0.0, 1).program().expect("valid").is_none());
}

/// A program's evaluator with one element of a table, or of the sinks, moved.
fn moved(evaluator: &Evaluator, table: Option<usize>, element: usize, by: f64) -> Evaluator {
    let mut tables: Vec<HostTable> = evaluator.tables().to_vec();
    let heads = 0..HEADS;
    let mut sinks: Option<Vec<f64>> = heads.map(|head| evaluator.sink(head)).collect();
    match table {
        Some(table) => tables[table].values[element] += by,
        None => sinks.as_mut().expect("sinks")[element] += by,
    }
    Evaluator::new(std::sync::Arc::new(evaluator.program().clone()), tables, sinks)
}

#[test]
fn gradients_of_tables_and_sinks_are_finite_differences() {
    let relative = Table::<f32, 2>::new(&floats(&[HEADS, 7], 3)).expect("two axes");
    let attention = Attention::new()
        .window(4, None)
        .softcap(3.0)
        .bias(&floats(&[1, HEADS, 1, SEQLEN_K], 7))
        .alibi(&floats(&[BATCH, HEADS], 8))
        .sinks(&floats(&[HEADS], 9))
        .documents(
            &tensor(&[1, SEQLEN_Q], |i| i as i32 / 3),
            &tensor(&[1, SEQLEN_K], |i| i as i32 / 4),
        )
        .dropout(0.2, 5)
        .score(|s, at| s * (1.0 + relative.at(at.head, at.distance().max(-3).min(3) + 3)).exp());
    let (q_shape, k_shape) = ([BATCH, HEADS, SEQLEN_Q, 8], [BATCH, 2, SEQLEN_K, 8]);
    let [q, k, v, dout] = [(q_shape, 1), (k_shape, 2), (k_shape, 3), (q_shape, 4)]
        .map(|(shape, seed)| numbers(shape.iter().product(), seed));
    let evaluator = evaluator(&attention);
    let loss = |program: Evaluator, [q, k, v]: [&[f64]; 3]| -> f64 {
        let dims = Dims::with_program(&attention, q_shape, k_shape, Some(program));
        let (out, _) = reference::forward(&dims, q, k, v);
        out.iter().zip(&dout).map(|(x, y)| x * y).sum()
    };
    let dims = Dims::with_program(&attention, q_shape, k_shape, Some(evaluator.clone()));
    let got = reference::backward_with_tables(&dims, &q, &k, &v, &dout, true);
    let step = 1e-5;
    let check = |name: &str, got: f64, at: &dyn Fn(f64) -> f64| {
        let want = (at(step) - at(-step)) / (2.0 * step);
        assert!((got - want).abs() < 1e-6, "{name}: {got} {want}");
    };
    let inputs = || [&q[..], &k, &v];
    let mut checked = 0;
    for (table, gradient) in got.tables.iter().enumerate() {
        let element_type = evaluator.program().tables()[table].element;
        for (element, &got) in gradient.iter().enumerate() {
            if element_type.is_float() {
                checked += 1;
                let name = format!("{:?} {element}", evaluator.program().tables()[table]);
                check(&name, got, &|by| {
                    loss(moved(&evaluator, Some(table), element, by), inputs())
                });
            } else {
                assert_eq!(got, 0.0);
            }
        }
    }
    assert_eq!(checked, HEADS * 7 + HEADS * SEQLEN_K + BATCH * HEADS);
    for (head, &got) in got.sinks.as_ref().expect("sinks").iter().enumerate() {
        check("sinks", got, &|by| loss(moved(&evaluator, None, head, by), inputs()));
    }
    for (which, gradient) in [&got.dq, &got.dk, &got.dv].into_iter().enumerate() {
        for element in (0..gradient.len()).step_by(11) {
            check("input", gradient[element], &|by| {
                let mut changed = [q.clone(), k.clone(), v.clone()];
                changed[which][element] += by;
                let [q, k, v] = &changed;
                loss(evaluator.clone(), [q, k, v])
            });
        }
    }
}

#[test]
fn standard_gradients_in_f32_are_close_to_the_oracle() {
    let attention = Attention::new()
        .softcap(3.0)
        .bias(&floats(&[BATCH, 1, SEQLEN_Q, SEQLEN_K], 7))
        .sinks(&floats(&[HEADS], 9))
        .dropout(0.2, 5);
    let (q_shape, k_shape) = ([BATCH, HEADS, SEQLEN_Q, 8], [BATCH, 2, SEQLEN_K, 8]);
    let dims = Dims::with_program(&attention, q_shape, k_shape, Some(evaluator(&attention)));
    let wide = [(q_shape, 1), (k_shape, 2), (k_shape, 3), (q_shape, 4)].map(|(shape, seed)| {
        numbers(shape.iter().product(), seed)
            .iter()
            .map(|&x| f64::from(x as f32))
            .collect::<Vec<_>>()
    });
    let narrow = wide
        .clone()
        .map(|tensor| tensor.iter().map(|&x| x as f32).collect::<Vec<_>>());
    let want = reference::backward_with_tables(&dims, &wide[0], &wide[1], &wide[2], &wide[3], true);
    let got = reference::standard_backward_with_tables(&dims, &narrow[0], &narrow[1], &narrow[2], &narrow[3], true);
    let close = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(x, y)| (x - y).abs() < 1e-5);
    for (got, want) in [(&got.dq, &want.dq), (&got.dk, &want.dk), (&got.dv, &want.dv)] {
        assert!(close(&got.iter().map(|&x| x.into()).collect::<Vec<_>>(), want));
    }
    assert!(got.tables.iter().zip(&want.tables).all(|(got, want)| close(got, want)));
    assert!(close(&got.sinks.expect("sinks"), &want.sinks.expect("sinks")));
    let (out, lse) = reference::standard(&dims, &narrow[0], &narrow[1], &narrow[2]);
    let (want_out, want_lse) = reference::forward(&dims, &wide[0], &wide[1], &wide[2]);
    assert!(close(&out.iter().map(|&x| x.into()).collect::<Vec<_>>(), &want_out));
    assert!(close(&lse.iter().map(|&x| x.into()).collect::<Vec<_>>(), &want_lse));
}
