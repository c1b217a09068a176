//! [`Rotary`]: rotary position embedding, which turns pairs of elements of a head by angles that grow with the position.

use std::sync::Arc;

use crate::element::Element;
use crate::error::Error;
use crate::tensor::Tensor;

/// Rotary position embedding (RoFormer, 2021): pairs (a, b) of the first `rotary_dim` elements of a head become
/// `(a cos - b sin, a sin + b cos)` of an angle that is the position times the frequency of the pair.
///
/// Pairs are the halves of these elements, i and i + rotary_dim / 2, as in GPT-NeoX and Llama, or neighbours, 2i and 2i + 1, as in
/// GPT-J, after [`interleaved`](Self::interleaved). Elements past `rotary_dim` stay as they are.
///
/// ```
/// use flash_attention::{Device, Rotary, Tensor};
///
/// let rotary = Rotary::new(8, 10_000.0)?;
/// let x = Tensor::from_slice(&Device::cpu(), [1, 1, 2, 8], &[1.0_f32; 16])?;
/// let turned = rotary.forward(&x, &[0, 5])?.to_vec()?; // tokens at the positions 0 and 5
/// assert_eq!(turned[..8], [1.0; 8]);
/// assert!((turned[8] - (5.0_f32.cos() - 5.0_f32.sin())).abs() < 1e-6);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    pairs: usize,
    interleaved: bool,
    angles: Angles,
}

#[derive(Clone, Debug, PartialEq)]
enum Angles {
    /// Angle of each pair at position 1.
    Frequencies(Arc<[f64]>),
    /// cos and sin, `[positions, pairs]` each.
    Tables([Arc<[f32]>; 2]),
}

impl Rotary {
    /// Makes an embedding whose pair i of `rotary_dim / 2` has the frequency `base^(-2i / rotary_dim)`.
    ///
    /// # Errors
    /// [`Error::Rotary`] unless rotary_dim is even and not 0, and base is a finite number above 0.
    pub fn new(rotary_dim: usize, base: f64) -> Result<Self, Error> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(refused("rotary_dim", rotary_dim as f64, "an even number, and not 0"));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(refused("base", base, "a finite number above 0"));
        }
        let frequency = |pair: usize| base.powf(-2.0 * pair as f64 / rotary_dim as f64);
        let frequencies: Vec<f64> = (0..rotary_dim / 2).map(frequency).collect();
        Self::of_frequencies(&frequencies)
    }

    /// Makes an embedding with a frequency for each pair, such as those of Llama 3's scaling or YaRN.
    ///
    /// # Errors
    /// [`Error::Rotary`] without a frequency, or for one that is not finite.
    pub fn of_frequencies(frequencies: &[f64]) -> Result<Self, Error> {
        if frequencies.is_empty() {
            return Err(refused("rotary_dim", 0.0, "an even number, and not 0"));
        }
        if let Some(&frequency) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
            return Err(refused("frequency", frequency, "a finite number"));
        }
        Ok(Self {
            pairs: frequencies.len(),
            interleaved: false,
            angles: Angles::Frequencies(frequencies.into()),
        })
    }

    /// Makes an embedding from tables of cosines and sines, `[positions, rotary_dim / 2]` each.
    ///
    /// # Errors
    /// [`Error::Rotary`] unless rotary_dim is even and not 0; [`Error::DataLength`] unless both tables have one number of whole
    /// rows.
    pub fn of_tables(rotary_dim: usize, cos: &[f32], sin: &[f32]) -> Result<Self, Error> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(refused("rotary_dim", rotary_dim as f64, "an even number, and not 0"));
        }
        let pairs = rotary_dim / 2;
        let shape = [cos.len().div_ceil(pairs), pairs];
        for len in [cos.len(), sin.len()] {
            if len != shape[0] * pairs {
                return Err(Error::DataLength {
                    len,
                    expected: shape[0] * pairs,
                    shape: shape.to_vec(),
                });
            }
        }
        Ok(Self {
            pairs,
            interleaved: false,
            angles: Angles::Tables([cos.into(), sin.into()]),
        })
    }

    /// Returns this embedding with pairs of neighbours, 2i and 2i + 1.
    #[must_use]
    pub fn interleaved(self) -> Self {
        Self {
            interleaved: true,
            ..self
        }
    }

    /// Returns this embedding with positions divided by `factor`: linear interpolation to longer contexts. Tables stay as they are.
    ///
    /// # Errors
    /// [`Error::Rotary`] unless the factor is a finite number above 0.
    pub fn scaled(self, factor: f64) -> Result<Self, Error> {
        if !(factor.is_finite() && factor > 0.0) {
            return Err(refused("factor", factor, "a finite number above 0"));
        }
        let angles = match &self.angles {
            Angles::Frequencies(of) => Angles::Frequencies(of.iter().map(|frequency| frequency / factor).collect()),
            Angles::Tables(_) => self.angles,
        };
        Ok(Self { angles, ..self })
    }

    /// Number of elements of a head that are turned.
    pub fn rotary_dim(&self) -> usize {
        2 * self.pairs
    }

    /// Turns tokens at their positions. x is `[batch, heads, seqlen, head_dim]` with `batch * seqlen` positions, or packed
    /// `[total, heads, head_dim]` with `total`; the result is contiguous. Arithmetic is in f32. On a GPU x passes through the host.
    ///
    /// # Errors
    /// [`Error::Rank`]; [`Error::SequenceCount`] unless there is a position a token; [`Error::Rotary`] if rotary_dim is above
    /// head_dim; [`Error::Sequence`] for a position that is negative or beyond the tables; and the errors of
    /// [`Tensor::to_vec`] and [`Tensor::from_slice`].
    pub fn forward<T: Element>(&self, x: &Tensor<T>, positions: &[i32]) -> Result<Tensor<T>, Error> {
        self.turned(x, positions, 1.0)
    }

    /// Returns the gradient of x from `dout`, the gradient of what [`forward`](Self::forward) gave: the turn back.
    ///
    /// # Errors
    /// The errors of [`forward`](Self::forward).
    pub fn backward<T: Element>(&self, dout: &Tensor<T>, positions: &[i32]) -> Result<Tensor<T>, Error> {
        self.turned(dout, positions, -1.0)
    }

    fn turned<T: Element>(&self, x: &Tensor<T>, positions: &[i32], sign: f32) -> Result<Tensor<T>, Error> {
        let (heads, tokens, head_dim) = match *x.shape() {
            [total, heads, head_dim] => (heads, total, head_dim),
            [batch, heads, seqlen, head_dim] => (heads, batch * seqlen, head_dim),
            _ => {
                return Err(Error::Rank {
                    argument: "x",
                    shape: x.shape().to_vec(),
                    rank: x.shape().len(),
                    expected: 4,
                });
            }
        };
        if positions.len() != tokens {
            return Err(Error::SequenceCount {
                argument: "positions",
                len: positions.len(),
                expected: tokens,
            });
        }
        self.check(head_dim, positions)?;
        let mut elements = x.to_vec()?;
        let mut turns = Turns::new(self, sign);
        if elements.is_empty() {
            return Tensor::empty(x.device(), x.shape());
        }
        if let [_, _, seqlen, _] = *x.shape() {
            let entries = elements.chunks_mut(heads * seqlen * head_dim);
            for (entry, positions) in entries.zip(positions.chunks(seqlen)) {
                for (token, &position) in positions.iter().enumerate() {
                    turns.set(position);
                    let rows = entry.chunks_mut(head_dim).skip(token).step_by(seqlen);
                    rows.for_each(|row| turns.apply(row));
                }
            }
        } else {
            for (token, &position) in elements.chunks_mut(heads * head_dim).zip(positions) {
                turns.set(position);
                token.chunks_mut(head_dim).for_each(|row| turns.apply(row));
            }
        }
        Tensor::from_slice(x.device(), x.shape(), &elements)
    }

    /// Checks that heads of this length can be turned at these positions.
    fn check(&self, head_dim: usize, positions: &[i32]) -> Result<(), Error> {
        if self.rotary_dim() > head_dim {
            let expected = format!("at most {head_dim}, the head_dim");
            return Err(refused("rotary_dim", self.rotary_dim() as f64, expected));
        }
        let (rows, expected) = match &self.angles {
            Angles::Frequencies(_) => (usize::MAX, "at least 0".to_owned()),
            Angles::Tables([cos, _]) => {
                let rows = cos.len() / self.pairs;
                (rows, format!("at least 0 and below {rows}, the rows of cos and sin"))
            }
        };
        let stands = |position: i32| usize::try_from(position).is_ok_and(|position| position < rows);
        match positions.iter().position(|&position| !stands(position)) {
            None => Ok(()),
            Some(sequence) => Err(Error::Sequence {
                argument: "positions",
                sequence,
                value: positions[sequence].into(),
                expected,
            }),
        }
    }
}

