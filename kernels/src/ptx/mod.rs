//! The only `asm!` of the kernels: a function is one PTX instruction, or a loop around one that waits.
//!
//! Options tell the truth. Arithmetic on one lane's values is `pure, nomem`. What reads or writes memory, or orders it,
//! keeps the default clobber. What a whole warp executes together (`mma`, `ldmatrix`, `shfl`, `bar`) is never `pure`:
//! rustc does not mark inline assembly `convergent`, so a pure one could be sunk into a divergent branch.

pub mod copy;
pub mod math;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod optimizer;
pub mod sreg;
pub mod sync;
pub mod tma;
pub mod wgmma;
