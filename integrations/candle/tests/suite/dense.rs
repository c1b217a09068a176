//! Functions over batches of equally long sequences.

use candle_core::{DType, Device, Result, Tensor};
use flash_attention_candle::{
    Attention, FlashAttention, FlashAttn, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed,
    flash_attn_alibi_windowed_softcap, flash_attn_windowed, sdpa,
};

use crate::plain::{Case, Scores, assert_near, distance};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Batch, heads of q and of k, lengths of q and of k, head_dim, causal.
const CASES: [Case; 5] = [
    Case::new(2, [3, 3], [65, 65], 64, false),
    Case::new(1, [4, 2], [100, 131], 32, true),
    Case::new(2, [6, 1], [7, 40], 40, false),
    Case::new(8, [2, 2], [1, 90], 128, true),
    Case::new(1, [1, 1], [40, 1], 256, false),
];

#[test]
fn results_and_gradients_are_those_of_plain_attention() -> Result<()> {
    for case in CASES {
        for dtype in DTYPES {
            let drawn = case.draw(dtype)?;
            assert_near(&case, &case.scores(), dtype, drawn.each_ref(), |q, k, v| {
                flash_attn(q, k, v, case.scale(), case.causal)
            })?;
        }
    }
    Ok(())
}

fn heads_first(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    Ok((q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?))
}

#[test]
fn candle_nn_order_gives_the_same() -> Result<()> {
    for case in CASES {
        let drawn = case.draw(DType::F32)?;
        assert_near(&case, &case.scores(), DType::F32, drawn.each_ref(), |q, k, v| {
            let (q, k, v) = heads_first(q, k, v)?;
            sdpa(&q, &k, &v, None, case.causal, case.scale(), 1.0)?.transpose(1, 2)
        })?;
        let mut attention = Attention::new().softmax_scale(case.scale());
        if case.causal {
            attention = attention.causal();
        }
        let layer = FlashAttention::new(attention);
        assert_near(&case, &case.scores(), DType::F32, drawn.each_ref(), |q, k, v| {
            let (q, k, v) = heads_first(q, k, v)?;
            layer.forward(&q, &k, &v)?.transpose(1, 2)
        })?;
        assert_near(&case, &case.scores(), DType::F32, drawn.each_ref(), |q, k, v| {
            layer.forward_seqlen_heads(q, k, v)
        })?;
    }
    Ok(())
}

#[test]
fn the_op_without_memory_has_the_same_gradients() -> Result<()> {
    let case = CASES[1];
    let drawn = case.draw(DType::F32)?;
    assert_near(&case, &case.scores(), DType::F32, drawn.each_ref(), |q, k, v| {
        let op = FlashAttn {
            softmax_scale: case.scale(),
            alibi_slopes: None,
            window_size_left: None,
            window_size_right: Some(0),
            softcap: Some(0.0),
        };
        q.apply_op3(k, v, op)
    })
}

#[test]
fn views_of_one_packed_tensor_are_read_in_place_and_have_one_gradient() -> Result<()> {
    let case = Case::new(2, [3, 3], [50, 50], 32, true);
    let packed = candle_core::Var::randn(0f32, 1.0, (2, 50, 3, 3, 32), &Device::Cpu)?;
    let part = |at| packed.narrow(2, at, 1)?.squeeze(2);
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    assert!(!q.is_contiguous());
    let gradient = |out: Tensor| -> Result<Tensor> {
        // The gradient of a sum is one number broadcast, with strides of 0.
        Ok(out.sum_all()?.backward()?.get(&packed).expect("a gradient").clone())
    };
    let ours = gradient(flash_attn(&q, &k, &v, case.scale(), true)?)?;
    let plain = gradient(crate::plain::attention(&q, &k, &v, &case.scores(), DType::F32)?)?;
    assert!(distance(&ours, &plain)? < 2e-5);
    Ok(())
}

#[test]
fn a_last_axis_with_a_stride_is_copied() -> Result<()> {
    let case = CASES[0];
    let [q, k, v, _] = case.draw(DType::F32)?;
    let strided = |tensor: &Tensor| tensor.transpose(1, 3)?.contiguous()?.transpose(1, 3);
    let expected = flash_attn(&q, &k, &v, case.scale(), false)?;
    let got = flash_attn(&strided(&q)?, &strided(&k)?, &strided(&v)?, case.scale(), false)?;
    assert_eq!(distance(&expected, &got)?, 0.0);
    Ok(())
}

