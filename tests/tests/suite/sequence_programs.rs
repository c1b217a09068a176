//! Score programs over batches of sequences: each sequence has its number and its own draws of dropout, and a sink counts once.

use flash_attention::device::DeviceKind;
use flash_attention::{Attention, Device, Element, KvCache, Sequences, Tensor};
use flash_attention_tests::{devices, files};

const HEAD_DIM: usize = 16;

/// Seed whose lower word overflows when the number of a sequence is added.
const SEED: u64 = 0x7_ffff_ffff;

fn normal(device: &Device, shape: &[usize], seed: u64) -> Tensor<f32> {
    let numbers = files::normal(shape.iter().product(), 1.0, seed);
    Tensor::from_slice(device, shape, &numbers).expect("it fits")
}

/// Asserts that numbers are equal up to the order of sums.
fn assert_near(got: &Tensor<f32>, want: &Tensor<f32>, name: &str) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    let [got, want] = [got, want].map(|tensor| tensor.to_vec().expect("it is there"));
    for (got, want) in got.iter().zip(&want) {
        let (got, want) = (got.to_f64(), want.to_f64());
        assert!(
            (got - want).abs() <= 1e-5 + 1e-5 * want.abs(),
            "{name}: {got}, want {want}"
        );
    }
}

/// The number of a sequence is its `at.batch`.
#[test]
fn programs_see_the_number_of_a_sequence() {
    let attention = Attention::new().score(|s, at| s * (at.batch + 1));
    for device in devices().all() {
        let data = |len, seed| files::normal(len, 1.0, seed);
        let q = Tensor::from_slice(device, [3, 2, 1, 16], &data(96, 1)).expect("it fits");
        let k = Tensor::from_slice(device, [3, 8, 2, 16], &data(768, 2)).expect("it fits");
        let cache = KvCache::paged([3, 8], &[1, 1, 1], &[5, 5, 5]).expect("shared pages");
        let output = attention.forward_cached(&q, &k, &k, &cache).expect("it fits");
        for sequence in 0..3 {
            let scale = (sequence + 1) as f32 / 4.0; // of head_dim 16
            let alone = Attention::new().softmax_scale(scale);
            let q = q.narrow(0, sequence, 1).expect("a sequence");
            let keys = k.narrow(0, 1, 1).and_then(|k| k.narrow(1, 0, 5)?.transpose(1, 2));
            let keys = keys.expect("a page");
            let want = alone.forward(&q, &keys, &keys).expect("it fits").out.to_vec();
            let got = output.out.narrow(0, sequence, 1).and_then(|out| out.to_vec());
            for (got, want) in got.expect("read").iter().zip(want.expect("read")) {
                assert!((got - want).abs() < 1e-5, "{device}: {got} {want}");
            }
        }
    }
}

/// Tests sinks and dropout where a GPU splits the keys of a query over blocks.
#[test]
fn splits_count_a_sink_once_and_draw_as_their_sequence() {
    let (keys, heads, page_size) = (2112, 4, 24);
    for device in devices().all() {
        let q = normal(device, &[2, heads, 1, HEAD_DIM], 1);
        let pages = |seed| normal(device, &[2 * keys / page_size, page_size, 2, HEAD_DIM], seed);
        let (k, v) = (pages(2), pages(3));
        let table: Vec<i32> = (0..(2 * keys / page_size) as i32).collect();
        let cache = KvCache::paged([table.len(), page_size], &table, &[keys as i32; 2]).expect("pages that exist");
        let sinks = Tensor::from_slice(device, [heads], &[2.0_f32, -1.0, 9.0, 0.0]).expect("it fits");
        for name in ["sinks", "dropout"] {
            let attention = |number| match name {
                "sinks" => Attention::new().sinks(&sinks),
                _ => Attention::new().dropout(0.3, SEED + number),
            };
            let plans = attention(0).plan_cached(&q, &k, &v, &cache).expect("a plan");
            let launches: usize = plans.iter().map(|plan| plan.launches().len()).sum();
            assert_eq!(
                launches,
                if device.kind() == DeviceKind::Cpu { 0 } else { 2 },
                "{name} on {device}"
            );
            let output = attention(0).forward_cached(&q, &k, &v, &cache).expect("it fits");
            for number in 0..2 {
                // Pages in order are the keys end to end.
                let alone = |pages: &Tensor<f32>| {
                    let all = Tensor::from_slice(device, [2, keys, 2, HEAD_DIM], &pages.to_vec().expect("read"));
                    all.and_then(|all| all.narrow(0, number, 1)?.transpose(1, 2))
                        .expect("a view")
                };
                let q = q.narrow(0, number, 1).expect("a sequence");
                let want = attention(number as u64)
                    .forward(&q, &alone(&k), &alone(&v))
                    .expect("it fits");
                let name = format!("{name}, sequence {number} on {device}");
                let got = |tensor: &Tensor<f32>| tensor.narrow(0, number, 1).expect("a sequence");
                assert_near(&got(&output.out), &want.out, &name);
                assert_near(&got(&output.lse), &want.lse, &name);
            }
        }
    }
}

/// Tests that gradients through dropout are those of each sequence alone, with its own draws.
#[test]
fn gradients_of_a_sequence_have_its_draws() {
    let (ends, heads) = ([0, 40, 47, 120], 2);
    let total = ends[3] as usize;
    for device in devices().all() {
        let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| normal(device, &[total, heads, HEAD_DIM], seed));
        let attention = |number| Attention::new().causal().dropout(0.3, SEED + number);
        let sequences = Sequences::new(&ends, &ends).expect("offsets grow");
        let output = attention(0).forward_ragged(&q, &k, &v, &sequences).expect("it fits");
        let gradients = (attention(0).backward_ragged(&q, &k, &v, &output, &dout, &sequences)).expect("it fits");
        for (number, pair) in ends.windows(2).enumerate() {
            let (first, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
            let of = |tensor: &Tensor<f32>| {
                let rows = tensor
                    .narrow(0, first, len)
                    .and_then(|rows| rows.transpose(0, 1)?.unsqueeze(0));
                rows.expect("a view")
            };
            let attention = attention(number as u64);
            let [q, k, v, dout] = [&q, &k, &v, &dout].map(of);
            let alone = attention.forward(&q, &k, &v).expect("it fits");
            let want = attention.backward(&q, &k, &v, &alone, &dout).expect("it fits");
            for (which, got, want) in [
                ("out", &output.out, &alone.out),
                ("dq", &gradients.dq, &want.dq),
                ("dk", &gradients.dk, &want.dk),
                ("dv", &gradients.dv, &want.dv),
            ] {
                assert_near(&of(got), want, &format!("{which} of sequence {number} on {device}"));
            }
        }
    }
}
