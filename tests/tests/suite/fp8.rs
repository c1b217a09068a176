//! Attention over quantised inputs, on every device that has it, against the oracle over the numbers that they stand for.

use flash_attention::device::{DeviceInfo, DeviceKind};
use flash_attention::half::{bf16, f16};
use flash_attention::problem::FP8_SCALE_ROWS;
use flash_attention::{Attention, Device, F8E4M3, Half, Quantized, Tensor};
use flash_attention_tests::fp8::{Fp8Case, fp8_devices};
use flash_attention_tests::{devices, drawn, files};
use proptest::prelude::*;

const ROWS: usize = FP8_SCALE_ROWS as usize;

#[test]
fn the_devices_with_fp8_are_these() {
    let names: Vec<String> = fp8_devices().map(Device::to_string).collect();
    let has_fp8 = |device: &&Device| match device.info() {
        DeviceInfo::Gpu { compute_capability, .. } => compute_capability == (9, 0),
        _ => true,
    };
    let expected = devices().all().filter(has_fp8);
    assert_eq!(names, expected.map(Device::to_string).collect::<Vec<_>>());
}

#[test]
fn every_head_dim_on_the_edges_of_tiles_and_of_scales() {
    for head_dim in [16, 64, 80, 96, 128, 192, 256] {
        for (seqlen_q, seqlen_k) in [(1, 1), (63, 65), (129, 127)] {
            for causal in [false, true] {
                Fp8Case::one_head(seqlen_q, seqlen_k, head_dim).masked(causal).check();
            }
        }
    }
}

#[test]
fn head_dims_of_8_on_the_cpu() {
    for head_dim in [8, 24, 40, 136] {
        let case = Fp8Case::one_head(70, 90, head_dim);
        case.check_of(&case.inputs(), cpus());
    }
}

#[test]
fn every_instruction_set_agrees_with_the_oracle() {
    for causal in [false, true] {
        let case = Fp8Case::new([1, 2, 150, 72], [1, 1, 130, 72]).masked(causal);
        let sets = devices().of_every_instruction_set();
        case.check_of(&case.inputs(), sets.filter(|device| device.kind() == DeviceKind::Cpu));
    }
}

#[test]
fn scales_by_heads_and_by_blocks_mix() {
    for kinds in 0..8 {
        let by_blocks = [0, 1, 2].map(|input| kinds >> input & 1 == 1);
        let case = Fp8Case::new([2, 4, 2 * ROWS + 3, 64], [2, 2, 3 * ROWS + 1, 64]).masked(true);
        Fp8Case { by_blocks, ..case }.check();
    }
}

/// Scales of which neighbours are far apart: each row has to take its own.
#[test]
fn scales_that_differ_a_thousandfold() {
    let case = Fp8Case::new([1, 2, 3 * ROWS, 64], [1, 1, 4 * ROWS, 64]);
    let mut inputs = case.inputs();
    for (of_input, codes) in inputs.iter_mut().enumerate() {
        for (block, scale) in codes.scales.iter_mut().enumerate() {
            *scale *= [1.0, 1.0 / 32.0, 32.0, 4.0][(block + of_input) % 4];
        }
    }
    case.check_of(&inputs, fp8_devices());
}

#[test]
fn memory_in_other_orders_and_with_gaps() {
    for (seqlen_first, gap) in [(true, 0), (false, 32), (true, 64)] {
        let case = Fp8Case::new([2, 4, 70, 64], [2, 2, 90, 64]).masked(true);
        Fp8Case {
            seqlen_first,
            gap,
            ..case
        }
        .check();
    }
    // Rows of no multiple of 16 bytes.
    let case = Fp8Case {
        gap: 6,
        ..Fp8Case::new([2, 2, 70, 64], [2, 1, 90, 64])
    };
    case.check_of(&case.inputs(), cpus());
}

#[test]
fn other_softmax_scales() {
    for (scale, on) in [(0.02, all()), (3.0, all()), (-0.3, cpus()), (0.0, cpus())] {
        let attention = Attention::new().causal().softmax_scale(scale);
        let case = Fp8Case {
            attention,
            ..Fp8Case::one_head(100, 140, 64)
        };
        case.check_of(&case.inputs(), on);
    }
}

