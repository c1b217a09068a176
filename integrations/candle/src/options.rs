//! The options of candle-flash-attn's functions, and the [`Attention`] that they are.

use candle_core::{Result, Tensor};
use flash_attention::Attention;

use crate::error::Error;

/// Options of a call, as candle-flash-attn's functions take them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options<'a> {
    pub softmax_scale: f32,
    pub alibi_slopes: Option<&'a Tensor>,
    pub window_size_left: Option<usize>,
    pub window_size_right: Option<usize>,
    pub softcap: Option<f32>,
}

impl<'a> Options<'a> {
    /// A full or causal mask.
    pub(crate) fn new(softmax_scale: f32, causal: bool) -> Self {
        Self::windowed(softmax_scale, None, causal.then_some(0))
    }

    /// A window: query i sees the keys from `i - left` to `i + right`, counted from the last query and the last key.
    pub(crate) fn windowed(softmax_scale: f32, left: Option<usize>, right: Option<usize>) -> Self {
        Self {
            softmax_scale,
            alibi_slopes: None,
            window_size_left: left,
            window_size_right: right,
            softcap: None,
        }
    }

    /// The same with a bias by distance.
    pub(crate) fn alibi(self, slopes: Option<&'a Tensor>) -> Self {
        Self {
            alibi_slopes: slopes,
            ..self
        }
    }

    /// The same with capped scores; 0 is no cap.
    pub(crate) fn softcap(self, softcap: Option<f32>) -> Self {
        Self { softcap, ..self }
    }

    /// These options over at most so many keys, where a window as wide is none.
    ///
    /// # Errors
    /// [`Error::NeedsProgram`] for ALiBi.
    pub(crate) fn attention(&self, max_seqlen_k: usize) -> Result<Attention> {
        if let Some(slopes) = self.alibi_slopes {
            return Err(Error::NeedsProgram {
                argument: "alibi_slopes",
                value: format!("a tensor {:?}", slopes.shape()),
            }
            .into());
        }
        let narrow = |window: Option<usize>| window.filter(|&window| window < max_seqlen_k);
        let attention = Attention::new().softmax_scale(self.softmax_scale);
        let attention = match (narrow(self.window_size_left), narrow(self.window_size_right)) {
            (None, Some(0)) => attention.causal(),
            (left, right) => attention.window(left, right),
        };
        Ok(match self.softcap.filter(|&softcap| softcap != 0.0) {
            Some(softcap) => attention.softcap(softcap),
            None => attention,
        })
    }
}
