//! Tests of plans: bytes and operations against direct counting, and the parameters of the kernel.

use flash_attention::device::{DeviceInfo, Instructions};
use flash_attention::plan::{ForwardParameters, ForwardResults, Launch, TileMap};
use flash_attention::problem::{BackwardInputs, BackwardProblem, Problem, TensorInfo};
use flash_attention::{Attention, Device, Dtype, Error, Plan};
use flash_attention_kernels::abi::ForwardParams;

const A100: DeviceInfo = DeviceInfo::gpu((8, 0), 108, 163 * 1024);

fn problem(attention: Attention, dtype: Dtype, q: [usize; 4], k: [usize; 4]) -> Problem {
    let info = |shape: [usize; 4]| TensorInfo::contiguous(Device::cpu().id(), dtype, shape, 4096).expect("countable");
    Problem::new(&attention, &info(q), &info(k), &info(k), None).expect("valid")
}

/// Counts bytes read, bytes written and operations by iterating over every tile, key block and pair.
fn count(problem: &Problem, block_m: usize, block_n: usize, statistics: usize) -> (u128, u128, u128) {
    let (seqlen_q, seqlen_k) = (problem.seqlen_q() as usize, problem.seqlen_k() as usize);
    let visible = |i: usize, j: usize| !problem.causal() || j + seqlen_q <= i + seqlen_k;
    let row_bytes = problem.head_dim() as usize * problem.dtype().bytes();
    let (mut read, mut written, mut pairs) = (0, 0, 0);
    for _head in 0..problem.batch() * problem.heads_q() {
        for first in (0..seqlen_q).step_by(block_m) {
            let rows = first..(first + block_m).min(seqlen_q);
            read += rows.len() * row_bytes;
            written += rows.len() * (row_bytes + 4 * statistics);
            for first_key in (0..seqlen_k).step_by(block_n) {
                let keys = first_key..(first_key + block_n).min(seqlen_k);
                let seen = rows
                    .clone()
                    .map(|i| keys.clone().filter(|&j| visible(i, j)).count())
                    .sum::<usize>();
                pairs += seen;
                read += if seen > 0 { 2 * keys.len() * row_bytes } else { 0 };
            }
        }
    }
    (
        read as u128,
        written as u128,
        (4 * pairs * problem.head_dim() as usize) as u128,
    )
}

#[test]
fn costs_are_what_counting_gives() {
    for (seqlen_q, seqlen_k) in [(1, 1), (64, 64), (65, 63), (200, 331), (331, 200), (129, 1), (1, 129)] {
        for attention in [Attention::new(), Attention::new().causal()] {
            for dtype in [Dtype::F32, Dtype::F16] {
                for device in [A100, Device::cpu().info()] {
                    let problem = problem(attention.clone(), dtype, [2, 4, seqlen_q, 40], [2, 2, seqlen_k, 40]);
                    let plan = Plan::new(&problem, &device).expect("there is a kernel");
                    let (tiles, cost) = (plan.tiles(), plan.cost());
                    let statistics = 3; // lse, row_max, row_sum
                    let counted = count(&problem, tiles.block_m as usize, tiles.block_n as usize, statistics);
                    assert_eq!((cost.bytes_read, cost.bytes_written, cost.flops), counted, "{plan}");
                }
            }
        }
    }
}

/// Counts bytes read and written by the CPU's backward pass by iterating over every run of keys, tile of queries and
/// pair.
fn count_backward(problem: &Problem, block_m: usize, block_n: usize) -> (u128, u128) {
    let (seqlen_q, seqlen_k) = (problem.seqlen_q() as usize, problem.seqlen_k() as usize);
    let visible = |i: usize, j: usize| !problem.causal() || j + seqlen_q <= i + seqlen_k;
    let head_dim = problem.head_dim() as usize;
    let row_bytes = head_dim * problem.dtype().bytes();
    let (mut read, mut written) = (0, 0);
    for _key_head in 0..problem.batch() * problem.heads_kv() {
        read += 2 * seqlen_k * row_bytes;
        written += 2 * seqlen_k * row_bytes;
    }
    for _head in 0..problem.batch() * problem.heads_q() {
        read += 2 * seqlen_q * row_bytes; // out and dout, for delta
        written += 4 * seqlen_q;
        for first in (0..seqlen_q).step_by(block_m) {
            let rows = first..(first + block_m).min(seqlen_q);
            let sees = |first_key: &usize| {
                let keys = *first_key..(first_key + block_n).min(seqlen_k);
                rows.clone().any(|i| keys.clone().any(|j| visible(i, j)))
            };
            let runs = (0..seqlen_k).step_by(block_n).filter(sees).count();
            let sums = rows.len() * 4 * head_dim * runs.saturating_sub(1);
            read += runs * rows.len() * 2 * (row_bytes + 4) + sums;
            written += sums + rows.len() * row_bytes;
        }
    }
    (read as u128, written as u128)
}

