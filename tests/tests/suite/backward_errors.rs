//! Errors of backward calls, on every device: each is a typed error, before anything is allocated or launched. The
//! compiler checks that dtypes agree: `backward` takes tensors of one element type.

use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, Error, Gradients, Output, Tensor};
use flash_attention_tests::refusals::refused;
use flash_attention_tests::{assert_error, devices};

const Q: [usize; 4] = [2, 4, 6, 16];
const KV: [usize; 4] = [2, 2, 7, 16];

/// Arguments of a backward call. Each test makes one of them wrong.
#[derive(Clone)]
struct Call {
    attention: Attention,
    q: Tensor<f16>,
    k: Tensor<f16>,
    v: Tensor<f16>,
    output: Output<f16>,
    dout: Tensor<f16>,
    gradients: Gradients<f16>,
}

fn zeros(device: &Device, shape: impl AsRef<[usize]>) -> Tensor<f16> {
    Tensor::zeros(device, shape.as_ref()).expect("a small tensor")
}

/// Makes a correct call on a device.
fn call(device: &Device) -> Call {
    let (q, kv) = (|| zeros(device, Q), || zeros(device, KV));
    Call {
        attention: Attention::new(),
        q: q(),
        k: kv(),
        v: kv(),
        output: Output::new(q(), Tensor::zeros(device, &Q[..3]).expect("a small tensor")),
        dout: q(),
        gradients: Gradients::new(q(), kv(), kv()),
    }
}

fn backward(call: &Call) -> Result<(), Error> {
    let Call {
        attention,
        q,
        k,
        v,
        output,
        dout,
        ..
    } = call;
    attention.backward(q, k, v, output, dout).map(drop)
}

fn backward_into(call: &Call) -> Result<(), Error> {
    let Call {
        attention,
        q,
        k,
        v,
        output,
        dout,
        gradients,
    } = call;
    attention.backward_into(q, k, v, output, dout, &mut gradients.clone())
}

/// Makes a correct call and makes one argument wrong.
fn spoilt(spoil: impl Fn(&Device, &mut Call)) -> impl Fn(&Device) -> Call {
    move |device| {
        let mut call = call(device);
        spoil(device, &mut call);
        call
    }
}

/// Returns the tensor of a call with this name.
fn named<'a>(call: &'a mut Call, name: &str) -> &'a mut Tensor<f16> {
    match name {
        "q" => &mut call.q,
        "k" => &mut call.k,
        "v" => &mut call.v,
        "out" => &mut call.output.out,
        "dout" => &mut call.dout,
        "dq" => &mut call.gradients.dq,
        "dk" => &mut call.gradients.dk,
        "dv" => &mut call.gradients.dv,
        _ => panic!("no tensor {name}"),
    }
}

#[test]
fn what_the_tests_spoil_is_right() {
    for device in devices().all() {
        backward(&call(device)).unwrap_or_else(|error| panic!("{error} on {device}"));
        backward_into(&call(device)).unwrap_or_else(|error| panic!("{error} on {device}"));
    }
}

/// Tests that backward refuses the inputs that forward refuses.
#[test]
fn inputs_that_forward_refuses() {
    let prepare = spoilt(|device, call| call.v = zeros(device, [2, 2, 8, 16]));
    refused(prepare, backward, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "v",
                axis: "seqlen",
                got: 8,
                expected: 7,
                ..
            },
            "`v`"
        );
    });
    let prepare = spoilt(|_, call| call.attention = Attention::new().softmax_scale(f32::NAN));
    refused(prepare, backward, |device, error| {
        assert_error!(device, error, Error::SoftmaxScale { .. }, "`softmax_scale`", "finite");
    });
}

