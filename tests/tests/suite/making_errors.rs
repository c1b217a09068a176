//! Errors of tensors and device names, on every device: each is a typed error with the argument, its value and the
//! limit, before anything is allocated.

use flash_attention::error::CudaUnavailable;
use flash_attention::half::f16;
use flash_attention::{Device, Error, Tensor};
use flash_attention_tests::assert_error;
use flash_attention_tests::refusals::refused;

#[test]
fn data_that_is_not_the_shape() {
    refused(
        Device::clone,
        |device| Tensor::from_slice(device, [2, 3], &[0.0_f32; 5]),
        |device, error| {
            assert_error!(
                device, error,
                Error::DataLength { len: 5, expected: 6, shape } if shape[..] == [2, 3],
                "5 elements", "6"
            );
        },
    );
    refused(
        Device::clone,
        |device| Tensor::from_slice_strided(device, [2, 3], [4, 1], &[0.0_f32; 6]),
        |device, error| {
            assert_error!(
                device,
                error,
                Error::DataLength {
                    len: 6,
                    expected: 7,
                    ..
                },
                "6 elements",
                "7"
            );
        },
    );
    refused(
        Device::clone,
        |device| Tensor::from_slice_strided(device, [2, 3], [3], &[0.0_f32; 6]),
        |device, error| {
            assert_error!(
                device,
                error,
                Error::StridesRank { strides: 1, rank: 2 },
                "`strides` has 1",
                "2"
            );
        },
    );
}

#[test]
fn views_of_what_is_not_there() {
    let prepare = |device: &Device| Tensor::<f16>::zeros(device, [2, 4, 6, 16]).expect("a small tensor");
    refused(
        prepare,
        |t| t.transpose(1, 4),
        |device, error| {
            assert_error!(device, error, Error::Axis { axis: 4, rank: 4 }, "`axis` is 4", "4 axes");
        },
    );
    refused(
        prepare,
        |t| t.narrow(2, 5, 2),
        |device, error| {
            assert_error!(
                device,
                error,
                Error::Range {
                    axis: 2,
                    start: 5,
                    len: 2,
                    size: 6
                },
                "`start` 5",
                "`len` 2",
                "6 entries"
            );
        },
    );
    refused(
        prepare,
        |t| t.select(7, 0),
        |device, error| {
            assert_error!(device, error, Error::Axis { axis: 7, rank: 4 }, "`axis` is 7");
        },
    );
}

#[test]
fn devices_that_are_not_there() {
    for text in [
        "",
        "tpu",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "emulator:",
        "emulator:sm_50",
        "CPU",
    ] {
        let error = text.parse::<Device>().expect_err(text);
        assert!(
            matches!(&error, Error::ParseDevice { text: got, .. } if got == text),
            "{error}"
        );
        assert!(
            error.to_string().contains("emulator") && error.to_string().contains("sm_80"),
            "{error}"
        );
    }
    let error = "cpu:0".parse::<Device>().expect_err("no instructions");
    assert!(
        matches!(&error, Error::CpuInstructions { argument: "device", name, available } if name == "0" && available.contains("portable")),
        "{error}"
    );
    let error = Device::cpu_with_threads(0).expect_err("no threads");
    assert!(matches!(error, Error::Threads { threads: 0, .. }), "{error}");
}

/// Tests an ordinal that is too large. With a driver and a GPU the error has the number of GPUs. Without, it names
/// what is missing, and `best` is the CPU.
#[test]
fn gpus_that_are_not_there() {
    match Device::cuda(4096) {
        Err(Error::UnknownDevice { ordinal: 4096, count }) => assert!(count > 0),
        Err(Error::CudaUnavailable { reason }) => {
            let named = match reason {
                CudaUnavailable::NoDriver => "libcuda",
                CudaUnavailable::NoGpu => "no GPU",
                _ => "driver",
            };
            assert!(reason.to_string().contains(named), "{reason}");
            assert_eq!(Device::best().expect("the CPU"), Device::cpu());
        }
        other => panic!("{other:?}"),
    }
}
