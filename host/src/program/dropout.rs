//! Dropout of weights. The random numbers are a pure function of the seed and of the place of a pair.
//!
//! Philox-4x32 with 7 rounds (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) turns a counter of four
//! words and a key of two into four random words. The counter is (query group, key group, head, batch), the key is the seed.
//! A 16 x 16 block of pairs has 64 groups `{q, q + 8} x {k, k + 8}`, and the four words of a group decide of (q, k),
//! (q, k + 8), (q + 8, k), (q + 8, k + 8): the pairs that one lane of a tensor core holds. So every device, tile and layout
//! draws the same bits, and backward draws them again instead of keeping them.

/// Number of rounds of the generator: the fewest that pass every test of BigCrush.
pub const ROUNDS: usize = 7;

/// Multipliers of the generator, for words 0 and 2.
pub const FACTORS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];

/// Increments of the two words of the key from round to round.
pub const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Dropout of weights after normalisation: each weight becomes 0 with probability p, else is divided by 1 - p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability p, in `0 .. 1`.
    pub probability: f32,
    /// Key of the random generator.
    pub seed: u64,
}

impl Dropout {
    /// Returns the least random word of a kept weight: `p * 2^32`, rounded to the nearest.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0).round() as u32 // saturates
    }

    /// Factor of kept weights, `1 / (1 - p)`.
    pub fn factor(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    /// Returns the key of the generator, the lower word of the seed first.
    pub fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Returns true if the weight of a pair is kept.
    pub fn keeps(&self, batch: u32, head: u32, query: u32, key: u32) -> bool {
        let words = philox([group(query), group(key), head, batch], self.key());
        words[word(query, key)] >= self.threshold()
    }

    /// Returns, for each weight of a small problem, `[batch, heads, seqlen_q, seqlen_k]`, 1 if it is kept and 0 if it
    /// is dropped.
    pub fn keep_mask(&self, [batch, heads, seqlen_q, seqlen_k]: [usize; 4]) -> Vec<u8> {
        let mut mask = Vec::with_capacity(batch * heads * seqlen_q * seqlen_k);
        for row in 0..batch * heads * seqlen_q {
            let (heads_before, query) = (row / seqlen_q, row % seqlen_q);
            let (batch, head) = ((heads_before / heads) as u32, (heads_before % heads) as u32);
            mask.extend((0..seqlen_k as u32).map(|key| u8::from(self.keeps(batch, head, query as u32, key))));
        }
        mask
    }
}

/// Returns the group of a position along its axis: `p` and `p + 8` of each 16 share one.
pub const fn group(position: u32) -> u32 {
    position / 16 * 8 + position % 8
}

/// Index of the random word of its group that decides about a pair.
pub const fn word(query: u32, key: u32) -> usize {
    (query / 8 % 2 * 2 + key / 8 % 2) as usize
}

/// Returns the four random words of a counter and a key.
pub const fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k, mut l]) = (counter, key);
    let mut round = 0;
    while round < ROUNDS {
        let first = FACTORS[0] as u64 * a as u64;
        let second = FACTORS[1] as u64 * c as u64;
        [a, b, c, d] = [
            (second >> 32) as u32 ^ b ^ k,
            second as u32,
            (first >> 32) as u32 ^ d ^ l,
            first as u32,
        ];
        [k, l] = [k.wrapping_add(WEYL[0]), l.wrapping_add(WEYL[1])];
        round += 1;
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_published_generator() {
        // kat_vectors of Random123, philox4x32 with 7 rounds.
        let ones = u32::MAX;
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]
        );
        assert_eq!(
            philox([ones; 4], [ones; 2]),
            [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]
        );
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(pi, [0xa409_3822, 0x299f_31d0]),
            [0x4dfc_caba, 0x190a_87f0, 0xc47362ba, 0xb6b5_242a]
        );
    }

    #[test]
    fn each_pair_of_a_block_has_a_word_of_its_own() {
        let mut seen: Vec<_> = (0..256)
            .map(|i| (i / 16 + 32, i % 16 + 48))
            .map(|(q, k)| (group(q), group(k), word(q, k)))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 256);
    }

    #[test]
    fn the_share_that_is_kept_is_near_1_minus_p() {
        for (probability, seed) in [(0.0, 1), (0.1, 2), (0.5, u64::MAX), (0.9, 4)] {
            let mask = Dropout { probability, seed }.keep_mask([2, 3, 50, 70]);
            let kept = mask.iter().map(|&x| f64::from(x)).sum::<f64>() / mask.len() as f64;
            let sigma = (f64::from(probability) * (1.0 - f64::from(probability)) / mask.len() as f64).sqrt();
            assert!(
                (kept - (1.0 - f64::from(probability))).abs() <= 4.0 * sigma,
                "{probability}: {kept}"
            );
        }
    }
}
