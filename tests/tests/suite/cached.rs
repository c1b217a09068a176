//! Caches of keys and values: each sequence has the results of a call with its keys end to end, to the bit, and these are those
//! of the oracle. Memory that belongs to no key holds NaN and infinities.

use std::sync::OnceLock;

use flash_attention::device::DeviceKind;
use flash_attention::error::Error;
use flash_attention::half::f16;
use flash_attention::{Attention, Device, Dtype, Element, KvCache, Output, Tensor};
use flash_attention_tests::{check_sequence, devices, drawn, files, for_dtype, forward_alone};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

/// Masks and scores that read no table, by name.
const FEATURES: [&str; 7] = ["full", "causal", "window", "softcap", "prefix", "chunked", "score"];

/// A batch over a cache.
#[derive(Clone, Debug)]
struct Cached {
    /// Queries, keys and padding before them, a sequence each.
    lens: Vec<(usize, usize, usize)>,
    /// Keys of a page; 0 for a rectangular cache.
    page_size: usize,
    /// True if queries are packed; else all sequences have the queries of the first.
    packed: bool,
    /// Rows of packed q behind the last sequence, and pages that no sequence uses.
    rest: usize,
    heads: (usize, usize),
    head_dim: usize,
    dtype: Dtype,
    feature: &'static str,
    /// True for results that do not depend on the batch; else splits follow from the whole batch.
    batch_invariant: bool,
    seed: u64,
}

impl Cached {
    fn attention(&self) -> Attention {
        let attention = match self.batch_invariant {
            true => Attention::new().batch_invariant(),
            false => Attention::new(),
        };
        match self.feature {
            "full" => attention,
            "causal" => attention.causal(),
            "window" => attention.causal().window(20, None),
            "softcap" => attention.softcap(3.0),
            "prefix" => attention.prefix(9),
            "chunked" => attention.chunked(13),
            _ => attention.score(|s, at| s - 0.02 * at.distance().abs() * (at.head + 1)),
        }
    }

    fn seqlen_q(&self, sequence: usize) -> usize {
        let of = if self.packed { sequence } else { 0 };
        self.lens[of].0
    }

    /// The cache, with pages in an order of the seed, and the page and place of each key of each sequence.
    fn cache(&self) -> (KvCache, Vec<Vec<(usize, usize)>>) {
        let as_i32 = |numbers: &mut dyn Iterator<Item = usize>| -> Vec<i32> { numbers.map(|x| x as i32).collect() };
        let used = as_i32(&mut self.lens.iter().map(|&(_, keys, pad)| pad + keys));
        let pads = as_i32(&mut self.lens.iter().map(|&(.., pad)| pad));
        let batch = self.lens.len();
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (cache, table, page_size) = if self.page_size == 0 {
            let longest = used.iter().copied().max().unwrap_or(0) as usize;
            let mut rows = as_i32(&mut (0..batch + self.rest));
            rows.shuffle(&mut rng);
            rows.truncate(batch);
            let cache = KvCache::slots([batch + self.rest, longest + 3], &rows, &used);
            (cache, rows, longest + 3)
        } else {
            let pages_of = |used: &i32| (*used as usize).div_ceil(self.page_size);
            let max_pages = used.iter().map(pages_of).max().unwrap_or(0) + 1;
            let total: usize = used.iter().map(pages_of).sum();
            let mut pages = as_i32(&mut (0..total + self.rest));
            pages.shuffle(&mut rng);
            let mut pages = pages.into_iter();
            let row = |used: &i32| {
                let own: Vec<i32> = pages.by_ref().take(pages_of(used)).collect();
                let unused = vec![-7; max_pages - own.len()];
                [own, unused].concat()
            };
            let table: Vec<i32> = used.iter().flat_map(row).collect();
            let cache = KvCache::paged([total + self.rest, self.page_size], &table, &used);
            (cache, table, self.page_size)
        };
        let cache = cache
            .and_then(|cache| cache.leftpad_k(&pads))
            .expect("pages that exist");
        let slots = |(row, &(_, keys, pad)): (&[i32], &(usize, usize, usize))| {
            let slot = |place: usize| (row[place / page_size] as usize, place % page_size);
            (pad..pad + keys).map(slot).collect()
        };
        let slots = table.chunks(table.len() / batch).zip(&self.lens).map(slots).collect();
        if !self.packed {
            return (cache, slots);
        }
        let mut offsets = vec![0];
        for (sequence, _) in self.lens.iter().enumerate() {
            offsets.push(offsets[sequence] + self.seqlen_q(sequence) as i32);
        }
        (cache.cu_seqlens_q(&offsets).expect("offsets grow"), slots)
    }

