//! Caches that grow: new keys are written where the table says and nowhere else, turned by a rotary embedding if there is one, and
//! steps of decoding give what one causal call gives.

use flash_attention::error::Error;
use flash_attention::half::f16;
use flash_attention::{Attention, Device, KvCache, NewKeys, Rotary, Tensor};
use flash_attention_tests::{devices, files};

const HEADS: (usize, usize) = (4, 2);
const HEAD_DIM: usize = 24;

/// Tokens of one sequence: q, k and v as `[heads, seqlen, head_dim]`.
struct Tokens {
    seqlen: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Tokens {
    fn new(seqlen: usize, seed: u64) -> Self {
        let draw = |heads: usize, salt| files::normal(heads * seqlen * HEAD_DIM, 1.0, 10 * seed + salt);
        let (q, k, v) = (draw(HEADS.0, 1), draw(HEADS.1, 2), draw(HEADS.1, 3));
        Self { seqlen, q, k, v }
    }

    /// The tokens of a range, of q, k or v.
    fn take(&self, of: &[f32], range: std::ops::Range<usize>) -> Vec<f32> {
        let heads = of.chunks(self.seqlen * HEAD_DIM);
        let taken = heads.flat_map(|head| head[range.start * HEAD_DIM..range.end * HEAD_DIM].to_vec());
        taken.collect()
    }

    /// out of one causal call over all tokens, turned at the positions from 0 on, `[heads, seqlen, head_dim]`.
    fn whole(&self, device: &Device, rotary: Option<&Rotary>) -> Vec<f32> {
        let tensor = |heads, data: &[f32]| {
            let tensor = Tensor::from_slice(device, [1, heads, self.seqlen, HEAD_DIM], data);
            tensor.expect("it fits")
        };
        let positions: Vec<i32> = (0..self.seqlen as i32).collect();
        let turn = |x: Tensor<f32>| match rotary {
            Some(rotary) => rotary.forward(&x, &positions).expect("positions"),
            None => x,
        };
        let (q, k) = (turn(tensor(HEADS.0, &self.q)), turn(tensor(HEADS.1, &self.k)));
        let output = Attention::new().causal().forward(&q, &k, &tensor(HEADS.1, &self.v));
        output.expect("it fits").out.to_vec().expect("read")
    }
}

/// Decodes two sequences, of which the second begins later and pauses once, in packed steps; compares each step with one call over
/// whole sequences.
fn decode(device: &Device, cache: KvCache, rotary: Option<&Rotary>) {
    let tokens = [Tokens::new(21, 1), Tokens::new(18, 2)];
    let wanted = tokens.each_ref().map(|tokens| tokens.whole(device, rotary));
    let [pages, page_size] = cache.shape();
    let shape = [pages, page_size, HEADS.1, HEAD_DIM];
    let poison = vec![f32::NAN; shape.iter().product()];
    let pages = |_| Tensor::from_slice(device, shape, &poison).expect("it fits");
    let [mut k, mut v] = [0, 1].map(pages);
    let mut cache = cache;
    for step in [[9, 0], [1, 7], [1, 1], [8, 0], [2, 10]] {
        let counts = step.map(|count| count as i32);
        cache = cache.append(&counts).expect("room");
        let offsets = [0, counts[0], counts[0] + counts[1]];
        cache = cache.cu_seqlens_q(&offsets).expect("offsets grow");
        let total: usize = step.iter().sum();
        let packed = |heads: usize, of: fn(&Tokens) -> &Vec<f32>| {
            let mut data = vec![0.0; total * heads * HEAD_DIM];
            let mut first = 0;
            for (sequence, tokens) in tokens.iter().enumerate() {
                let range = cache.new_keys(sequence);
                let taken = tokens.take(of(tokens), range.clone());
                for (place, row) in taken.chunks(HEAD_DIM).enumerate() {
                    let (head, token) = (place / range.len(), first + place % range.len());
                    data[(token * heads + head) * HEAD_DIM..][..HEAD_DIM].copy_from_slice(row);
                }
                first += range.len();
            }
            Tensor::from_slice(device, [total, heads, HEAD_DIM], &data).expect("it fits")
        };
        let (q, new_k) = (packed(HEADS.0, |tokens| &tokens.q), packed(HEADS.1, |tokens| &tokens.k));
        let new_v = packed(HEADS.1, |tokens| &tokens.v);
        let mut new = NewKeys::new(&new_k, &new_v);
        if let Some(rotary) = rotary {
            new = new.rotary(rotary);
        }
        let attention = Attention::new().causal();
        let output = attention.forward_append(&q, &new, &mut k, &mut v, &cache);
        let out = output.expect("it fits").out.to_vec().expect("read");
        let mut first = 0;
        for (sequence, tokens) in tokens.iter().enumerate() {
            let range = cache.new_keys(sequence);
            for (place, want) in tokens
                .take(&wanted[sequence], range.clone())
                .chunks(HEAD_DIM)
                .enumerate()
            {
                let (head, token) = (place / range.len(), first + place % range.len());
                let got = &out[(token * HEADS.0 + head) * HEAD_DIM..][..HEAD_DIM];
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < 1e-5, "{device}: {got}, want {want}, {cache}");
                }
            }
            first += range.len();
        }
    }
    // Checks that places without a key were not written.
    let mut is_key = vec![false; k.shape()[0] * page_size];
    for sequence in 0..cache.batch() {
        for key in 0..cache.keys(sequence) {
            let (page, place) = cache.slot(sequence, key);
            is_key[page * page_size + place] = true;
        }
    }
    for tensor in [k, v] {
        let data = tensor.to_vec().expect("read");
        for (row, is_key) in data.chunks(HEADS.1 * HEAD_DIM).zip(&is_key) {
            assert!(row.iter().all(|x| x.is_nan() != *is_key), "{device}: {cache}");
        }
    }
}

