//! Ragged batches: each sequence of a packed batch has the results of a call with that sequence alone, to the bit.

use flash_attention::error::Error;
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Dtype, Element, Gradients, Output, Sequences, Tensor};
use flash_attention_tests::{backward_alone, devices, drawn, files, for_dtype, forward_alone};
use proptest::prelude::*;

/// A packed batch: lengths of queries, keys and keys that count, a sequence each, with rows that belong to none behind them.
#[derive(Clone, Debug)]
struct Ragged {
    lens: Vec<(usize, usize, usize)>,
    rest: (usize, usize),
    heads: (usize, usize),
    head_dim: usize,
    /// head_dim of v and out.
    head_dim_v: usize,
    dtype: Dtype,
    causal: bool,
    feature: Feature,
    seed: u64,
}

/// Feature of a batch's attention beside its mask.
#[derive(Clone, Copy, Debug)]
enum Feature {
    None,
    NegativeScale,
    Softcap,
    Window,
    MaskOfHeads,
    Sinks,
}

impl Ragged {
    fn attention(&self, device: &Device) -> Attention {
        let attention = Attention::new().deterministic().batch_invariant();
        let attention = if self.causal { attention.causal() } else { attention };
        match self.feature {
            Feature::None => attention,
            Feature::NegativeScale => attention.softmax_scale(-0.2),
            Feature::Softcap => attention.softcap(1.5),
            Feature::Window => attention.window(20, 3),
            Feature::MaskOfHeads => attention.mask(|at| at.key.less_than(at.head * 40 + 10)),
            Feature::Sinks => {
                let logits: Vec<f32> = (0..self.heads.0).map(|head| head as f32 - 1.0).collect();
                attention.sinks(&Tensor::from_slice(device, [self.heads.0], &logits).expect("it fits"))
            }
        }
    }

    /// Offsets of the sequences in q and in k, and the end of the last one.
    fn offsets(&self) -> (Vec<usize>, Vec<usize>) {
        let (mut q, mut k) = (vec![0], vec![0]);
        for &(seqlen_q, seqlen_k, _) in &self.lens {
            q.push(q[q.len() - 1] + seqlen_q);
            k.push(k[k.len() - 1] + seqlen_k);
        }
        (q, k)
    }

    fn sequences(&self) -> Sequences {
        let as_i32 = |offsets: &[usize]| -> Vec<i32> { offsets.iter().map(|&x| x as i32).collect() };
        let (q, k) = self.offsets();
        let used: Vec<usize> = self.lens.iter().map(|&(.., used)| used).collect();
        let sequences = Sequences::new(&as_i32(&q), &as_i32(&k)).expect("offsets grow");
        sequences.seqused_k(&as_i32(&used)).expect("no more than there are")
    }

    /// Rows of q, and of k.
    fn totals(&self) -> (usize, usize) {
        let (q, k) = self.offsets();
        (q[self.lens.len()] + self.rest.0, k[self.lens.len()] + self.rest.1)
    }

