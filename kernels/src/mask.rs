//! The mask: visible pairs of queries and keys. Only this module compares sequence lengths.
//!
//! In full attention all pairs are visible. A causal mask is aligned bottom-right, so the last query sees the last
//! key, and query `i` sees the keys `j <= i + seqlen_k - seqlen_q`. If `seqlen_q > seqlen_k`, the first queries see
//! no key.
//!
//! There are two questions, each for queries and for keys. For a row: [`Mask::keys_of`] a query, [`Mask::queries_of`]
//! a key, as a [`Span`]. For a tile: [`Mask::key_blocks`] that a block of queries processes, [`Mask::query_blocks`]
//! that a block of keys processes, as [`Blocks`]. All loaders, loops, stores and costs use these. None assumes that
//! the first key is visible, or that one end of a loop needs no mask, so another mask (a window, a list of blocks)
//! only has to make these values differently.

/// Largest sequence length of a kernel: positions and their block-rounded ends fit in an `i32`.
pub const MAX_SEQLEN: u32 = i32::MAX as u32 - 1024;

/// Visible positions of one sequence for a position of the other: `begin .. end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First position.
    pub begin: u32,
    /// One past the last position, or [`Span::OPEN`].
    pub end: u32,
}

impl Span {
    /// End of a span that lasts to the end of its sequence. Positions past that are loaded as zeros, which add nothing, so
    /// they count as visible.
    pub const OPEN: u32 = u32::MAX;

    /// Returns true if `position` lies in the span.
    #[inline(always)]
    pub const fn contains(self, position: u32) -> bool {
        position >= self.begin && (self.end == Self::OPEN || position < self.end)
    }

    /// Returns true if the span is empty.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.begin >= self.end
    }
}

/// Blocks of one sequence with at least one visible pair, in three ranges.
///
/// `begin .. whole_begin` and `whole_end .. end` need the mask; in `whole_begin .. whole_end` all pairs are visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// First block with a visible pair.
    pub begin: u32,
    /// First block whose pairs are all visible.
    pub whole_begin: u32,
    /// End of the blocks whose pairs are all visible.
    pub whole_end: u32,
    /// End of the blocks with a visible pair; `begin == end` if there is none.
    pub end: u32,
}

impl Blocks {
    /// Returns a range of blocks that all need the mask.
    #[inline(always)]
    pub const fn masked(range: core::ops::Range<u32>) -> Self {
        Self {
            begin: range.start,
            whole_begin: range.end,
            whole_end: range.end,
            end: range.end,
        }
    }

    /// Returns true if no block has a visible pair.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.begin >= self.end
    }

    /// Returns true if block `n` needs the mask.
    #[inline(always)]
    pub const fn is_masked(self, n: u32) -> bool {
        n < self.whole_begin || n >= self.whole_end
    }

    /// Returns these blocks with the mask needed in all of them.
    #[inline(always)]
    pub const fn all_masked(self) -> Self {
        Self {
            whole_begin: self.end,
            whole_end: self.end,
            ..self
        }
    }
}

/// Runs `$body` for each block of `$blocks` in order, with `$masked` a constant. The body is compiled once for blocks
/// that need the mask and once for the others. An end without masked blocks costs no copy of the body if that is
/// known at compile time. `$blocks` is worked out for each of the three ranges, so that an expression that renews what it depends on
/// keeps nothing in registers for the next range.
#[cfg(any(test, target_arch = "nvptx64"))]
macro_rules! for_blocks {
    ($blocks:expr, |$n:ident, $masked:ident| $body:expr) => {{
        let blocks: $crate::mask::Blocks = $blocks;
        for $n in blocks.begin..blocks.whole_begin {
            const $masked: bool = true;
            $body
        }
        let blocks: $crate::mask::Blocks = $blocks;
        for $n in blocks.whole_begin..blocks.whole_end {
            const $masked: bool = false;
            $body
        }
        let blocks: $crate::mask::Blocks = $blocks;
        for $n in blocks.whole_end..blocks.end {
            const $masked: bool = true;
            $body
        }
    }};
}

/// Runs `$body` like `for_blocks`, from the last block to the first.
#[cfg(any(test, target_arch = "nvptx64"))]
macro_rules! for_blocks_backwards {
    ($blocks:expr, |$n:ident, $masked:ident| $body:expr) => {{
        let blocks: $crate::mask::Blocks = $blocks;
        for $n in (blocks.whole_end..blocks.end).rev() {
            const $masked: bool = true;
            $body
        }
        for $n in (blocks.whole_begin..blocks.whole_end).rev() {
            const $masked: bool = false;
            $body
        }
        for $n in (blocks.begin..blocks.whole_begin).rev() {
            const $masked: bool = true;
            $body
        }
    }};
}

