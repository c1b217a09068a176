//! Compiled tile shapes: the tiles of a block of threads, and the registers that hold them.
//!
//! Each shape is a type, so the body of a kernel has no numbers. The host plans with the numbers; the tile types
//! exist only where a kernel is compiled.
//!
//! A block owns `ROWS` rows of its result and streams the other sequence past them in tiles of `COLUMNS`. Forward and
//! dQ own queries and stream keys; dK and dV own keys and stream queries.
//!
//! Shared memory per block stays within 99 KiB, the least of all GPUs from sm_80 on (sm_86, sm_89 and sm_120; A100
//! has 163 KiB, H100 227 KiB), so that the portable kernels run on all of them.

mod latent;
mod wide;

use crate::element::F16;
use crate::tile::swizzle;
#[cfg(target_arch = "nvptx64")]
use crate::tile::{element::Element, fragments::Fragments, lanes::LaneRows, register::*, warpgroup::*};
use core::marker::PhantomData;
pub use latent::LatentD576;
pub use wide::*;

/// Largest shared memory of a block on every GPU from sm_80 on, in bytes.
pub const PORTABLE_SHARED_BYTES: u32 = 99 * 1024;

/// Largest shared memory of a block on Hopper, in bytes.
pub const HOPPER_SHARED_BYTES: u32 = 227 * 1024;

/// Number of registers of a multiprocessor.
const REGISTERS: u32 = 65536;

/// Number of queries of a block of the preprocess kernels, with 8 threads each.
pub const DELTA_ROWS: u32 = 16;

/// Number of warps of a block of the kernel that combines partial results; they take the rows of a tile in turn.
pub const COMBINE_WARPS: u32 = 4;

/// Number of warps of a block of the rotary kernel; they take the heads of a token in turn.
pub const ROTARY_WARPS: u32 = 8;

/// The sizes of a compiled tile shape.
pub trait TileSizes {
    /// Largest head_dim of the tile; the loader masks a narrower head.
    const HEAD_DIM: u32;
    /// Number of rows of the result that a block owns.
    const ROWS: u32;
    /// Number of rows of the other sequence in a step.
    const COLUMNS: u32;
    /// Number of rows of the other sequence in a streamed tile. Forward may take several tiles in a step: the output is then rescaled
    /// once for all of them, though shared memory has no room for wider tiles.
    const TILE_COLUMNS: u32 = Self::COLUMNS;
    /// Number of warps of a block; each owns `ROWS / WARPS` rows from load to store.
    const WARPS: u32;
    /// Number of streamed tiles in flight or in use, together: 2 or 4.
    const STAGES: u32;
    /// Size of one element, in bytes.
    const ELEMENT_BYTES: u32;
    /// True if dK and dV are computed in two loops over the queries, because their accumulators do not fit in the
    /// registers together.
    const TWO_WALKS: bool;

    /// Threads per block.
    const THREADS: u32 = Self::WARPS * 32;
    /// Number of rows that one warp owns.
    const WARP_ROWS: u32 = Self::ROWS / Self::WARPS;
    /// Size of a row in shared memory, in bytes.
    const ROW_BYTES: u32 = Self::HEAD_DIM * Self::ELEMENT_BYTES;
    /// Size of an owned tile in shared memory, in bytes.
    const OWNED_BYTES: u32 = Self::ROWS * Self::ROW_BYTES;
    /// Size of a streamed tile in shared memory, in bytes.
    const STREAMED_BYTES: u32 = Self::TILE_COLUMNS * Self::ROW_BYTES;
    /// Number of streamed tiles of keys in a step of forward.
    const STEP_TILES: u32 = Self::COLUMNS / Self::TILE_COLUMNS;
    /// Dynamic shared memory of a forward block, in bytes: the query tile and the pipeline.
    const FORWARD_BYTES: u32 = Self::OWNED_BYTES + Self::STAGES * Self::STREAMED_BYTES;
    /// Size of three f32 for each streamed row of backward, in bytes: whole runs of the swizzle, so that a tile behind them starts one.
    const STATISTICS_BYTES: u32 = (3 * 4 * Self::COLUMNS).next_multiple_of(128);
    /// Dynamic shared memory of a backward block, in bytes: two owned tiles, two stages of two streamed tiles with
    /// three f32 per row, and one f32 for each owned row.
    const BACKWARD_BYTES: u32 =
        2 * Self::OWNED_BYTES + 2 * (2 * Self::STREAMED_BYTES + Self::STATISTICS_BYTES) + 4 * Self::ROWS;
}

