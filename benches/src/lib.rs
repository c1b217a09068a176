//! Shared parts of the measurements: a problem of a given shape with its FLOPs, and for GPUs the rows of the table,
//! the memory that they share, a clock of device events, and a check of the timed results.

pub mod arena;
pub mod clock;
pub mod peak;
pub mod row;
pub mod spot;

use std::time::{Duration, Instant};

use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Device, Dtype, Element, Error, Gradients, Output, Tensor};

/// Any error.
pub type Failure = Box<dyn std::error::Error>;

/// A shape to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Element type of all tensors.
    pub dtype: Dtype,
    /// True for a causal mask: query i sees the keys up to `i + seqlen_k - seqlen_q`.
    pub causal: bool,
    /// Number of independent sequences.
    pub batch: usize,
    /// Number of heads of queries and of keys.
    pub heads: usize,
    /// Length of the query sequence.
    pub seqlen_q: usize,
    /// Length of the key sequence.
    pub seqlen_k: usize,
    /// Elements of a head (head_dim).
    pub head_dim: usize,
}

impl Shape {
    /// Returns the FLOPs of a forward pass as the field counts them: 4 B H N^2 D, and half of that under a causal
    /// mask.
    pub fn forward_flops(&self) -> f64 {
        let pairs = self.batch as f64 * self.heads as f64 * self.seqlen_q as f64 * self.seqlen_k as f64;
        4.0 * pairs * self.head_dim as f64 / if self.causal { 2.0 } else { 1.0 }
    }

    /// Makes a problem of this shape on a device, with pseudo-random numbers.
    ///
    /// # Errors
    /// The error of the device if it has no room.
    pub fn problem(&self, device: &Device) -> Result<Box<dyn Problem>, Error> {
        Ok(match self.dtype {
            Dtype::F32 => Box::new(Tensors::<f32>::new(self, device)?),
            Dtype::F16 => Box::new(Tensors::<f16>::new(self, device)?),
            Dtype::Bf16 => Box::new(Tensors::<bf16>::new(self, device)?),
        })
    }
}

/// A problem that can be solved repeatedly in the same memory.
pub trait Problem: Send {
    /// Runs the forward pass.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_into`].
    fn forward(&mut self) -> Result<Duration, Error>;

    /// Runs the backward pass, after a forward pass.
    ///
    /// # Errors
    /// The errors of [`Attention::backward_into`].
    fn backward(&mut self) -> Result<Duration, Error>;
}

/// Tensors of a shape, drawn at random, the same on every run.
pub struct Tensors<T: Element> {
    /// The options of the next pass.
    pub attention: Attention,
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    dout: Tensor<T>,
    output: Output<T>,
    gradients: Gradients<T>,
}

impl<T: Element> Tensors<T> {
    /// Makes the tensors of a shape on a device.
    ///
    /// # Errors
    /// The errors of [`Tensor::from_slice`].
    pub fn new(shape: &Shape, device: &Device) -> Result<Self, Error> {
        let q = [shape.batch, shape.heads, shape.seqlen_q, shape.head_dim];
        let k = [shape.batch, shape.heads, shape.seqlen_k, shape.head_dim];
        let mut state = 1_u64;
        let mut draw = |shape: [usize; 4]| {
            let data: Vec<T> = (0..shape.iter().product())
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    T::from_f64((state >> 11) as f64 / (1_u64 << 51) as f64 - 2.0)
                })
                .collect();
            Tensor::from_slice(device, shape, &data)
        };
        let attention = if shape.causal {
            Attention::new().causal()
        } else {
            Attention::new()
        };
        Ok(Self {
            attention,
            q: draw(q)?,
            k: draw(k)?,
            v: draw(k)?,
            dout: draw(q)?,
            output: Output::new(Tensor::zeros(device, q)?, Tensor::zeros(device, &q[..3])?),
            gradients: Gradients::new(
                Tensor::zeros(device, q)?,
                Tensor::zeros(device, k)?,
                Tensor::zeros(device, k)?,
            ),
        })
    }
}

impl<T: Element> Problem for Tensors<T> {
    fn forward(&mut self) -> Result<Duration, Error> {
        let start = Instant::now();
        let Output { out, lse, .. } = &mut self.output;
        self.attention.forward_into(&self.q, &self.k, &self.v, out, lse)?;
        Ok(start.elapsed())
    }

    fn backward(&mut self) -> Result<Duration, Error> {
        let start = Instant::now();
        let Self { q, k, v, .. } = self;
        self.attention
            .backward_into(q, k, v, &self.output, &self.dout, &mut self.gradients)?;
        Ok(start.elapsed())
    }
}
