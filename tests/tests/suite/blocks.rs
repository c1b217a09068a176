//! Block lists: GPUs neither load nor multiply the tiles that a program's mask leaves empty.

use flash_attention::device::DeviceKind;
use flash_attention::half::f16;
use flash_attention::program::BlockMask;
use flash_attention::{Attention, Device, Element, Tensor};
use flash_attention_kernels::entries::{Arch, Entry};
use flash_attention_tests::{devices, files};

/// Queries, keys and head_dim of the cases, whole tiles of every kernel.
const SEQLEN: usize = 1024;
const HEAD_DIM: usize = 32;

/// One of `every` tiles of 128 x 128 is visible, in each row and each column as many.
fn attention(device: &Device, every: usize) -> Attention {
    let tiles = SEQLEN / 128;
    let visible: Vec<bool> = (0..tiles * tiles)
        .map(|i| (i / tiles + i % tiles).is_multiple_of(every))
        .collect();
    let blocks = BlockMask::from_dense([1, 1], [SEQLEN; 2], [128, 128], &visible).expect("8 x 8 tiles");
    Attention::new().block_mask(&blocks, device).expect("a small table")
}

/// Bytes read and operations of tensor cores, counted; and the bytes that the plans predict. Forward comes first.
struct Traffic {
    predicted: [u64; 2],
    read: [u64; 2],
    written: [(u64, u64); 2],
    products: [u64; 2],
    /// True if the kernels follow lists. Hopper's own visit every tile, and read the mask's table for it.
    follows_lists: [bool; 2],
}

fn traffic<T: Element>(device: &Device, every: usize) -> Traffic {
    let attention = attention(device, every);
    let tensor = |seed| -> Tensor<T> {
        let data: Vec<T> = files::normal(2 * SEQLEN * HEAD_DIM, 1.0, seed)
            .into_iter()
            .map(T::from_f32)
            .collect();
        Tensor::from_slice(device, [1, 2, SEQLEN, HEAD_DIM], &data).expect("small")
    };
    let [q, k, v, dout] = [1, 2, 3, 4].map(tensor);
    device.reset_counters();
    let output = attention.forward(&q, &k, &v).expect("no finding");
    let forward = device.counters().expect("the emulator counts");
    device.reset_counters();
    attention.backward(&q, &k, &v, &output, &dout).expect("no finding");
    let backward = device.counters().expect("the emulator counts");
    let plan = attention.plan(&q, &k, &v).expect("a plan");
    let of_backward = attention.plan_backward(&q, &k, &v, &output, &dout).expect("a plan");
    let costs = [plan.cost(), of_backward.cost()];
    let is_portable = |entry: &'static Entry| entry.arch == Arch::Sm80;
    let counted = [forward, backward];
    Traffic {
        predicted: costs.map(|cost| cost.bytes_read as u64),
        read: counted.each_ref().map(|counters| counters.global_read_sectors * 32),
        written: [0, 1].map(|pass| (costs[pass].bytes_written as u64, counted[pass].global_written_bytes)),
        products: counted
            .each_ref()
            .map(|counters| counters.tensor_flops + counters.flops),
        follows_lists: [plan.entries().all(is_portable), of_backward.entries().all(is_portable)],
    }
}

/// Tests that bytes and operations follow the density at 1/2, 1/4 and 1/8. A warp reads its block's work and runs at one address, so that
/// sectors count a list once a warp; a full tile reads nothing of the mask's table.
fn check<T: Element>(device: &Device) {
    let densities = [2, 4, 8].map(|every| traffic::<T>(device, every));
    for (every, traffic) in [2, 4, 8].into_iter().zip(&densities) {
        for pass in 0..2 {
            let (predicted, read) = (traffic.predicted[pass], traffic.read[pass]);
            assert!(
                predicted <= read && (!traffic.follows_lists[pass] || read <= predicted * 3 / 2),
                "{device}, 1/{every}, pass {pass}: {read} bytes, predicted {predicted}"
            );
            let (predicted, written) = traffic.written[pass];
            assert_eq!(written, predicted, "{device}, 1/{every}, pass {pass}");
        }
    }
    for pair in densities.windows(2) {
        for pass in 0..2 {
            let ratio = pair[0].products[pass] as f64 / pair[1].products[pass] as f64;
            assert!(
                ratio > 1.6,
                "{device}, pass {pass}: half the tiles take 1/{ratio:.2} of the operations"
            );
        }
    }
}

#[test]
fn bytes_and_operations_follow_the_density() {
    for check in [check::<f32>, check::<f16>] {
        for device in devices().unshared() {
            if device.kind() == DeviceKind::Emulator {
                check(&device);
            }
        }
    }
}

/// Tests that a mask which shows whole tiles has the bits of one that shows the same pairs one by one, which no list knows of.
#[test]
fn lists_change_no_bit() {
    for device in devices().all().filter(|device| device.kind() != DeviceKind::Cpu) {
        let data: Vec<f16> = files::normal(2 * 200 * HEAD_DIM, 1.0, 7)
            .into_iter()
            .map(f16::from_f32)
            .collect();
        let x = Tensor::from_slice(device, [1, 2, 200, HEAD_DIM], &data).expect("small");
        let ids: Vec<i32> = (0..200).map(|i| i / 70).collect();
        let ids = Tensor::from_slice(device, [1, 200], &ids).expect("small");
        let unknown = Attention::new().documents(&ids, &ids);
        let known = Attention::new().mask(|at| (at.query / 70).equals(at.key / 70));
        let results = [unknown, known].map(|attention| {
            let attention = attention.arch(Arch::Sm80);
            let output = attention.forward(&x, &x, &x).expect("no finding");
            let gradients = attention.backward(&x, &x, &x, &output, &x).expect("no finding");
            [output.out, gradients.dq, gradients.dk, gradients.dv].map(|tensor| tensor.to_vec().expect("it is there"))
        });
        assert!(results[0] == results[1], "{device}");
    }
}
