//! Arguments that this package refuses and the host does not see, each with the argument's name, its value and the limit.

use std::fmt;

/// Reason for which a call was refused before the host saw it. Functions give it as candle's error, with this text.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// An option is not carried out.
    Unsupported {
        /// The option.
        argument: &'static str,
        /// Value that was given.
        value: String,
    },
    /// Cumulative lengths do not begin with 0, fall, or end past the tokens there are.
    CumulativeLengths {
        /// The tensor of lengths.
        argument: &'static str,
        /// Index of the entry.
        index: usize,
        /// The entry.
        value: usize,
        /// Least and largest value that is right.
        limits: [usize; 2],
    },
    /// Two tensors do not describe as many sequences.
    SequenceCount {
        /// The tensor that disagrees.
        argument: &'static str,
        /// Sequences in it.
        got: usize,
        /// Sequences in seqlens_q.
        expected: usize,
    },
    /// A sequence is longer than the longest one was said to be.
    MaxSeqlen {
        /// The argument that said so.
        argument: &'static str,
        /// Value of the argument.
        value: usize,
        /// The sequence, from 0.
        sequence: usize,
        /// Tokens of the sequence.
        seqlen: usize,
    },
    /// A page size is not that of the tensors of pages.
    PageSize {
        /// page_block_size.
        value: usize,
        /// Tokens a page in k.
        expected: usize,
    },
    /// A block table names a page that the tensors of pages do not have.
    Page {
        /// The sequence, from 0.
        sequence: usize,
        /// The page.
        value: u32,
        /// Pages that there are.
        limit: usize,
    },
    /// A sequence has more keys than its row of the block table has pages for.
    BlockTable {
        /// The sequence, from 0.
        sequence: usize,
        /// Keys of the sequence.
        seqlen: usize,
        /// The keys that its pages hold.
        limit: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported { argument, value } => write!(f, "{argument} is {value}; only None is supported"),
            Self::CumulativeLengths {
                argument,
                index,
                value,
                limits: [least, most],
            } => write!(f, "{argument}[{index}] is {value}; it must be {least} to {most}"),
            Self::SequenceCount {
                argument,
                got,
                expected,
            } => write!(f, "{argument} has {got} sequences, seqlens_q has {expected}"),
            Self::MaxSeqlen {
                argument,
                value,
                sequence,
                seqlen,
            } => write!(f, "{argument} is {value}, but sequence {sequence} has {seqlen} tokens"),
            Self::PageSize { value, expected } => {
                write!(f, "page_block_size is {value}, but pages of k have {expected} tokens")
            }
            Self::Page { sequence, value, limit } => write!(
                f,
                "block_table has page {value} for sequence {sequence}; it must be below {limit}"
            ),
            Self::BlockTable {
                sequence,
                seqlen,
                limit,
            } => write!(
                f,
                "sequence {sequence} has {seqlen} keys, but its row of block_table holds {limit} at most"
            ),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}
