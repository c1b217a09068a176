//! Paged caches of the quickstart: keys and values in pages, and the right answers, sequence by sequence.

use flash_attention::reference::Dims;
use flash_attention::{Attention, Element, KvCache};

use crate::ragged::{PackedAnswers, packed_places};
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
    let mut answers = PackedAnswers::unseen(rows, &[rows * head_dim_v]);
    for sequence in 0..cache.batch() {
        let (seqlen_q, places): (_, Vec<_>) = match cache.queries(sequence) {
            Some(range) => (range.len(), packed_places(&range, heads_q, file.q.shape[0]).collect()),
            // The rows of one sequence of a batch lie together, head after head.
            None => {
                let seqlen_q = file.q.shape[2];
                let first = sequence * heads_q * seqlen_q;
                let rows = first..first + heads_q * seqlen_q;
                (seqlen_q, rows.map(|row| (row, row)).collect())
            }
        };
        let of_row = |&(row, _): &(usize, usize)| &file.q.elements[row * head_dim..][..head_dim];
        let q: Vec<f32> = places.iter().flat_map(of_row).copied().collect();
        let keys = cache.keys(sequence);
        let dims = Dims::new(
            attention,
            [1, heads_q, seqlen_q, head_dim],
            [1, heads_kv, keys, head_dim],
        )
        .with_head_dim_v(head_dim_v);
        let [k, v] = [&file.k, &file.v].map(|pages| gathered(pages, cache, sequence));
        answers.solve(&dims, [&q, &k, &v], head_dim_v, places.into_iter());
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
