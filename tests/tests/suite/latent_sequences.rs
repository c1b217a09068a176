//! Latent attention over caches and packed sequences. Each sequence has the results of the oracle and, where the call does not depend
//! on the batch, those of a call alone, to the bit. Memory that belongs to no key holds NaN and infinities.

use flash_attention::device::DeviceKind;
use flash_attention::error::Error;
use flash_attention::half::f16;
use flash_attention::{Attention, Device, Dtype, Element, KvCache, Sequences, Tensor};
use flash_attention_tests::{check_sequence, devices, drawn, files, for_dtype};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

/// A batch over a cache of latent keys.
#[derive(Clone, Debug)]
struct Latent {
    /// Queries and keys, a sequence each.
    lens: Vec<(usize, usize)>,
    /// Keys of a page; 0 for a rectangular cache.
    page_size: usize,
    heads: (usize, usize),
    /// head_dim of q and k, and of v.
    head_dims: [usize; 2],
    /// True if values are the first columns of keys, else they are a tensor of their own.
    shared: bool,
    dtype: Dtype,
    feature: &'static str,
    batch_invariant: bool,
    seed: u64,
}

/// Masks and scores, by name. All but the first two are score programs.
const FEATURES: [&str; 5] = ["full", "causal", "window", "softcap", "negative scale"];

impl Latent {
    fn attention(&self) -> Attention {
        let attention = match self.batch_invariant {
            true => Attention::new().batch_invariant(),
            false => Attention::new(),
        };
        match self.feature {
            "full" => attention,
            "causal" => attention.causal(),
            "window" => attention.causal().window(20, None),
            "softcap" => attention.causal().softcap(3.0),
            _ => attention.softmax_scale(-0.03).causal(),
        }
    }

    fn draw<T: Element>(&self, len: usize, salt: u64) -> Vec<T> {
        let numbers = files::normal(len, 1.0, self.seed * 5 + salt);
        numbers.into_iter().map(T::from_f32).collect()
    }

    /// The cache, with pages in an order of the seed and one that no sequence uses, and the place of each key of each sequence.
    fn cache(&self) -> (KvCache, Vec<Vec<usize>>) {
        let longest = self.lens.iter().map(|&(_, keys)| keys).max().unwrap_or(0);
        let used: Vec<i32> = self.lens.iter().map(|&(_, keys)| keys as i32).collect();
        let (page_size, pages_of_row) = match self.page_size {
            0 => (longest + 3, 1),
            size => (size, longest.div_ceil(size).max(1)),
        };
        let mut pages: Vec<i32> = (0..=(self.lens.len() * pages_of_row) as i32).collect();
        pages.shuffle(&mut StdRng::seed_from_u64(self.seed));
        pages.pop();
        let slots = |(row, &(_, keys)): (&[i32], &(usize, usize))| {
            let place = |key: usize| row[key / page_size] as usize * page_size + key % page_size;
            (0..keys).map(place).collect()
        };
        let slots = pages.chunks(pages_of_row).zip(&self.lens).map(slots).collect();
        let shape = [pages.len() + 1, page_size];
        let cache = match self.page_size {
            0 => KvCache::slots(shape, &pages, &used),
            _ => KvCache::paged(shape, &pages, &used),
        };
        let mut offsets = vec![0];
        for &(queries, _) in &self.lens {
            offsets.push(offsets[offsets.len() - 1] + queries as i32);
        }
        let cache = cache.and_then(|cache| cache.cu_seqlens_q(&offsets));
        (cache.expect("pages that exist"), slots)
    }

