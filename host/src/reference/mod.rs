//! Reference attention, computed by the definition: slow, readable, and with all scores of a query in memory.
//!
//! [`forward`] and [`backward`] are the oracle, in f64. [`standard`] and [`standard_backward`] compute as a framework
//! does in the dtype of its tensors, and [`standard_fp8`] as a kernel does over quantised inputs. Their distance from the
//! oracle bounds the error allowed for a kernel of that dtype.

mod quantized;
mod standard;

use flash_attention_kernels::mask::Mask;
pub use quantized::{Codes, dequantized, standard_fp8};
pub use standard::{standard, standard_backward, standard_backward_with_tables};

use crate::options::Attention;
use crate::program::{Derivative, Evaluator, Pair, Value};

/// Sizes and options of a problem whose tensors are contiguous slices.
///
/// q is `[batch, heads_q, seqlen_q, head_dim]`, k `[batch, heads_kv, seqlen_k, head_dim]`, v `[batch, heads_kv, seqlen_k,
/// head_dim_v]`, out `[batch, heads_q, seqlen_q, head_dim_v]`, lse `[batch, heads_q, seqlen_q]`.
#[derive(Clone, Debug)]
pub struct Dims {
    /// Number of independent sequences.
    pub batch: usize,
    /// Number of query heads.
    pub heads_q: usize,
    /// Number of key/value heads; divides `heads_q`.
    pub heads_kv: usize,
    /// Length of the query sequence.
    pub seqlen_q: usize,
    /// Length of the key sequence.
    pub seqlen_k: usize,
    /// Elements of a head of q and k (head_dim).
    pub head_dim: usize,
    /// Elements of a head of v and out.
    pub head_dim_v: usize,
    /// True for a causal mask: query i sees only the keys up to `i + seqlen_k - seqlen_q`.
    pub causal: bool,
    /// Factor of the scores before the softmax.
    pub softmax_scale: f32,
    /// Score program: changes scores after that, and hides pairs beside the causal mask.
    pub program: Option<Evaluator>,
}

impl Dims {
    /// Collects the sizes of q and k, given by their shapes, and the options of a call. v has the shape of k.
    ///
    /// # Panics
    /// If the attention's score program is invalid or reads tables; use [`with_program`](Self::with_program) for
    /// tables.
    pub fn new(attention: &Attention, q: [usize; 4], k: [usize; 4]) -> Self {
        let program = attention.program().expect("a program that is not refused");
        let evaluator = program.map(|program| Evaluator::new(program.clone(), Vec::new(), None));
        Self::with_program(attention, q, k, evaluator)
    }

    /// Collects the sizes of q and k, given by their shapes, and the options of a call, with the contents of its
    /// program's tables.
    pub fn with_program(attention: &Attention, q: [usize; 4], k: [usize; 4], program: Option<Evaluator>) -> Self {
        let ([batch, heads_q, seqlen_q, head_dim], [_, heads_kv, seqlen_k, _]) = (q, k);
        let (causal, softmax_scale) = (attention.is_causal(), attention.scale_for(head_dim));
        Self {
            batch,
            heads_q,
            heads_kv,
            seqlen_q,
            seqlen_k,
            head_dim,
            head_dim_v: head_dim,
            causal,
            softmax_scale,
            program,
        }
    }

    /// Returns these sizes with another head_dim of v and out.
    #[must_use]
    pub fn with_head_dim_v(self, head_dim_v: usize) -> Self {
        Self { head_dim_v, ..self }
    }

    /// Returns the number of keys that a query sees without a program, from the first key.
    fn visible(&self, row: usize) -> usize {
        let (seqlen_q, seqlen_k, row) = (self.seqlen_q as u32, self.seqlen_k as u32, row as u32);
        let end = if self.causal {
            Mask::<true>::new(seqlen_q, seqlen_k).keys_of(row).end
        } else {
            Mask::<false>::new(seqlen_q, seqlen_k).keys_of(row).end
        };
        end as usize
    }

