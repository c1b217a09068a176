//! An allocation of global memory, and the view of all allocations that a launch uses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Value of bytes that were never written, which shows a use of them even with the checks off.
const POISON: u64 = 0xcdcd_cdcd_cdcd_cdcd;

/// A range of device memory with its shadow.
#[derive(Debug)]
pub(crate) struct Allocation {
    base: u64,
    len: usize,
    words: Box<[AtomicU64]>,
    /// Initialised bytes, one bit each: set if the byte was written at least once.
    init: Box<[AtomicU64]>,
    /// True if every byte is known to be initialised, so that the bits need not be read.
    all_init: AtomicBool,
    /// Name of the module variable that lies here.
    pub name: Option<String>,
}

impl Allocation {
    pub fn new(base: u64, len: usize, name: Option<String>) -> Self {
        let words = (0..len.div_ceil(8)).map(|_| AtomicU64::new(POISON));
        let init = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0));
        Self {
            base,
            len,
            words: words.collect(),
            init: init.collect(),
            all_init: AtomicBool::new(false),
            name,
        }
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Loads a little-endian value of 1, 2, 4 or 8 bytes, aligned to its size.
    #[inline]
    pub fn load(&self, at: usize, bytes: usize) -> u64 {
        let word = self.words[at / 8].load(Ordering::Relaxed);
        let value = word >> (at % 8 * 8);
        if bytes == 8 {
            value
        } else {
            value & ((1 << (bytes * 8)) - 1)
        }
    }

    /// Stores 1, 2, 4 or 8 bytes, aligned to their size.
    #[inline]
    pub fn store(&self, at: usize, bytes: usize, value: u64) {
        let word = &self.words[at / 8];
        if bytes == 8 {
            word.store(value, Ordering::Relaxed);
        } else {
            let shift = at % 8 * 8;
            let mask = ((1u64 << (bytes * 8)) - 1) << shift;
            let merge = |old: u64| Some((old & !mask) | ((value << shift) & mask));
            // The closure never declines, so the update always succeeds.
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merge);
        }
    }

    /// Replaces a value of up to 8 bytes by `f` applied to it, atomically, and returns the old one.
    pub fn update(&self, at: usize, bytes: usize, f: impl Fn(u64) -> u64) -> u64 {
        let shift = at % 8 * 8;
        let mask = if bytes == 8 {
            u64::MAX
        } else {
            (1u64 << (bytes * 8)) - 1
        };
        let merge = |word: u64| {
            let new = f((word >> shift) & mask) & mask;
            Some((word & !(mask << shift)) | (new << shift))
        };
        let word = &self.words[at / 8];
        let old = match word.fetch_update(Ordering::AcqRel, Ordering::Acquire, merge) {
            Ok(old) | Err(old) => old,
        };
        (old >> shift) & mask
    }

    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        let (mut at, mut rest) = (at, bytes);
        let whole = at == 0 && bytes.len() == self.len;
        self.mark(at, bytes.len());
        while let Some((first, tail)) = rest.split_first() {
            if at % 8 == 0 && rest.len() >= 8 {
                let (word, tail) = rest.split_at(8);
                let mut le = [0; 8];
                le.copy_from_slice(word);
                self.words[at / 8].store(u64::from_le_bytes(le), Ordering::Relaxed);
                at += 8;
                rest = tail;
            } else {
                self.store(at, 1, u64::from(*first));
                at += 1;
                rest = tail;
            }
        }
        if whole {
            self.all_init.store(true, Ordering::Relaxed);
        }
    }

    pub fn copy_out(&self, at: usize, bytes: &mut [u8]) {
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = self.load(at + index, 1) as u8;
        }
    }

    /// Marks a range initialised.
    #[inline]
    pub fn mark(&self, at: usize, bytes: usize) {
        if self.all_init.load(Ordering::Relaxed) {
            return;
        }
        for_words(at, bytes, |word, mask| {
            let cell = &self.init[word];
            if cell.load(Ordering::Relaxed) & mask != mask {
                cell.fetch_or(mask, Ordering::Relaxed);
            }
            true
        });
    }

    /// Marks a byte as not initialised, because an undefined value was stored there.
    pub fn unmark(&self, at: usize) {
        self.all_init.store(false, Ordering::Relaxed);
        self.init[at / 64].fetch_and(!(1 << (at % 64)), Ordering::Relaxed);
    }

    /// Returns the offset of the first byte of a range that was never written.
    #[inline]
    pub fn first_uninitialized(&self, at: usize, bytes: usize) -> Option<usize> {
        if self.all_init.load(Ordering::Relaxed) {
            return None;
        }
        let mut first = None;
        for_words(at, bytes, |word, mask| {
            let missing = !self.init[word].load(Ordering::Relaxed) & mask;
            if missing != 0 {
                first = Some(word * 64 + missing.trailing_zeros() as usize);
            }
            first.is_none()
        });
        first
    }
}

