//! Score programs on every device: named features alone, in pairs and all together, and random programs.

use flash_attention::{Attention, Device, Dtype};
use flash_attention_tests::programs::{FEATURES, Trees, check_program, trees, with_feature};
use flash_attention_tests::{Case, devices, drawn, for_dtype};
use proptest::prelude::*;

/// Checks a case whose attention is made for each device.
fn check(case: &Case, attention: impl Fn(&Device) -> Attention) {
    for device in devices().all() {
        let case = case.clone().with(attention(device));
        for_dtype!(case.dtype, T => check_program::<T>(&case, device));
    }
}

fn sizes(dtype: Dtype) -> Case {
    Case::new(dtype, [2, 4, 45, 24], [2, 2, 70, 24])
}

#[test]
fn every_named_feature_alone() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for name in FEATURES {
            let case = sizes(dtype);
            check(&case, |device| with_feature(Attention::new(), name, &case, device));
        }
    }
}

#[test]
fn every_pair_of_named_features() {
    let mut dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().cycle();
    for (i, first) in FEATURES.iter().enumerate() {
        for second in &FEATURES[..i] {
            let case = sizes(dtypes.next().expect("a cycle"));
            let attention = |device: &_| {
                let one = with_feature(Attention::new(), first, &case, device);
                with_feature(one, second, &case, device)
            };
            check(&case, attention);
        }
    }
}

#[test]
fn all_named_features_together() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        // A large window and long documents, so that some pairs stay visible.
        let case = Case::new(dtype, [2, 4, 45, 24], [2, 2, 70, 24]);
        let attention = |device: &_| {
            let add = |attention, name: &&str| with_feature(attention, name, &case, device);
            FEATURES.iter().fold(Attention::new(), add)
        };
        check(&case, attention);
    }
}

fn drawn_case() -> impl Strategy<Value = (Trees, Case)> {
    let heads = (1..=2_usize, 1..=2_usize, 1..=3_usize);
    let sizes = (1..=90_usize, 1..=90_usize, 1..=5_usize, 1..=5_usize);
    (trees(), heads, sizes, 0..3_usize, any::<bool>(), any::<u32>()).prop_map(
        |(trees, (batch, heads_kv, group), (seqlen_q, seqlen_k, eighths, eighths_v), dtype, causal, seed)| {
            let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][dtype];
            let q = [batch, heads_kv * group, seqlen_q, 8 * eighths];
            let case = Case {
                head_dim_v: 8 * eighths_v,
                seed: seed.into(),
                ..Case::new(dtype, q, [batch, heads_kv, seqlen_k, 8 * eighths])
            };
            (trees, case.masked(causal))
        },
    )
}

proptest! {
    #![proptest_config(drawn::config(64))]

    #[test]
    fn random_programs_agree_with_the_oracle((trees, case) in drawn_case()) {
        let attention = |device: &_| trees.attention(case.attention.clone(), case.q[1], device);
        check(&case, attention);
    }
}

proptest! {
    #![proptest_config(drawn::config(64))]

    /// The oracle's gradients of random programs are the slopes of its forward pass, in f64.
    #[test]
    fn gradients_of_random_programs_are_finite_differences((trees, case) in drawn_case()) {
        let case = Case {
            q: [1, case.q[1], case.q[2].min(6), 8],
            kv: [1, case.kv[1], case.kv[2].min(7), 8],
            head_dim_v: case.head_dim_v.min(16),
            attention: trees.attention(case.attention.clone(), case.q[1], &Device::cpu()),
            ..case
        };
        flash_attention_tests::programs::check_slopes(&case);
    }
}
