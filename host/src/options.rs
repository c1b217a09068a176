//! [`Attention`]: the options of a call. The calls themselves are in `call`.

use flash_attention_kernels::entries::Arch;

/// `softmax(softmax_scale * q k^T) v`, with its options. Cheap to make and to clone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attention {
    causal: bool,
    softmax_scale: Option<f32>,
    deterministic: bool,
    arch: Option<Arch>,
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
    /// portable ones. Where a device runs none of them, a call fails with [`Error::NoKernel`](crate::Error::NoKernel); the CPU runs native code and
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

    /// Gradients that are the same bits each time, on the same device. [`Plan::backward`](crate::Plan::backward) says where the default is not, and
    /// what this costs there; forward is always reproducible.
    #[must_use]
    pub fn deterministic(self) -> Self {
        Self {
            deterministic: true,
            ..self
        }
    }

    /// The architecture whose kernels are asked for, if one is.
    pub fn forced_arch(&self) -> Option<Arch> {
        self.arch
    }

    /// True if the mask is causal.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// True if gradients must be the same bits each time.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// Factor of the scores at this head_dim.
    pub fn scale_for(&self, head_dim: usize) -> f32 {
        self.softmax_scale
            .unwrap_or_else(|| (1.0 / (head_dim as f64).sqrt()) as f32)
    }
}