    fn draw<T: Element>(&self, len: usize, salt: u64) -> Vec<T> {
        let numbers = files::normal(len, 1.0, self.seed * 5 + salt);
        numbers.into_iter().map(T::from_f32).collect()
    }

    fn check<T: Element>(&self, device: &Device) {
        let ((cache, slots), attention) = (self.cache(), self.attention());
        let ((heads_q, heads_kv), head_dim, batch) = (self.heads, self.head_dim, self.lens.len());
        let [pages, page_size] = cache.shape();
        let row = heads_kv * head_dim;
        let (mut k, mut v) = (
            vec![T::from_f32(f32::NAN); pages * page_size * row],
            vec![T::from_f32(f32::INFINITY); pages * page_size * row],
        );
        let mut alone = Vec::new(); // each sequence's q, k and v as [seqlen, heads, head_dim]
        for (sequence, slots) in slots.iter().enumerate() {
            let keys = slots.len();
            assert_eq!(cache.keys(sequence), keys, "{cache}");
            let salt = 3 * sequence as u64;
            let of_keys = [1, 2].map(|which| self.draw::<T>(keys * row, salt + which));
            for (key, &(page, place)) in slots.iter().enumerate() {
                assert_eq!(cache.slot(sequence, key), (page, place), "{cache}");
                let to = (page * page_size + place) * row;
                k[to..to + row].copy_from_slice(&of_keys[0][key * row..][..row]);
                v[to..to + row].copy_from_slice(&of_keys[1][key * row..][..row]);
            }
            let [k, v] = of_keys;
            let q: Vec<T> = self.draw(self.seqlen_q(sequence) * heads_q * head_dim, salt);
            alone.push([q, k, v]);
        }
        let tensor = |shape: &[usize], data: &[T]| Tensor::from_slice(device, shape, data).expect("it fits");
        let shape = [pages, page_size, heads_kv, head_dim];
        let (k, v) = (tensor(&shape, &k), tensor(&shape, &v));
        let mut q: Vec<T> = alone.iter().flat_map(|[q, ..]| q.iter().copied()).collect();
        let total_q = q.len() / (heads_q * head_dim) + self.rest;
        let q = if self.packed {
            q.resize(total_q * heads_q * head_dim, T::from_f32(2.0));
            tensor(&[total_q, heads_q, head_dim], &q)
        } else {
            let seqlen_q = self.seqlen_q(0);
            let by_rows = tensor(&[batch, seqlen_q, heads_q, head_dim], &q);
            by_rows.transpose(1, 2).expect("four axes")
        };
        let output = attention
            .forward_cached(&q, &k, &v, &cache)
            .unwrap_or_else(|error| panic!("{device}: {error}\n{self:?}"));
        let (mut first, numbers) = (0, Numbers::of(&output));
        for (sequence, [q, k, v]) in alone.iter().enumerate() {
            let seqlen_q = self.seqlen_q(sequence);
            let view = |data: &[T], seqlen: usize, heads: usize| {
                let tensor = tensor(&[1, seqlen, heads, head_dim], data);
                tensor.transpose(1, 2).expect("four axes").contiguous().expect("a copy")
            };
            let keys = slots[sequence].len();
            let [q, k, v] = [(q, seqlen_q, heads_q), (k, keys, heads_kv), (v, keys, heads_kv)]
                .map(|(data, seqlen, heads)| view(data, seqlen, heads));
            let places = (0..heads_q).flat_map(|head| (0..seqlen_q).map(move |query| (head, query)));
            let places: Vec<_> = places
                .map(|(head, query)| match self.packed {
                    true => ((first + query) * heads_q + head, head * total_q + first + query),
                    false => [(sequence * heads_q + head) * seqlen_q + query; 2].into(),
                })
                .collect();
            let out: Vec<T> = places.iter().flat_map(|place| numbers.row(place.0)).copied().collect();
            let lse: Vec<f32> = places.iter().map(|place| numbers.lse[place.1]).collect();
            let depends_on_batch = !self.batch_invariant && device.kind() != DeviceKind::Cpu;
            let name = format!("{device}: sequence {sequence} of {self:?}");
            check_sequence(&name, &attention, [&q, &k, &v], (&out, &lse), depends_on_batch);
            first += seqlen_q;
        }
        for query in (first..total_q).filter(|_| self.packed) {
            for head in 0..heads_q {
                assert!(numbers.row(query * heads_q + head).iter().all(|x| x.to_f64() == 0.0));
                assert_eq!(numbers.lse[head * total_q + query], f32::NEG_INFINITY);
            }
        }
    }
}

