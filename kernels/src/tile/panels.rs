//! A tile in shared memory as the tensor memory accelerator writes it and a warpgroup's products read it. It consists
//! of panels of 64 16-bit columns. Each panel is a stack of rows of 128 bytes whose 16-byte chunks are swizzled.
//!
//! PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": with rows of 128 bytes the pattern repeats
//! every 8 rows (1024 bytes), which is the unit of descriptors.

use super::{element::Element, swizzle::swizzle};
use crate::ptx::tma::{self, Corner};
use crate::ptx::{memory, optimizer};

/// Number of columns of a panel.
pub const PANEL_COLUMNS: u32 = 64;
/// Size of a row of a panel, in bytes.
const ROW_BYTES: u32 = 128;
/// Size of 8 rows of a panel, in bytes.
const EIGHT_ROWS: u32 = 8 * ROW_BYTES;
/// Number of elements of a step along k.
const K_STEP: u32 = 16;

/// A tile of panels with `rows` rows each. If `columns` is not a multiple of 64, the last panel is wider than the
/// product.
#[derive(Clone, Copy)]
pub struct Panels {
    base: u32,
    rows: u32,
    columns: u32,
}

impl Panels {
    /// Returns the tile at shared-window address `base`, a multiple of 1024; `rows` is a multiple of 8.
    #[inline(always)]
    pub fn new(base: u32, rows: u32, columns: u32) -> Self {
        Self { base, rows, columns }
    }

    /// Returns panel `index` as a tile.
    #[inline(always)]
    pub fn panel(self, index: u32) -> Self {
        Self::new(self.base + index * self.panel_bytes(), self.rows, PANEL_COLUMNS)
    }

    /// Returns the rows from `first` on, a multiple of 8.
    #[inline(always)]
    pub fn from_row(self, first: u32) -> Self {
        Self {
            base: self.base + first * ROW_BYTES,
            ..self
        }
    }

    /// Returns the number of panels.
    #[inline(always)]
    fn panels(self) -> u32 {
        self.columns.div_ceil(PANEL_COLUMNS)
    }

    #[inline(always)]
    fn panel_bytes(self) -> u32 {
        self.rows * ROW_BYTES
    }

    /// Returns the number of steps of 16 along a row.
    #[inline(always)]
    pub fn k_steps(self) -> u32 {
        self.columns / K_STEP
    }

    /// Returns the number of steps of 16 down the rows.
    #[inline(always)]
    pub fn row_steps(self) -> u32 {
        self.rows / K_STEP
    }

    /// Returns the descriptor of k step `k` where k runs along the rows: Q and K in Q K^T.
    #[inline(always)]
    pub fn along_rows(self, k: u32) -> u64 {
        let steps = PANEL_COLUMNS / K_STEP;
        let offset = k / steps * self.panel_bytes() + k % steps * K_STEP * 2;
        descriptor(self.base, offset, 0)
    }

    /// Returns the descriptor of k step `k` where k runs down the rows: V in P V. All panels side by side are the
    /// product's columns.
    #[inline(always)]
    pub fn down_rows(self, k: u32) -> u64 {
        descriptor(self.base, k * K_STEP * ROW_BYTES, self.panel_bytes())
    }

    /// Returns the address of eight columns of row `row`, from `column` on, a multiple of 8.
    #[inline(always)]
    pub fn chunk(self, row: u32, column: u32) -> u32 {
        let chunk = swizzle(row, column % PANEL_COLUMNS / 8, ROW_BYTES);
        self.base + column / PANEL_COLUMNS * self.panel_bytes() + row * ROW_BYTES + chunk * 16
    }

    /// Returns true if thread number `thread` of `threads` has NaN or infinity in its share of the tile.
    ///
    /// # Safety
    /// The tile is initialised and visible to this thread.
    #[inline(always)]
    pub unsafe fn has_nonfinite<E: Element>(self, thread: u32, threads: u32) -> bool {
        let mut nonfinite = 0;
        let mut at = thread * 16;
        while at < optimizer::renew(self.panels() * self.panel_bytes()) {
            // SAFETY: the caller's contract.
            let words = unsafe { memory::ld_shared_words(self.base + at) };
            for i in 0..4 {
                nonfinite |= E::nonfinite(words[i]);
            }
            at += threads * 16;
        }
        nonfinite != 0
    }

    /// Zeroes NaN and infinity in a row; returns true if there were any.
    ///
    /// # Safety
    /// The tile is initialised and visible to this thread, and no other thread accesses the row meanwhile.
    #[inline(always)]
    pub unsafe fn clean_row<E: Element>(self, row: u32) -> bool {
        let mut nonfinite = 0;
        let mut column = 0;
        while column < optimizer::renew(self.panels() * PANEL_COLUMNS) {
            let address = self.chunk(row, column);
            // SAFETY (whole body): the caller's contract.
            let words = unsafe { memory::ld_shared_words(address) };
            let mut here = 0;
            for i in 0..4 {
                here |= E::nonfinite(words[i]);
            }
            if here != 0 {
                unsafe { memory::st_shared_words(address, words.map(E::finite)) }
            }
            nonfinite |= here;
            column += 8;
        }
        nonfinite != 0
    }

