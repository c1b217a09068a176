//! Preprocess and postprocess kernels of backward on Hopper, and their workspace for each query.
//!
//! [`preprocess`] writes lse and delta in whole tiles of queries, as a bulk copy reads them, and clears the dQ
//! accumulator. [`postprocess`] converts the accumulator to dQ.

use core::num::NonZeroU32;

use crate::abi::QuerySumsParams;
use crate::delta::{LANES, dot_of_row, write_exponents};
use crate::hopper::{WARPGROUP, warp_of_group};
use crate::ptx::{matrix::Half, memory, sreg};
use crate::shape::{DELTA_ROWS, HOPPER_ROWS};
use crate::tile::register::{Accumulator, OutputTile, RowValues};
use crate::tile::warpgroup::{SQUARE_BYTES, Square};
use crate::tile::{
    element::Element,
    fragments::{Fragments, Packed},
    global::GlobalTile,
    shared::{CHUNK, SharedTile},
};

/// Writes lse and delta, and clears the dQ accumulator and its semaphores, for [`DELTA_ROWS`] queries per block.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters that `Problem` and `Plan` made.
#[inline(always)]
pub unsafe fn preprocess<T: Half>(p: &QuerySumsParams) {
    let (head, tile) = (sreg::block_idx_x() / p.tiles, sreg::block_idx_x() % p.tiles);
    let first = head as u64 * p.sums.padded_q.get() as u64 + (tile * DELTA_ROWS) as u64;
    let row = sreg::thread_idx_x() / LANES;
    let query = tile * DELTA_ROWS + row;
    let window = |tensor| {
        let (batch, head) = (head / p.heads_q, head % p.heads_q);
        GlobalTile::new(tensor, batch, head, p.seqlen_q, &p.layout, T::BYTES)
    };
    // SAFETY (whole body): windows clip elements that do not exist; the workspace has room for whole blocks of
    // queries, lse for those that exist.
    unsafe {
        let delta = dot_of_row::<T>(window(&p.out), window(&p.dout), query);
        // Queries that do not exist get weight 1, and their dO is 0.
        let from = (query < p.seqlen_q).then_some(head as u64 * p.seqlen_q as u64 + query as u64);
        let (to, flag) = (Some(first + row as u64), sreg::block_idx_x());
        write_exponents::<T, false>(&p.rows, &p.sums.exponents, from, to, delta, p.scale_log2, flag);
        let squares = p.sums.dq_columns / HOPPER_ROWS;
        if p.sums.turns != 0 && first % HOPPER_ROWS as u64 == 0 && sreg::thread_idx_x() < squares {
            let square = first / HOPPER_ROWS as u64 * squares as u64 + sreg::thread_idx_x() as u64;
            memory::st_global_u32(p.sums.turns + square * 4, 0);
        }
        let chunks = DELTA_ROWS * p.sums.dq_columns / 4;
        let sums = p.sums.dq + first * p.sums.dq_columns as u64 * 4;
        let mut chunk = sreg::thread_idx_x();
        while chunk < chunks {
            memory::st_global_words(sums + chunk as u64 * 16, [0; 4]);
            chunk += DELTA_ROWS * LANES;
        }
    }
}

/// Converts one square of the dQ accumulator per block to dQ, by one warpgroup.
///
/// # Safety
/// The contract of [`preprocess`], after the kernel that accumulates dQ.
#[inline(always)]
pub unsafe fn postprocess<T: Half>(p: &QuerySumsParams) {
    let square = sreg::block_idx_x();
    let (head, square_of_head) = (square / p.tiles, square % p.tiles);
    // A tile of 64 queries is one square, or some side by side.
    let squares = NonZeroU32::MIN.saturating_add(p.sums.dq_columns / HOPPER_ROWS - 1);
    let (rows, columns) = (square_of_head / squares, square_of_head % squares);
    let first_row = rows * HOPPER_ROWS + warp_of_group() * 16;
    let staging = SharedTile::new(sreg::dynamic_shared_mem() + warp_of_group() * 16 * ROW_BYTES, ROW_BYTES);
    let target = GlobalTile::new(
        &p.dq,
        head / p.heads_q,
        head % p.heads_q,
        p.seqlen_q,
        &p.layout,
        T::BYTES,
    )
    .rows_from(first_row)
    .chunks_from(columns * ROW_BYTES / CHUNK);
    // SAFETY: the square exists; each warp has rows of its own, in shared memory and in dQ, which clips elements that
    // do not exist.
    unsafe {
        let source = p.sums.dq + square as u64 * SQUARE_BYTES as u64;
        let mut dq = Square::<T>::read(source, sreg::thread_idx_x() % WARPGROUP);
        let scale = <Fragments<T, 1, 8> as Accumulator>::Rows::splat(p.softmax_scale);
        dq.map_rows(scale, |scale, x| x * scale);
        OutputTile::<Packed<1, 2>>::store(&dq, staging, &target);
    }
}

/// Bytes of a row of a square of 16-bit elements.
const ROW_BYTES: u32 = HOPPER_ROWS * 2;
