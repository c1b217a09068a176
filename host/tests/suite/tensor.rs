//! Tests of tensors: views, strides, foreign memory, and the count of bytes.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flash_attention::{Device, Element, Error, Tensor};
use half::{bf16, f16};

fn counting(shape: &[usize]) -> Tensor<f32> {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32).collect();
    Tensor::from_slice(&Device::cpu(), shape, &data).expect("small")
}

fn content<T: Element>(tensor: &Tensor<T>) -> Vec<T> {
    tensor.to_vec().expect("cpu")
}

#[test]
fn elements_come_back_as_they_went() {
    fn check<T: Element>() {
        let data: Vec<T> = (0..24).map(|i| T::from_f64(f64::from(i) / 8.0 - 1.0)).collect();
        let tensor = Tensor::from_slice(&Device::cpu(), [2, 3, 4], &data).expect("small");
        assert_eq!(content(&tensor), data);
        assert_eq!((tensor.shape(), tensor.strides()), (&[2, 3, 4][..], &[12, 4, 1][..]));
        assert_eq!(tensor.dtype(), T::DTYPE);
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn views_show_the_elements_they_name() {
    let tensor = counting(&[2, 3, 4]);
    let transposed = tensor.transpose(0, 2).expect("axes");
    assert_eq!(transposed.shape(), [4, 3, 2]);
    assert_eq!(content(&transposed)[..6], [0.0, 12.0, 4.0, 16.0, 8.0, 20.0]);

    let narrowed = tensor
        .narrow(1, 1, 2)
        .and_then(|t| t.narrow(2, 3, 1))
        .expect("in range");
    assert_eq!(narrowed.shape(), [2, 2, 1]);
    assert_eq!(content(&narrowed), [7.0, 11.0, 19.0, 23.0]);

    let selected = tensor.select(1, 2).expect("in range");
    assert_eq!(
        (selected.shape(), content(&selected)),
        (&[2, 4][..], vec![8.0, 9.0, 10.0, 11.0, 20.0, 21.0, 22.0, 23.0])
    );

    let nothing = tensor.narrow(0, 2, 0).expect("an empty range at the end");
    assert!(content(&nothing).is_empty());
}

#[test]
fn views_of_what_is_not_there_are_refused() {
    let tensor = counting(&[2, 3]);
    assert!(matches!(tensor.transpose(0, 2), Err(Error::Axis { axis: 2, rank: 2 })));
    assert!(matches!(
        tensor.narrow(1, 2, 2),
        Err(Error::Range {
            axis: 1,
            start: 2,
            len: 2,
            size: 3
        })
    ));
    assert!(matches!(tensor.narrow(1, usize::MAX, 2), Err(Error::Range { .. })));
    assert!(matches!(tensor.select(0, 2), Err(Error::Range { .. })));
}

#[test]
fn strides_say_where_elements_lie() {
    let data: Vec<f32> = (0..20).map(|i| i as f32).collect();
    let device = Device::cpu();
    let strided = |shape: [usize; 2], strides: [usize; 2]| Tensor::from_slice_strided(&device, shape, strides, &data);
    assert_eq!(
        content(&strided([2, 3], [10, 2]).expect("fits")),
        [0.0, 2.0, 4.0, 10.0, 12.0, 14.0]
    );
    assert_eq!(
        content(&strided([2, 3], [0, 1]).expect("fits")),
        [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    );
    assert_eq!(
        content(&strided([2, 2], [18, 1]).expect("fits to the last element")),
        [0.0, 1.0, 18.0, 19.0]
    );
    assert!(matches!(
        strided([2, 2], [19, 1]),
        Err(Error::DataLength {
            len: 20,
            expected: 21,
            ..
        })
    ));
    let short = Tensor::from_slice_strided(&device, [2, 2], [1], &data);
    assert!(matches!(short, Err(Error::StridesRank { strides: 1, rank: 2 })));
}

#[test]
fn data_must_be_the_shape() {
    let device = Device::cpu();
    let wrong = Tensor::from_slice(&device, [2, 3], &[0.0_f32; 7]);
    assert!(matches!(
        wrong,
        Err(Error::DataLength {
            len: 7,
            expected: 6,
            ..
        })
    ));
    let huge = Tensor::<f32>::zeros(&device, [usize::MAX, 2]);
    assert!(matches!(huge, Err(Error::SizeOverflow { .. })));
    let absurd = Tensor::<f32>::empty(&device, [1 << 55]);
    assert!(matches!(absurd, Err(Error::OutOfMemory { requested, .. }) if requested == 4 << 55));
}

#[test]
fn bytes_are_counted_and_given_back() {
    let device = Device::cpu_with_threads(1).expect("a thread");
    let first = Tensor::<f32>::zeros(&device, [10]).expect("small");
    let second = Tensor::<f16>::zeros(&device, [3]).expect("small");
    assert_eq!(device.memory().in_use, 46);
    let view = first.narrow(0, 2, 3).expect("in range");
    drop(first);
    assert_eq!(device.memory().in_use, 46, "a view keeps the memory");
    drop((view, second));
    assert_eq!((device.memory().in_use, device.memory().peak), (0, 46));
    device.reset_peak_memory();
    assert_eq!(device.memory().peak, 0);
}

#[test]
fn zeros_are_zero_and_empty_tensors_are_empty() {
    let device = Device::cpu();
    assert_eq!(
        content(&Tensor::<bf16>::zeros(&device, [3, 2]).expect("small")),
        [bf16::ZERO; 6]
    );
    assert!(content(&Tensor::<f32>::zeros(&device, [3, 0, 2]).expect("nothing")).is_empty());
}

/// A foreign buffer that records when it is dropped.
struct Foreign(Vec<f32>, Arc<AtomicBool>);

impl Drop for Foreign {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
    }
}

#[test]
fn foreign_memory_lives_as_long_as_its_tensors() {
    let device = Device::cpu();
    let dropped = Arc::new(AtomicBool::new(false));
    let owner = Arc::new(Foreign((0..12).map(|i| i as f32).collect(), dropped.clone()));
    let address = owner.0.as_ptr().expose_provenance() as u64;
    let owner: Arc<dyn Any + Send + Sync> = owner;
    let in_use = Device::cpu_with_threads(1).expect("a thread");
    // SAFETY: the buffer holds 12 floats, is not written, and lives as long as its owner.
    let tensor =
        unsafe { Tensor::<f32>::from_raw_parts(&in_use, address, [3, 4], [4, 1], Some(owner)) }.expect("aligned");
    assert_eq!(in_use.memory().in_use, 0, "foreign memory is not ours to count");
    assert_eq!(tensor.address(), address);
    let column = tensor.select(1, 1).expect("in range");
    drop(tensor);
    assert_eq!(content(&column), [1.0, 5.0, 9.0]);
    assert!(!dropped.load(Ordering::SeqCst));
    drop(column);
    assert!(dropped.load(Ordering::SeqCst));

    for address in [0, 4097, 4098] {
        // SAFETY: the call is refused before anything is read.
        let refused = unsafe { Tensor::<f32>::from_raw_parts(&device, address, [1], [1], None) };
        assert!(matches!(refused, Err(Error::Address { address: a, align: 4 }) if a == address));
    }
}

#[test]
fn tensors_cross_threads() {
    fn is_send_and_sync<T: Send + Sync>(_: &T) {}
    let tensor = counting(&[4]);
    is_send_and_sync(&tensor);
    is_send_and_sync(tensor.device());
    is_send_and_sync::<Result<(), Error>>(&Ok(()));
}

#[test]
fn a_broadcast_larger_than_the_host_is_an_error() {
    let broadcast =
        Tensor::from_slice_strided(&Device::cpu(), [1 << 30, 1 << 30], [0, 0], &[1.0_f32]).expect("one float");
    let error = broadcast.to_vec().expect_err("4 EiB");
    assert!(
        matches!(&error, Error::OutOfMemory { requested, free: None, .. } if *requested == 4 << 60),
        "{error}"
    );
    let small = broadcast
        .narrow(0, 7, 2)
        .and_then(|rows| rows.narrow(1, 0, 3))
        .expect("in range");
    assert_eq!(content(&small), [1.0; 6]);
}

#[test]
fn the_output_may_be_the_fourth_part_of_packed_qkv() {
    let data: Vec<f32> = (0..8 * 4 * 2 * 16)
        .map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0)
        .collect();
    let packed = Tensor::from_slice(&Device::cpu(), [1, 8, 4, 2, 16], &data).expect("small");
    let [q, k, v, mut out] = [0, 1, 2, 3].map(|i| packed.select(2, i).and_then(|x| x.transpose(1, 2)).expect("axes"));
    let attention = flash_attention::Attention::new();
    let expected = attention.forward(&q, &k, &v).expect("valid");
    let inputs = [&q, &k, &v].map(content);
    let mut lse = Tensor::zeros(&Device::cpu(), [1, 2, 8]).expect("small");
    attention
        .forward_into(&q, &k, &v, &mut out, &mut lse)
        .expect("no element is shared");
    assert_eq!(content(&out), content(&expected.out));
    assert_eq!([&q, &k, &v].map(content), inputs);
    let refused = attention.forward_into(&q, &k, &v, &mut k.clone(), &mut lse);
    assert!(matches!(
        refused,
        Err(Error::Aliased {
            argument: "out",
            other: "k"
        })
    ));
}

#[test]
fn contiguous_copies_only_what_is_not() {
    let tensor = counting(&[2, 3]);
    assert_eq!(tensor.contiguous().expect("cpu").address(), tensor.address());
    let copy = tensor.transpose(0, 1).and_then(|x| x.contiguous()).expect("cpu");
    assert_eq!((copy.shape(), copy.strides()), (&[3, 2][..], &[2, 1][..]));
    assert_eq!(content(&copy), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_ne!(copy.address(), tensor.address());
}
