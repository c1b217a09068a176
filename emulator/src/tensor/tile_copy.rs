//! Bytes that a tensor copy moves: the box of a [`TensorMap`] at given coordinates, in pieces (manual sections
//! "Bounding Box", "Traversal-Stride", "Out of Boundary Access", "Swizzling Modes").
//!
//! In shared memory the box is dense, dimension 0 innermost. With a swizzle, however, each row starts at a new
//! multiple of [`Swizzle::span`] bytes even if it is shorter, and 16-byte chunks are permuted by their shared
//! address, so a piece never crosses a chunk. Without swizzle a piece is as long as the row allows. Elements outside
//! of the tensor are pieces without a global address: a load fills them, a store skips them.

use super::swizzle::Swizzle;
use super::tensor_map::{Interleave, MAX_RANK, TensorMap};

/// A run of bytes that move together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Global address of the first byte, or `None` outside of the tensor.
    pub global: Option<u64>,
    /// Shared address of the first byte.
    pub shared: u32,
    /// Number of bytes.
    pub bytes: u32,
}

/// A copy that cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TileCopyError {
    /// The instruction has another number of coordinates than the map has dimensions.
    #[error("the instruction gives {given} coordinates, the tensor map has {rank} dimensions")]
    Rank {
        /// Number of coordinates of the instruction.
        given: usize,
        /// Number of dimensions of the map.
        rank: usize,
    },
    /// Interleaved layouts are not emulated.
    #[error("copies through interleaved tensor maps ({0:?}) are not emulated")]
    Interleave(Interleave),
}

impl TensorMap {
    /// Returns the number of elements copied along a dimension: the box divided by the traversal stride, rounded up.
    const fn count(&self, dimension: usize) -> u32 {
        self.box_dims[dimension].div_ceil(self.element_strides[dimension])
    }

    /// Returns the rows of the box: the product of all counts but the innermost.
    fn rows(&self) -> u64 {
        (1..MAX_RANK)
            .map(|dimension| u64::from(self.count(dimension)))
            .product()
    }

    /// Returns the bytes of a row of the box.
    const fn row_bytes(&self) -> u32 {
        self.box_dims[0] * self.element.bytes()
    }

    /// Returns the bytes from one row to the next in shared memory.
    const fn row_pitch(&self) -> u32 {
        match self.swizzle {
            Swizzle::None => self.row_bytes(),
            swizzle => swizzle.span(),
        }
    }

    /// Returns the bytes of a copy, including filled ones: the number that it adds to an mbarrier's transaction
    /// count.
    pub fn copied_bytes(&self) -> u64 {
        self.rows() * u64::from(self.row_bytes())
    }

    /// Returns the bytes of shared memory that the box spans, more than [`TensorMap::copied_bytes`] where rows are
    /// shorter than the swizzle. Check this against the shared memory before asking for pieces: a box may be far
    /// larger.
    pub fn shared_bytes(&self) -> u64 {
        self.rows() * u64::from(self.row_pitch())
    }

    /// Lists the pieces of the box whose first element is at `coordinates` (innermost first, possibly outside of the
    /// tensor), with the tile at shared address `shared`, a multiple of [`super::tensor_map::TILE_ALIGNMENT`].
    ///
    /// # Errors
    ///
    /// [`TileCopyError`] if the number of coordinates is not the rank, or the map is interleaved.
    pub fn pieces(
        &self,
        coordinates: &[i32],
        shared: u32,
    ) -> Result<impl Iterator<Item = Piece> + use<>, TileCopyError> {
        if coordinates.len() != self.rank {
            return Err(TileCopyError::Rank {
                given: coordinates.len(),
                rank: self.rank,
            });
        }
        if self.interleave != Interleave::None {
            return Err(TileCopyError::Interleave(self.interleave));
        }
        let mut start = [0i64; MAX_RANK];
        for (start, &coordinate) in start.iter_mut().zip(coordinates) {
            *start = coordinate.into();
        }
        let map = *self;
        Ok((0..map.rows()).flat_map(move |row| map.row_pieces(&start, row, shared)))
    }

    /// Returns the global address of the first element of a row, if its outer coordinates are inside of the tensor.
    fn row_address(&self, start: &[i64; MAX_RANK], row: u64) -> Option<u64> {
        let mut address = self
            .address
            .wrapping_add_signed(start[0].wrapping_mul(i64::from(self.element.bytes())));
        let mut rest = row;
        for (dimension, start) in start.iter().enumerate().skip(1) {
            let count = u64::from(self.count(dimension));
            let step = u64::from(self.element_strides[dimension]);
            let index = start + (rest % count * step) as i64;
            rest /= count;
            let inside = u64::try_from(index)
                .ok()
                .filter(|index| *index < self.dims[dimension])?;
            address = address.wrapping_add(inside.wrapping_mul(self.strides[dimension]));
        }
        Some(address)
    }

