//! Calls over keys and values that are kept between calls: a [`KvCache`] says where those of each sequence lie.

use super::{
    Call, Queries, check_rank, check_results, empty_output, forward_on_cpu, forward_one_by_one, forward_placed, is_cpu,
    plan_placed, plans, refuse_one_by_one, rows,
};
use crate::call::named;
use crate::element::Element;
use crate::error::Error;
use crate::layout::TensorInfo;
use crate::options::Attention;
use crate::output::Output;
use crate::plan::Plan;
use crate::problem::check_written;
use crate::sequences::{KvCache, Pages, Placed};
use crate::tensor::{Tensor, reserved};

impl KvCache {
    /// Describes a paged cache by tensors: `block_table` `[batch, max_pages]`, `seqused_k` `[batch]`, in any strides. Waits for the
    /// work that produces them, and checks them on the host before anything is launched.
    ///
    /// # Errors
    /// The errors of [`paged`](Self::paged) and [`Tensor::to_vec`]; [`Error::Rank`] for tensors of other axes.
    pub fn of_tensors(shape: [usize; 2], block_table: &Tensor<i32>, seqused_k: &Tensor<i32>) -> Result<Self, Error> {
        check_rank("block_table", block_table, 2)?;
        check_rank("seqused_k", seqused_k, 1)?;
        let (rows, batch) = (block_table.shape()[0], seqused_k.shape()[0]);
        if rows != batch {
            return Err(Error::ShapeMismatch {
                argument: "block_table",
                axis: "batch",
                got: rows,
                other: "seqused_k",
                expected: batch,
            });
        }
        Self::paged(shape, &block_table.to_vec()?, &seqused_k.to_vec()?)
    }
}

