//! Causal self-attention as the model uses it, on packed queries, keys and values with one row per token.

use flash_attention::{Attention, Device, Error, Output, Tensor};
use ndarray::parallel::prelude::*;
use ndarray::{Array2, Array4, Array5, Axis, s};

/// Partition of rows of activations into sequences and heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seqlen: usize,
    /// Number of heads.
    pub heads: usize,
    /// Elements of a head per token (head_dim).
    pub head_dim: usize,
}

impl Heads {
    /// Returns the elements of all heads per token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the columns of one head within the queries (`part` 0), keys (1) or values (2) of packed rows.
    fn columns(&self, part: usize, head: usize) -> std::ops::Range<usize> {
        let first = part * self.width() + head * self.head_dim;
        first..first + self.head_dim
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }
}

/// Causal self-attention, forward and backward.
///
/// `qkv` is `[batch * seqlen, 3 * heads * head_dim]`: each token's row has its queries, then its keys, then its
/// values.
pub trait Attend {
    /// Values that forward saves for backward.
    type Saved;

    /// Returns the output, `[batch * seqlen, heads * head_dim]`, and the values saved for backward.
    ///
    /// # Errors
    /// The errors of the library, where it computes the attention.
    fn forward(&self, heads: Heads, qkv: Array2<f32>) -> Result<(Array2<f32>, Self::Saved), Error>;

    /// Returns the gradient of qkv, packed like qkv, from the gradient of the output.
    ///
    /// # Errors
    /// The errors of the library, where it computes the attention.
    fn backward(&self, heads: Heads, saved: &Self::Saved, dout: &Array2<f32>) -> Result<Array2<f32>, Error>;
}

/// Standard attention: all scores of a head form a matrix, which is saved for backward.
#[derive(Clone, Copy, Debug)]
pub struct PlainAttention;

/// Values that [`PlainAttention`] saves: seqlen x seqlen elements per head.
#[derive(Debug)]
pub struct PlainSaved {
    qkv: Array2<f32>,
    /// Softmax of each head of each sequence.
    probabilities: Vec<Vec<Array2<f32>>>,
}

impl Attend for PlainAttention {
    type Saved = PlainSaved;

    fn forward(&self, heads: Heads, qkv: Array2<f32>) -> Result<(Array2<f32>, PlainSaved), Error> {
        let mut out = Array2::zeros((qkv.nrows(), heads.width()));
        let probabilities = out
            .axis_chunks_iter_mut(Axis(0), heads.seqlen)
            .into_par_iter()
            .zip(qkv.axis_chunks_iter(Axis(0), heads.seqlen))
            .map(|(mut out, qkv)| {
                let head = |head| {
                    let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(s![.., heads.columns(part, head)]));
                    let probabilities = causal_softmax(q.dot(&k.t()) * heads.scale());
                    out.slice_mut(s![.., heads.columns(0, head)])
                        .assign(&probabilities.dot(&v));
                    probabilities
                };
                (0..heads.heads).map(head).collect()
            })
            .collect();
        Ok((out, PlainSaved { qkv, probabilities }))
    }

    fn backward(&self, heads: Heads, saved: &PlainSaved, dout: &Array2<f32>) -> Result<Array2<f32>, Error> {
        let mut dqkv = Array2::zeros(saved.qkv.raw_dim());
        dqkv.axis_chunks_iter_mut(Axis(0), heads.seqlen)
            .into_par_iter()
            .zip(saved.qkv.axis_chunks_iter(Axis(0), heads.seqlen))
            .zip(dout.axis_chunks_iter(Axis(0), heads.seqlen))
            .zip(&saved.probabilities)
            .for_each(|(((mut dqkv, qkv), dout), probabilities)| {
                for (head, p) in probabilities.iter().enumerate() {
                    let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(s![.., heads.columns(part, head)]));
                    let dout = dout.slice(s![.., heads.columns(0, head)]);
                    let dscores = softmax_backward(p, dout.dot(&v.t())) * heads.scale();
                    let gradients = [dscores.dot(&k), dscores.t().dot(&q), p.t().dot(&dout)];
                    for (part, gradient) in gradients.iter().enumerate() {
                        dqkv.slice_mut(s![.., heads.columns(part, head)]).assign(gradient);
                    }
                }
            });
        Ok(dqkv)
    }
}

/// Computes the softmax of each row up to the diagonal; elements right of it are 0.
fn causal_softmax(mut scores: Array2<f32>) -> Array2<f32> {
    for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
        let (mut seen, mut unseen) = row.view_mut().split_at(Axis(0), i + 1);
        unseen.fill(0.0);
        let row_max = seen.fold(f32::NEG_INFINITY, |max, &score| max.max(score));
        seen.mapv_inplace(|score| (score - row_max).exp());
        let row_sum = seen.sum();
        seen /= row_sum;
    }
    scores
}

/// Computes the gradient of the scores from that of their softmax `p`. It is 0 where p is 0.
fn softmax_backward(p: &Array2<f32>, dp: Array2<f32>) -> Array2<f32> {
    let row_sums = (p * &dp).sum_axis(Axis(1)).insert_axis(Axis(1));
    (dp - row_sums) * p
}

/// Attention of this library, in forward and backward. Its saved memory grows with the sequence, not with its square.
#[derive(Clone, Debug)]
pub struct FlashAttention {
    attention: Attention,
    device: Device,
}