/// Results in the order of their axes.
struct Numbers<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    head_dim: usize,
}

impl<T: Element> Numbers<T> {
    fn of(output: &Output<T>) -> Self {
        Self {
            out: output.out.to_vec().expect("it is there"),
            lse: output.lse.to_vec().expect("it is there"),
            head_dim: *output.out.shape().last().expect("axes"),
        }
    }

    fn row(&self, row: usize) -> &[T] {
        &self.out[row * self.head_dim..][..self.head_dim]
    }
}

fn cached(longest: usize) -> impl Strategy<Value = Cached> {
    let seqlen_q = prop_oneof![3 => Just(1), 1 => Just(0), 1 => 2_usize..5, 2 => 5_usize..90];
    let seqlen_k = prop_oneof![Just(0), Just(1), Just(64), Just(128), 2_usize..longest];
    let pad = prop_oneof![3 => Just(0), 1 => 0_usize..40];
    let page_size = prop_oneof![Just(0), Just(8), Just(16), Just(24), Just(64), Just(256)];
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let heads = prop_oneof![Just((1, 1)), Just((4, 2)), Just((3, 1)), Just((8, 1))];
    (
        prop::collection::vec((seqlen_q, seqlen_k, pad), 1..5),
        (page_size, any::<bool>(), 0_usize..4),
        heads,
        prop_oneof![Just(8), Just(40), Just(64), Just(128)],
        (dtype, prop::sample::select(&FEATURES[..]), any::<bool>()),
        0..1000_u64,
    )
        .prop_map(
            |(lens, (page_size, packed, rest), heads, head_dim, (dtype, feature, batch_invariant), seed)| Cached {
                lens,
                page_size,
                packed,
                rest,
                heads,
                head_dim,
                dtype,
                feature,
                batch_invariant,
                seed,
            },
        )
}

proptest! {
    #![proptest_config(drawn::config(24))]

    #[test]
    fn a_sequence_has_the_results_of_a_call_with_it_alone(case in cached(150)) {
        for device in devices().all() {
            for_dtype!(case.dtype, T => case.check::<T>(device));
        }
    }
}

proptest! {
    #![proptest_config(drawn::config(12))]

    /// Thousands of keys, which the CPU splits where there are few queries for its threads.
    #[test]
    fn long_sequences_have_the_results_of_a_call_alone(case in cached(9000)) {
        let threads = || [1, 9].map(|threads| Device::cpu_with_threads(threads).expect("a few threads"));
        static OTHERS: OnceLock<[Device; 2]> = OnceLock::new();
        let has_cpu = devices().all().any(|device| device.kind() == DeviceKind::Cpu);
        let others = OTHERS.get_or_init(threads).iter().filter(|_| has_cpu);
        for device in devices().native().chain(others) {
            for_dtype!(case.dtype, T => case.check::<T>(device));
        }
    }
}

