//! A tile in shared memory: rows of swizzled 16-byte chunks.

use super::{
    element::Element,
    fragment,
    global::{GlobalTile, Places, Walk},
    swizzle::{neighbours, split_chunk, swizzle},
};
use crate::ptx::{copy, matrix, memory, optimizer, program, sreg, sync};

/// Size of a chunk in bytes, the unit that is copied, swizzled and loaded.
pub const CHUNK: u32 = 16;

/// A tile in shared memory.
#[derive(Clone, Copy)]
pub struct SharedTile {
    base: u32,
    row_bytes: u32,
}

impl SharedTile {
    /// Returns the tile at shared-window address `base` with rows of `row_bytes` bytes.
    #[inline(always)]
    pub fn new(base: u32, row_bytes: u32) -> Self {
        Self { base, row_bytes }
    }

    /// Returns the tile that starts `row` rows further down; `row` is a multiple of 8, so that the swizzle stays in
    /// phase.
    #[inline(always)]
    pub fn rows_from(self, row: u32) -> Self {
        Self {
            base: self.base + row * self.row_bytes,
            ..self
        }
    }

    /// Returns the tile that starts `chunk` chunks further right, in the same rows; `chunk` is a multiple of 8, so that the swizzle
    /// stays in phase.
    #[inline(always)]
    pub fn chunks_from(self, chunk: u32) -> Self {
        Self {
            base: self.base + chunk * CHUNK,
            ..self
        }
    }

    /// Returns the number of chunks of a row.
    #[inline(always)]
    pub fn chunks(self) -> u32 {
        self.row_bytes / CHUNK
    }

    /// Returns the number of k blocks along a row: blocks of 16 elements of 16 bits.
    #[inline(always)]
    pub fn k_blocks(self) -> u32 {
        self.chunks() / 2
    }

    /// Returns the address of chunk `chunk` of row `row`.
    #[inline(always)]
    pub fn address(self, row: u32, chunk: u32) -> u32 {
        self.base + row * self.row_bytes + swizzle(row, chunk, self.row_bytes) * CHUNK
    }

    /// Starts to copy the next `rows` rows of `source`, which advances. Rows and columns that do not exist become
    /// zeros.
    ///
    /// # Safety
    /// - Every thread of the block takes part, and no thread reads or writes the tile until the copy was awaited
    ///   (`cp_async_wait`) and a barrier passed.
    /// - `source` describes readable memory.
    #[inline(always)]
    pub unsafe fn load_async<P: Places>(self, source: &mut Walk<P>, rows: u32) {
        let split = source.split;
        let chunks = self.chunks() / split.chunks;
        // A thread's rows are multiples of 8 apart and its chunks whole runs, so that the swizzle of all is that of the first.
        let first = self.address(split.row, split.chunk);
        let slot = |i, j| {
            if program::SAVES_REGISTERS {
                self.address(split.row + i * split.rows, split.chunk + j * split.chunks)
            } else {
                first + i * split.rows * self.row_bytes + j * split.chunks * CHUNK
            }
        };
        let steps = rows / split.rows;
        // Otherwise each row's test and address depend on the row before, which takes fewer registers.
        let counts = P::ARE_EVEN && !program::SAVES_REGISTERS;
        let mut walk = *source;
        if source.aligned() {
            for i in 0..steps {
                for j in 0..chunks {
                    // SAFETY: the caller's contract.
                    unsafe {
                        if counts {
                            walk.copy(i, j, slot(i, j), steps < chunks)
                        } else {
                            walk.copy_here(j, slot(i, j))
                        }
                    }
                }
                if !counts {
                    walk.advance();
                } else if i + 1 < steps {
                    walk.next_address();
                }
            }
        } else {
            for i in 0..optimizer::opaque(steps) {
                for j in 0..optimizer::opaque(chunks) {
                    // SAFETY: the caller's contract.
                    unsafe { memory::st_shared_words(slot(i, j), walk.gather(j)) }
                }
                walk.advance();
            }
        }
        if counts {
            // Once for both, which need no moves then to bring their walks together.
            source.skip(steps);
        } else {
            *source = walk;
        }
    }

    /// Copies the first `rows` rows to `target`, by one warp; rows and columns that do not exist are dropped.
    ///
    /// # Safety
    /// This warp wrote the tile and passed a `sync_warp`, and no other warp accesses it; `target` is writable.
    #[inline(always)]
    pub unsafe fn store(self, target: &GlobalTile<impl Places>, rows: u32) {
        let split = Split::new(self.row_bytes, sreg::lane_id(), 32);
        split.for_each(optimizer::opaque(rows / split.rows), self.row_bytes, |row, chunk| {
            if target.contains(row, chunk) {
                // SAFETY: the caller's contract, and the chunk exists.
                unsafe { target.store(row, chunk, memory::ld_shared_words(self.address(row, chunk))) }
            }
        });
    }

    /// Replaces every chunk of the first `rows` rows by `f` applied to it, by one warp.
    ///
    /// # Safety
    /// The tile is initialised and visible to this warp, and no other warp accesses these rows. Ends with a
    /// `sync_warp`.
    #[inline(always)]
    pub unsafe fn map(self, rows: u32, f: impl Fn([u32; 4]) -> [u32; 4]) {
        let split = Split::new(self.row_bytes, sreg::lane_id(), 32);
        split.for_each(optimizer::opaque(rows / split.rows), self.row_bytes, |row, chunk| {
            let address = self.address(row, chunk);
            // SAFETY: the caller's contract; each chunk belongs to one lane.
            unsafe { memory::st_shared_words(address, f(memory::ld_shared_words(address))) }
        });
        sync::sync_warp();
    }

