//! candle-flash-attn's functions over ragged batches: sequences of different lengths, packed end to end without padding.
//!
//! All sequences are one call of the host's, without a copy. Lengths are read on the host, so on a GPU each function waits for them.

use std::ops::Range;

use candle_core::{Result, Tensor};
use flash_attention::{KvCache, Sequences};

use crate::error::Error;
use crate::op::FlashOp;
use crate::options::Options;
use crate::paged::PagedOp;
use crate::views::{Batch, wrap};

/// Tokens that a page read in place has a multiple of.
const PAGE_SIZE_MULTIPLE: usize = 8;

/// Cumulative lengths and the longest length of one side of a ragged batch.
struct Lengths<'a> {
    names: [&'static str; 2],
    seqlens: &'a Tensor,
    max_seqlen: usize,
}

impl<'a> Lengths<'a> {
    /// The lengths of q and of k.
    fn of_both([seqlens_q, seqlens_k]: [&'a Tensor; 2], [max_seqlen_q, max_seqlen_k]: [usize; 2]) -> [Self; 2] {
        [
            Self {
                names: ["seqlens_q", "max_seqlen_q"],
                seqlens: seqlens_q,
                max_seqlen: max_seqlen_q,
            },
            Self {
                names: ["seqlens_k", "max_seqlen_k"],
                seqlens: seqlens_k,
                max_seqlen: max_seqlen_k,
            },
        ]
    }

    /// The tokens of each sequence, which end among `total` tokens.
    fn ranges(&self, total: usize) -> Result<Vec<Range<usize>>> {
        let [argument, max_argument] = self.names;
        let ends = self.seqlens.to_vec1::<u32>()?;
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(ends.len());
        let mut start = 0;
        for (index, end) in ends.into_iter().enumerate() {
            let value = end as usize;
            let limits = [start, if index == 0 { 0 } else { total }];
            if value < limits[0] || value > limits[1] {
                return Err(Error::CumulativeLengths {
                    argument,
                    index,
                    value,
                    limits,
                }
                .into());
            }
            if value - start > self.max_seqlen {
                return Err(Error::MaxSeqlen {
                    argument: max_argument,
                    value: self.max_seqlen,
                    sequence: index - 1,
                    seqlen: value - start,
                }
                .into());
            }
            if index > 0 {
                ranges.push(start..value);
            }
            start = value;
        }
        Ok(ranges)
    }
}

fn attend(
    [q, k, v]: [&Tensor; 3],
    seqlens: [&Tensor; 2],
    max_seqlens: [usize; 2],
    options: Options<'_>,
) -> Result<Tensor> {
    let [of_q, of_k] = Lengths::of_both(seqlens, max_seqlens);
    let (ranges_q, ranges_k) = (of_q.ranges(q.dim(0)?)?, of_k.ranges(k.dim(0)?)?);
    same_count(of_k.names[0], ranges_k.len(), ranges_q.len())?;
    let sequences = sequences(&ranges_q, ranges_k.iter().map(|keys| keys.end))?;
    FlashOp::new(options.recipe(of_k.max_seqlen), Batch::Ragged(sequences)).apply(q, k, v)
}

/// The host's form of sequences with these queries, whose keys end there.
fn sequences(queries: &[Range<usize>], ends_k: impl Iterator<Item = usize>) -> Result<Sequences> {
    let cu_seqlens_q = offsets(queries.iter().map(|queries| queries.end))?;
    Sequences::new(&cu_seqlens_q, &offsets(ends_k)?).map_err(wrap)
}

/// Cumulative lengths, from 0 on.
fn offsets(ends: impl Iterator<Item = usize>) -> Result<Vec<i32>> {
    std::iter::once(Ok(0)).chain(ends.map(signed)).collect()
}

fn signed(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(candle_core::Error::wrap)
}

/// Refuses a tensor `argument` that describes another number of sequences than seqlens_q.
fn same_count(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    match got == expected {
        true => Ok(()),
        false => Err(Error::SequenceCount {
            argument,
            got,
            expected,
        }
        .into()),
    }
}

/// `softmax(softmax_scale * q k^T) v` in each sequence of a ragged batch, with gradients.
///
/// * q: `[total_q, heads_q, head_dim]`, the queries of all sequences, end to end.
/// * k, v: `[total_k, heads_kv, head_dim]`.
/// * seqlens_q, seqlens_k: u32 `[batch + 1]`, cumulative: `0, len_0, len_0 + len_1, …`. Tokens after the last one are zeros in the
///   result.
/// * max_seqlen_q, max_seqlen_k: at least the longest length.
/// * causal: aligned at the last query and the last key of each sequence.
///
/// The result is contiguous, of q's shape. A sequence without keys gives zeros.
///
/// # Errors
/// The errors of [`flash_attn`](crate::flash_attn); [`Error::CumulativeLengths`](crate::Error::CumulativeLengths),
/// [`Error::SequenceCount`](crate::Error::SequenceCount) or [`Error::MaxSeqlen`](crate::Error::MaxSeqlen) for wrong lengths.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flash_attention_candle::flash_attn_varlen;
///
/// // Sentences of 5, 9 and 2 tokens, 12 heads of 32.
/// let qkv = Tensor::randn(0f32, 1.0, (16, 12, 32), &Device::Cpu)?;
/// let seqlens = Tensor::new(&[0u32, 5, 14, 16], &Device::Cpu)?;
/// let out = flash_attn_varlen(&qkv, &qkv, &qkv, &seqlens, &seqlens, 9, 9, 0.18, false)?;
/// assert_eq!(out.dims(), qkv.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let options = Options::new(softmax_scale, causal);
    attend([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], options)
}

