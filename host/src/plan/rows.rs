//! [`RowCopies`]: contiguous copies of lse, row_max and row_sum, where the caller's tensors have gaps or another order.
//!
//! The kernels of attention take one address of each of these, and count rows as `[batch, heads_q, seqlen_q]`. A tensor with other
//! strides has a copy like that in the workspace. After forward, or before backward, launches of `rotary_f32` move it to the
//! caller's tensor or from there. A contiguous tensor costs neither.

use flash_attention_kernels::abi::{ForwardRows, StridedTensor};

use super::Launch;
use super::launch::{Axis, moves};
use super::pass::{Backward, Forward, ForwardResults, PassType};
use crate::error::Error;
use crate::problem::{Problem, ROWS};

/// Alignment of a copy in the workspace, in bytes.
const COPY_ALIGN: u64 = 16;

/// Places of the copies of lse, row_max and row_sum in the workspace, in bytes; `None` for a tensor that kernels access itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowCopies {
    places: [Option<u64>; ROWS.len()],
}

/// lse, row_max and row_sum as the caller has them, those that there are.
pub(super) type RowTensors = [Option<StridedTensor>; ROWS.len()];

/// Collects lse, and the statistics if there are any.
pub(super) fn row_tensors(lse: StridedTensor, statistics: Option<[StridedTensor; 2]>) -> RowTensors {
    let [row_max, row_sum] = statistics.map_or([None; 2], |tensors| tensors.map(Some));
    [Some(lse), row_max, row_sum]
}

impl RowCopies {
    /// Makes room behind the workspace for a copy of each tensor that is not contiguous.
    fn new(problem: &Problem, tensors: RowTensors, workspace_bytes: &mut u64) -> Self {
        let places = tensors.map(|tensor| {
            tensor.filter(|&tensor| !problem.has_contiguous_rows(tensor))?;
            let place = workspace_bytes.next_multiple_of(COPY_ALIGN);
            *workspace_bytes = place + problem.row_bytes();
            Some(place)
        });
        Self { places }
    }

    /// Adds to the launches of a forward pass those that move what kernels wrote to the caller's tensors. Returns the bytes that these
    /// read, which are as many as they write.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(super) fn after_forward(
        problem: &Problem,
        launches: &mut Vec<Launch>,
        workspace_bytes: &mut u64,
    ) -> Result<u128, Error> {
        let tensors = row_tensors(problem.lse(), problem.statistics());
        let copies = Self::new(problem, tensors, workspace_bytes);
        copies.set(launches);
        for (row, place, tensor) in copies.copied(tensors) {
            for moves in moves(axes(problem, problem.contiguous_rows(), tensor))? {
                launches.push(Launch::<Forward>::to_rows(row, place, moves)?);
            }
        }
        Ok(copies.bytes(problem))
    }

    /// Adds to the launches of a backward pass those that fill the copies before, and returns the bytes that these read.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(super) fn before_backward(
        problem: &Problem,
        tensors: RowTensors,
        launches: &mut Vec<Launch<Backward>>,
        workspace_bytes: &mut u64,
    ) -> Result<u128, Error> {
        let copies = Self::new(problem, tensors, workspace_bytes);
        copies.set(launches);
        let mut first = Vec::new();
        for (row, place, tensor) in copies.copied(tensors) {
            for moves in moves(axes(problem, tensor, problem.contiguous_rows()))? {
                first.push(Launch::<Backward>::from_rows(row, tensor.address, place, moves)?);
            }
        }
        launches.splice(0..0, first);
        Ok(copies.bytes(problem))
    }

    fn set(self, launches: &mut [Launch<impl PassType>]) {
        launches.iter_mut().for_each(|launch| launch.rows = self);
    }

    /// The tensors that have copies: number among [`ROWS`], place of the copy, and the tensor.
    fn copied(self, tensors: RowTensors) -> impl Iterator<Item = (usize, u64, StridedTensor)> {
        let rows = self.places.into_iter().zip(tensors).enumerate();
        rows.filter_map(|(row, (place, tensor))| Some((row, place?, tensor?)))
    }

    /// Bytes of all copies.
    fn bytes(self, problem: &Problem) -> u128 {
        self.places.iter().flatten().count() as u128 * u128::from(problem.row_bytes())
    }

    /// Returns the addresses that kernels take, in a workspace at this address, in place of the caller's.
    fn placed(self, of_caller: [u64; ROWS.len()], workspace: u64) -> [u64; ROWS.len()] {
        let mut addresses = of_caller;
        for (address, place) in addresses.iter_mut().zip(self.places) {
            *address = place.map_or(*address, |place| workspace + place);
        }
        addresses
    }

    /// Returns the results that kernels write.
    pub(super) fn written(self, results: &ForwardResults) -> ForwardResults {
        let [lse, row_max, row_sum] = self.placed(results.rows(), results.workspace);
        ForwardResults {
            lse,
            statistics: results.statistics.map(|_| [row_max, row_sum]),
            ..*results
        }
    }

    /// Returns the results of forward that the kernels of backward read.
    pub(super) fn read(self, rows: ForwardRows, workspace: u64) -> ForwardRows {
        let [lse, row_max, row_sum] = self.placed([rows.lse, rows.row_max, rows.row_sum], workspace);
        ForwardRows { lse, row_max, row_sum }
    }
}

/// The axes of the rows of two tensors.
fn axes(problem: &Problem, from: StridedTensor, to: StridedTensor) -> [Axis; 3] {
    let strides = |tensor: StridedTensor| [tensor.batch_stride, tensor.head_stride, tensor.row_stride];
    let (sizes, from, to) = (problem.row_sizes(), strides(from), strides(to));
    [0, 1, 2].map(|axis| Axis {
        size: sizes[axis],
        from: from[axis],
        to: to[axis],
    })
}
