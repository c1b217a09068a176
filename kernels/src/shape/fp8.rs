//! Compiled tile shapes of the forward kernel for Hopper over e4m3 inputs. `T` is the type of out.

use super::*;
use crate::abi::FP8_SCALE_ROWS;
#[cfg(target_arch = "nvptx64")]
use crate::tile::codes::{CodeOutput, CodeScores};

/// Columns of a head's row of codes in shared memory: whole panels of 128 bytes.
pub const fn code_columns(head_dim: u32) -> u32 {
    head_dim.next_multiple_of(128)
}

/// Size of the data that the kernel keeps beside its tiles, in bytes. There are 16 bytes each for a slot of loaded values (two
/// barriers), a slot of keys (the scales of the tile, up to four f32) and a slot of transposed values (one word for each warp of the
/// producer).
pub const FP8_NOTES_BYTES: u32 = HOPPER_SLOTS * (16 + 16 + 16);

/// A shape of the kernel over codes: its products.
///
/// [`QUERY_BYTES`](HopperShape::QUERY_BYTES) is the size of the output of one warpgroup, which replaces its queries.
#[cfg(target_arch = "nvptx64")]
pub trait CodeShape:
    HopperShape<Scores = <Self as CodeShape>::OfCodes, Output = <Self as CodeShape>::OutputOfCodes>
{
    /// Size of the queries of one warpgroup, in bytes.
    const QUERY_CODES_BYTES: u32 = HOPPER_ROWS * code_columns(Self::HEAD_DIM);
    /// Eighths of a step's exponentials that come before the wait for the output. The others share the time of sums, rescaling and
    /// packing. Of wider heads the output takes longer, and is rarely rescaled.
    const EIGHTHS_BEFORE: usize = if Self::HEAD_DIM <= 128 { 3 } else { 7 };
    /// Number of blocks of a tile of keys that have a scale each.
    const BLOCKS: usize = (Self::BLOCK_N / FP8_SCALE_ROWS) as usize;

    /// [`HopperShape::Scores`].
    type OfCodes: WarpgroupScores + CodeScores;
    /// [`HopperShape::Output`].
    type OutputOfCodes: WarpgroupOutput<<Self::OfCodes as ScoreTile>::Operand, Rows = <Self::OfCodes as Accumulator>::Rows>
        + CodeOutput<<Self::OfCodes as CodeScores>::Codes>;
}

macro_rules! code_shape {
    ($name:ident: $columns:literal keys, head_dim $d:literal, consumers $consumers:literal, registers $few:literal and $many:literal) => {
        #[doc = concat!($columns, " keys a tile, head_dim ", $d, ", e4m3 to f16 or bf16, wgmma.")]
        pub struct $name<T>(PhantomData<T>);

        hopper_shape!(numbers $name: $columns keys, head_dim $d, consumers $consumers, registers $few and $many {
            /// Size of a tile of keys, or of values as they are loaded, in bytes.
            const TILE_BYTES: u32 = $columns * code_columns($d);
            /// The queries; slots of keys, of loaded values, and of transposed values; and notes.
            const TILES_BYTES: u32 = Self::CONSUMERS * Self::QUERY_BYTES
                + HOPPER_SLOTS * (2 * Self::TILE_BYTES + $d * $columns)
                + FP8_NOTES_BYTES;
        });

        #[cfg(target_arch = "nvptx64")]
        impl<T: crate::ptx::matrix::Half> CodeShape for $name<T>
        where
            [[f32; 4]; $columns / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
            [[f32; 4]; $d / 8]: crate::ptx::wgmma::WarpgroupMma<T>,
        {
            type OfCodes = Fragments<T, 1, { $columns / 8 }>;
            type OutputOfCodes = Fragments<T, 1, { $d / 8 }>;
        }

        const _: () = {
            type Shape = $name<F16>;
            // A tile has one block of scales or two; its transposed values fill rows of 128 bytes, alone or with the other slot.
            assert!($columns == FP8_SCALE_ROWS || $columns == 2 * FP8_SCALE_ROWS);
            // The producer transposes squares of 16 keys and 32 columns.
            assert!($d % 32 == 0);
            assert!(HOPPER_ROWS * code_columns($d) <= <Shape as HopperShape>::QUERY_BYTES);
            // Every panel must start at the start of a swizzle pattern.
            assert!(<Shape as HopperShape>::QUERY_BYTES % 1024 == 0 && $d * 128 % 1024 == 0);
        };
    };
}

// A lane holds scores, their codes and the output: (5/8 block_n + 1/2 head_dim) registers and some 40 more. The transposed values of 128
// keys have rows of 128 bytes; at 256 those of 64 keys, of which two slots share rows.
code_shape!(CodesD64: 128 keys, head_dim 64, consumers 3, registers 32 and 160);
code_shape!(CodesD96: 128 keys, head_dim 96, consumers 2, registers 40 and 232);
code_shape!(CodesD128: 128 keys, head_dim 128, consumers 2, registers 40 and 232);
code_shape!(CodesD192: 128 keys, head_dim 192, consumers 2, registers 40 and 232);
code_shape!(CodesD256: 64 keys, head_dim 256, consumers 2, registers 40 and 232);