    fn check<T: Element>(&self, device: &Device) {
        let (offsets_q, offsets_k) = self.offsets();
        let (total_q, total_k) = self.totals();
        let row_q = self.heads.0 * self.head_dim;
        let (row_k, row_v) = (self.heads.1 * self.head_dim, self.heads.1 * self.head_dim_v);
        let data = |len, seed| -> Vec<T> {
            let numbers = files::normal(len, 1.0, self.seed * 5 + seed);
            numbers.into_iter().map(T::from_f32).collect()
        };
        let (q, dout) = (
            data(total_q * row_q, 0),
            data(total_q * self.heads.0 * self.head_dim_v, 3),
        );
        let (mut k, mut v) = (data(total_k * row_k, 1), data(total_k * row_v, 2));
        // Keys that do not count are never read.
        for (i, &(_, seqlen_k, used)) in self.lens.iter().enumerate() {
            for row in offsets_k[i] + used..offsets_k[i] + seqlen_k {
                k[row * row_k..][..row_k].fill(T::from_f32(f32::NAN));
                v[row * row_v..][..row_v].fill(T::from_f32(f32::INFINITY));
            }
        }
        let packed = |rows: usize, heads: usize, head_dim: usize, data: &[T]| {
            Tensor::from_slice(device, [rows, heads, head_dim], data).expect("it fits")
        };
        let (head_dim, head_dim_v) = (self.head_dim, self.head_dim_v);
        let [tq, tdout] =
            [(&q, head_dim), (&dout, head_dim_v)].map(|(data, width)| packed(total_q, self.heads.0, width, data));
        let [tk, tv] =
            [(&k, head_dim), (&v, head_dim_v)].map(|(data, width)| packed(total_k, self.heads.1, width, data));
        let (attention, sequences) = (self.attention(device), self.sequences());
        let output = attention
            .forward_ragged(&tq, &tk, &tv, &sequences)
            .unwrap_or_else(|error| panic!("{device}: {error}\n{self:?}"));
        let gradients = attention
            .backward_ragged(&tq, &tk, &tv, &output, &tdout, &sequences)
            .unwrap_or_else(|error| panic!("{device}: {error}\n{self:?}"));

        let mut expected = Expected::new(self, total_q, total_k);
        for (i, &(seqlen_q, _, used)) in self.lens.iter().enumerate() {
            let of_heads = |data: &[T], first: usize, [heads, len, head_dim]: [usize; 3]| -> Vec<T> {
                let at = move |head, position| ((first + position) * heads + head) * head_dim;
                (0..heads)
                    .flat_map(|head| {
                        (0..len).flat_map(move |position| at(head, position)..at(head, position) + head_dim)
                    })
                    .map(|index| data[index])
                    .collect()
            };
            let alone = |data: &[T], first, shape: [usize; 3]| {
                let tensor = Tensor::from_slice(device, shape, &of_heads(data, first, shape)).expect("it fits");
                tensor.unsqueeze(0).expect("one more axis")
            };
            let (first_q, first_k) = (offsets_q[i], offsets_k[i]);
            let [q, dout] = [(&q, head_dim), (&dout, head_dim_v)]
                .map(|(data, width)| alone(data, first_q, [self.heads.0, seqlen_q, width]));
            let [k, v] = [(&k, head_dim), (&v, head_dim_v)]
                .map(|(data, width)| alone(data, first_k, [self.heads.1, used, width]));
            let output = forward_alone(&attention, &q, &k, &v).expect("a call alone");
            let gradients = backward_alone(&attention, [&q, &k, &v], &output, &dout).expect("a call alone");
            if matches!(self.feature, Feature::None | Feature::NegativeScale) {
                self.check_oracle(device, [&q, &k, &v], &output);
            }
            let of_rectangle = attention.forward(&q, &k, &v).expect("a rectangle");
            let rectangle = attention
                .backward(&q, &k, &v, &of_rectangle, &dout)
                .expect("a rectangle");
            self.check_near(device, (&output, &gradients), (&of_rectangle, &rectangle));
            expected.take(self, (first_q, seqlen_q), (first_k, used), &output, &gradients);
        }
        expected.check(device, self, &output, &gradients);
    }

    /// Compares the results of a sequence with those of a rectangle, which the suite compares with the oracle.
    fn check_near<T: Element>(
        &self,
        device: &Device,
        (output, gradients): (&Output<T>, &Gradients<T>),
        (of_rectangle, rectangle): (&Output<T>, &Gradients<T>),
    ) {
        let tolerance = if T::DTYPE == Dtype::F32 { 1e-4 } else { 5e-2 };
        for (name, got, want) in [
            ("out", &output.out, &of_rectangle.out),
            ("dq", &gradients.dq, &rectangle.dq),
            ("dk", &gradients.dk, &rectangle.dk),
            ("dv", &gradients.dv, &rectangle.dv),
        ] {
            let [got, want] = [got, want].map(|tensor| tensor.to_vec().expect("it is there"));
            let largest = want.iter().map(|x| x.to_f64().abs()).fold(1.0, f64::max);
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (got.to_f64() - want.to_f64()).abs() <= tolerance * largest,
                    "{device}: {name} {got:?}, want {want:?}\n{self:?}"
                );
            }
        }
    }

    /// Compares a call alone with the oracle: results that are equal but wrong must not pass.
    fn check_oracle<T: Element>(&self, device: &Device, [q, k, v]: [&Tensor<T>; 3], output: &Output<T>) {
        let shape = |tensor: &Tensor<T>| -> [usize; 4] { tensor.shape().try_into().expect("four axes") };
        let dims = Dims::new(&self.attention(device), shape(q), shape(k)).with_head_dim_v(self.head_dim_v);
        let wide = |tensor: &Tensor<T>| -> Vec<f64> {
            let data = tensor.to_vec().expect("it is there");
            data.into_iter().map(Element::to_f64).collect()
        };
        let (out, lse) = reference::forward(&dims, &wide(q), &wide(k), &wide(v));
        let tolerance = if T::DTYPE == Dtype::F32 { 1e-5 } else { 2e-2 };
        for (got, want) in wide(&output.out).iter().zip(&out) {
            assert!(
                (got - want).abs() <= tolerance,
                "{device}: out {got}, want {want}\n{self:?}"
            );
        }
        for (got, want) in output.lse.to_vec().expect("it is there").iter().zip(&lse) {
            let got = f64::from(*got);
            assert!(
                got == *want || (got - want).abs() <= 1e-4,
                "{device}: lse {got}, want {want}\n{self:?}"
            );
        }
    }
}