    /// Iterates over the queries in order, each with its row in q, the keys it sees and their values.
    fn queries<'a, T>(&'a self, q: &'a [T], k: &'a [T], v: &'a [T]) -> impl Iterator<Item = Query<'a, T>> {
        let rows = self.batch * self.heads_q * self.seqlen_q;
        let row_of = |tensor: &'a [T], width: usize, row: usize| &tensor[row * width..][..width];
        (0..rows).map(move |row| {
            let (heads, position) = (row / self.seqlen_q, row % self.seqlen_q);
            let (batch, head) = (heads / self.heads_q, heads % self.heads_q);
            let kv_head = head / (self.heads_q / self.heads_kv);
            let first = (batch * self.heads_kv + kv_head) * self.seqlen_k;
            let pair = |key: usize| Pair {
                batch: batch as i32,
                head: head as i32,
                kv_head: kv_head as i32,
                query: position as i32,
                key: key as i32,
                seqlen_q: self.seqlen_q as i32,
                seqlen_k: self.seqlen_k as i32,
            };
            let sees = |pair: &Pair| self.program.as_ref().is_none_or(|program| program.sees(pair));
            let pairs: Vec<Pair> = (0..self.visible(position)).map(pair).filter(sees).collect();
            let row_of_pair = |tensor, width, pair: &Pair| row_of(tensor, width, first + pair.key as usize);
            Query {
                row,
                heads,
                first_key: first,
                sink: self.program.as_ref().and_then(|program| program.sink(head)),
                q: row_of(q, self.head_dim, row),
                keys: pairs.iter().map(|pair| row_of_pair(k, self.head_dim, pair)).collect(),
                values: pairs.iter().map(|pair| row_of_pair(v, self.head_dim_v, pair)).collect(),
                kept: pairs.iter().map(|pair| self.kept(pair)).collect(),
                pairs,
            }
        })
    }

    fn has_sinks(&self) -> bool {
        (self.program.as_ref()).is_some_and(|program| program.program().sinks().is_some())
    }

    /// Factor of a pair's weight after normalisation: 1 without dropout, else 0 or `1 / (1 - p)`.
    fn kept(&self, pair: &Pair) -> f64 {
        let dropout = self.program.as_ref().and_then(|program| program.program().dropout());
        dropout.map_or(1.0, |dropout| {
            let [batch, head, query, key] = [pair.batch, pair.head, pair.query, pair.key].map(|x| x as u32);
            match dropout.keeps(batch, head, query, key) {
                true => 1.0 / (1.0 - f64::from(dropout.probability)),
                false => 0.0,
            }
        })
    }

    /// Computes the score that the softmax takes from a scaled one; each intermediate number passes through `round`.
    fn score(&self, pair: &Pair, score: f64, round: impl Fn(f64) -> f64) -> f64 {
        match &self.program {
            Some(program) => program.score(pair, score, round),
            None => score,
        }
    }
}

/// One query and what it sees.
struct Query<'a, T> {
    /// Row in q, out and their gradients, all heads counted.
    row: usize,
    /// Head, all batches counted.
    heads: usize,
    /// The row of its head's first key in k, v and their gradients, all heads counted.
    first_key: usize,
    /// Logit of the head without a value.
    sink: Option<f64>,
    q: &'a [T],
    /// The pairs that it is in, with the keys and values of each.
    pairs: Vec<Pair>,
    /// Factor of the weight of each pair under dropout.
    kept: Vec<f64>,
    keys: Vec<&'a [T]>,
    values: Vec<&'a [T]>,
}

/// Softmax of a query's scores.
struct Softmax {
    /// One probability per pair. With a sink they do not sum to 1.
    probabilities: Vec<f64>,
    /// Logarithm of the sum of exponentials, including that of the sink.
    lse: f64,
}

impl Softmax {
    /// Computes the softmax. With `is_program`, a row whose scores are all minus infinity counts as masked and sees
    /// no key.
    fn new(scores: &[f64], sink: Option<f64>, is_program: bool) -> Self {
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        if scores.is_empty() || (is_program && max == f64::NEG_INFINITY && !scores.iter().any(|x| x.is_nan())) {
            return Self {
                probabilities: vec![0.0; scores.len()],
                lse: sink.unwrap_or(f64::NEG_INFINITY),
            };
        }
        let of_sink = sink.map_or(0.0, |sink| (sink - max).exp());
        let sum = of_sink + scores.iter().map(|score| (score - max).exp()).sum::<f64>();
        Self {
            probabilities: scores.iter().map(|score| (score - max).exp() / sum).collect(),
            lse: log_sum_exp(scores.iter().copied().chain(sink), max, sum),
        }
    }
}

