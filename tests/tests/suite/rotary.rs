//! Rows that devices turn and move themselves: rotary embeddings, and new keys on their way to a cache. Every device gives the bits of
//! the CPU, writes nothing else, and moves no more bytes than it has to.

use flash_attention::half::f16;
use flash_attention::{Arch, Device, Dtype, Element, KvCache, NewKeys, Rotary, Tensor};
use flash_attention_tests::drawn::config;
use flash_attention_tests::{devices, files, for_dtype};
use proptest::prelude::*;
use proptest::sample::subsequence;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Layout of a tensor in memory.
#[derive(Clone, Debug)]
struct Strides {
    /// Axes but the last, the one with the smallest stride first.
    order: Vec<usize>,
    /// Elements between two rows.
    gap: usize,
    /// Stride of the last axis.
    step: usize,
}

impl Strides {
    fn any(rank: usize, step: impl Strategy<Value = usize>) -> impl Strategy<Value = Self> {
        let order = subsequence((0..rank - 1).collect::<Vec<_>>(), rank - 1).prop_shuffle();
        (order, prop_oneof![Just(0), 1..9_usize], step).prop_map(|(order, gap, step)| Self { order, gap, step })
    }

    /// A tensor with this layout: mostly normal numbers, some that are not finite.
    fn tensor<T: Element>(&self, device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
        let mut strides = vec![self.step; shape.len()];
        let mut next = shape[shape.len() - 1] * self.step + self.gap;
        for &axis in &self.order {
            strides[axis] = next;
            next *= shape[axis];
        }
        let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0];
        let data = files::normal(next, 1.0, seed).into_iter().enumerate();
        let data =
            data.map(
                |(i, x): (usize, f32)| match (i as u64).wrapping_mul(0x9e37_79b9).wrapping_add(seed) % 97 {
                    place @ 0..4 => T::from_f64(special[place as usize]),
                    _ => T::from_f32(x),
                },
            );
        Tensor::from_slice_strided(device, shape, strides, &data.collect::<Vec<_>>()).expect("it fits")
    }
}

/// Rotary embedding of a part of a head.
#[derive(Clone, Debug)]
struct Turns {
    rotary: Rotary,
    /// Number of positions, from 0 on.
    positions: i32,
}

impl Turns {
    fn any(head_dim: usize) -> impl Strategy<Value = Self> {
        (1..=head_dim / 2, any::<bool>(), 0..3_usize, any::<u64>()).prop_map(|(pairs, interleaved, kind, seed)| {
            let (rotary, positions) = match kind {
                0 => (Rotary::new(2 * pairs, 10_000.0), i32::MAX),
                1 => (
                    Rotary::new(2 * pairs, 5e5).and_then(|rotary| rotary.scaled(8.0)),
                    100_000,
                ),
                _ => {
                    let [cos, sin] = [0, 1].map(|of| files::normal(30 * pairs, 1.0, seed.wrapping_add(of)));
                    (Rotary::of_tables(2 * pairs, &cos, &sin), 30)
                }
            };
            let rotary = rotary.expect("an even number");
            let rotary = if interleaved { rotary.interleaved() } else { rotary };
            Self { rotary, positions }
        })
    }
}

/// Elements as bits. NaN is one value: arithmetic keeps the bits of an operand on one device, and has a NaN of its own on another.
fn bits<T: Element>(tensor: &Tensor<T>) -> Vec<u64> {
    let elements = tensor.to_vec().expect("read").into_iter().map(T::to_f64);
    elements
        .map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() })
        .collect()
}

/// A tensor that is turned: `[batch, heads, seqlen, head_dim]`, or `[total, heads, head_dim]`.
#[derive(Clone, Debug)]
struct Case {
    dtype: Dtype,
    shape: Vec<usize>,
    strides: Strides,
    turns: Turns,
    positions: Vec<i32>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (any::<bool>(), 1..4_usize, 1..20_usize, 1..7_usize, 2..70_usize);
    let shape = shape.prop_map(|(packed, batch, heads, seqlen, head_dim)| match packed {
        true => vec![batch * seqlen, heads, head_dim],
        false => vec![batch, heads, seqlen, head_dim],
    });
    shape.prop_flat_map(|shape| {
        let rank = shape.len();
        let turns = Turns::any(shape[rank - 1]);
        (0..3_usize, Strides::any(rank, 1..3_usize), turns, any::<u32>()).prop_flat_map(
            move |(dtype, strides, turns, seed)| {
                let tokens = shape[0] * if rank == 4 { shape[2] } else { 1 };
                let case = Case {
                    dtype: DTYPES[dtype],
                    shape: shape.clone(),
                    strides,
                    turns: turns.clone(),
                    positions: Vec::new(),
                    seed: seed.into(),
                };
                let position = prop_oneof![0..30, 0..turns.positions];
                prop::collection::vec(position, tokens).prop_map(move |positions| Case {
                    positions,
                    ..case.clone()
                })
            },
        )
    })
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn every_device_turns_to_the_same_bits(case in case()) {
        for_dtype!(case.dtype, T => {
            let turned = |device: &Device| {
                let x = case.strides.tensor::<T>(device, &case.shape, case.seed);
                let Turns { rotary, .. } = &case.turns;
                let both = [rotary.forward(&x, &case.positions), rotary.backward(&x, &case.positions)];
                both.map(|turned| bits(&turned.expect("positions")))
            };
            let want = turned(&Device::cpu());
            for device in devices().all() {
                prop_assert_eq!(&turned(device), &want, "{}", device);
            }
        });
    }
}

