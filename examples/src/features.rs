//! Options of the quickstart that name features of scores and masks, and the tensors of the file that they take.

use clap::Args;
use flash_attention::program::{BlockMask, Dropout};
use flash_attention::{Attention, Device, Tensor};

use crate::{AttentionFile, Failure};

/// Largest mask of kept weights that is written, in bytes.
const KEEP_BYTES: usize = 64 << 20;

/// Features of scores and masks; all combine freely.
#[derive(Clone, Debug, Default, Args)]
pub struct Features {
    /// Let each query see only the keys up to its own position
    #[arg(long)]
    pub causal: bool,
    /// Let each query see so many keys to its left and right; `-` is no limit
    #[arg(long, value_name = "LEFT,RIGHT", value_parser = window, allow_hyphen_values = true)]
    window: Option<Window>,
    /// Bound scores: C * tanh(score / C)
    #[arg(long, value_name = "C")]
    softcap: Option<f32>,
    /// Subtract slope * distance from scores; the file has `alibi_slopes`, [heads] or [batch, heads]
    #[arg(long)]
    alibi: bool,
    /// Add `bias` of the file to scores, [batch, heads, seqlen_q, seqlen_k], each of them or 1
    #[arg(long)]
    bias: bool,
    /// Let the logits `sinks` of the file, [heads], take part in the softmax
    #[arg(long)]
    sinks: bool,
    /// Hide keys of other documents; the file has `documents_q` and `documents_k`, i32 [batch or 1, seqlen]
    #[arg(long)]
    documents: bool,
    /// Let all queries see the first N keys, and of the others causally
    #[arg(long, value_name = "N")]
    prefix: Option<usize>,
    /// Let each query see causally within its chunk of N positions
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// Drop weights with probability P
    #[arg(long, value_name = "P")]
    dropout: Option<f32>,
    /// Seed of dropout
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Hide tiles of M x N pairs; the file has `block_mask`, u8 [batch or 1, heads or 1, tiles, tiles], 1 = visible
    #[arg(long, value_name = "M,N", value_parser = tile)]
    block_mask: Option<[usize; 2]>,
}

/// Keys that a query sees to its left and right; `None` is no limit.
type Window = (Option<usize>, Option<usize>);

fn window(text: &str) -> Result<Window, String> {
    let side = |text: &str| match text {
        "-" => Ok(None),
        number => number.parse().map(Some),
    };
    let sides = text.split_once(',').map(|(left, right)| (side(left), side(right)));
    match sides {
        Some((Ok(left), Ok(right))) => Ok((left, right)),
        _ => Err("expected two numbers of keys, as 256,0; `-` is no limit".to_owned()),
    }
}

fn tile(text: &str) -> Result<[usize; 2], String> {
    let sizes = text.split_once(',').map(|(m, n)| (m.parse(), n.parse()));
    match sizes {
        Some((Ok(m), Ok(n))) if m > 0 && n > 0 => Ok([m, n]),
        _ => Err("expected queries and keys of a tile, as 64,64".to_owned()),
    }
}

impl Features {
    /// Returns true if attention is full, as the stored answers are.
    pub fn is_empty(&self) -> bool {
        let masks = [
            self.causal,
            self.documents,
            self.window.is_some(),
            self.prefix.is_some(),
        ];
        let more = [self.chunk.is_some(), self.block_mask.is_some(), self.dropout.is_some()];
        let scores = [self.alibi, self.bias, self.sinks, self.softcap.is_some()];
        masks.into_iter().chain(more).chain(scores).all(|asked| !asked)
    }

    /// Returns an attention with these features, their tensors taken from the file.
    ///
    /// # Errors
    /// A sentence if the file lacks a tensor, or has one of another type, or the device fails.
    pub fn add_to(&self, attention: Attention, file: &AttentionFile, device: &Device) -> Result<Attention, Failure> {
        let mut attention = attention;
        if self.causal {
            attention = attention.causal();
        }
        if let Some((left, right)) = self.window {
            attention = attention.window(left, right);
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if self.alibi {
            attention = attention.alibi(&file.floats("alibi_slopes", "--alibi")?.upload(device)?);
        }
        if self.bias {
            attention = attention.bias(&file.floats("bias", "--bias")?.upload::<f32>(device)?);
        }
        if self.sinks {
            attention = attention.sinks(&file.floats("sinks", "--sinks")?.upload(device)?);
        }
        if self.documents {
            let ids = |name| -> Result<Tensor<i32>, Failure> {
                let (shape, ids) = file.integers(name, "--documents")?;
                Ok(Tensor::from_slice(device, shape, &ids)?)
            };
            attention = attention.documents(&ids("documents_q")?, &ids("documents_k")?);
        }
        if let Some(n) = self.prefix {
            attention = attention.prefix(n);
        }
        if let Some(n) = self.chunk {
            attention = attention.chunked(n);
        }
        if let Some(p) = self.dropout {
            attention = attention.dropout(p, self.seed);
        }
        if let Some(block) = self.block_mask {
            attention = attention.block_mask(&block_mask(file, block)?, device)?;
        }
        Ok(attention.table_gradients())
    }

    /// Returns the keep mask of dropout, u8 `[batch, heads, seqlen_q, seqlen_k]`, with its shape, if there is dropout and
    /// the mask is under 64 MiB.
    pub fn keep(&self, file: &AttentionFile) -> Option<([usize; 4], Vec<u8>)> {
        let probability = self.dropout.filter(|&p| p > 0.0)?;
        let (q, k) = (&file.q.shape, &file.k.shape);
        let shape = [q[0], q[1], q[2], k[2]];
        let dropout = Dropout {
            probability,
            seed: self.seed,
        };
        (shape.iter().product::<usize>() < KEEP_BYTES).then(|| (shape, dropout.keep_mask(shape)))
    }
}

/// Returns the block mask that a file holds.
fn block_mask(file: &AttentionFile, block: [usize; 2]) -> Result<BlockMask, Failure> {
    let (shape, visible) = file.flags("block_mask", "--block-mask")?;
    let ([q, k], [m, n]) = ([&file.q.shape, &file.k.shape], block);
    let seqlen = match (&q[..], &k[..]) {
        (&[_, _, seqlen_q, _], &[_, _, seqlen_k, _]) => [seqlen_q, seqlen_k],
        _ => return Err(Failure("q and k need four axes".to_owned())),
    };
    let expected = [seqlen[0].div_ceil(m), seqlen[1].div_ceil(n)];
    match shape[..] {
        [batch, heads, rows, columns] if [rows, columns] == expected => {
            Ok(BlockMask::from_dense([batch, heads], seqlen, block, &visible)?)
        }
        _ => Err(Failure(format!(
            "`block_mask` has shape {shape:?}, expected [batch or 1, heads or 1, {}, {}]",
            expected[0], expected[1]
        ))),
    }
}
