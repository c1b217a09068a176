//! Attention by Hopper's own instructions: tiles copied by the tensor memory accelerator, products of warpgroups.
//!
//! Every kernel here has the same cast. The first warpgroup loads, through rings of slots guarded by barriers; it keeps few
//! registers. The others each own 64 rows of the result and compute. Blocks stay for the whole launch and take one tile of
//! work after the other, so that the loads of the next overlap the end of the last.

pub mod backward;
pub mod forward;
mod work;

use crate::ptx::sreg;
use core::marker::PhantomData;

/// Threads of a warpgroup.
const WARPGROUP: u32 = 128;

/// Index of the warp in its warpgroup.
#[inline(always)]
fn warp_of_group() -> u32 {
    sreg::warp_id() % 4
}

/// This block's dynamic shared memory; each pass says what lies where in it, for the shape `S`.
struct Shared<S> {
    base: u32,
    shape: PhantomData<S>,
}

impl<S> Clone for Shared<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Shared<S> {}

impl<S> Shared<S> {
    #[inline(always)]
    fn of_this_block() -> Self {
        Self {
            base: sreg::dynamic_shared_mem(),
            shape: PhantomData,
        }
    }
}
