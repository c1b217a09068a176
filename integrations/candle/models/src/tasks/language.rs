//! Language over bytes: the next byte of a text, as GPT learns it, or hidden bytes, as BERT does.

use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Batch, HeldOut, Task};
use crate::attention::Pattern;
use crate::text::{Text, VOCABULARY};

/// Token that stands for a hidden byte.
const MASK: u32 = VOCABULARY as u32;
/// Share of the bytes that a model with hidden bytes is asked for.
const ASKED: f64 = 0.15;

/// Windows of a text.
#[derive(Clone, Debug)]
pub struct Language {
    text: Text,
    context: usize,
    masked: bool,
    device: Device,
}

impl Language {
    /// The byte after each of `context` bytes.
    pub fn next(text: Text, context: usize, device: &Device) -> Self {
        Self {
            text,
            context,
            masked: false,
            device: device.clone(),
        }
    }

    /// About 15 % of `context` bytes, asked for in BERT's way: 80 % of them are hidden, 10 % replaced by a random byte and 10 % left as
    /// they are.
    pub fn masked(text: Text, context: usize, device: &Device) -> Self {
        Self {
            masked: true,
            ..Self::next(text, context, device)
        }
    }

    /// The batch of windows `[batch, context + 1]`.
    fn batch(&self, rng: &mut StdRng, windows: &Tensor) -> Result<Batch> {
        let tokens = windows.narrow(1, 0, self.context)?;
        if !self.masked {
            return Ok(Batch {
                tokens: tokens.contiguous()?.to_device(&self.device)?,
                read: None,
                targets: windows
                    .narrow(1, 1, self.context)?
                    .flatten_all()?
                    .to_device(&self.device)?,
                pattern: Pattern::Causal,
            });
        }
        let mut bytes = tokens.flatten_all()?.to_vec1::<u32>()?;
        let (mut read, mut targets) = (Vec::new(), Vec::new());
        for (at, byte) in bytes.iter_mut().enumerate() {
            // The first byte of each window is asked for, so that no batch asks for none.
            if at % self.context > 0 && !rng.random_bool(ASKED) {
                continue;
            }
            read.push(at as u32);
            targets.push(*byte);
            *byte = match rng.random_range(0..10) {
                0 => *byte,
                1 => rng.random_range(0..VOCABULARY as u32),
                _ => MASK,
            };
        }
        Ok(Batch {
            tokens: Tensor::from_vec(bytes, tokens.shape(), &self.device)?,
            read: Some(Tensor::new(read, &self.device)?),
            targets: Tensor::new(targets, &self.device)?,
            pattern: Pattern::Full,
        })
    }
}

impl Task for Language {
    fn vocabulary(&self) -> usize {
        VOCABULARY + usize::from(self.masked)
    }

    fn classes(&self) -> Option<usize> {
        None
    }

    fn positions(&self) -> usize {
        self.context
    }

    fn draw(&self, rng: &mut StdRng, _: usize, batch: usize) -> Result<Batch> {
        let windows = self.text.draw(rng, batch, self.context)?;
        self.batch(rng, &windows)
    }

    fn held_out(&self, count: usize) -> Result<Vec<HeldOut>> {
        let windows = self.text.held_out(count, self.context)?;
        HeldOut::only(count, |index, rng| self.batch(rng, &windows.narrow(0, index, 1)?))
    }
}
