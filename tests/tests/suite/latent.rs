//! Latent attention over rectangles: head_dim up to 576 and up to 512 of v, whose rows may be those of k.

use flash_attention::device::DeviceKind;
use flash_attention::error::Error;
use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Dtype, Element, Statistics, Tensor};
use flash_attention_tests::{Case, Layout, devices, files, programs};

/// A new tensor of these elements.
fn tensor<T: Element, const N: usize>(device: &Device, shape: [usize; N], elements: &[T]) -> Tensor<T> {
    Tensor::from_slice(device, shape, elements).expect("it fits")
}

/// Calls over rectangles, in memory of any layout.
#[test]
fn rectangles() {
    for (i, layout) in Layout::EVERY.into_iter().enumerate() {
        let [heads, seqlen_q] = [[16, 1], [4, 21], [40, 2]][i % 3];
        let dtype = [Dtype::F16, Dtype::Bf16][i % 2];
        Case::new(dtype, [2, heads, seqlen_q, 576], [2, 1, 70, 576])
            .with_head_dim_v([512, 264, 8][i % 3])
            .masked(i % 3 > 0)
            .laid_out([layout; 4])
            .check_on(devices().all());
    }
    Case::new(Dtype::F16, [1, 2, 40, 320], [1, 2, 70, 320])
        .with_head_dim_v(128)
        .with(Attention::new().softcap(2.0))
        .check_on(devices().all());
}

/// Score programs: those that read tables, hide pairs or draw, alone and all together.
#[test]
fn programs_of_every_feature() {
    let every = programs::FEATURES;
    for (i, features) in every.chunks(1).chain([&every[..]]).enumerate() {
        let dtype = [Dtype::F16, Dtype::Bf16][i % 2];
        let case = Case::new(dtype, [2, 4, 21, 576], [2, 2, 70, 576]).with_head_dim_v([512, 264][i / 2 % 2]);
        for device in devices().all() {
            let add = |attention, name: &&str| programs::with_feature(attention, name, &case, device);
            let attention = features.iter().fold(Attention::new(), add);
            case.clone().with(attention).check_on([device]);
        }
    }
}

/// A step of decoding is split over its keys, as one from a cache is, and right.
#[test]
fn steps_of_decoding_are_split() {
    for (dtype, heads, causal) in [(Dtype::F16, 16, false), (Dtype::Bf16, 40, true)] {
        let case = Case::new(dtype, [1, heads, 2, 576], [1, 1, 1100, 576]).with_head_dim_v(512);
        let case = case.masked(causal);
        for device in devices().all().filter(|device| device.kind() != DeviceKind::Cpu) {
            let zeros = |shape: [usize; 4]| Tensor::<f16>::zeros(device, shape).expect("it fits");
            let plan = case
                .attention
                .plan(&zeros(case.q), &zeros(case.kv), &zeros(case.v_shape()));
            let plan = plan.expect("a plan");
            assert!(plan.launches().len() == 2 && plan.workspace_bytes() > 0, "{plan}");
        }
        case.check_on(devices().all());
    }
}

/// row_max and row_sum give lse again: `softmax_scale * row_max + ln(row_sum)`.
#[test]
fn statistics_are_those_of_lse() {
    for device in devices().all() {
        let numbers = |shape: [usize; 4], seed| {
            let numbers = files::normal(shape.iter().product(), 1.0, seed);
            tensor(
                device,
                shape,
                &numbers.into_iter().map(f16::from_f32).collect::<Vec<_>>(),
            )
        };
        let (q, k) = (numbers([1, 16, 3, 576], 1), numbers([1, 1, 70, 576], 2));
        let v = k.narrow(3, 0, 512).expect("a view");
        let output = Attention::new().softmax_scale(0.25).causal().forward(&q, &k, &v);
        let output = output.expect("it fits");
        let Statistics { row_max, row_sum } = output.statistics.expect("always kept");
        let [lse, row_max, row_sum] = [output.lse, row_max, row_sum].map(|rows| rows.to_vec().expect("read"));
        for (row, lse) in lse.into_iter().enumerate() {
            let of_statistics = 0.25 * row_max[row] + row_sum[row].ln();
            // Scores of about 70 are sums of 576 products, in another order in row_max.
            assert!(
                (lse - of_statistics).abs() < 1e-4,
                "{device}, row {row}: {lse}, {of_statistics}"
            );
            assert!(
                (1.0..=70.0).contains(&row_sum[row]),
                "{device}, row {row}: {}",
                row_sum[row]
            );
        }
    }
}

