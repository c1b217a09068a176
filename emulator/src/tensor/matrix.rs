//! `ldmatrix`, `stmatrix` and `movmatrix` (manual sections of the same names), shape `.m8n8`, type `.b16`.
//!
//! An 8x8 matrix of 16-bit elements is eight rows of 16 bytes. For matrix `i` of `.x1 .x2 .x4`, lane `8i + r`
//! supplies the address of row `r`. Register `i` of a lane holds two neighbouring elements of one row, the lower half
//! first. `.trans` exchanges rows and columns between memory and registers.

use super::fragment::LANES;

/// Number of rows of a matrix, and of elements of a row.
pub const SIDE: usize = 8;
/// Bytes of a row, which a lane's address points to; the address must be a multiple of it.
pub const ROW_BYTES: usize = 16;

/// An 8x8 matrix of 16-bit elements, by rows.
pub type Matrix = [[u16; SIDE]; SIDE];

/// Returns the lane that supplies the address of a row.
#[inline]
pub const fn address_lane(matrix: usize, row: usize) -> usize {
    matrix * SIDE + row
}

/// Returns the (row, column) of the matrix in memory that a half of a lane's register holds.
#[inline]
pub const fn element(transposed: bool, lane: usize, half: usize) -> (usize, usize) {
    let (row, column) = (lane / 4, lane % 4 * 2 + half);
    if transposed { (column, row) } else { (row, column) }
}

/// `ldmatrix`: returns the register of each lane, from a matrix in memory.
#[inline]
pub fn distribute(matrix: &Matrix, transposed: bool) -> [u32; LANES] {
    std::array::from_fn(|lane| {
        let [low, high] = [0, 1].map(|half| {
            let (row, column) = element(transposed, lane, half);
            u32::from(matrix[row][column])
        });
        low | high << 16
    })
}

/// `stmatrix`: returns the matrix in memory, from the register of each lane.
#[inline]
pub fn collect(registers: &[u32; LANES], transposed: bool) -> Matrix {
    let mut matrix = Matrix::default();
    for (lane, register) in registers.iter().enumerate() {
        for half in 0..2 {
            let (row, column) = element(transposed, lane, half);
            matrix[row][column] = (register >> (16 * half)) as u16;
        }
    }
    matrix
}

/// `movmatrix.sync.aligned.m8n8.trans.b16`: transposes across the lanes.
pub fn transpose(registers: &[u32; LANES]) -> [u32; LANES] {
    distribute(&collect(registers, false), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered() -> Matrix {
        std::array::from_fn(|row| std::array::from_fn(|column| (row * 100 + column) as u16))
    }

    #[test]
    fn a_lane_holds_two_neighbours_of_row_lane_over_four() {
        let registers = distribute(&numbered(), false);
        assert_eq!(registers[0], 1 << 16);
        assert_eq!(registers[6], 104 | 105 << 16);
        assert_eq!(registers[31], 706 | 707 << 16);
        let registers = distribute(&numbered(), true);
        assert_eq!(registers[0], 100 << 16);
        assert_eq!(registers[6], 401 | 501 << 16);
    }

    #[test]
    fn store_undoes_load_and_transpose_undoes_itself() {
        for transposed in [false, true] {
            assert_eq!(collect(&distribute(&numbered(), transposed), transposed), numbered());
        }
        let registers = distribute(&numbered(), false);
        assert_eq!(transpose(&registers), distribute(&numbered(), true));
        assert_eq!(transpose(&transpose(&registers)), registers);
        assert_eq!(address_lane(2, 5), 21);
    }
}
