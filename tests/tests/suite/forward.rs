//! Tests of forward attention on every device against the f64 oracle: tile edges, every compiled kernel, every memory
//! layout.

use flash_attention::device::DeviceKind;
use flash_attention::{Attention, Dtype, Output, Statistics, Tensor};
use flash_attention_kernels::entries::{ENTRIES, Pass};
use flash_attention_tests::{Case, Layout, Order, devices, for_dtype};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Tests the lengths with which FlashAttention's own tests break tiles.
#[test]
fn lengths_that_break_tiles() {
    for (i, (seqlen_q, seqlen_k)) in [(1, 1), (113, 203), (239, 1), (1, 799)].into_iter().enumerate() {
        for causal in [false, true] {
            let dtype = DTYPES[(i + usize::from(causal)) % 3];
            Case::one_head(dtype, seqlen_q, seqlen_k, 32).masked(causal).check();
        }
    }
}

/// Tests long sequences on all devices but the emulator, which is too slow for them.
#[test]
fn long_lengths_that_break_tiles() {
    for dtype in DTYPES {
        for causal in [false, true] {
            for (seqlen_q, seqlen_k) in [
                (1, 1),
                (113, 203),
                (239, 1),
                (1, 799),
                (799, 1),
                (1023, 1024),
                (1024, 1023),
            ] {
                Case::one_head(dtype, seqlen_q, seqlen_k, 32)
                    .masked(causal)
                    .check_on(devices().native());
            }
        }
    }
}

/// Tests lengths one less than, equal to and one more than the tiles of the kernel that serves them.
#[test]
fn lengths_around_the_tiles() {
    for (i, dtype) in DTYPES.into_iter().enumerate() {
        let entry = ENTRIES
            .iter()
            .find(|e| e.pass == Pass::Forward && e.dtype == dtype && e.head_dim == 32)
            .expect("every dtype has a kernel of head_dim 32");
        let (m, n) = (entry.block_m as usize, entry.block_n as usize);
        for (j, (seqlen_q, seqlen_k)) in [(m - 1, n + 1), (m, n), (m + 1, n - 1), (m, 2 * n)]
            .into_iter()
            .enumerate()
        {
            Case::one_head(dtype, seqlen_q, seqlen_k, 32)
                .masked((i + j) % 2 == 0)
                .check();
        }
    }
}

/// Tests that for the first queries, which see no key, out is 0 and lse minus infinity, in whole tiles and parts of
/// tiles.
#[test]
fn more_queries_than_keys_under_a_causal_mask() {
    for (dtype, seqlen_q, seqlen_k) in [
        (Dtype::F32, 150, 20),
        (Dtype::F32, 65, 64),
        (Dtype::F16, 300, 30),
        (Dtype::Bf16, 129, 1),
    ] {
        Case::one_head(dtype, seqlen_q, seqlen_k, 40)
            .with(Attention::new().causal())
            .check();
    }
}

/// Tests every multiple of 8, each with another dtype and mask than the one before. Not every width has a kernel of
/// its own.
#[test]
fn every_head_dim() {
    for (i, head_dim) in (8..=256).step_by(8).enumerate() {
        Case::one_head(DTYPES[i % 3], 5, 37, head_dim)
            .masked(i / 3 % 2 == 0)
            .check();
    }
}

/// head_dim of q and k, and of v: those of models, and pairs that leave whole panels of a tile empty.
pub const HEAD_DIMS: [[usize; 2]; 8] = [
    [192, 128],
    [64, 32],
    [32, 64],
    [128, 192],
    [40, 24],
    [24, 104],
    [8, 256],
    [256, 8],
];

/// Tests values of another head_dim than that of the keys, for many and for few queries, with heads that share keys.
#[test]
fn values_of_another_head_dim() {
    for (i, [head_dim, head_dim_v]) in HEAD_DIMS.into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            for seqlen_q in [70, 3] {
                Case::new(dtype, [1, 2, seqlen_q, head_dim], [1, 1, 90, head_dim])
                    .with_head_dim_v(head_dim_v)
                    .masked((i + j) % 2 == 0)
                    .check_on(devices().of_every_instruction_set());
            }
        }
    }
}

/// Tests latent attention on the CPU: values are the first 512 elements of keys of 576, which all heads share.
#[test]
fn values_that_are_a_part_of_their_keys() {
    for device in devices()
        .of_every_instruction_set()
        .filter(|device| device.kind() == DeviceKind::Cpu)
    {
        for (dtype, seqlen_q, causal) in [(Dtype::F32, 1, true), (Dtype::F16, 2, false), (Dtype::Bf16, 40, true)] {
            let case = Case::new(dtype, [2, 4, seqlen_q, 576], [2, 1, 90, 576])
                .with_head_dim_v(512)
                .masked(causal);
            case.check_on([device]);
            for_dtype!(dtype, T => {
                let inputs = case.inputs::<T>();
                let [q, latent] = [(case.q, &inputs.q), (case.kv, &inputs.k)]
                    .map(|(shape, elements)| Tensor::from_slice(device, shape, elements).expect("it fits"));
                let values = latent.narrow(3, 0, 512).expect("a view");
                let shared = case.attention.forward(&q, &latent, &values).expect("it fits");
                let copied = case.attention.forward(&q, &latent, &values.contiguous().expect("a copy")).expect("it fits");
                let read = |output: &Output<T>| output.out.to_vec().expect("read");
                assert_eq!(read(&shared), read(&copied), "{case:?} on {device}");
            });
        }
    }
}

