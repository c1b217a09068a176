//! [`Hadamard`]: a rotation that spreads outliers over a head.

use super::sizes;
use crate::element::Element;
use crate::error::Error;
use crate::problem::{HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};
use crate::tensor::Tensor;

/// A random rotation of the rows of q and k, the incoherent processing of FlashAttention-3.
///
/// A row is multiplied by random signs and then by a Hadamard matrix divided by the root of its size, which is orthogonal: in
/// exact arithmetic scores do not change if q and k are both rotated by the same one. An outlier of one element becomes a part
/// of every element, so that quantised rows have a smaller largest magnitude and errors that add up less. v is not rotated.
///
/// The matrix has the size of the largest power of two that divides head_dim, and where that is not head_dim itself, as for
/// 96 or 192, it stands repeatedly on the diagonal of a larger one.
#[derive(Clone, Debug, PartialEq)]
pub struct Hadamard {
    /// The sign of each element of a row, times the factor that makes the matrix orthogonal.
    factors: Vec<f32>,
    /// Number of rows and columns of a block on the diagonal.
    size: usize,
}

impl Hadamard {
    /// Makes the rotation for a head_dim, with signs from a seed: the same ones on every machine.
    ///
    /// # Errors
    /// [`Error::HeadDim`] if head_dim is none that attention takes.
    pub fn new(head_dim: usize, seed: u64) -> Result<Self, Error> {
        if !(1..=MAX_HEAD_DIM).contains(&head_dim) || !head_dim.is_multiple_of(HEAD_DIM_MULTIPLE) {
            return Err(Error::HeadDim {
                argument: "hadamard",
                head_dim,
                multiple_of: HEAD_DIM_MULTIPLE,
                max: MAX_HEAD_DIM,
            });
        }
        let size = 1 << head_dim.trailing_zeros();
        let factor = (1.0 / (size as f64).sqrt()) as f32;
        let sign = |index: usize| {
            if mixed(seed, index as u64) >> 63 == 0 {
                factor
            } else {
                -factor
            }
        };
        Ok(Self {
            factors: (0..head_dim).map(sign).collect(),
            size,
        })
    }

    /// Returns the head_dim that it is for.
    pub fn head_dim(&self) -> usize {
        self.factors.len()
    }

    /// Rotates each row of a `[batch, heads, seqlen, head_dim]` tensor. The result is a new contiguous tensor, computed in f32
    /// on the host and rounded to `T`; elements of a GPU are copied there and back.
    ///
    /// # Errors
    /// [`Error::Rank`] if the tensor has not four axes, [`Error::ShapeMismatch`] if it has another head_dim, and the errors of
    /// [`Tensor::to_vec`] and [`Tensor::from_slice`].
    pub fn apply<T: Element>(&self, tensor: &Tensor<T>) -> Result<Tensor<T>, Error> {
        let [_, _, _, head_dim] = sizes(tensor)?;
        if head_dim != self.head_dim() {
            return Err(Error::ShapeMismatch {
                argument: "tensor",
                axis: "head_dim",
                got: head_dim,
                other: "hadamard",
                expected: self.head_dim(),
            });
        }
        let mut elements = tensor.to_vec()?;
        let mut row = vec![0.0; head_dim];
        for elements in elements.chunks_exact_mut(head_dim) {
            T::widen(elements, &mut row);
            self.rotate(&mut row);
            T::narrow(&row, elements);
        }
        Tensor::from_slice(tensor.device(), tensor.shape(), &elements)
    }

    /// Rotates one row: signs, then sums and differences of elements 1, 2, 4 and so on apart.
    fn rotate(&self, row: &mut [f32]) {
        row.iter_mut().zip(&self.factors).for_each(|(x, factor)| *x *= factor);
        let mut apart = 1;
        while apart < self.size {
            for pairs in row.chunks_exact_mut(2 * apart) {
                let (first, second) = pairs.split_at_mut(apart);
                for (x, y) in first.iter_mut().zip(second) {
                    (*x, *y) = (*x + *y, *x - *y);
                }
            }
            apart *= 2;
        }
    }
}

/// Number `index` of the generator SplitMix64 (Steele, Lea, Flood, 2014) that starts at the seed.
fn mixed(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
