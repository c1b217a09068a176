//! Compiled tile shapes of the backward kernel for Hopper above head_dim 128.

use super::*;

/// A compiled tile shape of the backward kernel for Hopper above head_dim 128. The consumer warpgroups share the keys of a
/// tile of scores between them, and the columns of each gradient.
pub trait WideBackwardShape {
    /// Largest head_dim of the tile; the loader masks a narrower head.
    const HEAD_DIM: u32;
    /// Number of keys that a block owns.
    const ROWS: u32;
    /// Number of consumer warpgroups.
    const CONSUMERS: u32;
    /// Registers of a producer thread and of a consumer thread.
    const REGISTERS: (u32, u32);

    /// Number of queries of a streamed tile.
    const COLUMNS: u32 = HOPPER_ROWS;
    /// Number of a tile's keys whose scores a warpgroup computes.
    const SHARE: u32 = Self::ROWS / Self::CONSUMERS;
    /// Number of slices of a head, 64 columns each.
    const ALL_SLICES: u32 = Self::HEAD_DIM / 64;
    /// Number of slices of dK, dV and dQ that a warpgroup computes.
    const SLICES: u32 = Self::ALL_SLICES / Self::CONSUMERS;
    /// Threads per block.
    const THREADS: u32 = (Self::CONSUMERS + 1) * 128;
    /// Size of the tile of K or V, in bytes.
    const OWNED_BYTES: u32 = Self::ROWS * Self::HEAD_DIM * 2;
    /// Size of a tile of Q or dO, in bytes.
    const STREAMED_BYTES: u32 = Self::COLUMNS * Self::HEAD_DIM * 2;
    /// Size of the tile of P or dS, in bytes.
    const SCORES_BYTES: u32 = Self::COLUMNS * panel_columns(Self::ROWS) * 2;
    /// Size of all tiles, in bytes: K and V, the slots of Q, dO, P and dS.
    const TILES_BYTES: u32 = 2 * Self::OWNED_BYTES + (HOPPER_SLOTS + 1) * Self::STREAMED_BYTES + 2 * Self::SCORES_BYTES;
    /// Dynamic shared memory of a block, in bytes: the tiles; two f32 for each query of a slot of Q, and one for each of dO;
    /// two barriers for K with V, for each slot of Q, for dO, and for each warpgroup's turns; two words; and one word for each
    /// key.
    const SHARED_BYTES: u32 = Self::TILES_BYTES
        + (2 * HOPPER_SLOTS + 1) * Self::COLUMNS * 4
        + (2 + HOPPER_SLOTS + Self::CONSUMERS) * 16
        + 16
        + Self::ROWS * 4;

    /// Element type of q, k, v and out.
    #[cfg(target_arch = "nvptx64")]
    type Element: Element;
    /// Scores of one warpgroup, 64 x `SHARE`, f32.
    #[cfg(target_arch = "nvptx64")]
    type Scores: WarpgroupScores;
    /// Slices of dK^T or dV^T of one warpgroup, 64 x `ROWS` each, f32.
    #[cfg(target_arch = "nvptx64")]
    type Slices: WarpgroupSlices;
    /// A slice of dQ, 64 x 64, f32.
    #[cfg(target_arch = "nvptx64")]
    type Square: WarpgroupSquare;
}

macro_rules! wide_backward_shape {
    ($name:ident: $rows:literal keys, head_dim $d:literal, consumers $consumers:literal, registers $few:literal and $many:literal) => {
        #[doc = concat!($rows, " keys a block, 64 queries a tile, head_dim ", $d, ", f16 or bf16, wgmma.")]
        pub struct $name<T>(PhantomData<T>);

        #[cfg(target_arch = "nvptx64")]
        impl<T: crate::ptx::matrix::Half> WideBackwardShape for $name<T>
        where
            [[f32; 4]; $rows / $consumers / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; $rows / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; 8]: crate::ptx::wgmma::WarpgroupMma<T>,
        {
            wide_backward_shape!(numbers $rows, $d, $consumers, $few, $many);
            type Element = T;
            type Scores = Fragments<T, 1, { $rows / $consumers / 8 }>;
            type Slices = [Fragments<T, 1, { $rows / 8 }>; $d / 64 / $consumers];
            type Square = Square<T>;
        }

        #[cfg(not(target_arch = "nvptx64"))]
        impl<T> WideBackwardShape for $name<T> {
            wide_backward_shape!(numbers $rows, $d, $consumers, $few, $many);
        }

        const _: () = {
            type Shape = $name<F16>;
            assert!($rows % 16 == 0 && $rows % (8 * $consumers) == 0 && $d % (64 * $consumers) == 0);
            assert!($consumers <= MAX_CONSUMERS && Shape::SHARED_BYTES <= HOPPER_SHARED_BYTES);
            // Each thread of the consumers has at most one key when the block's keys are looked through.
            assert!($rows <= $consumers * 128);
            assert!($few + $consumers * $many <= ($consumers + 1) * (REGISTERS / 128 / ($consumers + 1) / 8 * 8));
            assert!($few % 8 == 0 && $many % 8 == 0);
        };
    };
    (numbers $rows:literal, $d:literal, $consumers:literal, $few:literal, $many:literal) => {
        const HEAD_DIM: u32 = $d;
        const ROWS: u32 = $rows;
        const CONSUMERS: u32 = $consumers;
        const REGISTERS: (u32, u32) = ($few, $many);
    };
}

// A lane holds dK and dV (1/2 register a key and slice each), scores and dP (1/2 a key of its share each), and a slice of
// dQ (32): 96 + 32 + 32 registers at 192, 160 + 40 + 32 at 256.
wide_backward_shape!(HopperBackwardD192: 96 keys, head_dim 192, consumers 3, registers 32 and 160);
wide_backward_shape!(HopperBackwardD256: 80 keys, head_dim 256, consumers 2, registers 24 and 240);

/// Returns the rows of the box in which a backward kernel of `block_n` keys a block loads and stores them: the keys of one
/// warpgroup where each has whole keys to itself, else all.
pub const fn key_box_rows(block_n: u32) -> u32 {
    if block_n.is_multiple_of(HOPPER_ROWS) {
        HOPPER_ROWS
    } else {
        block_n
    }
}

const _: () = {
    assert!(key_box_rows(<HopperBackwardD192<F16> as WideBackwardShape>::ROWS) == 96);
    assert!(key_box_rows(<HopperBackwardD256<F16> as WideBackwardShape>::ROWS) == 80);
};
