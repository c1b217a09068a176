//! A tile in shared memory as the tensor memory accelerator writes it and a warpgroup's products read it: panels of 64
//! columns of 16 bits, each a stack of rows of 128 bytes whose 16-byte chunks are swizzled.
//!
//! PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": with rows of 128 bytes the pattern repeats every 8
//! rows, 1024 bytes, and that is the unit that descriptors count in.

use super::swizzle::swizzle;
use crate::ptx::tma::{self, Corner};

/// Columns of a panel.
pub const PANEL_COLUMNS: u32 = 64;
/// Bytes of a row of a panel.
const ROW_BYTES: u32 = 128;
/// Bytes of 8 rows of a panel.
const EIGHT_ROWS: u32 = 8 * ROW_BYTES;
/// A step of 16 along k, in elements.
const K_STEP: u32 = 16;

/// `panels` panels of `rows` rows each.
#[derive(Clone, Copy)]
pub struct Panels {
    base: u32,
    rows: u32,
    panels: u32,
}

impl Panels {
    /// The tile at shared-window address `base`, a multiple of 1024; `rows` is a multiple of 8.
    #[inline(always)]
    pub fn new(base: u32, rows: u32, head_dim: u32) -> Self {
        Self {
            base,
            rows,
            panels: head_dim / PANEL_COLUMNS,
        }
    }

    /// Bytes of the tile.
    #[inline(always)]
    pub fn bytes(self) -> u32 {
        self.panels * self.panel_bytes()
    }

    #[inline(always)]
    fn panel_bytes(self) -> u32 {
        self.rows * ROW_BYTES
    }

    /// Steps of 16 along a row.
    #[inline(always)]
    pub fn k_steps(self) -> u32 {
        self.panels * PANEL_COLUMNS / K_STEP
    }

    /// Descriptor of k step `k` where k runs along the rows: Q and K in Q K^T.
    #[inline(always)]
    pub fn along_rows(self, k: u32) -> u64 {
        let steps = PANEL_COLUMNS / K_STEP;
        let offset = k / steps * self.panel_bytes() + k % steps * K_STEP * 2;
        descriptor(self.base, 0) + field(offset)
    }

    /// Descriptor of k step `k` where k runs down the rows: V in P V. All panels side by side are the product's columns.
    #[inline(always)]
    pub fn down_rows(self, k: u32) -> u64 {
        descriptor(self.base, self.panel_bytes()) + field(k * K_STEP * ROW_BYTES)
    }

    /// Address of the pair of columns `column`, `column + 1` of row `row`; `column` is even.
    #[inline(always)]
    pub fn pair(self, row: u32, column: u32) -> u32 {
        let chunk = swizzle(row, column % PANEL_COLUMNS / 8, ROW_BYTES);
        self.base + column / PANEL_COLUMNS * self.panel_bytes() + row * ROW_BYTES + chunk * 16 + column % 8 * 2
    }

    /// Starts to fill the tile from `corner` on; `barrier` counts [`bytes`](Self::bytes).
    ///
    /// # Safety
    /// `map`'s box is `rows` x 64, and see [`tma::load`]. One thread calls it.
    #[inline(always)]
    pub unsafe fn load(self, map: u64, corner: Corner, barrier: u32) {
        for panel in 0..self.panels {
            let (dst, corner) = self.panel(panel, corner);
            // SAFETY: the caller's contract.
            unsafe { tma::load(dst, map, corner, barrier) }
        }
    }

    /// Starts to store the tile from `corner` on.
    ///
    /// # Safety
    /// `map`'s box is `rows` x 64, and see [`tma::store`]. One thread calls it.
    #[inline(always)]
    pub unsafe fn store(self, map: u64, corner: Corner) {
        for panel in 0..self.panels {
            let (src, corner) = self.panel(panel, corner);
            // SAFETY: the caller's contract.
            unsafe { tma::store(map, corner, src) }
        }
    }

    #[inline(always)]
    fn panel(self, panel: u32, corner: Corner) -> (u32, Corner) {
        let column = corner.column + panel * PANEL_COLUMNS;
        (self.base + panel * self.panel_bytes(), Corner { column, ..corner })
    }
}

/// A matrix descriptor with the 128-byte swizzle: `start` is a shared-window address, `leading` the bytes from one panel to the
/// next. Shared memory ends below 2^18, so an offset can be added to the start without spilling into the next field.
#[inline(always)]
fn descriptor(start: u32, leading: u32) -> u64 {
    field(start) | field(leading) << 16 | field(EIGHT_ROWS) << 32 | 1 << 62
}

/// A number of bytes as descriptors hold it.
#[inline(always)]
fn field(bytes: u32) -> u64 {
    (bytes >> 4) as u64
}
