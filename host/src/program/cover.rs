//! [`Covers`]: coverage of rectangles of pairs under a program's mask, by intervals.

use std::ops::Range;

use super::evaluate::HostTable;
use super::interval::{Bounds, Intervals, Ranges};
use super::{Coordinate, Coverage, NodeId, Program, Sizes, read_as};

/// Coverage of rectangles of queries and keys under a program's mask.
///
/// The coverage of a rectangle is never wrong: one that is in doubt is partial.
pub(crate) struct Covers<'a> {
    program: &'a Program,
    mask: Option<NodeId>,
    bounds: Intervals,
    sizes: Sizes,
    /// Content of each of the program's tables; `None` where it is unknown.
    tables: Vec<Option<&'a HostTable>>,
}

impl<'a> Covers<'a> {
    /// Prepares the mask of a program for a problem of these sizes. A table without content may hold anything.
    pub(crate) fn new(program: &'a Program, tables: Vec<Option<&'a HostTable>>, sizes: Sizes) -> Self {
        let mask = program.mask();
        Self {
            program,
            mask,
            bounds: Intervals::new(program.expression(), mask),
            sizes,
            tables,
        }
    }

    /// Returns the coverage of queries and keys of a batch entry and query head; there is at least one of each.
    pub(crate) fn of(&mut self, [batch, head]: [usize; 2], queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let Some(mask) = self.mask else {
            return Coverage::Full;
        };
        let (one, between) = (
            |x: usize| (x as i32, x as i32),
            |range: &Range<usize>| (range.start as i32, range.end as i32 - 1),
        );
        let sizes = self.sizes;
        let ranges: Ranges = Coordinate::ALL.map(|which| match which {
            Coordinate::Batch => one(batch),
            Coordinate::Head => one(head),
            Coordinate::KvHead => one(head / (sizes.heads_q / sizes.heads_kv.max(1)).max(1)),
            Coordinate::Query => between(&queries),
            Coordinate::Key => between(&keys),
            Coordinate::SeqlenQ => one(sizes.seqlen_q),
            Coordinate::SeqlenK => one(sizes.seqlen_k),
        });
        let (program, tables) = (self.program, &self.tables);
        self.bounds.evaluate(&ranges, program.constants(), |table, indices| {
            let element = program.tables()[table as usize].element;
            match tables[table as usize] {
                Some(table) => bounds_within(table, indices, element.is_float()),
                None => Bounds::any(read_as(element)),
            }
        });
        Coverage::of(self.bounds.of(mask))
    }
}

/// Returns the bounds of what a table holds within bounds of its indices, each moved into the table.
fn bounds_within(table: &HostTable, indices: &[(i32, i32)], is_float: bool) -> Bounds {
    let mut offsets = vec![0];
    for (&size, &(first, last)) in table.shape.iter().zip(indices) {
        let inside = |index: i32| i64::from(index).clamp(0, size as i64 - 1) as usize;
        let along = |offset: usize| (inside(first)..=inside(last)).map(move |index| offset * size + index);
        offsets = offsets.into_iter().flat_map(along).collect();
    }
    let values = || offsets.iter().map(|&offset| table.values[offset]);
    let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
        (low.min(x), high.max(x))
    });
    match is_float {
        true if values().any(f64::is_nan) => Bounds::AnyScore,
        true => Bounds::Score(low as f32, high as f32),
        false => {
            let index = |x: f64| x as i64 as i32; // the same bits, of a u32 too
            match index(low) <= index(high) && low >= f64::from(i32::MIN) && high <= f64::from(i32::MAX) {
                true => Bounds::Index(index(low), index(high)),
                false => Bounds::Index(i32::MIN, i32::MAX),
            }
        }
    }
}
