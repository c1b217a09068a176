//! Keys and values of the tokens that sequences have read, in pages that any sequence can take.

use candle_core::{DType, Device, Error, Result, Tensor};
use flash_attention_candle::{Attention, FlashAttention, KvCache, Rotary};

use super::Config;

/// Keys and values of every layer in pages of `page_size` tokens. A sequence takes a page when it reaches it, and the pages of a
/// sequence lie anywhere.
#[derive(Debug)]
pub struct PagedCache {
    /// k and v of each layer, `[pages, page_size, heads_kv, head_dim]`.
    layers: Vec<[Tensor; 2]>,
    /// Pages, and tokens of a page.
    shape: [usize; 2],
    /// Pages that no sequence has.
    free: Vec<i32>,
    sequences: Vec<Sequence>,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<i32>,
    len: usize,
}

impl PagedCache {
    /// A cache of `pages` pages for so many sequences, which are empty.
    ///
    /// # Errors
    /// `page_size` is no multiple of 8; candle's errors.
    pub fn new(config: &Config, sequences: usize, pages: usize, page_size: usize) -> Result<Self> {
        KvCache::paged([pages, page_size], &[], &[]).map_err(Error::wrap)?;
        let shape = (pages, page_size, config.head_count_kv, config.head_dim());
        let empty = || Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let layers = (0..config.block_count).map(|_| Ok([empty()?, empty()?]));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            shape: [pages, page_size],
            free: (0..pages as i32).rev().collect(),
            sequences: vec![Sequence::default(); sequences],
        })
    }

    /// Tokens of a sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len
    }

    /// Pages that no sequence has.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Makes room for new tokens of some sequences, packed end to end: each pair is a sequence and how many tokens it gets. The result
    /// describes these sequences to [`append_and_attend`](Self::append_and_attend), for all layers of one pass.
    ///
    /// # Errors
    /// Fewer pages are free than the tokens need. No sequence has changed then.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn extend(&mut self, new: &[(usize, usize)]) -> Result<KvCache> {
        let [_, page_size] = self.shape;
        let lacking = |&(index, tokens): &(usize, usize)| {
            let Sequence { pages, len } = &self.sequences[index];
            (len + tokens).div_ceil(page_size) - pages.len()
        };
        let needed: usize = new.iter().map(lacking).sum();
        if needed > self.free.len() {
            candle_core::bail!("the cache has {} free pages; {needed} are needed", self.free.len())
        }
        let (mut before, mut added, mut ends) = (Vec::new(), Vec::new(), vec![0]);
        for &(index, tokens) in new {
            let sequence = &mut self.sequences[index];
            before.push(sequence.len as i32);
            added.push(tokens as i32);
            ends.push(ends[ends.len() - 1] + tokens as i32);
            sequence.len += tokens;
            let missing = sequence.len.div_ceil(page_size) - sequence.pages.len();
            sequence
                .pages
                .extend(self.free.drain(self.free.len() - missing..).rev());
        }
        let of_step = || new.iter().map(|&(index, _)| &self.sequences[index].pages);
        let longest = of_step().map(Vec::len).max().unwrap_or_default();
        let row = |pages: &Vec<i32>| [&pages[..], &vec![-1; longest - pages.len()]].concat();
        KvCache::paged(self.shape, &of_step().flat_map(row).collect::<Vec<_>>(), &before)
            .and_then(|cache| cache.append(&added))
            .and_then(|cache| cache.cu_seqlens_q(&ends))
            .map_err(Error::wrap)
    }

    /// Writes k and v of a step's tokens, `[tokens, heads_kv, head_dim]`, into a layer's pages, and returns the causal attention of q,
    /// `[tokens, heads, head_dim]`, over all tokens that each sequence has then. q and k are turned by their positions.
    ///
    /// # Errors
    /// Shapes that are not those of the step and the cache; candle's errors.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn append_and_attend(
        &self,
        step: &KvCache,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        rotary: &Rotary,
    ) -> Result<Tensor> {
        FlashAttention::new(Attention::new().causal()).forward_append(
            q,
            [k, v],
            Some(rotary),
            self.layers[layer].each_ref(),
            step,
        )
    }

    /// Forgets a sequence's tokens; its pages are free.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn clear(&mut self, sequence: usize) {
        let Sequence { pages, .. } = std::mem::take(&mut self.sequences[sequence]);
        self.free.extend(pages);
    }
}
