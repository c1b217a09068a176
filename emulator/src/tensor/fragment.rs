//! Fragment layouts of `mma.sync`: the elements that each lane holds (manual section "Matrix Fragments for mma…").
//!
//! The manual has one figure per shape and type. All but one follow a single rule. Let `group = lane / 4` and `member
//! = lane % 4`, and let one 32-bit register hold `pack` neighbouring elements along k (one, if an element is wider).
//! A register covers four members times `pack` elements of k. A has one register per 8 rows and per such k block,
//! rows first; B has one per k block; the accumulator always holds two neighbouring columns of one row. The exception
//! is `m8n8k4` with f16, a shape of Volta: the [`volta`] maps.

/// Number of lanes of a warp.
pub const LANES: usize = 32;

/// Returns the (row, k) of part `part` of A's register `register`, with `pack` elements a register and 8 or 16
/// `rows`.
#[inline]
pub const fn a(pack: usize, rows: usize, lane: usize, register: usize, part: usize) -> (usize, usize) {
    let halves = rows / 8;
    let row = lane / 4 + 8 * (register % halves);
    let k = (register / halves) * 4 * pack + (lane % 4) * pack + part;
    (row, k)
}

/// Returns the (k, column) of part `part` of B's register `register`, with `pack` elements a register.
#[inline]
pub const fn b(pack: usize, lane: usize, register: usize, part: usize) -> (usize, usize) {
    (register * 4 * pack + (lane % 4) * pack + part, lane / 4)
}

/// Returns the (row, column) of accumulator element `index`: 0 and 1 in the upper 8 rows, 2 and 3 in the lower.
#[inline]
pub const fn c(lane: usize, index: usize) -> (usize, usize) {
    (lane / 4 + 8 * (index / 2), (lane % 4) * 2 + index % 2)
}

/// `mma.m8n8k4` with f16: four independent products, each computed by eight lanes.
pub mod volta {
    /// Returns the product, of the four, that a lane takes part in.
    pub const fn product(lane: usize) -> usize {
        lane % 16 / 4
    }

    /// Returns the position among the eight lanes of a product: 0..4 in the low group, 4..8 in the high one.
    const fn position(lane: usize) -> usize {
        lane % 4 + lane / 16 * 4
    }

    /// Returns the (row, k) of A's element `index` (0..4).
    pub const fn a(column_major: bool, lane: usize, index: usize) -> (usize, usize) {
        if column_major {
            (index + lane / 16 * 4, lane % 4)
        } else {
            (position(lane), index)
        }
    }

    /// Returns the (k, column) of B's element `index` (0..4).
    pub const fn b(column_major: bool, lane: usize, index: usize) -> (usize, usize) {
        if column_major {
            (index, position(lane))
        } else {
            (lane % 4, index + lane / 16 * 4)
        }
    }

    /// Returns the (row, column) of element `index` (0..8) of an f16 accumulator.
    pub const fn c_f16(lane: usize, index: usize) -> (usize, usize) {
        (position(lane), index)
    }

