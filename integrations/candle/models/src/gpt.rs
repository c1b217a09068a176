//! A GPT of GPT-2's shape over bytes: learned positions, norms before attention and feed-forward layers, one matrix for embedding and
//! logits.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear};
use flash_attention_candle::flash_attn;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

use crate::text::VOCABULARY;

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Layers.
    pub layers: usize,
    /// Heads of each layer.
    pub heads: usize,
    /// Width of the model, a multiple of the heads.
    pub width: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// flash-attention-candle.
    Ours,
    /// candle's matrix products and softmax over stored scores.
    Plain,
}

/// A model with its weights.
#[derive(Debug)]
pub struct Gpt {
    attention: Attention,
    heads: usize,
    tokens: Embedding,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
}

#[derive(Debug)]
struct Block {
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

impl Gpt {
    /// A model and its variables. The weights are those that the seed draws, whoever computes attention.
    ///
    /// # Errors
    /// candle's errors.
    pub fn new(config: &Config, attention: Attention, seed: u64) -> Result<(Self, Vec<(String, Var)>)> {
        let variables = VarMap::new();
        let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let width = config.width;
        let block = |index| {
            let weights = weights.pp("block").pp(index);
            Ok(Block {
                norm: Norm::new(width, &weights.pp("norm"))?,
                qkv: linear(width, 3 * width, weights.pp("qkv"))?,
                mixed: linear(width, width, weights.pp("mixed"))?,
                wide_norm: Norm::new(width, &weights.pp("wide_norm"))?,
                wide: linear(width, 4 * width, weights.pp("wide"))?,
                narrow: linear(4 * width, width, weights.pp("narrow"))?,
            })
        };
        let model = Self {
            attention,
            heads: config.heads,
            tokens: embedding(VOCABULARY, width, weights.pp("tokens"))?,
            positions: weights.get((config.context, width), "positions")?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: Norm::new(width, &weights.pp("norm"))?,
        };
        let mut variables: Vec<(String, Var)> = {
            let named = variables
                .data()
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            named.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
        };
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        draw(&variables, config.layers, seed)?;
        Ok((model, variables))
    }

    /// Logits of the next token, `[batch, seqlen, 256]`, after each of `[batch, seqlen]` tokens.
    ///
    /// # Errors
    /// More tokens than the context, or candle's errors.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let positions = self.positions.narrow(0, 0, tokens.dim(1)?)?;
        let mut x = self.tokens.forward(tokens)?.broadcast_add(&positions)?;
        for block in &self.blocks {
            x = (block.attend(&block.norm.forward(&x)?, self.heads, self.attention)? + x)?;
            let wide = block.wide.forward(&block.wide_norm.forward(&x)?)?.gelu()?;
            x = (block.narrow.forward(&wide)? + x)?;
        }
        self.norm.forward(&x)?.broadcast_matmul(&self.tokens.embeddings().t()?)
    }

    /// Mean loss, in nats a token, of predicting each token of `[batch, seqlen + 1]` but the first.
    ///
    /// # Errors
    /// The errors of [`forward`](Self::forward).
    pub fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let len = tokens.dim(1)? - 1;
        let logits = self.forward(&tokens.narrow(1, 0, len)?)?.flatten(0, 1)?;
        candle_nn::loss::cross_entropy(&logits, &tokens.narrow(1, 1, len)?.flatten_all()?)
    }
}

impl Block {
    fn attend(&self, x: &Tensor, heads: usize, attention: Attention) -> Result<Tensor> {
        let (batch, len, width) = x.dims3()?;
        let qkv = self.qkv.forward(x)?.reshape((batch, len, 3, heads, width / heads))?;
        let [q, k, v] = [0, 1, 2].map(|part| qkv.narrow(2, part, 1)?.squeeze(2));
        let out = match attention {
            Attention::Ours => flash_attn(&q?, &k?, &v?, scale(width / heads), true)?,
            Attention::Plain => plain(&q?, &k?, &v?)?,
        };
        self.mixed.forward(&out.reshape((batch, len, width))?)
    }
}

fn scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// Causal attention over `[batch, seqlen, heads, head_dim]` with all scores in memory.
///
/// # Errors
/// candle's errors.
pub fn plain(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (_, len, _, head_dim) = q.dims4()?;
    let heads_first = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let scores = (q.matmul(&k.t()?)? * f64::from(scale(head_dim)))?;
    let hidden: Vec<f32> = (0..len * len)
        .map(|at| if at % len > at / len { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let mask = Tensor::from_vec(hidden, (len, len), q.device())?.to_dtype(q.dtype())?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    weights.matmul(&v)?.transpose(1, 2)
}

/// Draws weights as GPT-2 does: normal of deviation 0.02, less for matrices that add to the residual stream; biases 0, norms 1.
fn draw(variables: &[(String, Var)], layers: usize, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let normal = |rng: &mut StdRng| -> f32 { StandardNormal.sample(rng) };
    for (name, var) in variables {
        let residual = name.ends_with("mixed.weight") || name.ends_with("narrow.weight");
        let deviation = if residual {
            0.02 / (2.0 * layers as f32).sqrt()
        } else {
            0.02
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
