//! Measures the CPU device on batches that are no rectangle: ragged batches beside the rectangles of their sequences, and decoding
//! from caches beside reading as many bytes in order. Prints one JSON object: the seconds of each call.
//!
//! Runs of all calls alternate, and the least time of each counts: other work on the machine only adds to it.
//! `benches/cpu_sequences.py` runs this in turn with PyTorch and prints a table. The optional argument is the number of rounds.

use std::collections::BTreeMap;
use std::time::Instant;

use benches::peak::read;
use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Device, Element, Error, KvCache, Sequences, Tensor};

type Failure = Box<dyn std::error::Error>;

/// A measured call: its name and what it does.
type Variant<'a> = (String, Box<dyn Fn() -> Result<(), Error> + 'a>);

/// Seconds of each call, by its name.
type Times = BTreeMap<String, f64>;

fn main() -> Result<(), Failure> {
    let rounds = std::env::args().nth(1).map_or(Ok(5), |text| text.parse())?;
    let device = Device::cpu();
    let mut times = Times::new();
    ragged(&device, rounds, &mut times)?;
    decode::<f32>(&device, rounds, &mut times)?;
    decode::<f16>(&device, rounds, &mut times)?;
    decode::<bf16>(&device, rounds, &mut times)?;
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}

/// Measures the least seconds of each variant.
fn measure(rounds: usize, variants: &[Variant<'_>], times: &mut Times) -> Result<(), Error> {
    for _ in 0..rounds {
        for (name, run) in variants {
            let start = Instant::now();
            run()?;
            let seconds = start.elapsed().as_secs_f64();
            let least = times.entry(name.clone()).or_insert(seconds);
            *least = least.min(seconds);
        }
    }
    Ok(())
}

/// Numbers without a pattern, in -1 .. 1.
fn numbers<T: Element>(device: &Device, shape: &[usize]) -> Result<Tensor<T>, Error> {
    let mut state = shape.len() as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let data: Vec<T> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_slice(device, shape, &data)
}

/// 32 sequences of 64 to 2048 tokens, 8 heads of 64 elements, f32.
fn ragged(device: &Device, rounds: usize, times: &mut Times) -> Result<(), Failure> {
    let (batch, heads, head_dim) = (32, 8, 64);
    // In an order that is neither rising nor falling.
    let lens: Vec<usize> = (0..batch).map(|i| 64 * (1 + 11 * i % batch)).collect();
    let mut offsets = vec![0];
    lens.iter()
        .for_each(|len| offsets.push(offsets[offsets.len() - 1] + *len as i32));
    let total = offsets[batch] as usize;
    let sequences = Sequences::new(&offsets, &offsets)?;
    let x: Tensor<f32> = numbers(device, &[total, heads, head_dim])?;
    for (mask, attention) in [("full", Attention::new()), ("causal", Attention::new().causal())] {
        let output = attention.forward_ragged(&x, &x, &x, &sequences)?;
        let rectangles: Vec<Tensor<f32>> = lens
            .iter()
            .map(|&len| numbers(device, &[1, heads, len, head_dim]))
            .collect::<Result<_, _>>()?;
        let outputs: Vec<_> = rectangles
            .iter()
            .map(|x| attention.forward(x, x, x))
            .collect::<Result<_, _>>()?;
        let (attention, x, sequences) = (&attention, &x, &sequences);
        let (rectangles, outputs, output) = (&rectangles, &outputs, &output);
        let variants: [Variant<'_>; 4] = [
            (
                format!("forward, {mask}, ragged"),
                Box::new(move || attention.forward_ragged(x, x, x, sequences).map(drop)),
            ),
            (
                format!("forward, {mask}, a call a sequence"),
                Box::new(move || rectangles.iter().try_for_each(|x| attention.forward(x, x, x).map(drop))),
            ),
            (
                format!("backward, {mask}, ragged"),
                Box::new(move || attention.backward_ragged(x, x, x, output, x, sequences).map(drop)),
            ),
            (
                format!("backward, {mask}, a call a sequence"),
                Box::new(move || {
                    let mut pairs = rectangles.iter().zip(outputs);
                    pairs.try_for_each(|(x, output)| attention.backward(x, x, x, output, x).map(drop))
                }),
            ),
        ];
        measure(rounds, &variants, times)?;
    }
    Ok(())
}

/// One query of each of 32 sequences of 4096 keys; 32 query heads, 8 key heads of 128 elements.
fn decode<T: Element>(device: &Device, rounds: usize, times: &mut Times) -> Result<(), Failure> {
    let (batch, heads_q, heads_kv, keys, head_dim) = (32, 32, 8, 4096, 128);
    let name = T::DTYPE.name();
    let q: Tensor<T> = numbers(device, &[batch, heads_q, 1, head_dim])?;
    let k: Tensor<T> = numbers(device, &[batch, keys, heads_kv, head_dim])?;
    let v: Tensor<T> = numbers(device, &[batch, keys, heads_kv, head_dim])?;
    let attention = &Attention::new();
    let (q, k, v) = (&q, &k, &v);
    let by_heads = [k.transpose(1, 2)?, v.transpose(1, 2)?];
    let used = vec![keys as i32; batch];
    let rows = KvCache::rectangular([batch, keys], &used)?;
    // As many bytes as K and V have, read in the same rounds.
    let data: Vec<u64> = (0..batch * keys * heads_kv * head_dim * 2 * size_of::<T>() / 8)
        .map(|x| x as u64)
        .collect();
    let (data, threads) = (&data, std::thread::available_parallelism()?.get());
    let mut variants: Vec<Variant<'_>> = vec![
        (
            format!("decode, {name}, rectangle"),
            Box::new(move || attention.forward(q, &by_heads[0], &by_heads[1]).map(drop)),
        ),
        (
            format!("decode, {name}, cache of rows"),
            Box::new(move || attention.forward_cached(q, k, v, &rows).map(drop)),
        ),
    ];
    variants.push((
        format!("decode, {name}, reading"),
        Box::new(move || {
            read(data, threads);
            Ok(())
        }),
    ));
    for page_size in [16, 64, 256] {
        let pages = batch * keys / page_size;
        // 1, 1 + step, …: neighbours are far apart, and each page is used once.
        let table: Vec<i32> = (0..pages).map(|page| (page * 4097 % pages) as i32).collect();
        let cache = KvCache::paged([pages, page_size], &table, &used)?;
        let shape = [pages, page_size, heads_kv, head_dim];
        // Views k and v as pages of the cache, without a copy.
        let [k, v] = [k, v].map(|tensor| {
            let strides = [page_size * heads_kv * head_dim, heads_kv * head_dim, head_dim, 1];
            // SAFETY: the tensors are contiguous, have as many elements, and outlive the variants.
            unsafe { Tensor::<T>::from_raw_parts(device, tensor.address(), shape, strides, None) }
        });
        let (k, v) = (k?, v?);
        variants.push((
            format!("decode, {name}, pages of {page_size}"),
            Box::new(move || attention.forward_cached(q, &k, &v, &cache).map(drop)),
        ));
    }
    measure(rounds, &variants, times)?;
    Ok(())
}