    /// Returns the (row, column) of element `index` (0..8) of an f32 accumulator.
    pub const fn c_f32(lane: usize, index: usize) -> (usize, usize) {
        (
            (lane & 1) + (index & 2) + lane / 16 * 4,
            (index & 4) + (lane & 2) + (index & 1),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn covers(points: impl Iterator<Item = (usize, usize)>, rows: usize, columns: usize) {
        let points: Vec<_> = points.collect();
        let distinct: HashSet<_> = points.iter().copied().collect();
        assert_eq!(points.len(), rows * columns);
        assert_eq!(distinct.len(), rows * columns);
        assert!(distinct.iter().all(|&(r, c)| r < rows && c < columns));
    }

    #[test]
    fn every_fragment_is_a_bijection() {
        // (elements a register, rows, k) of every shape of sm_80 to sm_90.
        let shapes = [
            (2, 16, 8),
            (2, 16, 16),
            (1, 16, 4),
            (1, 16, 8),
            (1, 16, 16),
            (1, 8, 4),
            (4, 8, 16),
            (4, 16, 16),
            (4, 16, 32),
            (8, 8, 32),
            (8, 16, 32),
            (8, 16, 64),
            (32, 8, 128),
            (32, 16, 128),
            (32, 16, 256),
        ];
        for (pack, rows, k) in shapes {
            let registers = rows * k / 32 / pack;
            let all = (0..32).flat_map(|l| (0..registers).flat_map(move |r| (0..pack).map(move |p| (l, r, p))));
            covers(all.map(|(l, r, p)| a(pack, rows, l, r, p)), rows, k);
            let registers = 8 * k / 32 / pack;
            let all = (0..32).flat_map(|l| (0..registers).flat_map(move |r| (0..pack).map(move |p| (l, r, p))));
            covers(all.map(|(l, r, p)| b(pack, l, r, p)), k, 8);
            let elements = rows / 4;
            covers((0..32).flat_map(|l| (0..elements).map(move |i| c(l, i))), rows, 8);
        }
    }

    #[test]
    fn the_manuals_formulas_for_m16n8k16() {
        for lane in 0..32 {
            let (group, member) = (lane >> 2, lane % 4);
            for i in 0..8 {
                let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
                let col = member * 2 + (i & 1) + if i >= 4 { 8 } else { 0 };
                assert_eq!(a(2, 16, lane, i / 2, i % 2), (row, col));
                // f64: one element a register.
                let row = if i % 2 == 0 { group } else { group + 8 };
                let col = if i % 2 == 0 { i * 2 + member } else { i * 2 - 2 + member };
                assert_eq!(a(1, 16, lane, i, 0), (row, col));
            }
            for i in 0..4 {
                let k = member * 2 + (i & 1) + if i >= 2 { 8 } else { 0 };
                assert_eq!(b(2, lane, i / 2, i % 2), (k, group));
                assert_eq!(
                    c(lane, i),
                    (if i < 2 { group } else { group + 8 }, member * 2 + (i & 1))
                );
            }
        }
    }

    #[test]
    fn the_manuals_formulas_for_bytes_and_nibbles() {
        for lane in 0..32 {
            let (group, member) = (lane >> 2, lane % 4);
            for i in 0..16 {
                let row = if i < 4 || (8..12).contains(&i) {
                    group
                } else {
                    group + 8
                };
                let col = member * 4 + (i & 3) + if i >= 8 { 16 } else { 0 };
                assert_eq!(a(4, 16, lane, i / 4, i % 4), (row, col));
            }
            for i in 0..32 {
                let row = if i < 8 || (16..24).contains(&i) {
                    group
                } else {
                    group + 8
                };
                let col = member * 8 + (i & 7) + if i >= 16 { 32 } else { 0 };
                assert_eq!(a(8, 16, lane, i / 8, i % 8), (row, col));
            }
        }
    }

    #[test]
    fn volta_products_are_bijections() {
        for product in 0..4 {
            let lanes = move || (0..32).filter(move |&l| volta::product(l) == product);
            assert_eq!(lanes().collect::<Vec<_>>()[..2], [product * 4, product * 4 + 1]);
            for layout in [false, true] {
                covers(lanes().flat_map(|l| (0..4).map(move |i| volta::a(layout, l, i))), 8, 4);
                covers(lanes().flat_map(|l| (0..4).map(move |i| volta::b(layout, l, i))), 4, 8);
            }
            covers(lanes().flat_map(|l| (0..8).map(move |i| volta::c_f16(l, i))), 8, 8);
            covers(lanes().flat_map(|l| (0..8).map(move |i| volta::c_f32(l, i))), 8, 8);
        }
        // From the manual's figures: lane 17 holds row 5 of a row-major A; c2 of lane 3 is row 3, column 2.
        assert_eq!(volta::a(false, 17, 2), (5, 2));
        assert_eq!(volta::c_f32(3, 2), (3, 2));
    }
}
