//! Llama from a GGUF file, as SmolLM2 is one: rotary positions, query heads that share key and value heads, gated feed-forward layers,
//! one matrix for embedding and logits. Weights are multiplied by candle's [`QMatMul`] as the file has them: quantized, or f32 in a file
//! that [`dequantized`] made.

mod batch;
mod cache;
mod chat;
mod dequantize;
mod random;
mod reference;

use std::io::{Read, Seek};

use candle_core::quantized::{QMatMul, QTensor, gguf_file};
use candle_core::{Device, Error, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn as candles_flash_attn};
use candle_nn::loss::cross_entropy;
use candle_nn::rotary_emb::rope_i;
use candle_nn::{Embedding, Module, RmsNorm};
use candle_transformers::utils::{build_causal_mask, repeat_kv};
use flash_attention_candle::{KvCache, Rotary, flash_attn};

pub use batch::Batch;
pub use cache::PagedCache;
pub use chat::Chat;
pub use dequantize::dequantized;
pub use random::random;
pub use reference::{Agreement, Reference};

/// Tokens whose logits a loss has in memory at one time.
const LOGITS_AT_ONCE: usize = 64;

/// Sizes of a model, as the metadata of its file names them.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Tokens of the longest sequence.
    pub context_length: usize,
    /// Layers.
    pub block_count: usize,
    /// Width of the model.
    pub embedding_length: usize,
    /// Width between the two halves of a feed-forward layer.
    pub feed_forward_length: usize,
    /// Query heads of each layer.
    pub head_count: usize,
    /// Key and value heads of each layer.
    pub head_count_kv: usize,
    /// Base of the rotary angles: pair i turns by `freq_base ^ (-2 i / head_dim)` a position.
    pub freq_base: f32,
    /// Added to mean squares.
    pub rms_epsilon: f32,
}

impl Config {
    /// Reads the sizes from the metadata of a GGUF file.
    ///
    /// # Errors
    /// An entry is missing or of another type; the architecture is not `llama`; rotary angles cover only a part of head_dim.
    pub fn of(file: &gguf_file::Content) -> Result<Self> {
        let get = |key: &str| metadata(file, key);
        let architecture = get("general.architecture")?.to_string()?;
        if architecture != "llama" {
            candle_core::bail!("the file's architecture is {architecture}; it must be llama")
        }
        let size = |key: &str| Ok::<_, candle_core::Error>(get(key)?.to_u32()? as usize);
        let Some(embeddings) = file.tensor_infos.get("token_embd.weight") else {
            candle_core::bail!("the file has no token_embd.weight")
        };
        let config = Self {
            vocab_size: embeddings.shape.dims2()?.0,
            context_length: size("llama.context_length")?,
            block_count: size("llama.block_count")?,
            embedding_length: size("llama.embedding_length")?,
            feed_forward_length: size("llama.feed_forward_length")?,
            head_count: size("llama.attention.head_count")?,
            head_count_kv: size("llama.attention.head_count_kv")?,
            freq_base: get("llama.rope.freq_base")?.to_f32()?,
            rms_epsilon: get("llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
        };
        let rotary_dim = size("llama.rope.dimension_count")?;
        if rotary_dim != config.head_dim() {
            candle_core::bail!(
                "llama.rope.dimension_count is {rotary_dim}; it must be head_dim, {}",
                config.head_dim()
            )
        }
        Ok(config)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.embedding_length / self.head_count
    }
}

/// The entry of a file's metadata.
fn metadata<'a>(file: &'a gguf_file::Content, key: &str) -> Result<&'a gguf_file::Value> {
    match file.metadata.get(key) {
        Some(value) => Ok(value),
        None => candle_core::bail!("the file has no {key}"),
    }
}

/// Implementation of attention that a model runs without a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// flash-attention-candle.
    Ours,
    /// candle's matrix products and softmax over stored scores, as candle-transformers' models have it.
    Plain,
    /// candle_nn's attention for CPUs, which stores no scores.
    CandleCpu,
}

