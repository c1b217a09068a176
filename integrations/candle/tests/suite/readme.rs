//! The layer that the repository's README shows, between the two lines of dashes.

use candle_core::{DType, Device, Var};
use candle_nn::{VarBuilder, VarMap, linear};

// ----
use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module};
use flash_attention_candle::{Attention, FlashAttention};

/// Causal self-attention over x, [batch, seqlen, width], with gradients.
fn attend(x: &Tensor, qkv: &Linear, out: &Linear, heads: usize) -> Result<Tensor> {
    let (batch, seqlen, width) = x.dims3()?;
    let qkv = qkv.forward(x)?.reshape((batch, seqlen, 3, heads, width / heads))?;
    let [q, k, v] = [0, 1, 2].map(|part| qkv.narrow(2, part, 1)?.squeeze(2));
    let layer = FlashAttention::new(Attention::new().causal());
    let mixed = layer.forward_seqlen_heads(&q?, &k?, &v?)?;
    out.forward(&mixed.reshape((batch, seqlen, width))?)
}
// ----

#[test]
fn readme_shows_this_layer() -> Result<()> {
    let shown = include_str!("readme.rs")
        .split("// ----\n")
        .nth(1)
        .expect("a part between dashes");
    assert!(
        include_str!("../../../../README.md").contains(shown),
        "README has another layer"
    );

    let weights = VarMap::new();
    let weights = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let (qkv, out) = (linear(64, 192, weights.pp("qkv"))?, linear(64, 64, weights.pp("out"))?);
    let x = Var::randn(0f32, 1.0, (2, 10, 64), &Device::Cpu)?;
    let y = attend(&x, &qkv, &out, 4)?;
    assert_eq!(y.dims(), x.dims());
    let gradients = y.sqr()?.mean_all()?.backward()?;
    assert!(gradients.get(&x).is_some() && gradients.get(qkv.weight()).is_some());
    Ok(())
}
