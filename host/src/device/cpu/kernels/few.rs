//! Attention of few queries, too few for lanes: lanes are elements of a head, and rows of K and V are read in the order of keys,
//! wherever each lies. Up to 4 queries share what is read; the bits of a query's result do not depend on how many do.

use std::ops::Range;

use flash_attention_kernels::entries::Dtype;

use super::MAX_LANES;
use crate::device::cpu::vector::{Vector, prefetch_l1, prefetch_l2};

/// One tile of keys passing some queries, where there are too few of them for lanes: here lanes are elements of a head.
pub(in crate::device::cpu) struct Few<'a> {
    /// Number of keys of the tile that each of the queries sees.
    pub keys: usize,
    pub dtype: Dtype,
    pub k: Rows,
    pub v: Rows,
    /// Elements of a row of K, and of V.
    pub head_dim: usize,
    pub head_dim_v: usize,
    pub queries: &'a [Query],
    /// Room for twice the scores of the keys for [`TOGETHER`] queries, in whole registers.
    pub scores: *mut f32,
    pub scale_log2: f32,
    /// Position of the tile's first key in the sequence.
    pub first_key: usize,
    /// True if rows of K that are read later are asked for as far as the L1 cache, false for the L2 cache.
    pub into_l1: bool,
}

/// Places of one query.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Query {
    /// Query in whole registers, with zeros past head_dim.
    pub query: *const f32,
    pub max: *mut f32,
    pub sum: *mut f32,
    /// Key with the largest score so far, counted from the start of the sequence.
    pub best: *mut u32,
    /// Output in whole registers.
    pub output: *mut f32,
}

/// Most queries that share what is read.
pub(in crate::device::cpu) const TOGETHER: usize = 4;

/// Rows of keys or values by their addresses, and for each of them a row that is read later: the processor asks memory for that one
/// when it reads the first.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) enum Rows {
    Strided { rows: Strided, later: Strided },
    Paged { rows: Listed, later: Strided },
    Listed { rows: Listed, later: Listed },
}

/// Rows at equal distances: address of the first one, and bytes from one to the next.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Strided(pub *const u8, pub usize);

/// Rows anywhere: a list of addresses, and the bytes from each to its row.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Listed(pub *const *const u8, pub usize);

/// Addresses of rows. Loops over keys take them by type: reading addresses of rows at equal distances made decoding in f32 12 %
/// slower, and deciding at each row 3 %, measured on Zen 4.
pub(super) trait Addresses: Copy {
    /// Returns the address of a row.
    ///
    /// # Safety
    /// A listed row is among those listed.
    unsafe fn at(self, row: usize) -> *const u8;
}

impl Addresses for Strided {
    #[inline(always)]
    unsafe fn at(self, row: usize) -> *const u8 {
        self.0.wrapping_add(row * self.1)
    }
}

impl Addresses for Listed {
    #[inline(always)]
    unsafe fn at(self, row: usize) -> *const u8 {
        // SAFETY: passed on to the caller.
        unsafe { (*self.0.add(row)).wrapping_add(self.1) }
    }
}

/// Returns the rows of one head between one that is read and one that is asked for, to be in a cache when its turn comes: 8 KiB of them,
/// which fit in L1 beside what is read, but 8 to 32. With 8 rows of 256 bytes, decoding took 1.2 to 1.5 times as long on Zen 4.
pub(in crate::device::cpu) fn rows_ahead(row_bytes: usize) -> usize {
    ((8 << 10) / row_bytes).clamp(8, 32)
}

/// Bytes that the processor reads at a time.
const LINE: usize = 64;

