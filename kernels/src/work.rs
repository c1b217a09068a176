//! Work that a plan lists for the blocks of a launch: ragged batches, paged caches, splits of a sequence, block-sparse masks.
//!
//! A grid of tiles, heads and batch entries suits a rectangular batch. Everything else is a list in device memory, which the host
//! makes with the plan. A block finds its [`TileWork`] by its number: the rows that it owns, queries or keys, of one head of one
//! sequence. The work names its sequence, whose [`SequenceRows`] say where it lies in the tensors, and the runs of tiles of the
//! other side that the block streams, each a [`TileRun`]. A causal mask leaves at most 2 runs, a window 3, and a block-sparse mask
//! as many as it has.
//!
//! Blocks start in the order of the list, so the plan puts the longest work first.

use crate::mask::Blocks;

/// Rows of one head of one sequence that a block owns, and what it streams past them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileWork {
    /// Number of the sequence: the index of its [`SequenceRows`], and the batch entry that score programs see.
    pub sequence: u32,
    /// First of the [`heads`](crate::abi::WorkLists::heads) heads that take this work, each with a block of its own.
    pub head: u32,
    /// First row that the block owns, counted in its sequence. Where the heads that share keys are packed, rows are position 0 of
    /// all of them, then position 1.
    pub first_row: u32,
    /// Index of its first run.
    pub first_run: u32,
    /// Number of its runs, which come one after the other.
    pub runs: u32,
    /// 0 if the block writes results, else 1 + the place of its partial results, counted without heads.
    pub partial: u32,
    /// Number of the split among those of the same rows, 0 for the first.
    pub split: u32,
    /// Pads the struct to 32 bytes.
    pub reserved: u32,
}

/// Place of a sequence in tensors `[entries, heads, rows, head_dim]`.
///
/// Sequences packed end to end lie in entry 0. In a cache with slots the entry of the keys is the slot, and in a paged cache it is
/// the row of the block table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceRows {
    /// Entry of q and of the results.
    pub q_entry: u32,
    /// Row of query 0 in its entry.
    pub q_begin: u32,
    /// Number of queries.
    pub seqlen_q: u32,
    /// Entry of k and v.
    pub k_entry: u32,
    /// Row of key 0 in its entry.
    pub k_begin: u32,
    /// Number of keys.
    pub seqlen_k: u32,
}

/// Consecutive streamed tiles, `begin .. end`, in units of the kernel's streamed tile.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileRun {
    /// First tile.
    pub begin: u32,
    /// One past the last tile.
    pub end: u32,
    /// 1 if tiles may hold pairs that the lengths or a causal mask hide, else 0.
    pub masked: u32,
}

impl TileRun {
    /// Returns the runs of blocks, in order: at most three, none of them empty.
    pub fn of(blocks: Blocks) -> impl Iterator<Item = Self> {
        let Blocks {
            begin,
            whole_begin,
            whole_end,
            end,
        } = blocks;
        let runs = if whole_begin < whole_end {
            [
                (begin, whole_begin, 1),
                (whole_begin, whole_end, 0),
                (whole_end, end, 1),
            ]
        } else {
            [(begin, end, 1), (end, end, 0), (end, end, 0)]
        };
        let runs = runs.map(|(begin, end, masked)| Self { begin, end, masked });
        runs.into_iter().filter(|run| run.begin < run.end)
    }
}

/// Row of a token that is moved: where it comes from, where it goes, and the position at which its pairs are turned.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenMove {
    /// Element of the first head's row in the tensor that is read.
    pub from: u64,
    /// Element of the first head's row in the tensor that is written.
    pub to: u64,
    /// Position, below 2^31.
    pub position: u64,
}

/// A divisor of numbers below 2^31, with a multiplication in place of the division.
///
/// `n / value = n * multiplier >> (31 + shift)`, where `shift = ceil(log2 value)` and `multiplier = ceil(2^(31 + shift) / value)`.
/// The multiplier exceeds the quotient by less than 1, and `n` times that error is below `2^31 <= 2^(31 + shift) / value`, which is
/// too little to reach the next whole number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// The divisor.
    pub value: u32,
    /// Factor in place of the division.
    pub multiplier: u32,
    /// Bits to drop of the product, beyond 31.
    pub shift: u32,
}

impl Divisor {
    /// The divisor that changes nothing.
    pub const ONE: Self = Self::new(1);

    /// Makes a divisor of `value`, 1 to 2^31; 0 counts as 1.
    pub const fn new(value: u32) -> Self {
        let value = if value == 0 { 1 } else { value };
        let shift = value.next_power_of_two().trailing_zeros();
        Self {
            value,
            multiplier: (1_u64 << (31 + shift)).div_ceil(value as u64) as u32,
            shift,
        }
    }

    /// Returns quotient and remainder of a number below 2^31.
    #[inline(always)]
    pub const fn divide(self, n: u32) -> (u32, u32) {
        let quotient = ((n as u64 * self.multiplier as u64) >> 31 >> self.shift) as u32;
        (quotient, n - quotient * self.value)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::mask::Mask;
    use std::vec::Vec;

    #[test]
    fn runs_are_the_blocks_in_order() {
        for (seqlen_q, seqlen_k) in [(1, 1), (7, 40), (40, 7), (64, 64), (33, 129), (5, 0)] {
            for first in (0..seqlen_q).step_by(16) {
                let rows = (seqlen_q - first).min(16);
                for blocks in [
                    Mask::<true>::new(seqlen_q, seqlen_k).key_blocks(first, rows, 8),
                    Mask::<false>::new(seqlen_q, seqlen_k).key_blocks(first, rows, 8),
                    Mask::<true>::new(seqlen_q, seqlen_k)
                        .key_blocks(first, rows, 8)
                        .all_masked(),
                ] {
                    let runs: Vec<_> = TileRun::of(blocks).collect();
                    let tiles = runs
                        .iter()
                        .flat_map(|run| (run.begin..run.end).map(|n| (n, run.masked == 1)));
                    let expected = (blocks.begin..blocks.end).map(|n| (n, blocks.is_masked(n)));
                    assert!(tiles.eq(expected), "{blocks:?}: {runs:?}");
                    assert!(runs.len() <= 2, "a causal mask leaves at most 2 runs: {runs:?}");
                }
            }
        }
        let window = Blocks {
            begin: 1,
            whole_begin: 3,
            whole_end: 5,
            end: 6,
        };
        let masked: Vec<_> = TileRun::of(window).map(|run| run.masked).collect();
        assert_eq!(masked, [1, 0, 1]);
    }

    #[test]
    fn divisors_divide_exactly() {
        let values = (1..300).chain([511, 1000, 4096, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31]);
        for value in values {
            let divisor = Divisor::new(value);
            let edges = (0..70).flat_map(|k| {
                [
                    (k * value as u64).wrapping_sub(1),
                    k * value as u64,
                    k * value as u64 + 1,
                ]
            });
            let top = (0..70).map(|k| (1_u64 << 31) - 1 - k);
            for n in edges.chain(top).filter(|&n| n < 1 << 31) {
                assert_eq!(
                    divisor.divide(n as u32),
                    (n as u32 / value, n as u32 % value),
                    "{n} / {value}"
                );
            }
        }
    }
}
