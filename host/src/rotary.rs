//! [`Rotary`]: rotary position embedding, which turns pairs of elements of a head by angles that grow with the position.

use std::f64::consts::TAU;
use std::sync::Arc;

use flash_attention_kernels::abi::RotaryParams;
use flash_attention_kernels::work::TokenMove;

use crate::call::move_tokens;
use crate::element::Element;
use crate::error::Error;
use crate::plan::{Launch, Rotary as Moves};
use crate::tensor::Tensor;

/// Largest rotary_dim of [`Rotary::new`], far above any head_dim.
const MAX_ROTARY_DIM: usize = 1 << 16;

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
    /// cos and sin as devices read them, f32 `[positions, pairs, 2]`.
    Tables(Arc<[u8]>),
}

impl Angles {
    /// Returns the angles as devices read them: [`RotaryParams::angles`].
    fn bytes(&self) -> Arc<[u8]> {
        match self {
            Self::Frequencies(of) => of
                .iter()
                .flat_map(|&frequency| phase(frequency).to_ne_bytes())
                .collect(),
            Self::Tables(tables) => tables.clone(),
        }
    }
}

/// Returns an angle in units of 2^-64 turns, without whole turns.
fn phase(angle: f64) -> u64 {
    let turns = angle.abs() / TAU % 1.0;
    let phase = (turns * 2_f64.powi(64)) as u64;
    if angle < 0.0 { phase.wrapping_neg() } else { phase }
}

