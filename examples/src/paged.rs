//! Paged caches of the quickstart: keys and values in pages, and the right answers, sequence by sequence.

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Element, KvCache};

use crate::ragged::{PackedAnswers, Rows};
use crate::{AttentionFile, Failure, Stored};

/// Returns the cache that a file describes: `block_table`, `seqused_k` and, for packed queries, `cu_seqlens_q`.
///
/// # Errors
/// A sentence if one of the first two is missing, or the numbers describe no cache.
pub fn cache(file: &AttentionFile) -> Result<KvCache, Failure> {
    let option = "--paged";
    let (table_shape, block_table) = file.integers("block_table", option)?;
    let (used_shape, seqused_k) = file.integers("seqused_k", option)?;
    let &[pages, page_size, ..] = &file.k.shape[..] else {
        let shape = &file.k.shape;
        return Err(Failure(format!(
            "`k` has shape {shape:?}, expected [pages, page_size, heads, head_dim] with --paged"
        )));
    };
    match (&table_shape[..], &used_shape[..]) {
        (&[rows, _], &[batch]) if rows == batch => {}
        _ => {
            return Err(Failure(format!(
                "`block_table` has shape {table_shape:?} and `seqused_k` {used_shape:?}, expected [batch, max_pages] and [batch]"
            )));
        }
    }
    let cache = KvCache::paged([pages, page_size], &block_table, &seqused_k)?;
    if file.has("cu_seqlens_q") {
        Ok(cache.cu_seqlens_q(&file.integers("cu_seqlens_q", option)?.1)?)
    } else {
        Ok(cache)
    }
}

/// Computes full attention for each sequence of a file, in f64 and as a framework does it in `T`, in the layout of q.
pub fn answers<T: Element>(attention: &Attention, file: &AttentionFile, cache: &KvCache) -> PackedAnswers<T> {
    let (heads_q, head_dim) = match file.q.shape[..] {
        [_, heads_q, head_dim] | [_, heads_q, _, head_dim] => (heads_q, head_dim),
        _ => unreachable!("forward took q"),
    };
    let &[_, _, heads_kv, head_dim_v] = &file.v.shape[..] else {
        unreachable!("forward took v")
    };
    let rows = file.q.elements.len() / head_dim;
    let mut answers = PackedAnswers {
        exact: vec![vec![0.0; rows * head_dim_v]],
        standard: vec![vec![T::default(); rows * head_dim_v]],
        exact_lse: vec![f64::NEG_INFINITY; rows],
        standard_lse: vec![f32::NEG_INFINITY; rows],
    };
    let [of_queries, of_out] = [head_dim, head_dim_v].map(|head_dim| Rows {
        heads: heads_q,
        head_dim,
    });
    for sequence in 0..cache.batch() {
        // Queries of a batch are packed head after head: the rows of one sequence lie together.
        let seqlen_q = cache
            .queries(sequence)
            .map_or_else(|| file.q.shape[2], |range| range.len());
        let keys = cache.keys(sequence);
        let dims = Dims::new(
            attention,
            [1, heads_q, seqlen_q, head_dim],
            [1, heads_kv, keys, head_dim],
        )
        .with_head_dim_v(head_dim_v);
        let first = sequence * heads_q * seqlen_q;
        let entry = |head_dim: usize| first * head_dim..(first + heads_q * seqlen_q) * head_dim;
        let q = match cache.queries(sequence) {
            Some(range) => of_queries.take(&file.q.elements, &range),
            None => file.q.elements[entry(head_dim)].to_vec(),
        };
        let [k, v] = [&file.k, &file.v].map(|pages| gathered(pages, cache, sequence));
        let wide = |data: &[f32]| -> Vec<f64> { data.iter().map(|&x| x.into()).collect() };
        let round = |data: &[f32]| -> Vec<T> { data.iter().map(|&x| T::from_f32(x)).collect() };
        let (out, lse) = reference::forward(&dims, &wide(&q), &wide(&k), &wide(&v));
        let (standard_out, standard_lse) = reference::standard(&dims, &round(&q), &round(&k), &round(&v));
        match cache.queries(sequence) {
            Some(range) => {
                of_out.put(&mut answers.exact[0], &range, &out);
                of_out.put(&mut answers.standard[0], &range, &standard_out);
            }
            None => {
                answers.exact[0][entry(head_dim_v)].copy_from_slice(&out);
                answers.standard[0][entry(head_dim_v)].copy_from_slice(&standard_out);
            }
        }
        for head in 0..heads_q {
            let from = head * seqlen_q..(head + 1) * seqlen_q;
            let to = match cache.queries(sequence) {
                Some(range) => head * file.q.shape[0] + range.start,
                None => first + from.start,
            };
            answers.exact_lse[to..][..seqlen_q].copy_from_slice(&lse[from.clone()]);
            answers.standard_lse[to..][..seqlen_q].copy_from_slice(&standard_lse[from]);
        }
    }
    answers
}

/// The keys or values of a sequence, `[heads, seqlen, head_dim]`.
fn gathered(pages: &Stored, cache: &KvCache, sequence: usize) -> Vec<f32> {
    let &[_, page_size, heads, head_dim] = &pages.shape[..] else {
        unreachable!("forward took k and v")
    };
    let mut rows = Vec::new();
    for head in 0..heads {
        for key in 0..cache.keys(sequence) {
            let (page, place) = cache.slot(sequence, key);
            let row = (page * page_size + place) * heads + head;
            rows.extend_from_slice(&pages.elements[row * head_dim..][..head_dim]);
        }
    }
    rows
}
