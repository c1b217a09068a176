//! Text and tokens, by the lists and the template in a GGUF file.

use candle_core::quantized::gguf_file;
use candle_core::{Error, Result};
use minijinja::{Environment, context};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use super::metadata;

/// Number by which a file marks tokens that no text contains, such as the end of a message.
const CONTROL: i32 = 3;

/// Tokenizer and chat template of a model.
#[derive(Debug)]
pub struct Chat {
    tokenizer: Tokenizer,
    template: String,
    end: u32,
}

impl Chat {
    /// The tokenizer and template of a GGUF file: byte pairs as GPT-2 has them, with each digit a word of its own.
    ///
    /// # Errors
    /// An entry of the file is missing or of another type, or its tokenizer is of another kind.
    pub fn of(file: &gguf_file::Content) -> Result<Self> {
        let get = |key: &str| metadata(file, key);
        let strings = |key: &str| -> Result<Vec<String>> {
            (get(key)?.to_vec()?.iter())
                .map(|value| Ok(value.to_string()?.clone()))
                .collect()
        };
        for (key, expected) in [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")] {
            let kind = get(key)?.to_string()?;
            if kind != expected {
                candle_core::bail!("{key} is {kind}; it must be {expected}")
            }
        }
        let tokens = strings("tokenizer.ggml.tokens")?;
        let merges = strings("tokenizer.ggml.merges")?
            .iter()
            .map(|merge| match merge.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => candle_core::bail!("tokenizer.ggml.merges has {merge:?}, which is no pair"),
            })
            .collect::<Result<_>>()?;
        let types = get("tokenizer.ggml.token_type")?.to_vec()?;
        let mut control = Vec::new();
        for (token, kind) in tokens.iter().zip(types) {
            if kind.to_i32()? == CONTROL {
                control.push(AddedToken::from(token.clone(), true));
            }
        }
        let mut tokenizer = byte_pairs(tokens, merges)?;
        tokenizer.add_special_tokens(control).map_err(Error::msg)?;
        Ok(Self {
            tokenizer,
            template: get("tokenizer.chat_template")?.to_string()?.clone(),
            end: get("tokenizer.ggml.eos_token_id")?.to_u32()?,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The token that ends an answer.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Tokens of a text as it is.
    ///
    /// # Errors
    /// The tokenizer's errors.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .tokenizer
            .encode(text, false)
            .map_err(Error::msg)?
            .get_ids()
            .to_vec())
    }

    /// Tokens of a user's message and of the beginning of the answer to it, as the file's template puts them.
    ///
    /// # Errors
    /// The template's and the tokenizer's errors.
    pub fn message(&self, text: &str) -> Result<Vec<u32>> {
        let messages = [context! { role => "user", content => text }];
        let values = context! { messages, add_generation_prompt => true };
        let prompt = Environment::new()
            .render_str(&self.template, values)
            .map_err(Error::wrap)?;
        self.tokens(&prompt)
    }
}

fn byte_pairs(tokens: Vec<String>, merges: Merges) -> Result<Tokenizer> {
    let vocabulary: Vocab = tokens.into_iter().zip(0..).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .build()
        .map_err(Error::msg)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    let words = Sequence::new(vec![Digits::new(true).into(), bytes.into()]);
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(words)).with_decoder(Some(bytes));
    Ok(tokenizer)
}