    /// Checks the results of each sequence.
    fn check<T: Element>(&self, device: &Device) {
        let ((cache, slots), attention) = (self.cache(), self.attention());
        let ((heads_q, heads_kv), [head_dim, head_dim_v]) = (self.heads, self.head_dims);
        let [pages, page_size] = cache.shape();
        let (mut k, mut v) = (
            vec![T::from_f32(f32::NAN); pages * page_size * heads_kv * head_dim],
            vec![T::from_f32(f32::INFINITY); pages * page_size * heads_kv * head_dim_v],
        );
        for (sequence, slots) in slots.iter().enumerate() {
            for (to, width, salt) in [(&mut k, head_dim, 1), (&mut v, head_dim_v, 2)] {
                let row = heads_kv * width;
                let rows = self.draw::<T>(slots.len() * row, 3 * sequence as u64 + salt);
                for (slot, from) in slots.iter().zip(rows.chunks(row)) {
                    to[slot * row..][..row].copy_from_slice(from);
                }
            }
        }
        let k = tensor(device, [pages, page_size, heads_kv, head_dim], &k);
        let v = match self.shared {
            true => k.narrow(3, 0, head_dim_v).expect("a view"),
            false => tensor(device, [pages, page_size, heads_kv, head_dim_v], &v),
        };
        let total: usize = self.lens.iter().map(|&(queries, _)| queries).sum();
        let elements: Vec<T> = self.draw(total * heads_q * head_dim, 0);
        let q = tensor(device, [total, heads_q, head_dim], &elements);
        let output = attention.forward_cached(&q, &k, &v, &cache);
        let output = output.unwrap_or_else(|error| panic!("{device}: {error}\n{self:?}"));
        let mut first = 0;
        for (slots, &(queries, keys)) in slots.iter().zip(&self.lens) {
            let by_head = |tensor: &Tensor<T>| tensor.transpose(0, 1).and_then(|tensor| tensor.unsqueeze(0));
            let rows = |tensor: &Tensor<T>| by_head(&tensor.narrow(0, first, queries).expect("rows")).expect("a view");
            let end_to_end = |tensor: &Tensor<T>| {
                let (elements, row) = (tensor.to_vec().expect("read"), heads_kv * tensor.shape()[3]);
                let rows: Vec<T> = (slots.iter())
                    .flat_map(|slot| elements[slot * row..][..row].iter().copied())
                    .collect();
                by_head(&self::tensor(device, [keys, heads_kv, tensor.shape()[3]], &rows)).expect("a view")
            };
            let (q, k) = (rows(&q), end_to_end(&k));
            let v = match self.shared {
                true => k.narrow(3, 0, head_dim_v).expect("a view"),
                false => end_to_end(&v),
            };
            let lse = output.lse.narrow(1, first, queries).expect("rows");
            self.check_sequence(device, [&q, &k, &v], &rows(&output.out), &lse);
            first += queries;
        }
    }

    /// Checks the results of each sequence where queries and keys are packed end to end, without a cache.
    fn check_packed<T: Element>(&self, device: &Device) {
        let ends = |of: fn(&(usize, usize)) -> usize| -> Vec<usize> {
            let end = |n| self.lens[..n].iter().map(of).sum();
            (0..=self.lens.len()).map(end).collect()
        };
        let (ends_q, ends_k) = (ends(|len| len.0), ends(|len| len.1));
        let of_i32 = |ends: &[usize]| -> Vec<i32> { ends.iter().map(|&end| end as i32).collect() };
        let sequences = Sequences::new(&of_i32(&ends_q), &of_i32(&ends_k)).expect("offsets grow");
        let ((heads_q, heads_kv), [head_dim, head_dim_v]) = (self.heads, self.head_dims);
        let drawn = |shape: [usize; 3], salt| tensor(device, shape, &self.draw::<T>(shape.iter().product(), salt));
        let [total_q, total_k] = [&ends_q, &ends_k].map(|ends| ends[self.lens.len()]);
        let (q, k) = (
            drawn([total_q, heads_q, head_dim], 0),
            drawn([total_k, heads_kv, head_dim], 1),
        );
        let v = match self.shared {
            true => k.narrow(2, 0, head_dim_v).expect("a view"),
            false => drawn([total_k, heads_kv, head_dim_v], 2),
        };
        let attention = self.attention();
        let output = attention.forward_ragged(&q, &k, &v, &sequences).expect("it fits");
        for (n, &(queries, keys)) in self.lens.iter().enumerate() {
            let rows = |tensor: &Tensor<T>, first, count| {
                let rows = tensor.narrow(0, first, count).and_then(|rows| rows.transpose(0, 1));
                rows.and_then(|rows| rows.unsqueeze(0)).expect("a view")
            };
            let [q, out] = [&q, &output.out].map(|tensor| rows(tensor, ends_q[n], queries));
            let [k, v] = [&k, &v].map(|tensor| rows(tensor, ends_k[n], keys));
            let lse = output.lse.narrow(1, ends_q[n], queries).expect("rows");
            self.check_sequence(device, [&q, &k, &v], &out, &lse);
        }
    }

