//! Modules in burn's style.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use flash_attention::Attention;

use crate::attention::{Error, attention};

/// Attention as a module: an [`Attention`] with all of the library's options, for burn's tensors. It has no parameters, and a record
/// that is loaded leaves its options as they are.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use flash_attention_burn::{Attention, FlashAttention};
///
/// let device = Device::flex();
/// let layer = FlashAttention::new(Attention::new().causal()); // scaled by 1 / sqrt(head_dim)
/// let x = Tensor::<4>::random([2, 8, 100, 64], Distribution::Default, &device); // batch, heads, seqlen, head_dim
/// let out = layer.forward(x.clone(), x.clone(), x)?;
/// assert_eq!(out.dims(), [2, 8, 100, 64]);
/// # Ok::<(), flash_attention_burn::Error>(())
/// ```
#[derive(Module, Debug, Default, PartialEq)]
pub struct FlashAttention {
    #[module(skip)]
    attention: Attention,
}

impl FlashAttention {
    /// A module that attends as `attention` says.
    pub fn new(attention: Attention) -> Self {
        Self { attention }
    }

    /// [`attention`](attention()) with the module's options.
    ///
    /// # Errors
    /// The errors of [`attention`](attention()).
    pub fn forward(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Result<Tensor<4>, Error> {
        attention(q, k, v, &self.attention)
    }
}

/// Sizes and mask of a [`FlashMultiHeadAttention`].
#[derive(Config, Debug)]
pub struct FlashMultiHeadAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Query heads; head_dim is `d_model / n_heads`, a multiple of 8 up to 256.
    pub n_heads: usize,
    /// Key and value heads, a divisor of `n_heads`. Default: `n_heads`
    pub n_kv_heads: Option<usize>,
    /// True if a token sees itself and those before it only. Default: false
    #[config(default = false)]
    pub causal: bool,
}

/// Multi-head attention as burn's own `MultiHeadAttention` has it, without dropout and without weights in memory, and with fewer
/// key and value heads where asked for.
///
/// Should be created with [`FlashMultiHeadAttentionConfig`].
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use flash_attention_burn::FlashMultiHeadAttentionConfig;
///
/// let device = Device::flex().autodiff();
/// let layer = FlashMultiHeadAttentionConfig::new(128, 4).with_causal(true).init(&device);
/// let x = Tensor::<3>::random([2, 100, 128], Distribution::Default, &device); // batch, seqlen, d_model
/// let out = layer.forward(x.clone(), x.clone(), x)?;
/// let gradients = out.sum().backward();
/// assert!(layer.query.weight.val().grad(&gradients).is_some());
/// # Ok::<(), flash_attention_burn::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct FlashMultiHeadAttention {
    /// Projection of the queries, `d_model` to `n_heads * head_dim`.
    pub query: Linear,
    /// Projection of the keys, `d_model` to `n_kv_heads * head_dim`.
    pub key: Linear,
    /// Projection of the values, `d_model` to `n_kv_heads * head_dim`.
    pub value: Linear,
    /// Projection of the heads' outputs, `n_heads * head_dim` to `d_model`.
    pub output: Linear,
    /// Elements of a head.
    pub head_dim: usize,
    /// True if a token sees itself and those before it only.
    pub causal: bool,
}

impl FlashMultiHeadAttentionConfig {
    /// A module with burn's initial weights.
    ///
    /// # Panics
    /// `n_heads` is no divisor of `d_model`.
    pub fn init(&self, device: &Device) -> FlashMultiHeadAttention {
        assert!(
            self.d_model.is_multiple_of(self.n_heads),
            "n_heads is {}, no divisor of d_model, {}",
            self.n_heads,
            self.d_model
        );
        let head_dim = self.d_model / self.n_heads;
        let of_kv = LinearConfig::new(self.d_model, head_dim * self.n_kv_heads.unwrap_or(self.n_heads));
        let square = LinearConfig::new(self.d_model, self.d_model);
        FlashMultiHeadAttention {
            query: square.init(device),
            key: of_kv.init(device),
            value: of_kv.init(device),
            output: square.init(device),
            head_dim,
            causal: self.causal,
        }
    }
}

impl FlashMultiHeadAttention {
    /// Attention of `query`, `[batch, seqlen_q, d_model]`, over `key` and `value`, `[batch, seqlen_k, d_model]`.
    ///
    /// # Errors
    /// The errors of [`attention`](crate::attention()).
    pub fn forward(&self, query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Result<Tensor<3>, Error> {
        let [batch, seqlen_q, d_model] = query.dims();
        let by_head = |x: Tensor<3>| {
            let [batch, seqlen, width] = x.dims();
            x.reshape([batch, seqlen, width / self.head_dim, self.head_dim])
                .swap_dims(1, 2)
        };
        let options = match self.causal {
            true => Attention::new().causal(),
            false => Attention::new(),
        };
        let out = attention(
            by_head(self.query.forward(query)),
            by_head(self.key.forward(key)),
            by_head(self.value.forward(value)),
            &options,
        )?;
        Ok(self
            .output
            .forward(out.swap_dims(1, 2).reshape([batch, seqlen_q, d_model])))
    }
}
