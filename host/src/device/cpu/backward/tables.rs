//! Gradients of a program's tables and sinks.
//!
//! A task adds in the order of its keys and queries, and tasks take turns, so each element of a gradient is one sum
//! in one order, on any number of threads. Tables that are small are summed in f64 by each task on its own, then in turn.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Backward;
use super::dq::wait_for;
use super::program::BackwardProgram;
use crate::device::cpu::pointer_mut;
use crate::device::cpu::program::{Machine, Table};
use crate::device::cpu::team::Team;
use crate::device::cpu::tensor::QueryRows;
use crate::plan::TableGradients;
use crate::program::strip::Slot;
use crate::program::{Coordinate, Derivative, Node};

/// Elements of a table at most for which each task keeps sums of its own.
const SMALL: usize = 1 << 15;

/// A read of a table whose gradient is wanted.
pub(super) struct Read {
    /// The table, by its place in [`TableSums`].
    table: usize,
    /// The derivative of y by what is read.
    derivative: Slot,
    /// The index on each axis.
    indices: Vec<Slot>,
}

/// The gradients of tables, which tasks add to.
pub(super) struct TableSums {
    tables: Vec<TableSum>,
    /// Tasks that have added to all tables, of all heads and runs of keys.
    added: AtomicU32,
    /// Number of heads, for each run of keys, whose task has added to tables of keys.
    added_to_keys: Vec<AtomicU32>,
}

struct TableSum {
    /// The table, by its place in the program.
    place: usize,
    gradient: *mut f32,
    last: [i32; 4],
    strides: [usize; 4],
    size: usize,
    kind: Kind,
}

enum Kind {
    /// Sums of all tasks so far.
    Small(Mutex<Vec<f64>>),
    /// Runs of keys have no element in common, so only heads take turns.
    OfKeys,
    /// Any task may add to any element: tasks follow each other.
    Large,
}

// SAFETY: tasks write gradients in turn.
unsafe impl Send for TableSums {}
// SAFETY: as above.
unsafe impl Sync for TableSums {}

/// The sums of one thread for small tables; empty for others.
pub(super) type OwnSums = Vec<Vec<f64>>;

