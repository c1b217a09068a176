//! Errors of calls over quantised inputs: each is a typed error with the argument, its value and the limit.

use flash_attention::device::DeviceKind;
use flash_attention::half::f16;
use flash_attention::problem::FP8_SCALE_ROWS;
use flash_attention::{Arch, Attention, Device, Error, F8E4M3, Quantized, Tensor};
use flash_attention_tests::fp8::{Codes, fp8_devices};
use flash_attention_tests::refusals::refused;
use flash_attention_tests::{assert_error, devices};

const ROWS: usize = FP8_SCALE_ROWS as usize;

fn quantized(device: &Device, shape: [usize; 4]) -> Quantized {
    Codes::new(shape, &vec![1.0; shape.iter().product()], true).place(device, false, 0)
}

fn forward([q, k, v]: &[Quantized; 3]) -> Result<(), Error> {
    Attention::new().forward_fp8::<f16>(q, k, v).map(drop)
}

const SHAPE: [usize; 4] = [2, 2, 2 * ROWS + 1, 64];

#[test]
fn shapes_that_do_not_agree() {
    let with = |axis: usize, size: usize| {
        let mut shape = SHAPE;
        shape[axis] = size;
        shape
    };
    let of_three = |shapes: [[usize; 4]; 3]| move |device: &Device| shapes.map(|shape| quantized(device, shape));
    refused(of_three([SHAPE, with(3, 32), with(3, 32)]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "k",
                axis: "head_dim",
                got: 32,
                ..
            },
            "64"
        );
    });
    refused(of_three([SHAPE, SHAPE, with(3, 32)]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "v",
                axis: "head_dim",
                got: 32,
                ..
            },
            "64"
        );
    });
    refused(of_three([with(1, 3), SHAPE, SHAPE]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadsNotDivisible {
                heads_q: 3,
                heads_kv: 2
            },
            "3",
            "2"
        );
    });
    refused(of_three([with(3, 20); 3]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadDim {
                argument: "q",
                head_dim: 20,
                ..
            },
            "20",
            "256"
        );
    });
    refused(of_three([with(3, 264); 3]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadDim {
                argument: "q",
                head_dim: 264,
                ..
            },
            "264",
            "256"
        );
    });
    // Rows of 24 bytes are of no whole 16 bytes, which GPUs copy.
    for device in devices().all() {
        let x = quantized(device, with(3, 24));
        match Attention::new().plan_fp8::<f16>(&x, &x, &x) {
            Ok(_) => assert_eq!(device.kind(), DeviceKind::Cpu),
            Err(error) => {
                assert_error!(device, error, Error::HeadDim { multiple_of: 16, .. }, "24", "16");
            }
        }
    }
}

#[test]
fn scales_that_fit_no_tensor() {
    type Parts = (Tensor<F8E4M3>, Tensor<f32>);
    fn parts(scales: &'static [usize]) -> impl Fn(&Device) -> Parts {
        move |device| {
            let data = Tensor::zeros(device, SHAPE).expect("small");
            (data, Tensor::zeros(device, scales).expect("small"))
        }
    }
    let join = |(data, scales): &Parts| Quantized::from_parts(data.clone(), scales.clone());
    refused(parts(&[2, 2]), join, |device, error| {
        assert_error!(
            device,
            error,
            Error::Rank {
                argument: "scales",
                rank: 2,
                expected: 3,
                ..
            },
            "rank 2"
        );
    });
    refused(parts(&[2, 3, 3]), join, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "scales",
                axis: "heads",
                got: 3,
                expected: 2,
                ..
            },
            "3"
        );
    });
    for wrong in [&[2, 2, 2], &[2, 2, 4], &[2, 2, 0]] {
        refused(parts(wrong), join, |device, error| {
            assert_error!(device, error, Error::ScaleBlocks { argument: "scales", blocks, expected: 3, seqlen: 129 } if *blocks == wrong[2], "`scales`", "3", "129");
        });
    }
    for device in devices().all() {
        let data = || Tensor::<F8E4M3>::zeros(device, SHAPE).expect("small");
        for right in [1, 3] {
            let joined = Quantized::from_parts(data(), Tensor::zeros(device, [2, 2, right]).expect("small"));
            assert_eq!(joined.expect("as many blocks").blocks(), right);
        }
        let wide = Tensor::zeros(device, [2, 2, 4])
            .and_then(|scales| scales.narrow(2, 0, 3))
            .expect("small");
        let error = Quantized::from_parts(data(), wide).expect_err("gaps");
        assert_error!(
            device,
            error,
            Error::NotContiguous { argument: "scales", .. },
            "[8, 4, 1]",
            "[6, 3, 1]"
        );
        let elsewhere = Device::cpu_with_threads(1).expect("a thread");
        let error = Quantized::from_parts(data(), Tensor::zeros(&elsewhere, [2, 2, 3]).expect("small"));
        let error = error.expect_err("two devices");
        assert_error!(
            device,
            error,
            Error::DeviceMismatch { argument: "scales", .. },
            "`scales`",
            "`data`"
        );
    }
}