impl Rotary {
    /// Makes an embedding whose pair i of `rotary_dim / 2` has the frequency `base^(-2i / rotary_dim)`.
    ///
    /// # Errors
    /// [`Error::Rotary`] unless rotary_dim is an even number from 2 to 65536, base is a finite number above 0, and so are the
    /// frequencies.
    pub fn new(rotary_dim: usize, base: f64) -> Result<Self, Error> {
        if !(2..=MAX_ROTARY_DIM).contains(&rotary_dim) || !rotary_dim.is_multiple_of(2) {
            let expected = format!("an even number from 2 to {MAX_ROTARY_DIM}");
            return Err(refused("rotary_dim", rotary_dim as f64, expected));
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
            angles: Angles::Tables(
                (cos.iter().zip(sin))
                    .flat_map(|(cos, sin)| [*cos, *sin])
                    .flat_map(f32::to_ne_bytes)
                    .collect(),
            ),
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
    /// [`Error::Rotary`] unless the factor is a finite number above 0, and frequencies divided by it are finite.
    pub fn scaled(self, factor: f64) -> Result<Self, Error> {
        if !(factor.is_finite() && factor > 0.0) {
            return Err(refused("factor", factor, "a finite number above 0"));
        }
        let angles = match &self.angles {
            Angles::Frequencies(of) => {
                let of: Arc<[f64]> = of.iter().map(|frequency| frequency / factor).collect();
                if !of.iter().all(|frequency| frequency.is_finite()) {
                    return Err(refused("factor", factor, "a number that leaves frequencies finite"));
                }
                Angles::Frequencies(of)
            }
            Angles::Tables(_) => self.angles,
        };
        Ok(Self { angles, ..self })
    }

    /// Number of elements of a head that are turned.
    pub fn rotary_dim(&self) -> usize {
        2 * self.pairs
    }

    /// Turns tokens at their positions. x is `[batch, heads, seqlen, head_dim]` with `batch * seqlen` positions, or packed
    /// `[total, heads, head_dim]` with `total`; the result is contiguous. Arithmetic is in f32, and results have the same bits on every
    /// device. A GPU turns x on its own stream.
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
        let (tokens, seqlen, head_dim) = match *x.shape() {
            [total, _, head_dim] => (total, total, head_dim),
            [batch, _, seqlen, head_dim] => (batch * seqlen, seqlen, head_dim),
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
        let turned = Tensor::empty(x.device(), x.shape())?;
        let moves = positions.iter().enumerate().map(|(token, &position)| {
            let [entry, row] = [token / seqlen, token % seqlen];
            Move {
                from: [entry, row],
                to: [entry, row],
                position,
            }
        });
        moved(x, &turned, moves, Some((self, sign)))?.run()?;
        Ok(turned)
    }

    /// Checks that heads of this length can be turned at these positions.
    pub(crate) fn check(&self, head_dim: usize, positions: &[i32]) -> Result<(), Error> {
        if self.rotary_dim() > head_dim {
            let expected = format!("at most {head_dim}, the head_dim");
            return Err(refused("rotary_dim", self.rotary_dim() as f64, expected));
        }
        let (rows, expected) = match &self.angles {
            Angles::Frequencies(_) => (usize::MAX, "at least 0".to_owned()),
            Angles::Tables(tables) => {
                let rows = tables.len() / (self.pairs * size_of::<[f32; 2]>());
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

/// A token that is moved: its entry and row in both tensors, and the position at which it is turned.
pub(crate) struct Move {
    pub from: [usize; 2],
    pub to: [usize; 2],
    pub position: i32,
}

/// Plans to move tokens from one tensor to another, turned or as they are. Both tensors are `[entries, heads, rows, head_dim]`, or packed
/// `[rows, heads, head_dim]`, with the same heads and head_dim, and `to` has a contiguous last axis. `turns` has the sign of the angles.
///
/// # Errors
/// [`Error::GridTooLarge`].
pub(crate) fn moved<'a, T: Element>(
    from: &'a Tensor<T>,
    to: &'a Tensor<T>,
    moves: impl Iterator<Item = Move>,
    turns: Option<(&Rotary, f32)>,
) -> Result<Moved<'a, T>, Error> {
    let row = |tensor: &Tensor<T>, [entry, row]: [usize; 2]| match *tensor.strides() {
        [of_rows, _, _] => (row * of_rows) as u64,
        [of_entries, _, of_rows, _] => (entry * of_entries + row * of_rows) as u64,
        _ => unreachable!("three or four axes"),
    };
    let tokens = moves.map(
        |Move {
             from: source,
             to: target,
             position,
         }| TokenMove {
            from: row(from, source),
            to: row(to, target),
            position: position as u64,
        },
    );
    let tokens: Vec<TokenMove> = tokens.collect();
    let size = |axis: usize| {
        let size = from.shape()[axis];
        u32::try_from(size).map_err(|_| Error::GridTooLarge {
            blocks: size as u128,
            limit: u32::MAX,
        })
    };
    let last = from.shape().len() - 1;
    let pairs = turns.map_or(0, |(rotary, _)| rotary.pairs as u32);
    let params = RotaryParams {
        from: from.address(),
        from_head_stride: from.strides()[1] as u64,
        from_column_stride: from.strides()[last] as u64,
        to: to.address(),
        to_head_stride: to.strides()[1] as u64,
        tokens: 0,
        angles: 0,
        tables: turns
            .is_some_and(|(rotary, _)| matches!(rotary.angles, Angles::Tables(_)))
            .into(),
        heads: size(1)?,
        head_dim: size(last)?,
        pairs,
        interleaved: turns.is_some_and(|(rotary, _)| rotary.interleaved).into(),
        sign: turns.map_or(1.0, |(_, sign)| sign),
    };
    let is_empty = tokens.is_empty() || params.heads == 0 || params.head_dim == 0;
    let angles = turns.map(|(rotary, _)| rotary.angles.bytes());
    Ok(Moved {
        from,
        to,
        launch: match is_empty {
            true => None,
            false => Some(Launch::rotary(T::DTYPE, params, &tokens, angles)?),
        },
    })
}

/// Tokens on their way from one tensor to another.
pub(crate) struct Moved<'a, T: Element> {
    from: &'a Tensor<T>,
    to: &'a Tensor<T>,
    /// `None` if there is nothing to move.
    launch: Option<Launch<Moves>>,
}

impl<T: Element> Moved<'_, T> {
    /// Moves the tokens. The tensors share no memory, and rows and positions were checked.
    ///
    /// # Errors
    /// The errors of the launch.
    pub(crate) fn run(&self) -> Result<(), Error> {
        match &self.launch {
            Some(launch) => move_tokens(launch, self.from, self.to),
            None => Ok(()),
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
