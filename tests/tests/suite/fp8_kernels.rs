//! The kernels over quantised inputs that Hopper has: each of them is chosen, clean in any order of warps, and right where rows, scales
//! or sequences are unusual.

use flash_attention::device::DeviceKind;
use flash_attention::half::{bf16, f16};
use flash_attention::problem::FP8_SCALE_ROWS;
use flash_attention::{Arch, Attention, Device, Dtype, F8E4M3, Half, Quantized, reference};
use flash_attention_kernels::entries::{Entry, FP8_ENTRIES};
use flash_attention_tests::fp8::{Codes, Fp8Case, fp8_devices};
use flash_attention_tests::{devices, emulator, files, largest_error};

const ROWS: usize = FP8_SCALE_ROWS as usize;

/// Devices with kernels for quantised inputs.
fn gpus() -> impl Iterator<Item = &'static Device> {
    fp8_devices().filter(|device| device.kind() != DeviceKind::Cpu)
}

/// The name of the kernel that is planned for a case.
fn kernel<O: Half>(case: &Fp8Case, inputs: &[Codes; 3], device: &Device) -> &'static str {
    let [q, k, v] = [0, 1, 2].map(|input| inputs[input].place(device, false, 0));
    let plan = case.attention.plan_fp8::<O>(&q, &k, &v).expect("a kernel");
    plan.launches()[0].entry.name
}

/// A case of some tiles, the last of them not whole, for a kernel.
fn case_of(entry: &Entry) -> Fp8Case {
    let (m, n) = (entry.block_m as usize, entry.block_n as usize);
    Fp8Case::one_head(m / 2 + 3, 2 * n + 9, entry.head_dim as usize).masked(entry.causal)
}

#[test]
fn every_kernel_is_chosen_and_right() {
    for device in gpus() {
        for entry in FP8_ENTRIES {
            let case = case_of(entry);
            let inputs = case.inputs();
            let name = match entry.dtype {
                Dtype::Bf16 => kernel::<bf16>(&case, &inputs, device),
                _ => kernel::<f16>(&case, &inputs, device),
            };
            assert_eq!(name, entry.name, "{device}");
            case.check_of(&inputs, [device]);
        }
    }
}

/// Tests that a kernel gives the same bits in so many orders of warps; a finding of the checks is an error, and `run` panics.
fn check_orders<O: Half>(case: &Fp8Case, orders: u64) {
    let inputs = case.inputs();
    let run = |seed| {
        let (out, lse, statistics) = case.run::<O>(&inputs, &emulator(Arch::Sm90a, seed, 2));
        let of_out: Vec<u64> = out.iter().map(|x| x.to_f64().to_bits()).collect();
        (
            of_out,
            [lse, statistics.concat()].map(|rows| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>()),
        )
    };
    let first = run(0);
    for seed in 1..orders {
        assert_eq!(run(seed), first, "seed {seed}: {case:?}");
    }
}

#[test]
fn every_kernel_is_clean_in_any_order() {
    if !devices().emulation() {
        return;
    }
    for entry in FP8_ENTRIES {
        match entry.dtype {
            Dtype::Bf16 => check_orders::<bf16>(&case_of(entry), 16),
            _ => check_orders::<f16>(&case_of(entry), 16),
        }
    }
}

/// More tiles of work than blocks: a block takes several, with the pipelines and flags as the last one left them.
#[test]
fn blocks_take_many_tiles() {
    let heads = 140;
    for causal in [false, true] {
        let case = Fp8Case::new([1, heads, 40, 32], [1, heads, 150, 32]).masked(causal);
        let mut inputs = case.inputs();
        case.check_of(&inputs, gpus());
        // NaN in the last value of some heads, which only the last query sees under the mask.
        for head in (0..heads).step_by(3) {
            let end = (head + 1) * 150 * 32;
            inputs[2].codes[end - 32..end].fill(F8E4M3::NAN);
        }
        for device in gpus() {
            let (out, ..) = case.run::<f16>(&inputs, device);
            for (row, out) in out.chunks(32).enumerate() {
                let (head, query) = (row / 40, row % 40);
                let is_nan = head % 3 == 0 && (query == 39 || !causal);
                assert!(
                    out.iter().all(|x| x.is_nan() == is_nan),
                    "head {head}, query {query} on {device}"
                );
            }
        }
    }
    if devices().emulation() {
        check_orders::<f16>(&Fp8Case::new([1, heads, 10, 32], [1, heads, 70, 32]).masked(true), 4);
    }
}