/// Values that [`FlashAttention`] saves.
#[derive(Debug)]
pub struct FlashSaved {
    /// Packed input, `[batch, seqlen, 3, heads, head_dim]`.
    qkv: Tensor<f32>,
    output: Output<f32>,
}

impl FlashAttention {
    /// Makes attention that runs on this device.
    pub fn new(device: Device) -> Self {
        Self {
            attention: Attention::new().causal(),
            device,
        }
    }
}

impl Attend for FlashAttention {
    type Saved = FlashSaved;

    fn forward(&self, heads: Heads, qkv: Array2<f32>) -> Result<(Array2<f32>, FlashSaved), Error> {
        let qkv = upload(&self.device, heads, 3, &qkv)?;
        let [q, k, v] = queries_keys_values(&qkv)?;
        let output = self.attention.forward(&q, &k, &v)?;
        let out = download(heads, &[&output.out])?;
        Ok((out, FlashSaved { qkv, output }))
    }

    fn backward(&self, heads: Heads, saved: &FlashSaved, dout: &Array2<f32>) -> Result<Array2<f32>, Error> {
        let [q, k, v] = queries_keys_values(&saved.qkv)?;
        let dout = upload(&self.device, heads, 1, dout)?.select(2, 0)?.transpose(1, 2)?;
        let gradients = self.attention.backward(&q, &k, &v, &saved.output, &dout)?;
        download(heads, &[&gradients.dq, &gradients.dk, &gradients.dv])
    }
}

/// Copies rows to the device, as `[batch, seqlen, parts, heads, head_dim]`.
fn upload(device: &Device, heads: Heads, parts: usize, rows: &Array2<f32>) -> Result<Tensor<f32>, Error> {
    let shape = [heads.batch, heads.seqlen, parts, heads.heads, heads.head_dim];
    let rows = rows.as_standard_layout();
    Tensor::from_slice(device, shape, rows.as_slice().expect("the standard layout has no gaps"))
}

/// Returns views of the three parts as attention takes them, `[batch, heads, seqlen, head_dim]`; nothing is copied.
fn queries_keys_values(qkv: &Tensor<f32>) -> Result<[Tensor<f32>; 3], Error> {
    let part = |part| qkv.select(2, part)?.transpose(1, 2);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// Packs tensors `[batch, heads, seqlen, head_dim]` side by side into rows, the inverse of [`upload`].
fn download(heads: Heads, parts: &[&Tensor<f32>]) -> Result<Array2<f32>, Error> {
    let Heads { batch, seqlen, .. } = heads;
    let mut packed = Array5::zeros((batch, seqlen, parts.len(), heads.heads, heads.head_dim));
    for (part, tensor) in parts.iter().enumerate() {
        let heads_first = Array4::from_shape_vec((batch, heads.heads, seqlen, heads.head_dim), tensor.to_vec()?)
            .expect("the tensor has the shape of q");
        packed
            .slice_mut(s![.., .., part, .., ..])
            .assign(&heads_first.permuted_axes([0, 2, 1, 3]));
    }
    let rows = (batch * seqlen, parts.len() * heads.width());
    Ok(packed.into_shape_with_order(rows).expect("as many elements, in order"))
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{check, matrix, random, weighted_sum};
    use super::*;
    use flash_attention::Arch;

    const HEADS: Heads = Heads {
        batch: 2,
        seqlen: 5,
        heads: 3,
        head_dim: 8,
    };

    fn gradient_matches_finite_differences(attend: &impl Attend) {
        let (qkv, weights) = (random(1, 10, 72), random(2, 10, 24));
        let forward = |qkv: &Array2<f32>| attend.forward(HEADS, qkv.clone()).expect("a sane problem");
        let mut dqkv = attend
            .backward(HEADS, &forward(&qkv).1, &weights)
            .expect("a sane problem");
        check(qkv, matrix, &mut dqkv, |qkv| weighted_sum(&forward(qkv).0, &weights));
    }

    #[test]
    fn gradient_of_plain_attention() {
        gradient_matches_finite_differences(&PlainAttention);
    }

    #[test]
    fn gradient_of_flash_attention() {
        gradient_matches_finite_differences(&FlashAttention::new(Device::cpu()));
    }

    /// Tests a problem whose sizes no tile divides.
    fn agrees_with_plain_attention(device: Device) {
        let heads = Heads {
            batch: 3,
            seqlen: 67,
            heads: 2,
            head_dim: 32,
        };
        let (qkv, dout) = (random(3, 201, 192), random(4, 201, 64));
        let plain = both_passes(&PlainAttention, heads, &qkv, &dout).expect("plain attention does not fail");
        let flash = both_passes(&FlashAttention::new(device), heads, &qkv, &dout).expect("a sane problem");
        for (plain, flash) in plain.iter().zip(&flash) {
            let error = (plain - flash).fold(0.0_f32, |max, d| max.max(d.abs()));
            assert!(error < 1e-5, "{error}");
        }
    }

    #[test]
    fn agrees_with_plain_attention_on_the_cpu() {
        agrees_with_plain_attention(Device::cpu());
    }

    #[test]
    fn agrees_with_plain_attention_on_the_emulator() {
        agrees_with_plain_attention(Device::emulator(Arch::Sm80));
    }

    fn both_passes(
        attend: &impl Attend,
        heads: Heads,
        qkv: &Array2<f32>,
        dout: &Array2<f32>,
    ) -> Result<[Array2<f32>; 2], Error> {
        let (out, saved) = attend.forward(heads, qkv.clone())?;
        Ok([out, attend.backward(heads, &saved, dout)?])
    }
}
