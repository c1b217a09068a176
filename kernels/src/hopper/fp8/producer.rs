//! The producer, the first warpgroup of a block: its first thread loads, and all of it transposes values.
//!
//! Products of codes want operands whose rows run along k. Rows of values run along head_dim, so each tile is transposed on its
//! way from one slot to another: `ldmatrix` transposes pairs of codes, a permutation of bytes parts the two columns of a pair, and
//! `stmatrix` stores them as rows. Keys then have the order that weights have in registers, see [`codes`](crate::tile::codes).

use super::super::{Shared, WARPGROUP, forward, warp_of_group, work::Work};
use crate::abi::Fp8ForwardParams;
use crate::mask::Mask;
use crate::pipeline::bulk::Cursor;
use crate::ptx::{codes, math::lg2, matrix, memory, optimizer, sreg, sync, tma, tma::Corner};
use crate::shape::{CodeShape, HOPPER_SLOTS, HopperShape as _};

/// Address of a tensor map among the kernel's parameters.
macro_rules! map {
    ($maps:expr, $tensor:ident) => {
        $maps + core::mem::offset_of!(crate::abi::Fp8ForwardParams, forward.$tensor) as u64
    };
}
pub(super) use map;

/// Loads what the block's consumers use, in their order, and transposes values. The whole warpgroup calls it.
#[inline(always)]
pub unsafe fn produce<S: CodeShape, const CAUSAL: bool>(p: &Fp8ForwardParams, maps: u64, shared: Shared<S>) {
    let of = &p.forward;
    let mask = Mask::<CAUSAL>::new(of.seqlen_q, of.seqlen_k);
    let mut producer = Producer {
        p,
        maps,
        shared,
        transposed: 0,
        unit_log2: 0.0,
    };
    let mut queries = Cursor::<1>::start();
    let loads = sreg::thread_idx_x() == 0;
    for work in Work::of_this_block::<CAUSAL, false>(&of.work, S::BLOCK_M) {
        let blocks = forward::key_blocks::<S, CAUSAL>(of, &mask, &work);
        // SAFETY (whole body): a slot is filled once it is empty. A tile is loaded before the one before it is transposed, for which
        // consumers have to be done with no later one.
        unsafe {
            if loads {
                producer.load_queries(&work, queries);
            }
            queries.advance();
            for n in (blocks.begin..optimizer::renew(blocks.end) + 1).rev() {
                if loads && n > blocks.begin {
                    producer.load(&work, n - 1, n == blocks.end);
                }
                sync::sync_warp();
                if n < blocks.end {
                    if CAUSAL && blocks.is_masked(n) {
                        producer.transpose::<true>();
                    } else {
                        producer.transpose::<false>();
                    }
                }
            }
        }
    }
}

struct Producer<'a, S> {
    p: &'a Fp8ForwardParams,
    maps: u64,
    shared: Shared<S>,
    /// Number of tiles of values that were transposed.
    transposed: u32,
    /// Base-2 logarithm of the unit of a tile of work's scales of values.
    unit_log2: f32,
}

