//! A problem's view of the sequences of a batch that is no rectangle: their limits and their coordinates.

use flash_attention_kernels::mask::MAX_SEQLEN;
use flash_attention_kernels::work::SequenceRows;

use super::{Named, TensorInfo};
use crate::error::Error;
use crate::program::Coordinate;
use crate::program::interval::Ranges;
use crate::sequences::Placed;

impl Placed {
    /// Refuses sequences that are longer than kernels count.
    pub(super) fn check(&self) -> Result<(), Error> {
        let max = MAX_SEQLEN as usize;
        let mut ends = (self.sequences.iter()).map(|sequence| sequence.k_begin as usize + sequence.seqlen_k as usize);
        match ends.find(|&end| end > max) {
            None => Ok(()),
            Some(seqlen) => Err(Error::SequenceTooLong {
                argument: "k",
                seqlen,
                max,
            }),
        }
    }

    /// Returns the first and last coordinates of the pairs of each sequence, or one empty range if there are no pairs.
    pub(super) fn pairs_of_each(&self, [(_, q), (_, k)]: [Named<'_>; 2]) -> Vec<Ranges> {
        let heads = |tensor: &TensorInfo| (0, i32::try_from(tensor.shape()[1]).unwrap_or(i32::MAX) - 1);
        let ranges = |number: usize, sequence: &SequenceRows| {
            let [seqlen_q, seqlen_k] = [sequence.seqlen_q as i32, sequence.seqlen_k as i32];
            Coordinate::ALL.map(|coordinate| match coordinate {
                Coordinate::Batch => (number as i32, number as i32),
                Coordinate::Head => heads(q),
                Coordinate::KvHead => heads(k),
                Coordinate::Query => (0, seqlen_q - 1),
                Coordinate::Key => (0, seqlen_k - 1),
                Coordinate::SeqlenQ => (seqlen_q, seqlen_q),
                Coordinate::SeqlenK => (seqlen_k, seqlen_k),
            })
        };
        let sequences = self.sequences.iter().enumerate();
        let with_pairs = sequences.filter(|(_, sequence)| sequence.seqlen_q > 0 && sequence.seqlen_k > 0);
        let mut all: Vec<Ranges> = with_pairs.map(|(number, sequence)| ranges(number, sequence)).collect();
        if all.is_empty() {
            all.push(ranges(0, &SequenceRows::default()));
        }
        all
    }
}
