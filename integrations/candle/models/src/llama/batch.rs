//! Several sequences at once: prompts in chunks, then a token a sequence a step.

use candle_core::{Device, Result, Tensor};

use super::{Llama, PagedCache};

/// Sequences that a model reads and writes at once, each at its own pace.
#[derive(Debug)]
pub struct Batch<'a> {
    model: &'a Llama,
    cache: PagedCache,
    /// Tokens of each sequence that the model has not read yet.
    unread: Vec<Vec<u32>>,
}

impl<'a> Batch<'a> {
    /// A batch of prompts that grow by at most `most_new` tokens each, over a cache with pages of `page_size` tokens.
    ///
    /// # Errors
    /// An empty prompt, or one that with its new tokens is longer than the model's context; the errors of [`PagedCache::new`].
    pub fn new(model: &'a Llama, prompts: &[Vec<u32>], most_new: usize, page_size: usize) -> Result<Self> {
        let context = model.config().context_length;
        for (index, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() || prompt.len() + most_new > context {
                candle_core::bail!(
                    "prompt {index} has {} tokens, and up to {most_new} follow; it must have one, and all must fit in {context}",
                    prompt.len()
                )
            }
        }
        let pages = prompts
            .iter()
            .map(|prompt| (prompt.len() + most_new).div_ceil(page_size))
            .sum();
        Ok(Self {
            model,
            cache: PagedCache::new(model.config(), prompts.len(), pages, page_size)?,
            unread: prompts.to_vec(),
        })
    }

    /// Tokens that the model has not read yet.
    pub fn unread(&self) -> usize {
        self.unread.iter().map(Vec::len).sum()
    }

    /// Reads at most so many tokens, those of the first sequences first, and returns the logits, `[vocab_size]`, of each sequence of
    /// which the last token was read.
    ///
    /// # Errors
    /// A token that is not in the vocabulary; no page is free; candle's errors.
    pub fn read(&mut self, most_tokens: usize) -> Result<Vec<(usize, Tensor)>> {
        let (mut new, mut tokens) = (Vec::new(), Vec::new());
        let (mut finished, mut last_rows) = (Vec::new(), Vec::new());
        for (sequence, unread) in self.unread.iter_mut().enumerate() {
            let count = unread.len().min(most_tokens - tokens.len());
            if count == 0 {
                continue;
            }
            tokens.extend(unread.drain(..count));
            new.push((sequence, count));
            if unread.is_empty() {
                finished.push(sequence);
                last_rows.push(tokens.len() as u32 - 1);
            }
        }
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let step = self.cache.extend(&new)?;
        let states = self.model.step(&self.cache, &step, &tokens)?;
        if finished.is_empty() {
            return Ok(Vec::new());
        }
        let last = states.index_select(&Tensor::new(last_rows, &Device::Cpu)?, 0)?;
        let logits = self.model.logits(&last)?;
        let row = |(row, sequence)| Ok((sequence, logits.get(row)?));
        finished.into_iter().enumerate().map(row).collect()
    }

    /// Adds a token to a sequence, to be read next.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn push(&mut self, sequence: usize, token: u32) {
        self.unread[sequence].push(token);
    }

    /// Ends a sequence: its pages are free.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn end(&mut self, sequence: usize) {
        self.unread[sequence].clear();
        self.cache.clear(sequence);
    }
}
