//! Tests of plans: they depend only on problem and device description, and their numbers agree with direct counting.

use flash_attention::device::DeviceInfo;
use flash_attention::plan::{Entry, ForwardResults, TileMap};
use flash_attention::problem::{Problem, TensorInfo};
use flash_attention::{Arch, Attention, Device, Dtype, Plan};
use flash_attention_kernels::abi::TensorMap;
use flash_attention_tests::{Case, drawn};
use proptest::prelude::*;
use std::convert::Infallible;

/// GPUs described by numbers: A100, RTX 3090, H100.
const CARDS: [DeviceInfo; 3] = [
    DeviceInfo::gpu((8, 0), 108, 163 * 1024),
    DeviceInfo::gpu((8, 6), 82, 99 * 1024),
    DeviceInfo::gpu((9, 0), 132, 227 * 1024),
];

/// Makes the problem of a case, over tensors without memory.
fn problem(case: &Case) -> Problem {
    let info = |shape: [usize; 4]| {
        TensorInfo::contiguous(Device::cpu().id(), case.dtype, shape, 4096).expect("a size that can be counted")
    };
    Problem::new(
        &case.attention,
        &info(case.q),
        &info(case.kv),
        &info(case.v_shape()),
        None,
    )
    .expect("valid")
}

/// Counts bytes read, bytes written and operations, by iterating over every query tile, key block and pair.
fn count(case: &Case, plan: &Plan) -> (u128, u128, u128) {
    let ([batch, heads, seqlen_q, head_dim], seqlen_k) = (case.q, case.kv[2]);
    let tiles = plan.tiles();
    // The tiles of a cluster load keys together.
    let [block_m, block_n, packed] =
        [tiles.block_m * tiles.cluster, tiles.block_n, tiles.packed_heads].map(|n| n as usize);
    let [row_bytes, row_bytes_v] = [head_dim, case.head_dim_v].map(|head_dim| head_dim * case.dtype.bytes());
    // Counts all packed heads together.
    let (mut bytes_read, mut pairs) = (0, 0);
    for first in (0..seqlen_q * packed).step_by(block_m) {
        let rows = first..(first + block_m).min(seqlen_q * packed);
        bytes_read += rows.len() * row_bytes;
        for first_key in (0..seqlen_k).step_by(block_n) {
            let keys = first_key..(first_key + block_n).min(seqlen_k);
            let visible = |row: usize| {
                let sees = |key: usize| !case.attention.is_causal() || key + seqlen_q <= row / packed + seqlen_k;
                keys.clone().filter(|&key| sees(key)).count()
            };
            let seen: usize = rows.clone().map(visible).sum();
            pairs += seen;
            if seen > 0 {
                bytes_read += keys.len() * (row_bytes + row_bytes_v);
            }
        }
    }
    let (heads, packs) = ((batch * heads) as u128, (batch * heads / packed) as u128);
    (
        packs * bytes_read as u128,
        // row_max and row_sum are written beside lse.
        heads * (seqlen_q * (row_bytes_v + 12)) as u128,
        packs * 2 * (pairs * (head_dim + case.head_dim_v)) as u128,
    )
}

/// Returns the number of blocks of a persistent kernel: one per multiprocessor.
fn resident(entry: &Entry, device: &DeviceInfo) -> Option<u32> {
    match *device {
        DeviceInfo::Gpu { multiprocessors, .. } if entry.arch == Arch::Sm90a => Some(multiprocessors),
        _ => None,
    }
}

