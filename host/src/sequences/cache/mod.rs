//! [`KvCache`]: where the keys of each sequence lie in memory that outlives a call.

mod check;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use flash_attention_kernels::work::SequenceRows;
use zerocopy::IntoBytes;

use super::{BlockTable, Pages, Placed, check_count, ranges};
use crate::error::Error;

/// Number that the keys of a page are a multiple of: 8 rows, the smallest box that Hopper's tensor maps copy at full rate.
pub const PAGE_SIZE_MULTIPLE: usize = 8;

/// Keys and values kept between calls: how long each sequence is, and where its keys lie.
///
/// A paged cache has k and v `[pages, page_size, heads_kv, head_dim]`. Key j of sequence i is key `j % page_size` of page
/// `block_table[i][j / page_size]`. Sequences may share pages. A rectangular cache has k and v
/// `[rows, seqlen, heads_kv, head_dim]`, and each sequence has a row: it is a cache whose pages are its rows. These are the
/// arguments of FlashAttention's `flash_attn_with_kvcache`.
///
/// Queries are `[batch, heads_q, seqlen_q, head_dim]` or, after [`cu_seqlens_q`](Self::cu_seqlens_q), packed end to end. The last
/// query of a sequence stands at its last key.
///
/// Every page and length is checked here, once. A value serves any number of layers whose k and v have these pages.
///
/// ```
/// use flash_attention::KvCache;
///
/// // 6 pages of 16 keys. The sequences have 20 and 5 keys; an entry of a page that is not used is not read.
/// let cache = KvCache::paged([6, 16], &[4, 0, 2, -1], &[20, 5])?;
/// assert_eq!(cache.batch(), 2);
/// assert_eq!(cache.slot(0, 17), (0, 1)); // page 0, key 1 of it
/// assert_eq!(
///     cache.to_string(),
///     "paged cache of 2 sequences of 5 to 20 keys (25 in all), in 3 of 6 pages of 16 keys"
/// );
/// // A step of decoding: one more key of each sequence.
/// let cache = cache.append(&[1, 1])?;
/// assert_eq!((cache.keys(0), cache.new_keys(0)), (21, 20..21));
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvCache {
    kind: Kind,
    /// Pages, and keys of a page: the first two axes of k and v.
    shape: [usize; 2],
    /// `[batch, max_pages]`.
    table: Vec<i32>,
    /// The table as GPUs read it. Calls over one cache share it, so that a device has it once.
    table_bytes: Arc<[u8]>,
    max_pages: usize,
    sequences: Vec<Span>,
    /// Rows of packed queries, if they are packed.
    queries: Option<Vec<Range<usize>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Paged,
    Rectangular,
}

/// The keys of one sequence, counted from the beginning of its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    /// First key: the number of keys of padding before it.
    begin: usize,
    end: usize,
    /// Number of keys at the end that the last [`KvCache::append`] added.
    new: usize,
}

impl KvCache {
    /// Describes a paged cache of `[pages, page_size]`. `block_table` is `[batch, max_pages]`, row after row, with a row for each
    /// entry of `seqused_k`, the number of keys of each sequence. Entries of pages beyond that number are not read.
    ///
    /// # Errors
    /// [`Error::PageSize`] unless page_size is a multiple of 8 and not 0; [`Error::SequenceCount`] unless each sequence has as
    /// many entries of `block_table`; [`Error::Sequence`] for a length that is negative or longer than max_pages pages, and for
    /// a used page that the cache does not have.
    pub fn paged(shape: [usize; 2], block_table: &[i32], seqused_k: &[i32]) -> Result<Self, Error> {
        let [_, page_size] = shape;
        if page_size == 0 || !page_size.is_multiple_of(PAGE_SIZE_MULTIPLE) {
            return Err(Error::PageSize {
                page_size,
                multiple_of: PAGE_SIZE_MULTIPLE,
            });
        }
        let batch = seqused_k.len();
        let max_pages = block_table.len().checked_div(batch).unwrap_or(0);
        check_count("block_table", block_table.len(), batch * max_pages)?;
        Self::new(Kind::Paged, shape, block_table.to_vec(), max_pages, seqused_k)
    }

    /// Describes a rectangular cache of `[rows, seqlen]` whose row i has the first `seqused_k[i]` keys of sequence i.
    ///
    /// # Errors
    /// [`Error::Sequence`] for a length that is negative or above seqlen, and for a sequence without a row.
    pub fn rectangular(shape: [usize; 2], seqused_k: &[i32]) -> Result<Self, Error> {
        let rows: Vec<i32> = (0..).take(seqused_k.len()).collect();
        Self::slots(shape, &rows, seqused_k)
    }

