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
    let mut answers = PackedAnswers {
        exact: lens[..results].iter().map(|&len| vec![0.0; len]).collect(),
        standard: lens[..results].iter().map(|&len| vec![T::default(); len]).collect(),
        exact_lse: vec![f64::NEG_INFINITY; total_q * heads_q],
        standard_lse: vec![f32::NEG_INFINITY; total_q * heads_q],
    };
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
        let wide = |data: &[f32]| -> Vec<f64> { data.iter().map(|&x| x.into()).collect() };
        let round = |data: &[f32]| -> Vec<T> { data.iter().map(|&x| T::from_f32(x)).collect() };
        let (out, lse) = reference::forward(&dims, &wide(&q), &wide(&k), &wide(&v));
        let (standard_out, standard_lse) = reference::standard(&dims, &round(&q), &round(&k), &round(&v));
        of_out.put(&mut answers.exact[0], &queries, &out);
        of_out.put(&mut answers.standard[0], &queries, &standard_out);
        for head in 0..heads_q {
            let (from, to) = (head * queries.len(), head * total_q + queries.start);
            answers.exact_lse[to..][..queries.len()].copy_from_slice(&lse[from..][..queries.len()]);
            answers.standard_lse[to..][..queries.len()].copy_from_slice(&standard_lse[from..][..queries.len()]);
        }
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
pub(crate) struct Rows {
    pub heads: usize,
    pub head_dim: usize,
}

impl Rows {
    /// Returns rows as `[heads, seqlen, head_dim]`.
    pub fn take(self, packed: &[f32], rows: &Range<usize>) -> Vec<f32> {
        let places = self.places(rows);
        places
            .flat_map(|place| packed[place..][..self.head_dim].iter().copied())
            .collect()
    }

    /// Writes `[heads, seqlen, head_dim]` to its rows.
    pub fn put<T: Copy>(self, packed: &mut [T], rows: &Range<usize>, from: &[T]) {
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
