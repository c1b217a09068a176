//! The Llama, small and on random weights, beside candle-transformers' `quantized_llama`.

use std::io::Cursor;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Device, Result, Tensor};
use flash_attention_candle_models::llama::{
    Agreement, Attention, Batch, Chat, Llama, PagedCache, Reference, dequantized, random,
};

fn load(weights: GgmlDType) -> Result<(Llama, Reference, Chat)> {
    let mut file = Cursor::new(random(weights, 7)?);
    let content = Content::read(&mut file)?;
    let (model, chat) = (Llama::load(&content, &mut file)?, Chat::of(&content)?);
    Ok((model, Reference::load(content, &mut file)?, chat))
}

/// Greedy tokens of prompts of 1, 37 and 150 tokens, 12 each, read at most `chunk` tokens at once, compared with the reference.
fn agreement(weights: GgmlDType, chunk: usize, page_size: usize) -> Result<Agreement> {
    let (model, mut reference, _) = load(weights)?;
    let vocab_size = model.config().vocab_size as u32;
    let prompts = [1, 37, 150].map(|len: u32| (0..len).map(|at| (at * at + 31 * len) % vocab_size).collect::<Vec<_>>());
    let mut batch = Batch::new(&model, &prompts, 12, page_size)?;
    let mut tokens = vec![Vec::new(); prompts.len()];
    let mut logits = vec![Vec::new(); prompts.len()];
    while batch.unread() > 0 {
        for (sequence, its_logits) in batch.read(chunk)? {
            let token = its_logits.argmax(D::Minus1)?.to_scalar::<u32>()?;
            tokens[sequence].push(token);
            logits[sequence].push(its_logits);
            match tokens[sequence].len() {
                12 => batch.end(sequence),
                _ => batch.push(sequence, token),
            }
        }
    }
    let mut agreement = Agreement::default();
    for (index, prompt) in prompts.iter().enumerate() {
        let first = reference.read(prompt)?;
        let expected = [vec![first], reference.follow(prompt.len(), &tokens[index])?].concat();
        agreement.add(&tokens[index], &logits[index], &expected)?;
    }
    Ok(agreement)
}

#[test]
fn logits_and_greedy_tokens_are_those_of_candle_transformers() -> Result<()> {
    for (chunk, page_size) in [(usize::MAX, 16), (64, 8), (7, 64)] {
        let found = agreement(GgmlDType::F32, chunk, page_size)?;
        assert_eq!((found.tokens, found.same), (36, 36), "chunks of {chunk}");
        assert!(found.largest > 0.1, "the model says something: {found:?}");
        assert!(found.difference <= 2e-5 * found.largest, "chunks of {chunk}: {found:?}");
    }
    Ok(())
}

