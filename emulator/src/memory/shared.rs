//! Shared memory of one block: bytes and their initialised bits.

use super::global::for_words;
use super::origin::{Origin, Origins};

/// Shared memory of a block, addressed from zero. The bytes below the first variable are never used.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    bytes: Vec<u8>,
    init: Vec<u64>,
    origins: Origins,
}

impl SharedMemory {
    pub fn new(len: usize) -> Self {
        Self {
            bytes: vec![0xcd; len],
            init: vec![0; len.div_ceil(64)],
            origins: Origins::default(),
        }
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    #[inline]
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        &self.bytes[at..at + len]
    }

    /// Loads a little-endian value of up to 8 bytes.
    #[inline]
    pub fn load(&self, at: usize, bytes: usize) -> u64 {
        load(&self.bytes[at..at + bytes])
    }

    /// Stores up to 8 bytes and marks them initialised.
    #[inline]
    pub fn store(&mut self, at: usize, bytes: usize, value: u64) {
        self.write(at, &value.to_le_bytes()[..bytes]);
    }

    /// Stores bytes and marks them initialised.
    #[inline]
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        for_words(at, bytes.len(), |word, mask| {
            self.init[word] |= mask;
            true
        });
    }

    /// Marks a byte as not initialised, because an undefined value was stored there.
    pub fn unmark(&mut self, at: usize, origin: Origin) {
        self.init[at / 64] &= !(1 << (at % 64));
        self.origins.insert(at, origin);
    }

    /// Returns the origin of the undefined value that these bytes hold, if they were written.
    pub fn origin(&self, at: usize, bytes: usize) -> Option<Origin> {
        self.origins.first(at, bytes)
    }

    /// Returns true if the memory holds exactly these bytes, all initialised.
    #[inline]
    pub fn holds(&self, at: usize, bytes: &[u8]) -> bool {
        self.bytes(at, bytes.len()) == bytes && self.first_uninitialized(at, bytes.len()).is_none()
    }

    /// Returns the offset of the first byte of a range that was never written.
    #[inline]
    pub fn first_uninitialized(&self, at: usize, bytes: usize) -> Option<usize> {
        let mut first = None;
        for_words(at, bytes, |word, mask| {
            let missing = !self.init[word] & mask;
            if missing != 0 {
                first = Some(word * 64 + missing.trailing_zeros() as usize);
            }
            first.is_none()
        });
        first
    }
}

/// Loads a little-endian value of up to 8 bytes.
#[inline]
pub(crate) fn load(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(value)
}