/// Calls `f` with each 64-bit word of a bitmap that a range touches, and the bits of the range in it, until `f`
/// returns false.
#[inline]
pub(crate) fn for_words(at: usize, bytes: usize, mut f: impl FnMut(usize, u64) -> bool) {
    let end = at + bytes;
    let mut at = at;
    while at < end {
        let (word, bit) = (at / 64, at % 64);
        let n = (64 - bit).min(end - at);
        let mask = (u64::MAX >> (64 - n)) << bit;
        if !f(word, mask) {
            return;
        }
        at += n;
    }
}

/// Allocations at the time of a launch, in order of address.
#[derive(Debug)]
pub(crate) struct View {
    pub allocations: Vec<Arc<Allocation>>,
    freed: Vec<(u64, u64)>,
}

/// Location of an address that is in no allocation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outside {
    /// In a range that was freed: its start and length.
    Freed(u64, u64),
    /// Somewhere else; the sentence names the nearest allocation.
    Unmapped(String),
}

impl View {
    pub fn new(allocations: Vec<Arc<Allocation>>, freed: Vec<(u64, u64)>) -> Self {
        Self { allocations, freed }
    }

    /// Returns the index of the allocation that holds a whole range, trying `hint` first.
    #[inline]
    pub fn find(&self, address: u64, bytes: usize, hint: usize) -> Option<usize> {
        let fits = |index: usize| {
            self.allocations.get(index).is_some_and(|a| {
                address >= a.base
                    && address.wrapping_add(bytes as u64) <= a.base + a.len as u64
                    && address.checked_add(bytes as u64).is_some()
            })
        };
        if fits(hint) {
            return Some(hint);
        }
        let after = self.allocations.partition_point(|a| a.base <= address);
        let index = after.checked_sub(1)?;
        fits(index).then_some(index)
    }

    /// Explains why `find` found nothing.
    pub fn explain(&self, address: u64, bytes: usize) -> Outside {
        let freed = self.freed.iter().rev();
        let mut freed = freed.filter(|(base, len)| address >= *base && address - base < *len);
        if let Some((base, len)) = freed.next() {
            return Outside::Freed(*base, *len);
        }
        let after = self.allocations.partition_point(|a| a.base <= address);
        let before = after.checked_sub(1).map(|i| &self.allocations[i]);
        let next = self.allocations.get(after);
        let describe = |a: &Allocation| {
            let name = a.name.as_deref().map_or(String::new(), |n| format!(" `{n}`"));
            format!("the allocation{name} of {} bytes at {:#x}", a.len, a.base)
        };
        let past = before.map(|a| address.saturating_sub(a.base + a.len as u64));
        let ahead = next.map(|a| a.base - address);
        let text = match (before, next) {
            (None, None) => "nothing is allocated".to_owned(),
            (Some(a), _) if past <= ahead || ahead.is_none() => {
                let end = a.base + a.len as u64;
                if address < end {
                    let over = address + bytes as u64 - end;
                    format!("its last {over} bytes lie past {}", describe(a))
                } else {
                    format!("{} bytes past the end of {}", address - end, describe(a))
                }
            }
            (_, Some(a)) => format!("{} bytes before {}", a.base - address, describe(a)),
            (Some(a), None) => format!("past {}", describe(a)),
        };
        Outside::Unmapped(text)
    }
}