impl Attention {
    /// The forward pass over keys and values of a cache.
    ///
    /// k and v are `[pages, page_size, heads_kv, head_dim]`, or `[rows, seqlen, heads_kv, head_dim]` of a rectangular cache, with a
    /// contiguous last axis and any other strides. q is `[batch, heads_q, seqlen_q, head_dim]`, and so are the results; where the
    /// cache has [`cu_seqlens_q`](KvCache::cu_seqlens_q), q and `out` are `[total_q, heads_q, head_dim]` and `lse` is
    /// `[heads_q, total_q]`. Queries of a sequence may be as few or as many as you like: one for decoding, a chunk of a prompt,
    /// both in one call. v may have another head_dim than k, which `out` then has.
    ///
    /// Masks, programs and causal alignment see each sequence by itself, as if its keys lay end to end: key 0 is its first key,
    /// wherever that is. `at.batch` is the number of the sequence, and dropout draws with a seed that is larger by it. Rows of q
    /// that belong to no sequence have `out = 0` and `lse = -inf`, or the logit of their head's sink.
    ///
    /// The CPU reads pages in place, all sequences in one pass. GPUs read them in place in one launch for all sequences, and a second
    /// one where long sequences are split over their keys. Without a score program, heads that share keys read them once where
    /// there are few queries. Only where kernels for Hopper are forced are the keys of several pages gathered through the host, for
    /// a launch a sequence.
    ///
    /// ```
    /// use flash_attention::{Attention, Device, KvCache, Tensor};
    ///
    /// let device = Device::cpu();
    /// // 3 pages of 8 keys of 2 heads of 16 elements; 2 sequences of one query each, of 4 heads.
    /// let pages = Tensor::from_slice(&device, [3, 8, 2, 16], &[0.5_f32; 768])?;
    /// let q = Tensor::from_slice(&device, [2, 4, 1, 16], &[1.0_f32; 128])?;
    /// let cache = KvCache::paged([3, 8], &[2, 0, 1, -1], &[11, 3])?;
    /// let output = Attention::new().forward_cached(&q, &pages, &pages, &cache)?;
    /// assert_eq!(output.out.shape(), [2, 4, 1, 16]);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Rank`] unless k and v have four axes and q has four, or three where the cache has `cu_seqlens_q`;
    /// [`Error::ShapeMismatch`] unless k and v have the cache's pages and q its sequences; [`Error::Sequence`] if a sequence's
    /// queries end beyond q; and the errors of [`forward`](Self::forward), before anything is launched.
    pub fn forward_cached<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        cache: &KvCache,
    ) -> Result<Output<T>, Error> {
        check_all(q, k, v, cache)?;
        let mut output = empty_output(q, v.shape()[3])?;
        if !self.takes_placed(q) && !is_cpu(q) {
            return forward_one_by_one(q, &self.cached(q, k, v, cache)?, output);
        }
        self.forward_cached_into(q, k, v, cache, &mut output, None)?;
        Ok(output)
    }

    /// Runs [`forward_cached`](Self::forward_cached) and writes the results to tensors of the caller: `out` with a contiguous last axis
    /// and any other strides that do not overlap, `lse` and, if the output has statistics, `row_max` and `row_sum` with any strides that
    /// do not overlap. None may share memory with an input.
    ///
    /// With a workspace of the caller's, a contiguous f32 tensor of at least [`Plan::workspace_bytes`] of the plan of
    /// [`plan_cached`](Self::plan_cached) on a GPU, at an address that is a multiple of 64, the call allocates nothing but lists of work,
    /// which [`Device::prepare`](crate::Device::prepare) loads before, and waits for nothing. Its content is undefined before and after.
    /// The CPU needs none. On a GPU each of lse, row_max and row_sum that is not contiguous needs more, as [`Plan::workspace_bytes`] says,
    /// and a list that the first such call loads.
    ///
    /// # Errors
    /// The errors of [`forward_cached`](Self::forward_cached); [`Error::ShapeMismatch`] for results of other shapes;
    /// [`Error::OverlappingStrides`], [`Error::Aliased`] and [`Error::Interleaved`] for results that may share memory;
    /// [`Error::Workspace`], [`Error::NotContiguous`], [`Error::DeviceMismatch`] and [`Error::Address`] for a workspace that breaks a
    /// condition; [`Error::Unsupported`] if Hopper's own kernels are forced.
    pub fn forward_cached_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        cache: &KvCache,
        output: &mut Output<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let placed = check_all(q, k, v, cache)?;
        refuse_one_by_one(self, q)?;
        check_results(q, v.shape()[3], output)?;
        check_written(&named([q, k, v]), &output.named())?;
        if self.takes_placed(q) {
            let pages = [k.transpose(1, 2)?, v.transpose(1, 2)?];
            return forward_placed(self, q, pages, placed, output, workspace);
        }
        forward_on_cpu(q, &self.cached(q, k, v, cache)?, output)
    }

    /// Plans of [`forward_cached`](Self::forward_cached), one a sequence, in the order in which they run; on a GPU one for all. Reads no
    /// keys.
    ///
    /// # Errors
    /// The errors of [`forward_cached`](Self::forward_cached).
    pub fn plan_cached<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        cache: &KvCache,
    ) -> Result<Vec<Plan>, Error> {
        if self.takes_placed(q) {
            let placed = check_all(q, k, v, cache)?;
            return plan_placed(self, q, [k.transpose(1, 2)?, v.transpose(1, 2)?], placed);
        }
        plans(&self.cached(q, k, v, cache)?)
    }

    /// The call with each sequence, longest first, and one with the queries that belong to none.
    fn cached<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        cache: &KvCache,
    ) -> Result<Vec<Call<T>>, Error> {
        check_pages("k", k, cache)?;
        check_pages("v", v, cache)?;
        let mut queries = queries_of(q, cache)?;
        if queries.is_empty() {
            // Without a sequence, heads and head_dim are validated all the same.
            let nothing = |pages: &Tensor<T>| Tensor::empty(pages.device(), [0, pages.shape()[2], 0, pages.shape()[3]]);
            self.plan(q, &nothing(k)?, &nothing(v)?)?;
        }
        let work = |(sequence, queries): &(Option<usize>, Queries)| {
            let rows = match queries {
                Queries::Packed(range) => range.len(),
                Queries::Entry(_) | Queries::Entries => 1,
            };
            std::cmp::Reverse(rows * sequence.map_or(0, |sequence| cache.keys(sequence)))
        };
        queries.sort_by_key(work);
        let call = |(sequence, queries): (Option<usize>, Queries)| {
            let pages = sequence.map(|sequence| (cache.pages(sequence), cache.keys(sequence)));
            let keys = |tensor: &Tensor<T>| match &pages {
                Some((pages, keys)) if *keys > 0 => keys_of(tensor, pages, *keys),
                _ => Tensor::empty(q.device(), [1, tensor.shape()[2], 0, tensor.shape()[3]]),
            };
            Ok(Call {
                attention: self.of_sequence(sequence.unwrap_or(0)),
                q: queries.vectors(q)?,
                k: keys(k)?,
                v: keys(v)?,
                queries,
                pages: pages
                    .map(|(pages, _)| (pages, [k.clone(), v.clone()]))
                    .filter(|(pages, _)| pages.table().len() > 1),
            })
        };
        queries.into_iter().map(call).collect()
    }
}

/// Refuses tensors that a cache does not fit, and returns the places of its sequences in them.
fn check_all<T: Element>(q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>, cache: &KvCache) -> Result<Placed, Error> {
    check_pages("k", k, cache)?;
    check_pages("v", v, cache)?;
    check_queries(q, cache)?;
    Ok(match cache.total_q() {
        Some(_) => cache.placed(q.shape()[0], 0),
        None => cache.placed(0, q.shape()[2]),
    })
}