/// Tests every row of the table of compiled kernels, at its own width and one step below, with several key blocks.
#[test]
fn every_compiled_kernel() {
    for entry in ENTRIES.iter().filter(|entry| entry.pass == Pass::Forward) {
        // A kernel in clusters has a tile of queries for each block.
        let seqlen_q = ((entry.cluster - 1) * entry.block_m) as usize + 18;
        let seqlen_k = entry.block_n as usize + 9;
        for head_dim in [entry.head_dim as usize, entry.head_dim as usize - 8] {
            let case = Case::one_head(entry.dtype, seqlen_q, seqlen_k, head_dim).masked(entry.causal);
            case.check();
        }
        let narrow = Case::one_head(entry.dtype, seqlen_q, seqlen_k, 16).masked(entry.causal);
        narrow.with_head_dim_v(entry.head_dim as usize).check();
    }
}

#[test]
fn query_heads_share_key_heads() {
    for (dtype, heads_q, heads_kv) in [(Dtype::F32, 6, 2), (Dtype::F16, 4, 1), (Dtype::Bf16, 3, 3)] {
        Case::new(dtype, [2, heads_q, 9, 16], [2, heads_kv, 21, 16]).check();
        Case::new(dtype, [2, heads_q, 9, 16], [2, heads_kv, 21, 16])
            .masked(true)
            .check();
    }
}

/// Tests the shapes of models: grouped heads, both masks, all dtypes, several tiles of queries and keys.
#[test]
fn heads_of_models() {
    for dtype in DTYPES {
        for (head_dim, causal) in [(64, false), (80, true), (128, true)] {
            Case::new(dtype, [1, 4, 300, head_dim], [1, 2, 333, head_dim])
                .masked(causal)
                .check_on(devices().native());
        }
    }
}

#[test]
fn scales_of_every_sign_and_size() {
    for dtype in DTYPES {
        for scale in [-0.5, 0.0, -0.0, 1e-3, 8.0, -8.0, f32::MIN_POSITIVE] {
            Case::one_head(dtype, 19, 70, 24)
                .with(Attention::new().softmax_scale(scale))
                .check();
            Case::one_head(dtype, 19, 70, 24)
                .with(Attention::new().causal().softmax_scale(scale))
                .check();
        }
    }
}

/// Tests scores in the hundreds: one key has all the weight, and a late maximum rescales earlier sums to nearly 0.
#[test]
fn scores_that_overflow_without_their_maximum() {
    for dtype in DTYPES {
        let mut case = Case::one_head(dtype, 33, 150, 32);
        case.deviation = 6.0;
        case.check();
        case.masked(true).check();
    }
}

/// Tests that the memory layout does not matter: 16-byte copies, copies by element, gaps, broadcasts.
#[test]
fn every_layout() {
    for (i, layout) in Layout::EVERY.into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            Case::new(dtype, [2, 2, 20, 40], [2, 1, 67, 40])
                .masked((i + j) % 2 == 0)
                .laid_out([layout; 4])
                .check();
        }
    }
}

#[test]
fn one_odd_tensor_among_aligned_ones() {
    let odd = Layout::new(Order::Bhsd, 5, 3);
    for which in 0..4 {
        let mut layouts = [Layout::default(); 4];
        layouts[which] = odd;
        Case::new(DTYPES[which % 3], [1, 2, 20, 24], [1, 2, 40, 24])
            .laid_out(layouts)
            .check();
    }
}

#[test]
fn inputs_that_repeat_in_memory() {
    for (axis, dtype) in [(0, Dtype::F16), (1, Dtype::F32), (2, Dtype::Bf16), (1, Dtype::F16)] {
        let repeat = Layout::default().broadcast(axis);
        Case::new(dtype, [2, 4, 12, 16], [2, 2, 30, 16])
            .laid_out([repeat, repeat, repeat, Layout::default()])
            .check();
    }
}

/// The CPU writes and reads lse, row_max and row_sum of any strides.
#[test]
fn statistics_of_any_strides_on_the_cpu() {
    let shape = [2, 4, 9, 16];
    for device in devices().all().filter(|device| device.kind() == DeviceKind::Cpu) {
        let data: Vec<f32> = (0..2 * 4 * 9 * 16).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Tensor::from_slice(device, shape, &data).expect("small");
        let attention = Attention::new().causal();
        for queries in [9, 3] {
            let q = x.narrow(2, 0, queries).expect("in range");
            let together = attention.forward(&q, &x, &x).expect("valid");
            // [batch, seqlen, heads] memory, and a part of longer rows.
            let transposed = || Tensor::<f32>::zeros(device, [2, queries, 4]).and_then(|memory| memory.transpose(1, 2));
            let narrowed = || {
                Tensor::<f32>::zeros(device, [2, 5, 20])
                    .and_then(|memory| memory.narrow(1, 1, 4)?.narrow(2, 7, queries))
            };
            let mut output = Output::new(
                Tensor::zeros(device, q.shape()).expect("small"),
                transposed().expect("small"),
            );
            output.statistics = Some(Statistics {
                row_max: narrowed().expect("small"),
                row_sum: transposed().expect("small"),
            });
            attention.forward_into_output(&q, &x, &x, &mut output).expect("valid");
            let bits = |output: &Output<f32>| {
                let Statistics { row_max, row_sum } = output.statistics.as_ref().expect("there");
                [&output.lse, row_max, row_sum, &output.out].map(|x| x.to_vec().expect("read"))
            };
            assert_eq!(bits(&output), bits(&together), "{device}");
            for without in [false, true] {
                let (mut output, mut together) = (output.clone(), together.clone());
                if without {
                    (output.statistics, together.statistics) = (None, None);
                }
                let [got, want] =
                    [&output, &together].map(|output| attention.backward(&q, &x, &x, output, &q).expect("valid"));
                assert_eq!(
                    got.dk.to_vec().expect("read"),
                    want.dk.to_vec().expect("read"),
                    "{device}"
                );
            }
        }
    }
}
