//! The matrix descriptor of wgmma: the location of each element of an operand in shared memory (manual sections
//! "Shared Memory Matrix Layout", "Strides", "Canonical Layouts", "Matrix Descriptor Format").
//!
//! K is the dimension that A and B share, MN the other one. Memory is counted in chunks of 16 bytes, each of T
//! elements (8 for 16-bit types). A tile consists of atoms of eight chunk rows. The two byte offsets of the
//! descriptor lead from atom to atom:
//!
//! | operand | row of an atom | stride byte offset | leading byte offset |
//! | --- | --- | --- | --- |
//! | K-major, swizzled | `span` bytes of one MN index | next 8 of MN | unused |
//! | K-major, no swizzle | 16 bytes of one MN index | next 8 of MN | next T of K |
//! | MN-major, swizzled | `span` bytes of one K index | next 8 of K | next `span` bytes of MN |
//! | MN-major, no swizzle | 16 bytes of one K index | next T of MN | next 8 of K |
//!
//! The last row is no misprint: without swizzle the two offsets exchange their roles. The swizzle is applied to the
//! resulting address, so a start address inside an atom (a later K slice of a 128-byte row) needs no special care.

use super::swizzle::Swizzle;

/// Dimension whose elements are contiguous in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Major {
    /// K: not transposed.
    K,
    /// M (of A) or N (of B): transposed.
    Mn,
}

/// Bytes of a chunk, the unit in which operands are contiguous.
pub const CHUNK_BYTES: usize = 16;

/// A decoded matrix descriptor; addresses and offsets in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Shared address of the first element, before swizzling; a multiple of 16 below 2^18.
    pub start: u32,
    /// Leading-dimension byte offset.
    pub leading: u32,
    /// Stride-dimension byte offset.
    pub stride: u32,
    /// 128-byte line, modulo 8, at which the swizzle pattern starts, if not at a multiple of the pattern's size. The
    /// manual gives a formula for the field, but not its effect; here it shifts the rows of the pattern by that many
    /// lines.
    pub base_offset: u32,
    /// Swizzle mode.
    pub swizzle: Swizzle,
}

impl Descriptor {
    /// Decodes the 64 bits. Bits without a name in the manual are ignored.
    pub const fn decode(bits: u64) -> Descriptor {
        Descriptor {
            start: ((bits & 0x3fff) << 4) as u32,
            leading: ((bits >> 16 & 0x3fff) << 4) as u32,
            stride: ((bits >> 32 & 0x3fff) << 4) as u32,
            base_offset: (bits >> 49 & 7) as u32,
            swizzle: match bits >> 62 {
                0 => Swizzle::None,
                1 => Swizzle::B128,
                2 => Swizzle::B64,
                _ => Swizzle::B32,
            },
        }
    }

    /// Encodes the 64 bits. The lowest 4 bits of addresses and offsets, and those from 2^18 on, are lost, as in the
    /// manual's `matrix-descriptor-encode`.
    pub const fn encode(self) -> u64 {
        let mode = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        field_at(self.start, 0)
            | field_at(self.leading, 16)
            | field_at(self.stride, 32)
            | (self.base_offset as u64 & 7) << 49
            | mode << 62
    }

    /// Returns the shared address of the 16-byte chunk that holds (mn, k), and the element's offset in the chunk.
    #[inline]
    const fn locate(self, major: Major, element_bytes: usize, mn: usize, k: usize) -> (u32, usize) {
        let pack = CHUNK_BYTES / element_bytes;
        let span = self.swizzle.span() as usize;
        let (stride, leading) = (self.stride as usize, self.leading as usize);
        let swizzled = !matches!(self.swizzle, Swizzle::None);
        let (offset, part) = match major {
            Major::K => {
                let column = k / pack * if swizzled { CHUNK_BYTES } else { leading };
                (mn % 8 * span + mn / 8 * stride + column, k % pack)
            }
            Major::Mn => {
                let (along_mn, along_k) = if swizzled { (leading, stride) } else { (stride, leading) };
                let wide = span / element_bytes;
                let within = mn % wide / pack * CHUNK_BYTES;
                (
                    within + mn / wide * along_mn + k % 8 * span + k / 8 * along_k,
                    mn % pack,
                )
            }
        };
        (
            self.swizzle
                .apply_from(self.start.wrapping_add(offset as u32), self.base_offset),
            part,
        )
    }

