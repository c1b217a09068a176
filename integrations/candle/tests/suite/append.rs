//! Steps of decoding over pages, against candle's own rotary embedding and one call a sequence over all of its tokens.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::{rope, rope_i};
use flash_attention_candle::flash_attention::Error;
use flash_attention_candle::{Attention, FlashAttention, KvCache, Rotary};

use crate::plain::distance;

const HEAD_DIM: usize = 16;
const PAGES: (usize, usize) = (6, 8);
/// Pages of two sequences.
const TABLE: [i32; 6] = [4, 0, 5, 2, 1, 3];
/// New tokens of the two sequences in each step.
const STEPS: [[usize; 2]; 4] = [[9, 3], [1, 1], [0, 5], [7, 1]];

fn layer() -> FlashAttention {
    FlashAttention::new(Attention::new().causal())
}

fn randn(shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn pages(dtype: DType) -> Result<[Tensor; 2]> {
    let pages = || Tensor::full(f32::NAN, (PAGES.0, PAGES.1, 2, HEAD_DIM), &Device::Cpu)?.to_dtype(dtype);
    Ok([pages()?, pages()?])
}

/// Cosines and sines of the first 24 positions, `[24, HEAD_DIM / 2]`.
fn tables() -> Result<[Tensor; 2]> {
    let frequency = |pair: usize| 100f32.powf(-2.0 * pair as f32 / HEAD_DIM as f32);
    let frequencies = Tensor::from_iter((0..HEAD_DIM / 2).map(frequency), &Device::Cpu)?;
    let angles = Tensor::arange(0f32, 24.0, &Device::Cpu)?
        .unsqueeze(1)?
        .broadcast_mul(&frequencies)?;
    Ok([angles.cos()?, angles.sin()?])
}

/// All tokens of a sequence at once, `[1, heads, tokens, head_dim]`.
fn at_once(q: &Tensor, k: &Tensor, v: &Tensor, interleaved: bool) -> Result<Tensor> {
    let [cos, sin] = tables()?;
    let turn = |x: &Tensor| {
        let tokens = x.dim(2)?;
        let [cos, sin] = [cos.narrow(0, 0, tokens)?, sin.narrow(0, 0, tokens)?];
        let wide = x.to_dtype(DType::F32)?.contiguous()?;
        match interleaved {
            true => rope_i(&wide, &cos, &sin)?,
            false => rope(&wide, &cos, &sin)?,
        }
        .to_dtype(x.dtype())
    };
    layer().forward(&turn(q)?, &turn(k)?, v)
}

#[test]
fn steps_of_decoding_are_all_tokens_at_once() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for interleaved in [false, true] {
            let [cos, sin] = tables()?.map(|table| table.flatten_all()?.to_vec1::<f32>());
            let rotary = Rotary::of_tables(HEAD_DIM, &cos?, &sin?).expect("tables");
            let rotary = if interleaved { rotary.interleaved() } else { rotary };
            let [k_pages, v_pages] = pages(dtype)?;
            let mut cache = KvCache::paged(PAGES.into(), &TABLE, &[0, 0]).expect("a cache");
            let mut tokens: [[Vec<Tensor>; 4]; 2] = Default::default(); // q, k, v and out of each sequence
            for lengths in STEPS {
                // Packed tokens of q, k and v, each a view of a wider tensor.
                let total = lengths.iter().sum::<usize>();
                let draw = |heads| randn((total, heads, 2 * HEAD_DIM), dtype)?.narrow(2, 3, HEAD_DIM);
                let [q, k, v] = [draw(4)?, draw(2)?, draw(2)?];
                let [first, second] = lengths.map(|length| length as i32);
                cache = (cache.append(&[first, second]))
                    .and_then(|cache| cache.cu_seqlens_q(&[0, first, first + second]))
                    .expect("room");
                let out = layer().forward_append(&q, [&k, &v], Some(&rotary), [&k_pages, &v_pages], &cache)?;
                assert_eq!(out.dims(), q.dims());
                for (sequence, start) in [0, lengths[0]].into_iter().enumerate() {
                    for (all, new) in tokens[sequence].iter_mut().zip([&q, &k, &v, &out]) {
                        all.push(new.narrow(0, start, lengths[sequence])?);
                    }
                }
            }
            for of_sequence in &tokens {
                let of = |tensors: &[Tensor]| Tensor::cat(tensors, 0)?.transpose(0, 1)?.unsqueeze(0);
                let [q, k, v, out] = of_sequence.each_ref().map(|tensors| of(tensors));
                let expected = at_once(&q?, &k?, &v?, interleaved)?;
                let bound = match dtype {
                    DType::F32 => 2e-6,
                    DType::F16 => 4e-3,
                    _ => 3e-2,
                };
                let distance = distance(&out?, &expected)?;
                assert!(distance < bound, "{dtype:?}, interleaved {interleaved}: {distance}");
            }
        }
    }
    Ok(())
}

