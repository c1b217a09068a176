//! Ragged batches of the quickstart: sequences packed end to end, and their right answers, sequence by sequence.

use std::ops::Range;

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Element, Sequences};

use crate::{AttentionFile, Failure};

/// Answers of attention in packed layout, with the error that standard attention in `T` makes beside them.
#[derive(Debug)]
pub struct PackedAnswers<T> {
    /// out, dq, dk and dv in f64; gradients only if the file has dout.
    pub exact: Vec<Vec<f64>>,
    /// out, dq, dk and dv of standard attention in `T`.
    pub standard: Vec<Vec<T>>,
    /// lse in f64, `[heads_q, total_q]`.
    pub exact_lse: Vec<f64>,
    /// lse as standard attention in `T` computes it.
    pub standard_lse: Vec<f32>,
}

impl<T: Element> PackedAnswers<T> {
    /// Answers of so many rows, a query and head each, that see no key. The lengths are those of out and, perhaps, dq, dk and dv.
    pub(crate) fn unseen(rows: usize, lens: &[usize]) -> Self {
        Self {
            exact: lens.iter().map(|&len| vec![0.0; len]).collect(),
            standard: lens.iter().map(|&len| vec![T::default(); len]).collect(),
            exact_lse: vec![f64::NEG_INFINITY; rows],
            standard_lse: vec![f32::NEG_INFINITY; rows],
        }
    }

    /// Computes out and lse of one sequence from q, k and v, `[heads, seqlen, head_dim]`. The places of its rows, head after head,
    /// are the row of out and the element of lse.
    pub(crate) fn solve(
        &mut self,
        dims: &Dims,
        [q, k, v]: [&[f32]; 3],
        head_dim_v: usize,
        places: impl Iterator<Item = (usize, usize)>,
    ) {
        let (out, lse) = reference::forward(dims, &wide(q), &wide(k), &wide(v));
        let (standard_out, standard_lse) = reference::standard(dims, &round(q), &round(k), &round(v));
        for (from, (row, of_lse)) in places.enumerate() {
            let (from_out, to_out) = (from * head_dim_v, row * head_dim_v);
            self.exact[0][to_out..][..head_dim_v].copy_from_slice(&out[from_out..][..head_dim_v]);
            self.standard[0][to_out..][..head_dim_v].copy_from_slice(&standard_out[from_out..][..head_dim_v]);
            self.exact_lse[of_lse] = lse[from];
            self.standard_lse[of_lse] = standard_lse[from];
        }
    }
}

/// Returns elements as f64.
fn wide(elements: &[f32]) -> Vec<f64> {
    elements.iter().map(|&element| element.into()).collect()
}

/// Returns elements rounded to `T`.
fn round<T: Element>(elements: &[f32]) -> Vec<T> {
    elements.iter().map(|&element| T::from_f32(element)).collect()
}

/// Returns the row of out and the element of lse of each query of a packed sequence, head after head.
pub(crate) fn packed_places(
    queries: &Range<usize>,
    heads: usize,
    total_q: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let queries = queries.clone();
    let of_head = move |head| {
        let queries = queries.clone();
        queries.map(move |query| (query * heads + head, head * total_q + query))
    };
    (0..heads).flat_map(of_head)
}

/// Returns the sequences that a file describes: `cu_seqlens_q`, `cu_seqlens_k` and, if it is there, `seqused_k`.
///
/// # Errors
/// A sentence if one of the first two is missing, or the numbers describe no sequences.
pub fn sequences(file: &AttentionFile) -> Result<Sequences, Failure> {
    let numbers = |name| Ok::<_, Failure>(file.integers(name, "--ragged")?.1);
    let sequences = Sequences::new(&numbers("cu_seqlens_q")?, &numbers("cu_seqlens_k")?)?;
    if file.has("seqused_k") {
        Ok(sequences.seqused_k(&numbers("seqused_k")?)?)
    } else {
        Ok(sequences)
    }
}

/// Computes full attention for each sequence of a file, in f64 and as a framework does it in `T`.
pub fn answers<T: Element>(attention: &Attention, file: &AttentionFile, sequences: &Sequences) -> PackedAnswers<T> {
    let [total_q, heads_q, head_dim] = <[usize; 3]>::try_from(&file.q.shape[..]).expect("forward took q");
    let [_, heads_kv, head_dim_v] = <[usize; 3]>::try_from(&file.v.shape[..]).expect("forward took v");
    let [q, k, v] = [&file.q, &file.k, &file.v].map(|stored| stored.elements.len());
    let lens = [total_q * heads_q * head_dim_v, q, k, v];
    let results = if file.dout.is_some() { 4 } else { 1 };
    let mut answers = PackedAnswers::unseen(total_q * heads_q, &lens[..results]);
    for sequence in 0..sequences.batch() {
        let (queries, keys) = (sequences.queries(sequence), sequences.keys(sequence));
        let dims = Dims::new(
            attention,
            [1, heads_q, queries.len(), head_dim],
            [1, heads_kv, keys.len(), head_dim],
        )
        .with_head_dim_v(head_dim_v);
        let rows = |heads, head_dim| Rows { heads, head_dim };
        let (of_queries, of_keys) = (rows(heads_q, head_dim), rows(heads_kv, head_dim));
        let (of_out, of_values) = (rows(heads_q, head_dim_v), rows(heads_kv, head_dim_v));
        let q = of_queries.take(&file.q.elements, &queries);
        let (k, v) = (
            of_keys.take(&file.k.elements, &keys),
            of_values.take(&file.v.elements, &keys),
        );
        answers.solve(
            &dims,
            [&q, &k, &v],
            head_dim_v,
            packed_places(&queries, heads_q, total_q),
        );
        if let Some(dout) = &file.dout {
            let dout = of_out.take(&dout.elements, &queries);
            let exact = reference::backward(&dims, &wide(&q), &wide(&k), &wide(&v), &wide(&dout));
            let standard = reference::standard_backward(&dims, &round(&q), &round(&k), &round(&v), &round(&dout));
            for (i, (rows, range)) in [(of_queries, &queries), (of_keys, &keys), (of_values, &keys)]
                .into_iter()
                .enumerate()
            {
                rows.put(&mut answers.exact[i + 1], range, &exact[i]);
                rows.put(&mut answers.standard[i + 1], range, &standard[i]);
            }
        }
    }
    answers
}

/// Rows of a packed `[total, heads, head_dim]` tensor.
#[derive(Clone, Copy)]
struct Rows {
    heads: usize,
    head_dim: usize,
}

impl Rows {
    /// Returns rows as `[heads, seqlen, head_dim]`.
    fn take(self, packed: &[f32], rows: &Range<usize>) -> Vec<f32> {
        let places = self.places(rows);
        places
            .flat_map(|place| packed[place..][..self.head_dim].iter().copied())
            .collect()
    }

    /// Writes `[heads, seqlen, head_dim]` to its rows.
    fn put<T: Copy>(self, packed: &mut [T], rows: &Range<usize>, from: &[T]) {
        for (place, row) in self.places(rows).zip(from.chunks(self.head_dim)) {
            packed[place..][..self.head_dim].copy_from_slice(row);
        }
    }

    /// Returns the first element of each row, head after head.
    fn places(self, rows: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let rows = rows.clone();
        (0..self.heads).flat_map(move |head| rows.clone().map(move |row| (row * self.heads + head) * self.head_dim))
    }
}
