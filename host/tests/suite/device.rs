//! Tests of devices: their names, equality, and the errors of a machine without one.

use flash_attention::device::DeviceKind;
use flash_attention::error::CudaUnavailable;
use flash_attention::{Device, Error, Tensor};

#[test]
fn names_make_devices_and_devices_tell_their_names() {
    let cpu: Device = "cpu".parse().expect("always there");
    assert_eq!((cpu.kind(), cpu.to_string()), (DeviceKind::Cpu, "cpu".to_owned()));
    assert!(cpu.name().contains("threads"), "{}", cpu.name());
    let best: Device = "best".parse().expect("at least the CPU");
    assert_eq!(best.to_string().parse::<Device>().expect("its own name"), best);
    for wrong in [
        "",
        "gpu",
        "CPU",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "emulator:sm_10",
        "best:1",
    ] {
        let error = wrong.parse::<Device>().expect_err(wrong);
        assert!(
            matches!(&error, Error::ParseDevice { text, .. } if text == wrong),
            "{error}"
        );
    }
}

#[test]
fn devices_are_equal_if_their_memory_is() {
    assert_eq!(Device::cpu(), Device::cpu());
    let own = Device::cpu_with_threads(2).expect("two threads");
    assert_eq!(own, own.clone());
    assert_ne!(own, Device::cpu());
}

#[test]
fn no_threads_are_refused() {
    assert!(matches!(
        Device::cpu_with_threads(0),
        Err(Error::Threads { threads: 0, .. })
    ));
}

#[test]
fn more_threads_than_are_of_use_are_refused() {
    for threads in [100_000, usize::MAX] {
        let error = Device::cpu_with_threads(threads).expect_err("too many");
        let Error::TooManyThreads { threads: got, limit } = error else {
            panic!("{error}");
        };
        assert_eq!(got, threads);
        assert!((256..100_000).contains(&limit), "{limit}");
    }
    assert!(Device::cpu_with_threads(256).is_ok());
}

#[test]
fn a_gpu_is_there_or_the_error_says_what_is_missing() {
    match Device::cuda(0) {
        Ok(gpu) => {
            assert_eq!((gpu.to_string(), gpu.kind()), ("cuda:0".to_owned(), DeviceKind::Cuda));
            assert_eq!(Device::cuda(0).expect("it was there"), gpu);
            assert!(matches!(
                Device::cuda(4096),
                Err(Error::UnknownDevice {
                    ordinal: 4096,
                    count: 1..
                })
            ));
        }
        Err(Error::CudaUnavailable { reason }) => {
            let again = Device::cuda(4096).expect_err("no CUDA");
            assert!(matches!(again, Error::CudaUnavailable { reason: r } if r == reason));
            if reason == CudaUnavailable::NoDriver {
                let message = "no NVIDIA driver is installed (libcuda was not found)";
                assert_eq!(reason.to_string(), message);
            }
            assert_eq!(Device::best().expect("the CPU"), Device::cpu());
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs in a separate process for each value of the variable, which other tests of this process must not see.
#[test]
fn an_error_names_the_variable_that_chose_instructions() {
    const NAME: &str = "FLASH_ATTENTION_CPU";
    if std::env::var_os("THE_CHILD_OF_A_TEST").is_none() {
        for value in ["foo", ""] {
            let child = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args(["--exact", "device::an_error_names_the_variable_that_chose_instructions"])
                .env("THE_CHILD_OF_A_TEST", "1")
                .env(NAME, value)
                .output()
                .expect("a process");
            assert!(
                child.status.success(),
                "{value:?}: {}",
                String::from_utf8_lossy(&child.stdout)
            );
        }
        return;
    }
    let result = Tensor::from_slice(&Device::cpu(), [1, 1, 1, 8], &[1.0_f32; 8]);
    if std::env::var(NAME).is_ok_and(|value| value.is_empty()) {
        result.expect("an empty variable chooses nothing");
    } else {
        let error = result.expect_err("no such instructions").to_string();
        assert!(
            error.contains(NAME) && error.contains("foo") && error.contains("portable"),
            "{error}"
        );
    }
}
