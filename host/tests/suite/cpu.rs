//! The CPU device against the f64 oracle: tile edges, masks, strides, dtypes, and what is not a number.

use crate::common::{self, check_on_every_set as check, instruction_sets, largest_error, noise};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Tensor};
use half::{bf16, f16};

#[test]
fn lengths_around_the_tiles() {
    common::lengths_around_the_tiles([check::<f32>, check::<f16>, check::<bf16>]);
}

#[test]
fn every_head_dim() {
    common::every_head_dim([check::<f32>, check::<f16>]);
}

#[test]
fn heads_share_keys_and_batches_do_not() {
    check::<f32>(Attention::new(), [3, 6, 17, 16], [3, 2, 19, 16]);
    check::<f32>(Attention::new().causal(), [2, 4, 70, 24], [2, 1, 70, 24]);
}

/// Tests that with few queries as many heads read the keys together as fit, and no more than leave a task for each thread.
#[test]
fn few_queries_of_heads_that_share_keys() {
    for (seqlen_q, heads_q, heads_kv) in [(1, 64, 2), (3, 12, 1), (4, 28, 2), (2, 6, 6)] {
        for attention in [Attention::new(), Attention::new().causal()] {
            check::<f32>(attention.clone(), [2, heads_q, seqlen_q, 24], [2, heads_kv, 150, 24]);
            check::<bf16>(attention, [2, heads_q, seqlen_q, 24], [2, heads_kv, 3, 24]);
        }
    }
}