/// Heads that share keys are packed into one tile; each row has the scale of its own head and block.
#[test]
fn packed_heads_have_their_own_scales() {
    for (group, seqlen_q) in [(8, 5), (4, 2 * ROWS + 3), (2, 1)] {
        for causal in [false, true] {
            let case = Fp8Case::new([2, 2 * group, seqlen_q, 64], [2, 2, 3 * ROWS + 1, 64]).masked(causal);
            let mut inputs = case.inputs();
            for (block, scale) in inputs[0].scales.iter_mut().enumerate() {
                *scale *= [1.0, 1.0 / 16.0, 4.0][block % 3];
            }
            for device in gpus() {
                let [q, k, v] = [0, 1, 2].map(|input| inputs[input].place(device, false, 0));
                let plan = case.attention.plan_fp8::<f16>(&q, &k, &v).expect("a kernel");
                assert_eq!(plan.tiles().packed_heads as usize, group, "{device}");
            }
            case.check_of(&inputs, gpus());
        }
    }
}

/// Scores far beyond the range of weights: rows subtract their maximum before they multiply. Few keys have weight then. Rounding to e4m3
/// changes a weight by at most a 16th of it, and the sum that divides is that of the weights before. So `out`, a mean of values, is off by
/// at most a 16th of the mean of their magnitudes, which is at most that of the largest value.
#[test]
fn scores_beyond_a_thousand() {
    for (scale, causal) in [(40.0, false), (400.0, true)] {
        for by_blocks in [false, true] {
            let attention = Attention::new().softmax_scale(scale);
            let case = Fp8Case {
                attention,
                by_blocks: [by_blocks; 3],
                ..Fp8Case::one_head(100, 300, 64)
            }
            .masked(causal);
            let inputs = case.inputs();
            let [q, k, v] = [0, 1, 2].map(|input| inputs[input].numbers());
            let (want, want_lse) = reference::forward(&case.dims(), &q, &k, &v);
            let largest = v.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
            for device in gpus() {
                let (out, lse, _) = case.run::<f16>(&inputs, device);
                let lse_off = largest_error(&lse, &want_lse);
                assert!(
                    lse_off < 2e-6 * f64::from(scale) * 40.0,
                    "lse is off by {lse_off} on {device}"
                );
                let off = largest_error(&out, &want);
                assert!(off < largest / 16.0, "out is off by {off} on {device}: {case:?}");
            }
        }
    }
}

/// A row's bits do not depend on the rows beside it: here on whether one of them is far.
#[test]
fn far_rows_change_no_other() {
    let case = Fp8Case::one_head(64, 300, 64);
    let mut numbers = files::normal(64 * 64, 1.0, 9);
    numbers[20 * 64..21 * 64].iter_mut().for_each(|x| *x *= 1000.0);
    let [_, k, v] = case.inputs();
    let far = [Codes::new(case.q, &numbers, false), k, v];
    let mut near = far.clone();
    near[0].codes[20 * 64..21 * 64].fill(F8E4M3::from_bits(0));
    for device in gpus() {
        let [far, near] = [&far, &near].map(|inputs| case.run::<f16>(inputs, device));
        assert!(far.1[20] > 1000.0, "{} on {device}", far.1[20]);
        for (index, (far, near)) in far.0.iter().zip(&near.0).enumerate() {
            assert!(
                index / 64 == 20 || far.to_bits() == near.to_bits(),
                "{index} on {device}"
            );
        }
    }
}

