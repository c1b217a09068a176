//! Plain attention in candle's own operations, differentiable, and the bound that the library's tests use: at most twice the error
//! of plain attention in the same element type, both against f64.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

/// Sizes and mask of a test.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub heads: [usize; 2], // of q, of k and v
    pub seqlens: [usize; 2],
    pub head_dim: usize,
    pub causal: bool,
}

impl Case {
    pub const fn new(batch: usize, heads: [usize; 2], seqlens: [usize; 2], head_dim: usize, causal: bool) -> Self {
        Self {
            batch,
            heads,
            seqlens,
            head_dim,
            causal,
        }
    }

    pub fn scale(&self) -> f32 {
        1.3 / (self.head_dim as f32).sqrt()
    }

    pub fn scores(&self) -> Scores {
        Scores {
            scale: self.scale(),
            window: [None, self.causal.then_some(0)],
            ..Scores::default()
        }
    }

    /// q, k, v and a weight for each element of out, `[batch, seqlen, heads, head_dim]` of this dtype.
    pub fn draw(&self, dtype: DType) -> Result<[Tensor; 4]> {
        let [seqlen_q, seqlen_k] = self.seqlens;
        let [heads_q, heads_kv] = self.heads;
        let mut rng = StdRng::seed_from_u64((self.head_dim * 1000 + seqlen_k) as u64);
        let mut tensor = |seqlen, heads| {
            let shape = (self.batch, seqlen, heads, self.head_dim);
            let numbers: Vec<f32> = StandardNormal
                .sample_iter(&mut rng)
                .take(shape.0 * shape.1 * shape.2 * shape.3)
                .collect();
            Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
        };
        Ok([
            tensor(seqlen_q, heads_q)?,
            tensor(seqlen_k, heads_kv)?,
            tensor(seqlen_k, heads_kv)?,
            tensor(seqlen_q, heads_q)?,
        ])
    }
}

/// The steps from a product of a query and a key to a score.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
    /// Is added, `[batch, heads, seqlen_q, seqlen_k]` or a shape that repeats to it.
    pub mask: Option<Tensor>,
    /// ALiBi's slope of each head.
    pub slopes: Option<Vec<f32>>,
    /// Keys seen before and after a query's own.
    pub window: [Option<usize>; 2],
}

/// Attention over `[batch, seqlen, heads, head_dim]`, scores and probabilities in memory: computed in `arithmetic`, each step's
/// result and each gradient rounded to the tensors' own type.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, how: &Scores, arithmetic: DType) -> Result<Tensor> {
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
    let mut scores = round((q.matmul(&k.t()?.contiguous()?)? * f64::from(how.scale))?)?;
    if let Some(cap) = how.softcap.map(f64::from) {
        scores = round(((scores / cap)?.tanh()? * cap)?)?;
    }
    if let Some(mask) = &how.mask {
        scores = round(scores.broadcast_add(&mask.to_dtype(arithmetic)?)?)?;
    }
    let (seqlen_q, seqlen_k) = (q.dim(2)? as i64, k.dim(2)? as i64);
    // How far each key lies after its query's own place, for each pair of a head.
    let pairs = (0..seqlen_q).flat_map(|i| (0..seqlen_k).map(move |j| j - (i + seqlen_k - seqlen_q)));
    let of_pairs = |values: Vec<f32>, heads| {
        Tensor::from_vec(values, (heads, seqlen_q as usize, seqlen_k as usize), &Device::Cpu)?.to_dtype(arithmetic)
    };
    if let Some(slopes) = &how.slopes {
        let bias = slopes
            .iter()
            .flat_map(|slope| pairs.clone().map(move |far| -slope * far.abs() as f32));
        scores = round(scores.broadcast_add(&of_pairs(bias.collect(), slopes.len())?)?)?;
    }
    let [left, right] = how.window.map(|window| window.map_or(i64::MAX, |window| window as i64));
    let hidden = pairs.map(|far| {
        if far < -left || far > right {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    });
    let scores = scores.broadcast_add(&of_pairs(hidden.collect(), 1)?)?;
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
    how: &Scores,
    dtype: DType,
    drawn: [&Tensor; 4],
    ours: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<()> {
    let plain = |dtype: DType, arithmetic: DType| {
        let [q, k, v, weight] = drawn.map(|tensor| tensor.to_dtype(dtype));
        results([&q?, &k?, &v?, &weight?], |q, k, v| attention(q, k, v, how, arithmetic))
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
            "{case:?} {how:?} {dtype:?}: {name} is off by {error:e}, limit {limit:e}"
        );
    }
    Ok(())
}