#[test]
fn windows_that_hide_nothing_need_no_program() -> Result<()> {
    let case = CASES[1];
    let [q, k, v, _] = case.draw(DType::F32)?;
    let windowed = |left, right| flash_attn_windowed(&q, &k, &v, case.scale(), left, right);
    let (full, causal) = (windowed(None, None)?, windowed(None, Some(0))?);
    assert!(distance(&full, &causal)? > 0.1);
    assert_eq!(distance(&windowed(Some(131), Some(500))?, &full)?, 0.0);
    assert_eq!(distance(&windowed(Some(200), Some(0))?, &causal)?, 0.0);
    Ok(())
}

#[test]
fn queries_that_see_no_key_are_zero() -> Result<()> {
    let case = Case::new(1, [1, 1], [30, 10], 8, true);
    let drawn = case.draw(DType::F32)?;
    let [out, dq, _, _] = crate::plain::results(drawn.each_ref(), |q, k, v| flash_attn(q, k, v, case.scale(), true))?;
    for blind in [out.narrow(1, 0, 20)?, dq.narrow(1, 0, 20)?] {
        assert_eq!(distance(&blind, &blind.zeros_like()?)?, 0.0);
    }
    Ok(())
}

#[test]
fn refusals_name_argument_value_and_limit() -> Result<()> {
    let tensor = |shape: (usize, usize, usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let q = tensor((1, 5, 4, 64), DType::F32)?;
    let refused = |result: Result<Tensor>| result.expect_err("this is refused").to_string();
    let text = refused(flash_attn(
        &q,
        &tensor((1, 5, 3, 64), DType::F32)?,
        &tensor((1, 5, 3, 64), DType::F32)?,
        1.0,
        true,
    ));
    assert!(
        text.contains("heads") && text.contains('4') && text.contains('3'),
        "{text}"
    );
    let wide = tensor((1, 5, 4, 512), DType::F32)?;
    let text = refused(flash_attn(&wide, &wide, &wide, 1.0, true));
    assert!(text.contains("512") && text.contains("256"), "{text}");
    let double = tensor((1, 5, 4, 64), DType::F64)?;
    let text = refused(flash_attn(&double, &double, &double, 1.0, true));
    assert!(text.contains("F64"), "{text}");
    let half = tensor((1, 5, 4, 64), DType::F16)?;
    refused(flash_attn(&q, &half, &half, 1.0, true));
    let flat = Tensor::zeros((5, 4, 64), DType::F32, &Device::Cpu)?;
    refused(flash_attn(&flat, &flat, &flat, 1.0, true));
    Ok(())
}

#[test]
fn windows_alibi_softcap_and_masks_are_those_of_plain_attention() -> Result<()> {
    for (at, case) in CASES.iter().enumerate() {
        let [heads, _] = case.heads;
        let [seqlen_q, seqlen_k] = case.seqlens;
        let slopes: Vec<f32> = (0..heads).map(|head| 0.5_f32.powi(head as i32 + 1)).collect();
        let slopes_tensor = Tensor::new(slopes.as_slice(), &Device::Cpu)?;
        let mask = Tensor::randn(0f32, 1.0, (heads, seqlen_q, seqlen_k), &Device::Cpu)?;
        let window = [Some(9 + at), if case.causal { Some(0) } else { Some(40) }];
        let [left, right] = window;
        for dtype in DTYPES {
            let drawn = case.draw(dtype)?;
            let assert = |how: Scores, ours: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
                assert_near(case, &how, dtype, drawn.each_ref(), ours)
            };
            let scale = case.scale();
            let how = Scores {
                window,
                ..case.scores()
            };
            assert(how.clone(), &|q, k, v| flash_attn_windowed(q, k, v, scale, left, right))?;
            let how = Scores {
                slopes: Some(slopes.clone()),
                ..how
            };
            assert(how.clone(), &|q, k, v| {
                flash_attn_alibi_windowed(q, k, v, &slopes_tensor, scale, left, right)
            })?;
            let how = Scores {
                softcap: Some(1.5),
                ..how
            };
            assert(how, &|q, k, v| {
                flash_attn_alibi_windowed_softcap(q, k, v, Some(&slopes_tensor), scale, left, right, 1.5)
            })?;
            let how = Scores {
                slopes: Some(slopes.clone()),
                ..case.scores()
            };
            assert(how, &|q, k, v| {
                flash_attn_alibi(q, k, v, &slopes_tensor, scale, case.causal)
            })?;
            let how = Scores {
                mask: Some(mask.clone()),
                softcap: Some(2.0),
                ..case.scores()
            };
            assert(how, &|q, k, v| {
                let (q, k, v) = heads_first(q, k, v)?;
                sdpa(&q, &k, &v, Some(&mask), case.causal, scale, 2.0)?.transpose(1, 2)
            })?;
        }
    }
    Ok(())
}
