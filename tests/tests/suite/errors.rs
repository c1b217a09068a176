//! Errors of forward calls, on every device: each is a typed error with the argument, its value and the limit, before
//! anything is allocated or launched.

use flash_attention::device::{DeviceKind, EmulatorOptions};
use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Element, Error, Tensor};
use flash_attention_tests::refusals::refused;
use flash_attention_tests::{assert_error, devices};

fn zeros<T: Element>(device: &Device, shape: &[usize]) -> Tensor<T> {
    Tensor::zeros(device, shape).expect("a small tensor")
}

/// Makes q, k and v of these shapes.
fn inputs(shapes: [&'static [usize]; 3]) -> impl Fn(&Device) -> [Tensor<f16>; 3] {
    move |device| shapes.map(|shape| zeros(device, shape))
}

fn forward([q, k, v]: &[Tensor<f16>; 3]) -> Result<(), Error> {
    Attention::new().forward(q, k, v).map(drop)
}

const SHAPE: &[usize] = &[2, 4, 6, 16];

#[test]
fn ranks() {
    let flat: &[usize] = &[4, 6, 16];
    for (shapes, name) in [
        ([flat, SHAPE, SHAPE], "q"),
        ([SHAPE, flat, SHAPE], "k"),
        ([SHAPE, SHAPE, flat], "v"),
    ] {
        refused(inputs(shapes), forward, |device, error| {
            assert_error!(device, error, Error::Rank { argument, rank: 3, expected: 4, .. } if *argument == name, "`", "rank 3", "expected 4");
        });
    }
}

#[test]
fn heads_of_no_elements() {
    let shape: &[usize] = &[2, 4, 6, 0];
    refused(inputs([shape; 3]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadDim {
                argument: "q",
                head_dim: 0,
                ..
            },
            "`q`",
            "head_dim = 0",
            "multiple of 8 up to 256, and not 0"
        );
    });
}

#[test]
fn shapes_that_disagree() {
    /// Shapes of q, k and v; the argument and the axis that disagree; the size of the axis there and the expected
    /// size.
    type Disagreement<'a> = ([&'a [usize]; 3], &'a str, &'a str, usize, usize);
    let cases: [Disagreement<'_>; 5] = [
        ([SHAPE, &[3, 4, 6, 16], &[3, 4, 6, 16]], "k", "batch", 3, 2),
        ([SHAPE, &[2, 4, 6, 24], &[2, 4, 6, 24]], "k", "head_dim", 24, 16),
        ([SHAPE, SHAPE, &[1, 4, 6, 16]], "v", "batch", 1, 2),
        ([SHAPE, SHAPE, &[2, 2, 6, 16]], "v", "heads", 2, 4),
        ([SHAPE, SHAPE, &[2, 4, 7, 16]], "v", "seqlen", 7, 6),
    ];
    for (shapes, name, name_of_axis, size, other_size) in cases {
        refused(inputs(shapes), forward, |device, error| {
            assert_error!(
                device, error,
                Error::ShapeMismatch { argument, axis, got, expected, .. }
                    if (*argument, *axis, *got, *expected) == (name, name_of_axis, size, other_size),
                &format!("`{name}` has {name_of_axis} = {size}, expected {other_size}")
            );
        });
    }
}

#[test]
fn heads_that_can_not_be_shared() {
    let (q, kv): (&[usize], &[usize]) = (&[1, 6, 5, 8], &[1, 4, 5, 8]);
    refused(inputs([q, kv, kv]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadsNotDivisible {
                heads_q: 6,
                heads_kv: 4
            },
            "6 heads",
            "multiple of the 4"
        );
    });
    refused(inputs([kv, q, q]), forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::HeadsNotDivisible {
                heads_q: 4,
                heads_kv: 6
            },
            "4 heads",
            "6"
        );
    });
}

#[test]
fn head_dims() {
    for (head_dim, shape) in [
        (4_usize, &[1_usize, 1, 3, 4]),
        (12, &[1, 1, 3, 12]),
        (257, &[1, 1, 3, 257]),
        (264, &[1, 1, 3, 264]),
    ] {
        let shape: &'static [usize] = shape;
        let good: &[usize] = &[1, 1, 3, 8];
        for (name, shapes) in [("q", [shape; 3]), ("v", [good, good, shape])] {
            refused(inputs(shapes), forward, |device, error| {
                assert_error!(
                    device, error,
                    Error::HeadDim { argument, head_dim: got, multiple_of: 8, max: 256 } if (*argument, *got) == (name, head_dim),
                    &format!("`{name}` has head_dim = {head_dim}"), "multiple of 8 up to 256"
                );
            });
        }
    }
}

