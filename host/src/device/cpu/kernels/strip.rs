//! Score programs: the lines of a [`Code`](crate::program::strip::Code), run over strips of a tile of scores.
//!
//! A strip is a few queries, [`Kernels::strip_lanes`](super::Kernels) of them, by the keys of a tile: a row of lanes
//! for each key. A line goes over the whole strip before the next one starts. Registers are memory, which stays in
//! the L1 cache.

use super::MAX_LANES;
use crate::device::cpu::vector::Words;
use crate::program::DataType;
use crate::program::strip::{Line, Operation, Slot, Space};

/// Lines, and the memory they run in.
pub(in crate::device::cpu) struct Strip<'a> {
    pub lines: &'a [Line],
    /// Rows to go over.
    pub rows: usize,
    /// Places of registers, by `Space as usize`.
    pub spaces: [Registers; 6],
    pub tables: &'a [Table],
}

/// The registers of one space.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Registers {
    /// The first row of the first register.
    pub first: *mut f32,
    /// From one register to the next, in elements.
    pub register: usize,
    /// From one row to the next; 0 where all rows read the same.
    pub row: usize,
}

/// A table in memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::device::cpu) struct Table {
    pub first: *const u8,
    pub element: DataType,
    pub rank: usize,
    /// The last index of each axis.
    pub last: [i32; 4],
    /// Elements from one index to the next.
    pub strides: [usize; 4],
}

/// A register's first row, and the elements from one row to the next.
#[derive(Clone, Copy)]
struct Rows {
    first: *mut f32,
    step: usize,
}

impl Strip<'_> {
    #[inline(always)]
    fn rows_of(&self, slot: Slot) -> Rows {
        let space = self.spaces[slot.space as usize];
        Rows {
            first: space.first.wrapping_add(usize::from(slot.index) * space.register),
            step: space.row,
        }
    }
}

/// Runs a line over all rows: the operands are registers of that name. Not a function that takes a closure: those are
/// not inlined for certain, and what is not inlined has no vectors.
macro_rules! over_rows {
    ($strip:ident, $line:ident, |$($operand:ident),+| $value:expr) => {{
        let to = $strip.rows_of($line.to);
        let mut slots = $line.operands.into_iter();
        $(let $operand = slots.next().map(|slot| $strip.rows_of(slot)).unwrap_or(to);)+
        for row in 0..$strip.rows {
            for lane in (0..W).step_by(V::LANES) {
                $(let $operand = V::load($operand.first.add(row * $operand.step + lane));)+
                $value.store(to.first.add(row * to.step + lane));
            }
        }
    }};
}

