//! [`RowLayout`]: memory of lse, row_max and row_sum as callers may have it, with NaN around the elements.

use flash_attention::{Device, Element, Output, Statistics, Tensor};
use proptest::prelude::*;

/// lse, row_max and row_sum in one buffer: the order of their axes, gaps, and where in it the three take turns.
#[derive(Clone, Copy, Debug)]
pub struct RowLayout {
    /// The axes batch, heads and seqlen in the order of memory, outermost first. Packed rows have no batch.
    pub order: [usize; 3],
    /// Elements of memory behind those of each axis, in that order.
    pub gaps: [usize; 3],
    /// Number of these axes outside of the one along which the tensors take turns: with 0 they lie one behind the other, with all the
    /// elements of a query are neighbours.
    pub outside: usize,
    /// Further elements along that axis.
    pub others: usize,
}

/// Orders of three axes.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Draws any layout, and now and then one that is contiguous.
pub fn row_layout() -> impl Strategy<Value = RowLayout> {
    let gap = || prop_oneof![2 => Just(0_usize), 1 => 1..4_usize];
    (0..ORDERS.len(), (gap(), gap(), gap()), 0..=3_usize, 0..2_usize).prop_map(|(order, gaps, outside, others)| {
        RowLayout {
            order: ORDERS[order],
            gaps: gaps.into(),
            outside,
            others,
        }
    })
}

/// A buffer, and the three tensors in it.
#[derive(Debug)]
pub struct RowMemory {
    memory: Tensor<f32>,
    /// lse, row_max and row_sum.
    pub rows: [Tensor<f32>; 3],
}

impl RowLayout {
    /// Makes a buffer full of NaN with three tensors of this shape, `[batch, heads, seqlen]` or `[heads, total]`.
    ///
    /// # Panics
    /// If the device has no memory.
    pub fn place(&self, device: &Device, shape: &[usize]) -> RowMemory {
        let missing = 3 - shape.len();
        let order: Vec<usize> = (self.order.iter())
            .filter(|&&axis| axis >= missing)
            .map(|axis| axis - missing)
            .collect();
        let mut sizes: Vec<usize> = order
            .iter()
            .zip(self.gaps)
            .map(|(&axis, gap)| shape[axis] + gap)
            .collect();
        let outside = self.outside.min(sizes.len());
        sizes.insert(outside, 3 + self.others);
        let nan = vec![f32::NAN; sizes.iter().product()];
        let memory = Tensor::from_slice(device, &sizes, &nan).expect("memory");
        let rows = [0, 1, 2].map(|row| {
            let mut order = order.clone();
            let mut view = memory.select(outside, row).expect("in range");
            for (place, &axis) in order.iter().enumerate() {
                view = view.narrow(place, 0, shape[axis]).expect("in range");
            }
            for axis in 0..order.len() {
                let place = order.iter().position(|&other| other == axis).expect("every axis");
                view = view.transpose(axis, place).expect("in range");
                order.swap(axis, place);
            }
            view
        });
        RowMemory { memory, rows }
    }
}

impl RowMemory {
    /// An output with these tensors, or with lse alone.
    pub fn output<T: Element>(&self, out: Tensor<T>, keeps_statistics: bool) -> Output<T> {
        let [lse, row_max, row_sum] = self.rows.clone();
        let mut output = Output::new(out, lse);
        output.statistics = keeps_statistics.then_some(Statistics { row_max, row_sum });
        output
    }

    /// Number of tensors that have gaps or another order, of all three or of lse alone.
    pub fn strided(&self, keeps_statistics: bool) -> usize {
        let rows = self.rows.iter().take(if keeps_statistics { 3 } else { 1 });
        rows.filter(|tensor| !tensor.info().is_contiguous()).count()
    }

    /// Reads the tensors that a call wrote, and checks that it wrote nothing beside them. There is no NaN among results.
    ///
    /// # Panics
    /// If the device fails, or another element of the buffer was written.
    pub fn read(&self, keeps_statistics: bool) -> Vec<Vec<u32>> {
        let rows = self.rows.iter().take(if keeps_statistics { 3 } else { 1 });
        let rows: Vec<Vec<f32>> = rows.map(|tensor| tensor.to_vec().expect("read")).collect();
        let numbers = |of: &[f32]| of.iter().filter(|x| !x.is_nan()).count();
        let (all, own) = (numbers(&self.memory.to_vec().expect("read")), numbers(&rows.concat()));
        assert_eq!(own, rows.concat().len(), "an element is missing");
        assert_eq!(all, own, "memory beside the rows was written");
        rows.iter()
            .map(|row| row.iter().map(|x| x.to_bits()).collect())
            .collect()
    }
}
