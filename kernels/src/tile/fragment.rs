//! Lane maps: the element that each lane holds. PTX ISA, "Matrix Fragments for mma.m16n8k16", and our own map for
//! plain FMA.

/// Returns the (row, column), in its 16x8 tile, of element `element` (0 to 3) of an m16n8 accumulator held by `lane`.
#[inline(always)]
pub const fn accumulator(lane: u32, element: u32) -> (u32, u32) {
    (lane / 4 + element / 2 * 8, lane % 4 * 2 + element % 2)
}

/// Returns the (row, chunk) whose address `lane` supplies to an `ldmatrix.x4` of a 16x16 tile stored row by row. The
/// four registers are then the A operand of m16n8k16: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
/// Transposed on load, they are the B operands of two m16n8k16 whose k runs down the rows (V in P V).
#[inline(always)]
pub const fn operand_a(lane: u32) -> (u32, u32) {
    (lane % 16, lane / 16)
}

/// Returns the (row, chunk) for two B operands whose k runs along the row (K in Q K^T): registers 0 and 1 serve
/// columns 0 to 7 of the product, 2 and 3 columns 8 to 15.
#[inline(always)]
pub const fn operand_b(lane: u32) -> (u32, u32) {
    (lane % 8 + lane / 16 * 8, lane / 8 % 2)
}

/// Number of rows that a warp of the plain FMA kernel owns, and number of them in one lane.
pub const SIMT_ROWS: (u32, u32) = (8, 4);

/// Returns the (row, column) of element (`row`, `index`) held by `lane`, where 16 lanes share four rows and take
/// columns in turns of `run`. For scores `run` is 1, so that the 16 keys read together lie in 16 different rows. For
/// the output it is 2, so that a lane reads 8 bytes of V at a time.
#[inline(always)]
pub const fn simt(lane: u32, row: u32, index: u32, run: u32) -> (u32, u32) {
    (
        lane / 16 * 4 + row,
        index / run * 16 * run + lane % 16 * run + index % run,
    )
}

/// Returns the lane and index that hold `column` of a row group: the inverse of [`simt`] for the lanes of the first
/// group.
#[inline(always)]
pub const fn simt_owner(column: u32, run: u32) -> (u32, u32) {
    (column / run % 16, column / (16 * run) * run + column % run)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn accumulator_covers_its_tile_once() {
        let cells: HashSet<_> = (0..32).flat_map(|l| (0..4).map(move |e| accumulator(l, e))).collect();
        assert_eq!(cells.len(), 128);
        assert!(cells.iter().all(|&(r, c)| r < 16 && c < 8));
        // The manual's table: lane 5 holds (1, 2), (1, 3), (9, 2), (9, 3).
        assert_eq!(
            [0, 1, 2, 3].map(|e| accumulator(5, e)),
            [(1, 2), (1, 3), (9, 2), (9, 3)]
        );
    }

    #[test]
    fn operands_name_every_row_and_chunk_once() {
        for map in [operand_a, operand_b] {
            let cells: HashSet<_> = (0..32).map(map).collect();
            assert_eq!(cells.len(), 32);
            assert!(cells.iter().all(|&(r, c)| r < 16 && c < 2));
        }
    }

    #[test]
    fn simt_covers_its_tile_once_and_knows_its_owner() {
        for (run, count) in [(1, 4), (2, 2), (2, 16)] {
            let mut cells = HashSet::new();
            for lane in 0..32 {
                for row in 0..SIMT_ROWS.1 {
                    for index in 0..count {
                        let (r, c) = simt(lane, row, index, run);
                        assert!(r < SIMT_ROWS.0 && c < 16 * count);
                        assert!(cells.insert((r, c)));
                        assert_eq!(simt_owner(c, run), (lane % 16, index));
                    }
                }
            }
            assert_eq!(cells.len() as u32, 8 * 16 * count);
        }
    }
}
