//! Launches that move one f32 per query between a contiguous tensor and one with other strides.
//!
//! The kernel moves `[heads, columns]` elements a block, heads with any strides and columns to neighbours. Here the columns are the
//! axis of neighbours in the tensor that is written, if it has one, and the longest axis is cut into runs, a block each.

use flash_attention_kernels::abi::RotaryParams;
use flash_attention_kernels::entries::Dtype;
use flash_attention_kernels::work::TokenMove;

use super::{BackwardParameters, ForwardParameters, Launch, MAX_BLOCKS};
use crate::error::Error;
use crate::plan::pass::{Backward, Forward, PassType};
use crate::problem::ROWS;

/// Elements of the longest axis that a block moves: few enough that long sequences fill a card, and so many that the list of blocks,
/// 24 bytes each, is short beside the elements.
const RUN: usize = 128;

/// An axis of a move: its size, and its strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plan) struct Axis {
    pub size: usize,
    pub from: u64,
    pub to: u64,
}

impl Axis {
    const ONE: Self = Self {
        size: 1,
        from: 0,
        to: 0,
    };

    /// Tells if its elements are neighbours where they are written.
    fn has_neighbours(&self) -> bool {
        self.size > 1 && self.to == 1
    }
}

/// The moves of a launch, a block each, and its parameters without addresses.
pub(in crate::plan) struct Moves {
    params: RotaryParams,
    tokens: Vec<TokenMove>,
}

/// Returns the launches that move every element of these axes once: one for the whole runs, and one for what is left of each.
///
/// # Errors
/// [`Error::GridTooLarge`].
pub(in crate::plan) fn moves(mut axes: [Axis; 3]) -> Result<Vec<Moves>, Error> {
    axes.sort_by_key(|axis| axis.size);
    let [mut outer, mut columns, run] = axes;
    if outer.has_neighbours() {
        (outer, columns) = (columns, outer);
    }
    // Where no other axis is one of neighbours, each block has one element of both.
    let (outer, columns) = match columns.has_neighbours() && !run.has_neighbours() {
        true => ([outer, Axis::ONE], columns),
        false => ([outer, columns], Axis::ONE),
    };
    let whole = run.size - run.size % RUN;
    let pieces = [(0..whole, RUN), (whole..run.size, run.size - whole)];
    let pieces = pieces.into_iter().filter(|(rows, _)| !rows.is_empty());
    pieces
        .map(|(rows, len)| {
            let piece = Axis { size: len, ..run };
            let (heads, columns) = match run.has_neighbours() {
                true => (Axis::ONE, piece),
                false => (piece, columns),
            };
            Ok(Moves {
                params: params(heads, columns)?,
                tokens: tokens(outer, run, rows.step_by(len))?,
            })
        })
        .collect()
}

/// The places of blocks: at each of both outer axes, a run from each of these elements of an axis.
fn tokens(
    [first, second]: [Axis; 2],
    run: Axis,
    begins: impl ExactSizeIterator<Item = usize> + Clone,
) -> Result<Vec<TokenMove>, Error> {
    let blocks = first.size as u128 * second.size as u128 * begins.len() as u128;
    if blocks > u128::from(MAX_BLOCKS) {
        let limit = MAX_BLOCKS;
        return Err(Error::GridTooLarge { blocks, limit });
    }
    let mut tokens = Vec::with_capacity(blocks as usize);
    for x in 0..first.size as u64 {
        for y in 0..second.size as u64 {
            tokens.extend(begins.clone().map(|begin| TokenMove {
                from: x * first.from + y * second.from + begin as u64 * run.from,
                to: x * first.to + y * second.to + begin as u64 * run.to,
                position: 0,
            }));
        }
    }
    Ok(tokens)
}

/// The parameters of blocks that move `[heads, columns]` elements, none of them turned.
fn params(heads: Axis, columns: Axis) -> Result<RotaryParams, Error> {
    let size = |axis: Axis| {
        u32::try_from(axis.size).map_err(|_| Error::GridTooLarge {
            blocks: axis.size as u128,
            limit: u32::MAX,
        })
    };
    Ok(RotaryParams {
        from: 0,
        from_head_stride: heads.from,
        from_column_stride: columns.from,
        to: 0,
        to_head_stride: heads.to,
        tokens: 0,
        angles: 0,
        tables: 0,
        heads: size(heads)?,
        head_dim: size(columns)?,
        pairs: 0,
        interleaved: 0,
        sign: 1.0,
    })
}

impl Launch<Forward> {
    /// Makes a launch that moves what kernels wrote at this place of the workspace to a result of the caller's: the one of this number
    /// among [`ROWS`].
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(in crate::plan) fn to_rows(row: usize, place: u64, moves: Moves) -> Result<Self, Error> {
        Self::of_rows(row, moves, |params| {
            ForwardParameters::Rows(RotaryParams { from: place, ..params }, row)
        })
    }
}