#[test]
fn backward_costs_of_the_cpu_are_what_counting_gives() {
    let info =
        |dtype, shape: &[usize]| TensorInfo::contiguous(Device::cpu().id(), dtype, shape, 4096).expect("countable");
    for (seqlen_q, seqlen_k) in [
        (1, 1),
        (96, 256),
        (97, 257),
        (200, 831),
        (331, 200),
        (500, 300),
        (1, 600),
    ] {
        for attention in [Attention::new(), Attention::new().causal()] {
            for dtype in [Dtype::F32, Dtype::F16] {
                let q = info(dtype, &[2, 4, seqlen_q, 40]);
                let k = info(dtype, &[2, 2, seqlen_k, 40]);
                let lse = info(Dtype::F32, &[2, 4, seqlen_q]);
                let from_above = BackwardInputs::new(&q, &lse, &q);
                let problem = BackwardProblem::new(&attention, &q, &k, &k, from_above, None).expect("valid");
                let plan = Plan::backward(&problem, &Device::cpu().info()).expect("the CPU solves all");
                let (tiles, cost) = (plan.tiles(), plan.cost());
                let counted = count_backward(plan.problem(), tiles.block_m as usize, tiles.block_n as usize);
                assert_eq!((cost.bytes_read, cost.bytes_written), counted, "{plan}");
            }
        }
    }
}

#[test]
fn the_grid_has_a_block_for_every_tile_of_every_head() {
    let problem = problem(Attention::new(), Dtype::F32, [3, 4, 200, 64], [3, 1, 50, 64]);
    let plan = Plan::new(&problem, &A100).expect("there is a kernel");
    let [launch] = plan.launches() else {
        panic!("one launch")
    };
    assert_eq!(launch.grid, [200_u32.div_ceil(launch.entry.block_m) * 12, 1, 1]);
    assert_eq!(
        (launch.threads, launch.shared_bytes),
        (launch.entry.threads, launch.entry.shared_bytes)
    );
    let params = forward_params(launch, 1 << 20, 1 << 21);
    assert_eq!((params.out.address, params.lse), (1 << 20, 1 << 21));
    assert_eq!((params.heads_q.get(), params.heads_q_per_kv.get()), (4, 4));
    assert_eq!(
        (params.seqlen_q, params.seqlen_k, params.layout.head_dim),
        (200, 50, 64)
    );
    assert_eq!(params.query_tiles.get(), 200_u32.div_ceil(launch.entry.block_m));
}

/// Returns the parameters of a forward launch, for results at these addresses.
fn forward_params(launch: &Launch, out: u64, lse: u64) -> ForwardParams {
    let no_map = |map: &TileMap| Err(format!("a tensor map of {map:?}"));
    match launch.params(
        ForwardResults {
            out,
            lse,
            statistics: None,
            workspace: 0,
        },
        no_map,
    ) {
        Ok(ForwardParameters::Portable(params)) => params,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_narrowest_kernel_that_is_wide_enough() {
    for (head_dim, width) in [(8, 32), (32, 32), (40, 64), (128, 128), (136, 192), (256, 256)] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let problem = problem(
                Attention::new().causal(),
                dtype,
                [1, 1, 9, head_dim],
                [1, 1, 9, head_dim],
            );
            let plan = Plan::new(&problem, &A100).expect("there is a kernel");
            let entry = plan.launches()[0].entry;
            assert_eq!((entry.head_dim, entry.dtype, entry.causal), (width, dtype, true));
        }
    }
}

#[test]
fn scales_become_a_magnitude_and_a_sign() {
    for (scale, log2, sign) in [
        (1.0, std::f32::consts::LOG2_E, 1.0),
        (-2.0, 2.0 * std::f32::consts::LOG2_E, -1.0),
        (0.0, std::f32::consts::LOG2_E, 0.0), // as for magnitude 1: every score is 0
        (-0.0, std::f32::consts::LOG2_E, 0.0),
    ] {
        let attention = Attention::new().softmax_scale(scale);
        let plan = Plan::new(&problem(attention, Dtype::F32, [1, 1, 1, 8], [1, 1, 1, 8]), &A100).expect("a kernel");
        let params = forward_params(&plan.launches()[0], 0, 0);
        assert_eq!((params.scale_log2, params.scale_sign), (log2, sign), "{scale}");
    }
}

