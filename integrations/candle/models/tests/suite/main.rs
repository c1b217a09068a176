//! The models, small and on random weights.

mod llama;
mod training;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use flash_attention_candle_models::bert::{self, Bert};

#[test]
fn ragged_and_padded_sentences_have_the_same_embeddings() -> Result<()> {
    let config = bert::Config {
        vocab_size: 50,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 128,
        max_position_embeddings: 64,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
    };
    let weights = VarMap::new();
    let model = Bert::load(&config, &VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu))?;
    let sentences = [7, 1, 33, 64, 12].map(|len: u32| (0..len).map(|at| (at * 17 + len) % 50).collect::<Vec<u32>>());
    let (ragged, padded): (Tensor, Tensor) = (model.embed_ragged(&sentences)?, model.embed_padded(&sentences)?);
    let distance = (ragged - padded)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(distance < 1e-5, "{distance}");
    Ok(())
}
