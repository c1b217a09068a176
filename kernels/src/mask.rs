//! Which (query, key) pairs are visible. The one place that compares sequence lengths.
//!
//! Query `i` sees the keys `0 .. visible_end(i)`. Full attention sees all of them; causal attention is aligned
//! bottom-right, so the last query sees the last key and query `i` sees `j <= i + seqlen_k - seqlen_q`. Where
//! `seqlen_q > seqlen_k` the first queries see nothing at all.
//!
//! The forward pass walks key blocks for a block of queries ([`Mask::key_blocks`]); the backward pass asks the
//! transposed question, which query blocks a block of keys is seen by ([`Mask::query_blocks`]).

/// The largest sequence length a kernel takes: positions and their block-rounded ends fit an `i32`.
pub const MAX_SEQLEN: u32 = i32::MAX as u32 - 1024;

/// A run of blocks, split where masking starts or stops to matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// First block that holds a visible pair.
    pub begin: u32,
    /// Forward: blocks `begin .. boundary` need no mask. Backward: blocks `boundary .. end` need none.
    pub boundary: u32,
    /// One past the last block that holds a visible pair; `begin == end` if there is none.
    pub end: u32,
}

/// The visible pairs of one attention problem.
#[derive(Clone, Copy, Debug)]
pub struct Mask<const CAUSAL: bool> {
    seqlen_q: u32,
    seqlen_k: u32,
}

impl<const CAUSAL: bool> Mask<CAUSAL> {
    /// The mask of a problem with these sequence lengths, each at most [`MAX_SEQLEN`].
    #[inline(always)]
    pub const fn new(seqlen_q: u32, seqlen_k: u32) -> Self {
        Self { seqlen_q, seqlen_k }
    }

    /// Keys that query `row` sees: `0 .. visible_end(row)`.
    #[inline(always)]
    pub const fn visible_end(&self, row: u32) -> u32 {
        if !CAUSAL {
            return self.seqlen_k;
        }
        let end = row as i32 + 1 + (self.seqlen_k as i32 - self.seqlen_q as i32);
        if end < 0 {
            0
        } else if end > self.seqlen_k as i32 {
            self.seqlen_k
        } else {
            end as u32
        }
    }

    /// First query that sees key `column`, `seqlen_q` if none does.
    #[inline(always)]
    pub const fn visible_begin(&self, column: u32) -> u32 {
        if !CAUSAL {
            return 0;
        }
        let begin = column as i32 - (self.seqlen_k as i32 - self.seqlen_q as i32);
        if begin < 0 {
            0
        } else if begin > self.seqlen_q as i32 {
            self.seqlen_q
        } else {
            begin as u32
        }
    }

    /// The key blocks of `block_n` that queries `first_row .. first_row + rows` see, walked left to right.
    #[inline(always)]
    pub const fn key_blocks(&self, first_row: u32, rows: u32, block_n: u32) -> Blocks {
        let boundary = self.visible_end(first_row) / block_n;
        let end = self.visible_end(first_row + rows - 1).div_ceil(block_n);
        Blocks {
            begin: 0,
            boundary,
            end,
        }
    }

    /// The query blocks of `block_m` that see keys `first_column .. first_column + columns`, walked top to bottom.
    ///
    /// A block is free of the mask once its first query sees every key of the run. The last blocks may reach past
    /// `seqlen_q`, and their tiles past the run; what is missing there is the loader's concern and the store's, not the
    /// mask's.
    #[inline(always)]
    pub const fn query_blocks(&self, first_column: u32, columns: u32, block_m: u32) -> Blocks {
        let end = self.seqlen_q.div_ceil(block_m);
        let begin = self.visible_begin(first_column) / block_m;
        let begin = if begin > end { end } else { begin };
        let last_column = first_column + columns - 1;
        let boundary = self.visible_begin(last_column).div_ceil(block_m);
        let boundary = if boundary > end { end } else { boundary };
        Blocks { begin, boundary, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair, block by block, against the definition of causal attention.
    fn check<const CAUSAL: bool>(seqlen_q: u32, seqlen_k: u32, block_m: u32, block_n: u32) {
        let mask = Mask::<CAUSAL>::new(seqlen_q, seqlen_k);
        let visible = |i: u32, j: u32| {
            i < seqlen_q && j < seqlen_k && (!CAUSAL || j as i64 <= i as i64 + seqlen_k as i64 - seqlen_q as i64)
        };
        for i in 0..seqlen_q {
            for j in 0..seqlen_k {
                assert_eq!(
                    j < mask.visible_end(i),
                    visible(i, j),
                    "({i}, {j}) of {seqlen_q}x{seqlen_k}"
                );
                assert_eq!(
                    i >= mask.visible_begin(j),
                    visible(i, j),
                    "({i}, {j}) of {seqlen_q}x{seqlen_k}"
                );
            }
        }
        for tile in 0..seqlen_q.div_ceil(block_m) {
            let rows = tile * block_m..((tile + 1) * block_m).min(seqlen_q);
            let blocks = mask.key_blocks(rows.start, rows.end - rows.start, block_n);
            for n in 0..seqlen_k.div_ceil(block_n) {
                let columns = n * block_n..(n + 1) * block_n;
                let any = rows.clone().any(|i| columns.clone().any(|j| visible(i, j)));
                let all = rows.clone().all(|i| columns.clone().all(|j| visible(i, j)));
                assert_eq!((blocks.begin..blocks.end).contains(&n), any);
                assert_eq!((blocks.begin..blocks.boundary).contains(&n), all);
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
                assert_eq!((blocks.boundary..blocks.end).contains(&m), all);
            }
        }
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
