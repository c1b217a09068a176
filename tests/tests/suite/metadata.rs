//! Tables, offsets and lengths that say anything: each batch is refused with a typed error, exactly if it would read or write
//! outside of its tensors, or has the right answer.

use flash_attention::device::DeviceKind;
use flash_attention::error::Error;
use flash_attention::{Attention, Device, KvCache, NewKeys, Sequences, Tensor};
use flash_attention_tests::{devices, files};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const HEAD_DIM: usize = 8;

/// Numbers that are mostly right: of `low .. high`, and one in `rare` beyond by a little or a lot.
fn number(rng: &mut StdRng, low: i32, high: i32, rare: u32) -> i32 {
    if rng.random_ratio(1, rare) {
        let strange = [
            i32::MIN,
            -1,
            low - 1,
            high,
            high.saturating_add(1),
            high.saturating_add(7),
            i32::MAX,
        ];
        strange[rng.random_range(0..strange.len())]
    } else {
        rng.random_range(low..high.max(low + 1))
    }
}

/// out of one query that sees all of these keys.
fn average(q: &[f32], keys: &[(Vec<f32>, Vec<f32>)]) -> Vec<f64> {
    let (mut sum, mut out) = (0.0, vec![0.0; HEAD_DIM]);
    for (k, v) in keys {
        let product: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        let weight = (product / (HEAD_DIM as f64).sqrt()).exp();
        sum += weight;
        out.iter_mut()
            .zip(v)
            .for_each(|(out, v)| *out += weight * f64::from(*v));
    }
    out.iter().map(|x| if sum == 0.0 { 0.0 } else { x / sum }).collect()
}

fn check_row(device: &Device, got: &[f32], want: &[f64], case: &dyn std::fmt::Debug) {
    for (got, want) in got.iter().zip(want) {
        assert!(
            (f64::from(*got) - want).abs() < 1e-5,
            "{device}: {got}, want {want}: {case:?}"
        );
    }
}

/// Metadata of a paged cache, or of one with slots, with a step of new keys.
#[derive(Debug)]
struct Drawn {
    /// True for a block table; else the table is `cache_batch_idx`, with a row for each sequence.
    is_paged: bool,
    pages: usize,
    page_size: usize,
    batch: usize,
    max_pages: usize,
    table: Vec<i32>,
    used: Vec<i32>,
    pads: Vec<i32>,
    new: Vec<i32>,
    queries: Vec<i32>,
    total_q: usize,
}

impl Drawn {
    fn new(rng: &mut StdRng) -> Self {
        let rare = [4, 30, 400][rng.random_range(0..3)];
        let (pages, page_size) = (rng.random_range(1..5), 8 * rng.random_range(1..3));
        let is_paged = rng.random_ratio(3, 4);
        let (batch, most_pages) = (rng.random_range(0..4), rng.random_range(0..4));
        let max_pages = if is_paged { most_pages } else { 1 };
        let room = (max_pages * page_size) as i32;
        let entries = batch * max_pages;
        let table = (0..entries).map(|_| number(rng, 0, pages as i32, rare)).collect();
        let used: Vec<i32> = (0..batch).map(|_| number(rng, 0, room + 1, rare)).collect();
        let pads = used
            .iter()
            .map(|&used| number(rng, 0, (used / 2).max(1), rare))
            .collect();
        let new = used
            .iter()
            .map(|&used| number(rng, 0, room.saturating_sub(used).clamp(1, 4), rare))
            .collect();
        let mut queries: Vec<i32> = vec![if rng.random_ratio(1, rare) { 1 } else { 0 }];
        for sequence in 0..batch {
            let count = number(rng, 0, 3, rare);
            queries.push(queries[sequence].saturating_add(count));
        }
        let last = usize::try_from(queries[batch]).unwrap_or(0).min(20);
        let total_q = last + rng.random_range(0..2) - usize::from(last > 0 && rng.random_ratio(1, rare));
        Self {
            is_paged,
            pages,
            page_size,
            batch,
            max_pages,
            table,
            used,
            pads,
            new,
            queries,
            total_q,
        }
    }

    /// True if every key and query exists, and new keys are written where no key is.
    fn is_right(&self) -> bool {
        let room = (self.max_pages * self.page_size) as i64;
        let offsets = self.queries[0] == 0 && self.queries.windows(2).all(|two| two[0] <= two[1]);
        let ends = self.queries[self.batch] as i64 <= self.total_q as i64;
        let mut slots = Vec::new(); // of each key: page and place, and if it is new
        for sequence in 0..self.batch {
            let [used, pad, new] = [&self.used, &self.pads, &self.new].map(|of| i64::from(of[sequence]));
            if !(0..=room).contains(&used) || !(0..=used).contains(&pad) || new < 0 || used + new > room {
                return false;
            }
            // A sequence without keys has a row all the same.
            if !self.is_paged && !(0..self.pages as i32).contains(&self.table[sequence]) {
                return false;
            }
            for key in 0..used + new {
                let page = self.table[sequence * self.max_pages + key as usize / self.page_size];
                if !(0..self.pages as i32).contains(&page) {
                    return false;
                }
                if key >= pad {
                    slots.push((page, key as usize % self.page_size, key >= used));
                }
            }
        }
        let new = slots.iter().enumerate().filter(|(_, slot)| slot.2);
        let meets = |(index, slot): (usize, &(i32, usize, bool))| {
            let same = |(other, of): (usize, &(i32, usize, bool))| other != index && (of.0, of.1) == (slot.0, slot.1);
            slots.iter().enumerate().any(same)
        };
        offsets && ends && !new.into_iter().any(meets)
    }