/// A compiled tile shape whose warps each own rows from load to store.
pub trait TileShape: TileSizes {
    /// Element type of q, k, v and out.
    #[cfg(target_arch = "nvptx64")]
    type Element: Element;
    /// Scores of one warp: `WARP_ROWS` x `COLUMNS`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Scores: ScoreTile;
    /// Result of one warp: `WARP_ROWS` x `HEAD_DIM`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Output: OutputTile<<Self::Scores as ScoreTile>::Operand, Rows = <Self::Scores as Accumulator>::Rows>;
}

/// Returns true if the threads of a block, side by side along the rows, cover a tile in whole steps.
pub(crate) const fn loads_evenly<S: TileSizes>() -> bool {
    let rows = S::THREADS / swizzle::neighbours(S::ROW_BYTES);
    // The loader takes the swizzle of a thread's first row for all its rows.
    rows.is_multiple_of(8) && S::ROWS.is_multiple_of(rows) && S::TILE_COLUMNS.is_multiple_of(rows)
}

/// Makes a shape for the tensor cores: the accumulators are m16n8 fragments of 16 rows, `WARP_ROWS / 16` of them
/// high.
macro_rules! ampere_shape {
    ($name:ident, $bytes:ident: $rows:literal x $columns:literal, head_dim $d:literal, warps $warps:literal,
     stages $stages:literal $(of $tile:literal)? $(, $two_walks:ident)?) => {
        #[doc = concat!(stringify!($rows), " x ", stringify!($columns), ", head_dim ", stringify!($d), ", f16 or bf16, mma.sync.")]
        pub struct $name<T>(PhantomData<T>);

        impl<T> TileSizes for $name<T> {
            const HEAD_DIM: u32 = $d;
            const ROWS: u32 = $rows;
            const COLUMNS: u32 = $columns;
            $(const TILE_COLUMNS: u32 = $tile;)?
            const WARPS: u32 = $warps;
            const STAGES: u32 = $stages;
            const ELEMENT_BYTES: u32 = 2;
            const TWO_WALKS: bool = false $(|| !stringify!($two_walks).is_empty())?;
        }

        #[cfg(target_arch = "nvptx64")]
        impl<T: crate::ptx::matrix::Half> TileShape for $name<T> {
            type Element = T;
            type Scores = Fragments<T, { $rows / $warps / 16 }, { $columns / 8 }>;
            type Output = Fragments<T, { $rows / $warps / 16 }, { $d / 8 }>;
        }

        const _: () = {
            assert!($rows % ($warps * 16) == 0 && $columns % 16 == 0 && $d % 16 == 0);
            $(assert!($columns % $tile == 0 && $tile % 16 == 0);)?
            // The swizzle and the loader need rows of whole runs of four chunks.
            assert!(<$name<F16> as TileSizes>::ROW_BYTES % 64 == 0);
            assert!(matches!($stages, 2 | 4));
            assert!(loads_evenly::<$name<F16>>() && <$name<F16> as TileSizes>::$bytes <= PORTABLE_SHARED_BYTES);
        };
    };
}