/// A step of new keys in a cache.
#[derive(Clone, Debug)]
struct Step {
    dtype: Dtype,
    /// Pages, keys of a page, heads.
    shape: [usize; 3],
    /// head_dim of k and v.
    head_dims: [usize; 2],
    /// Pages or rows of the sequences, all different.
    table: Vec<i32>,
    is_paged: bool,
    used: Vec<i32>,
    pads: Vec<i32>,
    new: Vec<i32>,
    /// If new k and new v are packed; only packed ones have different numbers of new keys.
    packed: [bool; 2],
    /// Layouts of new k and v, packed and as a batch, and of the pages of k and v.
    of_new: [Strides; 4],
    of_pages: [Strides; 2],
    turns: Option<(Turns, Vec<i32>)>,
    seed: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let sizes = (
        1..4_usize,
        1..4_usize,
        any::<bool>(),
        1..11_usize,
        [2..40_usize, 1..40_usize],
    );
    sizes.prop_flat_map(|(batch, max_pages, is_paged, heads, head_dims)| {
        let page_size = if is_paged { 8 } else { 8 * max_pages + 1 };
        let entries = batch * if is_paged { max_pages } else { 1 };
        let table = Just((0..entries as i32 + 2).collect::<Vec<_>>()).prop_shuffle();
        let counts = prop::collection::vec((0..4_i32, 0..6_i32, 0..3_i32), batch);
        let strides = || {
            let of_new = |rank| Strides::any(rank, 1..3_usize);
            (
                [of_new(3), of_new(3)],
                [of_new(4), of_new(4)],
                [Strides::any(4, 1..2_usize), Strides::any(4, 1..2_usize)],
            )
        };
        let first = prop::collection::vec(0..20_i32, batch);
        let turns = prop::option::of((Turns::any(head_dims[0]), first));
        let dtype = (0..3_usize).prop_map(|dtype| DTYPES[dtype]);
        (dtype, table, counts, any::<[bool; 2]>(), strides(), turns, any::<u32>()).prop_map(
            move |(dtype, table, counts, packed, (packed_new, batch_new, of_pages), turns, seed)| {
                let [a, b] = packed_new;
                let [c, d] = batch_new;
                let same = counts[0].1;
                let new = counts
                    .iter()
                    .map(|&(_, new, _)| if packed == [true; 2] { new } else { same });
                let room = 8 * max_pages as i32;
                let used = counts
                    .iter()
                    .map(|&(used, new, _)| (room - used * 3 - new.max(same)).max(0));
                let used: Vec<i32> = used.collect();
                Step {
                    dtype,
                    shape: [entries + 2, page_size, heads],
                    head_dims,
                    table: table[..entries].to_vec(),
                    is_paged,
                    pads: used
                        .iter()
                        .zip(&counts)
                        .map(|(&used, &(.., pad))| pad.min(used))
                        .collect(),
                    new: new.collect(),
                    used,
                    packed,
                    of_new: [a, b, c, d],
                    of_pages,
                    turns,
                    seed: seed.into(),
                }
            },
        )
    })
}

impl Step {
    fn cache(&self) -> KvCache {
        let [pages, page_size, _] = self.shape;
        let cache = match self.is_paged {
            true => KvCache::paged([pages, page_size], &self.table, &self.used),
            false => KvCache::slots([pages, page_size], &self.table, &self.used),
        };
        let cache = cache.and_then(|cache| cache.leftpad_k(&self.pads)?.append(&self.new));
        cache.expect("room")
    }

    /// The pages of k or v as they were.
    fn pages<T: Element>(&self, device: &Device, of: usize) -> Tensor<T> {
        let [pages, page_size, heads] = self.shape;
        let shape = [pages, page_size, heads, self.head_dims[of]];
        self.of_pages[of].tensor(device, &shape, self.seed + of as u64)
    }

    fn new_keys<T: Element>(&self, device: &Device, of: usize) -> Tensor<T> {
        let (heads, head_dim) = (self.shape[2], self.head_dims[of]);
        let (shape, strides) = match self.packed[of] {
            true => (
                vec![self.new.iter().sum::<i32>() as usize, heads, head_dim],
                &self.of_new[of],
            ),
            false => (
                vec![self.new.len(), heads, self.new[0] as usize, head_dim],
                &self.of_new[2 + of],
            ),
        };
        strides.tensor(device, &shape, self.seed + 2 + of as u64)
    }

