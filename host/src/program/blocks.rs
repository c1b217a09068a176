//! [`BlockMask`]: the tiles of (query, key) pairs that a mask leaves empty, cuts, or fills.
//!
//! Found from a program by intervals, which is exact for causal masks, windows, prefixes and their combinations, and never
//! wrong: a tile that is in doubt is partial. Or given from outside, as the block-sparse attention of the first
//! FlashAttention paper has it.

use std::fmt;

use super::Program;
use super::cover::Covers;
use super::evaluate::HostTable;
use super::interval::Bounds;
use crate::error::{Error, ProgramError};

/// Most tiles along an axis of a picture.
const PICTURE: usize = 64;

/// Visible share of a tile under a mask: none, some or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coverage {
    /// No pair is visible.
    Empty,
    /// Some pairs are visible, or may be.
    Partial,
    /// All pairs are visible.
    Full,
}

impl Coverage {
    /// Returns the coverage of pairs for which a mask has these bounds.
    pub(crate) fn of(mask: Bounds) -> Self {
        match mask {
            Bounds::Truth(true, false) => Self::Empty,
            Bounds::Truth(false, _) => Self::Full,
            _ => Self::Partial,
        }
    }
}

/// The coverage of every tile of `block_m` queries and `block_n` keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMask {
    /// Sequences and heads that differ; 1 where all are alike.
    batch: usize,
    heads: usize,
    seqlen: [usize; 2],
    block: [usize; 2],
    /// `[batch, heads, tiles of queries, tiles of keys]`.
    tiles: Vec<Coverage>,
}

/// Sizes of a problem, as a [`BlockMask`] needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Independent sequences.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Key and value heads.
    pub heads_kv: usize,
    /// Length of the query sequence.
    pub seqlen_q: usize,
    /// Length of the key sequence.
    pub seqlen_k: usize,
}

impl BlockMask {
    /// The tiles of a program's mask, from what its tables hold, in the order of [`Program::tables`].
    ///
    /// # Errors
    /// [`ProgramError::Argument`] if a size of a tile is 0.
    pub fn of(program: &Program, tables: &[HostTable], sizes: Sizes, block: [usize; 2]) -> Result<Self, Error> {
        let [batch, heads] = program.masks_that_differ(sizes);
        let seqlen = [sizes.seqlen_q, sizes.seqlen_k];
        let mut mask = Self::covered(batch, heads, seqlen, block, Coverage::Full)?;
        let contents = (0..program.tables().len()).map(|table| tables.get(table)).collect();
        let mut covers = Covers::new(program, contents, sizes);
        for place in 0..mask.tiles.len() {
            let (of_head, tile) = mask.place(place);
            let [queries, keys] = [0, 1].map(|axis| {
                let first = tile[axis] * block[axis];
                first..(first + block[axis]).min(seqlen[axis])
            });
            mask.tiles[place] = covers.of(of_head, queries, keys);
        }
        Ok(mask)
    }

    /// Block-sparse attention: which tiles are visible, `[batch or 1, heads or 1, tiles of queries, tiles of keys]`.
    ///
    /// # Errors
    /// [`ProgramError::Argument`] if a size is 0, [`Error::DataLength`] if there are more or fewer than the tiles.
    pub fn from_dense(
        [batch, heads]: [usize; 2],
        seqlen: [usize; 2],
        block: [usize; 2],
        visible: &[bool],
    ) -> Result<Self, Error> {
        let mut mask = Self::covered(batch, heads, seqlen, block, Coverage::Empty)?;
        if visible.len() != mask.tiles.len() {
            let [rows, columns] = mask.counts();
            return Err(Error::DataLength {
                len: visible.len(),
                expected: mask.tiles.len(),
                shape: vec![batch, heads, rows, columns],
            });
        }
        for (tile, _) in mask.tiles.iter_mut().zip(visible).filter(|(_, visible)| **visible) {
            *tile = Coverage::Full;
        }
        Ok(mask)
    }