/// Computes attention in f64: `(out, lse)`.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn forward(dims: &Dims, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in dims.queries(q, k, v) {
        let softmax = Softmax::new(&scores(dims, &query).1, query.sink, dims.program.is_some());
        let weights = softmax.probabilities.iter().zip(&query.kept).map(|(p, kept)| p * kept);
        let weights: Vec<f64> = weights.collect();
        out.extend((0..dims.head_dim_v).map(|d| {
            weights
                .iter()
                .zip(&query.values)
                .map(|(weight, value)| weight * value[d])
                .sum::<f64>()
        }));
        lse.push(softmax.lse);
    }
    (out, lse)
}

/// Computes the scores of a query in f64: scaled, and as the softmax takes them.
fn scores(dims: &Dims, query: &Query<'_, f64>) -> (Vec<f64>, Vec<f64>) {
    let scale = f64::from(dims.softmax_scale);
    let dot = |key: &&[f64]| query.q.iter().zip(*key).map(|(x, y)| x * y).sum::<f64>();
    let scaled: Vec<f64> = query.keys.iter().map(|key| scale * dot(key)).collect();
    let pairs = query.pairs.iter().zip(&scaled);
    let taken = pairs.map(|(pair, &score)| dims.score(pair, score, |x| x)).collect();
    (scaled, taken)
}

/// Computes the gradients of attention in f64, `[dq, dk, dv]`, for the gradient `dout` of its output. dk and dv are
/// summed over the query heads that share a key head. A query that sees no key has zero gradient and adds none.
///
/// # Panics
/// If a slice is shorter than its shape, or the program has no derivative.
pub fn backward(dims: &Dims, q: &[f64], k: &[f64], v: &[f64], dout: &[f64]) -> [Vec<f64>; 3] {
    let AllGradients { dq, dk, dv, .. } = backward_with_tables(dims, q, k, v, dout, false);
    [dq, dk, dv]
}

/// All gradients of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AllGradients<T> {
    /// Gradient of q.
    pub dq: Vec<T>,
    /// Gradient of k.
    pub dk: Vec<T>,
    /// Gradient of v.
    pub dv: Vec<T>,
    /// Gradient of each table of the program, with the shape of the table; zeros for tables of integers.
    pub tables: Vec<Vec<f64>>,
    /// Number of pairs that each element of `tables` is a sum over. The error of a sum in f32 grows with it.
    pub table_terms: Vec<Vec<usize>>,
    /// Gradient of the sinks, `[heads_q]`, if there are any.
    pub sinks: Option<Vec<f64>>,
}

/// Computes [`backward`], with the gradients of sinks and, if they are asked for, of the program's tables.
///
/// # Panics
/// If a slice is shorter than its shape, or the program has no derivative.
pub fn backward_with_tables(
    dims: &Dims,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    of_tables: bool,
) -> AllGradients<f64> {
    gradients(dims, [q, k, v], None, dout, of_tables)
}

/// [`backward_with_tables`] from an output that was rounded: delta is the sum of `dout * out` over it, as everyone has it who
/// keeps no weights. What a backward pass is given, and so may be judged by.
///
/// # Panics
/// If a slice is shorter than its shape, or the program has no derivative.
pub fn backward_from(
    dims: &Dims,
    [q, k, v]: [&[f64]; 3],
    out: &[f64],
    dout: &[f64],
    of_tables: bool,
) -> AllGradients<f64> {
    gradients(dims, [q, k, v], Some(out), dout, of_tables)
}

