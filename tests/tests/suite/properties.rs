//! Properties of attention for any inputs, on every device, to the bit where arithmetic allows.

use flash_attention::half::{bf16, f16};
use flash_attention::{Arch, Attention, Device, Dtype, Element};
use flash_attention_tests::{Case, Inputs, Layout, Order, Outcome, devices, files, largest_error};

/// Returns the bits of a result, for comparisons to the bit.
fn bits<T: Element>(outcome: &Outcome<T>) -> (Vec<u64>, Vec<u32>) {
    let out = outcome.out.iter().map(|x| x.to_f64().to_bits()).collect();
    (out, outcome.lse.iter().map(|x| x.to_bits()).collect())
}

/// Solves a case on a device, with inputs drawn from its seed.
fn solve<T: Element>(case: &Case, device: &Device) -> Outcome<T> {
    case.run(device, &case.inputs::<T>()).1
}

#[test]
fn the_same_call_gives_the_same_bits() {
    fn check<T: Element>() {
        let case = Case::new(T::DTYPE, [1, 2, 70, 40], [1, 1, 150, 40]);
        for device in devices().all() {
            let first = bits(&solve::<T>(&case, device));
            for _ in 0..3 {
                assert_eq!(bits(&solve::<T>(&case, device)), first, "{device}");
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn the_number_of_threads_does_not_show() {
    for causal in [false, true] {
        let case = Case::new(Dtype::F32, [2, 3, 300, 64], [2, 3, 333, 64]).masked(causal);
        let run = |threads| {
            bits(&solve::<f32>(
                &case,
                &Device::cpu_with_threads(threads).expect("threads"),
            ))
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(run(threads), one, "{threads} threads");
        }
    }
}

/// Tests that the memory layout affects only how tensors are copied, not the results. The choice of the kernel may
/// depend on their alignment: Hopper's kernels need rows of a multiple of 16 bytes.
#[test]
fn the_layout_does_not_show() {
    fn check<T: Element>(causal: bool) {
        let attention = if causal {
            Attention::new().causal()
        } else {
            Attention::new()
        };
        let case = Case::new(T::DTYPE, [2, 2, 30, 40], [2, 2, 70, 40]);
        let aligned = [Layout::new(Order::Bshd, 0, 0), Layout::new(Order::Bhsd, 16, 8)];
        let any = [aligned[0], aligned[1], Layout::new(Order::Bshd, 5, 3)];
        check_layouts::<T>(&case.clone().with(attention.clone()), &aligned);
        check_layouts::<T>(&case.with(attention.arch(Arch::Sm80)), &any);
    }
    fn check_layouts<T: Element>(case: &Case, layouts: &[Layout]) {
        for device in devices().all() {
            let contiguous = bits(&solve::<T>(case, device));
            for &layout in layouts {
                let elsewhere = case.clone().laid_out([layout; 4]);
                assert_eq!(
                    bits(&solve::<T>(&elsewhere, device)),
                    contiguous,
                    "{layout:?} on {device}"
                );
            }
        }
    }
    check::<f32>(false);
    check::<f16>(true);
    check::<bf16>(false);
}

/// Tests that heads and batch entries are independent: each alone gives the same bits as among others.
#[test]
fn heads_are_solved_as_if_alone() {
    let (seqlen_q, seqlen_k, head_dim) = (20, 70, 16);
    let all = Case::new(Dtype::F16, [2, 4, seqlen_q, head_dim], [2, 2, seqlen_k, head_dim]).masked(true);
    let inputs = all.inputs::<f16>();
    for device in devices().all() {
        let together = all.run(device, &inputs).1;
        for head in 0..8 {
            let kv_head = head / 2; // two query heads share one
            let slice =
                |data: &[f16], head: usize, rows: usize| data[head * rows * head_dim..][..rows * head_dim].to_vec();
            let alone = Case::one_head(Dtype::F16, seqlen_q, seqlen_k, head_dim).masked(true);
            let outcome = alone.run(
                device,
                &Inputs {
                    q: slice(&inputs.q, head, seqlen_q),
                    k: slice(&inputs.k, kv_head, seqlen_k),
                    v: slice(&inputs.v, kv_head, seqlen_k),
                },
            );
            assert_eq!(
                outcome.1.out,
                slice(&together.out, head, seqlen_q),
                "head {head} on {device}"
            );
            assert_eq!(outcome.1.lse, together.lse[head * seqlen_q..][..seqlen_q]);
        }
    }
}

/// Tests that a power of two can move between q and the scale without any change: it is not rounded.
#[test]
fn scales_by_powers_of_two_are_exact() {
    let scale = 0.25;
    let scaled = |scale| Case::one_head(Dtype::F32, 20, 70, 16).with(Attention::new().softmax_scale(scale));
    let inputs = scaled(scale).inputs::<f32>();
    let mut fourfold = inputs.clone();
    fourfold.q.iter_mut().for_each(|x| *x *= -4.0);
    for device in devices().all() {
        let here = scaled(scale).run(device, &inputs).1;
        let there = scaled(-scale / 4.0).run(device, &fourfold).1;
        assert_eq!(bits(&here), bits(&there), "{device}");
    }
}

/// Tests that if all values are equal, the output is that value for any scores.
#[test]
fn averages_of_one_value_are_that_value() {
    for device in devices().all() {
        for causal in [false, true] {
            let case = Case::one_head(Dtype::F32, 67, 67, 8).masked(causal);
            let mut inputs = case.inputs::<f32>();
            inputs.v.iter_mut().for_each(|x| *x = 3.0);
            let (_, outcome) = case.run(device, &inputs);
            let error = largest_error(&outcome.out, &vec![3.0; 67 * 8]);
            assert!(error <= 2e-6, "off by {error:e} on {device}");
        }
    }
}

/// Tests that with a scale of 0 the output is the mean of the visible values, and lse the logarithm of their number.
#[test]
fn a_scale_of_zero_takes_means() {
    let (seqlen, head_dim) = (70, 8);
    let case = Case::one_head(Dtype::F32, seqlen, seqlen, head_dim).with(Attention::new().softmax_scale(0.0).causal());
    let inputs = case.inputs::<f32>();
    let mean = |row: usize, column: usize| -> f64 {
        let sum: f64 = (0..=row).map(|key| f64::from(inputs.v[key * head_dim + column])).sum();
        sum / (row + 1) as f64
    };
    let means: Vec<f64> = (0..seqlen * head_dim)
        .map(|i| mean(i / head_dim, i % head_dim))
        .collect();
    let counts: Vec<f64> = (0..seqlen).map(|row| ((row + 1) as f64).ln()).collect();
    for device in devices().all() {
        let (_, outcome) = case.run(device, &inputs);
        let errors = [
            largest_error(&outcome.out, &means),
            largest_error(&outcome.lse, &counts),
        ];
        assert!(
            errors.iter().all(|&error| error <= 2e-6),
            "off by {errors:?} on {device}"
        );
    }
}

/// Tests that attention over two sets of keys can be merged by lse.
#[test]
fn two_sets_of_keys_merge_by_their_lse() {
    let (rows, keys, head_dim) = (9, 100, 16);
    let whole = Case::one_head(Dtype::F32, rows, keys, head_dim);
    let inputs = whole.inputs::<f32>();
    let part = |from: usize, to: usize| Inputs {
        q: inputs.q.clone(),
        k: inputs.k[from * head_dim..to * head_dim].to_vec(),
        v: inputs.v[from * head_dim..to * head_dim].to_vec(),
    };
    for device in devices().all() {
        let solve = |from: usize, to: usize| {
            let case = Case::one_head(Dtype::F32, rows, to - from, head_dim);
            case.run(device, &part(from, to)).1
        };
        let (left, right, all) = (solve(0, 37), solve(37, keys), solve(0, keys));
        let merged: Vec<f64> = (0..rows * head_dim)
            .map(|i| {
                let weight = |side: &Outcome<f32>| f64::from(side.lse[i / head_dim]).exp();
                let sum = weight(&left) + weight(&right);
                (weight(&left) * f64::from(left.out[i]) + weight(&right) * f64::from(right.out[i])) / sum
            })
            .collect();
        let error = largest_error(&all.out, &merged);
        assert!(error <= 2e-6, "off by {error:e} on {device}");
    }
}

/// Tests that the order of the keys matters only to rounding.
#[test]
fn keys_come_in_any_order() {
    let (rows, keys, head_dim) = (9, 90, 16);
    let case = Case::one_head(Dtype::F32, rows, keys, head_dim);
    let inputs = case.inputs::<f32>();
    let reversed = |data: &[f32]| data.chunks(head_dim).rev().flatten().copied().collect::<Vec<_>>();
    let backwards = Inputs {
        q: inputs.q.clone(),
        k: reversed(&inputs.k),
        v: reversed(&inputs.v),
    };
    for device in devices().all() {
        let forwards: Vec<f64> = case.run(device, &inputs).1.out.into_iter().map(f64::from).collect();
        let error = largest_error(&case.run(device, &backwards).1.out, &forwards);
        assert!(error <= 2e-6, "off by {error:e} on {device}");
    }
}

/// Tests the generator: its numbers must keep the distribution that the other tests rely on.
#[test]
fn drawn_numbers_are_normal() {
    let numbers = files::normal(100_000, 2.0, 7);
    let mean = numbers.iter().sum::<f32>() / 1e5;
    let deviation = (numbers.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e5).sqrt();
    assert!(
        mean.abs() < 0.05 && (deviation - 2.0).abs() < 0.05,
        "{mean} {deviation}"
    );
    assert_ne!(files::normal(4, 1.0, 1), files::normal(4, 1.0, 2));
}
