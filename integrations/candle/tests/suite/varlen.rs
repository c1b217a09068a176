//! Functions over ragged batches, against one call a sequence.

use candle_core::{DType, Device, Result, Tensor, Var};
use flash_attention_candle::{
    flash_attn, flash_attn_alibi_windowed_softcap, flash_attn_varlen, flash_attn_varlen_alibi_windowed_softcap,
    flash_attn_varlen_paged_windowed,
};

use crate::plain::distance;

const SCALE: f32 = 0.2;

fn cumulative(lengths: &[usize]) -> Result<Tensor> {
    let mut ends = vec![0u32];
    for &length in lengths {
        ends.push(ends[ends.len() - 1] + length as u32);
    }
    Tensor::new(ends, &Device::Cpu)
}

/// Each sequence by itself through [`flash_attn`], a sequence without keys as zeros.
fn one_by_one(q: &Tensor, k: &Tensor, v: &Tensor, lengths: [&[usize]; 2], causal: bool) -> Result<Tensor> {
    let (mut start_q, mut start_k, mut outs) = (0, 0, Vec::new());
    for (&of_q, &of_k) in lengths[0].iter().zip(lengths[1]) {
        let part = |tensor: &Tensor, start, len| tensor.narrow(0, start, len)?.unsqueeze(0);
        let q = part(q, start_q, of_q)?;
        outs.push(match (of_q, of_k) {
            (0, _) => q.squeeze(0)?,
            (_, 0) => q.zeros_like()?.squeeze(0)?,
            _ => flash_attn(&q, &part(k, start_k, of_k)?, &part(v, start_k, of_k)?, SCALE, causal)?.squeeze(0)?,
        });
        start_q += of_q;
        start_k += of_k;
    }
    Tensor::cat(&outs, 0)
}

#[test]
fn a_ragged_batch_is_its_sequences() -> Result<()> {
    let lengths: [&[usize]; 2] = [&[5, 0, 33, 1, 7, 70], &[9, 4, 33, 1, 0, 90]];
    let [total_q, total_k] = lengths.map(|lengths| lengths.iter().sum::<usize>());
    let (seqlens_q, seqlens_k) = (cumulative(lengths[0])?, cumulative(lengths[1])?);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let tensor = |total, heads| Tensor::randn(0f32, 1.0, (total, heads, 32), &Device::Cpu)?.to_dtype(dtype);
        let (q, k, v) = (
            Var::from_tensor(&tensor(total_q, 4)?)?,
            Var::from_tensor(&tensor(total_k, 2)?)?,
            Var::from_tensor(&tensor(total_k, 2)?)?,
        );
        let weight = tensor(total_q, 4)?;
        for causal in [false, true] {
            let ragged = flash_attn_varlen(&q, &k, &v, &seqlens_q, &seqlens_k, 70, 90, SCALE, causal)?;
            let apart = one_by_one(&q, &k, &v, lengths, causal)?;
            assert_eq!(distance(&ragged, &apart)?, 0.0);
            let ragged = (ragged * &weight)?.sum_all()?.backward()?;
            let apart = (apart * &weight)?.sum_all()?.backward()?;
            for var in [&q, &k, &v] {
                let (ragged, apart) = (
                    ragged.get(var).expect("a gradient"),
                    apart.get(var).expect("a gradient"),
                );
                assert_eq!(distance(ragged, apart)?, 0.0);
            }
        }
    }
    Ok(())
}