/// A step of decoding beside a prompt, on devices that split keys: sequences of some thousand keys in pages of 24, without and with
/// results that do not depend on the batch.
#[test]
fn splits_have_the_results_of_the_oracle() {
    for (feature, heads, batch_invariant, dtype) in [
        ("causal", (8, 2), false, Dtype::F16),
        ("causal", (3, 1), true, Dtype::Bf16),
        ("score", (2, 1), false, Dtype::F32),
        ("window", (2, 2), true, Dtype::F16),
    ] {
        let case = Cached {
            lens: vec![(1, 2100, 5), (40, 700, 0), (1, 0, 0), (0, 9, 0), (2, 1600, 0)],
            page_size: 24,
            packed: true,
            rest: 1,
            heads,
            head_dim: 64,
            dtype,
            feature,
            batch_invariant,
            seed: 7,
        };
        for device in devices().all() {
            for_dtype!(case.dtype, T => case.check::<T>(device));
        }
    }
}

#[test]
fn tensors_without_the_pages_of_a_cache_are_refused() {
    for device in devices().all() {
        let tensor = |shape: &[usize]| Tensor::<f32>::zeros(device, shape).expect("it fits");
        let cache = KvCache::paged([3, 8], &[0, 2], &[8, 3]).expect("pages");
        let packed = cache.clone().cu_seqlens_q(&[0, 1, 3]).expect("offsets");
        let (q, k) = (tensor(&[2, 4, 1, 16]), tensor(&[3, 8, 2, 16]));
        let forward = |q: &Tensor<f32>, k: &Tensor<f32>, v: &Tensor<f32>, cache: &KvCache| {
            Attention::new().forward_cached(q, k, v, cache).map(|_| ())
        };
        forward(&q, &k, &k, &cache).expect("it fits");
        for (q, k, v, cache, argument) in [
            (&q, &tensor(&[2, 8, 2, 16]), &k, &cache, "k"),
            (&q, &k, &tensor(&[3, 16, 2, 16]), &cache, "v"),
            (&tensor(&[3, 4, 1, 16]), &k, &k, &cache, "q"),
            (&q, &k, &tensor(&[3, 8, 1, 16]), &cache, "v"),
        ] {
            let refused = forward(q, k, v, cache);
            assert!(
                matches!(&refused, Err(Error::ShapeMismatch { argument: name, .. }) if *name == argument),
                "{refused:?}"
            );
        }
        for (q, k, cache, argument) in [
            (&q, &k, &packed, "q"),
            (&tensor(&[3, 4, 16]), &k, &cache, "q"),
            (&q, &tensor(&[24, 2, 16]), &cache, "k"),
        ] {
            let refused = forward(q, k, k, cache);
            assert!(
                matches!(&refused, Err(Error::Rank { argument: name, .. }) if *name == argument),
                "{refused:?}"
            );
        }
        let past = forward(&tensor(&[2, 4, 16]), &k, &k, &packed);
        assert!(
            matches!(
                past,
                Err(Error::Sequence {
                    argument: "cu_seqlens_q",
                    sequence: 1,
                    value: 3,
                    ..
                })
            ),
            "{past:?}"
        );
        let nothing = KvCache::paged([3, 8], &[], &[]).expect("no sequence");
        let heads = forward(&tensor(&[0, 3, 1, 16]), &k, &k, &nothing);
        assert!(matches!(heads, Err(Error::HeadsNotDivisible { .. })), "{heads:?}");
        forward(&tensor(&[0, 4, 1, 16]), &k, &k, &nothing).expect("nothing to do");
    }
}

