//! Shared-memory swizzles of tensor copies and wgmma (manual sections "Swizzling Modes", "Shared Memory Matrix
//! Layout").
//!
//! In a tile with rows of 128 bytes the first 16 bytes of all rows lie in the same banks. A swizzle moves the 16-byte
//! chunks of row r by exclusive-or with r: the 128-byte mode replaces address bits 4..6 by their xor with bits 7..9,
//! the 64-byte mode bits 4..5 with 7..8, the 32-byte mode bit 4 with bit 7. These are bits of the shared address, not
//! of an offset in the tile: a tile that does not start at a multiple of [`Swizzle::pattern_bytes`] begins in the
//! middle of the pattern.

/// A swizzle mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// No permutation.
    #[default]
    None,
    /// Chunks of 16 bytes within 32.
    B32,
    /// Chunks of 16 bytes within 64.
    B64,
    /// Chunks of 16 bytes within 128.
    B128,
}

impl Swizzle {
    /// Returns the bytes within which chunks move, which is the longest row of a tile. It is 16 without swizzle, the
    /// width of a core matrix.
    pub const fn span(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// Returns the bytes after which the permutation repeats. A tile that starts at a multiple of it starts at row 0
    /// of the pattern.
    pub const fn pattern_bytes(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 256,
            Swizzle::B64 => 512,
            Swizzle::B128 => 1024,
        }
    }

    /// Returns the swizzled location of the byte at `address` of the unswizzled tile.
    #[inline]
    pub const fn apply(self, address: u32) -> u32 {
        self.apply_from(address, 0)
    }

    /// Swizzles by a pattern whose row 0 is at 128-byte line `base` (modulo 8) instead of at a multiple of
    /// [`Swizzle::pattern_bytes`]: the matrix base offset of wgmma.
    #[inline]
    pub const fn apply_from(self, address: u32, base: u32) -> u32 {
        let line = (address >> 7).wrapping_sub(base);
        address ^ (line & (self.span() / 16 - 1)) << 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

    #[test]
    fn a_permutation_that_undoes_itself_within_each_span() {
        for swizzle in ALL {
            for base in 0..8 {
                let mut seen = [false; 4096];
                for address in 0..4096 {
                    let moved = swizzle.apply_from(address, base);
                    assert_eq!(swizzle.apply_from(moved, base), address);
                    assert_eq!(moved / swizzle.span(), address / swizzle.span());
                    assert_eq!(moved % 16, address % 16);
                    assert!(!std::mem::replace(&mut seen[moved as usize], true));
                }
            }
        }
    }

    #[test]
    fn the_128_byte_table_of_the_manual() {
        // Row r of the pattern holds chunks 0..8 in the order r^0, r^1, …
        for row in 0..8 {
            for chunk in 0..8 {
                assert_eq!(
                    Swizzle::B128.apply(row * 128 + chunk * 16),
                    row * 128 + (chunk ^ row) * 16
                );
            }
        }
        // 64 bytes: two rows a line, the xor changes every line; 32 bytes: four rows a line, it changes every line.
        assert_eq!(Swizzle::B64.apply(128), 128 + 16);
        assert_eq!(Swizzle::B64.apply(64), 64);
        assert_eq!(Swizzle::B64.apply(384 + 64), 384 + 64 + 48);
        assert_eq!(Swizzle::B32.apply(96), 96);
        assert_eq!(Swizzle::B32.apply(128), 128 + 16);
        assert_eq!(Swizzle::B32.apply(256), 256);
    }

    #[test]
    fn eight_rows_of_one_column_use_eight_different_bank_groups() {
        let groups: std::collections::HashSet<_> = (0..8)
            .map(|row| Swizzle::B128.apply(row * 128 + 32) % 128 / 16)
            .collect();
        assert_eq!(groups.len(), 8);
    }

    #[test]
    fn patterns_repeat() {
        for swizzle in ALL {
            for address in 0..1024 {
                let next = swizzle.apply(address + swizzle.pattern_bytes());
                assert_eq!(next, swizzle.apply(address) + swizzle.pattern_bytes());
            }
        }
    }
}
