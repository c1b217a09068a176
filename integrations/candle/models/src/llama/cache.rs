//! Keys and values of the tokens that sequences have read, in pages that any sequence can take.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};
use flash_attention_candle::flash_attn_varlen_paged_windowed;

use super::Config;

/// Keys and values of every layer in pages of `page_size` tokens. A sequence takes a page when it reaches it, and the pages of a
/// sequence lie anywhere.
#[derive(Debug)]
pub struct PagedCache {
    /// k and v of each layer, `[pages * page_size, heads_kv, head_dim]`.
    layers: Vec<[Tensor; 2]>,
    page_size: usize,
    /// Pages that no sequence has.
    free: Vec<u32>,
    sequences: Vec<Sequence>,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<u32>,
    len: usize,
}

/// New tokens of some sequences, packed end to end, for which a cache has made room. The layers of one pass share it.
#[derive(Debug)]
pub struct Step {
    /// Position of each new token in its sequence.
    positions: Vec<u32>,
    /// Rows of new keys and values, and the row of the cache where the first of them goes.
    runs: Vec<(Range<usize>, usize)>,
    seqlens_q: Tensor,
    seqlens_k: Tensor,
    /// `[sequences, pages]`, filled up with 0.
    block_table: Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
}

impl Step {
    /// Position of each new token in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }
}

impl PagedCache {
    /// A cache of `pages` pages for so many sequences, which are empty.
    ///
    /// # Errors
    /// candle's errors.
    pub fn new(config: &Config, sequences: usize, pages: usize, page_size: usize) -> Result<Self> {
        let shape = (pages * page_size, config.head_count_kv, config.head_dim());
        let empty = || Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let layers = (0..config.block_count).map(|_| Ok([empty()?, empty()?]));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            page_size,
            free: (0..pages as u32).rev().collect(),
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

    /// Makes room for new tokens of some sequences: each pair is a sequence and how many tokens it gets.
    ///
    /// # Errors
    /// Fewer pages are free than the tokens need. No sequence has changed then. candle's errors.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn extend(&mut self, new: &[(usize, usize)]) -> Result<Step> {
        let page_size = self.page_size;
        let lacking = |&(sequence, tokens): &(usize, usize)| {
            let Sequence { pages, len } = &self.sequences[sequence];
            (len + tokens).div_ceil(page_size) - pages.len()
        };
        let needed: usize = new.iter().map(lacking).sum();
        if needed > self.free.len() {
            candle_core::bail!("the cache has {} free pages; {needed} are needed", self.free.len())
        }
        let (mut positions, mut runs) = (Vec::new(), Vec::new());
        for &(index, tokens) in new {
            let sequence = &mut self.sequences[index];
            let end = sequence.len + tokens;
            let missing = end.div_ceil(page_size) - sequence.pages.len();
            sequence
                .pages
                .extend(self.free.drain(self.free.len() - missing..).rev());
            while sequence.len < end {
                let page = sequence.pages[sequence.len / page_size] as usize;
                let within = sequence.len % page_size;
                let fitting = (page_size - within).min(end - sequence.len);
                runs.push((positions.len()..positions.len() + fitting, page * page_size + within));
                positions.extend((sequence.len..sequence.len + fitting).map(|position| position as u32));
                sequence.len += fitting;
            }
        }
        let of_step = || new.iter().map(|&(index, _)| &self.sequences[index]);
        let longest = of_step().map(|sequence| sequence.pages.len()).max().unwrap_or_default();
        let row = |sequence: &Sequence| [sequence.pages.clone(), vec![0; longest - sequence.pages.len()]].concat();
        Ok(Step {
            positions,
            runs,
            seqlens_q: cumulative(new.iter().map(|&(_, tokens)| tokens))?,
            seqlens_k: cumulative(of_step().map(|sequence| sequence.len))?,
            block_table: Tensor::new(of_step().map(row).collect::<Vec<_>>(), &Device::Cpu)?,
            max_seqlen_q: new.iter().map(|&(_, tokens)| tokens).max().unwrap_or_default(),
            max_seqlen_k: of_step().map(|sequence| sequence.len).max().unwrap_or_default(),
        })
    }

    /// Writes k and v of a step's tokens, `[tokens, heads_kv, head_dim]`, into a layer's pages, and returns the causal attention of q,
    /// `[tokens, heads, head_dim]`, over all tokens that each sequence has then.
    ///
    /// # Errors
    /// Shapes that are not those of the step and the cache; candle's errors.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn append_and_attend(
        &self,
        step: &Step,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        softmax_scale: f32,
    ) -> Result<Tensor> {
        let [cached_k, cached_v] = &self.layers[layer];
        for (new, cached) in [(k, cached_k), (v, cached_v)] {
            for (rows, to) in &step.runs {
                cached.slice_set(&new.narrow(0, rows.start, rows.len())?, 0, *to)?;
            }
        }
        let (rows, heads, head_dim) = cached_k.dims3()?;
        let pages = (rows / self.page_size, self.page_size, heads, head_dim);
        flash_attn_varlen_paged_windowed(
            q,
            &cached_k.reshape(pages)?,
            &cached_v.reshape(pages)?,
            &step.seqlens_q,
            &step.seqlens_k,
            &step.block_table,
            None,
            step.max_seqlen_q,
            step.max_seqlen_k,
            softmax_scale,
            None,
            Some(0),
            self.page_size,
            None,
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

/// Cumulative lengths, u32 `[sequences + 1]`.
fn cumulative(lengths: impl Iterator<Item = usize>) -> Result<Tensor> {
    let mut ends = vec![0];
    let mut end = 0;
    ends.extend(lengths.map(|len| {
        end += len as u32;
        end
    }));
    Tensor::new(ends, &Device::Cpu)
}
