//! A window of a tensor in global memory: rows of one head that a block reads or writes.

use super::shared::{CHUNK, Split};
use crate::abi::{Layout, PageTable, StridedTensor};
use crate::ptx::{copy, memory};
use crate::work::Divisor;

/// Rows of one head, or of several whose rows are packed.
#[derive(Clone, Copy)]
pub struct GlobalTile<P = Even> {
    base: u64,
    row_bytes: u64,
    places: P,
    rows: u32,
    chunks: u32,
    element_bytes: u32,
    /// True if every chunk is 16-byte aligned.
    pub aligned: bool,
}

/// Places of a window's rows.
///
/// They are a type, and no enum: with the other places in its code, the compiler orders a loop over even rows worse.
pub trait Places: Copy {
    /// Returns the distance of row `row` from the window's base, in bytes. The row exists, unless rows are even.
    fn offset(self, row: u32, row_bytes: u64) -> u64;

    /// Returns the places of the rows from `row` on, and the bytes by which the base of their window lies further.
    fn from(self, row: u32, row_bytes: u64) -> (Self, u64);

    /// Tells if every row lies as far from the row before it as any other.
    fn is_even(self) -> bool;

    /// True if rows are even in every window, which the compiler then knows.
    const ARE_EVEN: bool = false;
}

/// Rows at even distances.
#[derive(Clone, Copy)]
pub struct Even;

impl Places for Even {
    const ARE_EVEN: bool = true;

    #[inline(always)]
    fn offset(self, row: u32, row_bytes: u64) -> u64 {
        row as u64 * row_bytes
    }

    #[inline(always)]
    fn from(self, row: u32, row_bytes: u64) -> (Self, u64) {
        (self, row as u64 * row_bytes)
    }

    #[inline(always)]
    fn is_even(self) -> bool {
        true
    }
}

/// Rows of neighbouring heads: position 0 of all of them, then position 1.
#[derive(Clone, Copy)]
pub struct Packed {
    /// Packed row of row 0.
    first: u32,
    heads: Divisor,
    head_bytes: u64,
}

impl Places for Packed {
    #[inline(always)]
    fn offset(self, row: u32, row_bytes: u64) -> u64 {
        let (position, head) = self.heads.divide(self.first + row);
        position as u64 * row_bytes + head as u64 * self.head_bytes
    }

    #[inline(always)]
    fn from(self, row: u32, _: u64) -> (Self, u64) {
        let first = self.first + row;
        (Self { first, ..self }, 0)
    }

    #[inline(always)]
    fn is_even(self) -> bool {
        false
    }
}

/// Rows in pages, or at even distances if the table's address is 0.
#[derive(Clone, Copy)]
pub struct Paged {
    /// Row of row 0 in its entry.
    first: u32,
    /// Device address of the entry's pages.
    table: u64,
    size: Divisor,
    page_bytes: u64,
}

impl Places for Paged {
    #[inline(always)]
    fn offset(self, row: u32, row_bytes: u64) -> u64 {
        if self.table == 0 {
            return row as u64 * row_bytes;
        }
        let (page, at) = self.size.divide(self.first + row);
        // SAFETY: the table lists the page of every row that exists.
        let page = unsafe { memory::ld_global_u32(self.table + page as u64 * 4) };
        page as u64 * self.page_bytes + at as u64 * row_bytes
    }

    #[inline(always)]
    fn from(self, row: u32, row_bytes: u64) -> (Self, u64) {
        if self.table == 0 {
            return (self, row as u64 * row_bytes);
        }
        let first = self.first + row;
        (Self { first, ..self }, 0)
    }

    #[inline(always)]
    fn is_even(self) -> bool {
        self.table == 0
    }
}

