//! Origins of undefined values.

use std::collections::HashMap;

/// Origin of an undefined value: the read of memory that was never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Origin {
    /// Line of the read.
    pub line: u32,
    /// True if something was computed from the value since; false if it was only moved.
    pub computed: bool,
}

/// Bytes of a memory that were overwritten with undefined values, with their origins. Other uninitialised bytes were
/// never written.
#[derive(Debug, Default, Clone)]
pub(crate) struct Origins(HashMap<usize, Origin>);

impl Origins {
    pub fn insert(&mut self, at: usize, origin: Origin) {
        self.0.insert(at, origin);
    }

    /// Forgets all bytes from `from` on, which count as never written again.
    pub fn forget(&mut self, from: usize) {
        self.0.retain(|at, _| *at < from);
    }

    /// Returns the origin of the first of these bytes that has one.
    pub fn first(&self, at: usize, bytes: usize) -> Option<Origin> {
        if self.0.is_empty() {
            return None;
        }
        (at..at + bytes).find_map(|at| self.0.get(&at).copied())
    }
}

/// Widens a mask of bytes (one bit each) to a mask of their bits.
pub(crate) fn bits_of_bytes(bytes: u8) -> u64 {
    (0..8)
        .filter(|i| bytes >> i & 1 != 0)
        .fold(0, |bits, i| bits | 0xff << (8 * i))
}

/// Returns the mask of bytes (one bit each) that hold any of these bits.
pub(crate) fn bytes_of_bits(bits: u64) -> u8 {
    (0..8)
        .filter(|i| bits >> (8 * i) & 0xff != 0)
        .fold(0, |bytes, i| bytes | 1 << i)
}