/// [`Strip`], of `W` lanes.
#[inline(always)]
pub(super) unsafe fn run<V: Words, const W: usize>(strip: &Strip<'_>) {
    for line in strip.lines {
        // SAFETY: passed on to the caller: registers have as many rows of `W` lanes, and tables lie where they say.
        unsafe {
            match line.operation {
                Operation::Copy => over_rows!(strip, line, |x| x),
                Operation::Negate => over_rows!(strip, line, |x| x.xor(V::splat(-0.0))),
                Operation::Abs => over_rows!(strip, line, |x| V::splat(-0.0).and_not(x)),
                Operation::Exp => over_rows!(strip, line, |x| x.exp()),
                Operation::Log => over_rows!(strip, line, |x| x.log()),
                Operation::Tanh => over_rows!(strip, line, |x| x.tanh()),
                Operation::Sqrt => over_rows!(strip, line, |x| x.sqrt()),
                Operation::Reciprocal => over_rows!(strip, line, |x| V::splat(1.0).divide(x)),
                Operation::Floor => over_rows!(strip, line, |x| x.floor()),
                Operation::Add => over_rows!(strip, line, |x, y| x.add(y)),
                Operation::Subtract => over_rows!(strip, line, |x, y| x.sub(y)),
                Operation::Multiply => over_rows!(strip, line, |x, y| x.mul(y)),
                Operation::Divide => over_rows!(strip, line, |x, y| x.divide(y)),
                Operation::Min => over_rows!(strip, line, |x, y| x.smaller(y)),
                Operation::Max => over_rows!(strip, line, |x, y| x.larger(y)),
                Operation::MultiplyAdd => over_rows!(strip, line, |x, y, z| x.fma(y, z)),
                Operation::SubtractProduct => {
                    over_rows!(strip, line, |x, y, z| x.xor(V::splat(-0.0)).fma(y, z))
                }
                Operation::Slope => {
                    over_rows!(strip, line, |x, y| x.equal(V::splat(0.0)).and_not(x.mul(y)))
                }
                Operation::Less => over_rows!(strip, line, |x, y| x.less(y)),
                Operation::LessOrEqual => over_rows!(strip, line, |x, y| x.less_or_equal(y)),
                Operation::Equal => over_rows!(strip, line, |x, y| x.equal(y)),
                Operation::ToScore => over_rows!(strip, line, |x| x.to_number()),
                Operation::ToIndex => over_rows!(strip, line, |x| x.floor().to_word()),
                Operation::NegateWord => over_rows!(strip, line, |x| V::splat(0.0).sub_words(x)),
                Operation::AbsWord => over_rows!(strip, line, |x| x.max_words(V::splat(0.0).sub_words(x))),
                Operation::AddWords => over_rows!(strip, line, |x, y| x.add_words(y)),
                Operation::SubtractWords => over_rows!(strip, line, |x, y| x.sub_words(y)),
                Operation::MultiplyWords => over_rows!(strip, line, |x, y| x.mul_words(y)),
                Operation::Quotient => over_rows!(strip, line, |x, y| x.quotient(y)),
                Operation::Remainder => {
                    over_rows!(strip, line, |x, y| x.sub_words(x.quotient(y).mul_words(y)))
                }
                Operation::MinWords => over_rows!(strip, line, |x, y| x.min_words(y)),
                Operation::MaxWords => over_rows!(strip, line, |x, y| x.max_words(y)),
                Operation::ShiftLeft => over_rows!(strip, line, |x, y| x.shift_left(y)),
                Operation::ShiftRight => over_rows!(strip, line, |x, y| x.shift_right(y)),
                Operation::LessWords => over_rows!(strip, line, |x, y| x.less_words(y)),
                Operation::LessOrEqualWords => {
                    over_rows!(strip, line, |x, y| y.less_words(x).xor(V::splat_word(-1)))
                }
                Operation::EqualWords => over_rows!(strip, line, |x, y| x.equal_words(y)),
                Operation::Not => over_rows!(strip, line, |x| x.xor(V::splat_word(-1))),
                Operation::And => over_rows!(strip, line, |x, y| x.and(y)),
                Operation::Or => over_rows!(strip, line, |x, y| x.or(y)),
                Operation::Xor => over_rows!(strip, line, |x, y| x.xor(y)),
                Operation::Select => over_rows!(strip, line, |x, y, z| x.choose(y, z)),
                Operation::Load { table } => {
                    let table = &strip.tables[table as usize];
                    match table.element {
                        DataType::F32 | DataType::I32 | DataType::U32 => load::<V, W, 0>(strip, line, table),
                        DataType::F16 => load::<V, W, 1>(strip, line, table),
                        DataType::Bf16 => load::<V, W, 2>(strip, line, table),
                        DataType::F8E4M3 => unreachable!("no `Readable` has this type"),
                    }
                }
            }
        }
    }
}

/// Lanes of the widest strip.
const MAX_WIDTH: usize = 16;

/// Most rows of which offsets are kept.
const MAX_ROWS: usize = 64;