#[test]
fn only_what_is_aligned_is_copied_in_sixteens() {
    let device = Device::cpu();
    let aligned = |address: u64, strides: [usize; 4], out: u64| {
        let info =
            |address| TensorInfo::new(device.id(), Dtype::F16, [2, 2, 5, 8], strides, address).expect("countable");
        let (q, k) = (info(address), info(1 << 20));
        let problem = Problem::new(&Attention::new(), &q, &k, &k, None).expect("valid");
        let plan = Plan::new(&problem, &A100).expect("there is a kernel");
        forward_params(&plan.launches()[0], out, 4).layout.aligned == 1
    };
    assert!(aligned(4096, [80, 40, 8, 1], 256));
    assert!(!aligned(4096 + 8, [80, 40, 8, 1], 256));
    assert!(!aligned(4096, [80, 40, 8, 1], 256 + 2));
    assert!(!aligned(4096, [88, 44, 8, 1], 256));
    assert!(!aligned(4096, [96, 48, 9, 1], 256));
}

#[test]
fn what_no_launch_can_hold_is_refused() {
    let heads = 1 << 31;
    let info =
        |shape: [usize; 4]| TensorInfo::contiguous(Device::cpu().id(), Dtype::F16, shape, 4096).expect("countable");
    let problem = |heads| {
        let q = info([1, heads, 1, 8]);
        Problem::new(&Attention::new(), &q, &q, &q, None).expect("valid")
    };
    assert!(Plan::new(&problem(heads - 1), &A100).is_ok());
    let refused = Plan::new(&problem(heads), &A100);
    assert!(
        matches!(refused, Err(Error::GridTooLarge { blocks, limit }) if blocks == 1 << 31 && limit == flash_attention::plan::MAX_BLOCKS)
    );
}

#[test]
fn devices_without_a_kernel_are_refused() {
    let problem = problem(Attention::new(), Dtype::F16, [1, 1, 1, 128], [1, 1, 1, 128]);
    for device in [
        DeviceInfo::gpu((7, 5), 72, 64 * 1024),
        DeviceInfo::gpu((8, 0), 108, 1024),
    ] {
        let refused = Plan::new(&problem, &device);
        assert!(matches!(refused, Err(Error::NoKernel { .. })), "{device:?}");
    }
    assert!(Plan::new(&problem, &DeviceInfo::gpu((12, 0), 188, 99 * 1024)).is_ok());
}

#[test]
fn a_plan_reads_as_a_table() {
    let problem = problem(
        Attention::new().causal(),
        Dtype::F16,
        [1, 12, 331, 32],
        [1, 12, 331, 32],
    );
    let table = Plan::new(&problem, &A100).expect("there is a kernel").to_string();
    for expected in [
        "causal",
        "f16",
        "seqlen 331 x 331",
        "blocks of",
        "SRAM",
        "HBM read",
        "HBM write",
        "FLOPs",
    ] {
        assert!(table.contains(expected), "{expected:?} is not in\n{table}");
    }
}

#[test]
fn a_plan_for_a_cpu_says_what_computes_it() {
    let plan = |dtype, seqlen_q, seqlen_k, instructions| {
        let problem = problem(Attention::new(), dtype, [1, 1, seqlen_q, 128], [1, 1, seqlen_k, 128]);
        Plan::new(&problem, &DeviceInfo::cpu(2, instructions)).expect("the CPU runs everything")
    };
    let parts = |dtype, seqlen_q, instructions| {
        let plan = plan(dtype, seqlen_q, 64, instructions);
        plan.cpu_path().expect("it is for a CPU").parts
    };
    let many = 64;
    assert_eq!(parts(Dtype::F32, many, Instructions::Amx), 3);
    assert_eq!(parts(Dtype::F16, many, Instructions::Amx), 2);
    assert_eq!(parts(Dtype::Bf16, many, Instructions::Avx512Bf16), 1);
    assert_eq!(parts(Dtype::F16, many, Instructions::Avx512Bf16), 0);
    assert_eq!(parts(Dtype::Bf16, many, Instructions::Avx2), 0);
    // Four queries are computed one by one, in f32.
    assert_eq!(parts(Dtype::Bf16, 4, Instructions::Amx), 0);

    // Half the L1 cache has room for the parts of 32 keys and values of 64 elements, not for those of 64.
    let block_n = |head_dim, instructions| {
        let shape = [1, 1, many, head_dim];
        let problem = problem(Attention::new(), Dtype::F32, shape, shape);
        let plan = Plan::new(&problem, &DeviceInfo::cpu(2, instructions)).expect("the CPU runs everything");
        plan.tiles().block_n
    };
    assert_eq!([64, 128].map(|head_dim| block_n(head_dim, Instructions::Amx)), [32, 64]);
    assert_eq!(block_n(64, Instructions::Avx512), 64);

    let long = plan(Dtype::F32, 1, 40_000, Instructions::Avx2).to_string();
    for line in [
        "kernel    native code, AVX2, products of f32, queries one by one",
        "threads   at most 2",
        "splits    16 of 2560 keys",
    ] {
        assert!(long.lines().any(|got| got == line), "no `{line}` in\n{long}");
    }
}