fn gradients(
    dims: &Dims,
    [q, k, v]: [&[f64]; 3],
    out: Option<&[f64]>,
    dout: &[f64],
    of_tables: bool,
) -> AllGradients<f64> {
    let (scale, head_dim, head_dim_v) = (f64::from(dims.softmax_scale), dims.head_dim, dims.head_dim_v);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|tensor| vec![0.0; tensor.len()]);
    let mut slopes = Slopes::new(dims, of_tables);
    let mut dsinks = vec![0.0; dims.heads_q];
    for query in dims.queries(q, k, v) {
        let dout = &dout[query.row * head_dim_v..][..head_dim_v];
        let (scaled, taken) = scores(dims, &query);
        let Softmax { probabilities: p, lse } = Softmax::new(&taken, query.sink, dims.program.is_some());
        let of_pairs = query.values.iter().zip(&query.kept);
        let dp: Vec<f64> = of_pairs.map(|(value, kept)| kept * dot(dout, value)).collect();
        let delta = match out {
            Some(out) => dot(dout, &out[query.row * head_dim_v..][..head_dim_v]),
            None => dot(&p, &dp),
        };
        if let Some(sink) = query.sink {
            dsinks[query.heads % dims.heads_q] -= (sink - lse).exp() * delta;
        }
        let dq = &mut dq[query.row * head_dim..][..head_dim];
        for (j, (key, pair)) in query.keys.iter().zip(&query.pairs).enumerate() {
            let row = query.first_key + pair.key as usize;
            let (of_key, of_value) = (row * head_dim, row * head_dim_v);
            let ds = slopes.pull_back(pair, scaled[j], p[j] * (dp[j] - delta));
            for d in 0..head_dim {
                dq[d] += scale * ds * key[d];
                dk[of_key + d] += scale * ds * query.q[d];
            }
            for d in 0..head_dim_v {
                dv[of_value + d] += query.kept[j] * p[j] * dout[d];
            }
        }
    }
    AllGradients {
        dq,
        dk,
        dv,
        tables: slopes.tables,
        table_terms: slopes.terms,
        sinks: dims.has_sinks().then_some(dsinks),
    }
}

/// Propagates gradients of the softmax's scores back to the incoming scores and to tables.
struct Slopes<'a> {
    program: Option<(&'a Evaluator, Derivative)>,
    needed: Vec<bool>,
    tables: Vec<Vec<f64>>,
    /// Number of terms of each element of `tables`.
    terms: Vec<Vec<usize>>,
}

impl<'a> Slopes<'a> {
    fn new(dims: &'a Dims, of_tables: bool) -> Self {
        let Some(evaluator) = &dims.program else {
            return Self {
                program: None,
                needed: Vec::new(),
                tables: Vec::new(),
                terms: Vec::new(),
            };
        };
        let derivative = evaluator.program().derivative(of_tables).expect("a derivative");
        let of_loads = derivative.loads().iter().flat_map(|load| [load.load, load.derivative]);
        let sizes = || evaluator.tables().iter().map(|table| table.values.len());
        Self {
            needed: derivative.expression().needed(of_loads.chain([derivative.score()])),
            tables: sizes().map(|len| vec![0.0; len]).collect(),
            terms: sizes().map(|len| vec![0; len]).collect(),
            program: Some((evaluator, derivative)),
        }
    }

    /// Returns the gradient of a scaled score from that of the program's result, and adds to the gradients of tables.
    fn pull_back(&mut self, pair: &Pair, score: f64, dy: f64) -> f64 {
        let Some((evaluator, derivative)) = &self.program else {
            return dy;
        };
        let values = evaluator.run(derivative.expression(), &self.needed, pair, score, |x| x);
        for load in derivative.loads() {
            let (table, element) = evaluator.element(derivative.expression().node(load.load), &values);
            self.tables[table][element] += times(dy, values[load.derivative.index()]);
            self.terms[table][element] += 1;
        }
        times(dy, values[derivative.score().index()])
    }
}

/// Multiplies a gradient by a derivative. The product is 0 if the gradient is 0, as for a pair with score minus
/// infinity.
fn times(dy: f64, slope: Value) -> f64 {
    if dy == 0.0 { 0.0 } else { dy * slope.score() }
}

/// Computes the logarithm of the sum of exponentials from `sum`, which is relative to the largest score. If every
/// score is minus infinity, the difference to it is NaN, and the result comes from the sum 0.
fn log_sum_exp(scores: impl IntoIterator<Item = f64>, max: f64, sum: f64) -> f64 {
    let nothing = scores.into_iter().all(|score| score == f64::NEG_INFINITY);
    if nothing { f64::NEG_INFINITY } else { max + sum.ln() }
}