/// Tests sizes of latent attention in f16, which have larger limits than the usual ones on every device.
#[test]
fn head_dims_of_latent_attention() {
    let (latent, wide): (&[usize], &[usize]) = (&[1, 1, 3, 576], &[1, 1, 3, 584]);
    let (values, wide_values): (&[usize], &[usize]) = (&[1, 1, 3, 512], &[1, 1, 3, 520]);
    for (shapes, refusal) in [
        ([wide, wide, values], Some(("q", 576))),
        ([latent, latent, wide_values], Some(("v", 512))),
        ([latent; 3], Some(("q", 256))),
        ([latent, latent, values], None),
    ] {
        for device in devices().all() {
            let result = forward(&inputs(shapes)(device));
            let Some((name, limit)) = refusal else {
                result.expect("sizes that every device serves in f16");
                continue;
            };
            let error = result.expect_err("too wide");
            assert_error!(
                device, error,
                Error::HeadDim { argument, max, .. } if (*argument, *max) == (name, limit),
                &format!("`{name}`"), &format!("up to {limit}")
            );
        }
    }
}

#[test]
fn last_axes_that_are_not_contiguous() {
    let prepare = |device: &Device| {
        let good = zeros::<f16>(device, &[1, 2, 8, 8]);
        let across = good.transpose(2, 3).expect("there are four axes");
        [good.clone(), good, across]
    };
    refused(prepare, forward, |device, error| {
        assert_error!(
            device,
            error,
            Error::LastAxisStride {
                argument: "v",
                stride: 8,
                ..
            },
            "`v`",
            "stride 8",
            "expected 1"
        );
    });
}

#[test]
fn sequences_too_long_to_count() {
    let max = flash_attention::problem::MAX_SEQLEN as usize;
    let prepare = |device: &Device| {
        let row = [f16::ZERO; 8];
        let long = |len| Tensor::from_slice_strided(device, [1, 1, len, 8], [0, 0, 0, 1], &row).expect("one row");
        [long(1), long(max + 1), long(max + 1)]
    };
    refused(prepare, forward, |device, error| {
        assert_error!(
            device, error,
            Error::SequenceTooLong { argument: "k", seqlen, max: limit } if (*seqlen, *limit) == (max + 1, max),
            "`k`", &(max + 1).to_string(), &max.to_string()
        );
    });
}

/// Tests a problem with more blocks than a launch can have. The CPU has no launches.
#[test]
fn grids_too_large_to_launch() {
    for device in devices()
        .unshared()
        .iter()
        .filter(|device| device.kind() != DeviceKind::Cpu)
    {
        let row = [f16::ZERO; 8];
        let many = Tensor::from_slice_strided(device, [1, 1 << 31, 1, 8], [0, 0, 0, 1], &row).expect("one row");
        let one = zeros::<f16>(device, &[1, 1, 1, 8]);
        device.reset_peak_memory();
        let before = device.memory();
        let error = Attention::new().forward(&many, &one, &one).expect_err("too many");
        assert_eq!(device.memory(), before);
        assert_error!(
            device, error,
            Error::GridTooLarge { blocks, limit } if (*blocks, *limit) == (1 << 31, flash_attention::plan::MAX_BLOCKS),
            "`q`", "2147483648", "2147483647"
        );
    }
}

#[test]
fn scales_that_are_not_finite() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let call = |[q, k, v]: &[Tensor<f16>; 3]| Attention::new().softmax_scale(scale).forward(q, k, v).map(drop);
        refused(inputs([SHAPE; 3]), call, |device, error| {
            assert_error!(
                device, error,
                Error::SoftmaxScale { value } if value.to_bits() == scale.to_bits(),
                "`softmax_scale`", &scale.to_string(), "finite"
            );
        });
    }
}

#[test]
fn tensors_on_two_devices() {
    let elsewhere = Device::emulator(Arch::Sm80);
    let stray = zeros::<f16>(&elsewhere, SHAPE);
    let prepare = |device: &Device| [zeros(device, SHAPE), stray.clone(), stray.clone()];
    refused(prepare, forward, |device, error| {
        assert_error!(
            device, error,
            Error::DeviceMismatch { argument: "k", got, other: "q", expected }
                if *got == elsewhere.to_string() && *expected == device.to_string(),
            "`k`", "`q`"
        );
    });
}

/// q, k, v, and the caller's out and lse.
type Call = ([Tensor<f16>; 3], Tensor<f16>, Tensor<f32>);

fn forward_into((inputs, out, lse): &Call) -> Result<(), Error> {
    let [q, k, v] = inputs;
    Attention::new().forward_into(q, k, v, &mut out.clone(), &mut lse.clone())
}

fn call(device: &Device) -> Call {
    (
        inputs([SHAPE; 3])(device),
        zeros(device, SHAPE),
        zeros(device, &SHAPE[..3]),
    )
}

