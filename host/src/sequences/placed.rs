//! [`Placed`]: where the sequences of a batch that is no rectangle lie in the tensors of a problem.

use std::fmt;
use std::sync::Arc;

use flash_attention_kernels::mask::Mask;
use flash_attention_kernels::work::SequenceRows;

/// Sequences of a batch in the tensors of one problem: q `[entries, heads_q, rows, head_dim]`, and k and v
/// `[entries, heads_kv, rows, head_dim]` or, in pages, `[pages, heads_kv, page_size, head_dim]`.
///
/// Whoever makes it proves that every row lies in its tensor, that no two sequences have a query in common, and that every query
/// belongs to one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placed {
    /// The sequences, by their numbers. Behind them, queries that belong to none are sequences without keys, and keys that belong to
    /// none or do not count may be sequences without queries, whose gradients are zeros.
    pub sequences: Vec<SequenceRows>,
    /// Block table of k and v; `None` if they are not paged.
    pub pages: Option<BlockTable>,
}

/// Pages of the sequences.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlockTable {
    /// Numbers of pages, i32 `[batch, entries]`. Entries that no key needs are not read.
    pub bytes: Arc<[u8]>,
    /// Number of pages of a row.
    pub entries: usize,
    /// Number of keys of a page.
    pub page_size: usize,
}

impl Placed {
    /// Places the sequences of a rectangle, one a batch entry.
    pub(crate) fn of_rectangle(batch: usize, seqlen_q: u32, seqlen_k: u32) -> Self {
        let rows = |entry| SequenceRows {
            q_entry: entry,
            q_begin: 0,
            seqlen_q,
            k_entry: entry,
            k_begin: 0,
            seqlen_k,
        };
        Self {
            sequences: (0..batch as u32).map(rows).collect(),
            pages: None,
        }
    }

    /// Returns the number of pairs of one head that lengths and a causal mask show.
    pub(crate) fn pairs(&self, causal: bool) -> u128 {
        let of = |&SequenceRows { seqlen_q, seqlen_k, .. }: &SequenceRows| match causal {
            true => Mask::<true>::new(seqlen_q, seqlen_k).pairs(),
            false => Mask::<false>::new(seqlen_q, seqlen_k).pairs(),
        };
        self.sequences.iter().map(of).sum()
    }
}

/// Writes the number of sequences, those of rows that belong to none included, and the numbers of their queries and keys.
impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = |of: fn(&SequenceRows) -> u32| self.sequences.iter().map(|rows| u64::from(of(rows))).sum::<u64>();
        let (queries, keys) = (total(|rows| rows.seqlen_q), total(|rows| rows.seqlen_k));
        write!(
            f,
            "{} sequences of {queries} queries and {keys} keys in all",
            self.sequences.len()
        )
    }
}
