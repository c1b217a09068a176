//! Generic addresses: each state space has a window, global memory is everything else.

use super::types::Space;

/// First generic address of shared memory. A shared address has the block's rank within its cluster, plus one, in
/// the bits from [`RANK_SHIFT`] when it comes from `mapa`; zero there means the executing block.
pub(crate) const SHARED: u64 = 0x1_0000_0000;
/// First generic address of local memory.
pub(crate) const LOCAL: u64 = 0x2_0000_0000;
/// First generic address of the kernel's parameters.
pub(crate) const PARAM: u64 = 0x3_0000_0000;

/// First address beyond the windows.
const END: u64 = 0x4_0000_0000;

/// Where the block's rank stands in a `shared::cluster` address.
pub(crate) const RANK_SHIFT: u32 = 24;
/// The part of a shared address that is an offset in a block's memory.
pub(crate) const OFFSET_MASK: u64 = (1 << RANK_SHIFT) - 1;
/// Shared variables begin here, as on hardware that keeps the first kilobyte to itself: null is no shared address.
pub(crate) const SHARED_BASE: u64 = 1024;

/// Start of the bytes below [`SHARED_BASE`] that belong to cooperative groups (`%reserved_smem_offset_1`).
pub(crate) const RESERVED_FOR_GROUPS: u64 = 512;

/// The window of `space`, if it has one.
pub(crate) fn base(space: Space) -> Option<u64> {
    match space {
        Space::Shared | Space::SharedCluster => Some(SHARED),
        Space::Local => Some(LOCAL),
        Space::Param => Some(PARAM),
        Space::Generic | Space::Global | Space::Const => None,
    }
}

/// The space and address within it that a generic address stands for.
pub(crate) fn resolve(address: u64) -> (Space, u64) {
    match address {
        SHARED..LOCAL => (Space::SharedCluster, address - SHARED),
        LOCAL..PARAM => (Space::Local, address - LOCAL),
        PARAM..END => (Space::Param, address - PARAM),
        _ => (Space::Global, address),
    }
}

/// True if a generic address lies in `space`.
pub(crate) fn contains(space: Space, address: u64, own_rank: u32) -> bool {
    let (actual, offset) = resolve(address);
    match space {
        Space::Shared => {
            let rank = offset >> RANK_SHIFT;
            actual == Space::SharedCluster && (rank == 0 || rank == u64::from(own_rank) + 1)
        }
        // Constant variables live among the global ones, and are told apart by nobody.
        Space::Const | Space::Generic => false,
        _ => actual == space,
    }
}