    /// k and v after the step.
    fn written<T: Element>(&self, device: &Device) -> [Tensor<T>; 2] {
        let [mut k, mut v] = [0, 1].map(|of| self.pages::<T>(device, of));
        let [new_k, new_v] = [0, 1].map(|of| self.new_keys::<T>(device, of));
        let new = NewKeys::new(&new_k, &new_v);
        let new = match &self.turns {
            Some((turns, first)) => new.rotary(&turns.rotary).positions(first),
            None => new,
        };
        self.cache().write(&new, &mut k, &mut v).expect("it fits");
        [k, v]
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn every_device_writes_new_keys_to_their_places_and_nothing_else(step in step()) {
        for_dtype!(step.dtype, T => {
            let cpu = Device::cpu();
            let cache = step.cache();
            let written = step.written::<T>(&cpu).map(|tensor| bits(&tensor));
            for (of, written) in written.iter().enumerate() {
                let row = step.shape[2] * step.head_dims[of];
                let mut want = bits(&step.pages::<T>(&cpu, of));
                let new = step.new_keys::<T>(&cpu, of);
                // Tokens first: [total, heads, head_dim], or [batch, seqlen, heads, head_dim].
                let new = if step.packed[of] { new } else { new.transpose(1, 2).expect("four axes") };
                let new = match (&step.turns, of) {
                    (Some((turns, first)), 0) => {
                        let counts = first.iter().zip(&step.new);
                        let positions: Vec<i32> = counts.flat_map(|(&first, &count)| first..first + count).collect();
                        let packed = Tensor::from_slice(&cpu, [positions.len(), step.shape[2], step.head_dims[0]],
                            &new.to_vec().expect("read")).expect("it fits");
                        turns.rotary.forward(&packed, &positions).expect("positions")
                    }
                    _ => new,
                };
                let new = bits(&new);
                let slots = (0..cache.batch()).flat_map(|sequence| {
                    cache.new_keys(sequence).map(move |key| (sequence, key))
                });
                for ((sequence, key), new) in slots.zip(new.chunks(row)) {
                    let (page, place) = cache.slot(sequence, key);
                    want[(page * step.shape[1] + place) * row..][..row].copy_from_slice(new);
                }
                prop_assert_eq!(written, &want);
            }
            for device in devices().all() {
                let got = step.written::<T>(device).map(|tensor| bits(&tensor));
                prop_assert_eq!(&got, &written, "{}", device);
            }
        });
    }
}

/// Tests that an emulated GPU reads and writes the new rows once, and lists beside them, however large the cache is.
#[test]
fn a_step_moves_the_bytes_of_the_new_keys() {
    if !devices().emulation() {
        return;
    }
    let device = &Device::emulator(Arch::Sm80); // of its own, whose counters no other test changes
    let (batch, heads, head_dim, new) = (3, 2, 64, 2);
    let shape = [40, 16, heads, head_dim];
    let pages = || Tensor::<f16>::zeros(device, shape).expect("it fits");
    let (mut k, mut v) = (pages(), pages());
    let table: Vec<i32> = (0..30).collect();
    let cache = KvCache::paged([40, 16], &table, &[100, 17, 0]).and_then(|cache| cache.append(&[new; 3]));
    let tokens = batch * new as usize;
    let x = Tensor::from_slice(
        device,
        [tokens, heads, head_dim],
        &vec![f16::ONE; tokens * heads * head_dim],
    );
    let x = x.expect("it fits");
    let rotary = Rotary::new(head_dim, 10_000.0).expect("an even number");
    device.reset_counters();
    let new_keys = NewKeys::new(&x, &x).rotary(&rotary);
    cache.expect("room").write(&new_keys, &mut k, &mut v).expect("it fits");
    let counters = device.counters().expect("the emulator counts");
    let rows = 2 * (tokens * heads * head_dim * size_of::<f16>()) as u64;
    assert_eq!(counters.global_written_bytes, rows);
    // Each of 256 threads reads its token, 24 bytes, and the phase of its pair.
    let lists = 2 * tokens as u64 * 256 * (24 + 8);
    assert!(
        (rows..=rows + lists).contains(&counters.global_read_bytes),
        "{counters:?}"
    );
}

/// Tests new keys that lie in the memory of the cache, where they are copied before they are written.
#[test]
fn new_keys_may_lie_in_the_cache() {
    for device in devices().all() {
        let data: Vec<f32> = (0..4 * 8 * 8).map(|x| x as f32).collect();
        let mut k = Tensor::from_slice(device, [4, 8, 1, 8], &data).expect("it fits");
        let mut v = Tensor::from_slice(device, [4, 8, 1, 8], &data).expect("it fits");
        // The second key of page 0, the third, and so on, each in the place of the one before it.
        let cache = KvCache::paged([4, 8], &[0], &[0])
            .and_then(|cache| cache.append(&[7]))
            .expect("room");
        let view = |pages: &Tensor<f32>| {
            pages
                .select(0, 0)
                .and_then(|page| page.narrow(0, 1, 7))
                .expect("in range")
        };
        let (new_k, new_v) = (view(&k), view(&v));
        cache
            .write(&NewKeys::new(&new_k, &new_v), &mut k, &mut v)
            .expect("it fits");
        let mut want = data.clone();
        want.copy_within(8..64, 0);
        for written in [k, v] {
            assert_eq!(written.to_vec().expect("read"), want, "{device}");
        }
    }
}