    /// Zeroes NaN and infinity in the first `rows` rows, by all threads of the block, which divide the rows as in
    /// `split`. Returns true if there were any. All threads see the result when this returns.
    ///
    /// # Safety
    /// The tile is initialised and visible to the block, and no thread reads it after this call's first barrier.
    /// Every thread of the block calls this together.
    #[inline(always)]
    pub unsafe fn clean<E: Element>(self, split: Split, rows: u32) -> bool {
        let mut nonfinite = 0;
        split.for_each(optimizer::opaque(rows / split.rows), self.row_bytes, |row, chunk| {
            // SAFETY: the caller's contract.
            let words = unsafe { memory::ld_shared_words(self.address(row, chunk)) };
            for word in words {
                nonfinite |= E::nonfinite(word);
            }
        });
        let any = sync::sync_threads_or(nonfinite != 0);
        if any {
            split.for_each(optimizer::opaque(rows / split.rows), self.row_bytes, |row, chunk| {
                let address = self.address(row, chunk);
                // SAFETY: the caller's contract; each chunk belongs to one thread.
                unsafe { memory::st_shared_words(address, memory::ld_shared_words(address).map(E::finite)) }
            });
            sync::sync_threads();
        }
        any
    }

    /// Returns the A operand at rows `row ..+ 16`, k block `k` (16 elements).
    ///
    /// # Safety
    /// The tile is initialised and visible to the whole warp, which calls this together.
    #[inline(always)]
    pub unsafe fn operand_a(self, row: u32, k: u32) -> [u32; 4] {
        // SAFETY: the caller's contract.
        unsafe { matrix::ldmatrix_x4(self.block_address(fragment::operand_a(sreg::lane_id()), row, k)) }
    }

    /// Returns two B operands for the product with this tile's transpose: product columns `row ..+ 16`, k block `k`.
    ///
    /// # Safety
    /// The contract of [`SharedTile::operand_a`].
    #[inline(always)]
    pub unsafe fn operand_b_transposed(self, row: u32, k: u32) -> [[u32; 2]; 2] {
        let address = self.block_address(fragment::operand_b(sreg::lane_id()), row, k);
        // SAFETY: the caller's contract.
        let [a, b, c, d] = unsafe { matrix::ldmatrix_x4(address) };
        [[a, b], [c, d]]
    }

    /// Returns two B operands for the product with this tile: k block `k` runs down the rows, product columns `column
    /// * 16 ..+ 16`.
    ///
    /// # Safety
    /// The contract of [`SharedTile::operand_a`].
    #[inline(always)]
    pub unsafe fn operand_b(self, k: u32, column: u32) -> [[u32; 2]; 2] {
        let address = self.block_address(fragment::operand_a(sreg::lane_id()), k * 16, column);
        // SAFETY: the caller's contract.
        let [a, b, c, d] = unsafe { matrix::ldmatrix_x4_trans(address) };
        [[a, b], [c, d]]
    }

    /// Returns the address of a lane's row and chunk in the block of 16 rows from `row` on and two chunks from `2 column` on.
    ///
    /// It is [`address`](Self::address), worked out with one XOR for all blocks of a column that differ only in what the swizzle
    /// leaves alone: the compiler finds no such common part, and would keep or work out an address for each column.
    #[inline(always)]
    fn block_address(self, (lane_row, lane_chunk): (u32, u32), row: u32, column: u32) -> u32 {
        if program::SAVES_REGISTERS {
            return self.address(row + lane_row, column * 2 + lane_chunk);
        }
        let (turned, straight) = split_chunk(column * 2, self.row_bytes);
        (self.address(lane_row, lane_chunk) ^ turned * CHUNK) + straight * CHUNK + row * self.row_bytes
    }
}

/// Division of a tile's chunks among threads: 8 neighbours along a row (4 if rows are not a multiple of 128 bytes),
/// so that global memory is read in full pieces of 128 or 64 bytes, and the next threads on the next row.
#[derive(Clone, Copy)]
pub struct Split {
    /// First row of this thread.
    pub row: u32,
    /// First chunk of this thread.
    pub chunk: u32,
    /// Number of rows from one of this thread's rows to the next.
    pub rows: u32,
    /// Number of chunks from one of this thread's chunks to the next.
    pub chunks: u32,
}

impl Split {
    /// Returns the share of thread `thread` of `threads`.
    #[inline(always)]
    pub fn new(row_bytes: u32, thread: u32, threads: u32) -> Self {
        let chunks = neighbours(row_bytes);
        Self {
            row: thread / chunks,
            chunk: thread % chunks,
            rows: threads / chunks,
            chunks,
        }
    }

    /// Visits this thread's (row, chunk) pairs in `steps` steps down the rows.
    #[inline(always)]
    fn for_each(&self, steps: u32, row_bytes: u32, mut visit: impl FnMut(u32, u32)) {
        for i in 0..steps {
            for j in 0..row_bytes / CHUNK / self.chunks {
                visit(self.row + i * self.rows, self.chunk + j * self.chunks);
            }
        }
    }
}