proptest! {
    #![proptest_config(drawn::config(200))]

    #[test]
    fn plans_are_functions_and_count_exactly(case in drawn::case(300, usize::MAX)) {
        let problem = problem(&case);
        for device in CARDS.into_iter().chain([Device::cpu().info()]) {
            let plan = Plan::new(&problem, &device).expect("every card has a kernel");
            let again = Plan::new(&problem.clone(), &device).expect("every card has a kernel");
            prop_assert_eq!(plan.to_string(), again.to_string());
            prop_assert_eq!((plan.cost(), plan.tiles()), (again.cost(), again.tiles()));
            for (launch, same) in plan.launches().iter().zip(again.launches()) {
                let results = ForwardResults {
                    out: 1 << 20,
                    lse: 1 << 21,
                    statistics: None,
                    workspace: 0,
                };
                // A stand-in for the encoding, which differs if the described tensor differs.
                let encode = |tile: &TileMap| Ok::<_, Infallible>(TensorMap([tile.address + u64::from(tile.box_dims[2]); 16]));
                let params = launch.params(results, encode).unwrap_or_else(|never| match never {});
                let same_params = same.params(results, encode).unwrap_or_else(|never| match never {});
                prop_assert_eq!(params.as_bytes(), same_params.as_bytes());
                prop_assert_eq!((launch.entry.name, launch.grid), (same.entry.name, same.grid));
            }
            let cost = plan.cost();
            prop_assert_eq!((cost.bytes_read, cost.bytes_written, cost.flops), count(&case, &plan));
        }
    }

    /// Tests that a kernel is wide enough, has the right type and mask, and has a block for every query tile of every
    /// head.
    #[test]
    fn plans_launch_what_the_problem_needs(case in drawn::case(300, usize::MAX)) {
        for device in CARDS {
            let plan = Plan::new(&problem(&case), &device).expect("every card has a kernel");
            prop_assert_eq!(plan.launches().len(), 1);
            let launch = &plan.launches()[0];
            let entry = launch.entry;
            // Portable kernels with a head_dim for v of its own are those of score programs, which have the mask in their lists.
            prop_assert_eq!(entry.program, entry.arch == Arch::Sm80 && case.head_dim_v != case.q[3]);
            let causal = case.attention.is_causal() && !entry.program;
            prop_assert_eq!((entry.dtype, entry.causal), (case.dtype, causal));
            let head_dim = case.q[3].max(case.head_dim_v);
            prop_assert!((head_dim..head_dim.next_multiple_of(32).max(192) + 64).contains(&(entry.head_dim as usize)));
            let packed = plan.tiles().packed_heads as usize;
            let tiles = (case.q[2] * packed).div_ceil(entry.block_m as usize);
            let cluster = entry.cluster as usize;
            let blocks = (case.q[0] * case.q[1] / packed * tiles.next_multiple_of(cluster)) as u32;
            prop_assert_eq!(launch.grid, [resident(entry, &device).map_or(blocks, |most| blocks.min(most)), 1, 1]);
            prop_assert_eq!(
                (launch.cluster, plan.tiles().cluster, launch.grid[0] % launch.cluster),
                (entry.cluster, entry.cluster, 0)
            );
            prop_assert_eq!((launch.threads, launch.shared_bytes), (entry.threads, entry.shared_bytes));
        }
    }
}

/// Tests the paper's claim on the plan's numbers: traffic grows with seqlen^2 / block_m, never with the N x N scores,
/// and memory with seqlen.
#[test]
fn traffic_grows_as_the_paper_says() {
    let cost = |seqlen: usize| {
        let case = Case::one_head(Dtype::F16, seqlen, seqlen, 64);
        Plan::new(&problem(&case), &CARDS[0]).expect("a kernel").cost()
    };
    let (short, long) = (cost(1024), cost(4096));
    assert_eq!(long.bytes_written, 4 * short.bytes_written);
    assert_eq!(long.flops, 16 * short.flops);
    // Standard attention writes and reads the scores, and writes and reads the probabilities.
    let standard = 4 * 4096_u128 * 4096 * 2;
    assert!(3 * (long.bytes_read + long.bytes_written) < standard);
    // Q is read once, K and V once for each of the 32 tiles of 128 queries.
    assert_eq!(long.bytes_read, (1 + 2 * 32) * 4096 * 64 * 2);
}

/// Tests that under a causal mask half of the pairs, and nearly half of the traffic, disappear.
#[test]
fn blocks_that_no_query_sees_are_never_read() {
    let case = Case::one_head(Dtype::F16, 4096, 4096, 64);
    let cost = |attention| {
        let problem = problem(&case.clone().with(attention));
        Plan::new(&problem, &CARDS[0]).expect("a kernel").cost()
    };
    let (full, causal) = (cost(Attention::new()), cost(Attention::new().causal()));
    assert!(causal.bytes_read * 100 < full.bytes_read * 54);
    assert_eq!(causal.bytes_written, full.bytes_written);
}

/// Tests that problems larger than any memory are planned: a plan takes sizes, and no tensors.
#[test]
fn plans_need_no_memory() {
    let case = Case::new(Dtype::Bf16, [8, 32, 1 << 20, 128], [8, 8, 1 << 20, 128]);
    let plan = Plan::new(&problem(&case), &CARDS[2]).expect("a kernel");
    assert_eq!(plan.launches()[0].grid[0], 132);
    let portable = case.clone().with(case.attention.arch(Arch::Sm80));
    let plan = Plan::new(&problem(&portable), &CARDS[2]).expect("a kernel");
    assert_eq!(plan.launches()[0].grid[0], 8 * 32 * (1 << 20) / plan.tiles().block_m);
    assert!(plan.to_string().contains("TiB"), "{plan}");
}