#[test]
fn steps_of_decoding_are_one_causal_call() {
    let rotary = Rotary::new(HEAD_DIM, 10_000.0).expect("an even number");
    let partial = Rotary::new(16, 500.0).expect("an even number").interleaved();
    for device in devices().all() {
        let paged = || KvCache::paged([7, 8], &[5, 0, 3, 2, 6, 1], &[0, 0]).expect("pages");
        for rotary in [None, Some(&rotary), Some(&partial)] {
            decode(device, paged(), rotary);
        }
        let rows = KvCache::slots([3, 24], &[2, 0], &[0, 0]).expect("rows");
        decode(device, rows, Some(&rotary));
        let padded = KvCache::slots([3, 27], &[2, 0], &[3, 5]).and_then(|cache| cache.leftpad_k(&[3, 5]));
        decode(device, padded.expect("rows"), Some(&partial));
    }
}

/// New keys and values, each with a batch axis or end to end, in a cache whose heads are not neighbours.
#[test]
fn new_keys_of_a_batch_are_written_in_any_strides() {
    for device in devices().all() {
        let data: Vec<f32> = (1..=64).map(|x| x as f32).collect();
        let new = Tensor::from_slice(device, [2, 2, 2, 8], &data).expect("it fits"); // [batch, heads, seqlen, head_dim]
        let tokens = new.transpose(1, 2).and_then(|new| new.to_vec()).expect("four axes");
        let packed = Tensor::from_slice(device, [4, 2, 8], &tokens).expect("it fits"); // [total, heads, head_dim]
        let cache = KvCache::paged([3, 8], &[1, 0, 2, 2], &[7, 3]).and_then(|cache| cache.append(&[2, 2]));
        let cache = cache.expect("room");
        for (new_k, new_v) in [(&new, &new), (&new, &packed), (&packed, &new), (&packed, &packed)] {
            let pages = Tensor::<f32>::zeros(device, [3, 2, 8, 8]).expect("it fits"); // [pages, heads, page_size, head_dim]
            let mut k = pages.transpose(1, 2).expect("four axes");
            let mut v = Tensor::<f32>::zeros(device, [3, 8, 2, 8]).expect("it fits");
            cache
                .write(&NewKeys::new(new_k, new_v), &mut k, &mut v)
                .expect("it fits");
            for tensor in [&k, &v] {
                let written = tensor.to_vec().expect("read");
                let mut wanted = vec![0.0; written.len()];
                for (sequence, head, token) in [0, 1]
                    .iter()
                    .flat_map(|&s| [0, 1].map(|h| [(s, h, 0), (s, h, 1)]))
                    .flatten()
                {
                    let (page, place) = cache.slot(sequence, cache.new_keys(sequence).start + token);
                    let from = ((sequence * 2 + head) * 2 + token) * 8;
                    wanted[((page * 8 + place) * 2 + head) * 8..][..8].copy_from_slice(&data[from..from + 8]);
                }
                assert_eq!(written, wanted, "{device}: {:?}, {:?}", new_k.shape(), new_v.shape());
            }
        }
    }
}