    /// Zeroes NaN and infinity in this thread's share of the tile.
    ///
    /// # Safety
    /// The contract of [`has_nonfinite`](Self::has_nonfinite), and no other thread accesses the share meanwhile.
    #[inline(always)]
    pub unsafe fn zero_nonfinite<E: Element>(self, thread: u32, threads: u32) {
        let mut at = thread * 16;
        while at < optimizer::renew(self.panels() * self.panel_bytes()) {
            let address = self.base + at;
            // SAFETY: the caller's contract.
            unsafe { memory::st_shared_words(address, memory::ld_shared_words(address).map(E::finite)) }
            at += threads * 16;
        }
    }

    /// Starts to fill the tile from `corner` on; `barrier` counts the bytes of all panels.
    ///
    /// # Safety
    /// The box of `map` is `rows` x 64; the contract of [`tma::load`]. One thread calls it.
    #[inline(always)]
    pub unsafe fn load(self, map: u64, corner: Corner, barrier: u32) {
        for index in 0..self.panels() {
            // SAFETY: the caller's contract.
            unsafe { tma::load(self.panel(index).base, map, corner_of(index, corner), barrier) }
        }
    }

    /// Starts to fill a tile of bytes, whose columns are pairs of them, from `corner` on; `barrier` counts the bytes of all panels.
    ///
    /// # Safety
    /// The box of `map` is `rows` x 128 bytes; the contract of [`tma::load`]. One thread calls it.
    #[inline(always)]
    pub unsafe fn load_bytes(self, map: u64, corner: Corner, barrier: u32) {
        for index in 0..self.panels() {
            let corner = Corner {
                column: corner.column + index * ROW_BYTES,
                ..corner
            };
            // SAFETY: the caller's contract.
            unsafe { tma::load(self.panel(index).base, map, corner, barrier) }
        }
    }

    /// Starts to copy the box of `map` at `corner` to this tile's rows from `first` on (a multiple of 8), in every block of the
    /// cluster whose bit is set in `blocks`. The barrier at `barrier` in each of these blocks counts the bytes of all panels.
    ///
    /// # Safety
    /// The box has 64 columns and no more rows than the tile has from `first` on; the contract of [`tma::load_into_blocks`]. One
    /// thread of a block calls it.
    #[inline(always)]
    pub unsafe fn load_rows_into_blocks(self, first: u32, map: u64, corner: Corner, barrier: u32, blocks: u16) {
        for index in 0..self.panels() {
            let dst = self.panel(index).base + first * ROW_BYTES;
            // SAFETY: the caller's contract.
            unsafe { tma::load_into_blocks(dst, map, corner_of(index, corner), barrier, blocks) }
        }
    }

    /// Starts to store panel `index` of the tile, which starts at `corner`.
    ///
    /// # Safety
    /// The contract of [`store`](Self::store).
    #[inline(always)]
    pub unsafe fn store_panel(self, index: u32, map: u64, corner: Corner) {
        // SAFETY: the caller's contract.
        unsafe { tma::store(map, corner_of(index, corner), self.panel(index).base) }
    }

    /// Starts to store the tile from `corner` on.
    ///
    /// # Safety
    /// The box of `map` is `rows` x 64; the contract of [`tma::store`]. One thread calls it.
    #[inline(always)]
    pub unsafe fn store(self, map: u64, corner: Corner) {
        for index in 0..self.panels() {
            // SAFETY: the caller's contract.
            unsafe { self.store_panel(index, map, corner) }
        }
    }
}

/// Returns the start of panel `index` of a tile in the tensor.
#[inline(always)]
fn corner_of(index: u32, tile: Corner) -> Corner {
    Corner {
        column: tile.column + index * PANEL_COLUMNS,
        ..tile
    }
}

/// Makes a matrix descriptor with the 128-byte swizzle: `start` is a shared-window address, `leading` the bytes from
/// one panel to the next. Only the low word is computed. Shared memory ends below 2^18, so a start plus an offset
/// does not overflow into the next field.
#[inline(always)]
fn descriptor(start: u32, offset: u32, leading: u32) -> u64 {
    let low = field(start) + (field(offset) | field(leading) << 16);
    low as u64 | ((field(EIGHT_ROWS) | 1 << 30) as u64) << 32
}

/// Returns a number of bytes as descriptors encode it.
#[inline(always)]
const fn field(bytes: u32) -> u32 {
    bytes >> 4
}
