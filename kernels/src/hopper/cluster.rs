//! Clusters of blocks that stream the same tiles of keys and values.
//!
//! The blocks of a cluster take neighbouring tiles of one head's queries, and so all its keys in the same order. Each loads a
//! part of each tile of keys and values for all of them, which reads the tile from the L2 cache once. A warp that has
//! finished with a slot tells every block, because each of them loads into it. All blocks have as many tiles of work: where a
//! head has an odd number, the last one of a block lies past the end, reads zeros and stores nothing.

use super::work::Work;
use crate::pipeline::bulk::Slots;
use crate::ptx::{sreg, sync, tma::Corner};
use crate::shape::CLUSTER;
use crate::tile::panels::Panels;

/// Blocks that load keys and values together: [`Alone`], or in [`Pairs`].
pub trait Cluster {
    /// Number of blocks of a cluster.
    const BLOCKS: u32;

    /// Waits until every block has initialised its barriers. All threads call it.
    fn start();

    /// Waits until no other block accesses the shared memory of this one any more. All threads call it, at the end.
    fn end();

    /// Returns the index of the block, or of its cluster, in the list of work.
    fn place() -> u32;

    /// Returns this block's part, `rows` rows, of a tile of work, which may lie past the end.
    fn part(work: Work, rows: u32) -> Work;

    /// Starts to load the tile at `corner`, of `rows` rows: the whole tile, or this block's part into every block.
    ///
    /// # Safety
    /// The contract of [`Panels::load`], where the box of `map` has the rows of a part. Every block makes the same calls
    /// between [`start`](Self::start) and [`end`](Self::end), and tile and `barrier` have the same place in all of them.
    unsafe fn load(tile: Panels, rows: u32, map: u64, corner: Corner, barrier: u32);

    /// Releases a slot, with one arrival in each block. All lanes of a warp call it.
    ///
    /// # Safety
    /// The contract of [`Slots::release`], for all lanes of the warp, between [`start`](Self::start) and [`end`](Self::end).
    unsafe fn release(slots: Slots, slot: u32);
}

/// Each block loads for itself.
pub enum Alone {}

/// Clusters of [`CLUSTER`] blocks.
pub enum Pairs {}

impl Cluster for Alone {
    const BLOCKS: u32 = 1;

    #[inline(always)]
    fn start() {
        sync::sync_threads();
    }

    #[inline(always)]
    fn end() {}

    #[inline(always)]
    fn place() -> u32 {
        sreg::block_idx_x()
    }

    #[inline(always)]
    fn part(work: Work, _rows: u32) -> Work {
        work
    }

    #[inline(always)]
    unsafe fn load(tile: Panels, _rows: u32, map: u64, corner: Corner, barrier: u32) {
        // SAFETY: the caller's contract.
        unsafe { tile.load(map, corner, barrier) }
    }

    #[inline(always)]
    unsafe fn release(slots: Slots, slot: u32) {
        if sreg::lane_id() == 0 {
            // SAFETY: the caller's contract.
            unsafe { slots.release(slot) }
        }
    }
}

impl Cluster for Pairs {
    const BLOCKS: u32 = CLUSTER;

    #[inline(always)]
    fn start() {
        sync::sync_cluster();
    }

    #[inline(always)]
    fn end() {
        sync::sync_cluster();
    }

    #[inline(always)]
    fn place() -> u32 {
        sreg::cluster_idx_x()
    }

    #[inline(always)]
    fn part(work: Work, rows: u32) -> Work {
        work.part(sreg::cluster_rank(), rows)
    }

    #[inline(always)]
    unsafe fn load(tile: Panels, rows: u32, map: u64, corner: Corner, barrier: u32) {
        let first = sreg::cluster_rank() * (rows / CLUSTER);
        let corner = Corner {
            row: corner.row + first,
            ..corner
        };
        // SAFETY: the caller's contract.
        unsafe { tile.load_rows_into_blocks(first, map, corner, barrier, (1 << CLUSTER) - 1) }
    }

    #[inline(always)]
    unsafe fn release(slots: Slots, slot: u32) {
        let block = sreg::lane_id();
        if block < CLUSTER {
            // SAFETY: the caller's contract.
            unsafe { slots.release_in(slot, block) }
        }
    }
}
