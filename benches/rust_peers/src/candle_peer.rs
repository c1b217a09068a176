//! candle: attention as tensor operations, and candle's flash attention for the CPU.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};

use crate::{Failure, Peer, Shape};

fn dtype(shape: &Shape) -> DType {
    match shape.dtype.as_str() {
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        _ => DType::F32,
    }
}

fn draw(shape: [usize; 4], dtype: DType, seed: u64) -> Result<Tensor, Failure> {
    let data = Shape::draw(shape.iter().product(), seed);
    Ok(Tensor::from_vec(data, &shape[..], &Device::Cpu)?.to_dtype(dtype)?)
}

/// Standard attention: matmul, softmax, matmul; the backward pass is candle's automatic differentiation.
pub struct Standard {
    inputs: [Var; 3],
    /// Mask: 0 where a query sees a key, else minus infinity.
    mask: Option<Tensor>,
    dout: Option<Tensor>,
    scale: f64,
}

impl Standard {
    pub fn new(s: &Shape) -> Result<Self, Failure> {
        let (q, k) = (
            [s.batch, s.heads, s.seqlen_q, s.head_dim],
            [s.batch, s.heads, s.seqlen_k, s.head_dim],
        );
        let input = |shape, seed| Ok::<_, Failure>(Var::from_tensor(&draw(shape, dtype(s), seed)?)?);
        let mask = if s.causal {
            let hidden = (0..s.seqlen_q * s.seqlen_k).map(|at| {
                let (row, column) = (at / s.seqlen_k, at % s.seqlen_k);
                if column + s.seqlen_q > row + s.seqlen_k {
                    f32::NEG_INFINITY
                } else {
                    0.0
                }
            });
            let hidden = Tensor::from_vec(hidden.collect(), (s.seqlen_q, s.seqlen_k), &Device::Cpu)?;
            Some(hidden.to_dtype(dtype(s))?)
        } else {
            None
        };
        Ok(Self {
            inputs: [input(q, 1)?, input(k, 2)?, input(k, 3)?],
            mask,
            dout: s.backward.then(|| draw(q, dtype(s), 4)).transpose()?,
            scale: 1.0 / (s.head_dim as f64).sqrt(),
        })
    }

    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let scores = (q * self.scale)?.matmul(&k.t()?)?;
        let scores = match &self.mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let probabilities = match self.dout {
            Some(_) => candle_nn::ops::softmax(&scores, 3)?, // `softmax_last_dim` has no gradient
            None => candle_nn::ops::softmax_last_dim(&scores)?,
        };
        probabilities.matmul(v)
    }
}

impl Peer for Standard {
    fn run(&mut self) -> Result<Duration, Failure> {
        let [q, k, v] = &self.inputs;
        let start = Instant::now();
        match &self.dout {
            Some(dout) => {
                let out = self.forward(q.as_tensor(), k.as_tensor(), v.as_tensor())?;
                (out * dout)?.sum_all()?.backward()?;
            }
            None => {
                self.forward(
                    &q.as_detached_tensor(),
                    &k.as_detached_tensor(),
                    &v.as_detached_tensor(),
                )?;
            }
        }
        Ok(start.elapsed())
    }
}

/// candle's `candle_nn::attention::flash_attn`, which takes `[batch, seqlen, heads, head_dim]`.
pub struct Flash {
    inputs: [Tensor; 3],
    shape: Shape,
}

impl Flash {
    pub fn new(s: &Shape) -> Result<Self, Failure> {
        if s.backward {
            return Err("no backward pass".into());
        }
        let (q, k) = (
            [s.batch, s.seqlen_q, s.heads, s.head_dim],
            [s.batch, s.seqlen_k, s.heads, s.head_dim],
        );
        let draw = |shape, seed| draw(shape, dtype(s), seed);
        Ok(Self {
            inputs: [draw(q, 1)?, draw(k, 2)?, draw(k, 3)?],
            shape: s.clone(),
        })
    }
}

impl Peer for Flash {
    fn run(&mut self) -> Result<Duration, Failure> {
        let ([q, k, v], shape) = (&self.inputs, &self.shape);
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let mask = if shape.causal {
            AttnMask::causal_with_offset(shape.seqlen_k - shape.seqlen_q)
        } else {
            AttnMask::None
        };
        let start = Instant::now();
        match dtype(shape) {
            DType::F16 => flash_attn::<half::f16>(q, k, v, scale, mask, None, None)?,
            DType::BF16 => flash_attn::<half::bf16>(q, k, v, scale, mask, None, None)?,
            _ => flash_attn::<f32>(q, k, v, scale, mask, None, None)?,
        };
        Ok(start.elapsed())
    }
}
