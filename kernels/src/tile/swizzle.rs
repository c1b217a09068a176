//! Where a 16-byte chunk of a row lies, so that no two lanes that read together meet in a bank.
//!
//! Shared memory has 32 banks of 4 bytes: 8 chunks of 16 bytes. `ldmatrix` reads the same chunk of 8 consecutive rows, and
//! so do vector loads of a column. With rows a multiple of 128 bytes apart those 8 would be one bank group; XOR-ing the chunk with
//! the row's low bits spreads them over all 8. Rows of an odd number of 64 bytes alternate between two halves already,
//! and need the XOR within 4 chunks only.

/// Chunk at which chunk `chunk` of row `row` is stored, in a tile whose rows are `row_bytes` (a multiple of 64) long.
#[inline(always)]
pub const fn swizzle(row: u32, chunk: u32, row_bytes: u32) -> u32 {
    if row_bytes.is_multiple_of(128) {
        chunk ^ (row & 7)
    } else {
        chunk ^ (row >> 1 & 3)
    }
}

/// Threads that load neighbouring chunks of a row: 8, a full line of 128 bytes, where rows are whole lines.
pub const fn neighbours(row_bytes: u32) -> u32 {
    if row_bytes.is_multiple_of(128) { 8 } else { 4 }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
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