impl GlobalTile {
    /// Returns the first `rows` rows of head (`batch`, `head`).
    #[inline(always)]
    pub fn new(t: &StridedTensor, batch: u32, head: u32, rows: u32, layout: &Layout, element_bytes: u32) -> Self {
        let offset = batch as u64 * t.batch_stride + head as u64 * t.head_stride;
        Self {
            base: t.address + offset * element_bytes as u64,
            row_bytes: t.row_stride * element_bytes as u64,
            places: Even,
            rows,
            chunks: layout.head_dim * element_bytes / CHUNK,
            element_bytes,
            aligned: layout.aligned != 0,
        }
    }

    /// Returns the window of `heads` heads of t, of which it is the first, with their rows packed.
    #[inline(always)]
    pub fn packed(self, t: &StridedTensor, heads: Divisor) -> GlobalTile<Packed> {
        let places = Packed {
            first: 0,
            heads,
            head_bytes: t.head_stride * self.element_bytes as u64,
        };
        self.with_places(self.base, self.rows * heads.value, places)
    }

    /// Returns the window of the rows from `first` on of entry `entry` of t, of which it is entry 0, or of the pages that hold that
    /// entry's rows.
    #[inline(always)]
    pub fn paged(self, t: &StridedTensor, pages: &PageTable, entry: u32, first: u32) -> GlobalTile<Paged> {
        let page_bytes = t.batch_stride * self.element_bytes as u64;
        let (base, table) = if pages.table == 0 {
            let begin = entry as u64 * page_bytes + first as u64 * self.row_bytes;
            (self.base + begin, 0)
        } else {
            (self.base, pages.table + entry as u64 * pages.entries as u64 * 4)
        };
        let places = Paged {
            first,
            table,
            size: pages.size,
            page_bytes,
        };
        self.with_places(base, self.rows, places)
    }

    #[inline(always)]
    fn with_places<P: Places>(self, base: u64, rows: u32, places: P) -> GlobalTile<P> {
        GlobalTile {
            base,
            row_bytes: self.row_bytes,
            places,
            rows,
            chunks: self.chunks,
            element_bytes: self.element_bytes,
            aligned: self.aligned,
        }
    }
}

