//! Dropout over strips: drawing the weights that are kept, by the generator of [`dropout`](crate::program::dropout), 64
//! counters at a time.

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

/// Groups of 16 x 16 pairs, whose counters are turned into words together: 8 of queries for each of 8 of keys.
const COUNTERS: usize = 64;

/// [`Keep`], of `W` lanes, 16 x 16 pairs at a time.
#[inline(always)]
pub(super) unsafe fn keep<const W: usize>(k: &Keep) {
    let blocks = |first: u32, count: u32| first / 16..(first + count).div_ceil(16);
    for of_queries in blocks(k.first_query, W as u32) {
        for of_keys in blocks(k.first_key, k.keys as u32) {
            let words = words([of_queries, of_keys], [k.head, k.batch], k.seed);
            for key in 0..16 {
                let row = (of_keys * 16 + key).wrapping_sub(k.first_key) as usize;
                if row >= k.keys {
                    continue;
                }
                // SAFETY: there is a truth for each key and lane, says the caller.
                unsafe { keep_row::<W>(k, &words, of_queries * 16, key, k.kept.add(row * W)) };
            }
        }
    }
}

/// Writes the truths of one key and the 16 queries from `first` on, as far as they are lanes.
#[inline(always)]
unsafe fn keep_row<const W: usize>(k: &Keep, words: &[[u32; COUNTERS]; 4], first: u32, key: u32, row: *mut u32) {
    let kept = |drawn: u32| if drawn >= k.threshold { u32::MAX } else { 0 };
    let of_key = (key % 8 * 8) as usize;
    // SAFETY: passed on to the caller.
    unsafe {
        for half in 0..2 {
            let words = &words[word(8 * half, key)][of_key..of_key + 8];
            let lane = (first + 8 * half).wrapping_sub(k.first_query);
            if lane as usize + 8 <= W {
                for (i, drawn) in words.iter().enumerate() {
                    *row.add(lane as usize + i) = kept(*drawn);
                }
                continue;
            }
            for (i, drawn) in words.iter().enumerate() {
                let lane = lane.wrapping_add(i as u32) as usize;
                if lane < W {
                    *row.add(lane) = kept(*drawn);
                }
            }
        }
    }
}

/// The four words of each counter of 16 x 16 pairs.
#[inline(always)]
fn words([of_queries, of_keys]: [u32; 2], [head, batch]: [u32; 2], seed: [u32; 2]) -> [[u32; COUNTERS]; 4] {
    let (mut a, mut b) = ([0; COUNTERS], [0; COUNTERS]);
    let (mut c, mut d) = ([head; COUNTERS], [batch; COUNTERS]);
    for i in 0..COUNTERS {
        a[i] = group(of_queries * 16) + i as u32 % 8;
        b[i] = group(of_keys * 16) + i as u32 / 8;
    }
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