/// The loops of [`few`], each a function of its own, compiled for an instruction set. Constants of one do not compete for registers
/// with those of another. Most come in many types, and as parts of one function they took half of this crate's time to compile.
///
/// The functions are unsafe as those are that they compile; the processor must have the instructions, as for every [`Vector`].
pub(super) trait Loops: Vector {
    /// [`multiply`].
    unsafe fn multiply<const DTYPE: u8, const R: usize>(group: &Group<'_, R>, k: (impl Addresses, impl Addresses));
    /// [`exponentiate`].
    unsafe fn exponentiate(f: &Few<'_>, query: &Query, scores: *mut f32) -> f32;
    /// [`add_values`].
    unsafe fn add_values<const DTYPE: u8, const R: usize>(
        group: &Group<'_, R>,
        v: (impl Addresses, impl Addresses),
        rescales: [f32; R],
    );
}

/// [`Few`], for a dtype: 0 is f32, 1 f16, 2 bf16.
#[inline(always)]
pub(super) unsafe fn few<V: Loops, const DTYPE: u8>(f: &Few<'_>) {
    let (fours, rest) = f.queries.as_chunks::<TOGETHER>();
    let (twos, ones) = rest.as_chunks::<2>();
    // SAFETY: passed on to the caller.
    unsafe {
        for queries in fours {
            attend::<V, DTYPE, TOGETHER>(f, queries);
        }
        for queries in twos {
            attend::<V, DTYPE, 2>(f, queries);
        }
        for query in ones {
            attend::<V, DTYPE, 1>(f, &[*query]);
        }
    }
}

/// Queries that share what is read.
pub(super) struct Group<'a, const R: usize> {
    f: &'a Few<'a>,
    queries: &'a [Query; R],
    /// Scores of query `r` begin at `r * room`.
    room: usize,
}

/// Attends `R` queries to the keys.
#[inline(always)]
unsafe fn attend<V: Loops, const DTYPE: u8, const R: usize>(f: &Few<'_>, queries: &[Query; R]) {
    let room = f.keys.next_multiple_of(MAX_LANES);
    let group = &Group { f, queries, room };
    // SAFETY: passed on to the caller.
    unsafe {
        match f.k {
            Rows::Strided { rows, later } => V::multiply::<DTYPE, R>(group, (rows, later)),
            Rows::Paged { rows, later } => V::multiply::<DTYPE, R>(group, (rows, later)),
            Rows::Listed { rows, later } => V::multiply::<DTYPE, R>(group, (rows, later)),
        }
        let mut rescales = [0.0; R];
        for (r, query) in queries.iter().enumerate() {
            rescales[r] = V::exponentiate(f, query, f.scores.add(r * room));
        }
        match f.v {
            Rows::Strided { rows, later } => V::add_values::<DTYPE, R>(group, (rows, later), rescales),
            Rows::Paged { rows, later } => V::add_values::<DTYPE, R>(group, (rows, later), rescales),
            Rows::Listed { rows, later } => V::add_values::<DTYPE, R>(group, (rows, later), rescales),
        }
    }
}

/// Multiplies queries with each key. `k` is the rows of K, and rows that are read later.
#[inline(always)]
pub(super) unsafe fn multiply<V: Vector, const DTYPE: u8, const R: usize>(
    group: &Group<'_, R>,
    (k, later): (impl Addresses, impl Addresses),
) {
    let &Group { f, room, .. } = group;
    // SAFETY: passed on to the caller.
    unsafe {
        // Sums of a register's worth of pairs stay in registers, and their lanes are added together.
        let together = V::LANES / R;
        let pairs = if R == 1 { f.scores } else { f.scores.add(R * room) };
        for key in (0..f.keys).step_by(together) {
            let mut sums = [V::splat(0.0); MAX_LANES];
            // Addresses of up to eight rows fit in registers. Places of sums are constants, so that sums are in registers too.
            match together {
                16 => {
                    multiply_rows::<V, DTYPE, R, 8>(group, (k, later), key, &mut sums[..8]);
                    multiply_rows::<V, DTYPE, R, 8>(group, (k, later), key + 8, &mut sums[8..]);
                }
                8 => multiply_rows::<V, DTYPE, R, 8>(group, (k, later), key, &mut sums),
                4 => multiply_rows::<V, DTYPE, R, 4>(group, (k, later), key, &mut sums),
                2 => multiply_rows::<V, DTYPE, R, 2>(group, (k, later), key, &mut sums),
                _ => multiply_rows::<V, DTYPE, R, 1>(group, (k, later), key, &mut sums),
            }
            V::sum_each(&sums).store(pairs.add(key * R));
        }
        if R == 1 {
            return;
        }
        for key in (0..f.keys).step_by(together) {
            for r in 0..R {
                let of_query = pairs.add(key * R + r * together);
                f.scores
                    .add(r * room + key)
                    .copy_from_nonoverlapping(of_query, together);
            }
        }
    }
}

/// Returns the addresses of `N` rows; past the last one it takes their places. One decision for all of them: with one for each, finding
/// the rows took as long as multiplying them.
#[inline(always)]
unsafe fn addresses_of<const N: usize>(of: impl Addresses, rows: Range<usize>) -> [*const u8; N] {
    let mut addresses = [std::ptr::null(); N];
    // SAFETY: passed on to the caller.
    unsafe {
        if rows.len() >= N {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = of.at(rows.start + i);
            }
        } else {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = of.at((rows.start + i).min(rows.end - 1));
            }
        }
    }
    addresses
}