#[cfg(target_arch = "nvptx64")]
pub(crate) use {for_blocks, for_blocks_backwards};

/// Visible pairs of an attention problem.
#[derive(Clone, Copy, Debug)]
pub struct Mask<const CAUSAL: bool> {
    seqlen_q: u32,
    seqlen_k: u32,
}

impl<const CAUSAL: bool> Mask<CAUSAL> {
    /// True if the mask hides pairs that exist. If false, only the ends of the sequences matter.
    pub const HIDES_PAIRS: bool = CAUSAL;

    /// Makes the mask of a problem with these sequence lengths, each at most [`MAX_SEQLEN`].
    #[inline(always)]
    pub const fn new(seqlen_q: u32, seqlen_k: u32) -> Self {
        Self { seqlen_q, seqlen_k }
    }

    /// Returns the keys that query `row` sees.
    #[inline(always)]
    pub const fn keys_of(&self, row: u32) -> Span {
        let end = if CAUSAL {
            clamp(row as i32 + 1 + self.diagonal(), self.seqlen_k)
        } else {
            self.seqlen_k
        };
        Span { begin: 0, end }
    }

    /// Returns the queries that see key `column`.
    #[inline(always)]
    pub const fn queries_of(&self, column: u32) -> Span {
        let begin = if CAUSAL {
            clamp(column as i32 - self.diagonal(), self.seqlen_q)
        } else {
            0
        };
        Span { begin, end: Span::OPEN }
    }

    /// Returns the number of keys that query 0 sees besides key 0; negative if it sees none.
    #[inline(always)]
    const fn diagonal(&self) -> i32 {
        self.seqlen_k as i32 - self.seqlen_q as i32
    }

    /// Returns the key blocks of `block_n` that queries `first_row .. first_row + rows` see, left to right.
    #[inline(always)]
    pub const fn key_blocks(&self, first_row: u32, rows: u32, block_n: u32) -> Blocks {
        Blocks {
            begin: 0,
            whole_begin: 0,
            whole_end: self.keys_of(first_row).end / block_n,
            end: self.keys_of(first_row + rows - 1).end.div_ceil(block_n),
        }
    }

    /// Splits off the last key block. In full attention no other block needs the mask.
    #[inline(always)]
    pub const fn split_last(&self, blocks: Blocks) -> (u32, Blocks) {
        let last = blocks.end - 1;
        let whole_end = if CAUSAL { min(blocks.whole_end, last) } else { last };
        let before = Blocks {
            whole_begin: min(blocks.whole_begin, last),
            whole_end,
            end: last,
            ..blocks
        };
        (last, before)
    }

    /// Returns the query blocks of `block_m` that see keys `first_column .. first_column + columns`, top to bottom.
    ///
    /// A block needs no mask if its first query sees every key of the range. The last blocks may reach past
    /// `seqlen_q`, and their tiles past the range. Loads and stores handle elements that do not exist, not the mask.
    #[inline(always)]
    pub const fn query_blocks(&self, first_column: u32, columns: u32, block_m: u32) -> Blocks {
        let end = self.seqlen_q.div_ceil(block_m);
        let last_column = first_column + columns - 1;
        Blocks {
            begin: min(self.queries_of(first_column).begin / block_m, end),
            whole_begin: min(self.queries_of(last_column).begin.div_ceil(block_m), end),
            whole_end: end,
            end,
        }
    }

    /// Returns the number of visible pairs.
    pub const fn pairs(&self) -> u128 {
        let (seqlen_q, seqlen_k) = (self.seqlen_q as u128, self.seqlen_k as u128);
        if !CAUSAL {
            return seqlen_q * seqlen_k;
        }
        // The last min(seqlen_q, seqlen_k) queries see up to seqlen_k keys, each one key more than the query before
        // it.
        let rows = if seqlen_q < seqlen_k { seqlen_q } else { seqlen_k };
        rows * (seqlen_k - rows) + rows * (rows + 1) / 2
    }
}

/// Clamps `position` to `0 ..= limit`.
#[inline(always)]
const fn clamp(position: i32, limit: u32) -> u32 {
    if position < 0 {
        0
    } else if position > limit as i32 {
        limit
    } else {
        position as u32
    }
}

