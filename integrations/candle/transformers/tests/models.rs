//! Models of candle-transformers on random weights. Those with a `use_flash_attn` have it on and off: on, the functions of
//! candle-flash-attn are ours. Its BERT has none; it is compared with the BERT of the example, which attends over ragged batches.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_transformers::models::{bert, llama, mistral};
use flash_attention_candle_models::bert::{Bert, Config};

const TOKENS: u32 = 96;
const PROMPT: usize = 40;

fn tokens(start: usize, len: usize) -> Result<Tensor> {
    let ids: Vec<u32> = (start..start + len).map(|at| (at as u32 * 37 + 11) % TOKENS).collect();
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// Logits after a prompt, after a second part of it, and after one token more, from a model with a cache.
fn logits(mut forward: impl FnMut(&Tensor, usize) -> Result<Tensor>) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for (start, len) in [(0, PROMPT), (PROMPT, 9), (PROMPT + 9, 1)] {
        logits.extend(forward(&tokens(start, len)?, start)?.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(logits)
}

fn assert_equal(plain: &[f32], ours: &[f32]) {
    assert_eq!(plain.len(), ours.len());
    let size = plain.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    assert!(size > 0.01, "the model says something");
    let distance = plain
        .iter()
        .zip(ours)
        .fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(distance <= 2e-5 * size, "logits of up to {size} differ by {distance}");
}

#[test]
fn llama() -> Result<()> {
    let weights = VarMap::new();
    let of = |use_flash_attn| {
        let config = llama::Config {
            hidden_size: 128,
            intermediate_size: 256,
            vocab_size: TOKENS as usize,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            use_flash_attn,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: 256,
            tie_word_embeddings: false,
        };
        let model = llama::Llama::load(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu), &config)?;
        let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
        logits(|tokens, start| model.forward(tokens, start, &mut cache))
    };
    assert_equal(&of(false)?, &of(true)?);
    Ok(())
}

#[test]
fn mistral() -> Result<()> {
    let weights = VarMap::new();
    let of = |use_flash_attn| {
        let config = mistral::Config {
            vocab_size: TOKENS as usize,
            hidden_size: 128,
            intermediate_size: 256,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            head_dim: None,
            num_key_value_heads: 2,
            hidden_act: Activation::Silu,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            sliding_window: None,
            use_flash_attn,
        };
        let mut model = mistral::Model::new(&config, VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu))?;
        logits(|tokens, start| model.forward(tokens, start))
    };
    assert_equal(&of(false)?, &of(true)?);
    Ok(())
}

#[test]
fn bert_over_a_ragged_batch() -> Result<()> {
    let config = bert::Config {
        vocab_size: TOKENS as usize,
        hidden_size: 64,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        intermediate_size: 128,
        max_position_embeddings: 80,
        ..Default::default()
    };
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let ours = Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        max_position_embeddings: config.max_position_embeddings,
        type_vocab_size: config.type_vocab_size,
        layer_norm_eps: config.layer_norm_eps,
    };
    let ours = Bert::load(&ours, &builder)?;
    let variables = weights.all_vars().len();
    let theirs = bert::BertModel::load(builder, &config)?;
    assert_eq!(weights.all_vars().len(), variables, "both have the same weights");

    let sentences: Vec<Vec<u32>> = [7, 1, 33, 80, 12]
        .map(|len: u32| (0..len).map(|at| (at * 17 + len) % TOKENS).collect())
        .into();
    let ragged = ours.ragged(&sentences)?;
    let mut start = 0;
    for sentence in &sentences {
        let ids = Tensor::new(sentence.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let expected = theirs
            .forward(&ids, &ids.zeros_like()?, None)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        let got = ragged
            .narrow(0, start, sentence.len())?
            .flatten_all()?
            .to_vec1::<f32>()?;
        assert_equal(&expected, &got);
        start += sentence.len();
    }
    Ok(())
}