/// Cosines and sines of one position.
struct Turns<'a> {
    rotary: &'a Rotary,
    /// -1 to turn back.
    sign: f32,
    of_pairs: Vec<[f32; 2]>,
}

impl<'a> Turns<'a> {
    fn new(rotary: &'a Rotary, sign: f32) -> Self {
        Self {
            rotary,
            sign,
            of_pairs: vec![[1.0, 0.0]; rotary.pairs],
        }
    }

    /// Computes the turns of a position, which [`Rotary::check`] let pass.
    fn set(&mut self, position: i32) {
        for (pair, turn) in self.of_pairs.iter_mut().enumerate() {
            let [cos, sin] = match &self.rotary.angles {
                Angles::Frequencies(frequencies) => {
                    let (sin, cos) = (f64::from(position) * frequencies[pair]).sin_cos();
                    [cos as f32, sin as f32]
                }
                Angles::Tables(tables) => {
                    let place = position as usize * self.rotary.pairs + pair;
                    tables.each_ref().map(|table| table[place])
                }
            };
            *turn = [cos, self.sign * sin];
        }
    }

    /// Turns the pairs of one head.
    fn apply<T: Element>(&self, row: &mut [T]) {
        let pairs = self.rotary.pairs;
        for (pair, [cos, sin]) in self.of_pairs.iter().enumerate() {
            let (first, second) = match self.rotary.interleaved {
                true => (2 * pair, 2 * pair + 1),
                false => (pair, pair + pairs),
            };
            let (a, b) = (row[first].to_f32(), row[second].to_f32());
            row[first] = T::from_f32(a * cos - b * sin);
            row[second] = T::from_f32(a * sin + b * cos);
        }
    }
}

fn refused(argument: &'static str, value: f64, expected: impl Into<String>) -> Error {
    Error::Rotary {
        argument,
        value,
        expected: expected.into(),
    }
}