    /// Describes a rectangular cache of `[rows, seqlen]` whose row `cache_batch_idx[i]` has the first `seqused_k[i]` keys of
    /// sequence i.
    ///
    /// # Errors
    /// [`Error::SequenceCount`] unless both lists have an entry a sequence; [`Error::Sequence`] for a length that is negative or
    /// above seqlen, and for a row that the cache does not have.
    pub fn slots(shape: [usize; 2], cache_batch_idx: &[i32], seqused_k: &[i32]) -> Result<Self, Error> {
        check_count("cache_batch_idx", cache_batch_idx.len(), seqused_k.len())?;
        Self::new(Kind::Rectangular, shape, cache_batch_idx.to_vec(), 1, seqused_k)
    }

    fn new(kind: Kind, shape: [usize; 2], table: Vec<i32>, max_pages: usize, seqused_k: &[i32]) -> Result<Self, Error> {
        let empty = Span {
            begin: 0,
            end: 0,
            new: 0,
        };
        let mut cache = Self {
            kind,
            shape,
            table_bytes: table.as_bytes().into(),
            table,
            max_pages,
            sequences: vec![empty; seqused_k.len()],
            queries: None,
        };
        for (sequence, &used) in seqused_k.iter().enumerate() {
            cache.sequences[sequence].end = cache.checked_end("seqused_k", sequence, used.into(), 0)?;
            cache.check_pages(sequence)?;
        }
        Ok(cache)
    }

    /// Returns this cache with padding before the keys: sequence i has the keys `leftpad_k[i] .. seqused_k[i]` of its pages, which
    /// are its keys 0, 1, ….
    ///
    /// # Errors
    /// [`Error::SequenceCount`] unless there is a number a sequence; [`Error::Sequence`] for a negative number, or one larger than
    /// the sequence's `seqused_k`.
    pub fn leftpad_k(mut self, leftpad_k: &[i32]) -> Result<Self, Error> {
        let argument = "leftpad_k";
        check_count(argument, leftpad_k.len(), self.batch())?;
        for (sequence, (span, &pad)) in self.sequences.iter_mut().zip(leftpad_k).enumerate() {
            let most = span.end - span.new;
            span.begin = match usize::try_from(pad) {
                Ok(pad) if pad <= most => pad,
                _ => {
                    return Err(Error::Sequence {
                        argument,
                        sequence,
                        value: pad.into(),
                        expected: format!("0 to {most}, the seqused_k of the sequence"),
                    });
                }
            };
        }
        Ok(self)
    }

    /// Returns this cache with packed queries: q is `[total_q, heads_q, head_dim]`, and sequence i has the queries
    /// `cu_seqlens_q[i] .. cu_seqlens_q[i + 1]`.
    ///
    /// # Errors
    /// [`Error::SequenceCount`] unless there is an offset more than there are sequences; [`Error::Sequence`] for an offset that is
    /// not 0 at the beginning, or smaller than the one before it.
    pub fn cu_seqlens_q(mut self, cu_seqlens_q: &[i32]) -> Result<Self, Error> {
        let argument = "cu_seqlens_q";
        check_count(argument, cu_seqlens_q.len(), self.batch() + 1)?;
        self.queries = Some(ranges(argument, cu_seqlens_q)?);
        Ok(self)
    }

    /// Returns this cache after `added[i]` more keys of sequence i, its new keys. The keys that were new before are no longer.
    ///
    /// # Errors
    /// [`Error::SequenceCount`] unless there is a number a sequence; [`Error::Sequence`] for a negative number, more keys than the
    /// sequence's pages hold, a page that the cache does not have, and a new key in the place of a key of another sequence.
    pub fn append(mut self, added: &[i32]) -> Result<Self, Error> {
        let argument = "seqlens_new";
        check_count(argument, added.len(), self.batch())?;
        for (sequence, &added) in added.iter().enumerate() {
            let old = self.sequences[sequence].end;
            let end = self.checked_end(argument, sequence, added.into(), old)?;
            let span = &mut self.sequences[sequence];
            (span.end, span.new) = (end, end - old);
            self.check_pages(sequence)?;
        }
        self.check_new_places()?;
        Ok(self)
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.sequences.len()
    }