#[test]
fn a_file_in_f32_has_the_weights_of_the_quantized_one() -> Result<()> {
    let mut file = Cursor::new(random(GgmlDType::Q4_1, 7)?);
    let content = Content::read(&mut file)?;
    let mut in_f32 = Cursor::new(dequantized(&content, &mut file)?);
    let content_in_f32 = Content::read(&mut in_f32)?;
    assert_eq!(content_in_f32.tensor_infos.len(), content.tensor_infos.len());
    for (name, info) in &content_in_f32.tensor_infos {
        assert_eq!(info.ggml_dtype, GgmlDType::F32, "{name}");
        let weight = |content: &Content, file: &mut Cursor<Vec<u8>>| {
            content.tensor(file, name, &Device::Cpu)?.dequantize(&Device::Cpu)
        };
        let difference = (weight(&content, &mut file)? - weight(&content_in_f32, &mut in_f32)?)?;
        assert_eq!(difference.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{name}");
    }
    assert_eq!(Chat::of(&content_in_f32)?.end(), Chat::of(&content)?.end());
    Ok(())
}

#[test]
fn quantized_weights_choose_the_tokens_of_candle_transformers() -> Result<()> {
    let found = agreement(GgmlDType::Q4_1, 64, 16)?;
    assert_eq!((found.tokens, found.same), (36, 36), "{found:?}");
    Ok(())
}

#[test]
fn all_attentions_have_the_same_states_and_loss() -> Result<()> {
    let (model, ..) = load(GgmlDType::F32)?;
    let tokens: Vec<u32> = (0..300).map(|at| at * at % 250).collect();
    let (ours, loss) = (
        model.states(&tokens, Attention::Ours)?,
        model.loss(&tokens, Attention::Ours)?,
    );
    for other in [Attention::Plain, Attention::CandleCpu] {
        let difference = (&ours - model.states(&tokens, other)?)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(difference < 2e-5, "{other:?}: {difference}");
        let difference = (loss - model.loss(&tokens, other)?).abs();
        assert!(difference < 1e-5, "{other:?}: {difference}");
    }
    let whole = model.logits(&ours.narrow(0, 0, 299)?)?;
    let targets = Tensor::new(&tokens[1..], whole.device())?;
    let expected = candle_nn::loss::cross_entropy(&whole, &targets)?.to_scalar::<f32>()?;
    assert!(
        (loss - f64::from(expected)).abs() < 1e-5,
        "{loss} in parts, {expected} as a whole"
    );
    Ok(())
}

#[test]
fn pages_return_to_the_cache_and_none_is_given_twice() -> Result<()> {
    let (model, ..) = load(GgmlDType::F32)?;
    let mut cache = PagedCache::new(model.config(), 3, 5, 8)?;
    let alone = {
        let mut cache = PagedCache::new(model.config(), 1, 2, 8)?;
        let step = cache.extend(&[(0, 9)])?;
        model.step(&cache, &step, &[3; 9])?
    };
    cache.extend(&[(0, 20), (1, 9)])?;
    assert_eq!((cache.len(0), cache.len(1), cache.free_pages()), (20, 9, 0));
    assert!(cache.extend(&[(2, 1)]).is_err(), "no page is free");
    assert_eq!(cache.len(2), 0);
    cache.clear(0);
    assert_eq!(cache.free_pages(), 3);
    let step = cache.extend(&[(2, 9)])?;
    let again = model.step(&cache, &step, &[3; 9])?;
    let bits = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    assert_eq!(bits(&alone)?, bits(&again)?, "what a page held before is not seen");
    Ok(())
}

#[test]
fn a_prompt_that_cannot_be_answered_is_refused() -> Result<()> {
    let (model, ..) = load(GgmlDType::F32)?;
    let refused = |prompt: Vec<u32>| {
        Batch::new(&model, &[prompt], 12, 16)
            .err()
            .map(|error| error.to_string())
    };
    assert!(refused(Vec::new()).is_some_and(|error| error.contains("prompt 0 has 0 tokens")));
    assert!(refused(vec![1; 1013]).is_some_and(|error| error.contains("1013 tokens")));
    assert!(refused(vec![1; 1012]).is_none());
    let pages_of_12 = Batch::new(&model, &[vec![1]], 12, 12).err();
    assert!(pages_of_12.is_some_and(|error| error.to_string().contains("12")));
    Ok(())
}

#[test]
fn texts_become_tokens_and_texts_again() -> Result<()> {
    let (.., chat) = load(GgmlDType::F32)?;
    let text = "the thing in 1984: Grüße, 東京!";
    let tokens = chat.tokens(text)?;
    let decode = |tokens: &[u32]| chat.tokenizer().decode(tokens, true);
    assert_eq!(decode(&tokens).map_err(candle_core::Error::msg)?, text);
    let pairs = |text: &str| chat.tokens(text).map(|tokens| tokens.len());
    assert_eq!((pairs("the")?, pairs("thin")?, pairs("19")?), (1, 2, 2));

    let message = chat.message(text)?;
    let [start, end] = ["<|im_start|>", "<|im_end|>"].map(|token| chat.tokenizer().token_to_id(token));
    assert_eq!(end, Some(chat.end()));
    let count = |wanted| message.iter().filter(|&&token| Some(token) == wanted).count();
    assert_eq!((count(start), count(end)), (2, 1));
    assert!(message.windows(tokens.len()).any(|window| window == tokens));
    Ok(())
}