#[test]
fn shapes_that_are_not_those_of_forward() {
    let wrong: [(&str, [usize; 4], &str, &str); 7] = [
        ("out", [2, 4, 5, 16], "seqlen", "q"),
        ("out", [2, 2, 6, 16], "heads", "q"),
        ("out", [2, 4, 6, 24], "head_dim", "v"),
        ("dout", [1, 4, 6, 16], "batch", "q"),
        ("dout", [2, 4, 7, 16], "seqlen", "q"),
        ("dout", [2, 2, 6, 16], "heads", "q"),
        ("dout", [2, 4, 6, 8], "head_dim", "v"),
    ];
    for (name, shape, name_of_axis, model) in wrong {
        for run in [backward, backward_into] {
            let prepare = spoilt(|device, call| *named(call, name) = zeros(device, shape));
            refused(prepare, run, |device, error| {
                assert_error!(
                    device, error,
                    Error::ShapeMismatch { argument, axis, other, .. }
                        if (*argument, *axis, *other) == (name, name_of_axis, model),
                    &format!("`{name}`"), name_of_axis, &format!("`{model}`")
                );
            });
        }
    }
    let prepare = spoilt(|device, call| call.dout = zeros(device, [4, 6, 16]));
    refused(prepare, backward, |device, error| {
        assert_error!(
            device,
            error,
            Error::Rank {
                argument: "dout",
                rank: 3,
                expected: 4,
                ..
            },
            "`dout`",
            "rank 3"
        );
    });
    let prepare = spoilt(|device, call| call.output.lse = Tensor::zeros(device, [2, 4, 5]).expect("small"));
    refused(prepare, backward, |device, error| {
        assert_error!(
            device,
            error,
            Error::ShapeMismatch {
                argument: "lse",
                axis: "seqlen",
                got: 5,
                other: "q",
                expected: 6
            },
            "`lse` has seqlen = 5, expected 6 as in `q`"
        );
    });
    let prepare = spoilt(|device, call| call.output.lse = Tensor::zeros(device, Q).expect("small"));
    refused(prepare, backward, |device, error| {
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
fn gradients_of_the_wrong_shape() {
    for (name, shape, model) in [("dq", KV, "q"), ("dk", Q, "k"), ("dv", [2, 2, 7, 8], "v")] {
        let prepare = spoilt(|device, call| *named(call, name) = zeros(device, shape));
        refused(prepare, backward_into, |device, error| {
            assert_error!(
                device, error,
                Error::ShapeMismatch { argument, other, .. } if (*argument, *other) == (name, model),
                &format!("`{name}`"), &format!("`{model}`")
            );
        });
    }
}

#[test]
fn tensors_on_another_device() {
    let elsewhere = Device::emulator(Arch::Sm80);
    for name in ["out", "dout", "dq", "dk", "dv"] {
        let stray = call(&elsewhere);
        let prepare = spoilt(|_, call| {
            let mut stray = stray.clone();
            *named(call, name) = named(&mut stray, name).clone();
        });
        refused(prepare, backward_into, |device, error| {
            assert_error!(
                device, error,
                Error::DeviceMismatch { argument, got, .. } if *argument == name && *got == elsewhere.to_string(),
                &format!("`{name}`"), "`q`"
            );
        });
    }
    let lse = Tensor::<f32>::zeros(&elsewhere, &Q[..3]).expect("small");
    let prepare = spoilt(|_, call| call.output.lse = lse.clone());
    refused(prepare, backward, |device, error| {
        assert_error!(
            device,
            error,
            Error::DeviceMismatch { argument: "lse", .. },
            "`lse`",
            "`q`"
        );
    });
}

#[test]
fn strides_that_kernels_do_not_take() {
    for name in ["out", "dout", "dq", "dk", "dv"] {
        let prepare = spoilt(|device, call| {
            let tensor = named(call, name);
            let [batch, heads, seqlen, head_dim] = <[usize; 4]>::try_from(tensor.shape()).expect("rank 4");
            let across = zeros(device, [batch, heads, head_dim, seqlen]);
            *tensor = across.transpose(2, 3).expect("there are four axes");
        });
        refused(prepare, backward_into, |device, error| {
            assert_error!(
                device, error,
                Error::LastAxisStride { argument, .. } if *argument == name,
                &format!("`{name}`"), "expected 1"
            );
        });
    }
}

#[test]
fn gradients_whose_elements_share_memory() {
    for (name, shape) in [("dq", Q), ("dk", KV), ("dv", KV)] {
        let prepare = spoilt(|device, call| {
            let row = vec![f16::ZERO; shape[2] * shape[3]];
            let repeated = Tensor::from_slice_strided(device, shape, [0, 0, shape[3], 1], &row);
            *named(call, name) = repeated.expect("one head");
        });
        refused(prepare, backward_into, |device, error| {
            assert_error!(
                device, error,
                Error::OverlappingStrides { argument, .. } if *argument == name,
                &format!("`{name}`"), "overlap"
            );
        });
    }
}

/// Tests that a gradient must not share memory with an input or another gradient, wholly or in part.
#[test]
fn gradients_that_share_memory() {
    let pairs = [
        ("dq", "q"),
        ("dq", "out"),
        ("dq", "dout"),
        ("dk", "k"),
        ("dk", "v"),
        ("dv", "k"),
        ("dv", "v"),
        ("dv", "dk"),
    ];
    for (name, other) in pairs {
        let prepare = spoilt(|_, call| *named(call, name) = named(call, other).clone());
        refused(prepare, backward_into, |device, error| {
            assert_error!(
                device, error,
                Error::Aliased { argument, other: with } if (*argument, *with) == (name, other),
                &format!("`{name}` shares memory with `{other}`")
            );
        });
    }
    let prepare = spoilt(|device, call| {
        let both = zeros(device, [3, 2, 7, 16]);
        call.gradients.dk = both.narrow(0, 0, 2).expect("the first two");
        call.gradients.dv = both.narrow(0, 1, 2).expect("the last two");
    });
    refused(prepare, backward_into, |device, error| {
        assert_error!(
            device,
            error,
            Error::Aliased {
                argument: "dv",
                other: "dk"
            },
            "`dv` shares memory with `dk`"
        );
    });
}

/// Tests an lse that holds NaN: debug builds refuse it; in release builds the results that depend on it are NaN.
#[test]
fn an_lse_that_is_not_a_number() {
    let prepare = spoilt(|device, call| {
        let mut lse = [0.0_f32; 48];
        lse[29] = f32::NAN;
        call.output.lse = Tensor::from_slice(device, &Q[..3], &lse).expect("small");
    });
    if cfg!(debug_assertions) {
        for run in [backward, backward_into] {
            refused(&prepare, run, |device, error| {
                assert_error!(
                    device,
                    error,
                    Error::NotANumber {
                        argument: "lse",
                        index: 29
                    },
                    "`lse` holds a NaN at element 29"
                );
            });
        }
        return;
    }
    for device in devices().all() {
        let call = prepare(device);
        backward_into(&call).expect("release builds do not look");
        let dv = call.gradients.dv.to_vec().expect("it is there");
        // Element 29 is a query of batch 1, head 0, which shares the first key head.
        let spoilt: Vec<bool> = dv.chunks(7 * 16).map(|head| head.iter().all(|x| x.is_nan())).collect();
        assert_eq!(spoilt, [false, false, true, false], "{device}");
    }
}

/// Tests that nothing stays allocated if there is no memory for the results.
#[test]
fn results_that_do_not_fit() {
    let mut options = flash_attention::device::EmulatorOptions::new(Arch::Sm80);
    options.memory_bytes = 16 << 10;
    let device = Device::emulator_with(options);
    let call = call(&device);
    let mut held = Vec::new();
    while let Ok(more) = Tensor::<f16>::zeros(&device, [256]) {
        held.push(more);
    }
    let before = device.memory();
    let error = backward(&call).expect_err("no room for dq");
    assert_error!(
        device,
        error,
        Error::OutOfMemory { requested: 1536, .. },
        "1536 bytes asked"
    );
    assert_eq!(device.memory().in_use, before.in_use);
    drop(held);
    backward(&call).expect("there is room now");
}