    /// Block-sparse attention from compressed rows: the visible tiles of keys of row i, all batches and heads counted, are
    /// `columns[offsets[i] .. offsets[i + 1]]`.
    ///
    /// # Errors
    /// [`ProgramError::Argument`] if a size is 0, [`Error::DataLength`] if there are not as many offsets as rows and one, and
    /// [`ProgramError::BlockList`] if an offset falls or reaches past the columns, or a column past the keys.
    pub fn from_csr(
        [batch, heads]: [usize; 2],
        seqlen: [usize; 2],
        block: [usize; 2],
        offsets: &[usize],
        columns: &[usize],
    ) -> Result<Self, Error> {
        let mut mask = Self::covered(batch, heads, seqlen, block, Coverage::Empty)?;
        let [rows, of_row] = mask.counts();
        let rows = batch * heads * rows;
        if offsets.len() != rows + 1 {
            return Err(Error::DataLength {
                len: offsets.len(),
                expected: rows + 1,
                shape: vec![rows + 1],
            });
        }
        for (row, ends) in offsets.windows(2).enumerate() {
            let wrong = |list, value, limit| ProgramError::BlockList {
                list,
                row,
                value,
                limit,
            };
            let columns = columns.get(ends[0]..ends[1]);
            let columns = columns.ok_or_else(|| wrong("offsets", ends[1], offsets[rows]))?;
            for &column in columns {
                if column >= of_row {
                    return Err(wrong("columns", column, of_row - 1).into());
                }
                mask.tiles[row * of_row + column] = Coverage::Full;
            }
        }
        Ok(mask)
    }

    fn covered(
        batch: usize,
        heads: usize,
        seqlen: [usize; 2],
        block: [usize; 2],
        coverage: Coverage,
    ) -> Result<Self, Error> {
        if [batch, heads, seqlen[0], seqlen[1], block[0], block[1]].contains(&0) {
            return Err(Error::Program(ProgramError::Argument {
                argument: "block_mask",
                value: format!("[{batch}, {heads}] of {seqlen:?} in tiles of {block:?}"),
                expected: "sizes of at least 1",
            }));
        }
        let mut mask = Self {
            batch,
            heads,
            seqlen,
            block,
            tiles: Vec::new(),
        };
        let [rows, columns] = mask.counts();
        mask.tiles = vec![coverage; batch * heads * rows * columns];
        Ok(mask)
    }

    /// Sequences and heads that have tiles of their own; 1 where all are alike.
    pub fn batch_and_heads(&self) -> [usize; 2] {
        [self.batch, self.heads]
    }

    /// Queries and keys of a tile.
    pub fn block(&self) -> [usize; 2] {
        self.block
    }

    /// Tiles of queries and of keys.
    pub fn counts(&self) -> [usize; 2] {
        [0, 1].map(|axis| self.seqlen[axis].div_ceil(self.block[axis]))
    }

    /// The coverage of all tiles, `[batch, heads, tiles of queries, tiles of keys]`.
    pub fn tiles(&self) -> &[Coverage] {
        &self.tiles
    }

    /// The tiles of keys that a tile of queries sees, in order, with their coverage. A batch entry or head beyond those that
    /// differ has the tiles of the first.
    pub fn keys_of(&self, batch: usize, head: usize, tile: usize) -> impl Iterator<Item = (usize, Coverage)> {
        let [_, columns] = self.counts();
        let row = &self.tiles[self.first_of(batch, head) + tile * columns..][..columns];
        row.iter()
            .copied()
            .enumerate()
            .filter(|(_, coverage)| *coverage != Coverage::Empty)
    }

    /// The tiles of queries that see a tile of keys, in order, with their coverage.
    pub fn queries_of(&self, batch: usize, head: usize, tile: usize) -> impl Iterator<Item = (usize, Coverage)> {
        let [rows, columns] = self.counts();
        let matrix = &self.tiles[self.first_of(batch, head)..][..rows * columns];
        let column = matrix[tile..].iter().step_by(columns).copied();
        column.enumerate().filter(|(_, coverage)| *coverage != Coverage::Empty)
    }