    fn check_sequence<T: Element>(&self, device: &Device, inputs: [&Tensor<T>; 3], out: &Tensor<T>, lse: &Tensor<f32>) {
        let (out, lse) = (out.to_vec().expect("read"), lse.to_vec().expect("read"));
        let [queries, keys] = [inputs[0], inputs[1]].map(|tensor| tensor.shape()[2]);
        let name = format!("{device}: {queries} queries, {keys} keys of {self:?}");
        let depends_on_batch = !self.batch_invariant && device.kind() != DeviceKind::Cpu;
        check_sequence(&name, &self.attention(), inputs, (&out, &lse), depends_on_batch);
    }

    fn check_on(&self, devices: impl Iterator<Item = &'static Device>) {
        for device in devices {
            for_dtype!(self.dtype, T => self.check::<T>(device));
        }
    }
}

/// A new tensor of these elements.
fn tensor<T: Element, const N: usize>(device: &Device, shape: [usize; N], elements: &[T]) -> Tensor<T> {
    Tensor::from_slice(device, shape, elements).expect("it fits")
}

fn latent() -> impl Strategy<Value = Latent> {
    let seqlen_q = prop_oneof![4 => Just(1), 1 => Just(0), 1 => 2_usize..6];
    let seqlen_k = prop_oneof![Just(0), Just(1), Just(31), Just(32), Just(33), Just(64), 2_usize..300];
    let page_size = prop_oneof![Just(0), Just(8), Just(16), Just(40), Just(64)];
    let heads = prop_oneof![
        3 => Just((16, 1)),
        1 => Just((17, 1)),
        2 => Just((32, 1)),
        1 => Just((128, 1)),
        1 => Just((6, 2)),
        1 => Just((1, 1)),
    ];
    let head_dims = prop_oneof![
        3 => Just([576, 512]),
        2 => (33_usize..=72, 1_usize..=64).prop_map(|(k, v)| [8 * k, 8 * v.min(k - 1)]),
    ];
    let dtype = prop_oneof![Just(Dtype::F16), Just(Dtype::Bf16)];
    let feature = prop_oneof![6 => 0_usize..2, 2 => 2_usize..FEATURES.len()].prop_map(|i| FEATURES[i]);
    let choices = (dtype, feature, any::<bool>(), any::<bool>(), 0..u32::MAX as u64);
    let lens = prop::collection::vec((seqlen_q, seqlen_k), 1..4);
    (lens, page_size, heads, head_dims, choices).prop_map(
        |(lens, page_size, heads, head_dims, (dtype, feature, shared, batch_invariant, seed))| Latent {
            lens,
            page_size,
            heads,
            head_dims,
            shared,
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
    fn drawn_on_every_device(case in latent()) {
        case.check_on(devices().all());
    }
}

/// The sizes of DeepSeek's models, decoding and a chunk of a prompt in one batch, with splits over keys.
#[test]
fn sizes_of_models() {
    for (dtype, heads, shared, feature, batch_invariant) in [
        (Dtype::Bf16, 128, true, "causal", false),
        (Dtype::F16, 16, true, "full", true),
        (Dtype::F16, 16, false, "causal", false),
        (Dtype::Bf16, 16, true, "softcap", false),
    ] {
        let case = Latent {
            lens: vec![(1, 1100), (3, 65), (1, 0), (0, 40), (1, 1), (2, 1)],
            page_size: 64,
            heads: (heads, 1),
            head_dims: [576, 512],
            shared,
            dtype,
            feature,
            batch_invariant,
            seed: 7,
        };
        case.check_on(devices().all());
    }
}

/// Sequences packed end to end: each has the results of the oracle and, to the bit, those of a call alone.
#[test]
fn packed_sequences() {
    for (shared, dtype) in [(true, Dtype::Bf16), (false, Dtype::F16)] {
        let case = Latent {
            lens: vec![(40, 70), (3, 0), (0, 9), (1, 33), (33, 1)],
            page_size: 0,
            heads: (6, 2),
            head_dims: [576, 512],
            shared,
            dtype,
            feature: "causal",
            batch_invariant: true,
            seed: 3,
        };
        for device in devices().all() {
            for_dtype!(dtype, T => case.check_packed::<T>(device));
        }
    }
}

/// Steps of decoding write their latent keys where the cache says, with padding before sequences or without, and attend to all
/// keys written so far.
#[test]
fn growing_caches() {
    const HEADS: usize = 16;
    let case = Latent {
        lens: Vec::new(),
        page_size: 8,
        heads: (HEADS, 1),
        head_dims: [576, 512],
        shared: true,
        dtype: Dtype::F16,
        feature: "causal",
        batch_invariant: true,
        seed: 11,
    };
    let keys: [Vec<f16>; 2] = [1, 2].map(|salt| case.draw(64 * 576, salt));
    for device in devices().all() {
        let paged = KvCache::paged([12, 8], &[5, 0, 3, 2, 11, 6, 1, 7, 10, 8], &[0, 0]);
        let padded = KvCache::slots([3, 45], &[2, 0], &[3, 5]).and_then(|cache| cache.leftpad_k(&[3, 5]));
        for cache in [paged, padded] {
            let mut cache = cache.expect("pages");
            let [pages, page_size] = cache.shape();
            let poison = vec![f16::NAN; pages * page_size * 576];
            let mut latent = tensor(device, [pages, page_size, 1, 576], &poison);
            for (step, counts) in [[9, 0], [1, 33], [1, 1], [25, 0], [2, 4]].into_iter().enumerate() {
                cache = cache.append(&counts).expect("room");
                let ends = [0, counts[0], counts[0] + counts[1]];
                cache = cache.cu_seqlens_q(&ends).expect("offsets grow");
                let total = ends[2] as usize;
                let new = (0..2).flat_map(|sequence| {
                    let range = cache.new_keys(sequence);
                    &keys[sequence][range.start * 576..range.end * 576]
                });
                let new: Vec<f16> = new.copied().collect();
                let new = tensor(device, [total, 1, 576], &new);
                cache.write_latent(&new, &mut latent).expect("it fits");

                let q = case.draw::<f16>(total * HEADS * 576, 3 + step as u64);
                let q = tensor(device, [total, HEADS, 576], &q);
                let values = latent.narrow(3, 0, 512).expect("a view");
                let output = case.attention().forward_cached(&q, &latent, &values, &cache);
                let output = output.expect("it fits");
                for (sequence, keys) in keys.iter().enumerate() {
                    let (first, count) = (ends[sequence] as usize, counts[sequence] as usize);
                    let rows = |tensor: &Tensor<f16>| {
                        let rows = tensor.narrow(0, first, count).and_then(|rows| rows.transpose(0, 1));
                        rows.and_then(|rows| rows.unsqueeze(0)).expect("a view")
                    };
                    let seqlen_k = cache.new_keys(sequence).end;
                    let k = tensor(device, [1, 1, seqlen_k, 576], &keys[..seqlen_k * 576]);
                    let v = k.narrow(3, 0, 512).expect("a view");
                    let lse = output.lse.narrow(1, first, count).expect("rows");
                    case.check_sequence(device, [&rows(&q), &k, &v], &rows(&output.out), &lse);
                }
            }
            let wrong = tensor(device, [6, 1, 512], &[f16::ZERO; 6 * 512]);
            let refused = cache.write_latent(&wrong, &mut latent);
            let is_named = matches!(
                &refused,
                Err(Error::ShapeMismatch {
                    argument: "latent_new",
                    ..
                })
            );
            assert!(is_named, "{device}: {refused:?}");
        }
    }
}