/// Multiplies queries with `N` rows of keys from row `key` on, and asks for later rows. Sums of query `r` and row `i` go to register
/// `r * N + i`.
#[inline(always)]
unsafe fn multiply_rows<V: Vector, const DTYPE: u8, const R: usize, const N: usize>(
    group: &Group<'_, R>,
    (k, later): (impl Addresses, impl Addresses),
    key: usize,
    sums: &mut [V],
) {
    let &Group { f, queries, .. } = group;
    // SAFETY: passed on to the caller.
    unsafe {
        let places = key.min(f.keys - 1)..f.keys;
        let later = addresses_of::<N>(later, places.clone());
        prefetch_rows(&later, f.head_dim * bytes::<DTYPE>(), f.into_l1);
        let rows = addresses_of::<N>(k, places);
        let mut d = 0;
        while d + V::LANES <= f.head_dim {
            for (i, row) in rows.iter().enumerate() {
                let k = whole::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                for (r, query) in queries.iter().enumerate() {
                    let sum = &mut sums[r * N + i];
                    *sum = k.fma(V::load(query.query.add(d)), *sum);
                }
            }
            d += V::LANES;
        }
        if V::LANES > 8 && d < f.head_dim {
            for (i, row) in rows.iter().enumerate() {
                let k = half::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                for (r, query) in queries.iter().enumerate() {
                    let sum = &mut sums[r * N + i];
                    *sum = k.fma(V::load(query.query.add(d)), *sum);
                }
            }
        }
    }
}

/// Turns scores of a query into exponentials relative to the largest score so far, adds them to the sum, and returns the factor of
/// what was there.
#[inline(always)]
pub(super) unsafe fn exponentiate<V: Vector>(f: &Few<'_>, query: &Query, scores: *mut f32) -> f32 {
    // SAFETY: passed on to the caller.
    unsafe {
        for key in f.keys..f.keys.next_multiple_of(V::LANES) {
            *scores.add(key) = f32::NEG_INFINITY;
        }
        let old = *query.max;
        let mut largest = V::splat(old);
        for key in (0..f.keys).step_by(V::LANES) {
            largest = V::load(scores.add(key)).max(largest);
        }
        let mut lanes = [0.0_f32; MAX_LANES];
        largest.store(lanes.as_mut_ptr());
        // Halves with halves, since each comparison waits for the one before it.
        let mut half = V::LANES / 2;
        while half > 0 {
            let (low, high) = lanes.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(&*high) {
                *low = if *high > *low { *high } else { *low };
            }
            half /= 2;
        }
        let max = lanes[0];
        *query.max = max;
        if max > old {
            let place = (0..f.keys).find(|&key| *scores.add(key) == max);
            *query.best = (f.first_key + place.unwrap_or(0)) as u32;
        }
        let origin = V::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let scale = V::splat(f.scale_log2);
        let mut sums = V::splat(0.0);
        for key in (0..f.keys).step_by(V::LANES) {
            let [exponential] = V::exp2_each([V::load(scores.add(key)).sub(origin)], scale);
            sums = sums.add(exponential);
            exponential.store(scores.add(key));
        }
        let [rescale] = V::exp2_each([V::splat(old).sub(origin)], scale);
        rescale.store(lanes.as_mut_ptr());
        *query.sum = *query.sum * lanes[0] + sums.sum();
        lanes[0]
    }
}

/// Adds exponentials times values to the rescaled outputs. `v` is the rows of V, and rows that are read later.
#[inline(always)]
pub(super) unsafe fn add_values<V: Vector, const DTYPE: u8, const R: usize>(
    group: &Group<'_, R>,
    v: (impl Addresses, impl Addresses),
    rescales: [f32; R],
) {
    let of = Weighed { group, v, rescales };
    let head_dim = group.f.head_dim_v;
    // SAFETY: passed on to the caller. 8 rows of sums fill 32 registers, 6 fill 16.
    unsafe {
        match (R, V::ROWS) {
            (1, 8) if head_dim == 16 * V::LANES => of.weigh_in::<V, DTYPE, 16>(),
            (4, 8) | (2, 6) => of.weigh_in::<V, DTYPE, 4>(),
            (4, _) => of.weigh_in::<V, DTYPE, 2>(),
            _ => of.weigh_in::<V, DTYPE, 8>(),
        }
    }
}

