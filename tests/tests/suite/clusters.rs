//! Tests of Hopper's forward kernels in clusters of two blocks, which load keys and values together: the same bits as
//! blocks that load alone, in any order of warps, and half of the reads.

use flash_attention::plan::Plan;
use flash_attention::problem::{Problem, TensorInfo};
use flash_attention::{Arch, Attention, Device, Dtype, Element};
use flash_attention_kernels::entries::{ENTRIES, Pass};
use flash_attention_tests::{Case, Inputs, Layout, Order, devices, emulator, for_dtype};

/// Queries of a tile of these kernels.
const BLOCK_M: usize = 128;

/// Seeds of the orders of warps.
const SEEDS: std::ops::Range<u64> = 0..16;

/// Makes the plan of a case with contiguous tensors on a Hopper GPU.
fn plan(case: &Case) -> Plan {
    let device = Device::emulator(Arch::Sm90a);
    let info = |shape| TensorInfo::contiguous(device.id(), case.dtype, shape, 4096).expect("small");
    let (q, k, v) = (info(&case.q), info(&case.kv), info(&case.v_shape()));
    let problem = Problem::new(&case.attention, &q, &k, &v, None).expect("valid");
    Plan::new(&problem, &device.info()).expect("a kernel")
}

/// Returns the bits of out and lse of a case on an emulated Hopper GPU.
fn bits<T: Element>(case: &Case, inputs: &Inputs<T>, seed: u64) -> (Vec<u64>, Vec<u32>) {
    let outcome = case.run(&emulator(Arch::Sm90a, seed, 2), inputs).1;
    let out = outcome.out.iter().map(|x| x.to_f64().to_bits()).collect();
    (out, outcome.lse.iter().map(|x| x.to_bits()).collect())
}

/// Returns the bits of a case from a call for each tile of queries, which is alone with its keys and so in no cluster.
fn bits_of_tiles<T: Element>(case: &Case, inputs: &Inputs<T>) -> (Vec<u64>, Vec<u32>) {
    let ([batch, heads, seqlen_q, head_dim], [_, heads_kv, seqlen_k, _]) = (case.q, case.kv);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for head in 0..batch * heads {
        let head_kv = head / heads * heads_kv + head % heads / (heads / heads_kv);
        let rows = |all: &[T], first: usize, rows: usize, width: usize| all[first * width..][..rows * width].to_vec();
        for first in (0..seqlen_q).step_by(BLOCK_M) {
            let count = BLOCK_M.min(seqlen_q - first);
            let tile = Case::one_head(case.dtype, count, seqlen_k, head_dim)
                .with_head_dim_v(case.head_dim_v)
                .with(case.attention.clone().arch(Arch::Sm90a)); // few queries would be split over their keys
            assert_eq!(plan(&tile).tiles().cluster, 1, "{tile:?}");
            let of_tile = Inputs {
                q: rows(&inputs.q, head * seqlen_q + first, count, head_dim),
                k: rows(&inputs.k, head_kv * seqlen_k, seqlen_k, head_dim),
                v: rows(&inputs.v, head_kv * seqlen_k, seqlen_k, case.head_dim_v),
            };
            let (out_of_tile, lse_of_tile) = bits(&tile, &of_tile, 0);
            out.extend(out_of_tile);
            lse.extend(lse_of_tile);
        }
    }
    (out, lse)
}

/// Tests that a case runs in clusters, and for every seed gives the bits of blocks that load alone.
fn check(case: &Case, seeds: std::ops::Range<u64>) {
    fn check_as<T: Element>(case: &Case, seeds: std::ops::Range<u64>) {
        let inputs = case.inputs::<T>();
        let expected = bits_of_tiles(case, &inputs);
        for seed in seeds {
            assert!(bits(case, &inputs, seed) == expected, "seed {seed}: {case:?}");
        }
    }
    assert_eq!(plan(case).tiles().cluster, 2, "{case:?}");
    if devices().emulation() {
        for_dtype!(case.dtype, T => check_as::<T>(case, seeds));
    }
}

/// Both tiles of a cluster are cut or not, keys fill several tiles, or not even the half that the first block loads.
#[test]
fn every_kernel_has_the_bits_of_blocks_that_load_alone() {
    let kernels = ENTRIES
        .iter()
        .filter(|entry| entry.cluster > 1 && entry.pass == Pass::Forward);
    assert_eq!(kernels.clone().count(), 6);
    for entry in kernels {
        let (head_dim, n) = (entry.head_dim as usize, entry.block_n as usize);
        let case = Case::one_head(entry.dtype, 2 * BLOCK_M - 30, 3 * n + n / 2 + 3, head_dim);
        assert_eq!(plan(&case).launches()[0].entry.name, entry.name);
        check(&case, SEEDS);
        check(&Case::one_head(entry.dtype, 2 * BLOCK_M, n / 2 - 7, head_dim), 16..20);
    }
}