    /// Pages and keys of a page, or rows and keys of a row: the first two axes of k and v.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Number of keys of a sequence, new ones included.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn keys(&self, sequence: usize) -> usize {
        let Span { begin, end, .. } = self.sequences[sequence];
        end - begin
    }

    /// The keys of a sequence that the last [`append`](Self::append) added; empty without one.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn new_keys(&self, sequence: usize) -> Range<usize> {
        let keys = self.keys(sequence);
        keys - self.sequences[sequence].new..keys
    }

    /// The rows of packed q that are the queries of a sequence; `None` if q has a batch axis.
    ///
    /// # Panics
    /// If q is packed and there is no such sequence.
    pub fn queries(&self, sequence: usize) -> Option<Range<usize>> {
        self.queries.as_ref().map(|queries| queries[sequence].clone())
    }

    /// The page, or row of a rectangular cache, and the place in it of a key of a sequence.
    ///
    /// # Panics
    /// If there is no such key.
    pub fn slot(&self, sequence: usize, key: usize) -> (usize, usize) {
        assert!(key < self.keys(sequence), "sequence {sequence} has no key {key}");
        let (place, page_size) = (self.sequences[sequence].begin + key, self.shape[1]);
        (
            self.table[sequence * self.max_pages + place / page_size] as usize,
            place % page_size,
        )
    }

    /// Rows that `cu_seqlens_q` covers, if queries are packed.
    pub(crate) fn total_q(&self) -> Option<usize> {
        let queries = self.queries.as_ref()?;
        Some(queries.last().map_or(0, |last| last.end))
    }

    /// The pages of a sequence from the one with its first key to the one with its last.
    pub(crate) fn pages(&self, sequence: usize) -> Pages {
        let Span { begin, end, .. } = self.sequences[sequence];
        let page_size = self.shape[1];
        let used = match begin == end {
            true => 0..0,
            false => begin / page_size..end.div_ceil(page_size),
        };
        let row = &self.table[sequence * self.max_pages..][..self.max_pages];
        Pages::new(&row[used], page_size, begin)
    }

    /// The places of the sequences in k and v, and in q of `total_q` packed rows or of `seqlen_q` queries a sequence. Packed rows that
    /// belong to none are a sequence without keys.
    pub(crate) fn placed(&self, total_q: usize, seqlen_q: usize) -> Placed {
        // A length that does not fit is refused with the problem.
        let length = |keys: usize| u32::try_from(keys).unwrap_or(u32::MAX);
        let of = |(number, span): (usize, &Span)| {
            let (q_entry, queries) = match self.queries(number) {
                Some(queries) => (0, queries),
                None => (number, 0..seqlen_q),
            };
            SequenceRows {
                q_entry: q_entry as u32,
                q_begin: queries.start as u32,
                seqlen_q: queries.len() as u32,
                k_entry: match self.kind {
                    Kind::Paged => number as u32,
                    Kind::Rectangular => self.table[number] as u32,
                },
                k_begin: length(span.begin),
                seqlen_k: length(span.end - span.begin),
            }
        };
        let of_none = self.total_q().filter(|&used| used < total_q).map(|used| SequenceRows {
            q_begin: used as u32,
            seqlen_q: (total_q - used) as u32,
            ..SequenceRows::default()
        });
        let pages = (self.kind == Kind::Paged).then(|| BlockTable {
            bytes: self.table_bytes.clone(),
            entries: self.max_pages,
            page_size: self.shape[1],
        });
        Placed {
            sequences: self.sequences.iter().enumerate().map(of).chain(of_none).collect(),
            pages,
        }
    }
}

