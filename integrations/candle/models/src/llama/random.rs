//! A small model on random weights with the heads of SmolLM2, as a GGUF file in memory.

use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const LAYERS: u32 = 2;
const HEADS: u32 = 9;
const HEADS_KV: u32 = 3;
const HEAD_DIM: u32 = 64;
const FEED_FORWARD: u32 = 192;
const TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + \
                        '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The bytes of a GGUF file: 2 layers with 9 query heads and 3 key and value heads of 64, whose matrices have the dtype `weights`, and
/// a tokenizer of bytes and a few pairs.
///
/// # Errors
/// candle's errors.
pub fn random(weights: GgmlDType, seed: u64) -> Result<Vec<u8>> {
    let metadata = metadata();
    let Some((_, Value::Array(tokens))) = metadata.iter().find(|(key, _)| *key == "tokenizer.ggml.tokens") else {
        unreachable!("the metadata has tokens")
    };
    let vocab_size = tokens.len();
    let [width, wide, narrow] = [HEADS * HEAD_DIM, FEED_FORWARD, HEADS_KV * HEAD_DIM].map(|size| size as usize);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut matrix = |rows: usize, columns: usize| {
        let normal = |_| -> f32 { StandardNormal.sample(&mut rng) };
        let drawn: Vec<f32> = (0..rows * columns).map(normal).collect();
        let drawn = (Tensor::from_vec(drawn, (rows, columns), &Device::Cpu)? / (columns as f64).sqrt())?;
        QTensor::quantize(&drawn, weights)
    };
    let norm = || {
        QTensor::quantize(
            &Tensor::ones(width, candle_core::DType::F32, &Device::Cpu)?,
            GgmlDType::F32,
        )
    };
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), matrix(vocab_size, width)?),
        ("output_norm.weight".to_owned(), norm()?),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, tensor| tensors.push((format!("blk.{layer}.{name}.weight"), tensor));
        add("attn_norm", norm()?);
        add("attn_q", matrix(width, width)?);
        add("attn_k", matrix(narrow, width)?);
        add("attn_v", matrix(narrow, width)?);
        add("attn_output", matrix(width, width)?);
        add("ffn_norm", norm()?);
        add("ffn_gate", matrix(wide, width)?);
        add("ffn_up", matrix(wide, width)?);
        add("ffn_down", matrix(width, wide)?);
    }
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors)?;
    Ok(file.into_inner())
}

/// Sizes and tokenizer, under the names that SmolLM2's file has for them.
fn metadata() -> Vec<(&'static str, Value)> {
    let string = |text: &str| Value::String(text.to_owned());
    let control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut bytes: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    bytes.sort();
    let pairs = ["th", "the", "in"];
    let tokens = (control.iter().copied())
        .chain(bytes.iter().map(String::as_str))
        .chain(pairs)
        .map(string);
    let types = [3; 3].into_iter().chain([1; 256 + 3]).map(Value::I32);
    vec![
        ("general.architecture", string("llama")),
        ("llama.block_count", Value::U32(LAYERS)),
        ("llama.context_length", Value::U32(1024)),
        ("llama.embedding_length", Value::U32(HEADS * HEAD_DIM)),
        ("llama.feed_forward_length", Value::U32(FEED_FORWARD)),
        ("llama.attention.head_count", Value::U32(HEADS)),
        ("llama.attention.head_count_kv", Value::U32(HEADS_KV)),
        ("llama.rope.dimension_count", Value::U32(HEAD_DIM)),
        ("llama.rope.freq_base", Value::F32(1e5)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", string("gpt2")),
        ("tokenizer.ggml.pre", string("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(tokens.collect())),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        (
            "tokenizer.ggml.merges",
            Value::Array(["t h", "th e", "i n"].map(string).to_vec()),
        ),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.chat_template", string(TEMPLATE)),
    ]
}
