//! All `asm!` of the kernels. A function is one PTX instruction, or a loop around one that waits.
//!
//! Options are exact. Arithmetic on one lane's values is `pure, nomem`. Instructions that read, write or order memory
//! keep the default clobber. Instructions that a whole warp executes together (`mma`, `ldmatrix`, `shfl`, `bar`) are
//! never `pure`: rustc does not mark inline assembly `convergent`, so a pure one could be sunk into a divergent
//! branch.

pub mod codes;
pub mod copy;
pub mod math;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod optimizer;
pub mod program;
pub mod sreg;
pub mod sync;
pub mod tma;
pub mod wgmma;