/// Heads that share keys, apart and packed into tiles, batch entries, and head_dims that do not fill the kernel's.
#[test]
fn heads_share_keys_across_a_cluster() {
    let apart = Case::new(Dtype::F16, [2, 4, 251, 192], [2, 2, 130, 192]);
    check(&apart.laid_out([Layout::new(Order::Bshd, 0, 0); 4]), SEEDS);
    let packed = Case::new(Dtype::Bf16, [1, 8, 61, 256], [1, 2, 170, 256]);
    assert_eq!(plan(&packed).tiles().packed_heads, 4);
    check(&packed, SEEDS);
    let narrow = Case::new(Dtype::F16, [1, 2, 130, 104], [1, 2, 200, 104]).with_head_dim_v(72);
    check(&narrow, SEEDS);
}

/// The last block of an odd number of tiles has one that does not exist.
#[test]
fn a_tile_past_the_end_stores_nothing() {
    check(&Case::one_head(Dtype::F16, 32 * BLOCK_M + 1, 90, 256), 3..5);
    check(
        &Case::new(Dtype::Bf16, [1, 2, 33 * BLOCK_M, 128], [1, 1, 30, 128]),
        5..7,
    );
}

/// More clusters than a GPU runs at a time: the pipelines of both blocks continue from tile to tile.
#[test]
fn clusters_stay_for_all_tiles() {
    let case = Case::new(Dtype::F16, [5, 14, 200, 128], [5, 7, 190, 128]);
    let plan = plan(&case);
    assert_eq!((plan.launches()[0].grid, plan.launches()[0].cluster), ([132, 1, 1], 2));
    check(&case, 7..9);
}

/// Tests that clusters read keys and values once for both tiles, as the plan says and the emulator counts.
#[test]
fn clusters_read_keys_once_for_two_tiles() {
    for (dtype, heads, seqlen_q, seqlen_k, head_dim, pairs) in [
        (Dtype::F16, 1, 2 * BLOCK_M, 600, 128, 1),
        (Dtype::Bf16, 3, 6 * BLOCK_M - 1, 113, 192, 9),
        (Dtype::F16, 1, 32 * BLOCK_M + 1, 41, 256, 17),
    ] {
        let case = Case::new(dtype, [1, heads, seqlen_q, head_dim], [1, heads, seqlen_k, head_dim]);
        let plan = plan(&case);
        let rows = heads * seqlen_q + 2 * pairs * seqlen_k;
        assert_eq!(plan.cost().bytes_read, (rows * head_dim * 2) as u128, "{plan}");
        if devices().emulation() {
            let device = emulator(Arch::Sm90a, 1, 2);
            for_dtype!(dtype, T => drop(case.run(&device, &case.inputs::<T>())));
            let read = device.counters().expect("an emulator counts").global_read_bytes;
            assert_eq!(u128::from(read), plan.cost().bytes_read, "{plan}");
        }
    }
}

/// Tests which problems get clusters: full attention of wide heads whose tiles fill the clusters, or nearly.
#[test]
fn clusters_are_planned_where_they_pay() {
    let cluster = |tiles: usize, head_dim, attention: Attention| {
        let case = Case::one_head(Dtype::F16, tiles * BLOCK_M, 300, head_dim).with(attention);
        plan(&case).tiles().cluster
    };
    let full = |tiles, head_dim| cluster(tiles, head_dim, Attention::new());
    for head_dim in [104, 128, 160, 192, 256] {
        for tiles in 1..=40 {
            let fills = tiles % 2 == 0 || tiles > 32;
            assert_eq!(full(tiles, head_dim), if fills { 2 } else { 1 }, "{tiles}, {head_dim}");
        }
    }
    assert_eq!((full(2, 64), full(2, 96)), (1, 1));
    assert_eq!(cluster(2, 128, Attention::new().causal()), 1);
    assert_eq!(cluster(2, 128, Attention::new().softcap(20.0)), 1);
    assert_eq!(cluster(2, 128, Attention::new().arch(Arch::Sm80)), 1);
    assert_eq!(cluster(2, 128, Attention::new().arch(Arch::Sm90a)), 2);
    let printed = plan(&Case::one_head(Dtype::F16, 1024, 1024, 128)).to_string();
    assert!(
        printed.contains("8 x 1 x 1 blocks of 384 threads, in clusters of 2"),
        "{printed}"
    );
}
