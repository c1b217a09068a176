//! Batches that are no rectangle: [`Sequences`] packed end to end, and the [`KvCache`] of sequences that grow.

mod cache;
mod pages;
mod placed;

pub use cache::KvCache;
pub(crate) use pages::Pages;
pub(crate) use placed::{BlockTable, Placed};

use std::fmt;
use std::ops::Range;

use flash_attention_kernels::work::SequenceRows;

use crate::error::Error;

/// A ragged batch: sequences of different lengths, packed end to end along one axis without padding.
///
/// q is `[total_q, heads_q, head_dim]`, k and v are `[total_k, heads_kv, head_dim]`. Sequence i has the queries
/// `cu_seqlens_q[i] .. cu_seqlens_q[i + 1]` and the keys `cu_seqlens_k[i] .. cu_seqlens_k[i + 1]`, of which only the first
/// `seqused_k[i]` count where that is given. A sequence may have no queries, no keys, or neither. These are the arguments of
/// FlashAttention's `flash_attn_varlen_func`.
///
/// Made and checked once, it serves any number of layers, forward and backward.
///
/// ```
/// use flash_attention::Sequences;
///
/// let sequences = Sequences::new(&[0, 3, 3, 10], &[0, 5, 9, 16])?.seqused_k(&[5, 2, 7])?;
/// assert_eq!(sequences.batch(), 3);
/// assert_eq!(sequences.queries(2), 3..10);
/// assert_eq!(sequences.keys(1), 5..7);
/// assert_eq!(sequences.to_string(), "3 sequences of 0 to 7 queries (10 in all) and 2 to 7 keys (14 in all)");
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    queries: Vec<Range<usize>>,
    keys: Vec<Range<usize>>,
    /// Rows that `cu_seqlens_q` covers.
    total_q: usize,
}

/// The queries and keys of a problem of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Number of the sequence; 0 for rows that belong to none.
    pub sequence: usize,
    /// Rows of q, out, lse and dq.
    pub queries: Range<usize>,
    /// Rows of k, v, dk and dv.
    pub keys: Range<usize>,
}

impl Sequences {
    /// The sequences between neighbouring offsets. Both lists begin with 0, never fall, and have an entry more than there
    /// are sequences.
    ///
    /// # Errors
    /// [`Error::SequenceCount`] if the lists differ in length or are empty; [`Error::Sequence`] for an offset that is not
    /// 0 at the beginning, or smaller than the one before it.
    pub fn new(cu_seqlens_q: &[i32], cu_seqlens_k: &[i32]) -> Result<Self, Error> {
        let queries = ranges("cu_seqlens_q", cu_seqlens_q)?;
        let keys = ranges("cu_seqlens_k", cu_seqlens_k)?;
        check_count("cu_seqlens_k", cu_seqlens_k.len(), cu_seqlens_q.len())?;
        Ok(Self {
            total_q: queries.last().map_or(0, |last| last.end),
            queries,
            keys,
        })
    }

    /// Returns these sequences, of which only the first `seqused_k[i]` keys count: the others are neither read nor given a
    /// gradient other than zero.
    ///
    /// # Errors
    /// [`Error::SequenceCount`] unless there is a number a sequence; [`Error::Sequence`] for a negative number, or one
    /// larger than the keys that the sequence has.
    pub fn seqused_k(mut self, seqused_k: &[i32]) -> Result<Self, Error> {
        let argument = "seqused_k";
        check_count(argument, seqused_k.len(), self.batch())?;
        for (sequence, (keys, &used)) in self.keys.iter_mut().zip(seqused_k).enumerate() {
            let most = keys.len();
            match usize::try_from(used) {
                Ok(used) if used <= most => keys.end = keys.start + used,
                _ => {
                    return Err(Error::Sequence {
                        argument,
                        sequence,
                        value: used.into(),
                        expected: format!("0 to {most}, the keys of the sequence"),
                    });
                }
            }
        }
        Ok(self)
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.queries.len()
    }