    fn cache(&self) -> Result<KvCache, Error> {
        type Make = fn([usize; 2], &[i32], &[i32]) -> Result<KvCache, Error>;
        let make: Make = if self.is_paged { KvCache::paged } else { KvCache::slots };
        let cache = make([self.pages, self.page_size], &self.table, &self.used)?;
        let cache = cache.leftpad_k(&self.pads)?.append(&self.new)?;
        cache.cu_seqlens_q(&self.queries)
    }

    /// Runs a step; returns true if it was done.
    fn check(&self, device: &Device, seed: u64) -> bool {
        let data = |rows: usize, salt| files::normal(rows * HEAD_DIM, 1.0, 4 * seed + salt);
        let tensor = |shape: &[usize], data: &[f32]| Tensor::from_slice(device, shape, data).expect("it fits");
        let shape = [self.pages, self.page_size, 1, HEAD_DIM];
        let rows = self.pages * self.page_size;
        let (of_k, of_v, of_q) = (data(rows, 0), data(rows, 1), data(self.total_q, 2));
        let (mut k, mut v) = (tensor(&shape, &of_k), tensor(&shape, &of_v));
        let q = tensor(&[self.total_q, 1, HEAD_DIM], &of_q);
        let step = || -> Result<_, Error> {
            let cache = self.cache()?;
            let total: usize = (0..self.batch).map(|sequence| cache.new_keys(sequence).len()).sum();
            let of_new = data(total, 3);
            let new = tensor(&[total, 1, HEAD_DIM], &of_new);
            let new = NewKeys::new(&new, &new);
            let output = Attention::new().forward_append(&q, &new, &mut k, &mut v, &cache)?;
            Ok((of_new, output.out.to_vec()?))
        };
        let mut step = step;
        match step() {
            Ok((of_new, out)) => {
                assert!(self.is_right(), "{device}: {self:?} was done");
                let mut next_new = of_new.chunks(HEAD_DIM);
                for sequence in 0..self.batch {
                    let [used, pad, new] = [&self.used, &self.pads, &self.new].map(|of| of[sequence] as usize);
                    let key = |place: usize| {
                        let page = self.table[sequence * self.max_pages + place / self.page_size] as usize;
                        let row = (page * self.page_size + place % self.page_size) * HEAD_DIM;
                        (of_k[row..row + HEAD_DIM].to_vec(), of_v[row..row + HEAD_DIM].to_vec())
                    };
                    let mut keys: Vec<_> = (pad..used).map(key).collect();
                    let new = next_new.by_ref().take(new);
                    keys.extend(new.map(|row| (row.to_vec(), row.to_vec())));
                    for row in self.queries[sequence] as usize..self.queries[sequence + 1] as usize {
                        let place = row * HEAD_DIM..(row + 1) * HEAD_DIM;
                        check_row(device, &out[place.clone()], &average(&of_q[place], &keys), self);
                    }
                }
                true
            }
            Err(Error::Sequence { sequence, .. }) => {
                assert!(
                    sequence <= self.batch && !self.is_right(),
                    "{device}: {self:?} was refused"
                );
                let unchanged = k.to_vec().expect("read") == of_k && v.to_vec().expect("read") == of_v;
                assert!(unchanged, "{device}: {self:?} was refused and written");
                false
            }
            Err(error) => panic!("{device}: {error}: {self:?}"),
        }
    }
}

/// Tests tables of other axes, and tensors with more rows than kernels count, which views that repeat a row have.
#[test]
fn other_axes_and_rows_beyond_all_limits_are_refused() {
    for device in devices().all() {
        let table =
            |shape: &[usize]| Tensor::from_slice(device, shape, &vec![0; shape.iter().product()]).expect("small");
        for (q, k, argument) in [
            ([2, 2].as_slice(), [4].as_slice(), "cu_seqlens_q"),
            (&[1], &[], "cu_seqlens_k"),
        ] {
            let refused = Sequences::of_tensors(&table(q), &table(k));
            assert!(
                matches!(refused, Err(Error::Rank { argument: name, .. }) if name == argument),
                "{refused:?}"
            );
        }
        let few = Tensor::from_slice(device, [7, 1, HEAD_DIM], &[0.5_f32; 56]).expect("small");
        let sequences = Sequences::new(&[0, 1], &[0, 7]).expect("offsets grow");
        for rows in [(1 << 31) - 8, (1 << 32) + 100, 1 << 33] {
            let view = [0, 0, 1];
            let many =
                Tensor::from_slice_strided(device, [rows, 1, HEAD_DIM], view, &[0.5_f32; HEAD_DIM]).expect("small");
            for (q, k, argument) in [(&few, &many, "k"), (&many, &few, "q")] {
                let refused = Attention::new().plan_ragged(q, k, k, &sequences);
                match refused {
                    Err(Error::SequenceTooLong {
                        argument: name, seqlen, ..
                    }) => {
                        // The CPU counts the rows that belong to no sequence.
                        assert!(
                            name == argument && (rows - 7..=rows).contains(&seqlen),
                            "{device}: {name}, {seqlen}"
                        );
                    }
                    other => panic!("{device}: {other:?}"),
                }
            }
        }
    }
}