    fn row_pieces(&self, start: &[i64; MAX_RANK], row: u64, shared: u32) -> impl Iterator<Item = Piece> + use<> {
        let element = i64::from(self.element.bytes());
        let bytes = self.row_bytes();
        let address = self.row_address(start, row);
        // Bytes of the row that lie inside of the tensor: first..last.
        let clamp = |x: i64| (x.clamp(0, i64::from(self.box_dims[0])) * element) as u32;
        let (first, last) = match address {
            Some(_) => (clamp(-start[0]), clamp(self.dims[0] as i64 - start[0])),
            None => (0, 0),
        };
        let last = last.max(first);
        let (swizzle, base) = (
            self.swizzle,
            shared.wrapping_add((row as u32).wrapping_mul(self.row_pitch())),
        );
        let step = if swizzle == Swizzle::None { bytes } else { 16 };
        (0..bytes).step_by(step as usize).flat_map(move |chunk| {
            let end = chunk + step;
            let parts = [
                (chunk, first.min(end), false),
                (chunk.max(first), last.min(end), true),
                (chunk.max(last), end, false),
            ];
            parts
                .into_iter()
                .filter(|(from, to, _)| from < to)
                .map(move |(from, to, inside)| Piece {
                    global: address
                        .filter(|_| inside)
                        .map(|address| address.wrapping_add(from.into())),
                    shared: swizzle.apply(base.wrapping_add(from)),
                    bytes: to - from,
                })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tensor_map::{ElementType, Fill, L2Promotion, Tiled};
    use super::*;
    use std::collections::HashMap;

    const BASE: u64 = 0x10_0000;

    fn map(dims: &[u64], strides: &[u64], box_dims: &[u32], steps: &[u32], swizzle: Swizzle) -> TensorMap {
        TensorMap::tiled(&Tiled {
            element: ElementType::F16,
            address: BASE,
            dims,
            strides,
            box_dims,
            element_strides: steps,
            interleave: Interleave::None,
            swizzle,
            l2_promotion: L2Promotion::None,
            fill: Fill::Zero,
        })
        .unwrap()
    }

    /// Byte by byte: shared address to global address.
    fn bytes(map: &TensorMap, coordinates: &[i32], shared: u32) -> HashMap<u32, Option<u64>> {
        let mut out = HashMap::new();
        for piece in map.pieces(coordinates, shared).unwrap() {
            for i in 0..piece.bytes {
                let old = out.insert(piece.shared + i, piece.global.map(|g| g + u64::from(i)));
                assert_eq!(old, None, "shared byte written twice");
            }
        }
        assert_eq!(out.len() as u64, map.copied_bytes());
        out
    }

    #[test]
    fn a_box_inside_and_across_each_edge_follows_the_index_formula() {
        let (dims, strides) = ([40u64, 10, 5], [96u64, 1024]);
        for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
            for (width, steps) in [(16, [1, 1, 1]), (16, [1, 2, 3]), (8, [1, 1, 2])] {
                let map = map(&dims, &strides, &[width, 4, 3], &steps, swizzle);
                let shared = 0x480;
                for coordinates in [
                    [0, 0, 0],
                    [30, 8, 3],
                    [-5, -2, -1],
                    [100, 0, 0],
                    [-100, 2, 2],
                    [33, 9, 4],
                ] {
                    let got = bytes(&map, &coordinates, shared);
                    let counts = [width, 4u32.div_ceil(steps[1]), 3u32.div_ceil(steps[2])];
                    let pitch = if swizzle == Swizzle::None {
                        width * 2
                    } else {
                        swizzle.span()
                    };
                    assert_eq!(map.shared_bytes(), u64::from(pitch * counts[1] * counts[2]));
                    for z in 0..counts[2] {
                        for y in 0..counts[1] {
                            for x in 0..counts[0] {
                                let at = [x, y * steps[1], z * steps[2]];
                                let index: [i64; 3] =
                                    std::array::from_fn(|i| i64::from(coordinates[i]) + i64::from(at[i]));
                                let inside = (0..3).all(|i| (0..dims[i] as i64).contains(&index[i]));
                                let want = inside.then(|| {
                                    BASE + index[0] as u64 * 2 + index[1] as u64 * 96 + index[2] as u64 * 1024
                                });
                                let offset = shared + (z * counts[1] + y) * pitch + x * 2;
                                assert_eq!(got[&swizzle.apply(offset)], want, "{swizzle:?} {coordinates:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_unswizzled_row_is_one_piece_and_a_vector_may_be_rank_1() {
        let vector = map(&[1000], &[], &[256], &[1], Swizzle::None);
        let pieces: Vec<_> = vector.pieces(&[512], 0).unwrap().collect();
        assert_eq!(
            pieces,
            [Piece {
                global: Some(BASE + 1024),
                shared: 0,
                bytes: 512
            }]
        );
        let pieces: Vec<_> = vector.pieces(&[900], 0).unwrap().collect();
        assert_eq!(pieces[0].bytes, 200);
        assert_eq!(
            pieces[1],
            Piece {
                global: None,
                shared: 200,
                bytes: 312
            }
        );
        assert_eq!(vector.copied_bytes(), 512);
    }

    #[test]
    fn five_dimensions() {
        let map = map(
            &[8, 2, 2, 2, 2],
            &[16, 32, 64, 128],
            &[8, 2, 2, 2, 2],
            &[1; 5],
            Swizzle::None,
        );
        for (shared, global) in bytes(&map, &[0; 5], 0) {
            assert_eq!(global, Some(BASE + u64::from(shared)));
        }
        let got = bytes(&map, &[0, 0, 0, 0, 1], 0);
        assert_eq!(got[&0], Some(BASE + 128));
        assert_eq!(got[&128], None);
    }

    #[test]
    fn errors() {
        let matrix = map(&[64, 64], &[128], &[64, 8], &[1, 1], Swizzle::B128);
        assert_eq!(
            matrix.pieces(&[0], 0).err(),
            Some(TileCopyError::Rank { given: 1, rank: 2 })
        );
        let interleaved = TensorMap::tiled(&Tiled {
            element: ElementType::F16,
            address: BASE,
            dims: &[8, 8, 8],
            strides: &[16, 128],
            box_dims: &[8, 8, 1],
            element_strides: &[1, 1, 1],
            interleave: Interleave::B16,
            swizzle: Swizzle::None,
            l2_promotion: L2Promotion::None,
            fill: Fill::Zero,
        })
        .unwrap();
        assert!(matches!(
            interleaved.pieces(&[0; 3], 0),
            Err(TileCopyError::Interleave(Interleave::B16))
        ));
    }
}
