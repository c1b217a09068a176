//! Races between blocks in global memory.
//!
//! Each 4-byte cell records the block and the epoch of its last write and of its last read. Blocks that synchronise
//! through strong operations pass on the epochs of other blocks that they know: a release passes on all of them, a
//! relaxed or volatile operation those that the block's last fence covered. Every strong operation learns the epochs
//! that it finds; no fence after a relaxed read is required. Two accesses race if at least one is a write and no such
//! path leads from one to the other. Accesses within one block are not checked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Largest launch that is checked, in blocks.
pub(crate) const MAX_BLOCKS: u64 = (1 << 24) - 2;

const PAGE_CELLS: usize = 1024;

/// A cell in one word: block + 1 (24 bits), epoch (12 bits), bytes (4 bits), two flags (strong access, atomic
/// update), and line (22 bits).
#[derive(Clone, Copy)]
struct Packed(u64);

impl Packed {
    fn new(block: u32, epoch: u32, bytes: u8, who: &Who) -> Self {
        let epoch = u64::from(epoch.min(0xfff));
        Self(
            (u64::from(block) + 1) << 40
                | epoch << 28
                | u64::from(bytes) << 24
                | u64::from(who.strong) << 23
                | u64::from(who.update) << 22
                | u64::from(who.line.min(0x3f_ffff)),
        )
    }

    fn block(self) -> Option<u32> {
        ((self.0 >> 40) as u32).checked_sub(1)
    }

    fn epoch(self) -> u32 {
        (self.0 >> 28) as u32 & 0xfff
    }

    fn bytes(self) -> u8 {
        (self.0 >> 24) as u8 & 0xf
    }

    fn strong(self) -> bool {
        self.0 >> 23 & 1 != 0
    }

    fn update(self) -> bool {
        self.0 >> 22 & 1 != 0
    }

    fn line(self) -> u32 {
        self.0 as u32 & 0x3f_ffff
    }
}

/// The accessing block, its epoch, the line, and two flags: strong access, atomic update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Who {
    pub block: u32,
    pub epoch: u32,
    pub line: u32,
    pub strong: bool,
    pub update: bool,
}

/// Number of addresses of strong operations that are tracked. With more, the check stops.
const MAX_OBJECTS: usize = 1 << 14;

/// Last write, last read, and the bytes that the last write left (see [`left_by`]).
type Page = Box<[[AtomicU64; 3]]>;

/// An earlier access by another block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub block: u32,
    pub line: u32,
    pub was_write: bool,
    /// An ordinary read of a location that another block updates atomically. It is a first guess, and no race, if the
    /// reader then updates the location too.
    pub guess: bool,
}

/// Shadow of all global memory during one launch.
#[derive(Debug)]
pub(crate) struct GlobalShadow {
    /// Pages of each allocation of the view.
    pages: Vec<Vec<OnceLock<Page>>>,
    sync: Mutex<Sync>,
}

#[derive(Debug, Default)]
struct Sync {
    /// Epochs released at each address, by block.
    objects: HashMap<u64, HashMap<u32, u32>>,
    blocks: HashMap<u32, Block>,
    gave_up: bool,
}

/// Epochs of other blocks that a block knows, and its own epoch.
#[derive(Debug, Default)]
struct Block {
    known: HashMap<u32, u32>,
    /// Epochs that the block knew at its last fence.
    fenced: HashMap<u32, u32>,
}

/// Adds the epochs that `other` knows.
fn join(mine: &mut HashMap<u32, u32>, other: &HashMap<u32, u32>) {
    for (block, epoch) in other {
        let known = mine.entry(*block).or_insert(0);
        *known = (*known).max(*epoch);
    }
}

/// Packs the bytes that a write of `stored` at `at` leaves in a cell: a mask of bytes above their values. It is 0 if
/// the bytes are not known.
fn left_by(stored: &[u8], at: usize, cell: usize) -> u64 {
    let mut left = 0;
    for byte in 0..4 {
        let value = (cell * 4 + byte).checked_sub(at).and_then(|from| stored.get(from));
        if let Some(value) = value {
            left |= 1 << (32 + byte) | u64::from(*value) << (8 * byte);
        }
    }
    left
}