/// Makes a shape for plain FMA: a warp owns 8 rows, and a lane holds every 16th column of 4 of them.
macro_rules! simt_shape {
    ($name:ident, $bytes:ident: $rows:literal x $columns:literal, head_dim $d:literal, warps $warps:literal, stages $stages:literal
     $(, $two_walks:ident)?) => {
        #[doc = concat!(stringify!($rows), " x ", stringify!($columns), ", head_dim ", stringify!($d), ", f32, FMA.")]
        pub struct $name;

        impl TileSizes for $name {
            const HEAD_DIM: u32 = $d;
            const ROWS: u32 = $rows;
            const COLUMNS: u32 = $columns;
            const WARPS: u32 = $warps;
            const STAGES: u32 = $stages;
            const ELEMENT_BYTES: u32 = 4;
            const TWO_WALKS: bool = false $(|| !stringify!($two_walks).is_empty())?;
        }

        impl TileShape for $name {
            #[cfg(target_arch = "nvptx64")]
            type Element = crate::element::F32;
            #[cfg(target_arch = "nvptx64")]
            type Scores = LaneRows<{ $columns / 16 }, 1>;
            #[cfg(target_arch = "nvptx64")]
            type Output = LaneRows<{ $d / 16 }, 2>;
        }

        const _: () = {
            assert!($rows == $warps * 8 && $columns % 16 == 0 && $d % 32 == 0);
            assert!(<$name as TileSizes>::ROW_BYTES % 64 == 0);
            assert!(matches!($stages, 2 | 4));
            assert!(loads_evenly::<$name>() && <$name as TileSizes>::$bytes <= PORTABLE_SHARED_BYTES);
        };
    };
}
#[cfg(feature = "study")]
pub(crate) use simt_shape;

// Forward. The output is rescaled once a step, so a step takes as many keys as a lane's registers hold scores of without a spill by
// ptxas 13.5; where shared memory does not hold two tiles as wide, a step takes two tiles. 32 rows a warp up to head_dim 96: each key
// fragment read from shared memory then feeds two mma's, and shared memory reads (128 bytes a clock) fall to half of what the tensor
// cores need. Past 96 the output leaves too few registers for that (at 128, 32 keys a step), so a warp owns 16 rows and the block gets
// 8 warps: as many on a multiprocessor as two blocks of 4. At 64, 80 and 96 keys take fewer other instructions and as long to issue,
// and most sequences are no multiples of them. Four stages where tiles are so small that the arithmetic on one does not cover the
// latency of a load.
ampere_shape!(ForwardD32, FORWARD_BYTES: 128 x 128, head_dim 32, warps 4, stages 2);
ampere_shape!(ForwardD64, FORWARD_BYTES: 128 x 64, head_dim 64, warps 4, stages 4);
ampere_shape!(ForwardD96, FORWARD_BYTES: 128 x 64, head_dim 96, warps 4, stages 4 of 32);
ampere_shape!(ForwardD128, FORWARD_BYTES: 128 x 128, head_dim 128, warps 8, stages 2);
ampere_shape!(ForwardD192, FORWARD_BYTES: 128 x 128, head_dim 192, warps 8, stages 2 of 64);
ampere_shape!(ForwardD256, FORWARD_BYTES: 128 x 64, head_dim 256, warps 8, stages 2 of 32);
// Programs that load or draw want registers: fewer keys a step.
ampere_shape!(ProgramD32, FORWARD_BYTES: 128 x 64, head_dim 32, warps 4, stages 4);
ampere_shape!(ProgramD96, FORWARD_BYTES: 128 x 32, head_dim 96, warps 4, stages 4);
ampere_shape!(ProgramD128, FORWARD_BYTES: 128 x 32, head_dim 128, warps 4, stages 2);
ampere_shape!(ProgramD192, FORWARD_BYTES: 128 x 64, head_dim 192, warps 8, stages 2);
ampere_shape!(ProgramD256, FORWARD_BYTES: 128 x 32, head_dim 256, warps 8, stages 2);

simt_shape!(ForwardF32D32, FORWARD_BYTES: 64 x 64, head_dim 32, warps 8, stages 2);
simt_shape!(ForwardF32D64, FORWARD_BYTES: 64 x 64, head_dim 64, warps 8, stages 2);
simt_shape!(ForwardF32D96, FORWARD_BYTES: 64 x 64, head_dim 96, warps 8, stages 2);
simt_shape!(ForwardF32D128, FORWARD_BYTES: 64 x 64, head_dim 128, warps 8, stages 2);
simt_shape!(ForwardF32D192, FORWARD_BYTES: 64 x 32, head_dim 192, warps 8, stages 2);
simt_shape!(ForwardF32D256, FORWARD_BYTES: 32 x 32, head_dim 256, warps 4, stages 2);