/// Tests positions of a caller's: queries and new keys, of a batch and packed, are turned at them, as by calls of [`Rotary::forward`].
#[test]
fn positions_may_be_given() {
    let rotary = Rotary::new(8, 100.0).expect("an even number");
    let first = [40, 3];
    for device in devices().all() {
        let normal = |shape: &[usize], seed| {
            let data = files::normal(shape.iter().product(), 1.0, seed);
            Tensor::from_slice(device, shape, &data).expect("it fits")
        };
        let pages = |seed| normal(&[4, 8, 2, 8], seed);
        let (q, new_k, new_v) = (
            normal(&[2, 4, 3, 8], 1),
            normal(&[2, 2, 3, 8], 2),
            normal(&[2, 2, 3, 8], 3),
        );
        let step = KvCache::paged([4, 8], &[3, 0, 1, 2], &[6, 0]).and_then(|cache| cache.append(&[3, 3]));
        let step = step.expect("room");
        let read = |tensors: [&Tensor<f32>; 3]| tensors.map(|tensor| tensor.to_vec().expect("read"));

        let attention = Attention::new().causal();
        let new = NewKeys::new(&new_k, &new_v);
        let (mut k, mut v) = (pages(4), pages(5));
        let output = attention.forward_append(
            &q,
            &new.clone().rotary(&rotary).positions(&first),
            &mut k,
            &mut v,
            &step,
        );
        let got = read([&output.expect("it fits").out, &k, &v]);
        let turned = |x: &Tensor<f32>| rotary.forward(x, &[40, 41, 42, 3, 4, 5]).expect("positions");
        let (turned_q, turned_k) = (turned(&q), turned(&new_k));
        let (mut k, mut v) = (pages(4), pages(5));
        let output = attention.forward_append(&turned_q, &NewKeys::new(&turned_k, &new_v), &mut k, &mut v, &step);
        assert_eq!(got, read([&output.expect("it fits").out, &k, &v]), "{device}");

        let refused = |first: &[i32]| {
            let new = new.clone().rotary(&rotary).positions(first);
            let error = step.write(&new, &mut pages(4), &mut pages(5)).expect_err("bad");
            let of_step = attention.forward_append(&q, &new, &mut pages(4), &mut pages(5), &step);
            assert_eq!(of_step.expect_err("bad").to_string(), error.to_string());
            error
        };
        let count = refused(&[40]);
        assert!(
            matches!(
                count,
                Error::SequenceCount {
                    argument: "positions",
                    len: 1,
                    expected: 2
                }
            ),
            "{count:?}"
        );
        for bad in [-1, i32::MAX - 2] {
            let outside = refused(&[40, bad]);
            assert!(
                matches!(outside, Error::Sequence { argument: "positions", sequence: 1, value, .. } if value == i64::from(bad)),
                "{outside:?}"
            );
        }
    }
}

