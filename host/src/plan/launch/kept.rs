//! Lists of work that launches have in common: made once, and kept for a time.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use flash_attention_kernels::work::SequenceRows;

use super::lists::{Listed, Owned};
use crate::error::Error;
use crate::plan::lists::Owner;
use crate::program::MaskKey;

/// Lists that are kept, those used last at the back.
static KEPT: Mutex<VecDeque<(Key, Listed)>> = Mutex::new(VecDeque::new());

/// Most lists that are kept.
const MOST: usize = 64;

/// Most bytes of the lists that are kept, and of the tables in their keys.
const MOST_BYTES: usize = 32 << 20;

/// Key of kept lists of work: everything from which they are made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    pub owner: Owner,
    /// Rows of an owned tile, and of a streamed one.
    pub tiles: [u32; 2],
    pub owned: Owned,
    /// Query heads and key heads.
    pub heads: [usize; 2],
    /// True if the sequences are placed, false if each is a batch entry.
    pub is_placed: bool,
    pub sequences: Vec<SequenceRows>,
    pub mask: MaskKey,
}

impl Key {
    /// Returns the lists of this key, which `make` makes if they are not kept. A launch in another thread does not wait for that.
    ///
    /// # Errors
    /// The errors of `make`.
    pub fn listed(self, make: impl FnOnce(&Self) -> Result<Listed, Error>) -> Result<Listed, Error> {
        let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listed) = find(&self, &mut kept()) {
            return Ok(listed);
        }
        let listed = make(&self)?;
        keep((self, listed.clone()), &mut kept());
        Ok(listed)
    }
}

/// Returns the lists of a key, which become those used last.
fn find(key: &Key, kept: &mut VecDeque<(Key, Listed)>) -> Option<Listed> {
    let place = kept.iter().rposition(|(other, _)| other == key)?;
    let found = kept.remove(place)?;
    let listed = found.1.clone();
    kept.push_back(found);
    Some(listed)
}

/// Keeps lists, and forgets those that were not used for longest to stay within the limits.
fn keep(new: (Key, Listed), kept: &mut VecDeque<(Key, Listed)>) {
    let bytes =
        |(key, listed): &(Key, Listed)| listed.content.len() + key.mask.bytes() + size_of_val(&key.sequences[..]);
    kept.push_back(new);
    let mut all: usize = kept.iter().map(bytes).sum();
    while kept.len() > MOST || all > MOST_BYTES {
        let Some(oldest) = kept.pop_front() else { return };
        all -= bytes(&oldest);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use flash_attention_kernels::abi::WorkLists;

    use super::*;
    use crate::device::Device;
    use crate::options::Attention;
    use crate::plan::Plan;
    use crate::problem::Problem;
    use crate::target::DeviceInfo;
    use crate::tensor::Tensor;

    /// Content of the lists of a forward pass with a mask.
    fn content(attention: &Attention, heads: usize, seqlen: usize) -> Arc<[u8]> {
        let q = Tensor::<f32>::zeros(&Device::cpu(), [2, heads, seqlen, 8]).expect("small");
        let problem = Problem::new(attention, q.info(), q.info(), q.info(), None).expect("valid");
        let plan = Plan::new(&problem, &DeviceInfo::gpu((8, 0), 108, 163 * 1024)).expect("a kernel");
        let listed = plan.launches()[0].listed.as_ref().expect("a mask");
        listed.content.clone()
    }

    #[test]
    fn equal_masks_share_their_lists_and_others_do_not() {
        let window = |cap, seed| Attention::new().window(11, 3).softcap(cap).dropout(0.5, seed);
        let first = content(&window(1.0, 1), 2, 301);
        assert!(Arc::ptr_eq(&first, &content(&window(2.0, 2), 2, 301)), "made once");
        for other in [
            content(&window(1.0, 1), 2, 302),
            content(&window(1.0, 1), 3, 301),
            content(&window(1.0, 1).causal(), 2, 301),
            content(&window(1.0, 1).prefix(200), 2, 301),
        ] {
            assert!(!Arc::ptr_eq(&first, &other));
        }
    }

    fn entry(rows: u32, bytes: usize) -> (Key, Listed) {
        let program = Attention::new()
            .window(1, 1)
            .program()
            .expect("valid")
            .expect("a program")
            .clone();
        let key = Key {
            owner: Owner::Queries,
            tiles: [rows, rows],
            owned: Owned {
                heads: 1,
                sharing: 1,
                rows,
            },
            heads: [1, 1],
            is_placed: false,
            sequences: Vec::new(),
            mask: MaskKey::new(&program),
        };
        let listed = Listed {
            content: vec![0; bytes].into(),
            table: None,
            work: WorkLists::NONE,
            lists_of_block: 1,
            blocks: rows,
            streamed_rows: 0,
        };
        (key, listed)
    }

    #[test]
    fn what_was_not_used_for_longest_is_forgotten() {
        let mut kept = VecDeque::new();
        for rows in 0..MOST as u32 {
            keep(entry(rows, 1), &mut kept);
        }
        let has = |rows, kept: &mut VecDeque<_>| find(&entry(rows, 0).0, kept).map(|listed| listed.blocks);
        assert_eq!(has(0, &mut kept), Some(0));
        keep(entry(1000, 1), &mut kept);
        assert_eq!(
            [0, 1, 2, 1000].map(|rows| has(rows, &mut kept)),
            [Some(0), None, Some(2), Some(1000)]
        );
        assert_eq!(kept.len(), MOST);
    }

    #[test]
    fn large_lists_make_room_or_are_not_kept() {
        let mut kept = VecDeque::new();
        keep(entry(1, MOST_BYTES / 2), &mut kept);
        keep(entry(2, MOST_BYTES / 2), &mut kept);
        assert_eq!(kept.len(), 2);
        keep(entry(3, 1), &mut kept);
        assert_eq!(kept.iter().map(|(_, listed)| listed.blocks).collect::<Vec<_>>(), [2, 3]);
        keep(entry(4, MOST_BYTES + 1), &mut kept);
        assert!(kept.is_empty());
    }
}
