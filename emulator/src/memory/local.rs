//! Local memory: one growing stack per lane, with frames, their variables and the parameters of calls.

use super::global::for_words;
use super::origin::{Origin, Origins};
use super::shared;

/// Largest local memory of a thread in bytes (512 KiB, as on hardware).
pub(crate) const LIMIT: u64 = 512 << 10;

/// Local memory of a warp's lanes.
#[derive(Debug)]
pub(crate) struct LocalMemory {
    lanes: Vec<Stack>,
}

#[derive(Debug, Default, Clone)]
struct Stack {
    bytes: Vec<u8>,
    init: Vec<u64>,
    origins: Origins,
}

impl LocalMemory {
    pub fn new() -> Self {
        Self {
            lanes: vec![Stack::default(); 32],
        }
    }

    /// Grows a lane's memory to at least `len` bytes; the bytes from `from` on count as uninitialised.
    pub fn grow(&mut self, lane: usize, from: u64, len: u64) {
        let stack = &mut self.lanes[lane];
        let len = len.min(LIMIT) as usize;
        if stack.bytes.len() < len {
            stack.bytes.resize(len, 0xcd);
            stack.init.resize(len.div_ceil(64), 0);
        }
        let from = (from as usize).min(len);
        stack.origins.forget(from);
        for_words(from, len - from, |word, mask| {
            stack.init[word] &= !mask;
            true
        });
    }

    pub fn len(&self, lane: usize) -> usize {
        self.lanes[lane].bytes.len()
    }

    #[inline]
    pub fn load(&self, lane: usize, at: usize, bytes: usize) -> u64 {
        shared::load(&self.lanes[lane].bytes[at..at + bytes])
    }

    #[inline]
    pub fn store(&mut self, lane: usize, at: usize, bytes: usize, value: u64) {
        let stack = &mut self.lanes[lane];
        stack.bytes[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        for_words(at, bytes, |word, mask| {
            stack.init[word] |= mask;
            true
        });
    }

    /// Copies bytes within a lane, initialised or not.
    pub fn copy(&mut self, lane: usize, from: usize, to: usize, len: usize) {
        let stack = &mut self.lanes[lane];
        if from.max(to) + len > stack.bytes.len() {
            return;
        }
        stack.bytes.copy_within(from..from + len, to);
        for at in 0..len {
            let (source, target) = (from + at, to + at);
            let set = stack.init[source / 64] >> (source % 64) & 1;
            stack.init[target / 64] &= !(1 << (target % 64));
            stack.init[target / 64] |= set << (target % 64);
            if set == 0
                && let Some(origin) = stack.origins.first(source, 1)
            {
                stack.origins.insert(target, origin);
            }
        }
    }

    /// Returns the offset of the first byte of a range that was never written.
    #[inline]
    pub fn first_uninitialized(&self, lane: usize, at: usize, bytes: usize) -> Option<usize> {
        let mut first = None;
        for_words(at, bytes, |word, mask| {
            let missing = !self.lanes[lane].init[word] & mask;
            if missing != 0 {
                first = Some(word * 64 + missing.trailing_zeros() as usize);
            }
            first.is_none()
        });
        first
    }

    /// Marks a byte as not initialised, because an undefined value was stored there.
    pub fn unmark(&mut self, lane: usize, at: usize, origin: Origin) {
        let stack = &mut self.lanes[lane];
        stack.init[at / 64] &= !(1 << (at % 64));
        stack.origins.insert(at, origin);
    }

    /// Returns the origin of the undefined value that these bytes hold, if they were written.
    pub fn origin(&self, lane: usize, at: usize, bytes: usize) -> Option<Origin> {
        self.lanes[lane].origins.first(at, bytes)
    }
}
