//! Dropout over strips: drawing the weights that are kept, and zeroing the others.

use super::ScoreProgram;
use crate::device::cpu::kernels::{Keep, Kernels, Registers, Strip};
use crate::device::cpu::team::Lines;
use crate::program::Dropout;
use crate::program::strip::{Line, Operation, Slot, Space};

/// The weights of a strip that are kept.
pub(in crate::device::cpu) struct Dropped {
    dropout: Dropout,
    width: usize,
    head: [u32; 2],
    /// `keys x width`: truths.
    kept: Lines,
    /// Factor of the kept weights, in every lane.
    factor: Lines,
}

const KEPT: Slot = Slot {
    space: Space::Strip,
    index: 0,
};

const FACTOR: Slot = Slot {
    space: Space::Given,
    index: 0,
};

const WEIGHTS: Slot = Slot {
    space: Space::Score,
    index: 0,
};

impl Dropped {
    /// Makes room for tiles of at most this many keys; `None` where nothing is dropped.
    pub(in crate::device::cpu) fn new(program: &ScoreProgram, keys: usize) -> Option<Self> {
        let dropout = program.program.dropout()?;
        let width = program.kernels.strip_lanes;
        let mut factor = Lines::new(width);
        factor.as_mut_slice().fill(dropout.factor());
        Some(Self {
            dropout,
            width,
            head: [0; 2],
            kept: Lines::new(keys * width),
            factor,
        })
    }

    /// Turns to a head.
    pub(in crate::device::cpu) fn set_head(&mut self, batch: usize, head: usize) {
        self.head = [batch as u32, head as u32];
    }

    /// Draws for a strip that starts at a query and a key.
    ///
    /// # Safety
    /// The processor has the instructions, and there are no more keys than the tile has room for.
    pub(in crate::device::cpu) unsafe fn draw(&mut self, kernels: &Kernels, [query, key]: [usize; 2], keys: usize) {
        let [batch, head] = self.head;
        // SAFETY: passed on to the caller.
        unsafe {
            (kernels.keep)(&Keep {
                keys,
                first_query: query as u32,
                first_key: key as u32,
                batch,
                head,
                seed: self.dropout.key(),
                threshold: self.dropout.threshold(),
                kept: self.kept.as_mut_ptr().cast(),
            });
        }
    }

    /// Zeroes weights that are dropped; the others are left as they are or, where they are to be final, take their
    /// factor.
    ///
    /// # Safety
    /// The contract of [`draw`](Self::draw), which was run for this strip; the weights are of as many keys.
    pub(in crate::device::cpu) unsafe fn apply(
        &mut self,
        kernels: &Kernels,
        keys: usize,
        (weights, stride): (*mut f32, usize),
        is_final: bool,
    ) {
        let lines = [
            Line::new(Operation::And, WEIGHTS, &[KEPT, WEIGHTS]),
            Line::new(Operation::Multiply, WEIGHTS, &[WEIGHTS, FACTOR]),
        ];
        let registers = |first, row| Registers {
            first,
            register: 0,
            row,
        };
        let none = registers(std::ptr::null_mut(), 0);
        let mut spaces = [none; 6];
        spaces[Space::Given as usize] = registers(self.factor.as_mut_ptr(), 0);
        spaces[Space::Strip as usize] = registers(self.kept.as_mut_ptr(), self.width);
        spaces[Space::Score as usize] = registers(weights, stride);
        // SAFETY: passed on to the caller.
        unsafe {
            (kernels.strip)(&Strip {
                lines: &lines[..if is_final { 2 } else { 1 }],
                rows: keys,
                spaces,
                tables: &[],
            });
        }
    }

    /// Zeroes weights in words of two keys, bf16, that are dropped; `words` is the first lane of the strip.
    pub(in crate::device::cpu) fn apply_to_pairs(&self, keys: usize, words: &mut [f32], stride: usize) {
        let kept = self.kept.as_slice();
        for (pair, words) in words.chunks_mut(stride).take(keys.div_ceil(2)).enumerate() {
            let low = &kept[2 * pair * self.width..][..self.width];
            let high = kept.get((2 * pair + 1) * self.width..).filter(|_| 2 * pair + 1 < keys);
            for (lane, word) in words.iter_mut().take(self.width).enumerate() {
                let high = high.map_or(u32::MAX, |high| high[lane].to_bits());
                let mask = low[lane].to_bits() & 0xffff | high & 0xffff_0000;
                *word = f32::from_bits(word.to_bits() & mask);
            }
        }
    }
}