/// Refuses queries that are not those of the cache's sequences.
fn check_queries<T: Element>(q: &Tensor<T>, cache: &KvCache) -> Result<(), Error> {
    let batch = cache.batch();
    if cache.total_q().is_none() {
        check_rank("q", q, 4)?;
        let got = q.shape()[0];
        if got != batch {
            return Err(Error::ShapeMismatch {
                argument: "q",
                axis: "batch",
                got,
                other: "cache",
                expected: batch,
            });
        }
        return Ok(());
    }
    check_rank("q", q, 3)?;
    let total_q = q.shape()[0];
    let end = |sequence| cache.queries(sequence).unwrap_or_default().end;
    match (0..batch).find(|&sequence| end(sequence) > total_q) {
        None => Ok(()),
        Some(sequence) => Err(Error::Sequence {
            argument: "cu_seqlens_q",
            sequence,
            value: end(sequence) as i64,
            expected: format!("at most {total_q}, the rows of q"),
        }),
    }
}

/// The queries of each sequence; of packed ones those that are not empty, at least one, and those of no sequence.
fn queries_of<T: Element>(q: &Tensor<T>, cache: &KvCache) -> Result<Vec<(Option<usize>, Queries)>, Error> {
    check_queries(q, cache)?;
    let batch = cache.batch();
    let Some(used) = cache.total_q() else {
        return Ok((0..batch).map(|index| (Some(index), Queries::Entry(index))).collect());
    };
    let sequences = (0..batch).map(|sequence| (Some(sequence), cache.queries(sequence).unwrap_or_default()));
    let mut ranges: Vec<_> = sequences.chain([(None, used..q.shape()[0])]).collect();
    ranges.retain(|(_, range)| !range.is_empty());
    if ranges.is_empty() {
        ranges.push((None, 0..0));
    }
    let queries = |(sequence, range)| (sequence, Queries::Packed(range));
    Ok(ranges.into_iter().map(queries).collect())
}

/// Refuses keys or values without the pages of a cache.
pub(super) fn check_pages<T: Element>(
    argument: &'static str,
    tensor: &Tensor<T>,
    cache: &KvCache,
) -> Result<(), Error> {
    check_rank(argument, tensor, 4)?;
    for (axis, name) in ["pages", "page_size"].into_iter().enumerate() {
        let (got, expected) = (tensor.shape()[axis], cache.shape()[axis]);
        if got != expected {
            return Err(Error::ShapeMismatch {
                argument,
                axis: name,
                got,
                other: "cache",
                expected,
            });
        }
    }
    Ok(())
}

/// The keys or values of a sequence, `[1, heads_kv, seqlen_k, head_dim]`, as a view: if they are in several pages, it repeats a row
/// of the first.
fn keys_of<T: Element>(tensor: &Tensor<T>, pages: &Pages, keys: usize) -> Result<Tensor<T>, Error> {
    if let &[only] = pages.table() {
        let first = pages.place(0).1;
        return rows(&tensor.select(0, only as usize)?, &(first..first + keys));
    }
    let shape = [1, tensor.shape()[2], keys, tensor.shape()[3]];
    let strides = [tensor.strides()[0], tensor.strides()[2], 0, tensor.strides()[3]];
    let info = TensorInfo::new(tensor.device().id(), tensor.dtype(), shape, strides, tensor.address())?;
    Ok(Tensor::seen_through(info, tensor.owner()))
}

/// A copy of the keys or values of several pages, `[1, heads_kv, seqlen_k, head_dim]`, made through the host.
pub(super) fn gathered<T: Element>(tensor: &Tensor<T>, pages: &Pages, keys: usize) -> Result<Tensor<T>, Error> {
    let (heads, head_dim) = (tensor.shape()[2], tensor.shape()[3]);
    let mut elements = reserved(keys * heads * head_dim)?;
    let (mut begin, mut left) = (pages.place(0).1, keys);
    for &number in pages.table() {
        let len = left.min(pages.page_size() - begin);
        let page = tensor.select(0, number as usize)?;
        elements.extend(page.narrow(0, begin, len)?.to_vec()?);
        (begin, left) = (0, left - len);
    }
    let copy = Tensor::from_slice(tensor.device(), [keys, heads, head_dim], &elements)?;
    rows(&copy, &(0..keys))
}

/// The layout of what [`gathered`] makes in place of a view of [`keys_of`], at an address that is not known yet.
pub(super) fn layout_of_gathered<T: Element>(view: &Tensor<T>) -> Result<TensorInfo, Error> {
    let [_, heads, keys, head_dim] = *view.shape() else {
        unreachable!("a view of keys has four axes");
    };
    let row = heads * head_dim;
    let strides = [keys.saturating_mul(row), head_dim, row, 1];
    TensorInfo::new(view.device().id(), view.dtype(), view.shape(), strides, 0)
}