impl TableSums {
    /// Makes the sums of the tables whose gradients have an address, for so many runs of keys.
    pub(super) fn new(derivative: &Derivative, tables: &[Table], gradients: &TableGradients, runs: usize) -> Self {
        let wanted = (0..tables.len()).filter(|&place| gradients.tables[place] != 0);
        let expression = derivative.expression();
        let tables = wanted.map(|place| {
            let table = &tables[place];
            let mut strides = [0; 4];
            let mut size = 1;
            for axis in (0..table.rank).rev() {
                strides[axis] = size;
                size *= table.last[axis] as usize + 1;
            }
            let by_key = |node: Node| match node {
                Node::Load {
                    table,
                    indices,
                    clamped,
                } if table as usize == place => {
                    // Clamped, keys past the end of the table share its last element.
                    let mut nodes = indices.iter().map(|&index| expression.node(index));
                    !clamped && nodes.any(|node| node == Node::Coordinate(Coordinate::Key))
                }
                _ => true,
            };
            TableSum {
                place,
                gradient: pointer_mut(gradients.tables[place]),
                last: table.last,
                strides,
                size,
                kind: if size <= SMALL {
                    Kind::Small(Mutex::new(vec![0.0; size]))
                } else if derivative.loads().iter().all(|load| by_key(expression.node(load.load))) {
                    Kind::OfKeys
                } else {
                    Kind::Large
                },
            }
        });
        Self {
            tables: tables.collect(),
            added: AtomicU32::new(0),
            added_to_keys: (0..runs).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Returns the reads of tables whose gradients are wanted. For each read of the derivative, `roots` has its derivative
    /// and its indices.
    pub(super) fn reads(&self, derivative: &Derivative, roots: &[Slot]) -> Vec<Read> {
        let mut roots = roots.iter().copied();
        let reads = derivative.loads().iter().filter_map(|load| {
            let Node::Load { table, indices, .. } = derivative.expression().node(load.load) else {
                return None;
            };
            let derivative = roots.next()?;
            let indices = roots.by_ref().take(indices.len()).collect();
            let table = self.tables.iter().position(|sum| sum.place == table as usize)?;
            Some(Read {
                table,
                derivative,
                indices,
            })
        });
        reads.collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    pub(super) fn own_sums(&self) -> OwnSums {
        let size = |table: &TableSum| {
            if matches!(table.kind, Kind::Small(_)) {
                table.size
            } else {
                0
            }
        };
        self.tables.iter().map(|table| vec![0.0; size(table)]).collect()
    }

    /// Waits until the task of a head and a run of keys may add.
    pub(super) fn begin(&self, head: usize, run: usize) {
        for table in &self.tables {
            match table.kind {
                Kind::Small(_) => (),
                Kind::OfKeys => wait_for(&self.added_to_keys[run], head as u32),
                Kind::Large => wait_for(&self.added, (head * self.added_to_keys.len() + run) as u32),
            }
        }
    }

    /// Ends a task: adds its own sums to those of the tasks before it, and leaves zeros.
    pub(super) fn end(&self, head: usize, run: usize, own: &mut OwnSums) {
        if self.is_empty() {
            return;
        }
        let task = (head * self.added_to_keys.len() + run) as u32;
        self.added_to_keys[run].store(head as u32 + 1, Ordering::Release);
        wait_for(&self.added, task);
        for (table, own) in self.tables.iter().zip(own) {
            if let Kind::Small(sums) = &table.kind {
                let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
                sums.iter_mut().zip(own.iter()).for_each(|(sum, own)| *sum += own);
                own.fill(0.0);
            }
        }
        self.added.store(task + 1, Ordering::Release);
    }

    /// Writes the sums that are not in their place yet, once all tasks have ended.
    pub(super) fn finish(&self) {
        for table in &self.tables {
            if let Kind::Small(sums) = &table.kind {
                let sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
                for (element, sum) in sums.iter().enumerate() {
                    // SAFETY: a gradient has as many elements as its table, and no task is at work.
                    unsafe { *table.gradient.add(element) = *sum as f32 };
                }
            }
        }
    }

    /// Adds the contribution of a strip of gradients of y: some lanes by some keys, rows `stride` apart.
    ///
    /// # Safety
    /// The machine has run the code of the read for the strip that starts at lane `first`; the gradients are there.
    pub(super) unsafe fn add(
        &self,
        read: &Read,
        own: &mut OwnSums,
        machine: &mut Machine,
        first: usize,
        [keys, lanes]: [usize; 2],
        (dy, stride): (*const f32, usize),
    ) {
        let table = &self.tables[read.table];
        let derivative = machine.register(read.derivative, first);
        let indices: Vec<_> = read.indices.iter().map(|&slot| machine.register(slot, first)).collect();
        let is_one_element = read.indices.iter().all(|slot| slot.is_of_head());
        // SAFETY: registers have as many rows and lanes, says the caller; elements are within the gradient.
        unsafe {
            let offset = |key: usize, lane: usize| {
                let of_axis = |(axis, &(rows, step)): (usize, &(*const f32, usize))| {
                    let index = rows.add(key * step + lane).cast::<i32>().read();
                    index.clamp(0, table.last[axis]) as usize * table.strides[axis]
                };
                indices.iter().enumerate().map(of_axis).sum::<usize>()
            };
            let mut add = |element: usize, value: f32| match &table.kind {
                Kind::Small(_) => own[read.table][element] += f64::from(value),
                _ => *table.gradient.add(element) += value,
            };
            let mut sum = 0.0_f32;
            for key in 0..keys {
                for lane in 0..lanes {
                    let dy = *dy.add(key * stride + lane);
                    if dy == 0.0 {
                        continue;
                    }
                    let value = dy * *derivative.0.add(key * derivative.1 + lane);
                    if is_one_element {
                        sum += value;
                    } else {
                        add(offset(key, lane), value);
                    }
                }
            }
            if is_one_element && keys * lanes > 0 {
                add(offset(0, 0), sum);
            }
        }
    }
}

impl Backward<'_> {
    /// Writes the gradient of the sinks: of each head, the sum of `-exp(sink - lse) * delta` over its queries.
    ///
    /// # Safety
    /// The contract of [`backward`](super::backward); delta is there.
    pub(super) unsafe fn sink_gradients(&self, team: &Team<'_>, program: &BackwardProgram, gradient: u64) {
        let lse = QueryRows::new(self.tensors.lse, self.problem);
        let (heads, seqlen_q) = (self.problem.heads_q(), self.problem.seqlen_q() as usize);
        team.share(
            heads,
            || (),
            |(), head| {
                let Some(sink) = program.scores.sink(head) else { return };
                let mut sum = 0.0_f64;
                for batch in 0..self.problem.batch() {
                    let first = (batch * heads + head) * seqlen_q;
                    for query in first..first + seqlen_q {
                        // SAFETY: lse and delta have a number for each query, and no thread writes them any more.
                        let (lse, delta) = unsafe { (*lse.at(query), *pointer_mut::<f32>(self.delta).add(query)) };
                        sum -= (f64::from(sink) - f64::from(lse)).exp() * f64::from(delta);
                    }
                }
                // SAFETY: the gradient has an element for each head, and this task alone writes it.
                unsafe { *pointer_mut::<f32>(gradient).add(head) = sum as f32 };
            },
        );
    }
}