#[test]
fn new_keys_that_do_not_fit_are_refused_and_nothing_is_written() {
    for device in devices().all() {
        let tensor = |shape: &[usize]| Tensor::<f32>::zeros(device, shape).expect("it fits");
        let cache = KvCache::paged([3, 8], &[1, 0], &[7])
            .and_then(|cache| cache.append(&[2]))
            .expect("room");
        let (mut k, mut v) = (tensor(&[3, 8, 2, 8]), tensor(&[3, 8, 2, 8]));
        let ones =
            |shape: &[usize]| Tensor::from_slice(device, shape, &vec![1.0; shape.iter().product()]).expect("fits");
        let good = ones(&[1, 2, 2, 8]);
        let mut refused = |new_k: &Tensor<f32>, new_v: &Tensor<f32>| {
            cache
                .write(&NewKeys::new(new_k, new_v), &mut k, &mut v)
                .expect_err("it does not fit")
        };
        for bad in [ones(&[1, 1, 2, 8]), ones(&[1, 2, 2, 16]), ones(&[3, 2, 8])] {
            assert!(matches!(
                refused(&bad, &good),
                Error::ShapeMismatch { argument: "k_new", .. }
            ));
            assert!(matches!(
                refused(&good, &bad),
                Error::ShapeMismatch { argument: "v_new", .. }
            ));
        }
        let long = refused(&ones(&[1, 2, 3, 8]), &good);
        assert!(
            matches!(
                long,
                Error::Sequence {
                    argument: "seqlens_new",
                    sequence: 0,
                    value: 2,
                    ..
                }
            ),
            "{long:?}"
        );
        let unequal = NewKeys::new(&good, &good).positions(&[1, 2]);
        let unequal = cache.write(&unequal, &mut k, &mut v).expect_err("one sequence");
        assert!(matches!(unequal, Error::SequenceCount { .. }), "{unequal:?}");
        let tables = Rotary::of_tables(4, &[1.0; 16], &[0.0; 16]).expect("8 positions");
        let past = NewKeys::new(&good, &good).rotary(&tables);
        let past = cache.write(&past, &mut k, &mut v).expect_err("position 8 of 8");
        assert!(
            matches!(
                past,
                Error::Sequence {
                    argument: "positions",
                    value: 8,
                    ..
                }
            ),
            "{past:?}"
        );
        assert!(
            k.to_vec()
                .expect("read")
                .iter()
                .chain(&v.to_vec().expect("read"))
                .all(|&x| x == 0.0)
        );
        let mut same = k.clone();
        let shared = cache
            .write(&NewKeys::new(&good, &good), &mut k, &mut same)
            .expect_err("one memory");
        assert!(
            matches!(
                shared,
                Error::Aliased {
                    argument: "v",
                    other: "k"
                }
            ),
            "{shared:?}"
        );
    }
}