#[test]
fn any_finite_scale() {
    for scale in [0.0, -0.0, -0.7, 3.0, 1e-20, -1e4] {
        check::<f32>(Attention::new().softmax_scale(scale), [1, 1, 9, 16], [1, 1, 90, 16]);
        check::<f32>(
            Attention::new().softmax_scale(scale).causal(),
            [1, 1, 9, 16],
            [1, 1, 5, 16],
        );
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let data: Vec<f32> = noise(2 * 3 * 200 * 40, 5).into_iter().map(|x| x as f32).collect();
    let run = |threads| {
        let device = Device::cpu_with_threads(threads).expect("threads");
        let q = Tensor::from_slice(&device, [2, 3, 200, 40], &data).expect("small");
        let output = Attention::new().causal().forward(&q, &q, &q).expect("valid");
        (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"))
    };
    let one = run(1);
    assert!(run(2) == one && run(5) == one);

    let decode = |threads| {
        let device = Device::cpu_with_threads(threads).expect("threads");
        let k = Tensor::from_slice(&device, [1, 2, 1500, 8], &data[..24_000]).expect("small");
        let q = Tensor::from_slice(&device, [1, 32, 2, 8], &data[..512]).expect("small");
        let output = Attention::new().causal().forward(&q, &k, &k).expect("valid");
        (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"))
    };
    let one = decode(1);
    assert!(decode(2) == one && decode(5) == one && decode(16) == one);
}

#[test]
fn memory_of_another_layout_is_used_in_place() {
    let device = Device::cpu();
    // Packed [batch, seqlen, 3, heads, head_dim], as a fused projection leaves it.
    let (batch, seqlen, heads, head_dim) = (2, 33, 3, 16);
    let packed: Vec<f32> = noise(batch * seqlen * 3 * heads * head_dim, 7)
        .into_iter()
        .map(|x| x as f32)
        .collect();
    let qkv = Tensor::from_slice(&device, [batch, seqlen, 3, heads, head_dim], &packed).expect("small");
    let part = |index| {
        qkv.select(2, index)
            .and_then(|part| part.transpose(1, 2))
            .expect("valid axes")
    };
    let (q, k, v) = (part(0), part(1), part(2));
    let attention = Attention::new().causal();
    let strided = attention.forward(&q, &k, &v).expect("valid");

    let copy = |tensor: &Tensor<f32>| {
        Tensor::from_slice(&device, tensor.shape(), &tensor.to_vec().expect("cpu")).expect("small")
    };
    let contiguous = attention.forward(&copy(&q), &copy(&k), &copy(&v)).expect("valid");
    assert_eq!(
        strided.out.to_vec().expect("cpu"),
        contiguous.out.to_vec().expect("cpu")
    );

    // And written to memory of the other order.
    let memory = Tensor::<f32>::zeros(&device, [batch, seqlen, heads, head_dim]).expect("small");
    let mut out = memory.transpose(1, 2).expect("valid axes");
    let mut lse = Tensor::zeros(&device, [batch, heads, seqlen]).expect("small");
    attention.forward_into(&q, &k, &v, &mut out, &mut lse).expect("valid");
    assert_eq!(out.to_vec().expect("cpu"), contiguous.out.to_vec().expect("cpu"));
    assert_eq!(lse.to_vec().expect("cpu"), contiguous.lse.to_vec().expect("cpu"));
    assert_eq!(
        memory.transpose(1, 2).expect("axes").to_vec().expect("cpu"),
        out.to_vec().expect("cpu")
    );
}

/// Keys that lie in one run are read where they are, others are copied first.
#[test]
fn keys_in_a_run_and_keys_apart_give_the_same_bits() {
    let (seqlen, heads) = (203, 2);
    for (device, head_dim) in instruction_sets()
        .iter()
        .flat_map(|device| [(device, 24), (device, 64)])
    {
        let draw = |seed| {
            let data: Vec<f32> = noise(seqlen * heads * head_dim, seed)
                .into_iter()
                .map(|x| x as f32)
                .collect();
            let packed = Tensor::from_slice(device, [1, seqlen, heads, head_dim], &data).expect("small");
            packed.transpose(1, 2).expect("valid axes")
        };
        let [q, k, v] = [1, 2, 3].map(draw);
        let in_a_run = |tensor: &Tensor<f32>| {
            Tensor::from_slice(device, tensor.shape(), &tensor.to_vec().expect("cpu")).expect("small")
        };
        for attention in [Attention::new(), Attention::new().causal()] {
            let apart = attention.forward(&q, &k, &v).expect("valid");
            let run = attention.forward(&q, &in_a_run(&k), &in_a_run(&v)).expect("valid");
            let read = |output: &flash_attention::Output<f32>| {
                (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"))
            };
            assert!(read(&apart) == read(&run), "{device} {attention:?} head_dim {head_dim}");
        }
    }
}

#[test]
fn a_stride_of_zero_repeats_an_input() {
    let device = Device::cpu();
    let row: Vec<f32> = noise(40 * 8, 9).into_iter().map(|x| x as f32).collect();
    let repeated = Tensor::from_slice_strided(&device, [2, 3, 40, 8], [0, 0, 8, 1], &row).expect("small");
    let copied = Tensor::from_slice(&device, [2, 3, 40, 8], &row.repeat(6)).expect("small");
    let run = |x| {
        Attention::new()
            .forward(x, x, x)
            .expect("valid")
            .out
            .to_vec()
            .expect("cpu")
    };
    assert_eq!(run(&repeated), run(&copied));
}

#[test]
fn calls_from_a_parallel_loop_do_not_wait_for_each_other() {
    use rayon::prelude::*;
    let device = Device::cpu();
    let data: Vec<f32> = noise(16 * 300 * 16, 13).into_iter().map(|x| x as f32).collect();
    let q = Tensor::from_slice(&device, [1, 16, 300, 16], &data).expect("small");
    let whole = Attention::new().forward(&q, &q, &q).expect("valid");
    // Every head on its own, all written to one tensor: each call locks the memory that all of them share.
    let out = Tensor::<f32>::zeros(&device, [1, 16, 300, 16]).expect("small");
    let lse = Tensor::<f32>::zeros(&device, [1, 16, 300]).expect("small");
    (0..16).into_par_iter().for_each(|head| {
        let q = q.narrow(1, head, 1).expect("in range");
        let mut out = out.narrow(1, head, 1).expect("in range");
        let mut lse = lse.narrow(1, head, 1).expect("in range");
        Attention::new()
            .forward_into(&q, &q, &q, &mut out, &mut lse)
            .expect("valid");
    });
    assert_eq!(out.to_vec().expect("cpu"), whole.out.to_vec().expect("cpu"));
    assert_eq!(lse.to_vec().expect("cpu"), whole.lse.to_vec().expect("cpu"));
}

/// Runs one head of f32 on the CPU and by the oracle.
fn both(attention: Attention, shape: [usize; 4], q: &[f32], k: &[f32], v: &[f32]) -> [(Vec<f32>, Vec<f64>); 2] {
    let device = Device::cpu();
    let tensor = |data: &[f32]| Tensor::from_slice(&device, shape, data).expect("small");
    let output = attention.forward(&tensor(q), &tensor(k), &tensor(v)).expect("valid");
    let widen = |data: &[f32]| data.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let (out, lse) = reference::forward(&Dims::new(&attention, shape, shape), &widen(q), &widen(k), &widen(v));
    [
        (output.out.to_vec().expect("cpu"), out),
        (output.lse.to_vec().expect("cpu"), lse),
    ]
}

#[test]
fn what_is_not_finite_goes_where_arithmetic_takes_it() {
    let shape = [1, 1, 150, 8];
    let base: Vec<f32> = noise(150 * 8, 11).into_iter().map(|x| x as f32).collect();
    let with = |place: usize, value: f32| {
        let mut data = base.clone();
        data[place] = value;
        data
    };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for row in [0, 70, 149] {
            let odd = with(row * 8 + 3, value);
            for attention in [Attention::new(), Attention::new().causal()] {
                for (q, k, v) in [(&odd, &base, &base), (&base, &odd, &base), (&base, &base, &odd)] {
                    for (got, want) in both(attention.clone(), shape, q, k, v) {
                        assert!(largest_error(&got, &want) < 1e-5, "{value} in row {row}, {attention:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn scores_that_are_all_minus_infinity_divide_zero_by_zero() {
    let shape = [1, 1, 3, 8];
    let (q, k) = (vec![1.0; 24], vec![f32::NEG_INFINITY; 24]);
    let [(out, want_out), (lse, want_lse)] = both(Attention::new(), shape, &q, &k, &q);
    assert!(out.iter().all(|x| x.is_nan()) && want_out.iter().all(|x| x.is_nan()));
    assert!(lse == [f32::NEG_INFINITY; 3] && want_lse == [f64::NEG_INFINITY; 3]);
}

#[test]
fn instruction_sets_are_chosen_by_name() {
    let names: Vec<String> = instruction_sets().iter().map(Device::name).collect();
    assert!(names.iter().any(|name| name.contains("portable")), "{names:?}");
    assert!("cpu:portable".parse::<Device>().is_ok());
    let error = "cpu:mmx"
        .parse::<Device>()
        .expect_err("no such instructions")
        .to_string();
    assert!(error.contains("\"mmx\"") && error.contains("portable"), "{error}");
    #[cfg(target_arch = "x86_64")]
    let sets = [
        ("cpu:avx512", "AVX-512", is_x86_feature_detected!("avx512vl")),
        ("cpu:avx2", "AVX2", is_x86_feature_detected!("avx2")),
    ];
    #[cfg(target_arch = "aarch64")]
    let sets = [
        (
            "cpu:neonbf16",
            "NEON and BF16",
            std::arch::is_aarch64_feature_detected!("bf16"),
        ),
        ("cpu:neon", "NEON", true),
    ];
    #[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
    for (key, name, present) in sets {
        let named = names.iter().any(|found| found.contains(name));
        assert_eq!((named, key.parse::<Device>().is_ok()), (present, present), "{key}");
    }
}

#[test]
fn keys_are_taken_in_segments_whoever_takes_them() {
    // One head and few queries: with many threads each segment of keys is a task, with one they follow each other.
    for (seqlen_q, seqlen_k, attention) in [
        (1, 9000, Attention::new()),
        (3, 4100, Attention::new().causal()),
        (70, 5000, Attention::new().causal()),
    ] {
        check::<f32>(attention.clone(), [1, 1, seqlen_q, 16], [1, 1, seqlen_k, 16]);
        let data: Vec<f32> = noise(seqlen_k * 16, 5).into_iter().map(|x| x as f32).collect();
        let run = |threads| {
            let device = Device::cpu_with_threads(threads).expect("threads");
            let q = Tensor::from_slice(&device, [1, 1, seqlen_q, 16], &data[..seqlen_q * 16]).expect("small");
            let k = Tensor::from_slice(&device, [1, 1, seqlen_k, 16], &data).expect("small");
            let output = attention.forward(&q, &k, &k).expect("valid");
            (output.out.to_vec().expect("cpu"), output.lse.to_vec().expect("cpu"))
        };
        let one = run(1);
        for threads in [2, 3, 16] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}
