//! Tests of the compiled kernels on the emulator with all checks on: correct results, no findings, and the bytes that
//! plans predict.

use flash_attention::device::{DeviceKind, EmulatorOptions};
use flash_attention::{Arch, Attention, Device, Element, Error, Tensor};
use half::{bf16, f16};

fn emulator() -> Device {
    Device::emulator(Arch::Sm80)
}

#[test]
fn every_dtype_full_and_causal() {
    for attention in [Attention::new(), Attention::new().causal()] {
        crate::common::check::<f32>(&emulator(), attention.clone(), [1, 2, 70, 32], [1, 1, 90, 32]);
        crate::common::check::<f16>(&emulator(), attention.clone(), [1, 2, 130, 64], [1, 1, 90, 64]);
        crate::common::check::<bf16>(&emulator(), attention, [2, 1, 20, 64], [2, 1, 70, 64]);
    }
}

#[test]
fn a_head_narrower_than_its_kernel() {
    crate::common::check::<f32>(&emulator(), Attention::new(), [1, 1, 5, 40], [1, 1, 7, 40]);
    crate::common::check::<f16>(&emulator(), Attention::new(), [1, 1, 5, 8], [1, 1, 7, 8]);
}

#[test]
fn scales_of_every_sign() {
    for scale in [0.0, -0.7] {
        let attention = Attention::new().softmax_scale(scale).causal();
        crate::common::check::<f32>(&emulator(), attention.clone(), [1, 1, 9, 16], [1, 1, 5, 16]);
        crate::common::check::<f16>(&emulator(), attention, [1, 1, 9, 16], [1, 1, 5, 16]);
    }
}

#[test]
fn seeds_change_the_order_and_not_the_result() {
    fn run<T: Element>(seed: u64) -> (Vec<T>, Vec<f32>) {
        let mut options = EmulatorOptions::new(Arch::Sm80);
        options.launch.seed = seed;
        let device = Device::emulator_with(options);
        let data: Vec<T> = crate::common::noise(90 * 32, 3).into_iter().map(T::from_f64).collect();
        let q = Tensor::from_slice(&device, [1, 1, 90, 32], &data).expect("small");
        let output = Attention::new().causal().forward(&q, &q, &q).expect("no findings");
        (
            output.out.to_vec().expect("emulator"),
            output.lse.to_vec().expect("emulator"),
        )
    }
    assert!(run::<f16>(1) == run::<f16>(2) && run::<f32>(3) == run::<f32>(4));
}

#[test]
fn plans_predict_the_bytes_that_move() {
    fn check<T: Element>(attention: Attention, q: [usize; 4], k: [usize; 4]) {
        let device = emulator();
        let zeros = |shape| Tensor::<T>::zeros(&device, shape).expect("small");
        let (q, k, v) = (zeros(q), zeros(k), zeros(k));
        let cost = attention.plan(&q, &k, &v).expect("valid").cost();
        for launches in 1..=2 {
            attention.forward(&q, &k, &v).expect("no findings");
            let counters = device.counters().expect("the emulator counts");
            let counted = (counters.global_read_bytes.into(), counters.global_written_bytes.into());
            assert_eq!(
                counted,
                (launches * cost.bytes_read, launches * cost.bytes_written),
                "{attention:?} {q:?}"
            );
        }
        device.reset_counters();
        assert_eq!(device.counters().expect("still").global_read_bytes, 0);
    }
    for attention in [Attention::new(), Attention::new().causal()] {
        check::<f32>(attention.clone(), [1, 2, 100, 32], [1, 1, 150, 32]);
        check::<f16>(attention.clone(), [1, 2, 200, 24], [1, 2, 70, 24]);
        check::<bf16>(attention, [1, 1, 40, 128], [1, 1, 40, 128]);
    }
}

#[test]
fn foreign_memory_that_is_not_there_is_a_finding() {
    let device = emulator();
    let q = Tensor::<f32>::zeros(&device, [1, 1, 4, 8]).expect("small");
    // SAFETY: the emulator checks the bounds of its memory: a wrong address is reported, not accessed.
    let wrong =
        unsafe { Tensor::<f32>::from_raw_parts(&device, q.address() + 256, [1, 1, 4, 8], [32, 32, 8, 1], None) };
    let error = Attention::new()
        .forward(&q, &q, &wrong.expect("aligned"))
        .expect_err("out of bounds");
    let Error::Findings { report, kernel, .. } = &error else {
        panic!("{error}")
    };
    assert!(kernel.starts_with("forward_f32") && !report.is_clean());
    assert!(error.to_string().contains("out of bounds"), "{error}");
}

#[test]
fn memory_runs_out_with_the_numbers() {
    let mut options = EmulatorOptions::new(Arch::Sm80);
    options.memory_bytes = 1000;
    let device = Device::emulator_with(options);
    assert_eq!(
        (device.kind(), device.to_string()),
        (DeviceKind::Emulator, "emulator:sm_80".to_owned())
    );
    let _first = Tensor::<f32>::zeros(&device, [100]).expect("fits");
    let error = Tensor::<f32>::zeros(&device, [200]).expect_err("does not fit");
    assert!(
        matches!(
            error,
            Error::OutOfMemory {
                requested: 800,
                free: Some(600),
                ..
            }
        ),
        "{error}"
    );
}
