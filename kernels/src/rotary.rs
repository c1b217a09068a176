//! Rotary position embedding of the rows of tokens, on their way from one tensor to another: q before attention, and new keys and
//! values as they are written to a cache.
//!
//! Angles are phases: fractions of a whole turn in units of 2^-64. A position times the phase of position 1 drops whole turns by
//! overflow alone, and what is left is exact to 2^-64 turns a position. Cosine and sine come from integers, so that every device has
//! the same bits, and a GPU needs no f64.

#[cfg(target_arch = "nvptx64")]
use crate::abi::RotaryParams;
#[cfg(target_arch = "nvptx64")]
use crate::ptx::{memory, sreg};
#[cfg(target_arch = "nvptx64")]
use crate::shape::ROTARY_WARPS;
#[cfg(target_arch = "nvptx64")]
use crate::tile::element::Element;
#[cfg(target_arch = "nvptx64")]
use crate::work::TokenMove;

/// One with 62 bits behind the point.
const ONE: i64 = 1 << 62;

/// pi / 2 - 1, with 64 bits behind the point.
const HALF_PI_LESS_1: u64 = 0x921f_b544_42d1_8469;

/// Number of terms of the series below. The first that is left out is less than 2^-41 up to an eighth of a turn.
const TERMS: usize = 7;

/// Coefficients of the series of the cosine in x^2, with 62 bits behind the point: 1, -1 / 2!, 1 / 4!, ….
const COS: [i64; TERMS] = coefficients(0);

/// Coefficients of the series of the sine by x in x^2, with 62 bits behind the point: 1, -1 / 3!, 1 / 5!, ….
const SIN: [i64; TERMS] = coefficients(1);

const fn coefficients(first: i64) -> [i64; TERMS] {
    let mut of_terms = [ONE; TERMS];
    let mut term = 1;
    while term < TERMS {
        let n = 2 * term as i64 + first;
        of_terms[term] = -of_terms[term - 1] / (n * (n - 1));
        term += 1;
    }
    of_terms
}

/// Returns the product of two numbers with 62 bits behind the point, of which the last two are 0: the upper half of 128 bits is one
/// instruction.
#[inline(always)]
const fn product(a: i64, b: i64) -> i64 {
    (((a as i128 * b as i128) >> 64) as i64) << 2
}

/// Returns the sum of a series at x, where `square` is x^2.
#[inline(always)]
const fn sum(of_terms: [i64; TERMS], square: i64) -> i64 {
    let mut sum = of_terms[TERMS - 1];
    let mut term = TERMS - 1;
    while term > 0 {
        term -= 1;
        sum = of_terms[term] + product(square, sum);
    }
    sum
}

/// Returns cosine and sine of a phase, rounded from values that are exact to 2^-40.
#[inline(always)]
pub const fn turn(phase: u64) -> [f32; 2] {
    let quarters = phase.wrapping_add(1 << 61) >> 62;
    // Up to an eighth of a turn in either direction, which is up to pi / 4.
    let rest = phase.wrapping_sub(quarters << 62) as i64;
    let angle = rest + ((rest as i128 * HALF_PI_LESS_1 as i128) >> 64) as i64;
    let square = product(angle, angle);
    let (cos, sin) = (sum(COS, square), product(angle, sum(SIN, square)));
    let (cos, sin) = if quarters & 1 == 0 { (cos, sin) } else { (-sin, cos) };
    let (cos, sin) = if quarters & 2 == 0 { (cos, sin) } else { (-cos, -sin) };
    const UNIT: f32 = 1.0 / ONE as f32;
    [cos as f32 * UNIT, sin as f32 * UNIT]
}

/// Moves all heads of one token a block. The lanes of a warp take pairs, the warps take heads.
///
/// # Safety
/// Launched as its row of `entries` says, with a block a token; the rows of the tokens exist in both tensors, and no row is written
/// twice or read by another block.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub unsafe fn rotary<E: Element>(p: &RotaryParams) {
    // SAFETY (whole body): the caller's contract. Angles exist for every pair at the position of every token.
    unsafe {
        let token = p.tokens + sreg::block_idx_x() as u64 * size_of::<TokenMove>() as u64;
        let [from, to, position] = [0, 8, 16].map(|field| memory::ld_global_u64(token + field));
        let read = |head: u32, column: u32| {
            let element = from + head as u64 * p.from_head_stride + column as u64 * p.from_column_stride;
            p.from + element * E::BYTES as u64
        };
        let written =
            |head: u32, column: u32| p.to + (to + head as u64 * p.to_head_stride + column as u64) * E::BYTES as u64;
        let mut pair = sreg::lane_id();
        while pair < p.pairs {
            let [cos, sin] = turn_of(p, position, pair);
            let (first, second) = if p.interleaved != 0 {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + p.pairs)
            };
            let mut head = sreg::warp_id();
            while head < p.heads {
                let (a, b) = (E::load(read(head, first)), E::load(read(head, second)));
                E::store(written(head, first), a * cos - b * sin);
                E::store(written(head, second), a * sin + b * cos);
                head += ROTARY_WARPS;
            }
            pair += 32;
        }
        let mut column = 2 * p.pairs + sreg::lane_id();
        while column < p.head_dim {
            let mut head = sreg::warp_id();
            while head < p.heads {
                E::copy(read(head, column), written(head, column));
                head += ROTARY_WARPS;
            }
            column += 32;
        }
    }
}

/// Returns cosine and sine of a pair at a position, with the direction of the turn.
///
/// # Safety
/// The table of angles has them.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
unsafe fn turn_of(p: &RotaryParams, position: u64, pair: u32) -> [f32; 2] {
    // SAFETY (whole body): the caller's contract.
    let [cos, sin] = unsafe {
        if p.tables != 0 {
            let place = p.angles + (position * p.pairs as u64 + pair as u64) * 8;
            [0, 4].map(|of| f32::from_bits(memory::ld_global_u32(place + of)))
        } else {
            turn(position.wrapping_mul(memory::ld_global_u64(p.angles + pair as u64 * 8)))
        }
    };
    [cos, p.sign * sin]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::f64::consts::TAU;

    #[test]
    fn turns_are_rounded_cosines_and_sines() {
        // Every 2^-12 of a turn, and what lies beside it.
        for step in 0..4096_u64 {
            for beside in [0, 1, 1 << 20, 0x0001_3579_bdf0_2468, u64::MAX, u64::MAX << 30] {
                let phase = (step << 52).wrapping_add(beside);
                let (sin, cos) = (phase as i64 as f64 / 2_f64.powi(64) * TAU).sin_cos();
                for (got, want) in turn(phase).into_iter().zip([cos, sin]) {
                    // Half of a place of f32, and the error before rounding.
                    let bound = want.abs() * 2_f64.powi(-24) + 2_f64.powi(-40);
                    assert!((f64::from(got) - want).abs() <= bound, "{phase:#x}: {got}, want {want}");
                }
            }
        }
    }

    #[test]
    fn quarters_are_exact() {
        let quarters = [0_u64, 1 << 62, 2 << 62, 3 << 62].map(turn);
        assert_eq!(quarters, [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]);
    }
}
