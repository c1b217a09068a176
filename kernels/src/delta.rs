//! Statistics of each query that backward needs before its products: delta = rowsum(dO * O), and how weights are
//! recomputed.

use core::f32::consts::LOG2_E;

use crate::abi::{BackwardParams, Exponents, ForwardRows};
use crate::ptx::{math::lg2, memory, optimizer, program, sreg, sync};
use crate::shape::DELTA_ROWS;
use crate::softmax::FAR;
use crate::tile::{element::Element, global::GlobalTile};

/// Computes exponents and delta of [`DELTA_ROWS`] queries per block. 8 lanes share a row.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn delta<E: Element>(p: &BackwardParams) {
    // SAFETY: the caller's contract.
    unsafe { delta_with::<E, false>(p) }
}

/// [`delta`] for a score program. A query whose scores are all minus infinity sees no key then.
///
/// # Safety
/// The contract of [`delta`].
#[inline(always)]
pub unsafe fn program<E: Element>(p: &BackwardParams) {
    // SAFETY: the caller's contract.
    unsafe { delta_with::<E, true>(p) }
}

#[inline(always)]
unsafe fn delta_with<E: Element, const PROGRAM: bool>(p: &BackwardParams) {
    let block = optimizer::renew(sreg::block_idx_x());
    let (head, tile) = (block / p.tiles, block % p.tiles);
    let row = tile * DELTA_ROWS + sreg::thread_idx_x() / LANES;
    let window = |tensor| {
        GlobalTile::new(
            tensor,
            head / p.heads_q,
            head % p.heads_q,
            p.seqlen_q,
            &p.layout,
            E::BYTES,
        )
    };
    let index = head as u64 * p.seqlen_q as u64 + row as u64;
    // SAFETY (whole body): windows clip what does not exist; there are exponents for each query, and a flag for each
    // block.
    unsafe {
        let delta = dot_of_row::<E>(window(&p.out), window(&p.dout), row);
        let exists = row < p.seqlen_q;
        if PROGRAM && exists && sreg::thread_idx_x() % LANES == 0 {
            let lse = f32::from_bits(memory::ld_global_u32(p.rows.lse + index * 4));
            program::row(head % p.heads_q, lse, delta);
        }
        write_exponents::<E, PROGRAM>(
            &p.rows,
            &p.exponents,
            exists.then_some(index),
            exists.then_some(index),
            delta,
            p.scale_log2,
            block,
        );
    }
}

/// Writes the exponent and delta of a query, number `from` of forward's, as number `to` if it has a place, and the flag of the
/// block, number `flag`. A query that does not exist has zeros. Every thread of the block calls this.
///
/// # Safety
/// The places exist.
#[inline(always)]
pub unsafe fn write_exponents<E: Element, const PROGRAM: bool>(
    rows: &ForwardRows,
    exponents: &Exponents,
    from: Option<u64>,
    to: Option<u64>,
    delta: f32,
    scale_log2: f32,
    flag: u32,
) {
    // SAFETY (whole body): the caller's contract.
    unsafe {
        let (shift, lse_log2) = match from {
            Some(index) if sreg::thread_idx_x() % LANES == 0 => exponent::<E, PROGRAM>(rows, index, scale_log2),
            _ => (0.0, 0.0),
        };
        if let Some(index) = to
            && sreg::thread_idx_x() % LANES == 0
        {
            memory::st_global_u32(exponents.lse_log2 + index * 4, lse_log2.to_bits());
            // A query whose dO or out is not finite makes NaN of each dS that it has, where dP alone might be finite.
            let delta = if delta.abs() < f32::INFINITY { delta } else { f32::NAN };
            memory::st_global_u32(exponents.delta + index * 4, delta.to_bits());
            memory::st_global_u32(exponents.shift + index * 4, shift.to_bits());
        }
        let nothing = PROGRAM && lse_log2 == f32::INFINITY;
        let is_far = sync::sync_threads_or(shift != 0.0 || lse_log2.abs() > FAR && !nothing);
        if sreg::thread_idx_x() == 0 {
            memory::st_global_u32(exponents.far + flag as u64 * 4, is_far as u32);
        }
    }
}

/// (shift, lse_log2) of a query: a score's weight is `exp2((s - shift) * scale_log2 - lse_log2)`.
///
/// In f32 the largest score of every query is the shift. In 16 bits it is 0 below [`FAR`], where the one rounding of exponents is
/// far less than that of the weights. A query whose weights sum to 0 has the exponent NaN: the keys it sees weigh NaN, and the mask
/// hides those it does not see. To a score program it sees nothing, and the exponent is infinite: all keys weigh 0.
#[inline(always)]
unsafe fn exponent<E: Element, const PROGRAM: bool>(rows: &ForwardRows, index: u64, scale_log2: f32) -> (f32, f32) {
    // SAFETY (whole body): forward's rows hold an f32 for each query.
    unsafe {
        let load = |line: u64| f32::from_bits(memory::ld_global_u32(line + index * 4));
        if rows.row_max == 0 {
            let lse = load(rows.lse);
            let nothing = lse == f32::NEG_INFINITY;
            return (
                0.0,
                match (nothing, PROGRAM) {
                    (true, true) => f32::INFINITY,
                    (true, false) => f32::NAN,
                    (false, _) => lse * LOG2_E,
                },
            );
        }
        let (row_max, row_sum) = (load(rows.row_max), load(rows.row_sum));
        if PROGRAM && row_sum == 0.0 {
            return (0.0, f32::INFINITY);
        }
        if row_sum == 0.0 || row_sum.is_nan() {
            return (0.0, f32::NAN);
        }
        let scaled = row_max * scale_log2;
        if E::BYTES == 4 || scaled.abs() > FAR {
            (row_max, lg2(row_sum))
        } else {
            (0.0, scaled + lg2(row_sum))
        }
    }
}

/// Returns true if a flag in this thread's share of `flags` is set: one of its [`DELTA_ROWS`] queries is far. Thread
/// `thread` of `threads` reads every `threads`-th flag.
///
/// # Safety
/// The flags exist.
#[inline(always)]
pub unsafe fn any_far_of_share(exponents: &Exponents, flags: core::ops::Range<u64>, thread: u32, threads: u32) -> bool {
    let mut any = 0;
    let mut flag = flags.start + thread as u64;
    while flag < flags.end {
        // SAFETY: the caller's contract.
        any |= unsafe { memory::ld_global_u32(exponents.far + flag * 4) };
        flag += threads as u64;
    }
    any != 0
}

/// Returns the dot product of row `row` of two windows. [`LANES`] lanes share the row, and all of them get the sum.
///
/// # Safety
/// The windows are readable and have the same width. All lanes of the warp call this together.
#[inline(always)]
pub unsafe fn dot_of_row<E: Element>(a: GlobalTile, b: GlobalTile, row: u32) -> f32 {
    let mut sum = 0.0;
    for step in 0..a.chunks().div_ceil(LANES) {
        let chunk = step * LANES + sreg::thread_idx_x() % LANES;
        if a.contains(row, chunk) {
            // SAFETY: the chunk exists.
            sum += unsafe { E::dot(a.load(row, chunk), b.load(row, chunk)) };
        }
    }
    let mut distance = 1;
    while distance < LANES {
        sum += sync::shuffle_xor(sum, distance);
        distance *= 2;
    }
    sum
}

/// Number of lanes that share a row in [`dot_of_row`].
pub const LANES: u32 = 8;
