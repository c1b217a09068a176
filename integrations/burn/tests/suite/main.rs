//! flash-attention-burn against burn's own attention, which keeps a score for each pair.

use burn::module::Module;
use burn::tensor::module::attention as plain_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use flash_attention_burn::{
    Attention, Error, FlashAttention, FlashMultiHeadAttention, FlashMultiHeadAttentionConfig, attention,
};

struct Case {
    heads: [usize; 2], // of q, of k and v
    seqlens: [usize; 2],
    head_dim: usize,
    causal: bool,
}

/// Heads of q and of k, lengths of q and of k, head_dim, causal.
const CASES: [Case; 4] = [
    Case::new([3, 3], [65, 65], 64, false),
    Case::new([4, 2], [100, 131], 32, true),
    Case::new([6, 1], [7, 40], 40, false),
    Case::new([2, 2], [1, 90], 128, true),
];

impl Case {
    const fn new(heads: [usize; 2], seqlens: [usize; 2], head_dim: usize, causal: bool) -> Self {
        Self {
            heads,
            seqlens,
            head_dim,
            causal,
        }
    }

    /// q, k, v and a weight for each element of out, of numbers that this dtype has.
    fn draw(&self, device: &Device, dtype: FloatDType) -> [Tensor<4>; 4] {
        let tensor = |heads, seqlen| {
            Tensor::<4>::random(
                [2, heads, seqlen, self.head_dim],
                Distribution::Normal(0.0, 1.0),
                device,
            )
            .cast(dtype)
        };
        let [heads_q, heads_kv] = self.heads;
        let [seqlen_q, seqlen_k] = self.seqlens;
        [
            tensor(heads_q, seqlen_q),
            tensor(heads_kv, seqlen_k),
            tensor(heads_kv, seqlen_k),
            tensor(heads_q, seqlen_q),
        ]
    }

    fn options(&self) -> Attention {
        match self.causal {
            true => Attention::new().causal(),
            false => Attention::new(),
        }
    }

    /// burn's attention in f32, each key and value head repeated for the query heads that share it.
    fn plain(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        let [heads_q, heads_kv] = self.heads;
        let repeated = |x: Tensor<4>| {
            let [batch, heads, seqlen, head_dim] = x.dims();
            x.cast(FloatDType::F32)
                .reshape([batch, heads, 1, seqlen, head_dim])
                .expand([batch, heads, heads_q / heads_kv, seqlen, head_dim])
                .reshape([batch, heads_q, seqlen, head_dim])
        };
        let options = AttentionModuleOptions {
            scale: None,
            softcap: None,
            is_causal: self.causal,
        };
        let dtype = q.dtype();
        let out = plain_attention(q.cast(FloatDType::F32), repeated(k), repeated(v), None, None, options);
        out.cast(dtype)
    }
}