/// [`flash_attn_varlen`] with the window of [`flash_attn_windowed`](crate::flash_attn_windowed) in each sequence.
///
/// # Errors
/// The errors of both.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right);
    attend([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], options)
}

/// [`flash_attn_varlen_windowed`] over keys and values in pages, as an inference server's cache has them.
///
/// * k, v: `[pages, page_block_size, heads_kv, head_dim]`.
/// * block_table: u32 `[batch, max_pages]`, the pages of each sequence in order.
/// * mm_prefix_ranges: ranges of keys that no mask hides. Anything but `None` is refused.
/// * softcap: `None` or `Some(0.0)` is no cap.
///
/// Pages of a multiple of 8 tokens are read in place, unless a gradient goes to a tensor. Otherwise the pages in use are gathered into a
/// new tensor first, whose size is that of the keys.
///
/// # Errors
/// The errors of [`flash_attn_varlen_windowed`]; [`Error::PageSize`](crate::Error::PageSize),
/// [`Error::BlockTable`](crate::Error::BlockTable), [`Error::Page`](crate::Error::Page);
/// [`Error::Unsupported`](crate::Error::Unsupported) for mm_prefix_ranges.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if let Some(ranges) = mm_prefix_ranges {
        return Err(Error::Unsupported {
            argument: "mm_prefix_ranges",
            value: format!("a tensor {:?}", ranges.shape()),
        }
        .into());
    }
    let (page_count, page_size, heads, head_dim) = k.dims4()?;
    if page_size != page_block_size {
        return Err(Error::PageSize {
            value: page_block_size,
            expected: page_size,
        }
        .into());
    }
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right).softcap(softcap);
    let [of_q, of_k] = Lengths::of_both([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]);
    let (ranges_q, lengths) = (of_q.ranges(q.dim(0)?)?, of_k.ranges(usize::MAX)?);
    let table = block_table.to_vec2::<u32>()?;
    same_count(of_k.names[0], lengths.len(), ranges_q.len())?;
    same_count("block_table", table.len(), ranges_q.len())?;

    let mut pages = Vec::new();
    let mut ends_k = Vec::with_capacity(lengths.len());
    for (sequence, (length, row)) in lengths.iter().zip(&table).enumerate() {
        let used = length.len().div_ceil(page_size);
        let Some(row) = row.get(..used) else {
            return Err(Error::BlockTable {
                sequence,
                seqlen: length.len(),
                limit: row.len() * page_size,
            }
            .into());
        };
        if let Some(&value) = row.iter().find(|&&page| page as usize >= page_count) {
            let limit = page_count;
            return Err(Error::Page { sequence, value, limit }.into());
        }
        pages.extend_from_slice(row);
        ends_k.push(pages.len() * page_size);
    }
    let recipe = options.recipe(max_seqlen_k);
    if PagedOp::takes([q, k, v]) && page_size.is_multiple_of(PAGE_SIZE_MULTIPLE) {
        let cache = cache([page_count, page_size], &table, &lengths, &ranges_q)?;
        return PagedOp::new(recipe, cache).apply(q, k, v);
    }
    let pages = Tensor::new(pages, k.device())?;
    let gathered = |paged: &Tensor| paged.index_select(&pages, 0)?.reshape(((), heads, head_dim));
    let sequences = sequences(&ranges_q, ends_k.into_iter())?;
    let sequences = sequences.seqused_k(&used_of(&lengths)?).map_err(wrap)?;
    FlashOp::new(recipe, Batch::Ragged(sequences)).apply(q, &gathered(k)?, &gathered(v)?)
}

/// The number of keys of each sequence.
fn used_of(lengths: &[Range<usize>]) -> Result<Vec<i32>> {
    lengths.iter().map(|length| signed(length.len())).collect()
}

/// The host's form of a block table whose used entries have been checked, with packed queries.
fn cache(shape: [usize; 2], table: &[Vec<u32>], lengths: &[Range<usize>], queries: &[Range<usize>]) -> Result<KvCache> {
    let table: Vec<i32> = table.iter().flatten().map(|page| page.cast_signed()).collect();
    let cu_seqlens_q = offsets(queries.iter().map(|queries| queries.end))?;
    KvCache::paged(shape, &table, &used_of(lengths)?)
        .and_then(|cache| cache.cu_seqlens_q(&cu_seqlens_q))
        .map_err(wrap)
}

/// [`flash_attn_varlen`] with the bias of [`flash_attn_alibi`](crate::flash_attn_alibi) in each sequence.
///
/// # Errors
/// The errors of both.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let options = Options::new(softmax_scale, causal).alibi(Some(alibi_slopes));
    attend([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], options)
}

/// [`flash_attn_varlen_windowed`] with the bias of [`flash_attn_alibi`](crate::flash_attn_alibi) in each sequence.
///
/// # Errors
/// The errors of both.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right).alibi(Some(alibi_slopes));
    attend([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], options)
}

/// [`flash_attn_varlen_alibi_windowed`] with the cap of
/// [`flash_attn_alibi_windowed_softcap`](crate::flash_attn_alibi_windowed_softcap).
///
/// # Errors
/// The errors of both.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let options = Options::windowed(softmax_scale, window_size_left, window_size_right)
        .alibi(alibi_slopes)
        .softcap(Some(softcap));
    attend([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], options)
}