/// A model with its weights, on the CPU.
#[derive(Debug)]
pub struct Llama {
    config: Config,
    rotation: Rotation,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: QMatMul,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    query: QMatMul,
    key: QMatMul,
    value: QMatMul,
    mixed: QMatMul,
    feed_forward_norm: RmsNorm,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

impl Llama {
    /// Reads the weights of a GGUF file whose header has been read.
    ///
    /// # Errors
    /// The errors of [`Config::of`]; a weight is missing; candle's errors.
    pub fn load(file: &gguf_file::Content, reader: &mut (impl Read + Seek)) -> Result<Self> {
        let config = Config::of(file)?;
        let mut read = |name: &str| file.tensor(reader, &format!("{name}.weight"), &Device::Cpu);
        let norm = |weight: QTensor| -> Result<RmsNorm> {
            Ok(RmsNorm::new(
                weight.dequantize(&Device::Cpu)?,
                config.rms_epsilon.into(),
            ))
        };
        let embeddings = read("token_embd")?;
        let embedding = Embedding::new(embeddings.dequantize(&Device::Cpu)?, config.embedding_length);
        let output = match file.tensor_infos.contains_key("output.weight") {
            true => read("output")?,
            false => embeddings,
        };
        let last_norm = norm(read("output_norm")?)?;
        let mut layers = Vec::with_capacity(config.block_count);
        for index in 0..config.block_count {
            let mut read = |name: &str| read(&format!("blk.{index}.{name}"));
            layers.push(Layer {
                attention_norm: norm(read("attn_norm")?)?,
                query: QMatMul::from_qtensor(read("attn_q")?)?,
                key: QMatMul::from_qtensor(read("attn_k")?)?,
                value: QMatMul::from_qtensor(read("attn_v")?)?,
                mixed: QMatMul::from_qtensor(read("attn_output")?)?,
                feed_forward_norm: norm(read("ffn_norm")?)?,
                gate: QMatMul::from_qtensor(read("ffn_gate")?)?,
                up: QMatMul::from_qtensor(read("ffn_up")?)?,
                down: QMatMul::from_qtensor(read("ffn_down")?)?,
            });
        }
        Ok(Self {
            rotation: Rotation::new(&config)?,
            config,
            embedding,
            layers,
            norm: last_norm,
            output: QMatMul::from_qtensor(output)?,
        })
    }

    /// Sizes of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Last hidden states, `[tokens, embedding_length]`, of the new tokens that a step brings to the sequences of a cache. Their keys
    /// and values are in the cache afterwards.
    ///
    /// # Errors
    /// Another number of tokens than the step has room for; a position past the model's context; a token that is not in the
    /// vocabulary; candle's errors.
    pub fn step(&self, cache: &PagedCache, step: &KvCache, tokens: &[u32]) -> Result<Tensor> {
        self.encode(tokens, |layer, q, k, v| {
            cache.append_and_attend(step, layer, [q, k, v], &self.rotation.rotary)
        })
    }

    /// Last hidden states, `[tokens, embedding_length]`, of one sequence from its beginning, without a cache.
    ///
    /// # Errors
    /// More tokens than the model's context; a token that is not in the vocabulary; candle's errors.
    pub fn states(&self, tokens: &[u32], attention: Attention) -> Result<Tensor> {
        let context = self.config.context_length;
        if tokens.len() > context {
            candle_core::bail!("there are {} tokens; the model's context has {context}", tokens.len())
        }
        let scale = 1.0 / (self.config.head_dim() as f32).sqrt();
        self.encode(tokens, |_, q, k, v| {
            let (q, k) = (self.rotation.turn(q)?, self.rotation.turn(k)?);
            let [q, k, v] = [q.unsqueeze(0)?, k.unsqueeze(0)?, v.unsqueeze(0)?];
            match attention {
                Attention::Ours => flash_attn(&q, &k, &v, scale, true),
                Attention::Plain => plain(&q, &k, &v, scale),
                Attention::CandleCpu => {
                    let mask = AttnMask::Causal { kv_offset: 0 };
                    candles_flash_attn::<f32>(&q, &k, &v, scale, mask, None, None)?.transpose(1, 2)
                }
            }
        })
    }

    /// Logits of the next token, `[tokens, vocab_size]`, after each of `[tokens, embedding_length]` hidden states.
    ///
    /// # Errors
    /// candle's errors.
    pub fn logits(&self, states: &Tensor) -> Result<Tensor> {
        self.output.forward(states)
    }