#[test]
fn pages_in_any_order_are_the_sequences_they_hold() -> Result<()> {
    let (page, lengths_q, lengths_k) = (32, [3, 20], [70_usize, 40]);
    let pages = |seed: f64| Tensor::randn(seed, 1.0, (6, page, 2, 16), &Device::Cpu)?.to_dtype(DType::F32);
    let (k, v) = (Var::from_tensor(&pages(0.1)?)?, Var::from_tensor(&pages(-0.1)?)?);
    let q = Tensor::randn(0f32, 1.0, (23, 4, 16), &Device::Cpu)?;
    let table = [[4u32, 0, 5], [2, 1, 99]]; // the last entry is of no page in use
    let keys_of = |paged: &Tensor, sequence: usize| {
        let used = lengths_k[sequence].div_ceil(page);
        let pages = Tensor::new(&table[sequence][..used], &Device::Cpu)?;
        paged
            .index_select(&pages, 0)?
            .reshape(((), 2, 16))?
            .narrow(0, 0, lengths_k[sequence])
    };
    let all = |paged: &Tensor| Tensor::cat(&[keys_of(paged, 0)?, keys_of(paged, 1)?], 0);
    let apart = one_by_one(&q, &all(&k)?, &all(&v)?, [&lengths_q, &lengths_k], true)?;
    let paged = |q: &Tensor, k: &Tensor, v: &Tensor, table: &[[u32; 3]; 2]| {
        flash_attn_varlen_paged_windowed(
            q,
            k,
            v,
            &cumulative(&lengths_q)?,
            &cumulative(&lengths_k)?,
            &Tensor::new(table, &Device::Cpu)?,
            None,
            20,
            70,
            SCALE,
            None,
            Some(0),
            page,
            None,
        )
    };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [q, k, v] = [q.to_dtype(dtype)?, k.to_dtype(dtype)?, v.to_dtype(dtype)?].map(|tensor| tensor.detach());
        let in_place = paged(&q, &k, &v, &table)?;
        let apart = one_by_one(&q, &all(&k)?, &all(&v)?, [&lengths_q, &lengths_k], true)?;
        assert!(distance(&in_place, &apart)? < 1e-6, "{dtype:?}");
    }
    for refused in [
        paged(&q, &k, &v, &[[4, 6, 5], [2, 1, 99]]),
        paged(&q, &k.detach(), &v.detach(), &[[4, 6, 5], [2, 1, 99]]),
    ] {
        let error = first_line(refused.expect_err("there is no page 6"));
        assert_eq!(error, "block_table has page 6 for sequence 0; it must be below 6");
    }
    let paged = paged(&q, &k, &v, &table)?;
    assert_eq!(distance(&paged, &apart)?, 0.0);
    let (paged, apart) = (paged.sqr()?.sum_all()?.backward()?, apart.sqr()?.sum_all()?.backward()?);
    for var in [&k, &v] {
        assert!(distance(paged.get(var).expect("a gradient"), apart.get(var).expect("a gradient"))? < 1e-6);
    }
    Ok(())
}

/// The error's text without the backtrace that candle adds where one is asked for.
fn first_line(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn lengths_that_cannot_be_are_refused() -> Result<()> {
    let x = Tensor::zeros((10, 2, 16), DType::F32, &Device::Cpu)?;
    let good = Tensor::new(&[0u32, 4, 10], &Device::Cpu)?;
    let refused = |bad: &[u32], max_seqlen: usize| {
        let bad = Tensor::new(bad, &Device::Cpu)?;
        let result = flash_attn_varlen(&x, &x, &x, &good, &bad, 6, max_seqlen, SCALE, false);
        Ok::<_, candle_core::Error>(first_line(result.expect_err("this is refused")))
    };
    assert_eq!(refused(&[1, 4, 10], 9)?, "seqlens_k[0] is 1; it must be 0 to 0");
    assert_eq!(refused(&[0, 4, 11], 9)?, "seqlens_k[2] is 11; it must be 4 to 10");
    assert_eq!(refused(&[0, 4, 3], 9)?, "seqlens_k[2] is 3; it must be 4 to 10");
    assert_eq!(refused(&[0, 10], 10)?, "seqlens_k has 1 sequences, seqlens_q has 2");
    assert_eq!(
        refused(&[0, 4, 10], 5)?,
        "max_seqlen_k is 5, but sequence 1 has 6 tokens"
    );
    Ok(())
}

#[test]
fn windows_alibi_and_softcap_are_aligned_at_each_sequences_end() -> Result<()> {
    let lengths: [&[usize]; 2] = [&[5, 33, 1, 70], &[9, 33, 12, 90]];
    let (seqlens_q, seqlens_k) = (cumulative(lengths[0])?, cumulative(lengths[1])?);
    let tensor = |total: usize| Tensor::randn(0f32, 1.0, (total, 2, 32), &Device::Cpu);
    let (q, k) = (tensor(109)?, tensor(144)?);
    let slopes = Tensor::new(&[0.25f32, 0.0625], &Device::Cpu)?;
    let ragged = flash_attn_varlen_alibi_windowed_softcap(
        &q,
        &k,
        &k,
        Some(&slopes),
        &seqlens_q,
        &seqlens_k,
        70,
        90,
        SCALE,
        Some(20),
        Some(3),
        4.0,
    )?;
    let (mut start_q, mut start_k) = (0, 0);
    for (&of_q, &of_k) in lengths[0].iter().zip(lengths[1]) {
        let (q, k) = (
            q.narrow(0, start_q, of_q)?.unsqueeze(0)?,
            k.narrow(0, start_k, of_k)?.unsqueeze(0)?,
        );
        let apart = flash_attn_alibi_windowed_softcap(&q, &k, &k, Some(&slopes), SCALE, Some(20), Some(3), 4.0)?;
        assert_eq!(distance(&ragged.narrow(0, start_q, of_q)?, &apart.squeeze(0)?)?, 0.0);
        start_q += of_q;
        start_k += of_k;
    }
    Ok(())
}