    /// The share of pairs that lie in tiles that are not empty, which a device that skips empty tiles computes.
    pub fn density(&self) -> f64 {
        let pairs = |place: usize| {
            let (_, tile) = self.place(place);
            let size = |axis: usize| self.block[axis].min(self.seqlen[axis] - tile[axis] * self.block[axis]);
            (size(0) * size(1)) as f64
        };
        let seen = (0..self.tiles.len()).filter(|&place| self.tiles[place] != Coverage::Empty);
        let all = self.batch * self.heads * self.seqlen[0] * self.seqlen[1];
        seen.map(pairs).sum::<f64>() / all as f64
    }

    /// The picture as a scalable drawing: black tiles are full, grey ones partial.
    pub fn to_svg(&self) -> String {
        let [rows, columns] = self.counts();
        let (pixels, gap) = (8, 8);
        let (width, height) = (columns * pixels, rows * pixels);
        let matrices = self.batch * self.heads;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
            matrices * (width + gap) - gap,
        );
        for (place, coverage) in self.tiles.iter().enumerate() {
            let colour = match coverage {
                Coverage::Empty => "#eeeeee",
                Coverage::Partial => "#9a9a9a",
                Coverage::Full => "#000000",
            };
            let ([batch, head], [row, column]) = self.place(place);
            let x = (batch * self.heads + head) * (width + gap) + column * pixels;
            let (y, size) = (row * pixels, pixels - 1);
            svg += &format!("<rect x=\"{x}\" y=\"{y}\" width=\"{size}\" height=\"{size}\" fill=\"{colour}\"/>\n");
        }
        svg + "</svg>\n"
    }

    /// The batch entry and head, and the tile, of a place in `tiles`.
    fn place(&self, place: usize) -> ([usize; 2], [usize; 2]) {
        let [rows, columns] = self.counts();
        let (matrix, tile) = (place / (rows * columns), place % (rows * columns));
        (
            [matrix / self.heads, matrix % self.heads],
            [tile / columns, tile % columns],
        )
    }

    /// The place of the first tile of a batch entry and head.
    fn first_of(&self, batch: usize, head: usize) -> usize {
        let of = |x: usize, size: usize| if size == 1 { 0 } else { x };
        let [rows, columns] = self.counts();
        (of(batch, self.batch) * self.heads + of(head, self.heads)) * rows * columns
    }
}

/// A picture: `█` a full tile, `▒` a partial one, `·` an empty one; queries go down, keys to the right. Several tiles are one
/// character where there are many, and of many heads the first four are shown.
impl fmt::Display for BlockMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rows, columns] = self.counts();
        let [block_m, block_n] = self.block;
        let percent = 100.0 * self.density();
        write!(
            f,
            "{rows} x {columns} tiles of {block_m} queries x {block_n} keys, {percent:.1} % computed"
        )?;
        let matrices = self.batch * self.heads;
        let (down, right) = (rows.div_ceil(PICTURE / 2), columns.div_ceil(PICTURE));
        for matrix in 0..matrices.min(4) {
            if matrices > 1 {
                write!(f, "\nbatch {}, head {}", matrix / self.heads, matrix % self.heads)?;
            }
            let tiles = &self.tiles[matrix * rows * columns..][..rows * columns];
            for row in (0..rows).step_by(down) {
                f.write_str("\n")?;
                for column in (0..columns).step_by(right) {
                    let within = (row..(row + down).min(rows))
                        .flat_map(|row| &tiles[row * columns..][column..(column + right).min(columns)]);
                    f.write_str(character(within))?;
                }
            }
        }
        match matrices {
            0..=4 => Ok(()),
            _ => write!(f, "\nand {} more", matrices - 4),
        }
    }
}

/// The character of some tiles: theirs if they are alike.
fn character<'a>(mut tiles: impl Iterator<Item = &'a Coverage>) -> &'static str {
    let first = tiles.next().expect("at least one tile");
    match first {
        _ if tiles.any(|tile| tile != first) => "▒",
        Coverage::Empty => "·",
        Coverage::Partial => "▒",
        Coverage::Full => "█",
    }
}
