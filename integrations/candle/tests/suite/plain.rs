//! Plain attention in candle's own operations, differentiable, and the bound that the library's tests use: at most twice the error
//! of plain attention in the same element type, both against f64.

use candle_core::{D, DType, Device, Result, Tensor, Var};

/// What a test draws: sizes and mask.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub heads: [usize; 2], // of q, of k and v
    pub seqlens: [usize; 2],
    pub head_dim: usize,
    pub causal: bool,
}

impl Case {
    pub fn scale(&self) -> f32 {
        1.3 / (self.head_dim as f32).sqrt()
    }

    /// q, k, v and a weight for each element of out, `[batch, seqlen, heads, head_dim]` of this dtype.
    pub fn draw(&self, dtype: DType) -> Result<[Tensor; 4]> {
        let [seqlen_q, seqlen_k] = self.seqlens;
        let [heads_q, heads_kv] = self.heads;
        let tensor = |seqlen, heads| {
            Tensor::randn(0f32, 1.0, (self.batch, seqlen, heads, self.head_dim), &Device::Cpu)?.to_dtype(dtype)
        };
        Ok([
            tensor(seqlen_q, heads_q)?,
            tensor(seqlen_k, heads_kv)?,
            tensor(seqlen_k, heads_kv)?,
            tensor(seqlen_q, heads_q)?,
        ])
    }
}

/// Attention over `[batch, seqlen, heads, head_dim]`, scores and probabilities in memory: computed in `arithmetic`, each step's
/// result and each gradient rounded to the tensors' own type.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, causal: bool, arithmetic: DType) -> Result<Tensor> {
    let rounded = q.dtype();
    let round = |tensor: Tensor| tensor.to_dtype(rounded)?.to_dtype(arithmetic);
    let (q, k, v) = (
        q.to_dtype(arithmetic)?,
        k.to_dtype(arithmetic)?,
        v.to_dtype(arithmetic)?,
    );
    let groups = q.dim(2)? / k.dim(2)?;
    let heads_first = |tensor: &Tensor, groups| -> Result<Tensor> {
        let (batch, seqlen, heads, head_dim) = tensor.dims4()?;
        tensor
            .transpose(1, 2)?
            .unsqueeze(2)?
            .broadcast_as((batch, heads, groups, seqlen, head_dim))?
            .reshape((batch, heads * groups, seqlen, head_dim))
    };
    let (q, k, v) = (heads_first(&q, 1)?, heads_first(&k, groups)?, heads_first(&v, groups)?);
    let scores = round((q.matmul(&k.t()?.contiguous()?)? * f64::from(scale))?)?;
    let scores = match causal {
        false => scores,
        true => {
            let (seqlen_q, seqlen_k) = (q.dim(2)?, k.dim(2)?);
            let hidden = (0..seqlen_q * seqlen_k)
                .map(|at| u8::from(at % seqlen_k + seqlen_q > at / seqlen_k + seqlen_k))
                .collect();
            let hidden = Tensor::from_vec(hidden, (seqlen_q, seqlen_k), q.device())?.broadcast_as(scores.shape())?;
            let never = Tensor::full(f32::NEG_INFINITY, scores.shape(), q.device())?.to_dtype(scores.dtype())?;
            hidden.where_cond(&never, &scores)?
        }
    };
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = round(weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?)?;
    weights.matmul(&v)?.to_dtype(rounded)?.transpose(1, 2)
}

/// out, dq, dk, dv of an attention function over variables, where the loss is the sum of `weight * out`.
pub fn results(
    [q, k, v, weight]: [&Tensor; 4],
    attention: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<[Tensor; 4]> {
    let (q, k, v) = (Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?);
    let out = attention(&q, &k, &v)?;
    let gradients = (&out * weight)?.sum_all()?.backward()?;
    let gradient = |var: &Var| gradients.get(var).expect("a gradient of each variable").clone();
    Ok([out.detach(), gradient(&q), gradient(&k), gradient(&v)])
}

/// Largest difference of two tensors, in f64. A NaN is infinitely far.
pub fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?;
    let values = difference.abs()?.flatten_all()?.to_vec1::<f64>()?;
    Ok(values
        .into_iter()
        .fold(0.0, |most, x| if x.is_nan() { f64::INFINITY } else { most.max(x) }))
}

/// Asserts that out and gradients are as near to those of plain attention in f64 as twice those of plain attention in `dtype`.
pub fn assert_near(
    case: &Case,
    dtype: DType,
    drawn: [&Tensor; 4],
    ours: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<()> {
    let plain = |dtype: DType, arithmetic: DType| {
        let [q, k, v, weight] = drawn.map(|tensor| tensor.to_dtype(dtype));
        results([&q?, &k?, &v?, &weight?], |q, k, v| {
            attention(q, k, v, case.scale(), case.causal, arithmetic)
        })
    };
    let exact = plain(DType::F64, DType::F64)?;
    let rounded = plain(dtype, DType::F32)?;
    let got = results(drawn, ours)?;
    for (name, ((exact, rounded), got)) in ["out", "dq", "dk", "dv"]
        .iter()
        .zip(exact.iter().zip(&rounded).zip(&got))
    {
        assert_eq!(got.dtype(), dtype);
        let (error, limit) = (distance(got, exact)?, 2.0 * distance(rounded, exact)? + 1e-5);
        assert!(
            error <= limit,
            "{case:?} {dtype:?}: {name} is off by {error:e}, limit {limit:e}"
        );
    }
    Ok(())
}
