//! BERT as an encoder of sentences, over a ragged batch without padding or over a padded one.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};
use flash_attention_candle::flash_attn_varlen;
use serde::Deserialize;

/// Sizes of a model, as its `config.json` names them.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each layer.
    pub num_attention_heads: usize,
    /// Width between the two halves of a feed-forward layer.
    pub intermediate_size: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Kinds of segment.
    pub type_vocab_size: usize,
    /// Added to variances.
    pub layer_norm_eps: f64,
}

/// A model with its weights.
#[derive(Debug)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    heads: usize,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    mixed: Linear,
    mixed_norm: LayerNorm,
    wide: Linear,
    narrow: Linear,
    narrow_norm: LayerNorm,
}

impl Bert {
    /// The model whose weights have the names that the original checkpoint gives them.
    ///
    /// # Errors
    /// A weight is missing or has another shape.
    pub fn load(config: &Config, weights: &VarBuilder<'_>) -> Result<Self> {
        let (width, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let embeddings = weights.pp("embeddings");
        let layer = |index| Layer::load(config, &weights.pp("encoder.layer").pp(index));
        Ok(Self {
            words: embedding(config.vocab_size, width, embeddings.pp("word_embeddings"))?,
            positions: embedding(
                config.max_position_embeddings,
                width,
                embeddings.pp("position_embeddings"),
            )?,
            segments: embedding(config.type_vocab_size, width, embeddings.pp("token_type_embeddings"))?,
            norm: layer_norm(width, epsilon, embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            heads: config.num_attention_heads,
        })
    }

    /// Last hidden states of sentences packed end to end, `[total, hidden_size]`: each token attends within its sentence, by
    /// [`flash_attn_varlen`].
    ///
    /// # Errors
    /// No sentence, an empty one, or one that is longer than the model's positions; candle's errors.
    pub fn ragged(&self, sentences: &[Vec<u32>]) -> Result<Tensor> {
        let device = self.words.embeddings().device();
        let ids: Vec<u32> = sentences.concat();
        let positions: Vec<u32> = sentences.iter().flat_map(|ids| 0..ids.len() as u32).collect();
        let ends = sentences.iter().scan(0, |end, ids| {
            *end += ids.len() as u32;
            Some(*end)
        });
        let seqlens = Tensor::new(std::iter::once(0).chain(ends).collect::<Vec<u32>>(), device)?;
        let longest = sentences.iter().map(Vec::len).max().unwrap_or_default();
        self.encode(
            &Tensor::new(ids, device)?,
            &Tensor::new(positions, device)?,
            |q, k, v| {
                let scale = 1.0 / (q.dim(D::Minus1)? as f32).sqrt();
                flash_attn_varlen(q, k, v, &seqlens, &seqlens, longest, longest, scale, false)
            },
        )
    }

    /// Last hidden states of sentences padded to the longest, `[sentences, longest, hidden_size]`, by plain attention: matrix
    /// products, a mask, a softmax.
    ///
    /// # Errors
    /// The errors of [`ragged`](Self::ragged).
    pub fn padded(&self, sentences: &[Vec<u32>]) -> Result<Tensor> {
        let device = self.words.embeddings().device();
        let longest = sentences.iter().map(Vec::len).max().unwrap_or_default();
        let padded = |ids: &Vec<u32>| [ids.clone(), vec![0; longest - ids.len()]].concat();
        let hidden = |ids: &Vec<u32>| {
            (0..longest)
                .map(|at| if at < ids.len() { 0.0 } else { f32::NEG_INFINITY })
                .collect()
        };
        let ids = Tensor::new(sentences.iter().map(padded).collect::<Vec<_>>(), device)?;
        let mask: Vec<Vec<f32>> = sentences.iter().map(hidden).collect();
        let mask = Tensor::new(mask, device)?.unsqueeze(1)?.unsqueeze(1)?;
        let positions = Tensor::arange(0, longest as u32, device)?
            .unsqueeze(0)?
            .broadcast_as(ids.shape())?;
        self.encode(&ids, &positions, |q, k, v| {
            let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
            let [q, k, v] = [q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?];
            let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
            let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
            weights.matmul(&v.contiguous()?)?.transpose(1, 2)?.contiguous()
        })
    }

    /// A vector of length 1 for each sentence, `[sentences, hidden_size]`: the mean of its hidden states, from
    /// [`ragged`](Self::ragged).
    ///
    /// # Errors
    /// The errors of [`ragged`](Self::ragged).
    pub fn embed_ragged(&self, sentences: &[Vec<u32>]) -> Result<Tensor> {
        let states = self.ragged(sentences)?;
        let mut start = 0;
        mean_states(sentences, |_, len| {
            let sentence = states.narrow(0, start, len);
            start += len;
            sentence
        })
    }

    /// The vectors of [`embed_ragged`](Self::embed_ragged), from [`padded`](Self::padded).
    ///
    /// # Errors
    /// The errors of [`padded`](Self::padded).
    pub fn embed_padded(&self, sentences: &[Vec<u32>]) -> Result<Tensor> {
        let states = self.padded(sentences)?;
        mean_states(sentences, |index, len| states.get(index)?.narrow(0, 0, len))
    }

    /// The layers over tokens of any leading shape, where `attend` takes q, k and v with two axes, heads and head_dim, in place
    /// of the last.
    fn encode(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let segments = self.segments.forward(&ids.zeros_like()?)?;
        let embedded = ((self.words.forward(ids)? + self.positions.forward(positions)?)? + segments)?;
        let first = self.norm.forward(&embedded)?;
        self.layers
            .iter()
            .try_fold(first, |x, layer| layer.forward(&x, self.heads, &attend))
    }
}

impl Layer {
    fn load(config: &Config, weights: &VarBuilder<'_>) -> Result<Self> {
        let (width, wide, epsilon) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (of_self, mixed) = (weights.pp("attention.self"), weights.pp("attention.output"));
        let output = weights.pp("output");
        Ok(Self {
            query: linear(width, width, of_self.pp("query"))?,
            key: linear(width, width, of_self.pp("key"))?,
            value: linear(width, width, of_self.pp("value"))?,
            mixed: linear(width, width, mixed.pp("dense"))?,
            mixed_norm: layer_norm(width, epsilon, mixed.pp("LayerNorm"))?,
            wide: linear(width, wide, weights.pp("intermediate.dense"))?,
            narrow: linear(wide, width, output.pp("dense"))?,
            narrow_norm: layer_norm(width, epsilon, output.pp("LayerNorm"))?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        heads: usize,
        attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut by_head = x.dims().to_vec();
        by_head.truncate(by_head.len() - 1);
        by_head.extend([heads, x.dim(D::Minus1)? / heads]);
        let project = |linear: &Linear| linear.forward(x)?.reshape(by_head.as_slice());
        let attended = attend(&project(&self.query)?, &project(&self.key)?, &project(&self.value)?)?;
        let attended = self.mixed.forward(&attended.reshape(x.shape())?)?;
        let x = self.mixed_norm.forward(&(attended + x)?)?;
        let wide = self.wide.forward(&x)?.gelu_erf()?;
        self.narrow_norm.forward(&(self.narrow.forward(&wide)? + x)?)
    }
}

/// The mean of each sentence's hidden states, scaled to length 1. `states` gives those of a sentence by its index and length.
fn mean_states(sentences: &[Vec<u32>], mut states: impl FnMut(usize, usize) -> Result<Tensor>) -> Result<Tensor> {
    let means = sentences
        .iter()
        .enumerate()
        .map(|(index, ids)| states(index, ids.len())?.mean(0))
        .collect::<Result<Vec<_>>>()?;
    let means = Tensor::stack(&means, 0)?.to_dtype(DType::F32)?;
    means.broadcast_div(&means.sqr()?.sum_keepdim(1)?.sqrt()?)
}
