//! Coverage of strips of queries by tiles of keys: hidden by a mask, shown, or to be evaluated pair by pair.

use std::ops::Range;

use super::ScoreProgram;
use crate::program::Coverage;
use crate::program::interval::{Bounds, Intervals};

/// Tiles of keys that a tile of queries walks, and the coverage of each by each strip of its queries: a cell.
#[derive(Default)]
pub(in crate::device::cpu) struct Walk {
    /// Evaluator of the mask's bounds, once there was a use for it.
    mask: Option<Intervals>,
    blocks: Vec<u32>,
    cells: Vec<Coverage>,
    /// Cells of all tiles of keys, also of those that no query sees.
    all: Vec<Coverage>,
    strips: usize,
    /// Index of the first tile of `all`.
    first: u32,
}

/// Elements of a table that are read to find their bounds: beyond, they may be anything.
const MOST_READ: usize = 1 << 16;

impl Walk {
    /// Takes over the walk of the same queries in another head.
    pub(in crate::device::cpu) fn copy(&mut self, other: &Self) {
        self.blocks.clone_from(&other.blocks);
        self.cells.clone_from(&other.cells);
        self.strips = other.strips;
    }

    /// Finds the tiles of some keys that some of the queries see, for strips of queries and tiles of keys of these sizes. The
    /// first of the keys is the first of a tile.
    pub(in crate::device::cpu) fn set(
        &mut self,
        program: &ScoreProgram,
        of_head: (usize, usize),
        [queries, keys]: [Range<u32>; 2],
        sizes: [u32; 2],
    ) {
        let blocks = keys.len().div_ceil(sizes[1] as usize) as u32;
        self.first = keys.start / sizes[1];
        self.strips = queries.len().div_ceil(sizes[0] as usize);
        self.all.clear();
        self.all.resize(blocks as usize * self.strips, Coverage::Empty);
        if let (None, Some(mask)) = (&self.mask, program.program.mask()) {
            self.mask = Some(Intervals::new(program.program.expression(), [mask]));
        }
        self.split(
            program,
            of_head,
            [&queries, &keys],
            sizes,
            [0..self.strips as u32, 0..blocks],
        );
        self.blocks.clear();
        self.cells.clear();
        for (block, cells) in (self.first..).zip(self.all.chunks(self.strips)) {
            if cells.iter().any(|cell| *cell != Coverage::Empty) {
                self.blocks.push(block);
                self.cells.extend_from_slice(cells);
            }
        }
    }

    /// Writes the cells of a run of strips and of tiles of keys; halves it where its pairs do not agree.
    fn split(
        &mut self,
        program: &ScoreProgram,
        of_head: (usize, usize),
        [queries, keys]: [&Range<u32>; 2],
        sizes: [u32; 2],
        [strips, blocks]: [Range<u32>; 2],
    ) {
        let rows = queries.start + strips.start * sizes[0]..(queries.start + strips.end * sizes[0]).min(queries.end);
        let columns = keys.start + blocks.start * sizes[1]..(keys.start + blocks.end * sizes[1]).min(keys.end);
        let cell = match &mut self.mask {
            Some(mask) => program.cell(mask, of_head, rows, columns),
            None => Coverage::Full,
        };
        let halves = |range: &Range<u32>| {
            let middle = range.start + range.len() as u32 / 2;
            [range.start..middle, middle..range.end]
        };
        if cell != Coverage::Partial || strips.len() * blocks.len() == 1 {
            for block in blocks {
                let first = block as usize * self.strips;
                self.all[first + strips.start as usize..first + strips.end as usize].fill(cell);
            }
        } else if strips.len() as u32 * sizes[0] > blocks.len() as u32 * sizes[1] && strips.len() > 1
            || blocks.len() == 1
        {
            halves(&strips)
                .into_iter()
                .for_each(|strips| self.split(program, of_head, [queries, keys], sizes, [strips, blocks.clone()]));
        } else {
            halves(&blocks)
                .into_iter()
                .for_each(|blocks| self.split(program, of_head, [queries, keys], sizes, [strips.clone(), blocks]));
        }
    }

    /// Iterates over those of some tiles of keys that are walked, with the coverage of each strip of queries.
    pub(in crate::device::cpu) fn within(&self, blocks: Range<u32>) -> impl Iterator<Item = (u32, &[Coverage])> {
        let place = |block: u32| self.blocks.partition_point(|&walked| walked < block);
        let places = place(blocks.start)..place(blocks.end);
        places.map(|place| (self.blocks[place], &self.cells[place * self.strips..][..self.strips]))
    }
}

impl ScoreProgram {
    /// Returns the coverage of some queries and keys under the mask; there is at least one of each.
    fn cell(
        &self,
        mask: &mut Intervals,
        (batch, head): (usize, usize),
        queries: Range<u32>,
        keys: Range<u32>,
    ) -> Coverage {
        let one = |value: usize| (value as i32, value as i32);
        let range = |range: Range<u32>| (range.start as i32, range.end as i32 - 1);
        let ranges = [
            one(batch),
            one(head),
            one(head / self.heads_of_kv),
            range(queries),
            range(keys),
            one(self.seqlen_q as usize),
            one(self.seqlen_k as usize),
        ];
        mask.evaluate(&ranges, self.program.constants(), |table, indices| {
            self.bounds_of_table(table, indices)
        });
        let root = self.program.mask().expect("there is a mask");
        Coverage::of(mask.of(root))
    }

    /// Returns the bounds of a table's elements within bounds of its indices.
    fn bounds_of_table(&self, table: u32, indices: &[(i32, i32)]) -> Bounds {
        use crate::program::{DataType, Type, read_as};
        let table = &self.tables[table as usize];
        let mut ranges = [(0, 0); 4];
        let mut count = 1_usize;
        for (axis, &(low, high)) in indices.iter().enumerate() {
            let clamp = |index: i32| index.clamp(0, table.last[axis]) as usize;
            ranges[axis] = (clamp(low), clamp(high));
            count = count.saturating_mul(ranges[axis].1 - ranges[axis].0 + 1);
        }
        if count > MOST_READ || read_as(table.element) == Type::Score {
            return Bounds::any(read_as(table.element));
        }
        debug_assert!(matches!(table.element, DataType::I32 | DataType::U32));
        let (mut least, mut most) = (i32::MAX, i32::MIN);
        let [(a0, a1), (b0, b1), (c0, c1), (d0, d1)] = ranges;
        for (a, b, c) in (a0..=a1).flat_map(|a| (b0..=b1).flat_map(move |b| (c0..=c1).map(move |c| (a, b, c)))) {
            let outer = a * table.strides[0] + b * table.strides[1] + c * table.strides[2];
            for d in d0..=d1 {
                // SAFETY: the indices are within the table, whose memory the program keeps, and no thread writes it.
                let element = unsafe { *table.first.cast::<i32>().add(outer + d * table.strides[3]) };
                (least, most) = (least.min(element), most.max(element));
            }
        }
        Bounds::Index(least, most)
    }
}
