//! A window of a tensor in global memory: rows of one head that a block reads or writes.

use super::shared::{CHUNK, Split};
use crate::abi::{Layout, StridedTensor};
use crate::ptx::memory;

/// Rows of one head.
#[derive(Clone, Copy)]
pub struct GlobalTile {
    base: u64,
    row_bytes: u64,
    rows: u32,
    chunks: u32,
    element_bytes: u32,
    /// True if every chunk is 16-byte aligned.
    pub aligned: bool,
}

impl GlobalTile {
    /// Returns the first `rows` rows of head (`batch`, `head`).
    #[inline(always)]
    pub fn new(t: &StridedTensor, batch: u32, head: u32, rows: u32, layout: &Layout, element_bytes: u32) -> Self {
        let offset = batch as u64 * t.batch_stride + head as u64 * t.head_stride;
        Self {
            base: t.address + offset * element_bytes as u64,
            row_bytes: t.row_stride * element_bytes as u64,
            rows,
            chunks: layout.head_dim * element_bytes / CHUNK,
            element_bytes,
            aligned: layout.aligned != 0,
        }
    }

    /// Returns the window that starts `row` rows further down; it is empty if there are fewer rows.
    #[inline(always)]
    pub fn rows_from(&self, row: u32) -> Self {
        Self {
            base: self.base + row as u64 * self.row_bytes,
            rows: self.rows.saturating_sub(row),
            ..*self
        }
    }

    /// Returns the window that starts `chunk` chunks further right; it is empty if there are fewer chunks.
    #[inline(always)]
    pub fn chunks_from(&self, chunk: u32) -> Self {
        Self {
            base: self.base + (chunk * CHUNK) as u64,
            chunks: self.chunks.saturating_sub(chunk),
            ..*self
        }
    }

    /// Returns the number of chunks of a row.
    #[inline(always)]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Returns the number of rows that exist.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Returns the address of an element.
    #[inline(always)]
    pub fn element_address(&self, row: u32, column: u32) -> u64 {
        self.base + row as u64 * self.row_bytes + (column * self.element_bytes) as u64
    }

    /// Returns true if chunk `chunk` of row `row` exists.
    #[inline(always)]
    pub fn contains(&self, row: u32, chunk: u32) -> bool {
        row < self.rows && chunk < self.chunks
    }

    /// Returns the address of chunk `chunk` of row `row`.
    #[inline(always)]
    pub fn address(&self, row: u32, chunk: u32) -> u64 {
        self.base + row as u64 * self.row_bytes + (chunk * CHUNK) as u64
    }

    /// Reads a chunk, element by element if it may be unaligned.
    ///
    /// # Safety
    /// The chunk exists and is readable.
    #[inline(always)]
    pub unsafe fn load(&self, row: u32, chunk: u32) -> [u32; 4] {
        let address = self.address(row, chunk);
        // SAFETY: the caller's contract.
        unsafe {
            if self.aligned {
                memory::ld_global_words(address)
            } else {
                self.gather(address)
            }
        }
    }

    /// Reads 16 bytes at `address`, element by element.
    ///
    /// # Safety
    /// The bytes are readable.
    #[inline(always)]
    unsafe fn gather(&self, address: u64) -> [u32; 4] {
        let mut words = [0; 4];
        for i in 0..4 {
            let at = address + i as u64 * 4;
            // SAFETY: the caller's contract, and elements are aligned to their own size.
            words[i] = unsafe {
                match self.element_bytes {
                    4 => memory::ld_global_u32(at),
                    _ => memory::ld_global_u16(at) as u32 | (memory::ld_global_u16(at + 2) as u32) << 16,
                }
            };
        }
        words
    }

    /// Writes a chunk, element by element if it may be unaligned.
    ///
    /// # Safety
    /// The chunk exists, is writable, and no other thread accesses it.
    #[inline(always)]
    pub unsafe fn store(&self, row: u32, chunk: u32, words: [u32; 4]) {
        let address = self.address(row, chunk);
        // SAFETY: the caller's contract, and elements are aligned to their own size.
        unsafe {
            if self.aligned {
                memory::st_global_words(address, words);
                return;
            }
            for i in 0..4 {
                let at = address + i as u64 * 4;
                if self.element_bytes == 4 {
                    memory::st_global_u32(at, words[i]);
                } else {
                    memory::st_global_u16(at, words[i] as u16);
                    memory::st_global_u16(at + 2, (words[i] >> 16) as u16);
                }
            }
        }
    }
}

/// The chunks of a window that one thread copies, row by row and tile by tile.
///
/// An address that advances takes two registers. Recomputing addresses would take two registers per row, once the
/// compiler has hoisted the products.
#[derive(Clone, Copy)]
pub struct Walk {
    address: u64,
    step_bytes: u64,
    row: u32,
    window: GlobalTile,
    /// Division of the tile's chunks among threads.
    pub split: Split,
}

impl Walk {
    /// Starts at the top of `window`.
    #[inline(always)]
    pub fn new(window: GlobalTile, split: Split) -> Self {
        let address = window.address(split.row, split.chunk);
        Self {
            address,
            step_bytes: split.rows as u64 * window.row_bytes,
            row: split.row,
            window,
            split,
        }
    }

    /// Returns true if 16-byte accesses are allowed.
    #[inline(always)]
    pub fn aligned(&self) -> bool {
        self.window.aligned
    }

    /// Advances to this thread's next row.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.address += self.step_bytes;
        self.row += self.split.rows;
    }

    /// Returns the address of the thread's chunk `j` in its current row, and true if it exists.
    #[inline(always)]
    pub fn chunk(&self, j: u32) -> (u64, bool) {
        let exists = self.window.contains(self.row, self.split.chunk + j * self.split.chunks);
        (self.address + (j * self.split.chunks * CHUNK) as u64, exists)
    }

    /// Reads this chunk element by element, since it may be unaligned; zeros if it does not exist.
    ///
    /// # Safety
    /// The window is readable.
    #[inline(always)]
    pub unsafe fn gather(&self, j: u32) -> [u32; 4] {
        let (address, exists) = self.chunk(j);
        // SAFETY: the chunk exists.
        if exists {
            unsafe { self.window.gather(address) }
        } else {
            [0; 4]
        }
    }
}
