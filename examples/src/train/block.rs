//! One layer of the transformer: attention, then a small network for each token, each after a layer norm.

use flash_attention::Error;
use ndarray::Array2;
use rand::rngs::StdRng;

use super::attend::{Attend, Heads};
use super::gpt::Config;
use super::layers::{LayerNorm, Linear, Normalized, gelu, gelu_backward};

/// `x += project(attention(norm1(x))); x += shrink(gelu(grow(norm2(x))))`.
#[derive(Clone, Debug)]
pub struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    project: Linear,
    norm2: LayerNorm,
    grow: Linear,
    shrink: Linear,
}

/// Values that a [`Block`] saves for backward: the input of each of its layers.
#[derive(Debug)]
pub struct BlockSaved<S> {
    norm1: Normalized,
    qkv_input: Array2<f32>,
    attention: S,
    project_input: Array2<f32>,
    norm2: Normalized,
    grow_input: Array2<f32>,
    gelu_input: Array2<f32>,
    shrink_input: Array2<f32>,
}

impl Block {
    /// Makes random weights. In the two maps that add to x they are smaller the more layers there are, so that the
    /// sum of all layers has about the same size for any number of layers.
    pub fn new(rng: &mut StdRng, config: &Config) -> Self {
        let width = config.width();
        let deviation = 0.02;
        let adding = deviation / (2.0 * config.layers as f32).sqrt();
        Self {
            norm1: LayerNorm::new(width),
            qkv: Linear::new(rng, width, 3 * width, deviation),
            project: Linear::new(rng, width, width, adding),
            norm2: LayerNorm::new(width),
            grow: Linear::new(rng, width, 4 * width, deviation),
            shrink: Linear::new(rng, 4 * width, width, adding),
        }
    }

    /// Returns the new rows, and the values saved for backward.
    ///
    /// # Errors
    /// The errors of [`Attend::forward`].
    pub fn forward<A: Attend>(
        &self,
        attend: &A,
        heads: Heads,
        x: Array2<f32>,
    ) -> Result<(Array2<f32>, BlockSaved<A::Saved>), Error> {
        let (qkv_input, norm1) = self.norm1.forward(&x);
        let (project_input, attention) = attend.forward(heads, self.qkv.forward(&qkv_input))?;
        let x = x + self.project.forward(&project_input);

        let (grow_input, norm2) = self.norm2.forward(&x);
        let gelu_input = self.grow.forward(&grow_input);
        let shrink_input = gelu(&gelu_input);
        let x = x + self.shrink.forward(&shrink_input);

        let saved = BlockSaved {
            norm1,
            qkv_input,
            attention,
            project_input,
            norm2,
            grow_input,
            gelu_input,
            shrink_input,
        };
        Ok((x, saved))
    }

    /// Returns the gradients of x and of the parameters. Each half adds to the gradient that flows past it.
    ///
    /// # Errors
    /// The errors of [`Attend::backward`].
    pub fn backward<A: Attend>(
        &self,
        attend: &A,
        heads: Heads,
        saved: &BlockSaved<A::Saved>,
        dx: Array2<f32>,
    ) -> Result<(Array2<f32>, Self), Error> {
        let (dgelu, shrink) = self.shrink.backward(&saved.shrink_input, &dx);
        let dgelu = gelu_backward(&saved.gelu_input, &dgelu);
        let (dnorm2, grow) = self.grow.backward(&saved.grow_input, &dgelu);
        let (dhalf, norm2) = self.norm2.backward(&saved.norm2, &dnorm2);
        let dx = dx + dhalf;

        let (dattention, project) = self.project.backward(&saved.project_input, &dx);
        let dqkv = attend.backward(heads, &saved.attention, &dattention)?;
        let (dnorm1, qkv) = self.qkv.backward(&saved.qkv_input, &dqkv);
        let (dhalf, norm1) = self.norm1.backward(&saved.norm1, &dnorm1);

        let gradient = Self {
            norm1,
            qkv,
            project,
            norm2,
            grow,
            shrink,
        };
        Ok((dx + dhalf, gradient))
    }

    pub(super) fn parameters(&mut self) -> Vec<&mut [f32]> {
        let mut all = self.norm1.parameters();
        all.extend(self.qkv.parameters());
        all.extend(self.project.parameters());
        all.extend(self.norm2.parameters());
        all.extend(self.grow.parameters());
        all.extend(self.shrink.parameters());
        all
    }
}