/// [`Operation::Load`], of words, of f16 or of bf16. What an index adds is worked out once for all rows, once a row or for each
/// element, as the index changes.
#[inline(always)]
unsafe fn load<V: Words, const W: usize, const ELEMENT: u8>(strip: &Strip<'_>, line: &Line, table: &Table) {
    let offset = |axis: usize, index: i32| index.clamp(0, table.last[axis]) as usize * table.strides[axis];
    let to = strip.rows_of(line.to);
    let is_fixed = |axis: &usize| strip.spaces[line.operands[*axis].space as usize].row == 0;
    let of_key = |axis: &usize| line.to.space == Space::Strip && line.operands[*axis].space == Space::Key;
    // SAFETY: passed on to the caller; indices are within the table.
    unsafe {
        let index = |axis: usize, row: usize, lane: usize| {
            let rows = strip.rows_of(line.operands[axis]);
            *rows.first.add(row * rows.step + lane).cast::<i32>()
        };
        let mut of_lanes = [0_usize; MAX_WIDTH];
        for axis in (0..table.rank).filter(is_fixed) {
            for (lane, of_lane) in of_lanes[..W].iter_mut().enumerate() {
                *of_lane += offset(axis, index(axis, 0, lane));
            }
        }
        if strip.rows <= MAX_ROWS && (0..table.rank).all(|axis| is_fixed(&axis) || of_key(&axis)) {
            let mut of_rows = [0_usize; MAX_ROWS];
            for axis in (0..table.rank).filter(|axis| !is_fixed(axis)) {
                for (row, of_row) in of_rows[..strip.rows].iter_mut().enumerate() {
                    *of_row += offset(axis, index(axis, row, 0));
                }
            }
            return load_rows::<V, W, ELEMENT>(table, &of_lanes, &of_rows[..strip.rows], to);
        }
        for row in 0..strip.rows {
            let mut offsets = of_lanes;
            for axis in (0..table.rank).filter(|axis| !is_fixed(axis)) {
                for (lane, of_lane) in offsets[..W].iter_mut().enumerate() {
                    *of_lane += offset(axis, index(axis, row, lane));
                }
            }
            load_row::<V, W, ELEMENT>(table, &offsets, 0, to.first.add(row * to.step));
        }
    }
}

/// Rows of a table's elements, each at the sum of an offset of its lane and one of its row. Where rows are neighbours in memory,
/// whole registers of them are read and transposed.
#[inline(always)]
unsafe fn load_rows<V: Words, const W: usize, const ELEMENT: u8>(
    table: &Table,
    of_lanes: &[usize; MAX_WIDTH],
    of_rows: &[usize],
    to: Rows,
) {
    let are_neighbours = of_rows.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let whole = if are_neighbours {
        of_rows.len() / V::LANES * V::LANES
    } else {
        0
    };
    // SAFETY: passed on to the caller; rows past the last of a register are not read.
    unsafe {
        let mut square = [0.0_f32; MAX_LANES * MAX_LANES];
        for row in (0..whole).step_by(V::LANES) {
            for first_lane in (0..W).step_by(V::LANES) {
                for lane in 0..V::LANES {
                    let place = of_lanes[first_lane + lane] + of_rows[row];
                    elements::<V, ELEMENT>(table, place).store(square.as_mut_ptr().add(lane * V::LANES));
                }
                let to_first = to.first.add(row * to.step + first_lane);
                V::transpose(square.as_ptr(), V::LANES, V::LANES, to_first, to.step, V::LANES);
            }
        }
        for (row, of_row) in of_rows.iter().enumerate().skip(whole) {
            load_row::<V, W, ELEMENT>(table, of_lanes, *of_row, to.first.add(row * to.step));
        }
    }
}

/// A register of neighbours in a table.
#[inline(always)]
unsafe fn elements<V: Words, const ELEMENT: u8>(table: &Table, place: usize) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match ELEMENT {
            0 => V::load(table.first.cast::<f32>().add(place)),
            1 => V::load_f16(table.first.cast::<u16>().add(place)),
            _ => V::load_bf16(table.first.cast::<u16>().add(place)),
        }
    }
}

/// One row of elements.
#[inline(always)]
unsafe fn load_row<V: Words, const W: usize, const ELEMENT: u8>(
    table: &Table,
    of_lanes: &[usize; MAX_WIDTH],
    of_row: usize,
    to: *mut f32,
) {
    // SAFETY: passed on to the caller; elements of 16 bits pass through an array that is long enough.
    unsafe {
        if ELEMENT == 0 {
            let first = table.first.cast::<f32>().add(of_row);
            for (lane, of_lane) in of_lanes[..W].iter().enumerate() {
                *to.add(lane) = *first.add(*of_lane);
            }
            return;
        }
        let first = table.first.cast::<u16>().add(of_row);
        let mut elements = [0_u16; MAX_WIDTH + MAX_LANES];
        for (element, of_lane) in elements[..W].iter_mut().zip(of_lanes) {
            *element = *first.add(*of_lane);
        }
        for lane in (0..W).step_by(V::LANES) {
            let elements = elements.as_ptr().add(lane);
            let numbers = if ELEMENT == 1 {
                V::load_f16(elements)
            } else {
                V::load_bf16(elements)
            };
            numbers.store(to.add(lane));
        }
    }
}