    /// Returns the shared address of element (mn, k), which is `element_bytes` wide.
    #[inline]
    pub const fn address(self, major: Major, element_bytes: usize, mn: usize, k: usize) -> u32 {
        let (chunk, part) = self.locate(major, element_bytes, mn, k);
        chunk + (part * element_bytes) as u32
    }

    /// Lists the 16-byte chunks that an operand of `mn` x `k` elements reads: the shared address and the (mn, k) of
    /// the first element of each. The following elements of a chunk go along K if K-major, along MN if MN-major. `mn`
    /// and `k` must be multiples of the elements of a chunk in the major direction.
    pub fn chunks(
        self,
        major: Major,
        element_bytes: usize,
        mn: usize,
        k: usize,
    ) -> impl Iterator<Item = (u32, usize, usize)> {
        let pack = CHUNK_BYTES / element_bytes;
        let (outer, inner) = match major {
            Major::K => (mn, k),
            Major::Mn => (k, mn),
        };
        (0..outer).flat_map(move |i| {
            (0..inner).step_by(pack).map(move |j| {
                let (mn, k) = match major {
                    Major::K => (i, j),
                    Major::Mn => (j, i),
                };
                (self.locate(major, element_bytes, mn, k).0, mn, k)
            })
        })
    }
}

const fn field_at(bytes: u32, shift: u32) -> u64 {
    ((bytes as u64 & 0x3_ffff) >> 4) << shift
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn descriptor(swizzle: Swizzle, leading: u32, stride: u32) -> Descriptor {
        Descriptor {
            start: 0,
            leading,
            stride,
            base_offset: 0,
            swizzle,
        }
    }

    /// Returns the offset in elements of a nested layout ((shape…),(shape…)):((stride…),(stride…)), the notation of
    /// the manual's examples. Each coordinate is split with its first mode fastest.
    fn nested(coordinates: [usize; 2], shape: [&[usize]; 2], strides: [&[usize]; 2]) -> usize {
        let mut offset = 0;
        for dimension in 0..2 {
            let mut rest = coordinates[dimension];
            for (size, stride) in shape[dimension].iter().zip(strides[dimension]) {
                offset += rest % size * stride;
                rest /= size;
            }
        }
        offset
    }

    #[test]
    fn the_manuals_worked_examples() {
        type Example = (Major, usize, Descriptor, [&'static [usize]; 2], [&'static [usize]; 2]);
        let examples: [Example; 5] = [
            // K-major, no swizzle, tf32: LBO 64 elements, SBO 32 elements.
            (
                Major::K,
                4,
                descriptor(Swizzle::None, 256, 128),
                [&[8, 2], &[4, 4]],
                [&[4, 32], &[1, 64]],
            ),
            // K-major, 32-byte swizzle, tf32: SBO 64 elements. The figure's four chunks of K exceed the span, so only
            // the two that one instruction reads are compared.
            (
                Major::K,
                4,
                descriptor(Swizzle::B32, 16, 256),
                [&[8, 2], &[4, 2]],
                [&[8, 64], &[1, 4]],
            ),
            // MN-major, no swizzle, bf16: LBO 128, SBO 64 elements.
            (
                Major::Mn,
                2,
                descriptor(Swizzle::None, 256, 128),
                [&[8, 1, 2], &[8, 2]],
                [&[1, 8, 64], &[8, 128]],
            ),
            // MN-major, 32-byte swizzle, bf16: LBO 128, SBO 256 elements.
            (
                Major::Mn,
                2,
                descriptor(Swizzle::B32, 256, 512),
                [&[8, 2, 2], &[8, 2]],
                [&[1, 8, 128], &[16, 256]],
            ),
            // MN-major, 64-byte swizzle, bf16: LBO 256, SBO 512 elements.
            (
                Major::Mn,
                2,
                descriptor(Swizzle::B64, 512, 1024),
                [&[8, 4, 2], &[8, 2]],
                [&[1, 8, 256], &[32, 512]],
            ),
        ];
        for (major, bytes, descriptor, shape, strides) in examples {
            let sizes = shape.map(|modes| modes.iter().product::<usize>());
            for mn in 0..sizes[0] {
                for k in 0..sizes[1] {
                    let plain = nested([mn, k], shape, strides) * bytes;
                    let want = descriptor.swizzle.apply(plain as u32);
                    assert_eq!(
                        descriptor.address(major, bytes, mn, k),
                        want,
                        "{major:?} {descriptor:?} ({mn}, {k})"
                    );
                }
            }
        }
    }

    #[test]
    fn bits_go_where_the_manual_puts_them() {
        let d = Descriptor {
            start: 0x1_2340,
            leading: 16,
            stride: 1024,
            base_offset: 5,
            swizzle: Swizzle::B128,
        };
        assert_eq!(d.encode(), 0x1234 | 1 << 16 | 64 << 32 | 5 << 49 | 1 << 62);
        for mode in 0..4u64 {
            let bits = 0x2abc | 0x1555 << 16 | 0x3001 << 32 | 3 << 49 | mode << 62;
            assert_eq!(Descriptor::decode(bits).encode(), bits);
        }
    }

    #[test]
    fn a_128_byte_row_is_stepped_through_by_moving_the_start() {
        // bf16, K-major, 128-byte swizzle, 64 columns: slice s of 16 columns starts 32 bytes further.
        let whole = descriptor(Swizzle::B128, 16, 1024);
        for slice in 0..4 {
            let part = Descriptor {
                start: 32 * slice as u32,
                ..whole
            };
            for row in 0..64 {
                for k in 0..16 {
                    let plain = row * 128 + (slice * 16 + k) * 2;
                    assert_eq!(part.address(Major::K, 2, row, k), Swizzle::B128.apply(plain as u32));
                }
            }
        }
    }

    #[test]
    fn chunks_cover_each_byte_of_a_dense_tile_once() {
        for (major, swizzle, leading, stride) in [
            (Major::K, Swizzle::None, 128, 256),
            (Major::K, Swizzle::B32, 0, 256),
            (Major::Mn, Swizzle::None, 1024, 128),
            (Major::Mn, Swizzle::B128, 0, 1024),
            (Major::Mn, Swizzle::B64, 1024, 512),
        ] {
            let d = descriptor(swizzle, leading, stride);
            let chunks: Vec<_> = d.chunks(major, 2, 64, 16).collect();
            assert_eq!(chunks.len(), 64 * 16 * 2 / CHUNK_BYTES);
            let addresses: HashSet<_> = chunks.iter().map(|c| c.0).collect();
            assert_eq!(addresses.len(), chunks.len(), "{major:?} {swizzle:?}");
            assert!(
                addresses.iter().all(|a| a % 16 == 0 && *a < 2048),
                "{major:?} {swizzle:?}"
            );
            for (address, mn, k) in chunks {
                assert_eq!(d.address(major, 2, mn, k), address);
                let (next_mn, next_k) = if major == Major::K { (mn, k + 7) } else { (mn + 7, k) };
                assert_eq!(d.address(major, 2, next_mn, next_k), address + 14);
            }
        }
    }

    #[test]
    fn a_base_offset_moves_the_pattern_with_the_tile() {
        let aligned = descriptor(Swizzle::B128, 16, 1024);
        let moved = Descriptor {
            start: 3 * 128,
            base_offset: 3,
            ..aligned
        };
        for row in 0..16 {
            for k in 0..16 {
                assert_eq!(
                    moved.address(Major::K, 2, row, k),
                    aligned.address(Major::K, 2, row, k) + 384
                );
            }
        }
    }
}