impl Launch<Backward> {
    /// Makes a launch that moves a result of forward at this address, the one of this number among [`ROWS`], to where kernels read it,
    /// at a place of the workspace.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(in crate::plan) fn from_rows(row: usize, address: u64, place: u64, moves: Moves) -> Result<Self, Error> {
        let (from, to) = (address, place);
        Self::of_rows(row, moves, |params| {
            BackwardParameters::Rows(RotaryParams { from, to, ..params })
        })
    }
}

impl<P: PassType> Launch<P> {
    fn of_rows(row: usize, moves: Moves, of: impl FnOnce(RotaryParams) -> P::Parameters) -> Result<Self, Error> {
        let Moves { params, tokens } = moves;
        let launch = Self::moving(Dtype::F32, params.head_dim, of(params), &tokens, None)?;
        Ok(Self {
            copied: Some(ROWS[row]),
            ..launch
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Where each element that moves write comes from.
    fn written(all: &[Moves]) -> HashMap<u64, u64> {
        let mut written = HashMap::new();
        for Moves { params: p, tokens } in all {
            for token in tokens {
                for (head, column) in (0..p.heads).flat_map(|head| (0..p.head_dim).map(move |column| (head, column))) {
                    let (head, column) = (u64::from(head), u64::from(column));
                    let from = token.from + head * p.from_head_stride + column * p.from_column_stride;
                    let to = token.to + head * p.to_head_stride + column;
                    assert_eq!(written.insert(to, from), None, "element {to} is written twice");
                }
            }
        }
        written
    }

    /// Axes of these sizes, which follow each other in memory in an order, the last at every `gap` elements.
    fn strides(sizes: [usize; 3], order: [usize; 3], gap: usize) -> [u64; 3] {
        let mut strides = [0; 3];
        let mut stride = gap;
        for axis in order.into_iter().rev() {
            strides[axis] = stride as u64;
            stride *= sizes[axis];
        }
        strides
    }

    #[test]
    fn every_element_is_moved_once() {
        let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        for sizes in [
            [2, 3, 5],
            [1, 1, 1],
            [7, 2, 1],
            [1, 4, 300],
            [2, 3, 256],
            [130, 2, 3],
            [2, 129, 7],
        ] {
            for (order, gap) in orders.into_iter().flat_map(|order| [1, 3].map(|gap| (order, gap))) {
                let strided = strides(sizes, order, gap);
                let contiguous = strides(sizes, [0, 1, 2], 1);
                for (from, to) in [(strided, contiguous), (contiguous, strided)] {
                    let axes = [0, 1, 2].map(|axis| Axis {
                        size: sizes[axis],
                        from: from[axis],
                        to: to[axis],
                    });
                    let written = written(&moves(axes).expect("few blocks"));
                    assert_eq!(written.len(), sizes.iter().product::<usize>());
                    let place = |index: [u64; 3], strides: [u64; 3]| -> u64 {
                        index.iter().zip(strides).map(|(index, stride)| index * stride).sum()
                    };
                    let all = (0..sizes[0]).flat_map(|i| (0..sizes[1]).map(move |j| (i, j)));
                    for (i, j, k) in all.flat_map(|(i, j)| (0..sizes[2]).map(move |k| (i, j, k))) {
                        let index = [i as u64, j as u64, k as u64];
                        assert_eq!(written[&place(index, to)], place(index, from), "{axes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn neighbours_are_written_by_neighbouring_lanes() {
        let axis = |size, from, to| Axis { size, from, to };
        // [2, 8, 300] to memory [2, 300, 8]: the heads are neighbours, and rows are cut into runs of 128 and of 44.
        let by_head = moves([axis(2, 2400, 2400), axis(8, 300, 1), axis(300, 1, 8)]).expect("few blocks");
        let shapes: Vec<_> = (by_head.iter())
            .map(|Moves { params, tokens }| (tokens.len(), params.heads, params.head_dim))
            .collect();
        assert_eq!(shapes, [(4, 128, 8), (2, 44, 8)]);
        // Back: rows are neighbours.
        let back = moves([axis(2, 2400, 2400), axis(8, 1, 300), axis(300, 8, 1)]).expect("few blocks");
        let shapes: Vec<_> = (back.iter())
            .map(|Moves { params, tokens }| (tokens.len(), params.heads, params.head_dim))
            .collect();
        assert_eq!(shapes, [(32, 1, 128), (16, 1, 44)]);
    }

    #[test]
    fn too_many_blocks_are_refused_before_they_are_listed() {
        let axis = |size: usize| Axis { size, from: 1, to: 2 };
        let refused = moves([axis(1 << 20), axis(1 << 20), axis(1 << 20)]).err();
        assert!(matches!(refused, Some(Error::GridTooLarge { .. })), "{refused:?}");
    }
}