/// out, dq, dk, dv of an attention function, where the loss is the sum of `weight * out`.
fn results(
    [q, k, v, weight]: [Tensor<4>; 4],
    attention: impl Fn(Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>,
) -> [Tensor<4>; 4] {
    let (q, k, v) = (q.require_grad(), k.require_grad(), v.require_grad());
    let out = attention(q.clone(), k.clone(), v.clone());
    let gradients = (out.clone() * weight).sum().backward();
    let gradient = |x: Tensor<4>| x.grad(&gradients).expect("a gradient of each input");
    [out.inner(), gradient(q), gradient(k), gradient(v)]
}

/// Largest difference of two tensors.
fn distance(a: Tensor<4>, b: Tensor<4>) -> f32 {
    let difference = (a.cast(FloatDType::F32) - b.cast(FloatDType::F32)).abs().into_data();
    difference
        .iter::<f32>()
        .fold(0.0, |most, x| if x.is_nan() { f32::INFINITY } else { most.max(x) })
}

#[test]
fn results_and_gradients_are_those_of_burns_attention() {
    let device = Device::flex().autodiff();
    for case in CASES {
        // Sums of a few hundred products of normal numbers; 16-bit results are rounded to 11 or 8 bits.
        for (dtype, limit) in [
            (FloatDType::F32, 2e-5),
            (FloatDType::F16, 2e-2),
            (FloatDType::BF16, 0.15),
        ] {
            let drawn = case.draw(&device, dtype);
            let plain = results(drawn.clone(), |q, k, v| case.plain(q, k, v));
            let ours = results(drawn, |q, k, v| attention(q, k, v, &case.options()).expect("valid"));
            for (name, (plain, ours)) in ["out", "dq", "dk", "dv"].iter().zip(plain.into_iter().zip(ours)) {
                assert_eq!(ours.dtype(), DType::from(dtype));
                let distance = distance(plain, ours);
                assert!(
                    distance < limit,
                    "{:?} {:?} {dtype:?}: {name} is {distance} off",
                    case.heads,
                    case.seqlens
                );
            }
        }
    }
}

#[test]
fn views_are_read_as_they_are_and_flipped_ones_copied() {
    let device = Device::flex();
    let [q, k, v, _] = CASES[0].draw(&device, FloatDType::F32);
    let layer = FlashAttention::new(Attention::new());
    let expected = layer.forward(q.clone(), k.clone(), v.clone()).expect("valid");
    // The same elements in the memory order [batch, seqlen, heads, head_dim].
    let view = |x: &Tensor<4>| {
        let moved = x.clone().swap_dims(1, 2).mul_scalar(1.0);
        moved.swap_dims(1, 2)
    };
    let got = layer.forward(view(&q), view(&k), view(&v)).expect("valid");
    assert_eq!(distance(expected.clone(), got), 0.0);
    // Keys and values in reverse order: the same sum in another order.
    let got = layer.forward(q, k.flip([2]), v.flip([2])).expect("valid");
    assert!(distance(expected, got) < 1e-5);
}

#[test]
fn a_tensor_that_needs_no_gradient_has_none() {
    let device = Device::flex().autodiff();
    let [q, k, v, _] = CASES[0].draw(&device, FloatDType::F32);
    let q = q.require_grad();
    let out = attention(q.clone(), k.clone(), v, &Attention::new()).expect("valid");
    let gradients = out.sum().backward();
    assert!(q.grad(&gradients).is_some());
    assert!(k.grad(&gradients).is_none());
}

#[test]
fn gradient_checkpointing_gives_the_same_gradients() {
    let case = &CASES[1];
    let device = Device::flex().autodiff();
    let drawn = case.draw(&device, FloatDType::F32);
    let kept = results(drawn.clone(), |q, k, v| {
        attention(q * 2.0, k, v, &case.options()).expect("valid").exp()
    });
    let checkpointed = Device::flex().autodiff().gradient_checkpointing();
    let moved = drawn.map(|x| Tensor::from_data(x.into_data(), &checkpointed));
    let again = results(moved, |q, k, v| {
        attention(q * 2.0, k, v, &case.options()).expect("valid").exp()
    });
    for (kept, again) in kept.into_iter().zip(again) {
        assert_eq!(distance(kept, again), 0.0);
    }
}

#[test]
fn multi_head_attention_is_burns_with_the_same_weights() {
    let device = Device::flex().autodiff();
    let ours = FlashMultiHeadAttentionConfig::new(64, 4).init(&device);
    let mut plain = burn::nn::attention::MultiHeadAttentionConfig::new(64, 4)
        .with_dropout(0.0)
        .init(&device);
    plain.query = ours.query.clone();
    plain.key = ours.key.clone();
    plain.value = ours.value.clone();
    plain.output = ours.output.clone();
    let x = Tensor::<3>::random([2, 50, 64], Distribution::Normal(0.0, 1.0), &device);
    let y = Tensor::<3>::random([2, 70, 64], Distribution::Normal(0.0, 1.0), &device);
    let out = ours.forward(x.clone(), y.clone(), y.clone()).expect("valid");
    let expected = plain
        .forward(burn::nn::attention::MhaInput::new(x, y.clone(), y))
        .context;
    assert!(distance(out.unsqueeze(), expected.unsqueeze()) < 1e-5);
}

#[derive(Module, Debug)]
struct Model {
    mixer: FlashMultiHeadAttention,
    attention: FlashAttention,
}

#[test]
fn fields_of_a_module_keep_their_options_when_a_record_is_loaded() {
    let device = Device::flex().autodiff();
    let model = |causal| Model {
        mixer: FlashMultiHeadAttentionConfig::new(64, 4)
            .with_n_kv_heads(Some(2))
            .with_causal(causal)
            .init(&device),
        attention: FlashAttention::new(if causal {
            Attention::new().causal()
        } else {
            Attention::new()
        }),
    };
    let [causal, full] = [true, false].map(model);
    assert_eq!(causal.attention.num_params(), 0);
    assert_eq!(causal.num_params(), causal.mixer.num_params());
    let loaded = model(true).load_record(full.clone().into_record()).valid();
    assert_eq!(loaded.attention, causal.attention);
    assert_ne!(loaded.attention, full.attention);
    let weights = |model: &Model| model.mixer.key.weight.val().into_data();
    assert_eq!(weights(&loaded), weights(&full));
    assert_ne!(weights(&loaded), weights(&causal));
    assert!(loaded.mixer.causal);
}

#[test]
fn refusals_name_argument_value_and_limit() {
    let device = Device::flex();
    let zeros = |heads: usize, head_dim: usize| Tensor::<4>::zeros([1, heads, 5, head_dim], &device);
    let refused = |q: Tensor<4>, k: Tensor<4>| {
        let error = attention(q, k.clone(), k, &Attention::new()).expect_err("this is refused");
        error.to_string()
    };
    let text = refused(zeros(4, 64), zeros(3, 64));
    assert!(
        text.contains("heads") && text.contains('4') && text.contains('3'),
        "{text}"
    );
    let text = refused(zeros(4, 512), zeros(4, 512));
    assert!(text.contains("512") && text.contains("256"), "{text}");
    let double = zeros(4, 64).cast(FloatDType::F64);
    let error = attention(double.clone(), double.clone(), double, &Attention::new()).expect_err("this is refused");
    assert!(
        matches!(
            error,
            Error::Dtype {
                argument: "q",
                got: DType::F64
            }
        ),
        "{error}"
    );
}