/// Tables on the device are read and checked before anything reads through them.
#[test]
fn tables_on_the_device_are_checked() {
    for device in devices().all() {
        let tensor = |shape: &[usize], data: &[i32]| Tensor::from_slice(device, shape, data).expect("it fits");
        let cache = |table: &[i32], used: &[i32]| {
            let (table, used) = (tensor(&[2, 2], table), tensor(&[2], used));
            KvCache::of_tensors([4, 16], &table, &used)
        };
        let good = cache(&[3, 0, 1, 9], &[20, 16]).expect("a page that is not used is not read");
        assert_eq!((good.keys(0), good.slot(0, 16)), (20, (0, 0)));
        let outside = cache(&[3, 4, 1, 2], &[20, 16]);
        assert!(
            matches!(
                outside,
                Err(Error::Sequence {
                    argument: "block_table",
                    sequence: 0,
                    value: 4,
                    ..
                })
            ),
            "{outside:?}"
        );
        let unequal = KvCache::of_tensors([4, 16], &tensor(&[2, 2], &[0; 4]), &tensor(&[3], &[0; 3]));
        assert!(matches!(unequal, Err(Error::ShapeMismatch { .. })), "{unequal:?}");
    }
}

/// Compares values of another head_dim than that of the keys, of which two pages hold each sequence's, with calls alone.
fn check_narrow_values<T: Element>(device: &Device, packed: bool) {
    let (head_dim, head_dim_v, keys) = (24, 40, [11, 16]);
    let normal = |shape: &[usize], seed| {
        let numbers = files::normal(shape.iter().product(), 1.0, seed);
        let elements: Vec<T> = numbers.into_iter().map(T::from_f32).collect();
        Tensor::from_slice(device, shape, &elements).expect("it fits")
    };
    let by_rows = normal(&[2, 3, 4, head_dim], 1);
    let queries = by_rows.transpose(1, 2).expect("four axes");
    let (k, v) = (normal(&[4, 8, 2, head_dim], 2), normal(&[4, 8, 2, head_dim_v], 3));
    let cache = KvCache::paged([4, 8], &[0, 1, 2, 3], &keys).expect("pages that exist");
    let (q, cache) = if packed {
        let cache = cache.cu_seqlens_q(&[0, 3, 6]).expect("offsets grow");
        (normal(&[6, 4, head_dim], 1), cache)
    } else {
        (queries.clone(), cache)
    };
    let attention = Attention::new().causal().batch_invariant();
    let output = attention.forward_cached(&q, &k, &v, &cache);
    let output = output.unwrap_or_else(|error| panic!("{device}, packed {packed}: {error}"));
    for (sequence, keys) in keys.into_iter().enumerate() {
        // Pages in order are the keys end to end.
        let end_to_end = |pages: &Tensor<T>| {
            let rows = Tensor::from_slice(device, [32, 2, pages.shape()[3]], &pages.to_vec().expect("read"));
            let rows = rows.and_then(|rows| {
                rows.narrow(0, 16 * sequence, keys as usize)?
                    .transpose(0, 1)?
                    .unsqueeze(0)
            });
            rows.expect("a view")
        };
        let q = queries.narrow(0, sequence, 1).expect("a view");
        let alone = forward_alone(&attention, &q, &end_to_end(&k), &end_to_end(&v)).expect("a call alone");
        let got = match packed {
            true => output
                .out
                .narrow(0, 3 * sequence, 3)
                .and_then(|out| out.transpose(0, 1)),
            false => output.out.select(0, sequence),
        };
        let got = got.expect("a view");
        assert_eq!(got.shape(), [4, 3, head_dim_v]);
        assert_eq!(
            got.to_vec().expect("read"),
            alone.out.to_vec().expect("read"),
            "sequence {sequence} on {device}, packed {packed}"
        );
    }
}

#[test]
fn values_of_another_head_dim() {
    for device in devices().all() {
        for packed in [false, true] {
            check_narrow_values::<f32>(device, packed);
            check_narrow_values::<f16>(device, packed);
        }
    }
}
