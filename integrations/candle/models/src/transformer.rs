//! A transformer of GPT-2's shape: norms before attention and feed-forward layers, learned positions where there are any, and logits
//! from the embedding's matrix or from a matrix of their own.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

use crate::attention::Attention;
use crate::tasks::Batch;

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Classes of the logits; none means those of the vocabulary, from the embedding's matrix.
    pub classes: Option<usize>,
    /// Layers.
    pub layers: usize,
    /// Heads of each layer.
    pub heads: usize,
    /// Width of the model, a multiple of the heads.
    pub width: usize,
    /// Tokens of the longest sequence, each with a learned position; 0 for a model without positions.
    pub positions: usize,
}

/// A model with its weights.
#[derive(Debug)]
pub struct Transformer {
    heads: usize,
    tokens: Embedding,
    positions: Option<Tensor>,
    blocks: Vec<Block>,
    norm: Norm,
    classes: Option<Linear>,
}

/// One layer: attention, then a feed-forward layer, each added to what it reads.
#[derive(Debug)]
pub struct Block {
    norm: Norm,
    qkv: Linear,
    mixed: Linear,
    wide_norm: Norm,
    wide: Linear,
    narrow: Linear,
}

/// A layer norm with a backward pass; that of candle_nn's own stops gradients.
#[derive(Debug)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(width: usize, weights: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            weight: weights.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: weights.get_with_hints(width, "bias", Init::Const(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

impl Transformer {
    /// A model and its variables. The seed determines the weights, for either attention.
    ///
    /// # Errors
    /// candle's errors.
    pub fn new(config: &Config, seed: u64, device: &Device) -> Result<(Self, Vec<(String, Var)>)> {
        let variables = VarMap::new();
        let weights = VarBuilder::from_varmap(&variables, DType::F32, device);
        let width = config.width;
        let positions = match config.positions {
            0 => None,
            longest => Some(weights.get((longest, width), "positions")?),
        };
        let classes = match config.classes {
            None => None,
            Some(classes) => Some(linear(width, classes, weights.pp("classes"))?),
        };
        let block = |index| Block::new(width, &weights.pp("block").pp(index));
        let model = Self {
            heads: config.heads,
            tokens: embedding(config.vocabulary, width, weights.pp("tokens"))?,
            positions,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: Norm::new(width, &weights.pp("norm"))?,
            classes,
        };
        let mut variables: Vec<(String, Var)> = {
            let named = variables
                .data()
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            named.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
        };
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        draw(&variables, config, seed)?;
        Ok((model, variables))
    }

    /// Logits of what a batch reads, `[read, classes]`.
    ///
    /// # Errors
    /// More tokens than positions, or candle's errors.
    pub fn logits(&self, batch: &Batch, attention: &Attention) -> Result<Tensor> {
        let mut x = self.tokens.forward(&batch.tokens)?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, 0, batch.tokens.dim(1)?)?)?;
        }
        for block in &self.blocks {
            x = block.forward(&x, self.heads, attention)?;
        }
        let states = self.norm.forward(&x)?.flatten(0, 1)?;
        let states = match &batch.read {
            Some(read) => states.index_select(read, 0)?,
            None => states,
        };
        match &self.classes {
            Some(classes) => classes.forward(&states),
            None => states.matmul(&self.tokens.embeddings().t()?),
        }
    }
}

impl Block {
    /// A layer over states of this width.
    ///
    /// # Errors
    /// candle's errors.
    pub fn new(width: usize, weights: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm: Norm::new(width, &weights.pp("norm"))?,
            qkv: linear(width, 3 * width, weights.pp("qkv"))?,
            mixed: linear(width, width, weights.pp("mixed"))?,
            wide_norm: Norm::new(width, &weights.pp("wide_norm"))?,
            wide: linear(width, 4 * width, weights.pp("wide"))?,
            narrow: linear(4 * width, width, weights.pp("narrow"))?,
        })
    }

    /// States after the layer, `[batch, seqlen, width]` as before it.
    ///
    /// # Errors
    /// The width is no multiple of the heads, or candle's errors.
    pub fn forward(&self, x: &Tensor, heads: usize, attention: &Attention) -> Result<Tensor> {
        let (batch, len, width) = x.dims3()?;
        let qkv = self.qkv.forward(&self.norm.forward(x)?)?;
        let qkv = qkv.reshape((batch, len, 3, heads, width / heads))?;
        let [q, k, v] = [0, 1, 2].map(|part| qkv.narrow(2, part, 1)?.squeeze(2));
        let out = attention.forward(&q?, &k?, &v?)?.reshape((batch, len, width))?;
        let x = (self.mixed.forward(&out)? + x)?;
        let wide = self.wide.forward(&self.wide_norm.forward(&x)?)?.gelu()?;
        self.narrow.forward(&wide)? + x
    }
}

/// Draws weights as GPT-2 does: normal of deviation 0.02 at its width of 768, more in narrower models so that their products are as
/// large, less for matrices that add to the residual stream; biases 0, norms 1.
fn draw(variables: &[(String, Var)], config: &Config, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let deviation = 0.02 * (768.0 / config.width as f32).sqrt();
    let normal = |rng: &mut StdRng| -> f32 { StandardNormal.sample(rng) };
    for (name, var) in variables {
        let residual = name.ends_with("mixed.weight") || name.ends_with("narrow.weight");
        let deviation = if residual {
            deviation / (2.0 * config.layers as f32).sqrt()
        } else {
            deviation
        };
        let value = match (var.rank(), name.contains("norm") && name.ends_with("weight")) {
            (1, true) => var.ones_like()?,
            (1, false) => var.zeros_like()?,
            _ => {
                let drawn: Vec<f32> = (0..var.elem_count()).map(|_| deviation * normal(&mut rng)).collect();
                Tensor::from_vec(drawn, var.shape(), var.device())?
            }
        };
        var.set(&value)?;
    }
    Ok(())
}
