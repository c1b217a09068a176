//! Special registers: who am I. PTX ISA, "Special Registers".

use core::arch::{asm, global_asm};

// All kernels use one dynamic array; 1024 bytes is the largest alignment that a swizzle needs.
global_asm!(".extern .shared .align 1024 .b8 smem[];");

macro_rules! special_register {
    ($(#[$doc:meta])* $name:ident | $renewed:ident, $register:literal) => {
        special_register!($(#[$doc])* $name, $register);

        $(#[$doc])*
        ///
        /// It is read anew: nothing is kept in registers since the last time.
        #[inline(always)]
        pub fn $renewed() -> u32 {
            let value: u32;
            // SAFETY: reads a register that is constant for the life of the lane; not `pure`, so that two of them are not merged.
            unsafe { asm!(concat!("mov.u32 {v}, ", $register, ";"), v = out(reg32) value, options(nomem, nostack)) }
            value
        }
    };
    ($(#[$doc:meta])* $name:ident, $register:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: reads a register that is constant for the life of the lane.
            unsafe { asm!(concat!("mov.u32 {v}, ", $register, ";"), v = out(reg32) value, options(pure, nomem, nostack)) }
            value
        }
    };
}

special_register!(
    /// Index of the thread in its block.
    thread_idx_x | renewed_thread_idx_x, "%tid.x");
special_register!(
    /// Index of the block in its grid.
    block_idx_x | renewed_block_idx_x, "%ctaid.x");
special_register!(
    /// Index of the cluster of blocks in its grid. PTX 7.8, sm_90.
    cluster_idx_x, "%clusterid.x");
special_register!(
    /// Index of the block in its cluster. PTX 7.8, sm_90.
    cluster_rank, "%cluster_ctarank");
special_register!(
    /// Number of blocks of the grid.
    grid_dim_x, "%nctaid.x");
special_register!(
    /// Index of the lane in its warp.
    lane_id, "%laneid");
special_register!(
    /// Shared-window address of the dynamic shared memory.
    dynamic_shared_mem, "smem");

/// Index of the warp in its block, worked out anew: nothing is kept in registers since the last time.
#[inline(always)]
pub fn renewed_warp_id() -> u32 {
    renewed_thread_idx_x() / 32
}

/// Index of the warp in its block.
#[inline(always)]
pub fn warp_id() -> u32 {
    thread_idx_x() / 32
}
