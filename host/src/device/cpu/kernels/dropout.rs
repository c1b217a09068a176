//! Which weights dropout keeps, drawn for strips: the generator of [`dropout`](crate::program::dropout), eight counters at a
//! time.

use crate::program::dropout::{FACTORS, ROUNDS, WEYL, group, word};

/// A strip of keys by lanes, whose queries and keys lie where they say.
pub(in crate::device::cpu) struct Keep {
    pub keys: usize,
    pub first_query: u32,
    pub first_key: u32,
    pub batch: u32,
    pub head: u32,
    /// The key of the generator.
    pub seed: [u32; 2],
    /// The least word that keeps a weight.
    pub threshold: u32,
    /// `keys x` the lanes of a strip: truths.
    pub kept: *mut u32,
}

/// Counters that are turned into words together.
const COUNTERS: usize = 8;

/// [`Keep`], of `W` lanes. Queries whose group is the same draw the same words, so the groups of a run of 16 are 8 counters.
#[inline(always)]
pub(super) unsafe fn keep<const W: usize>(k: &Keep) {
    let first_block = k.first_query / 16;
    let last_block = (k.first_query + W as u32 - 1) / 16;
    let end = k.first_key + k.keys as u32;
    for block in first_block..=last_block {
        let groups: [u32; COUNTERS] = std::array::from_fn(|i| block * 8 + i as u32);
        // Each group of keys is that of two of 16 neighbours.
        for of_keys in group(k.first_key / 16 * 16)..(end.div_ceil(16)) * 8 {
            let words = words(groups, [of_keys, k.head, k.batch], k.seed);
            for half in 0..2 {
                let key = of_keys / 8 * 16 + of_keys % 8 + 8 * half;
                if key < k.first_key || key >= end {
                    continue;
                }
                for lane in 0..16 {
                    let query = block * 16 + lane;
                    if query < k.first_query || query >= k.first_query + W as u32 {
                        continue;
                    }
                    let drawn = words[word(query, key)][(lane % 8) as usize];
                    let place = (key - k.first_key) as usize * W + (query - k.first_query) as usize;
                    // SAFETY: there is a truth for each key and lane, says the caller.
                    unsafe { *k.kept.add(place) = if drawn >= k.threshold { u32::MAX } else { 0 } };
                }
            }
        }
    }
}

/// The four words of each counter.
#[inline(always)]
fn words(groups: [u32; COUNTERS], rest: [u32; 3], seed: [u32; 2]) -> [[u32; COUNTERS]; 4] {
    let [mut a, mut b, mut c, mut d] = [groups, [rest[0]; COUNTERS], [rest[1]; COUNTERS], [rest[2]; COUNTERS]];
    let [mut k, mut l] = seed;
    for _ in 0..ROUNDS {
        for i in 0..COUNTERS {
            let first = u64::from(FACTORS[0]) * u64::from(a[i]);
            let second = u64::from(FACTORS[1]) * u64::from(c[i]);
            a[i] = (second >> 32) as u32 ^ b[i] ^ k;
            b[i] = second as u32;
            c[i] = (first >> 32) as u32 ^ d[i] ^ l;
            d[i] = first as u32;
        }
        (k, l) = (k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1]));
    }
    [a, b, c, d]
}
