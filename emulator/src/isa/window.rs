//! Generic addresses: each state space has a window, and all other addresses are global memory.

use super::types::Space;

/// First generic address of shared memory. An address from `mapa` has the block's rank within its cluster, plus one,
/// in the bits from [`RANK_SHIFT`]. Zero in these bits means the executing block.
pub(crate) const SHARED: u64 = 0x1_0000_0000;
/// First generic address of local memory.
pub(crate) const LOCAL: u64 = 0x2_0000_0000;
/// First generic address of the kernel's parameters.
pub(crate) const PARAM: u64 = 0x3_0000_0000;

/// First address beyond the windows.
const END: u64 = 0x4_0000_0000;

/// Bit at which the block's rank starts in a `shared::cluster` address.
pub(crate) const RANK_SHIFT: u32 = 24;
/// Mask of the offset within a block's memory in a shared address.
pub(crate) const OFFSET_MASK: u64 = (1 << RANK_SHIFT) - 1;
/// First address of shared variables. Hardware reserves the first kilobyte, so null is no address of a variable.
pub(crate) const SHARED_BASE: u64 = 1024;

/// Start of the bytes below [`SHARED_BASE`] that are reserved for cooperative groups (`%reserved_smem_offset_1`).
pub(crate) const RESERVED_FOR_GROUPS: u64 = 512;

/// Returns the start of the window of `space`, if it has one.
pub(crate) fn base(space: Space) -> Option<u64> {
    match space {
        Space::Shared | Space::SharedCluster => Some(SHARED),
        Space::Local => Some(LOCAL),
        Space::Param => Some(PARAM),
        Space::Generic | Space::Global | Space::Const => None,
    }
}

/// Returns the state space of a generic address and the address within it.
pub(crate) fn resolve(address: u64) -> (Space, u64) {
    match address {
        SHARED..LOCAL => (Space::SharedCluster, address - SHARED),
        LOCAL..PARAM => (Space::Local, address - LOCAL),
        PARAM..END => (Space::Param, address - PARAM),
        _ => (Space::Global, address),
    }
}

/// Returns true if a generic address lies in `space`.
pub(crate) fn contains(space: Space, address: u64, own_rank: u32) -> bool {
    let (actual, offset) = resolve(address);
    match space {
        Space::Shared => {
            let rank = offset >> RANK_SHIFT;
            actual == Space::SharedCluster && (rank == 0 || rank == u64::from(own_rank) + 1)
        }
        // Constant variables lie among the global ones and cannot be told apart.
        Space::Const | Space::Generic => false,
        _ => actual == space,
    }
}