#[inline(always)]
const fn min(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    /// Tests every pair, block by block, against the definition of causal attention.
    fn check<const CAUSAL: bool>(seqlen_q: u32, seqlen_k: u32, block_m: u32, block_n: u32) {
        let mask = Mask::<CAUSAL>::new(seqlen_q, seqlen_k);
        let visible = |i: u32, j: u32| {
            i < seqlen_q && j < seqlen_k && (!CAUSAL || j as i64 <= i as i64 + seqlen_k as i64 - seqlen_q as i64)
        };
        let mut pairs = 0;
        for i in 0..seqlen_q {
            assert_eq!(mask.keys_of(i).is_empty(), !(0..seqlen_k).any(|j| visible(i, j)));
            for j in 0..seqlen_k {
                let pair = std::format!("({i}, {j}) of {seqlen_q}x{seqlen_k}");
                assert_eq!(mask.keys_of(i).contains(j), visible(i, j), "{pair}");
                assert_eq!(mask.queries_of(j).contains(i), visible(i, j), "{pair}");
                pairs += u128::from(visible(i, j));
            }
        }
        assert_eq!(mask.pairs(), pairs);
        for tile in 0..seqlen_q.div_ceil(block_m) {
            let rows = tile * block_m..((tile + 1) * block_m).min(seqlen_q);
            let blocks = mask.key_blocks(rows.start, rows.end - rows.start, block_n);
            for n in 0..seqlen_k.div_ceil(block_n) {
                let columns = n * block_n..(n + 1) * block_n;
                let any = rows.clone().any(|i| columns.clone().any(|j| visible(i, j)));
                let all = rows.clone().all(|i| columns.clone().all(|j| visible(i, j)));
                assert_eq!((blocks.begin..blocks.end).contains(&n), any);
                assert_eq!((blocks.whole_begin..blocks.whole_end).contains(&n), all);
                assert_eq!(any && blocks.is_masked(n), any && !all);
            }
            if !blocks.is_empty() {
                let (last, before) = mask.split_last(blocks);
                assert_eq!((last, before.begin, before.end), (blocks.end - 1, blocks.begin, last));
                for n in before.begin..before.end {
                    assert_eq!(before.is_masked(n), blocks.is_masked(n));
                }
            }
        }
        for tile in 0..seqlen_k.div_ceil(block_n) {
            let columns = tile * block_n..((tile + 1) * block_n).min(seqlen_k);
            let blocks = mask.query_blocks(columns.start, columns.end - columns.start, block_m);
            for m in 0..seqlen_q.div_ceil(block_m) {
                let rows = m * block_m..((m + 1) * block_m).min(seqlen_q);
                let any = rows.clone().any(|i| columns.clone().any(|j| visible(i, j)));
                let all = rows.clone().all(|i| columns.clone().all(|j| visible(i, j)));
                assert_eq!(
                    (blocks.begin..blocks.end).contains(&m),
                    any,
                    "{seqlen_q}x{seqlen_k} {blocks:?} {m}"
                );
                assert_eq!((blocks.whole_begin..blocks.whole_end).contains(&m), all);
                assert!(blocks.all_masked().is_masked(m) || !any);
            }
        }
    }

    #[test]
    fn walks_visit_each_block_once_with_its_kind() {
        let blocks = Blocks {
            begin: 2,
            whole_begin: 4,
            whole_end: 5,
            end: 8,
        };
        let (mut forwards, mut backwards) = (std::vec![], std::vec![]);
        for_blocks!(blocks, |n, MASKED| forwards.push((n, MASKED)));
        for_blocks_backwards!(blocks, |n, MASKED| backwards.push((n, MASKED)));
        let expected: std::vec::Vec<_> = (2..8).map(|n| (n, blocks.is_masked(n))).collect();
        assert_eq!(forwards, expected);
        backwards.reverse();
        assert_eq!(backwards, expected);
    }

    #[test]
    fn blocks_agree_with_the_definition() {
        for seqlen_q in [1, 2, 7, 8, 9, 16, 31] {
            for seqlen_k in [1, 3, 8, 15, 16, 17, 40] {
                for (block_m, block_n) in [(8, 8), (16, 4), (4, 16)] {
                    check::<false>(seqlen_q, seqlen_k, block_m, block_n);
                    check::<true>(seqlen_q, seqlen_k, block_m, block_n);
                }
            }
        }
    }
}