/// Number of batches that a device is tested with: 10,000, and a sample of them on an emulator, unless `PROPTEST_CASES` says how many.
fn runs(device: &Device) -> u64 {
    let chosen = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    chosen.unwrap_or(match device.kind() {
        DeviceKind::Emulator => 150,
        _ => 10_000,
    })
}

#[test]
fn any_table_is_refused_or_read_within_the_cache() {
    for device in devices().all() {
        let runs = runs(device);
        let done = (0..runs)
            .filter(|&seed| Drawn::new(&mut StdRng::seed_from_u64(seed)).check(device, seed))
            .count();
        // Neither all were refused nor all were right.
        assert!(
            done > runs as usize / 10 && done < runs as usize * 9 / 10,
            "{device}: {done} of {runs}"
        );
    }
}

#[test]
fn any_offsets_are_refused_or_read_within_the_tensors() {
    for device in devices().all() {
        let runs = runs(device);
        let mut done = 0;
        for seed in 0..runs {
            let rng = &mut StdRng::seed_from_u64(seed);
            let rare = [4, 30, 400][rng.random_range(0..3)];
            let batch = rng.random_range(0..4);
            let mut offsets = || {
                let mut offsets: Vec<i32> = vec![if rng.random_ratio(1, rare) { 2 } else { 0 }];
                for sequence in 0..batch {
                    offsets.push(offsets[sequence].saturating_add(number(rng, 0, 6, rare)));
                }
                offsets
            };
            let [cu_q, cu_k]: [Vec<i32>; 2] = [offsets(), offsets()];
            let lens = cu_k.windows(2).map(|two| two[1].saturating_sub(two[0]));
            let used: Vec<i32> = lens.map(|len| number(rng, 0, len.saturating_add(1), rare)).collect();
            let rows = |cu: &[i32], rng: &mut StdRng| {
                let last = usize::try_from(cu[batch]).unwrap_or(0).min(40);
                last + rng.random_range(0..2) - usize::from(last > 0 && rng.random_ratio(1, rare))
            };
            let [total_q, total_k] = [rows(&cu_q, rng), rows(&cu_k, rng)];
            let case = (&cu_q, &cu_k, &used, total_q, total_k);
            let right = |cu: &[i32]| cu[0] == 0 && cu.windows(2).all(|two| two[0] <= two[1]);
            // Keys that do not count may lie outside.
            let mut ends = cu_k
                .iter()
                .zip(&used)
                .map(|(begin, used)| i64::from(*begin) + i64::from(*used));
            let within = i64::from(cu_q[batch]) <= total_q as i64 && ends.all(|end| end <= total_k as i64);
            let fewer = cu_k
                .windows(2)
                .zip(&used)
                .all(|(two, used)| (0..=two[1].saturating_sub(two[0])).contains(used));
            let is_right = right(&cu_q) && right(&cu_k) && fewer && within;
            let data = |rows: usize, salt| files::normal(rows * HEAD_DIM, 1.0, 3 * seed + salt);
            let (of_q, of_k) = (data(total_q, 0), data(total_k, 1));
            let tensor =
                |rows: usize, data: &[f32]| Tensor::from_slice(device, [rows, 1, HEAD_DIM], data).expect("it fits");
            let (q, k) = (tensor(total_q, &of_q), tensor(total_k, &of_k));
            let run = || -> Result<_, Error> {
                let sequences = Sequences::new(&cu_q, &cu_k)?.seqused_k(&used)?;
                let output = Attention::new().forward_ragged(&q, &k, &k, &sequences)?;
                output.out.to_vec()
            };
            match run() {
                Ok(out) => {
                    assert!(is_right, "{device}: {case:?} was done");
                    done += 1;
                    for sequence in 0..batch {
                        let row = |row: usize| of_k[row * HEAD_DIM..][..HEAD_DIM].to_vec();
                        let first = cu_k[sequence];
                        let keys = first as usize..(first + used[sequence]) as usize;
                        let keys: Vec<_> = keys.map(|key| (row(key), row(key))).collect();
                        for query in cu_q[sequence] as usize..cu_q[sequence + 1] as usize {
                            let place = query * HEAD_DIM..(query + 1) * HEAD_DIM;
                            check_row(device, &out[place.clone()], &average(&of_q[place], &keys), &case);
                        }
                    }
                }
                Err(Error::Sequence { .. }) => assert!(!is_right, "{device}: {case:?} was refused"),
                Err(error) => panic!("{device}: {error}: {case:?}"),
            }
        }
        assert!(done > runs / 10 && done < runs * 9 / 10, "{device}: {done} of {runs}");
    }
}