/// Returns one head turned by an embedding, in f64.
fn turned(x: &[f64], position: f64, rotary_dim: usize, base: f64, interleaved: bool) -> Vec<f64> {
    let mut y = x.to_vec();
    for pair in 0..rotary_dim / 2 {
        let (a, b) = match interleaved {
            true => (2 * pair, 2 * pair + 1),
            false => (pair, pair + rotary_dim / 2),
        };
        let (sin, cos) = (position * base.powf(-2.0 * pair as f64 / rotary_dim as f64)).sin_cos();
        (y[a], y[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
    }
    y
}

#[test]
fn rotary_embeddings_follow_their_formula_forward_and_back() {
    let (batch, heads, seqlen, head_dim) = (2, 3, 5, 16);
    let len = batch * heads * seqlen * head_dim;
    let positions: Vec<i32> = (0..batch * seqlen).map(|token| (token * token % 977) as i32).collect();
    for device in devices().all() {
        for (rotary_dim, interleaved, factor) in [(16, false, 1.0), (16, true, 1.0), (6, false, 4.0), (10, true, 1.0)] {
            let rotary = Rotary::new(rotary_dim, 10_000.0)
                .and_then(|rotary| rotary.scaled(factor))
                .expect("numbers");
            let rotary = if interleaved { rotary.interleaved() } else { rotary };
            let tensor = |seed| {
                let data = files::normal(len, 1.0, seed);
                Tensor::from_slice(device, [batch, heads, seqlen, head_dim], &data).expect("it fits")
            };
            let (x, dout) = (tensor(1), tensor(2));
            let read = |tensor: &Tensor<f32>| -> Vec<f64> {
                tensor.to_vec().expect("read").into_iter().map(f64::from).collect()
            };
            let y = rotary.forward(&x, &positions).expect("positions");
            for (row, (x, y)) in read(&x).chunks(head_dim).zip(read(&y).chunks(head_dim)).enumerate() {
                let position = positions[row / (heads * seqlen) * seqlen + row % seqlen];
                let want = turned(x, f64::from(position) / factor, rotary_dim, 10_000.0, interleaved);
                for (got, want) in y.iter().zip(want) {
                    assert!((got - want).abs() < 1e-6, "{device}: {got}, want {want}");
                }
            }
            // <dout, R x> = <R^T dout, x>
            let dx = rotary.backward(&dout, &positions).expect("positions");
            let product =
                |x: &Tensor<f32>, y: &Tensor<f32>| -> f64 { read(x).iter().zip(read(y)).map(|(x, y)| x * y).sum() };
            let difference = product(&dout, &y) - product(&dx, &x);
            assert!(difference.abs() < 1e-4, "{difference}");
            // Packed tokens, and tables of the same angles.
            let packed = x
                .narrow(0, 1, 1)
                .and_then(|x| x.select(0, 0)?.transpose(0, 1))
                .expect("an entry");
            let of_packed = rotary.forward(&packed, &positions[seqlen..]).expect("positions");
            let same = y
                .narrow(0, 1, 1)
                .and_then(|y| y.select(0, 0)?.transpose(0, 1))
                .expect("an entry");
            assert_eq!(read(&of_packed), read(&same), "{device}");
            let angles = (0..977 * rotary_dim / 2).map(|i| {
                let (position, pair) = (i / (rotary_dim / 2), i % (rotary_dim / 2));
                position as f64 / factor * 10_000_f64.powf(-2.0 * pair as f64 / rotary_dim as f64)
            });
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|x| (x.cos() as f32, x.sin() as f32)).unzip();
            let tables = Rotary::of_tables(rotary_dim, &cos, &sin).expect("tables");
            let tables = if interleaved { tables.interleaved() } else { tables };
            let of_tables = tables.forward(&x, &positions).expect("positions");
            for (got, want) in read(&of_tables).iter().zip(read(&y)) {
                assert!((got - want).abs() < 1e-6, "{device}: {got}, want {want}");
            }
        }
    }
}

#[test]
fn bad_rotary_embeddings_are_refused() {
    for bad in [
        Rotary::new(0, 1e4),
        Rotary::new(7, 1e4),
        Rotary::new(65_538, 1e4),
        Rotary::new(usize::MAX - 1, 1e4), // more than any memory holds
        Rotary::new(8, 0.0),
        Rotary::new(8, f64::NAN),
    ] {
        assert!(matches!(bad, Err(Error::Rotary { .. })), "{bad:?}");
    }
    assert!(matches!(Rotary::of_frequencies(&[]), Err(Error::Rotary { .. })));
    assert!(matches!(
        Rotary::of_tables(4, &[1.0; 4], &[1.0; 6]),
        Err(Error::DataLength { .. })
    ));
    let rotary = Rotary::new(16, 1e4).expect("an even number");
    for factor in [0.0, -1.0, f64::INFINITY, 1e-320] {
        let scaled = rotary.clone().scaled(factor);
        assert!(
            matches!(scaled, Err(Error::Rotary { argument: "factor", .. })),
            "{scaled:?}"
        );
    }
    for device in devices().all() {
        let tensor = |shape: &[usize]| Tensor::<f32>::zeros(device, shape).expect("it fits");
        let refused = |shape: &[usize], positions: &[i32]| rotary.forward(&tensor(shape), positions).expect_err("bad");
        assert!(matches!(
            refused(&[2, 1, 8], &[0, 1]),
            Error::Rotary {
                argument: "rotary_dim",
                ..
            }
        ));
        assert!(matches!(refused(&[2, 1, 16], &[0]), Error::SequenceCount { .. }));
        assert!(matches!(
            refused(&[2, 1, 16], &[0, -1]),
            Error::Sequence {
                sequence: 1,
                value: -1,
                ..
            }
        ));
        assert!(matches!(refused(&[2, 16], &[0, 1]), Error::Rank { .. }));
        let empty = rotary.forward(&tensor(&[1, 2, 0, 16]), &[]).expect("no tokens");
        assert_eq!(empty.shape(), [1, 2, 0, 16]);
    }
    let half: Tensor<f16> = Tensor::from_slice(&Device::cpu(), [1, 1, 16], &[f16::ONE; 16]).expect("it fits");
    let turned = rotary.forward(&half, &[3]).and_then(|x| x.to_vec()).expect("halves");
    assert!((turned[0].to_f64() - (3_f64.cos() - 3_f64.sin())).abs() < 1e-3);
}