/// Scales of 2^-60 to 2^60: neither weights nor their sum overflow or vanish.
#[test]
fn scales_of_extreme_magnitude() {
    for causal in [false, true] {
        let case = Fp8Case::new([1, 1, 2 * ROWS, 64], [1, 1, 4 * ROWS, 64]).masked(causal);
        let small = 2.0_f32.powi(-60);
        for factors in [[small, 1.0 / small, 1.0], [1.0 / small, small, 1.0], [1.0, 1.0, small]] {
            let mut inputs = case.inputs();
            for (codes, factor) in inputs.iter_mut().zip(factors) {
                codes.scales.iter_mut().for_each(|scale| *scale *= factor);
            }
            case.check_of(&inputs, gpus());
        }
    }
    // Values of which all but one block are next to nothing.
    let case = Fp8Case::new([1, 1, ROWS, 64], [1, 1, 4 * ROWS, 64]);
    for block in 0..4 {
        let mut inputs = case.inputs();
        for (index, scale) in inputs[2].scales.iter_mut().enumerate() {
            *scale *= if index == block { 1.0 } else { 2.0_f32.powi(-40) };
        }
        case.check_of(&inputs, gpus());
    }
}

/// One key has the weight 1, and its value comes out as it is.
#[test]
fn one_key_gives_its_value() {
    for head_dim in [16, 64, 96, 128, 192, 256] {
        let case = Fp8Case::one_head(3, 1, head_dim);
        let mut inputs = case.inputs();
        inputs[2].scales.fill(0.5);
        let value: Vec<f16> = inputs[2].numbers().iter().map(|&x| f16::from_f64(x)).collect();
        for device in gpus() {
            let (out, ..) = case.run::<f16>(&inputs, device);
            assert!(
                out.chunks(head_dim).all(|row| row == value),
                "head_dim {head_dim} on {device}"
            );
        }
    }
}

/// Each value reaches its own place: keys are told apart by queries that see one of them alone.
#[test]
fn every_key_and_column_has_its_place() {
    for head_dim in [64, 96, 128, 192, 256] {
        let keys = 2 * ROWS + 40;
        // Query i and key i share a direction no other pair has, by the digits of i.
        let direction = |i: usize| -> Vec<f32> {
            let digits = [i % 8, i / 8 % 8, i / 64];
            (0..head_dim)
                .map(|d| if d < 24 && digits[d / 8] == d % 8 { 8.0 } else { 0.0 })
                .collect()
        };
        let rows: Vec<f32> = (0..keys).flat_map(direction).collect();
        let values: Vec<f32> = (0..keys * head_dim)
            .map(|i| ((i * 7 + i / head_dim * 3) % 15) as f32 - 7.0)
            .collect();
        let shape = [1, 1, keys, head_dim];
        let case = Fp8Case {
            attention: Attention::new().softmax_scale(1.0),
            ..Fp8Case::new(shape, shape)
        };
        let mut inputs = [&rows, &rows, &values].map(|numbers| Codes::new(shape, numbers, true));
        for codes in &mut inputs {
            // The numbers are codes as they are.
            let exact = codes.numbers();
            codes.codes = exact.iter().map(|&x| F8E4M3::from_f32(x as f32)).collect();
            codes.scales.fill(1.0);
        }
        for device in gpus() {
            let (out, ..) = case.run::<f16>(&inputs, device);
            let got: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
            let want: Vec<f32> = inputs[2].codes.iter().map(|x| x.to_f32()).collect();
            assert_eq!(got, want, "head_dim {head_dim} on {device}");
        }
    }
}

/// The plan's text and cost count inputs of one byte.
#[test]
fn plans_of_codes_move_half_the_bytes() {
    let shape = [1, 2, 300, 64];
    for device in gpus() {
        let x: Quantized = Codes::new(shape, &vec![1.0; shape.iter().product()], true).place(device, false, 0);
        let plan = Attention::new().plan_fp8::<f16>(&x, &x, &x).expect("a kernel");
        // q once; k and v for each of two tiles of queries.
        let tiles = 300_u128.div_ceil(plan.tiles().block_m.into());
        assert_eq!(plan.cost().bytes_read, 2 * 300 * 64 * (1 + 2 * tiles), "{plan}");
    }
}
