//! The models, small and on random weights.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use flash_attention_candle_models::adam::AdamW;
use flash_attention_candle_models::bert::{self, Bert};
use flash_attention_candle_models::gpt::{Attention, Config, Gpt};
use flash_attention_candle_models::text::Text;
use rand::SeedableRng;
use rand::rngs::StdRng;

const GPT: Config = Config {
    layers: 2,
    heads: 2,
    width: 32,
    context: 48,
};

fn text() -> Result<Text> {
    let address = include_bytes!("../../../../../examples/data/gettysburg.txt");
    Text::new(address.to_vec(), GPT.context)
}

/// Losses of the steps `from .. to`.
fn train(model: &Gpt, optimizer: &mut AdamW, [from, to]: [u64; 2]) -> Result<Vec<f32>> {
    let text = text()?;
    let step = |step| {
        let tokens = text.draw(&mut StdRng::seed_from_u64(step), 2, GPT.context)?;
        let loss = model.loss(&tokens)?;
        optimizer.step(&loss.backward()?, 3e-3)?;
        loss.to_scalar::<f32>()
    };
    (from..to).map(step).collect()
}

#[test]
fn both_attentions_train_one_model() -> Result<()> {
    let losses = [Attention::Ours, Attention::Plain].map(|attention| {
        let (model, variables) = Gpt::new(&GPT, attention, 1)?;
        train(&model, &mut AdamW::new(variables)?, [0, 30])
    });
    let [ours, plain] = losses;
    let (ours, plain) = (ours?, plain?);
    assert!(ours[29] < 0.7 * ours[0], "{} becomes {}", ours[0], ours[29]);
    for (step, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
        assert!((ours - plain).abs() < 1e-3, "step {step}: {ours} and {plain}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_resumes_to_the_bit() -> Result<()> {
    let (model, variables) = Gpt::new(&GPT, Attention::Ours, 1)?;
    let mut optimizer = AdamW::new(variables)?;
    train(&model, &mut optimizer, [0, 4])?;
    let state = optimizer.state()?;
    let state = state
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.copy()?)))
        .collect::<Result<_>>()?;
    let uninterrupted = train(&model, &mut optimizer, [4, 8])?;

    let (model, variables) = Gpt::new(&GPT, Attention::Ours, 2)?;
    let mut optimizer = AdamW::new(variables)?;
    optimizer.restore(&state)?;
    assert_eq!(optimizer.steps(), 4);
    assert_eq!(train(&model, &mut optimizer, [4, 8])?, uninterrupted);
    Ok(())
}

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
