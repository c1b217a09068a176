//! Bytes that decoding from a cache moves and allocates on a GPU.

use flash_attention::half::f16;
use flash_attention::{Arch, Attention, Device, KvCache, Tensor};
use flash_attention_tests::devices;

/// Tests that decoding reads the cache once, as many bytes as the plan counts. Blocks also read their lists and block tables, which the
/// plan does not count.
#[test]
fn decoding_reads_the_cache_once() {
    if !devices().emulation() {
        return;
    }
    for &arch in Arch::ALL {
        let device = &Device::emulator(arch); // of its own, whose counters no other test changes
        let (heads_q, heads_kv, keys, head_dim) = (8, 2, 1536, 128);
        let zeros = |shape: &[usize]| Tensor::<f16>::zeros(device, shape).expect("it fits");
        let (q, k) = (
            zeros(&[2, heads_q, 1, head_dim]),
            zeros(&[keys / 8, 16, heads_kv, head_dim]),
        );
        let pages: Vec<i32> = (0..keys as i32 / 8).rev().collect();
        let cache = KvCache::paged([keys / 8, 16], &pages, &[keys as i32; 2]).expect("pages that exist");
        let attention = Attention::new();
        let plans = attention.plan_cached(&q, &k, &k, &cache).expect("a plan");
        let [plan] = &plans[..] else {
            panic!("{} plans", plans.len())
        };
        assert_eq!(plan.launches().len(), 2, "{plan}");
        attention.forward_cached(&q, &k, &k, &cache).expect("it fits");
        let counters = device.counters().expect("an emulator counts");
        let (sectors, written) = (
            u128::from(counters.global_read_sectors),
            counters.global_written_bytes.into(),
        );
        let of_cache = (2 * 2 * keys * heads_kv * head_dim * 2) as u128;
        let cost = plan.cost();
        assert!(
            cost.bytes_read >= of_cache && cost.bytes_read < of_cache * 103 / 100,
            "{plan}"
        );
        assert_eq!(cost.bytes_written, written, "{plan}");
        // A warp reads a list or a table at one address, so sectors count it once.
        assert!(
            (cost.bytes_read..cost.bytes_read * 115 / 100).contains(&(sectors * 32)),
            "{} of\n{plan}",
            sectors * 32
        );
    }
}

/// Decoding reads a cache of latent keys once for all heads of a tile, values included, and the plan says how much. Beside what it
/// counts, blocks read their lists and block tables. The kernel that combines splits reads statistics again for each piece of a row.
#[test]
fn decoding_reads_latent_keys_once() {
    if !devices().emulation() {
        return;
    }
    let cases = [
        (16, 320, true),
        (32, 320, true),
        (128, 320, true),
        (16, 320, false),
        (16, 1536, true),
    ];
    for &arch in Arch::ALL {
        for (heads, keys, shared) in cases {
            let device = &Device::emulator(arch); // of its own, whose counters no other test changes
            let zeros = |shape: &[usize]| Tensor::<f16>::zeros(device, shape).expect("it fits");
            let (q, k) = (zeros(&[2, heads, 1, 576]), zeros(&[keys / 16, 32, 1, 576]));
            let v = match shared {
                true => k.narrow(3, 0, 512).expect("a view"),
                false => zeros(&[keys / 16, 32, 1, 512]),
            };
            let pages: Vec<i32> = (0..keys as i32 / 16).rev().collect();
            let cache = KvCache::paged([keys / 16, 32], &pages, &[keys as i32; 2]).expect("pages that exist");
            let attention = Attention::new();
            let plans = attention.plan_cached(&q, &k, &v, &cache).expect("a plan");
            let [plan] = &plans[..] else {
                panic!("{} plans", plans.len())
            };
            assert_eq!(plan.launches().len(), if keys > 1024 { 2 } else { 1 }, "{plan}");
            attention.forward_cached(&q, &k, &v, &cache).expect("it fits");
            let counters = device.counters().expect("an emulator counts");
            let row = if shared { 576 } else { 576 + 512 };
            let of_cache = (heads.div_ceil(32) * 2 * keys * row * 2) as u128;
            let of_queries = (2 * heads * 576 * 2) as u128;
            let (cost, parts) = (plan.cost(), u128::from(plan.workspace_bytes()));
            assert_eq!(cost.bytes_read, of_cache + of_queries + parts, "{plan}");
            assert_eq!(cost.bytes_written, counters.global_written_bytes.into(), "{plan}");
            // A warp reads a list or a table at one address, so sectors count it once.
            let sectors = u128::from(counters.global_read_sectors) * 32;
            let most = cost.bytes_read * if parts > 0 { 130 } else { 105 } / 100;
            assert!((cost.bytes_read..most).contains(&sectors), "{sectors} of\n{plan}");
        }
    }
}

/// GPUs read pages where they are.
#[test]
fn a_cached_call_allocates_its_results_and_parts_of_them() {
    for &arch in Arch::ALL {
        let device = Device::emulator(arch);
        let pages = Tensor::<f32>::zeros(&device, [4, 8, 1, 8]).expect("it fits");
        let q = Tensor::<f32>::zeros(&device, [1, 1, 1, 8]).expect("it fits");
        let cache = KvCache::paged([4, 8], &[2, 0, 1], &[20]).expect("pages");
        device.reset_peak_memory();
        let before = device.memory();
        let plans = Attention::new().plan_cached(&q, &pages, &pages, &cache).expect("valid");
        assert_eq!((plans.len(), device.memory()), (1, before), "{device}");
        Attention::new()
            .forward_cached(&q, &pages, &pages, &cache)
            .expect("valid");
        // out, lse, row_max and row_sum, and the parts of splits.
        let expected = (8 + 3) * 4 + plans[0].workspace_bytes();
        assert_eq!(device.memory().peak - before.in_use, expected, "{device}");
    }
}