/// Writes the number of sequences, their lengths and the memory that they use.
impl fmt::Display for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = || (0..self.batch()).map(|sequence| self.keys(sequence));
        let (least, most) = (keys().min().unwrap_or(0), keys().max().unwrap_or(0));
        let total: usize = keys().sum();
        let [pages, page_size] = self.shape;
        let kind = match self.kind {
            Kind::Paged => "paged",
            Kind::Rectangular => "rectangular",
        };
        write!(
            f,
            "{kind} cache of {} sequences of {least} to {most} keys ({total} in all), in ",
            self.batch()
        )?;
        let mut used: Vec<u32> = (0..self.batch())
            .flat_map(|sequence| self.pages(sequence).table().to_vec())
            .collect();
        used.sort_unstable();
        used.dedup();
        write!(
            f,
            "{} of {pages} {} of {page_size} keys",
            used.len(),
            self.name_of_pages()
        )?;
        let new: usize = self.sequences.iter().map(|span| span.new).sum();
        if new > 0 {
            write!(f, ", {new} of them new")?;
        }
        match self.total_q() {
            Some(queries) => write!(f, "; {queries} packed queries"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::value_of;
    use super::*;

    #[test]
    fn places_outside_the_cache_are_refused_with_sequence_and_value() {
        let paged = |table: &[i32], used: &[i32]| KvCache::paged([4, 8], table, used);
        assert_eq!(value_of(paged(&[0, 4], &[8, 8])), ("block_table", 1, 4));
        assert_eq!(value_of(paged(&[0, -1], &[16])), ("block_table", 0, -1));
        assert_eq!(value_of(paged(&[0, 1], &[17])), ("seqused_k", 0, 17));
        assert_eq!(value_of(paged(&[0, 1], &[8, -1])), ("seqused_k", 1, -1));
        paged(&[0, -1], &[8]).expect("the second page is not used");
        assert!(matches!(paged(&[0, 1, 2], &[8, 8]), Err(Error::SequenceCount { .. })));
        assert!(matches!(paged(&[0], &[]), Err(Error::SequenceCount { .. })));
        for page_size in [0, 4, 12] {
            let refused = KvCache::paged([4, page_size], &[0], &[1]);
            assert!(matches!(refused, Err(Error::PageSize { .. })), "{refused:?}");
        }
        let padded = |pad| paged(&[0, 1], &[8, 5]).and_then(|cache| cache.leftpad_k(&[0, pad]));
        assert_eq!(value_of(padded(6)), ("leftpad_k", 1, 6));
        assert_eq!(value_of(padded(-1)), ("leftpad_k", 1, -1));
        assert_eq!(padded(5).expect("a sequence without keys").keys(1), 0);
        let slots = |rows: &[i32], used: &[i32]| KvCache::slots([3, 10], rows, used);
        assert_eq!(value_of(slots(&[2, 3], &[10, 0])), ("cache_batch_idx", 1, 3));
        assert_eq!(value_of(slots(&[2, 2], &[10, 11])), ("seqused_k", 1, 11));
        assert_eq!(
            value_of(KvCache::rectangular([1, 10], &[3, 3])),
            ("cache_batch_idx", 1, 1)
        );
        let queries = paged(&[0, 1], &[8, 5]).and_then(|cache| cache.cu_seqlens_q(&[0, 3, 2]));
        assert_eq!(value_of(queries), ("cu_seqlens_q", 1, 2));
    }

    #[test]
    fn new_keys_never_replace_keys_of_another_sequence() {
        // Both sequences begin with page 0, which is full, and go on in pages of their own.
        let cache = KvCache::paged([4, 8], &[0, 1, 2, 0, 3, 2], &[10, 8]).expect("pages");
        let step = cache.clone().append(&[1, 3]).expect("room");
        assert_eq!([step.new_keys(0), step.new_keys(1)], [10..11, 8..11]);
        assert_eq!(step.slot(1, 9), (3, 1));
        assert_eq!(step.clone().append(&[0, 1]).expect("room").new_keys(1), 11..12);
        assert_eq!(value_of(cache.clone().append(&[1, 17])), ("seqlens_new", 1, 17));
        assert_eq!(value_of(cache.clone().append(&[-1, 0])), ("seqlens_new", 0, -1));
        // Page 2 is the third of both.
        assert_eq!(value_of(cache.clone().append(&[7, 9])), ("block_table", 1, 2));
        // A page that one sequence reads is not written by another.
        let shared = KvCache::paged([4, 8], &[0, 0], &[4, 6]).expect("pages");
        assert_eq!(value_of(shared.append(&[1, 0])), ("block_table", 0, 0));
        // A page twice in one sequence.
        let twice = KvCache::paged([4, 8], &[1, 1], &[8]).expect("pages");
        assert_eq!(value_of(twice.append(&[1])), ("block_table", 0, 1));
    }

    #[test]
    fn padding_moves_the_keys_of_a_sequence() {
        let cache = KvCache::slots([3, 24], &[2], &[20]).and_then(|cache| cache.leftpad_k(&[5]));
        let cache = cache.expect("a row");
        assert_eq!((cache.keys(0), cache.slot(0, 0)), (15, (2, 5)));
        let paged = KvCache::paged([9, 8], &[7, 3, 5], &[20]).and_then(|cache| cache.leftpad_k(&[9]));
        let paged = paged.expect("pages");
        let pages = paged.pages(0);
        assert_eq!((pages.table(), pages.place(0)), (&[3, 5][..], (3, 1)));
        assert_eq!([paged.slot(0, 8), pages.place(8)], [(5, 1); 2]);
        // A row of 2^32 keys and more, as a view with a stride of 0 has.
        for page_size in [1 << 32, (1 << 32) + 8] {
            let row = KvCache::slots([1, page_size], &[0], &[20]).and_then(|cache| cache.leftpad_k(&[9]));
            let row = row.expect("a row");
            assert_eq!([row.slot(0, 4), row.pages(0).place(4)], [(0, 13); 2]);
        }
    }
}
