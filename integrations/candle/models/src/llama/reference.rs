//! candle-transformers' implementation of the model, with whose logits and tokens ours are compared.

use std::io::{Read, Seek};

use candle_core::quantized::gguf_file;
use candle_core::{Device, Result, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

/// candle-transformers' `quantized_llama`: plain attention, a sequence at a time.
#[derive(Debug)]
pub struct Reference(ModelWeights);

/// Agreement of two implementations over the same tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    /// Tokens that were chosen.
    pub tokens: usize,
    /// Chosen tokens whose logit was the largest in the reference too.
    pub same: usize,
    /// Largest difference of logits.
    pub difference: f32,
    /// Largest absolute logit of the reference.
    pub largest: f32,
}

impl Reference {
    /// Reads the weights of a GGUF file whose header has been read.
    ///
    /// # Errors
    /// candle's errors.
    pub fn load(file: gguf_file::Content, reader: &mut (impl Read + Seek)) -> Result<Self> {
        Ok(Self(ModelWeights::from_gguf(file, reader, &Device::Cpu)?))
    }

    /// Logits, `[vocab_size]`, after a prompt.
    ///
    /// # Errors
    /// candle's errors.
    pub fn read(&mut self, prompt: &[u32]) -> Result<Tensor> {
        self.next(prompt, 0)
    }

    /// Logits, `[vocab_size]`, after each of the tokens that follow a prompt of so many tokens, but the last.
    ///
    /// # Errors
    /// candle's errors.
    pub fn follow(&mut self, prompt_len: usize, tokens: &[u32]) -> Result<Vec<Tensor>> {
        let read = tokens.split_last().map_or(&[][..], |(_, read)| read);
        let logits = |(at, &token)| self.next(&[token], prompt_len + at);
        read.iter().enumerate().map(logits).collect()
    }

    fn next(&mut self, tokens: &[u32], position: usize) -> Result<Tensor> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        self.0.forward(&tokens, position)?.squeeze(0)
    }
}

impl Agreement {
    /// Adds chosen tokens: the logits that they were chosen by, and those of the reference at the same places.
    ///
    /// # Errors
    /// candle's errors.
    pub fn add(&mut self, chosen: &[u32], logits: &[Tensor], expected: &[Tensor]) -> Result<()> {
        for ((&token, logits), expected) in chosen.iter().zip(logits).zip(expected) {
            let largest = |tensor: &Tensor| tensor.abs()?.max_all()?.to_scalar::<f32>();
            self.tokens += 1;
            self.same += usize::from(expected.argmax(0)?.to_scalar::<u32>()? == token);
            self.difference = self.difference.max(largest(&(logits - expected)?)?);
            self.largest = self.largest.max(largest(expected)?);
        }
        Ok(())
    }
}