    /// The rows of q that are the queries of a sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn queries(&self, sequence: usize) -> Range<usize> {
        self.queries[sequence].clone()
    }

    /// The rows of k and v that are the keys of a sequence, unused ones left out.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn keys(&self, sequence: usize) -> Range<usize> {
        self.keys[sequence].clone()
    }

    /// Refuses sequences that end beyond the rows of q or k.
    fn check_ends(&self, total_q: usize, total_k: usize) -> Result<(), Error> {
        for (argument, ranges, total, tensor) in [
            ("cu_seqlens_q", &self.queries, total_q, "q"),
            ("cu_seqlens_k", &self.keys, total_k, "k"),
        ] {
            if let Some(sequence) = ranges.iter().position(|range| range.end > total) {
                return Err(Error::Sequence {
                    argument,
                    sequence,
                    value: ranges[sequence].end as i64,
                    expected: format!("at most {total}, the rows of {tensor}"),
                });
            }
        }
        Ok(())
    }

    /// Keys between those that count of one sequence and the next sequence, and before the first if there is none.
    fn keys_of_none(&self, total_k: usize) -> impl Iterator<Item = Range<usize>> {
        let ends = [0].into_iter().chain(self.keys.iter().map(|keys| keys.end));
        let begins = self.keys.iter().map(|keys| keys.start).chain([total_k]);
        ends.zip(begins).map(|(end, begin)| end..begin)
    }

    /// The problems that a ragged batch consists of, longest first: its sequences, and the rows of a tensor that belong to no
    /// sequence, as queries without keys and keys without queries. A batch without rows is one problem without rows, so that
    /// its heads and head_dim are validated like any other's.
    ///
    /// # Errors
    /// [`Error::Sequence`] if a sequence ends beyond the rows of q or k.
    pub(crate) fn pieces(&self, total_q: usize, total_k: usize) -> Result<Vec<Piece>, Error> {
        self.check_ends(total_q, total_k)?;
        let piece = |sequence, queries, keys| Piece {
            sequence,
            queries,
            keys,
        };
        let mut pieces: Vec<Piece> = (0..self.batch())
            .map(|sequence| piece(sequence, self.queries(sequence), self.keys(sequence)))
            .collect();
        pieces.extend(self.keys_of_none(total_k).map(|keys| piece(0, 0..0, keys)));
        pieces.retain(|piece| !piece.queries.is_empty() || !piece.keys.is_empty());
        if pieces.is_empty() || self.total_q < total_q {
            pieces.push(piece(0, self.total_q..total_q, 0..0));
        }
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece.queries.len() * piece.keys.len()));
        Ok(pieces)
    }

    /// The places of the sequences in tensors of `total_q` and `total_k` rows. Rows of q that belong to none are one without keys, and
    /// rows of k that belong to none or do not count are some without queries.
    ///
    /// # Errors
    /// [`Error::Sequence`] if a sequence ends beyond the rows of q or k.
    pub(crate) fn placed(&self, total_q: usize, total_k: usize) -> Result<Placed, Error> {
        self.check_ends(total_q, total_k)?;
        // Rows that do not fit are refused with the problem.
        let number = |rows: usize| u32::try_from(rows).unwrap_or(u32::MAX);
        let rows = |queries: &Range<usize>, keys: &Range<usize>| SequenceRows {
            q_entry: 0,
            q_begin: number(queries.start),
            seqlen_q: number(queries.len()),
            k_entry: 0,
            k_begin: number(keys.start),
            seqlen_k: number(keys.len()),
        };
        let of_none = (self.total_q < total_q).then(|| rows(&(self.total_q..total_q), &(0..0)));
        let keys_of_none = self.keys_of_none(total_k).filter(|keys| !keys.is_empty());
        let sequences = self.queries.iter().zip(&self.keys).map(|(q, k)| rows(q, k));
        let of_none = of_none.into_iter().chain(keys_of_none.map(|keys| rows(&(0..0), &keys)));
        Ok(Placed {
            sequences: sequences.chain(of_none).collect(),
            pages: None,
        })
    }
}

/// Writes the number of sequences and their lengths.
impl fmt::Display for Sequences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |ranges: &[Range<usize>]| {
            let lens = || ranges.iter().map(ExactSizeIterator::len);
            let (least, most) = (lens().min().unwrap_or(0), lens().max().unwrap_or(0));
            let total: usize = lens().sum();
            (least, most, total)
        };
        let (queries, keys) = (of(&self.queries), of(&self.keys));
        write!(
            f,
            "{} sequences of {} to {} queries ({} in all)",
            self.batch(),
            queries.0,
            queries.1,
            queries.2
        )?;
        write!(f, " and {} to {} keys ({} in all)", keys.0, keys.1, keys.2)
    }
}