#[test]
fn results_that_overlap_their_inputs_or_scales() {
    for device in fp8_devices() {
        // One scale for each of 64 rows and heads: as many f32 as lse has.
        let shape = [1, 2, 1, 64];
        let scales = Tensor::from_slice(device, [1, 2, 1], &[1.0_f32; 2]).expect("small");
        let x = Quantized::from_parts(Tensor::zeros(device, shape).expect("small"), scales.clone()).expect("one block");
        let mut output = flash_attention::Output::new(Tensor::<f16>::zeros(device, shape).expect("small"), scales);
        let error = Attention::new()
            .forward_fp8_into(&x, &x, &x, &mut output)
            .expect_err("lse is a scale");
        assert_error!(
            device,
            error,
            Error::Aliased {
                argument: "lse",
                other: "scales of q"
            },
            "`lse`"
        );
    }
}

#[test]
fn features_that_fp8_has_not() {
    for device in devices().all() {
        let x = quantized(device, SHAPE);
        for attention in [
            Attention::new().softcap(20.0),
            Attention::new().window(10, 0),
            Attention::new().dropout(0.1, 1),
        ] {
            let error = attention.forward_fp8::<f16>(&x, &x, &x).expect_err("a score program");
            assert_error!(device, error, Error::Unsupported { .. }, "score program", "causal");
        }
        let error = Attention::new()
            .softmax_scale(f32::NAN)
            .forward_fp8::<f16>(&x, &x, &x)
            .expect_err("NaN");
        assert_error!(device, error, Error::SoftmaxScale { .. }, "NaN");
    }
}

#[test]
fn portable_kernels_have_no_fp8() {
    for device in devices().all().filter(|device| device.kind() != DeviceKind::Cpu) {
        let x = quantized(device, SHAPE);
        let error = Attention::new()
            .arch(Arch::Sm80)
            .plan_fp8::<f16>(&x, &x, &x)
            .expect_err("no such kernel");
        assert_error!(device, error, Error::NoKernel { .. }, "f8e4m3", "f16", "head_dim 64");
    }
}

#[test]
fn what_the_kernels_for_hopper_refuse() {
    for device in devices().all().filter(|device| device.kind() != DeviceKind::Cpu) {
        let x = quantized(device, SHAPE);
        let refused = |attention: Attention, x: &Quantized, reason: &str| {
            let error = attention.plan_fp8::<f16>(x, x, x).expect_err("no such kernel");
            assert_error!(device, error, Error::NoKernel { .. }, "f8e4m3", "f16", reason);
        };
        if !fp8_devices().any(|other| other.to_string() == device.to_string()) {
            refused(Attention::new(), &x, "sm_90a");
            continue;
        }
        for scale in [0.0, -0.5] {
            refused(Attention::new().softmax_scale(scale), &x, "positive softmax_scale");
        }
        let ones = Codes::new(SHAPE, &vec![1.0; SHAPE.iter().product()], true);
        for gap in [2, 8, 30] {
            refused(
                Attention::new(),
                &ones.place(device, false, gap),
                "16-byte aligned rows",
            );
        }
        assert!(Attention::new().plan_fp8::<f16>(&x, &x, &x).is_ok());
        let forced = Attention::new().arch(Arch::Sm90a).plan_fp8::<f16>(&x, &x, &x);
        assert!(forced.is_ok(), "{device}");
    }
}