    /// Mean loss, in nats a token, of predicting each token of a sequence but the first from all before it. Its exponential is the
    /// perplexity of the sequence.
    ///
    /// # Errors
    /// Fewer than two tokens, and the errors of [`states`](Self::states).
    pub fn loss(&self, tokens: &[u32], attention: Attention) -> Result<f64> {
        let Some((_, read @ [_, ..])) = tokens.split_last() else {
            candle_core::bail!(
                "a sequence of {} tokens has no token to predict; it must have two",
                tokens.len()
            )
        };
        let states = self.states(read, attention)?;
        let mut total = 0.0;
        for (part, targets) in tokens[1..].chunks(LOGITS_AT_ONCE).enumerate() {
            let logits = self.logits(&states.narrow(0, part * LOGITS_AT_ONCE, targets.len())?)?;
            let mean = cross_entropy(&logits, &Tensor::new(targets, &Device::Cpu)?)?.to_scalar::<f32>()?;
            total += f64::from(mean) * targets.len() as f64;
        }
        Ok(total / read.len() as f64)
    }

    /// The layers over tokens of any sequences, where `attend` takes the index of the layer and q, k and v,
    /// `[tokens, heads, head_dim]`, before q and k are turned by their positions.
    fn encode(
        &self,
        tokens: &[u32],
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let shape = (tokens.len(), self.config.embedding_length);
        let by_head = (tokens.len(), (), self.config.head_dim());
        let mut x = self.embedding.forward(&Tensor::new(tokens, &Device::Cpu)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&x)?;
            let q = layer.query.forward(&normed)?.reshape(by_head)?;
            let k = layer.key.forward(&normed)?.reshape(by_head)?;
            let v = layer.value.forward(&normed)?.reshape(by_head)?;
            let attended = attend(index, &q, &k, &v)?.reshape(shape)?;
            x = (layer.mixed.forward(&attended)? + x)?;
            let normed = layer.feed_forward_norm.forward(&x)?;
            let gate = candle_nn::ops::silu(&layer.gate.forward(&normed)?)?;
            let wide = (gate * layer.up.forward(&normed)?)?;
            x = (layer.down.forward(&wide)? + x)?;
        }
        self.norm.forward(&x)
    }
}

/// Rotary embedding of neighbouring pairs, for all positions of a model's context.
#[derive(Debug)]
struct Rotation {
    /// Cosines and sines of the angles, `[positions, 1, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// The embedding with these tables, for tokens at any positions.
    rotary: Rotary,
}

impl Rotation {
    fn new(config: &Config) -> Result<Self> {
        let head_dim = config.head_dim();
        let frequency = |pair: usize| 1.0 / config.freq_base.powf((2 * pair) as f32 / head_dim as f32);
        let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
        let positions = Tensor::arange(0.0, config.context_length as f32, &Device::Cpu)?;
        let angles = positions
            .reshape(((), 1, 1))?
            .broadcast_mul(&Tensor::new(frequencies, &Device::Cpu)?)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let table = |tensor: &Tensor| tensor.flatten_all()?.to_vec1();
        let rotary = Rotary::of_tables(head_dim, &table(&cos)?, &table(&sin)?).map_err(Error::wrap)?;
        Ok(Self {
            cos,
            sin,
            rotary: rotary.interleaved(),
        })
    }

    /// Turns the heads of one sequence from its beginning, `[tokens, heads, head_dim]`.
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let [cos, sin] = [self.cos.narrow(0, 0, tokens)?, self.sin.narrow(0, 0, tokens)?];
        rope_i(&x.unsqueeze(2)?, &cos, &sin)?.squeeze(2)
    }
}

/// Causal attention over `[1, seqlen, heads, head_dim]` with all scores in memory, as candle-transformers' `quantized_llama` has it.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32) -> Result<Tensor> {
    let sharing = q.dim(2)? / k.dim(2)?;
    let heads_first = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let repeated = |tensor: &Tensor| repeat_kv(heads_first(tensor)?, sharing);
    let (q, k, v) = (heads_first(q)?, repeated(k)?, repeated(v)?);
    let scores = (q.matmul(&k.t()?)? * f64::from(softmax_scale))?;
    let hidden = build_causal_mask(q.dim(2)?, 0, q.device())?.broadcast_as(scores.shape())?;
    let minus_infinity = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
    let scores = hidden.where_cond(&minus_infinity, &scores)?;
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    weights.matmul(&v)?.transpose(1, 2)
}