// Backward. A block holds two owned tiles and two stages of two streamed ones, so 99 KiB bind sooner; a lane holds
// two score tiles beside the gradients, so a warp owns 16 rows (32 spill with ptxas 13.5). One shape serves dQ and,
// with two accumulators, dK and dV; where those two take more than 128 registers a lane, dK and dV are two walks:
// five products instead of four, no spill. Smaller blocks at 96: 64 queries a tile spill there on sm_90, and 8 warps
// load a tile of rows of 192 bytes in no less than 64.
ampere_shape!(BackwardD32, BACKWARD_BYTES: 128 x 64, head_dim 32, warps 8, stages 2);
ampere_shape!(BackwardD64, BACKWARD_BYTES: 128 x 64, head_dim 64, warps 8, stages 2);
ampere_shape!(BackwardD96, BACKWARD_BYTES: 64 x 32, head_dim 96, warps 4, stages 2);
ampere_shape!(BackwardD128, BACKWARD_BYTES: 128 x 32, head_dim 128, warps 8, stages 2);
ampere_shape!(BackwardD192, BACKWARD_BYTES: 64 x 32, head_dim 192, warps 4, stages 2, two_walks);
ampere_shape!(BackwardD256, BACKWARD_BYTES: 64 x 16, head_dim 256, warps 4, stages 2, two_walks);

simt_shape!(BackwardF32D32, BACKWARD_BYTES: 64 x 32, head_dim 32, warps 8, stages 2);
simt_shape!(BackwardF32D64, BACKWARD_BYTES: 64 x 32, head_dim 64, warps 8, stages 2);
simt_shape!(BackwardF32D96, BACKWARD_BYTES: 64 x 32, head_dim 96, warps 8, stages 2);
simt_shape!(BackwardF32D128, BACKWARD_BYTES: 32 x 32, head_dim 128, warps 4, stages 2);
simt_shape!(BackwardF32D192, BACKWARD_BYTES: 32 x 16, head_dim 192, warps 4, stages 2);
simt_shape!(BackwardF32D256, BACKWARD_BYTES: 16 x 16, head_dim 256, warps 2, stages 2, two_walks);

/// A compiled tile shape of the forward kernel for Hopper: one producer warpgroup, and consumer warpgroups that each
/// own 64 queries.
pub trait HopperShape {
    /// Largest head_dim of the tile; the loader masks a narrower head.
    const HEAD_DIM: u32;
    /// Number of keys of a tile.
    const BLOCK_N: u32;
    /// Number of consumer warpgroups.
    const CONSUMERS: u32;
    /// Registers of a producer thread.
    const PRODUCER_REGISTERS: u32;
    /// Registers of a consumer thread.
    const CONSUMER_REGISTERS: u32;

    /// Warpgroups take turns at issuing products. Wider heads keep the tensor cores busy in any order.
    const TAKES_TURNS: bool = Self::HEAD_DIM <= 128;
    /// Leaves the output as it is where no maximum of a warp's rows moved, for the price of a vote. Narrower heads rescale in the
    /// shadow of exponentials.
    const SKIPS_RESCALING: bool = Self::HEAD_DIM > 128;
    /// Queries that a block owns.
    const BLOCK_M: u32 = Self::CONSUMERS * HOPPER_ROWS;
    /// Threads per block.
    const THREADS: u32 = (Self::CONSUMERS + 1) * 128;
    /// Size of the queries of one warpgroup, in bytes.
    const QUERY_BYTES: u32 = HOPPER_ROWS * panel_columns(Self::HEAD_DIM) * 2;
    /// Size of a tile of keys or values, in bytes.
    const TILE_BYTES: u32 = Self::BLOCK_N * panel_columns(Self::HEAD_DIM) * 2;
    /// Size of all tiles, in bytes: the queries, and the slots of keys and of values.
    const TILES_BYTES: u32 = Self::CONSUMERS * Self::QUERY_BYTES + 2 * HOPPER_SLOTS * Self::TILE_BYTES;
    /// Dynamic shared memory of a block, in bytes: the tiles, two barriers for the queries and for each slot, and one
    /// word for each consumer.
    const SHARED_BYTES: u32 = Self::TILES_BYTES + (2 + 2 * HOPPER_SLOTS) * 16;