impl<S: CodeShape> Producer<'_, S> {
    /// Loads the queries of a tile of work. One thread calls it.
    #[inline(always)]
    unsafe fn load_queries(&self, work: &Work, queries: Cursor<1>) {
        let shared = self.shared;
        // SAFETY (whole body): the barrier counts the bytes of the boxes that follow.
        unsafe {
            let bytes = S::CONSUMERS * S::QUERY_CODES_BYTES;
            let full = shared.query_slots().refill(queries, bytes);
            for group in 0..S::CONSUMERS {
                let corner = forward::corner(&self.p.forward, work, group);
                shared.query_codes(group).load_bytes(map!(self.maps, q), corner, full);
            }
        }
    }

    /// Loads the next tile of keys and of values, block `n` of a tile of work, and the scales of both. The scale of the first values of
    /// the first tile is the unit of the others. One thread calls it.
    #[inline(always)]
    unsafe fn load(&mut self, work: &Work, n: u32, is_first: bool) {
        let (p, shared) = (self.p, self.shared);
        let tile = Cursor::<HOPPER_SLOTS>::after(self.transposed + !is_first as u32);
        let head = work.head / p.forward.heads_per_kv;
        let (first, second) = (n * S::BLOCK_N, (n + 1) * S::BLOCK_N - 1);
        let corner = Corner {
            batch: work.head / p.forward.heads,
            head: work.head % p.forward.heads / p.forward.heads_per_kv,
            row: first,
            column: 0,
        };
        // SAFETY (whole body): the addresses are those of scales; barriers count the bytes of the boxes that follow.
        unsafe {
            let load = |address| f32::from_bits(memory::ld_global_u32(address));
            let keys = [first, second].map(|row| load(p.k.address_of(head, row)));
            let values = [first, second].map(|row| lg2(load(p.v.address_of(head, row))));
            if is_first {
                self.unit_log2 = values[0];
            }
            let [v0, v1] = values.map(|log2| log2 - self.unit_log2);
            shared.key_slots().wait_empty(tile);
            memory::st_shared_words(shared.scales(tile.slot), [keys[0], keys[1], v0, v1].map(f32::to_bits));
            let full = shared.key_slots().refill(tile, S::TILE_BYTES);
            shared.key_codes(tile.slot).load_bytes(map!(self.maps, k), corner, full);
            let full = shared.loaded_slots().refill(tile, S::TILE_BYTES);
            shared
                .loaded_codes(tile.slot)
                .load_bytes(map!(self.maps, v), corner, full);
        }
    }

    /// Transposes the next tile of values. With `CLEANS` codes of NaN become zeros, and the tile's consumers are told if there were any.
    #[inline(always)]
    unsafe fn transpose<const CLEANS: bool>(&mut self) {
        let (shared, tile, warp) = (self.shared, Cursor::after(self.transposed), warp_of_group());
        // SAFETY (whole body): the tile has arrived, the consumers are done with the slot's last one, and each warp reads and writes
        // squares of its own. Writes are visible to products before the slot is full.
        unsafe {
            shared.loaded_slots().acquire(tile);
            shared.value_slots().wait_empty(tile);
            let mut nan = 0;
            for i in 0..S::BLOCK_N / 64 {
                nan |= self.transpose_keys::<CLEANS>(tile, warp + i * 4);
            }
            if CLEANS {
                let any = sync::any(nan != 0);
                if sreg::lane_id() == 0 {
                    memory::st_shared_word(shared.found_nan(tile.slot) + warp * 4, any as u32);
                }
            }
            tma::fence_async();
            sync::sync_warp();
            if sreg::lane_id() == 0 {
                shared.loaded_slots().release(tile.slot);
                shared.value_slots().fill(tile);
            }
        }
        self.transposed += 1;
    }

    /// Transposes 16 keys of a tile. Returns a number that is not 0 if this lane found NaN.
    #[inline(always)]
    unsafe fn transpose_keys<const CLEANS: bool>(&self, tile: Cursor<HOPPER_SLOTS>, group: u32) -> u32 {
        // Addresses are recomputed for each tile: kept, they would occupy more registers than there are.
        let (lane, slot) = (optimizer::renew(sreg::lane_id()), tile.slot);
        let (loaded, values) = (self.shared.loaded_codes(slot), self.shared.value_rows(slot));
        let place = self.shared.first_place(slot) + group * 16;
        let mut found = 0;
        for column in (0..S::HEAD_DIM).step_by(32) {
            // Matrices are keys 0 to 7 and 8 to 15 of 16 columns, then of the next 16. Their transposes are the even and the odd ones
            // of these columns.
            let source = loaded.chunk(group * 16 + lane % 16, (column + lane / 16 * 16) / 2);
            let row = column + lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2;
            // SAFETY (whole body): the caller's contract.
            let [a, b, c, d] = unsafe { matrix::ldmatrix_x4_trans(source) };
            let ([a, b], [c, d]) = (codes::split_bytes(a, b), codes::split_bytes(c, d));
            let mut words = [a, b, c, d];
            if CLEANS {
                for i in 0..4 {
                    found |= codes::nan(words[i]);
                }
                words = words.map(codes::without_nan);
            }
            unsafe { matrix::stmatrix_x4(values.chunk(row, place / 2), words) }
        }
        found
    }
}
