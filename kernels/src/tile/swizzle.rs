//! Swizzle of 16-byte chunks in a row, which avoids bank conflicts among lanes that read together.
//!
//! Shared memory has 32 banks of 4 bytes, or 8 chunks of 16 bytes. `ldmatrix` and vector loads of a column read one
//! chunk of 8 consecutive rows. If rows are a multiple of 128 bytes apart, all 8 would lie in the same banks. XOR-ing
//! the chunk with the row's low bits spreads them over all banks. Rows of an odd multiple of 64 bytes already
//! alternate between two halves, and need the XOR only within 4 chunks.

/// Returns the place of chunk `chunk` of row `row`, in a tile with rows of `row_bytes` bytes (a multiple of 64).
#[inline(always)]
pub const fn swizzle(row: u32, chunk: u32, row_bytes: u32) -> u32 {
    if row_bytes.is_multiple_of(128) {
        chunk ^ (row & 7)
    } else {
        chunk ^ (row >> 1 & 3)
    }
}

/// Splits a chunk into the part that the swizzle may change and the rest, `chunk = turned + straight`.
///
/// `swizzle(row, a + b) = (swizzle(row, a) ^ turned) + straight` where `turned` and `straight` are those of `b`, and `a` and `b` have
/// no bit in common.
#[inline(always)]
pub const fn split_chunk(chunk: u32, row_bytes: u32) -> (u32, u32) {
    let turned = chunk & if row_bytes.is_multiple_of(128) { 7 } else { 3 };
    (turned, chunk - turned)
}

/// Returns the place of column `column` of row `row`, in a tile of f32 with 32 columns.
///
/// Accumulators of m16n8 are written two columns at a time, four rows by 8 columns in each half warp; [`simt`](super::fragment::simt)
/// reads 16 columns of row `r` and of row `r + 4` together. Both then take all banks once.
#[inline(always)]
pub const fn swizzle_f32(row: u32, column: u32) -> u32 {
    column ^ (((row & 3) ^ (row >> 1 & 2)) * 8)
}

/// Returns the number of threads that load neighbouring chunks of a row: 8, a full line of 128 bytes, if rows are
/// whole lines.
pub const fn neighbours(row_bytes: u32) -> u32 {
    if row_bytes.is_multiple_of(128) { 8 } else { 4 }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::tile::fragment;
    use std::collections::HashSet;

    const ROW_BYTES: [u32; 9] = [64, 128, 192, 256, 384, 512, 640, 768, 1024];

    #[test]
    fn stays_in_its_row_and_is_a_bijection() {
        for row_bytes in ROW_BYTES {
            for row in 0..16 {
                let stored: HashSet<_> = (0..row_bytes / 16).map(|c| swizzle(row, c, row_bytes)).collect();
                assert_eq!(stored.len() as u32, row_bytes / 16);
                assert!(stored.iter().all(|&c| c < row_bytes / 16));
            }
        }
    }

    #[test]
    fn a_chunk_without_bits_in_common_is_added_behind_the_swizzle() {
        for row_bytes in ROW_BYTES {
            for row in 0..16 {
                for (first, further) in (0..row_bytes / 32).flat_map(|k| [(0, k * 2), (1, k * 2)]) {
                    let (turned, straight) = split_chunk(further, row_bytes);
                    let place = (swizzle(row, first, row_bytes) ^ turned) + straight;
                    assert_eq!(
                        place,
                        swizzle(row, first + further, row_bytes),
                        "row_bytes {row_bytes}, row {row}"
                    );
                }
            }
        }
    }

    #[test]
    fn scores_are_exchanged_through_all_banks() {
        let bank = |(row, column): (u32, u32)| swizzle_f32(row, column) % 32;
        for row in 0..32 {
            let places: HashSet<_> = (0..32).map(|column| swizzle_f32(row, column)).collect();
            assert!(places.len() == 32 && places.iter().all(|&place| place < 32));
        }
        for (first_row, first_column) in [(0, 0), (8, 8), (16, 16), (24, 24)] {
            for half in [0..16, 16..32] {
                let written = half.flat_map(|lane| [0, 1].map(|e| fragment::accumulator(lane, e)));
                let banks: HashSet<_> = written.map(|(r, c)| bank((first_row + r, first_column + c))).collect();
                assert_eq!(banks.len(), 32, "rows {first_row}.., columns {first_column}..");
            }
            for index in 0..2 {
                let read = (0..32).map(|lane| fragment::simt(lane, 1, index, 1));
                let banks: HashSet<_> = read.map(|(r, c)| bank((first_row + r, c))).collect();
                assert_eq!(banks.len(), 32, "rows {first_row}.., index {index}");
            }
        }
    }

    #[test]
    fn eight_rows_of_one_chunk_lie_in_eight_bank_groups() {
        for row_bytes in ROW_BYTES {
            for first in (0..64).step_by(8) {
                for chunk in 0..row_bytes / 16 {
                    let groups: HashSet<_> = (first..first + 8)
                        .map(|row| (row * row_bytes / 16 + swizzle(row, chunk, row_bytes)) % 8)
                        .collect();
                    assert_eq!(groups.len(), 8, "row_bytes {row_bytes}, rows {first}.., chunk {chunk}");
                }
            }
        }
    }
}
