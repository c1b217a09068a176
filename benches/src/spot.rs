//! Spot check of timed results: a few rows against f64, on the host.
//!
//! It does not measure accuracy, which the test suite does. It finds results that are wrong at sizes that only a
//! table of speed has. It compares rows at both ends and in the middle of the last head of the last sequence.

use flash_attention::{Element, Error, Tensor};

use crate::arena::Bound;
use crate::row::{Pass, Row};

/// Largest error allowed, in units of the size of a result's row if the terms of its sums are independent. Correct
/// results have 0.009 in bf16 and 0.0009 in f16 at any length, wrong ones about 1.
pub const ALLOWED: f64 = 1.0 / 32.0;

/// A head on the host, `[seqlen][head_dim]`, flat.
struct Head {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
    out: Vec<f64>,
    lse: Vec<f64>,
    head_dim: usize,
    seqlen: usize,
    causal: bool,
    scale: f64,
}

/// A row of a result: sums of terms, and the sums of their squares. dP and delta, whose difference may cancel, count
/// as separate terms.
struct Sums {
    value: Vec<f64>,
    squares: Vec<f64>,
}

/// Returns the largest error of the checked rows in the results of the last run, in the unit of [`ALLOWED`]. A NaN is
/// an infinite error. `turn` is the turn of the last run.
///
/// # Errors
/// The error of the device if a result cannot be read: the launch failed.
pub fn error<T: Element>(bound: &Bound<T>, row: &Row, turn: usize) -> Result<f64, Error> {
    let ([q, k, v, dout], output) = &bound.sets[turn % bound.sets.len()];
    let head = Head {
        q: last_head(q)?,
        k: last_head(k)?,
        v: last_head(v)?,
        dout: last_head(dout)?,
        out: last_head(&output.out)?,
        lse: last_head(&output.lse)?,
        head_dim: row.head_dim,
        seqlen: row.seqlen,
        causal: row.causal,
        scale: bound.scale(),
    };
    let some = [0, 1, row.seqlen / 3, row.seqlen / 2 + 1, row.seqlen - 2, row.seqlen - 1];
    let some = some.map(|index| index.min(row.seqlen - 1));
    let mut worst = 0.0_f64;
    let mut compare = |got: &[f64], index: usize, want: &Sums| {
        let got = &got[index * row.head_dim..][..row.head_dim];
        let size = want.squares.iter().copied().fold(0.0, f64::max).sqrt();
        for (got, want) in got.iter().zip(&want.value) {
            let error = (got - want).abs() / size;
            worst = worst.max(if error.is_nan() { f64::INFINITY } else { error });
        }
    };
    if row.pass == Pass::Forward {
        for index in some {
            compare(&head.out, index, &head.output(index));
        }
        return Ok(worst);
    }
    let [dq, dk, dv] = [&bound.gradients.dq, &bound.gradients.dk, &bound.gradients.dv].map(last_head);
    let (dq, dk, dv) = (dq?, dk?, dv?);
    for index in some {
        compare(&dq, index, &head.query_gradient(index));
        let [want_dk, want_dv] = head.key_gradients(index);
        compare(&dk, index, &want_dk);
        compare(&dv, index, &want_dv);
    }
    Ok(worst)
}

fn last_head<T: Element>(tensor: &Tensor<T>) -> Result<Vec<f64>, Error> {
    let (batch, heads) = (tensor.shape()[0], tensor.shape()[1]);
    let head = tensor.select(0, batch - 1)?.select(0, heads - 1)?;
    Ok(head.to_vec()?.iter().map(|x| x.to_f64()).collect())
}

impl Head {
    fn row<'a>(&self, of: &'a [f64], index: usize) -> &'a [f64] {
        &of[index * self.head_dim..][..self.head_dim]
    }

    /// Returns the number of keys that a query sees.
    fn keys(&self, query: usize) -> usize {
        if self.causal { query + 1 } else { self.seqlen }
    }

    fn output(&self, query: usize) -> Sums {
        let scores: Vec<f64> = (0..self.keys(query))
            .map(|key| self.scale * dot(self.row(&self.q, query), self.row(&self.k, key)))
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        let mut out = Sums::new(self.head_dim);
        for (key, score) in scores.iter().enumerate() {
            let p = (score - largest).exp() / sum;
            out.add(p, p, self.row(&self.v, key));
        }
        out
    }

    /// Returns P, dP and delta of a pair, from the lse and the output of the device.
    fn pair(&self, query: usize, key: usize) -> [f64; 3] {
        let (q, dout) = (self.row(&self.q, query), self.row(&self.dout, query));
        let p = (self.scale * dot(q, self.row(&self.k, key)) - self.lse[query]).exp();
        [
            p,
            dot(dout, self.row(&self.v, key)),
            dot(dout, self.row(&self.out, query)),
        ]
    }

    fn query_gradient(&self, query: usize) -> Sums {
        let mut dq = Sums::new(self.head_dim);
        for key in 0..self.keys(query) {
            let [p, dp, delta] = self.pair(query, key);
            let weight = self.scale * p;
            dq.add(
                weight * (dp - delta),
                weight * (dp.abs() + delta.abs()),
                self.row(&self.k, key),
            );
        }
        dq
    }

    /// Returns dK and dV of a key.
    fn key_gradients(&self, key: usize) -> [Sums; 2] {
        let [mut dk, mut dv] = [Sums::new(self.head_dim), Sums::new(self.head_dim)];
        for query in if self.causal { key } else { 0 }..self.seqlen {
            let [p, dp, delta] = self.pair(query, key);
            let weight = self.scale * p;
            dk.add(
                weight * (dp - delta),
                weight * (dp.abs() + delta.abs()),
                self.row(&self.q, query),
            );
            dv.add(p, p, self.row(&self.dout, query));
        }
        [dk, dv]
    }
}

impl Sums {
    fn new(len: usize) -> Self {
        Self {
            value: vec![0.0; len],
            squares: vec![0.0; len],
        }
    }

    /// Adds a row times a weight that is a sum of terms of this size.
    fn add(&mut self, weight: f64, size: f64, row: &[f64]) {
        for ((value, squares), x) in self.value.iter_mut().zip(&mut self.squares).zip(row) {
            *value += weight * x;
            *squares += (size * x).powi(2);
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