fn all() -> Vec<&'static Device> {
    fp8_devices().collect()
}

fn cpus() -> Vec<&'static Device> {
    fp8_devices()
        .filter(|device| device.kind() == DeviceKind::Cpu)
        .collect()
}

fn drawn_case() -> impl Strategy<Value = Fp8Case> {
    let length = || prop_oneof![1..=9_usize, 50..=80_usize, 1..=300_usize];
    let heads = (1..=2_usize, 1..=2_usize, 1..=3_usize);
    let head_dim = prop_oneof![3 => 1..=8_usize, 1 => 9..=16_usize];
    let attention = (
        any::<bool>(),
        prop_oneof![2 => Just(None), 1 => (0.01_f32..2.0).prop_map(Some)],
    );
    let memory = (any::<bool>(), prop_oneof![Just(0_usize), Just(32)]);
    let numbers = (
        any::<[bool; 3]>(),
        prop_oneof![Just(1.0_f32), 0.01_f32..3.0],
        any::<u16>(),
    );
    (heads, length(), length(), head_dim, attention, memory, numbers).prop_map(
        |((batch, heads_kv, group), seqlen_q, seqlen_k, head_dim, (causal, scale), (seqlen_first, gap), numbers)| {
            let (by_blocks, deviation, seed) = numbers;
            let (kv, head_dim) = ([batch, heads_kv, seqlen_k], 16 * head_dim);
            let attention = scale.map_or(Attention::new(), |scale| Attention::new().softmax_scale(scale));
            let q = [batch, heads_kv * group, seqlen_q, head_dim];
            Fp8Case {
                attention,
                by_blocks,
                seqlen_first,
                gap,
                deviation,
                seed: seed.into(),
                ..Fp8Case::new(q, [kv[0], kv[1], kv[2], head_dim])
            }
            .masked(causal)
        },
    )
}

proptest! {
    #![proptest_config(drawn::config(24))]

    #[test]
    fn drawn_cases(case in drawn_case()) {
        case.check();
    }
}

/// NaN in keys and values that the causal mask hides, and in gaps, reaches no result; in a visible one it does.
#[test]
fn hidden_keys_of_nan_have_no_effect() {
    let (seqlen_q, seqlen_k) = (ROWS + 20, ROWS + 7);
    // Queries of the first 13 rows see nothing.
    let case = Fp8Case::new([1, 2, seqlen_q, 64], [1, 1, seqlen_k, 64]).masked(true);
    let clean = case.inputs();
    for device in fp8_devices() {
        let want = case.run::<f16>(&clean, device);
        for (input, first_row) in [(1, 40), (2, 40), (1, seqlen_k - 1), (2, seqlen_k - 1)] {
            let mut poisoned = clean.clone();
            poisoned[input].codes[first_row * 64..].fill(F8E4M3::NAN);
            let got = case.run::<f16>(&poisoned, device);
            // Query i sees keys up to i + seqlen_k - seqlen_q.
            let seeing = first_row + seqlen_q - seqlen_k;
            for (index, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
                let query = index / 64 % seqlen_q;
                if query < seeing {
                    assert_eq!(got.to_bits(), want.to_bits(), "query {query} of {input} on {device}");
                } else {
                    assert!(got.is_nan(), "query {query} of {input} on {device}: {got}");
                }
            }
        }
    }
}

#[test]
fn queries_of_nan_stay_in_their_rows() {
    let case = Fp8Case::one_head(70, 90, 64);
    let clean = case.inputs();
    let mut poisoned = clean.clone();
    poisoned[0].codes[64 * 33] = F8E4M3::NAN;
    for device in fp8_devices() {
        let (want, got) = (case.run::<bf16>(&clean, device), case.run::<bf16>(&poisoned, device));
        for (index, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
            match index / 64 {
                33 => assert!(got.is_nan(), "{index} on {device}: {got}"),
                _ => assert_eq!(got.to_bits(), want.to_bits(), "{index} on {device}"),
            }
        }
    }
}