impl GlobalShadow {
    /// Makes a shadow for allocations of these lengths.
    pub fn new(lengths: impl Iterator<Item = usize>) -> Self {
        let pages = lengths.map(|len| {
            let n = len.div_ceil(4 * PAGE_CELLS);
            (0..n).map(|_| OnceLock::new()).collect()
        });
        Self {
            pages: pages.collect(),
            sync: Mutex::default(),
        }
    }

    /// Performs a block's strong operation on an address: the block learns the epochs left there, and leaves those it
    /// knows (release) or those its last fence covered. Returns the block's epoch, which a release advances
    /// afterwards.
    pub fn synchronize(&self, block: u32, address: u64, release: bool) -> u32 {
        let mut sync = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let Sync {
            objects,
            blocks,
            gave_up,
        } = &mut *sync;
        if objects.len() >= MAX_OBJECTS {
            *gave_up = true;
            return 0;
        }
        let object = objects.entry(address / 8).or_default();
        let Block { known, fenced } = blocks.entry(block).or_default();
        join(known, object);
        let epoch = *known.entry(block).or_insert(0);
        if release {
            object.clone_from(known);
            known.insert(block, epoch + 1);
        } else {
            join(object, fenced);
        }
        epoch
    }

    /// Performs a fence: relaxed operations may now pass on what the block did before. Returns its next epoch.
    pub fn fence(&self, block: u32) -> u32 {
        let mut sync = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let Block { known, fenced } = sync.blocks.entry(block).or_default();
        let epoch = *known.entry(block).or_insert(0);
        fenced.clone_from(known);
        known.insert(block, epoch + 1);
        epoch + 1
    }

    fn knows(&self, block: u32, other: u32, epoch: u32) -> bool {
        let sync = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sync.blocks.get(&block).and_then(|b| b.known.get(&other));
        // Epochs that no longer fit in a cell count as known.
        sync.gave_up || epoch == 0xfff || known.is_some_and(|k| *k >= epoch)
    }

    /// Records an access of `bytes` bytes at offset `at` of an allocation, and returns a conflict. `stored` holds the
    /// bytes of a write and is empty for a read. Two blocks that write the same bytes do not race.
    pub fn access(
        &self,
        allocation: usize,
        at: usize,
        bytes: usize,
        write: bool,
        who: Who,
        stored: &[u8],
    ) -> Option<Conflict> {
        let Who { block, epoch, .. } = who;
        let mut found = None;
        let end = at + bytes;
        for cell in at / 4..end.div_ceil(4) {
            let low = at.max(cell * 4) - cell * 4;
            let high = end.min(cell * 4 + 4) - cell * 4;
            let mask = ((1u16 << high) - (1u16 << low)) as u8;
            let page = self.pages.get(allocation)?.get(cell / PAGE_CELLS)?;
            let page = page.get_or_init(|| (0..PAGE_CELLS).map(|_| [0; 3].map(AtomicU64::new)).collect());
            let [written, read, value] = &page[cell % PAGE_CELLS];
            let last_write = Packed(written.load(Ordering::Acquire));
            let left = left_by(stored, at, cell);
            let same = left != 0 && value.load(Ordering::Relaxed) == left;
            if !same {
                found = found.or_else(|| self.conflict(last_write, &who, mask, true, write));
            }
            if write {
                value.store(left, Ordering::Relaxed);
                let last_read = Packed(read.load(Ordering::Relaxed));
                found = found.or_else(|| self.conflict(last_read, &who, mask, false, write));
            }
            let slot = if write { written } else { read };
            let old = Packed(slot.load(Ordering::Relaxed));
            let same = old.block() == Some(block) && old.epoch() == epoch.min(0xfff);
            let bytes = if same { old.bytes() | mask } else { mask };
            let new = Packed::new(block, epoch, bytes, &who);
            slot.store(new.0, Ordering::Release);
        }
        found
    }

    fn conflict(&self, old: Packed, who: &Who, mask: u8, was_write: bool, write: bool) -> Option<Conflict> {
        let other = old.block()?;
        let harmless = other == who.block || old.bytes() & mask == 0;
        // A read before an update may be a guess of a compare-and-swap loop, which cannot be decided yet.
        let guessed = who.update && !was_write;
        if harmless || guessed || old.strong() && who.strong || self.knows(who.block, other, old.epoch()) {
            return None;
        }
        Some(Conflict {
            block: other,
            line: old.line(),
            was_write,
            guess: old.update() && !write,
        })
    }
}