#[test]
fn outputs_of_the_wrong_shape() {
    let prepare = |device: &Device| {
        (
            call(device).0,
            zeros(device, &[2, 4, 5, 16]),
            zeros(device, &SHAPE[..3]),
        )
    };
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "out",
                axis: "seqlen",
                got: 5,
                other: "q",
                expected: 6
            },
            "`out` has seqlen = 5, expected 6 as in `q`"
        );
    });
    let prepare = |device: &Device| {
        let inputs = inputs([SHAPE, SHAPE, &[2, 4, 6, 24]])(device);
        (inputs, zeros(device, SHAPE), zeros(device, &SHAPE[..3]))
    };
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "out",
                axis: "head_dim",
                got: 16,
                other: "v",
                expected: 24
            },
            "`out` has head_dim = 16, expected 24 as in `v`"
        );
    });
    let prepare = |device: &Device| (call(device).0, zeros(device, SHAPE), zeros(device, &[2, 3, 6]));
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "lse",
                axis: "heads",
                got: 3,
                other: "q",
                expected: 4
            },
            "`lse` has heads = 3, expected 4 as in `q`"
        );
    });
    let prepare = |device: &Device| (call(device).0, zeros(device, SHAPE), zeros(device, SHAPE));
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::Rank {
                argument: "lse",
                rank: 4,
                expected: 3,
                ..
            },
            "`lse`",
            "rank 4"
        );
    });
}

#[test]
fn outputs_whose_elements_share_memory() {
    let prepare = |device: &Device| {
        let row = [f16::ZERO; 6 * 16];
        let repeated = Tensor::from_slice_strided(device, SHAPE, [0, 0, 16, 1], &row).expect("one head");
        (call(device).0, repeated, zeros(device, &SHAPE[..3]))
    };
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::OverlappingStrides { argument: "out", .. },
            "`out`",
            "overlap",
            "[0, 0, 16, 1]"
        );
    });
}

#[test]
fn an_lse_with_gaps_whose_elements_share_memory() {
    let prepare = |device: &Device| {
        let lse = Tensor::from_slice_strided(device, &SHAPE[..3], [12, 0, 2], &[0.0_f32; 24]).expect("one head");
        (call(device).0, zeros(device, SHAPE), lse)
    };
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::OverlappingStrides { argument: "lse", .. },
            "`lse`",
            "overlap",
            "[12, 0, 2]"
        );
    });
}

#[test]
fn outputs_that_are_inputs() {
    let prepare = |device: &Device| {
        let (inputs, _, lse) = call(device);
        let out = inputs[1].clone();
        (inputs, out, lse)
    };
    refused(prepare, forward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::Aliased {
                argument: "out",
                other: "k"
            },
            "`out` shares memory with `k`"
        );
    });
}

#[test]
fn sizes_that_overflow() {
    for shape in [[1 << 40, 1 << 20, 1, 8], [usize::MAX, 1, 1, 8]] {
        refused(
            Device::clone,
            |device| Tensor::<f16>::empty(device, shape),
            |device, error| {
                assert_error!(
                    device, error,
                    Error::SizeOverflow { shape: got, element_bytes: 2, limit, .. }
                        if got[..] == shape && *limit == isize::MAX as usize,
                    &shape[0].to_string(), &isize::MAX.to_string()
                );
            },
        );
    }
}

#[test]
fn memory_that_is_not_there() {
    let bytes = 1_u64 << 60;
    refused(
        Device::clone,
        |device| Tensor::<f32>::empty(device, [1 << 58]),
        |device, error| {
            assert_error!(
                device, error,
                Error::OutOfMemory { requested, free: Some(free), .. } if *requested == bytes && *free < bytes,
                "out of memory", &bytes.to_string(), "free"
            );
        },
    );
}

/// Tests that nothing stays allocated if there is no memory for the results.
#[test]
fn results_that_do_not_fit() {
    let mut options = EmulatorOptions::new(Arch::Sm80);
    options.memory_bytes = 8 << 10;
    let device = Device::emulator_with(options);
    let [q, k, v] = inputs([SHAPE; 3])(&device); // 1536 bytes each
    let mut held = Vec::new();
    while let Ok(more) = Tensor::<f16>::zeros(&device, [256]) {
        held.push(more);
    }
    let before = device.memory();
    let error = Attention::new().forward(&q, &k, &v).expect_err("no room for out");
    assert_error!(
        device,
        error,
        Error::OutOfMemory {
            requested: 1536,
            free: Some(_),
            ..
        },
        "1536 bytes asked"
    );
    assert_eq!(device.memory().in_use, before.in_use);
    drop(held);
    Attention::new()
        .forward(&q, &k, &v)
        .map(drop)
        .expect("there is room now");
}