/// Values to be added to the outputs of a group.
struct Weighed<'a, A, L, const R: usize> {
    group: &'a Group<'a, R>,
    /// The values, and rows that are read later.
    v: (A, L),
    rescales: [f32; R],
}

impl<A: Addresses, L: Addresses, const R: usize> Weighed<'_, A, L, R> {
    /// Adds exponentials times values, `N` registers of each query at a time, whose sums stay in registers. What is left takes 4 and
    /// 2 at a time, since a loop with one sum waits for it at every key.
    #[inline(always)]
    unsafe fn weigh_in<V: Vector, const DTYPE: u8, const N: usize>(&self) {
        let head_dim = self.group.f.head_dim_v;
        // SAFETY: passed on to the caller.
        unsafe {
            let mut d = 0;
            while d + N * V::LANES <= head_dim {
                self.weigh::<V, DTYPE, N>(d, |from| whole::<V, DTYPE>(from));
                d += N * V::LANES;
            }
            if N > 4 && d + 4 * V::LANES <= head_dim {
                self.weigh::<V, DTYPE, 4>(d, |from| whole::<V, DTYPE>(from));
                d += 4 * V::LANES;
            }
            if N > 2 && d + 2 * V::LANES <= head_dim {
                self.weigh::<V, DTYPE, 2>(d, |from| whole::<V, DTYPE>(from));
                d += 2 * V::LANES;
            }
            while d + V::LANES <= head_dim {
                self.weigh::<V, DTYPE, 1>(d, |from| whole::<V, DTYPE>(from));
                d += V::LANES;
            }
            if V::LANES > 8 && d < head_dim {
                self.weigh::<V, DTYPE, 1>(d, |from| half::<V, DTYPE>(from));
            }
        }
    }

    /// Adds exponentials times elements `d ..` of the values, `N` registers of them.
    #[inline(always)]
    unsafe fn weigh<V: Vector, const DTYPE: u8, const N: usize>(&self, d: usize, load: impl Fn(*const u8) -> V) {
        let &Group { f, queries, room } = self.group;
        // SAFETY: passed on to the caller; outputs are whole registers.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                let rescale = V::splat(self.rescales[r]);
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(queries[r].output.add(d + n * V::LANES)).mul(rescale);
                }
            }
            for key in 0..f.keys {
                // Of the later row, what this pass reads. A choice of caches at each row would leave no registers for addresses.
                let later = self.v.1.at(key).wrapping_add(d * bytes::<DTYPE>());
                prefetch_rows(&[later], N * V::LANES * bytes::<DTYPE>(), false);
                let row = self.v.0.at(key).add(d * bytes::<DTYPE>());
                let mut values = [V::splat(0.0); N];
                for (n, value) in values.iter_mut().enumerate() {
                    *value = load(row.add(n * V::LANES * bytes::<DTYPE>()));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let exponential = V::broadcast(f.scores.add(r * room), key);
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = value.fma(exponential, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    sum.store(queries[r].output.add(d + n * V::LANES));
                }
            }
        }
    }
}

/// Asks for the lines of rows.
#[inline(always)]
fn prefetch_rows(rows: &[*const u8], bytes: usize, into_l1: bool) {
    for place in (0..bytes).step_by(LINE) {
        for line in rows.iter().map(|row| row.wrapping_add(place)) {
            if into_l1 {
                prefetch_l1(line);
            } else {
                prefetch_l2(line);
            }
        }
    }
}

const fn bytes<const DTYPE: u8>() -> usize {
    if DTYPE == 0 { 4 } else { 2 }
}

/// Eight elements, half a register, and zeros: what is left of a head whose length is a multiple of 8 and not of 16.
#[inline(always)]
unsafe fn half<V: Vector, const DTYPE: u8>(from: *const u8) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match DTYPE {
            0 => V::load_half(from.cast()),
            1 => V::load_half_f16(from.cast()),
            _ => V::load_half_bf16(from.cast()),
        }
    }
}

/// Loads a whole register of elements.
#[inline(always)]
unsafe fn whole<V: Vector, const DTYPE: u8>(from: *const u8) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match DTYPE {
            0 => V::load(from.cast()),
            1 => V::load_f16(from.cast()),
            _ => V::load_bf16(from.cast()),
        }
    }
}
