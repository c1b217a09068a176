//! [`Attention`]: the options of a call. What a call does is in `call`.

use crate::call::above;
use crate::{Arch, BackwardProblem, Element, Error, Plan, Problem, Tensor};

/// `softmax(softmax_scale * q k^T) v`, with its options. Cheap to make and to clone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attention {
    causal: bool,
    softmax_scale: Option<f32>,
    deterministic: bool,
    arch: Option<Arch>,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct Output<T: Element> {
    /// The attention output, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub out: Tensor<T>,
    /// For each query the natural logarithm of the sum of exponentials of its scaled scores, `[batch, heads_q,
    /// seqlen_q]`. A query that sees no key has minus infinity. The backward pass needs it, and it is all that is
    /// needed to merge attention over two sets of keys.
    pub lse: Tensor<f32>,
    /// lse in two numbers, without its rounding error. `None`: a backward pass has lse alone, and recomputes weights with
    /// a relative error of up to `|lse| * 2^-24`, none of them above 1.
    pub statistics: Option<Statistics>,
}

/// What lse is made of, for each query: key j weighs `exp(softmax_scale * (q.k_j - row_max)) / row_sum`.
///
/// lse is `softmax_scale * row_max + ln(row_sum)`, rounded to 24 bits, which is little where it is large.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Product q.k, before it is scaled, of the key that weighs most, contiguous `[batch, heads_q, seqlen_q]`. A query that
    /// sees no key has minus infinity.
    pub row_max: Tensor<f32>,
    /// Sum of the weights relative to that key's, contiguous `[batch, heads_q, seqlen_q]`. A query that sees no key has 0.
    pub row_sum: Tensor<f32>,
}

/// What a backward pass gives.
#[derive(Clone, Debug)]
pub struct Gradients<T: Element> {
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`. A query that sees no key has zeros.
    pub dq: Tensor<T>,
    /// Gradient of k, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dk: Tensor<T>,
    /// Gradient of v, as that of k.
    pub dv: Tensor<T>,
}

impl Attention {
    /// Full attention, scaled by `1 / sqrt(head_dim)`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Query i sees key j only if `j <= i + seqlen_k - seqlen_q`: the last query sees every key.
    #[must_use]
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    /// Uses the kernels compiled for `arch` only, instead of the fastest that the device runs: `Arch::Sm80` means the
    /// portable ones. Where a device runs none of them, a call fails with [`Error::NoKernel`]; the CPU runs native code and
    /// ignores it.
    #[must_use]
    pub fn arch(self, arch: Arch) -> Self {
        Self {
            arch: Some(arch),
            ..self
        }
    }

    /// Multiplies scores by `scale` before the softmax, instead of by `1 / sqrt(head_dim)`. Any finite number, negative
    /// and zero included.
    #[must_use]
    pub fn softmax_scale(self, scale: f32) -> Self {
        Self {
            softmax_scale: Some(scale),
            ..self
        }
    }

    /// Gradients that are the same bits each time, on the same device. [`Plan::backward`] says where the default is not, and
    /// what this costs there; forward is always reproducible.
    #[must_use]
    pub fn deterministic(self) -> Self {
        Self {
            deterministic: true,
            ..self
        }
    }

    /// The forward pass, its results in new contiguous tensors on the inputs' device.
    ///
    /// q is `[batch, heads_q, seqlen_q, head_dim]`; k and v are `[batch, heads_kv, seqlen_k, head_dim]`, and each of
    /// their heads serves `heads_q / heads_kv` query heads. All strides but the last are free. On a GPU the call
    /// returns once the work is launched; reading a result waits for it.
    ///
    /// ```compile_fail
    /// # use flash_attention::{Attention, Device, Tensor};
    /// # let device = Device::cpu();
    /// let q = Tensor::from_slice(&device, [1, 1, 1, 8], &[0.0_f32; 8])?;
    /// let k = Tensor::from_slice(&device, [1, 1, 1, 8], &[half::f16::ZERO; 8])?;
    /// Attention::new().forward(&q, &k, &k)?; // tensors of two dtypes: does not compile
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Problem::new`] and [`Plan::new`], before anything is allocated; then [`Error::OutOfMemory`] and what
    /// the device says of the launch.
    pub fn forward<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Output<T>, Error> {
        self.silent().forward(q, k, v)
    }

    /// The forward pass, its results written to the caller's tensors: `out` with any strides that do not overlap and a
    /// contiguous last axis, `lse` contiguous. Neither may share memory with an input.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward); nothing has been written then, unless the device failed.
    pub fn forward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        out: &mut Tensor<T>,
        lse: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.silent().forward_into(q, k, v, out, lse)
    }

    /// How [`forward`](Self::forward) would compute this: kernel, tiles, grid, and what it costs. Allocates nothing.
    ///
    /// # Errors
    /// Those of [`Problem::new`] and [`Plan::new`].
    pub fn plan<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Plan, Error> {
        Plan::new(
            &Problem::new(self, q.info(), k.info(), v.info(), None)?,
            &q.device().info(),
        )
    }

    /// The backward pass: gradients of q, k and v, in new contiguous tensors, from what [`forward`](Self::forward) gave
    /// and the gradient of its output. Scores are computed again from q, k and lse; beside the results it takes
    /// [`Plan::workspace_bytes`].
    ///
    /// In debug builds an lse that holds a NaN is refused, which on a GPU waits for it; in release builds it makes NaN of
    /// the gradients that it touches.
    ///
    /// # Errors
    /// Those of [`BackwardProblem::new`] and [`Plan::backward`], before anything is allocated; then
    /// [`Error::OutOfMemory`] and what the device says of the launch.
    pub fn backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Gradients<T>, Error> {
        self.silent().backward(q, k, v, output, dout)
    }

    /// The backward pass, its results written to the caller's tensors: any strides that do not overlap, a contiguous last
    /// axis, no memory shared with an input or with each other.
    ///
    /// # Errors
    /// As for [`backward`](Self::backward); nothing has been written then, unless the device failed.
    pub fn backward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), Error> {
        self.silent().backward_into(q, k, v, output, dout, gradients)
    }

    /// How [`backward`](Self::backward) would compute this. Allocates nothing.
    ///
    /// # Errors
    /// Those of [`BackwardProblem::new`] and [`Plan::backward`].
    pub fn plan_backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Plan, Error> {
        let above = above(output, dout);
        let problem = BackwardProblem::new(self, q.info(), k.info(), v.info(), above, None)?;
        Plan::backward(&problem, &q.device().info())
    }

    /// The architecture whose kernels are asked for, if one is.
    pub fn forced_arch(&self) -> Option<Arch> {
        self.arch
    }

    /// Whether the mask is causal.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// Whether gradients are to be the same bits each time.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// What scores are multiplied by at this head_dim.
    pub fn scale_for(&self, head_dim: usize) -> f32 {
        self.softmax_scale
            .unwrap_or_else(|| (1.0 / (head_dim as f64).sqrt()) as f32)
    }
}