#[test]
fn new_values_are_written_to_their_places_alone() -> Result<()> {
    let [k_pages, v_pages] = pages(DType::F32)?;
    let (q, k, v) = (
        randn((2, 4, 1, HEAD_DIM), DType::F32)?,
        randn((2, 2, 1, HEAD_DIM), DType::F32)?,
        randn((2, 2, 1, HEAD_DIM), DType::F32)?,
    );
    let cache = KvCache::paged(PAGES.into(), &TABLE, &[8, 0]).and_then(|cache| cache.append(&[1, 1]));
    layer().forward_append(&q, [&k, &v], None, [&k_pages, &v_pages], &cache.expect("room"))?;
    for (pages, new) in [(k_pages, k), (v_pages, v)] {
        for (page, places) in pages.flatten_from(2)?.to_vec3::<f32>()?.into_iter().enumerate() {
            for (place, token) in places.into_iter().enumerate() {
                // Key 8 of the first sequence is the first of page 0, key 0 of the second the first of page 2.
                match (page, place) {
                    (0, 0) => assert_eq!(token, new.get(0)?.flatten_all()?.to_vec1::<f32>()?),
                    (2, 0) => assert_eq!(token, new.get(1)?.flatten_all()?.to_vec1::<f32>()?),
                    _ => assert!(
                        token.iter().all(|element| element.is_nan()),
                        "page {page}, place {place}"
                    ),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn wrong_pages_are_refused_and_keep_their_contents() -> Result<()> {
    let [k_pages, v_pages] = pages(DType::F32)?;
    let new = randn((2, 2, 1, HEAD_DIM), DType::F32)?;
    let cache = KvCache::paged(PAGES.into(), &TABLE, &[0, 0])
        .and_then(|cache| cache.append(&[1, 1]))
        .expect("room");
    let refused = |q: &Tensor, pages: [&Tensor; 2]| match layer().forward_append(q, [&new, &new], None, pages, &cache) {
        Ok(_) => panic!("not refused"),
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
    };
    let aliased = |argument, other| Error::Aliased { argument, other }.to_string();
    assert_eq!(refused(&new, [&k_pages, &k_pages]), aliased("v_pages", "k_pages"));
    let tail = k_pages.narrow(0, 0, 2)?.reshape((2, 2, 8, HEAD_DIM))?;
    assert_eq!(refused(&tail, [&k_pages, &v_pages]), aliased("k_pages", "q"));
    assert_eq!(refused(&tail, [&v_pages, &k_pages]), aliased("v_pages", "q"));
    let halves = v_pages.to_dtype(DType::F16)?;
    assert!(refused(&new, [&k_pages, &halves]).contains("unexpected dtype"));
    assert!(refused(&new, [&k_pages, &v_pages.narrow(0, 0, 5)?]).contains("`v`"));
    for pages in [k_pages, v_pages] {
        let written = pages
            .flatten_all()?
            .to_vec1::<f32>()?
            .into_iter()
            .any(|element| !element.is_nan());
        assert!(!written);
    }
    Ok(())
}