/// The ranges between neighbouring offsets.
fn ranges(argument: &'static str, offsets: &[i32]) -> Result<Vec<Range<usize>>, Error> {
    let Some(&first) = offsets.first() else {
        return Err(Error::SequenceCount {
            argument,
            len: 0,
            expected: 1,
        });
    };
    if first != 0 {
        return Err(Error::Sequence {
            argument,
            sequence: 0,
            value: first.into(),
            expected: "0, where the first sequence begins".to_owned(),
        });
    }
    let pairs = offsets.windows(2).enumerate();
    pairs
        .map(|(sequence, pair)| {
            let [begin, end] = [pair[0], pair[1]];
            if end < begin {
                return Err(Error::Sequence {
                    argument,
                    sequence,
                    value: end.into(),
                    expected: format!("at least {begin}, where the sequence begins"),
                });
            }
            Ok(begin as usize..end as usize)
        })
        .collect()
}

fn check_count(argument: &'static str, len: usize, expected: usize) -> Result<(), Error> {
    if len == expected {
        Ok(())
    } else {
        Err(Error::SequenceCount {
            argument,
            len,
            expected,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Argument, sequence and value of a refusal.
    pub(super) fn value_of<T: fmt::Debug>(result: Result<T, Error>) -> (&'static str, usize, i64) {
        match result {
            Err(Error::Sequence {
                argument,
                sequence,
                value,
                ..
            }) => (argument, sequence, value),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn offsets_that_are_none_are_refused_with_sequence_and_value() {
        assert_eq!(value_of(Sequences::new(&[1, 2], &[0, 2])), ("cu_seqlens_q", 0, 1));
        assert_eq!(value_of(Sequences::new(&[0, 2, 1], &[0, 2, 2])), ("cu_seqlens_q", 1, 1));
        assert_eq!(value_of(Sequences::new(&[0, 2], &[0, -1])), ("cu_seqlens_k", 0, -1));
        let sequences = || Sequences::new(&[0, 2, 4], &[0, 2, 5]).expect("offsets");
        assert_eq!(value_of(sequences().seqused_k(&[2, 4])), ("seqused_k", 1, 4));
        assert_eq!(value_of(sequences().seqused_k(&[-1, 3])), ("seqused_k", 0, -1));
        let count = |result| matches!(result, Err(Error::SequenceCount { .. }));
        assert!(count(Sequences::new(&[], &[])) && count(Sequences::new(&[0, 1], &[0])));
        assert!(count(sequences().seqused_k(&[1])));
        assert_eq!(value_of(sequences().pieces(4, 4)), ("cu_seqlens_k", 1, 5));
    }

    /// Every row of q and of k is in exactly one piece.
    #[test]
    fn pieces_cover_each_row_once() {
        let lists: [&[i32]; 4] = [&[0], &[0, 0, 0], &[0, 3, 3, 8], &[0, 0, 7, 9]];
        for cu_seqlens_q in lists {
            for cu_seqlens_k in lists.iter().filter(|list| list.len() == cu_seqlens_q.len()) {
                let sequences = Sequences::new(cu_seqlens_q, cu_seqlens_k).expect("offsets");
                let used: Vec<i32> = (0..sequences.batch())
                    .map(|i| sequences.keys(i).len() as i32 / 2)
                    .collect();
                for sequences in [sequences.clone(), sequences.seqused_k(&used).expect("fewer")] {
                    let pieces = sequences.pieces(10, 11).expect("they fit");
                    let mut rows = (vec![0; 10], vec![0; 11]);
                    for piece in pieces {
                        rows.0[piece.queries].iter_mut().for_each(|count| *count += 1);
                        rows.1[piece.keys].iter_mut().for_each(|count| *count += 1);
                    }
                    assert!(rows.0.iter().chain(&rows.1).all(|&count| count == 1), "{sequences}");
                }
            }
        }
    }
}