impl<P: Places> GlobalTile<P> {
    /// Returns the window that starts `row` rows further down; it is empty if there are fewer rows.
    #[inline(always)]
    pub fn rows_from(&self, row: u32) -> Self {
        let (places, further) = self.places.from(row, self.row_bytes);
        Self {
            base: self.base + further,
            places,
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

    /// Returns the address of an element of a row, which exists unless rows are even.
    #[inline(always)]
    pub fn element_address(&self, row: u32, column: u32) -> u64 {
        self.base + self.places.offset(row, self.row_bytes) + (column * self.element_bytes) as u64
    }

    /// Returns true if chunk `chunk` of row `row` exists.
    #[inline(always)]
    pub fn contains(&self, row: u32, chunk: u32) -> bool {
        row < self.rows && chunk < self.chunks
    }

    /// Returns the address of chunk `chunk` of row `row`, which exists unless rows are even.
    #[inline(always)]
    pub fn address(&self, row: u32, chunk: u32) -> u64 {
        self.base + self.places.offset(row, self.row_bytes) + (chunk * CHUNK) as u64
    }

    /// Returns the address of chunk `chunk` of row `row`, or some number if the row does not exist.
    #[inline(always)]
    fn address_if_any(&self, row: u32, chunk: u32) -> u64 {
        if self.places.is_even() || row < self.rows {
            self.address(row, chunk)
        } else {
            0
        }
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
pub struct Walk<P = Even> {
    address: u64,
    step_bytes: u64,
    /// Number of the window's rows from this thread's row on; not positive past the end.
    left: i32,
    window: GlobalTile<P>,
    /// Division of the tile's chunks among threads.
    pub split: Split,
}

impl<P: Places> Walk<P> {
    /// Starts at the top of `window`.
    #[inline(always)]
    pub fn new(window: GlobalTile<P>, split: Split) -> Self {
        Self {
            address: window.address_if_any(split.row, split.chunk),
            step_bytes: split.rows as u64 * window.row_bytes,
            left: window.rows.wrapping_sub(split.row) as i32,
            window,
            split,
        }
    }

    /// Continues at row `row` of the window, which may lie past its end.
    #[inline(always)]
    pub fn seek(&mut self, row: u32) {
        let row = row + self.split.row;
        self.left = self.window.rows.wrapping_sub(row) as i32;
        self.address = self.window.address_if_any(row, self.split.chunk);
    }

    /// Returns the rows of the window.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.window.rows
    }

    /// Returns the number of the window's rows from this thread's row on; it is not positive past the end.
    #[inline(always)]
    pub fn left(&self) -> i32 {
        self.left
    }

    /// Takes over the number of another walk, which is the number of this one.
    #[inline(always)]
    pub fn set_left(&mut self, left: i32) {
        self.left = left;
    }

    /// Returns true if 16-byte accesses are allowed.
    #[inline(always)]
    pub fn aligned(&self) -> bool {
        self.window.aligned
    }

    /// Advances to this thread's next row.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.next_address();
        self.left -= self.split.rows as i32;
        if !self.window.places.is_even() {
            let row = self.window.rows.wrapping_sub(self.left as u32);
            self.address = self.window.address_if_any(row, self.split.chunk);
        }
    }

    /// Advances the address, and only that, by one of this thread's rows, which are even.
    #[inline(always)]
    pub fn next_address(&mut self) {
        self.address += self.step_bytes;
    }

    /// Advances by `steps` of this thread's rows, which are even.
    #[inline(always)]
    pub fn skip(&mut self, steps: u32) {
        self.address += steps as u64 * self.step_bytes;
        self.left -= (steps * self.split.rows) as i32;
    }

    /// Starts to copy the thread's chunk `j` in the `steps`-th row from here, which the address has reached, to `slot`; zeros if it does
    /// not exist. With `rows_first` the test of the row is shared by the chunks of a row, else that of the chunk by the rows.
    ///
    /// # Safety
    /// `slot` is a 16-byte aligned shared-window address of this block; no thread reads or writes it until the copy was awaited and a
    /// barrier passed. The window is readable, and its chunks are aligned.
    #[inline(always)]
    pub unsafe fn copy(&self, steps: u32, j: u32, slot: u32, rows_first: bool) {
        let (row, chunk) = (steps * self.split.rows, j * self.split.chunks);
        let chunks = self.window.chunks as i32 - self.split.chunk as i32;
        let address = self.address + (chunk * CHUNK) as u64;
        let (row, chunk) = ([row as i32, self.left], [chunk as i32, chunks]);
        let [first, second] = if rows_first { [row, chunk] } else { [chunk, row] };
        // SAFETY: the caller's contract; nothing is read where the window has no such chunk.
        unsafe { copy::cp_async_16(slot, address, first, second) }
    }

    /// Starts to copy the thread's chunk `j` in its current row to `slot`; zeros if it does not exist.
    ///
    /// # Safety
    /// The contract of [`copy`](Self::copy).
    #[inline(always)]
    pub unsafe fn copy_here(&self, j: u32, slot: u32) {
        let chunk = j * self.split.chunks;
        let exists = self.left > 0 && self.split.chunk + chunk < self.window.chunks;
        let address = self.address + (chunk * CHUNK) as u64;
        // SAFETY: the caller's contract; nothing is read where the window has no such chunk.
        unsafe { copy::cp_async_16_bytes(slot, address, if exists { CHUNK } else { 0 }) }
    }

    /// Reads the thread's chunk `j` in its current row element by element, since it may be unaligned; zeros if it does not exist.
    ///
    /// # Safety
    /// The window is readable.
    #[inline(always)]
    pub unsafe fn gather(&self, j: u32) -> [u32; 4] {
        let chunk = j * self.split.chunks;
        if self.left > 0 && self.split.chunk + chunk < self.window.chunks {
            // SAFETY: the chunk exists.
            unsafe { self.window.gather(self.address + (chunk * CHUNK) as u64) }
        } else {
            [0; 4]
        }
    }
}