/// A key that a causal mask hides from a query may hold anything: the query's results are the same to the bit.
#[test]
fn hidden_keys_reach_no_query() {
    for device in devices().all() {
        for shared in [true, false] {
            for bad in [f32::NAN, f32::INFINITY] {
                let (heads, queries, keys) = (16, 3, 37);
                let numbers = |shape: &[usize], seed| {
                    let numbers = files::normal(shape.iter().product(), 1.0, seed);
                    numbers.into_iter().map(f16::from_f32).collect::<Vec<_>>()
                };
                let (q, k) = (numbers(&[heads, queries, 576], 1), numbers(&[keys, 576], 2));
                let v = numbers(&[keys, 512], 3);
                let spoilt = |elements: &[f16], width: usize| {
                    let mut elements = elements.to_vec();
                    elements[(keys - 1) * width + 5] = f16::from_f32(bad);
                    elements
                };
                let run = |k: &[f16], v: &[f16]| {
                    let q = tensor(device, [1, heads, queries, 576], &q);
                    let k = tensor(device, [1, 1, keys, 576], k);
                    let v = match shared {
                        true => k.narrow(3, 0, 512).expect("a view"),
                        false => tensor(device, [1, 1, keys, 512], v),
                    };
                    let output = Attention::new().causal().forward(&q, &k, &v).expect("it fits");
                    (output.out.to_vec().expect("read"), output.lse.to_vec().expect("read"))
                };
                let (good_out, good_lse) = run(&k, &v);
                let spoilt_keys = if shared { spoilt(&k, 576) } else { k.clone() };
                let (out, lse) = run(&spoilt_keys, &spoilt(&v, 512));
                for row in 0..heads * queries {
                    let of_row = row * 512..(row + 1) * 512;
                    let name = || format!("row {row} on {device}, {bad}, shared {shared}");
                    if row % queries < queries - 1 {
                        assert_eq!(out[of_row.clone()], good_out[of_row], "{}", name());
                        assert_eq!(lse[row].to_bits(), good_lse[row].to_bits(), "{}", name());
                    } else {
                        assert!(!out[of_row][5].is_finite(), "{}", name());
                    }
                }
            }
        }
    }
}

/// GPUs have kernels for it in 16 bits, forward. All else is a typed error.
#[test]
fn what_gpus_do_not_serve() {
    fn inputs<T: Element>(device: &Device) -> [Tensor<T>; 2] {
        let latent = tensor(device, [1, 1, 4, 576], &[T::from_f32(0.5); 4 * 576]);
        let values = latent.narrow(3, 0, 512).expect("a view");
        [latent, values]
    }
    let attention = Attention::new();
    for device in devices().all().filter(|device| device.kind() != DeviceKind::Cpu) {
        let [latent, values] = inputs::<f32>(device);
        let refused = attention.forward(&latent, &latent, &values);
        assert!(
            matches!(
                refused,
                Err(Error::HeadDim {
                    argument: "q",
                    head_dim: 576,
                    max: 256,
                    ..
                })
            ),
            "{device}: {refused:?}"
        );
        let [latent, values] = inputs::<f16>(device);
        let output = attention.forward(&latent, &latent, &values).expect("it is served");
        let refused = attention.backward(&latent, &latent, &values, &output, &output.out);
        assert!(matches!(refused, Err(Error::NoKernel { .. })), "{device}: {refused:?}");
        let hopper = Attention::new().arch(Arch::Sm90a).forward(&latent, &latent, &values);
        assert!(matches!(hopper, Err(Error::NoKernel { .. })), "{device}: {hopper:?}");
    }
}