#[test]
fn nothing_of_something_and_something_of_nothing() {
    for [q, k] in [
        [[0, 2, 5], [0, 1, 7]],
        [[2, 0, 5], [2, 1, 7]],
        [[2, 4, 0], [2, 2, 70]],
        [[2, 4, 5], [2, 2, 0]],
    ] {
        for by_blocks in [false, true] {
            for device in fp8_devices() {
                let x = |[batch, heads, seqlen]: [usize; 3]| {
                    let shape = [batch, heads, seqlen, 64];
                    let tensor =
                        Tensor::from_slice(device, shape, &vec![1.0_f32; shape.iter().product()]).expect("small");
                    let quantized = if by_blocks {
                        Quantized::by_blocks(&tensor)
                    } else {
                        Quantized::by_heads(&tensor)
                    };
                    let quantized = quantized.expect("four axes");
                    assert_eq!(
                        quantized.scales().shape(),
                        [batch, heads, seqlen.div_ceil(if by_blocks { ROWS } else { 99 }).max(1)]
                    );
                    quantized
                };
                let output = Attention::new()
                    .forward_fp8::<f16>(&x(q), &x(k), &x(k))
                    .expect("no elements");
                assert!(
                    output.out.to_vec().expect("read").iter().all(|x| x.to_f32() == 0.0),
                    "{q:?} on {device}"
                );
                assert!(
                    output
                        .lse
                        .to_vec()
                        .expect("read")
                        .iter()
                        .all(|&x| x == f32::NEG_INFINITY),
                    "{q:?} on {device}"
                );
            }
        }
    }
}

#[test]
fn the_calls_agree() {
    fn check<O: Half>(case: &Fp8Case, device: &Device) {
        let inputs = case.inputs();
        let [q, k, v] = [0, 1, 2].map(|input| inputs[input].place(device, false, 0));
        let output = case.attention.forward_fp8::<O>(&q, &k, &v).expect("a device with FP8");
        let (out, lse, [row_max, row_sum]) = case.run::<O>(&inputs, device);
        let statistics = output.statistics.expect("always kept");
        let got = [output.lse, statistics.row_max, statistics.row_sum];
        assert_eq!(output.out.to_vec().expect("read"), out, "{device}");
        assert_eq!(
            got.map(|rows| rows.to_vec().expect("read")),
            [lse, row_max, row_sum],
            "{device}"
        );
        let plan = case.attention.plan_fp8::<O>(&q, &k, &v).expect("a device with FP8");
        assert_eq!(plan.problem().dtype(), O::DTYPE);
        assert!(
            plan.to_string().contains(&format!("f8e4m3 to {}", O::DTYPE.name())),
            "{plan}"
        );
    }
    for device in fp8_devices() {
        let case = Fp8Case::new([1, 2, 70, 64], [1, 1, 150, 64]).masked(true);
        check::<f16>(&case, device);
        check::<bf16>(&case, device);
    }
}

#[test]
fn reports_end_and_change_no_bit() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let case = Fp8Case::new([1, 2, 70, 64], [1, 1, 150, 64]);
    for device in fp8_devices() {
        let [q, k, v] = case.inputs().map(|input| input.place(device, false, 0));
        let left = AtomicU64::new(u64::MAX);
        let reporting = case.attention.clone().on_progress(|progress| {
            left.store(progress.total - progress.done, Ordering::Relaxed);
        });
        let output = reporting.forward_fp8::<f16>(&q, &k, &v).expect("a device with FP8");
        let (out, ..) = case.run::<f16>(&case.inputs(), device);
        assert_eq!(output.out.to_vec().expect("read"), out, "{device}");
        assert!(device.kind() == DeviceKind::Cuda || left.into_inner() == 0, "{device}");
    }
}