    /// Element type of q, k, v and out.
    #[cfg(target_arch = "nvptx64")]
    type Element: Element;
    /// Scores of one warpgroup, 64 x `BLOCK_N`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Scores: WarpgroupScores;
    /// Output of one warpgroup, 64 x `HEAD_DIM`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Output: WarpgroupOutput<<Self::Scores as ScoreTile>::Operand, Rows = <Self::Scores as Accumulator>::Rows>;
}

/// Largest number of consumer warpgroups of a block.
pub const MAX_CONSUMERS: u32 = 3;

/// Number of queries of one warpgroup.
pub const HOPPER_ROWS: u32 = 64;

/// Columns of a head's row in shared memory: whole panels of 64, as the tensor memory accelerator swizzles them.
pub const fn panel_columns(head_dim: u32) -> u32 {
    head_dim.next_multiple_of(64)
}

/// Number of slots for tiles of keys, and also for tiles of values: one is multiplied while the next arrives.
pub const HOPPER_SLOTS: u32 = 2;

macro_rules! hopper_shape {
    ($name:ident: $columns:literal keys, head_dim $d:literal, consumers $consumers:literal, registers $few:literal and $many:literal) => {
        #[doc = concat!($columns, " keys a tile, head_dim ", $d, ", f16 or bf16, wgmma.")]
        pub struct $name<T>(PhantomData<T>);

        hopper_shape!(numbers $name: $columns keys, head_dim $d, consumers $consumers, registers $few and $many {});

        const _: () = {
            assert!($columns % 16 == 0 && $d % 16 == 0);
            // Every panel must start at the start of a swizzle pattern.
            assert!(($columns * 128) % 1024 == 0);
        };
    };
    // The numbers and products of a shape, with the constants of its own.
    (numbers $name:ident: $columns:literal keys, head_dim $d:literal, consumers $consumers:literal, registers $few:literal and $many:literal {
        $($own:tt)*
    }) => {
        #[cfg(target_arch = "nvptx64")]
        impl<T: crate::ptx::matrix::Half> HopperShape for $name<T>
        where
            [[f32; 4]; $columns / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; $d / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
        {
            hopper_shape!(constants $columns, $d, $consumers, $few, $many);
            $($own)*
            type Element = T;
            type Scores = Fragments<T, 1, { $columns / 8 }>;
            type Output = Fragments<T, 1, { $d / 8 }>;
        }

        #[cfg(not(target_arch = "nvptx64"))]
        impl<T> HopperShape for $name<T> {
            hopper_shape!(constants $columns, $d, $consumers, $few, $many);
            $($own)*
        }

        const _: () = {
            assert!(<$name<F16> as HopperShape>::SHARED_BYTES <= HOPPER_SHARED_BYTES && $consumers <= MAX_CONSUMERS);
            // setmaxnreg cannot exceed the pool: the registers of producers and consumers together are at most those
            // of the launch.
            assert!($few + $consumers * $many <= ($consumers + 1) * (REGISTERS / 128 / ($consumers + 1) / 8 * 8));
            assert!($few % 8 == 0 && $many % 8 == 0);
        };
    };
    (constants $columns:literal, $d:literal, $consumers:literal, $few:literal, $many:literal) => {
        const HEAD_DIM: u32 = $d;
        const BLOCK_N: u32 = $columns;
        const CONSUMERS: u32 = $consumers;
        const PRODUCER_REGISTERS: u32 = $few;
        const CONSUMER_REGISTERS: u32 = $many;
    };
}

// Hopper, forward. A lane holds scores, their rounding to 16 bits and the output: (3/4 block_n + 1/2 head_dim) registers
// and some 40 more. Two consumers of 240 registers hold 176 keys at head_dim 128; under a causal mask, where a wide tile on the
// diagonal is half in vain, 128. At 64, three of 160 hold 128, and share each tile of keys between more queries. At 96, 128 full,
// 192 and 256 shared memory is full: 192, 208, 216 and 224 KiB.
hopper_shape!(HopperD64: 128 keys, head_dim 64, consumers 3, registers 32 and 160);
hopper_shape!(HopperD96: 160 keys, head_dim 96, consumers 2, registers 40 and 232);
hopper_shape!(HopperD128: 176 keys, head_dim 128, consumers 2, registers 24 and 240);
hopper_shape!(HopperD128Causal: 128 keys, head_dim 128, consumers 2, registers 40 and 232);
hopper_shape!(HopperD192: 112 keys, head_dim 192, consumers 2, registers 40 and 232);
hopper_shape!(HopperD256: 80 keys, head_dim 256, consumers 2, registers 24 and 240);
// Programs that load or draw want registers: two consumers at 64, fewer keys beyond.
hopper_shape!(HopperProgramD64: 128 keys, head_dim 64, consumers 2, registers 40 and 232);
hopper_shape!(HopperProgramD96: 128 keys, head_dim 96, consumers 2, registers 24 and 240);
hopper_shape!(HopperProgramD128: 96 keys, head_dim 128, consumers 2, registers 40 and 232);
hopper_shape!(HopperProgramD192: 80 keys, head_dim 192, consumers 2, registers 24 and 240);
hopper_shape!(HopperProgramD256: 64 keys, head_dim 256, consumers 2, registers 24 and 240);

/// Number of blocks of a cluster, where a kernel has clusters. The blocks own neighbouring tiles of queries, and each loads a part of
/// each tile of keys and values for all of them.
pub const CLUSTER: u32 = 2;

// A block's part of a tile is whole groups of 8 rows, after which the swizzle repeats.
const _: () = {
    assert!(<HopperD128<F16> as HopperShape>::BLOCK_N % (8 * CLUSTER) == 0);
    assert!(<HopperD192<F16> as HopperShape>::BLOCK_N % (8 * CLUSTER) == 0);
    assert!(<HopperD256<F16> as HopperShape>::BLOCK_N % (8 * CLUSTER) == 0);
};

/// A compiled tile shape of a backward kernel for Hopper up to head_dim 128: two consumer warpgroups that each own 64 rows.
pub trait HopperBackwardShape {
    /// Largest head_dim of the tile; the loader masks a narrower head.
    const HEAD_DIM: u32;
    /// Number of queries of a streamed tile.
    const COLUMNS: u32;

    /// Number of consumer warpgroups.
    const CONSUMERS: u32 = 2;
    /// Number of rows that a block owns.
    const ROWS: u32 = Self::CONSUMERS * HOPPER_ROWS;
    /// Registers of a producer thread and of a consumer thread.
    const REGISTERS: (u32, u32) = (24, 240);
    /// True if the products for dK of a streamed tile continue into the next tile. If false, the registers of their
    /// operand are free by then, for scores that are twice as wide.
    const SUMS_RUN_ON: bool = Self::COLUMNS < 128;
    /// Eighths of a step's exponentials that come before the wait for dP. The others share the time of the gradients of
    /// scores.
    const EIGHTHS_FIRST: usize = if Self::COLUMNS < 128 { 5 } else { 4 };
    /// Threads per block.
    const THREADS: u32 = (Self::CONSUMERS + 1) * 128;
    /// Size of the rows of one warpgroup in one owned tensor, in bytes.
    const OWNED_BYTES: u32 = HOPPER_ROWS * panel_columns(Self::HEAD_DIM) * 2;
    /// Size of one streamed tile, in bytes.
    const STREAMED_BYTES: u32 = Self::COLUMNS * panel_columns(Self::HEAD_DIM) * 2;
    /// Size of one warpgroup's dS^T in bytes, which it publishes to the other warpgroup.
    const DS_BYTES: u32 = HOPPER_ROWS * Self::COLUMNS * 2;
    /// Size of one warpgroup's square of dQ on its way to device memory, in bytes: 64 x 64, f32.
    const DQ_BYTES: u32 = HOPPER_ROWS * 64 * 4;
    /// Size of all tiles, in bytes: two owned, slots of two streamed ones and of dS^T, and dQ.
    const TILES_BYTES: u32 = Self::CONSUMERS * (2 * Self::OWNED_BYTES + HOPPER_SLOTS * Self::DS_BYTES + Self::DQ_BYTES)
        + 2 * HOPPER_SLOTS * Self::STREAMED_BYTES;
    /// Dynamic shared memory of a block, in bytes: the tiles; three f32 for each streamed row; two barriers for the
    /// owned tiles, for each slot and for each warpgroup's dQ; two words; and one word for each owned row.
    const SHARED_BYTES: u32 = Self::TILES_BYTES
        + HOPPER_SLOTS * 3 * Self::COLUMNS * 4
        + (2 + HOPPER_SLOTS + Self::CONSUMERS) * 16
        + Self::ROWS * 4;

    /// Returns the 64 queries of a streamed tile, and the 64 columns of their dQ, that warpgroup `group` computes.
    #[inline(always)]
    fn square(group: u32) -> (u32, u32) {
        if Self::HEAD_DIM <= 64 { (group, 0) } else { (0, group) }
    }

    /// Element type of q, k, v and out.
    #[cfg(target_arch = "nvptx64")]
    type Element: Element;
    /// Product of two tiles of one warpgroup, 64 x `COLUMNS`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Scores: WarpgroupScores;
    /// Gradient of one warpgroup, 64 x `HEAD_DIM`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Output: WarpgroupOutput<<Self::Scores as ScoreTile>::Operand, Rows = <Self::Scores as Accumulator>::Rows>;
    /// Square of dQ of one warpgroup.
    #[cfg(target_arch = "nvptx64")]
    type Square: WarpgroupSquare;
}

macro_rules! hopper_backward_shape {
    ($name:ident: $columns:literal streamed, head_dim $d:literal) => {
        #[doc = concat!("128 owned rows, ", $columns, " streamed, head_dim ", $d, ", f16 or bf16, wgmma.")]
        pub struct $name<T>(PhantomData<T>);

        #[cfg(target_arch = "nvptx64")]
        impl<T: crate::ptx::matrix::Half> HopperBackwardShape for $name<T>
        where
            [[f32; 4]; $columns / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; $d / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; 8]: crate::ptx::wgmma::WarpgroupMma<T>,
        {
            hopper_backward_shape!(numbers $columns, $d);
            type Element = T;
            type Scores = Fragments<T, 1, { $columns / 8 }>;
            type Output = Fragments<T, 1, { $d / 8 }>;
            type Square = Square<T>;
        }

        #[cfg(not(target_arch = "nvptx64"))]
        impl<T> HopperBackwardShape for $name<T> {
            hopper_backward_shape!(numbers $columns, $d);
        }

        const _: () = {
            assert!($columns % 16 == 0 && $d % 16 == 0);
            // Every panel must start at the start of a swizzle pattern.
            assert!(($columns * 128) % 1024 == 0 && <$name<F16> as HopperBackwardShape>::SHARED_BYTES <= HOPPER_SHARED_BYTES);
            // dQ of a streamed tile is one square for each warpgroup, one below the other or side by side.
            assert!($columns * panel_columns($d) == 2 * 64 * 64);
        };
    };
    (numbers $columns:literal, $d:literal) => {
        const HEAD_DIM: u32 = $d;
        const COLUMNS: u32 = $columns;
    };
}

// Hopper, backward. A lane holds scores and dP (half a register a streamed row each), their roundings (a quarter
// each), and head_dim / 2 for each of two gradients. At 64 it streams 128 queries, so that the waits of a step come half as often:
// 64 + 64 + 32 + 64 registers, and those of addresses.
hopper_backward_shape!(HopperBackwardD64: 128 streamed, head_dim 64);
hopper_backward_shape!(HopperBackwardD96: 64 streamed, head_dim 96);
hopper_backward_shape!(HopperBackwardD128: 64 streamed, head_dim 128);

mod fp8;

pub use fp8::*;