/// The results of the packed batch, put together from calls with one sequence.
struct Expected {
    out: Vec<f64>,
    lse: Vec<f32>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Expected {
    /// The results of rows that belong to no sequence.
    fn new(case: &Ragged, total_q: usize, total_k: usize) -> Self {
        let (rows_q, rows_k) = (total_q * case.heads.0, total_k * case.heads.1);
        Self {
            out: vec![0.0; rows_q * case.head_dim_v],
            lse: vec![f32::NEG_INFINITY; rows_q],
            dq: vec![0.0; rows_q * case.head_dim],
            dk: vec![0.0; rows_k * case.head_dim],
            dv: vec![0.0; rows_k * case.head_dim_v],
        }
    }

    fn take<T: Element>(
        &mut self,
        case: &Ragged,
        queries: (usize, usize),
        keys: (usize, usize),
        output: &Output<T>,
        gradients: &Gradients<T>,
    ) {
        let total_q = self.lse.len() / case.heads.0;
        let place = |to: &mut [f64], from: &Tensor<T>, (first, len): (usize, usize), heads: usize| {
            let (head_dim, from) = (from.shape()[3], from.to_vec().expect("it is there"));
            for head in 0..heads {
                for position in 0..len {
                    for d in 0..head_dim {
                        to[((first + position) * heads + head) * head_dim + d] =
                            from[(head * len + position) * head_dim + d].to_f64();
                    }
                }
            }
        };
        place(&mut self.out, &output.out, queries, case.heads.0);
        place(&mut self.dq, &gradients.dq, queries, case.heads.0);
        place(&mut self.dk, &gradients.dk, keys, case.heads.1);
        place(&mut self.dv, &gradients.dv, keys, case.heads.1);
        let lse = output.lse.to_vec().expect("it is there");
        for head in 0..case.heads.0 {
            let to = head * total_q + queries.0;
            self.lse[to..to + queries.1].copy_from_slice(&lse[head * queries.1..][..queries.1]);
        }
    }

    fn check<T: Element>(&self, device: &Device, case: &Ragged, output: &Output<T>, gradients: &Gradients<T>) {
        for (name, want, got) in [
            ("out", &self.out, &output.out),
            ("dq", &self.dq, &gradients.dq),
            ("dk", &self.dk, &gradients.dk),
            ("dv", &self.dv, &gradients.dv),
        ] {
            let got: Vec<f64> = got
                .to_vec()
                .expect("it is there")
                .into_iter()
                .map(Element::to_f64)
                .collect();
            assert_eq!(&got, want, "{name} on {device}: {case:?}");
        }
        assert_eq!(
            output.lse.to_vec().expect("it is there"),
            self.lse,
            "lse on {device}: {case:?}"
        );
    }
}

fn ragged(longest: usize) -> impl Strategy<Value = Ragged> {
    let seqlen = move || prop_oneof![Just(0), Just(1), Just(64), 2_usize..longest];
    let lens = (seqlen(), seqlen(), 0.0..=1.0_f64).prop_map(|(seqlen_q, seqlen_k, used)| {
        let used = if used > 0.5 {
            seqlen_k
        } else {
            (2.0 * used * seqlen_k as f64) as usize
        };
        (seqlen_q, seqlen_k, used)
    });
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let heads = prop_oneof![Just((1, 1)), Just((4, 2)), Just((3, 1))];
    let feature = prop_oneof![
        3 => Just(Feature::None),
        1 => Just(Feature::NegativeScale),
        1 => Just(Feature::Softcap),
        1 => Just(Feature::Window),
        1 => Just(Feature::MaskOfHeads),
        1 => Just(Feature::Sinks),
    ];
    let rest = (prop_oneof![Just(0), 0_usize..9], prop_oneof![Just(0), 0_usize..9]);
    (
        prop::collection::vec(lens, 0..5),
        rest,
        heads,
        prop_oneof![Just(8), Just(40), Just(64), Just(128)],
        prop_oneof![2 => Just(None), 1 => prop_oneof![Just(16), Just(64), Just(96)].prop_map(Some)],
        (dtype, any::<bool>(), feature),
        0..1000_u64,
    )
        .prop_map(
            |(lens, rest, heads, head_dim, head_dim_v, (dtype, causal, feature), seed)| Ragged {
                lens,
                // The lse of a row that belongs to no sequence is that of its sink, if there is one.
                rest: match feature {
                    Feature::Sinks => (0, rest.1),
                    _ => rest,
                },
                heads,
                head_dim,
                head_dim_v: head_dim_v.unwrap_or(head_dim),
                dtype,
                causal,
                feature,
                seed,
            },
        )
}

proptest! {
    #![proptest_config(drawn::config(24))]

    #[test]
    fn a_sequence_has_the_results_of_a_call_with_it_alone(case in ragged(150)) {
        for device in devices().all() {
            for_dtype!(case.dtype, T => case.check::<T>(device));
        }
    }
}

/// Tests values of another head_dim than that of the keys, with and without a sequence that has no keys.
#[test]
fn values_of_another_head_dim() {
    for (rest, dtype) in [(0, Dtype::F16), (0, Dtype::Bf16), (3, Dtype::F16), (0, Dtype::F32)] {
        let case = Ragged {
            lens: vec![(70, 90, 90), (3, 40, 40), (1, 7, 7)],
            rest: (rest, 0),
            heads: (4, 2),
            head_dim: 40,
            head_dim_v: 24,
            dtype,
            causal: true,
            feature: Feature::None,
            seed: 1,
        };
        for device in devices().all() {
            for_dtype!(dtype, T => case.check::<T>(device));
        }
    }
}

/// Tests decoding of sequences with more and with fewer queries than the one before: the CPU keeps a thread's memory from one to the
/// next, and it has room for the queries of one.
#[test]
fn a_few_queries_more_and_fewer_each_time() {
    for (heads, dtype) in [((1, 1), Dtype::F32), ((4, 2), Dtype::F16), ((3, 1), Dtype::Bf16)] {
        let case = Ragged {
            lens: vec![(1, 70, 70), (4, 70, 70), (2, 9, 9), (3, 130, 100), (1, 70, 70)],
            rest: (0, 0),
            heads,
            head_dim: 64,
            head_dim_v: 64,
            dtype,
            causal: true,
            feature: Feature::None,
            seed: 2,
        };
        for device in devices().of_every_instruction_set() {
            for_dtype!(dtype, T => case.check::<T>(device));
        }
    }
}

proptest! {
    #![proptest_config(drawn::config(8))]

    #[test]
    fn a_long_sequence_has_the_results_of_a_call_with_it_alone(case in ragged(1500)) {
        for device in devices().native() {
            for_dtype!(case.dtype, T => case.check::<T>(device));
        }
    }
}

/// Tests batches without query heads: results are empty, and the gradients of keys are zeros.
#[test]
fn batches_without_heads() {
    for device in devices().all() {
        for heads_kv in [0, 2] {
            let tensor = |rows: usize, heads: usize| {
                Tensor::from_slice(device, [rows, heads, 8], &vec![1.0_f32; rows * heads * 8]).expect("it fits")
            };
            let (q, k) = (tensor(3, 0), tensor(4, heads_kv));
            let sequences = Sequences::new(&[0, 3], &[0, 4]).expect("offsets grow");
            let name = || format!("{heads_kv} heads on {device}");
            let attention = Attention::new().causal();
            let output = attention.forward_ragged(&q, &k, &k, &sequences);
            let output = output.unwrap_or_else(|error| panic!("{}: {error}", name()));
            assert_eq!(
                (output.out.shape(), output.lse.shape()),
                (&[3, 0, 8][..], &[0, 3][..]),
                "{}",
                name()
            );
            let gradients = attention.backward_ragged(&q, &k, &k, &output, &output.out, &sequences);
            let gradients = gradients.unwrap_or_else(|error| panic!("{}: {error}", name()));
            for gradient in [gradients.dk, gradients.dv] {
                assert_eq!(
                    gradient.to_vec().expect("it is there"),
                    vec![0.0; 4 * heads_kv * 8],
                    "{}",
                    name()
                );
            }
        }
    }
}

#[test]
fn bad_batches_are_refused() {
    for device in devices().all() {
        let tensor = |rows: usize| Tensor::<f32>::zeros(device, [rows, 2, 8]).expect("it fits");
        let sequences = Sequences::new(&[0, 4, 6], &[0, 4, 9]).expect("offsets grow");
        let forward = |q: &Tensor<f32>, k: &Tensor<f32>, v: &Tensor<f32>| {
            Attention::new().forward_ragged(q, k, v, &sequences).map(|_| ())
        };
        let past = forward(&tensor(6), &tensor(8), &tensor(8));
        assert!(
            matches!(
                past,
                Err(Error::Sequence {
                    argument: "cu_seqlens_k",
                    sequence: 1,
                    value: 9,
                    ..
                })
            ),
            "{past:?}"
        );
        let unequal = forward(&tensor(6), &tensor(9), &tensor(10));
        assert!(
            matches!(unequal, Err(Error::ShapeMismatch { argument: "v", .. })),
            "{unequal:?}"
        );
        let rank = forward(&tensor(6).unsqueeze(0).expect("an axis"), &tensor(9), &tensor(9));
        assert!(
            matches!(
                rank,
                Err(Error::Rank {
                    argument: "q",
                    expected: 3,
                    ..
                })
            ),
            "{rank:?}"
        );
        forward(&tensor(6), &tensor(9), &tensor(9)).expect("it fits");
    }
}

/// A batch without rows is validated like any other.
#[test]
fn bad_batches_without_rows_are_refused() {
    let nothing = Sequences::new(&[0, 0], &[0, 0]).expect("offsets");
    for device in devices().all() {
        let forward = |heads_kv: usize, head_dim: usize| {
            let tensor = |heads| Tensor::<f32>::zeros(device, [0, heads, head_dim]).expect("no elements");
            let (q, k) = (tensor(3), tensor(heads_kv));
            Attention::new().forward_ragged(&q, &k, &k, &nothing).map(|_| ())
        };
        let heads = forward(2, 8);
        assert!(matches!(heads, Err(Error::HeadsNotDivisible { .. })), "{heads:?}");
        let head_dim = forward(3, 7);
        assert!(matches!(head_dim, Err(Error::HeadDim { .. })), "{head_dim:?}");
        forward(1, 8).expect("three heads share one");
    }
}

/// Results and gradients of other shapes than the batch has are refused, even where every sequence would find its rows in them.
#[test]
fn bad_outputs_of_a_batch_are_refused() {
    let sequences = Sequences::new(&[0, 4, 6], &[0, 4, 6]).expect("offsets");
    for device in devices().all() {
        let x = Tensor::<f32>::zeros(device, [6, 2, 8]).expect("it fits");
        let attention = Attention::new();
        let good = attention.forward_ragged(&x, &x, &x, &sequences).expect("it fits");
        let refused = |output: &Output<f32>, dout: &Tensor<f32>| match attention
            .backward_ragged(&x, &x, &x, output, dout, &sequences)
        {
            Err(Error::ShapeMismatch {
                argument, axis, got, ..
            }) => (argument, axis, got),
            other => panic!("{other:?}"),
        };
        let long = Tensor::<f32>::zeros(device, [2, 7]).expect("it fits");
        let mut output = Output::new(good.out.clone(), long.clone());
        assert_eq!(refused(&output, &x), ("lse", "total", 7));
        output.lse = Tensor::zeros(device, [3, 6]).expect("it fits");
        assert_eq!(refused(&output, &x), ("lse", "heads", 3));
        for (row_max, row_sum, argument) in [(&long, &good.lse, "row_max"), (&good.lse, &long, "row_sum")] {
            let mut output = good.clone();
            let statistics = output.statistics.as_mut().expect("forward gives them");
            (statistics.row_max, statistics.row_sum) = (row_max.clone(), row_sum.clone());
            assert_eq!(refused(&output, &x), (argument, "total", 7));
        }
        let dout = Tensor::<f32>::zeros(device, [7, 2, 8]).expect("it fits");
        assert_eq!(refused(&good, &dout), ("dout", "total", 7));
        attention
            .backward_ragged(&x, &x, &x, &good, &x, &sequences)
            .expect("it fits");
    }
}