/// Tensors of codes are stored, read and viewed as all others are.
#[test]
fn tensors_of_codes_on_every_device() {
    let codes: Vec<F8E4M3> = (0..=255).map(F8E4M3::from_bits).collect();
    let bits = |codes: &[F8E4M3]| codes.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for device in devices().all() {
        let tensor = Tensor::from_slice(device, [4, 64], &codes).expect("small");
        assert_eq!(bits(&tensor.to_vec().expect("read")), bits(&codes), "{device}");
        let column = tensor.narrow(1, 7, 1).and_then(|column| column.to_vec()).expect("read");
        assert_eq!(bits(&column), [7, 71, 135, 199], "{device}");
        let turned = tensor
            .transpose(0, 1)
            .and_then(|turned| turned.contiguous())
            .expect("read");
        assert_eq!(bits(&turned.to_vec().expect("read")[..3]), [0, 64, 128], "{device}");
        assert_eq!(
            bits(
                &Tensor::zeros(device, [3])
                    .and_then(|zeros| zeros.to_vec())
                    .expect("read")
            ),
            [0; 3]
        );
    }
}

#[test]
fn quantised_numbers_come_back_within_half_a_step() {
    let shape = [2, 3, 2 * ROWS + 5, 48];
    let numbers = files::normal(shape.iter().product(), 3.0, 5);
    for device in devices().all() {
        let tensor = Tensor::from_slice(device, shape, &numbers).expect("small");
        let heads_first = tensor.transpose(1, 2).expect("axes").contiguous().expect("small");
        let strided = heads_first.transpose(1, 2).expect("axes");
        for tensor in [tensor, strided] {
            for (quantized, rows) in [
                (Quantized::by_heads(&tensor).expect("four axes"), shape[2]),
                (Quantized::by_blocks(&tensor).expect("four axes"), ROWS),
            ] {
                check_round_trip(&quantized, &numbers, rows);
            }
        }
    }
}

/// Checks that scales are those of the largest magnitudes of their rows, and that no number has moved further than it must.
fn check_round_trip(quantized: &Quantized, numbers: &[f32], rows: usize) {
    let [_, _, seqlen, head_dim] = quantized.shape().try_into().expect("four axes");
    let (scales, back) = (
        quantized.scales().to_vec().expect("read"),
        quantized.dequantize::<f32>().expect("read"),
    );
    let back = back.to_vec().expect("read");
    let (heads, heads_back) = (numbers.chunks(seqlen * head_dim), back.chunks(seqlen * head_dim));
    let blocks = heads
        .zip(heads_back)
        .flat_map(|(head, back)| head.chunks(rows * head_dim).zip(back.chunks(rows * head_dim)));
    let mut count = 0;
    for ((block, back), scale) in blocks.zip(&scales) {
        let largest = block.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        assert_eq!(*scale, largest / 448.0);
        for (x, back) in block.iter().zip(back) {
            // Half of the last of four bits, or half of 2^-9 times the scale.
            let step = (x.abs() / 16.0).max(scale / 1024.0) * 1.000_001;
            assert!((x - back).abs() <= step, "{x} became {back} with the scale {scale}");
        }
        count += 1;
    }
    assert_eq!(count, scales.len());
}

#[test]
fn numbers_that_are_not_finite_and_blocks_of_zeros() {
    let mut numbers = vec![0.0_f32; 2 * ROWS * 8];
    numbers[3] = f32::NAN;
    numbers[4] = f32::INFINITY;
    numbers[5] = f32::NEG_INFINITY;
    numbers[6] = 2.0;
    numbers[7] = f32::from_bits(1);
    let tensor = Tensor::from_slice(&Device::cpu(), [1, 1, 2 * ROWS, 8], &numbers).expect("small");
    let quantized = Quantized::by_blocks(&tensor).expect("four axes");
    assert_eq!(quantized.scales().to_vec().expect("read"), [2.0 / 448.0, 1.0]);
    let codes = quantized.data().to_vec().expect("read");
    assert!(codes[3..6].iter().all(|code| code.is_nan()));
    assert_eq!((codes[6], codes[7].to_f32()), (F8E4M3::MAX, 0.0));
    // The smallest numbers of f32 have a scale that is a number still.
    let tiny = Tensor::from_slice(&Device::cpu(), [1, 1, 1, 8], &[f32::from_bits(1); 8]).expect("small");
    let quantized = Quantized::by_heads(&tiny).expect("four axes");
    assert_eq!(quantized.scales().to_vec().expect("read"), [f32::MIN_POSITIVE]);
}
