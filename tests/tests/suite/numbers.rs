//! Tests of numbers at the ends of f32's range, and of numbers that a mask hides: results follow the definition.

use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Device, Dtype, Element, Tensor};
use flash_attention_tests::{Allowances, Case, Inputs, devices, drawn};
use proptest::prelude::*;

const HEAD_DIM: usize = 64;

/// Magnitudes of q, k and the scale, as powers of ten, and which keys differ from normal numbers.
#[derive(Clone, Copy, Debug)]
struct Extreme {
    q: f32,
    k: f32,
    scale: f32,
    negative: bool,
    /// Every key of this many is 16 times as large, and weighs nearly everything where it is the largest.
    dominant: Option<usize>,
    /// Number of different keys. A query then has several keys of the largest score, unless most of them are hidden.
    different: Option<usize>,
}

/// Draws magnitudes between `10^-limit` and `10^limit`, those of scores up to `10^30`, and of scale times q or k, which gradients
/// are a few times as large as, up to `10^gradients`.
fn extreme(limit: f32, gradients: f32) -> impl Strategy<Value = Extreme> {
    let power = move || -limit..limit;
    let every = || prop_oneof![Just(None), (2..9_usize).prop_map(Some)];
    let powers = (power(), power(), -30.0..30.0_f32);
    (powers, any::<bool>(), every(), every()).prop_map(move |((q, k, scores), negative, dominant, different)| {
        // Products of q and k are normal numbers of f32, and gradients within what the dtype holds.
        let k = k.clamp(-33.0 - q, 29.0 - q);
        let most = (gradients - q.max(k)).min(37.0);
        let scale = (scores - q - k).clamp(-37.0, most).min(29.0 - q - k);
        Extreme {
            q,
            k,
            scale,
            negative,
            dominant,
            different,
        }
    })
}

impl Extreme {
    /// The case with the scale of these magnitudes, and its inputs.
    fn applied<T: Element>(&self, case: &Case) -> (Case, Inputs<T>) {
        let sign = if self.negative { -1.0 } else { 1.0 };
        let attention = Attention::new().softmax_scale(sign * 10.0_f32.powf(self.scale));
        let allowances = Allowances {
            orders: true,
            // In f32 such queries have delta from the keys.
            delta: T::DTYPE != Dtype::F32,
            overflow: T::DTYPE == Dtype::F16,
        };
        let case = (case.clone().with(attention))
            .masked(case.attention.is_causal())
            .allowing(allowances);
        let (drawn, head_dim) = (case.inputs::<f32>(), case.q[3]);
        let times = |elements: &[f32], power: f32| -> Vec<T> {
            elements.iter().map(|x| T::from_f32(x * 10.0_f32.powf(power))).collect()
        };
        let mut k = drawn.k.clone();
        for (row, elements) in k.chunks_mut(head_dim).enumerate() {
            let row = self.different.map_or(row, |different| row % different);
            elements.copy_from_slice(&drawn.k[row * head_dim..][..head_dim]);
            if self.dominant.is_some_and(|every| row % every == every / 2) {
                elements.iter_mut().for_each(|x| *x *= 16.0);
            }
        }
        let inputs = Inputs {
            q: times(&drawn.q, self.q),
            k: times(&k, self.k - if self.dominant.is_some() { 1.2 } else { 0.0 }),
            v: times(&drawn.v, 0.0),
        };
        (case, inputs)
    }

    fn check<T: Element>(&self, case: &Case) {
        let (case, inputs) = self.applied::<T>(&Case {
            dtype: T::DTYPE,
            ..case.clone()
        });
        case.check_of(&inputs, devices().of_every_instruction_set());
        case.check_gradients_of(&inputs, &case.dout(), devices().of_every_instruction_set());
    }
}

/// Draws a case of one or two heads that share keys: small enough for the emulator, with so many elements that the largest error
/// of standard attention is no matter of luck.
fn small() -> impl Strategy<Value = Case> {
    let lengths = (20..=40_usize, 8..=150_usize, 3..=9_usize, 1..=2_usize);
    (lengths, any::<bool>(), any::<u32>()).prop_map(|((seqlen_q, seqlen_k, eighths, heads), causal, seed)| Case {
        seed: seed.into(),
        ..Case::new(
            Dtype::F32,
            [1, heads, seqlen_q, 8 * eighths],
            [1, 1, seqlen_k, 8 * eighths],
        )
        .masked(causal)
    })
}

proptest! {
    #![proptest_config(drawn::config(16))]

    /// Forward and backward obey the rule at any magnitude of queries, keys, scale and scores.
    #[test]
    fn f32_at_any_magnitude(case in small(), extreme in extreme(30.0, 30.0)) {
        extreme.check::<f32>(&case);
    }

    #[test]
    fn bf16_at_any_magnitude(case in small(), extreme in extreme(30.0, 30.0)) {
        extreme.check::<bf16>(&case);
    }

    #[test]
    fn f16_at_any_magnitude(case in small(), extreme in extreme(3.5, 2.0)) {
        extreme.check::<f16>(&case);
    }
}

/// One key with all the weight of a query gets no gradient of its score, to the bit: its dP is delta. f32, on the CPU; with dropout and
/// a score program too, and where queries of several keys are in the same tile.
#[test]
fn one_key_with_all_the_weight_has_no_score_gradient() {
    let attention = || Attention::new().softmax_scale(1e8);
    for attention in [
        attention(),
        attention().causal(),
        attention().dropout(0.3, 7),
        attention().softcap(1e9),
    ] {
        let case = Case::new(Dtype::F32, [1, 4, 130, 72], [1, 2, 150, 72]).with(attention);
        let mut inputs = case.inputs::<f32>();
        let several = 50..60; // queries of the first head whose keys weigh the same
        inputs.q[several.start * 72..several.end * 72].fill(0.0);
        for device in devices().of_every_instruction_set() {
            let (_, gradients) = case.run_backward(device, &inputs, &case.dout());
            let zero = |(row, gradient): (usize, &[f32])| several.contains(&row) || gradient.iter().all(|&x| x == 0.0);
            assert!(
                gradients.dq.chunks(72).enumerate().all(zero),
                "{case:?} on {device}: dq"
            );
            // Queries of zeros add nothing to dK.
            assert!(gradients.dk.iter().all(|&x| x == 0.0), "{case:?} on {device}: dk");
        }
    }
}

/// Returns queries and keys of one column, whose products are whole numbers times a power of two, so that every device and
/// f64 have the same scores at any magnitude. One key in seven dominates.
fn of_magnitude<T: Element>(case: &Case, q: i32, k: i32) -> Inputs<T> {
    let mut inputs = case.inputs::<T>();
    for (row, elements) in inputs.q.chunks_mut(HEAD_DIM).enumerate() {
        elements.fill(T::from_f32(0.0));
        elements[0] = T::from_f32(((row % 7) as f32 - 3.0) * 2.0_f32.powi(q));
    }
    for (row, elements) in inputs.k.chunks_mut(HEAD_DIM).enumerate() {
        let dominates = if row % 7 == 3 { 20.0 } else { 0.0 };
        elements.fill(T::from_f32(0.0));
        elements[0] = T::from_f32(((row * 5 % 13) as f32 - 6.0 + dominates) * 2.0_f32.powi(k));
    }
    inputs
}

/// Checks forward of scores of any magnitude and scale: out within 2e-2 (16 bits) or 1e-5, lse within a millionth of itself.
fn check_magnitude<T: Element>(q: i32, k: i32, scale: f32, causal: bool) {
    let attention = Attention::new().softmax_scale(scale);
    let attention = if causal { attention.causal() } else { attention };
    let case = Case::one_head(T::DTYPE, 9, 140, HEAD_DIM).with(attention);
    let inputs = of_magnitude::<T>(&case, q, k);
    let (out, lse) = inputs.oracle(&case.dims());
    let bound = if T::DTYPE.bytes() == 4 { 1e-5 } else { 2e-2 };
    for device in devices().of_every_instruction_set() {
        let (_, outcome) = case.run(device, &inputs);
        for (i, (got, want)) in outcome.out.iter().zip(&out).enumerate() {
            let difference = (got.to_f64() - want).abs();
            assert!(
                difference <= bound,
                "{case:?} on {device}, 2^{q} x 2^{k}: out[{i}] {got:?}, want {want}"
            );
        }
        for (row, (&got, &want)) in outcome.lse.iter().zip(&lse).enumerate() {
            let difference = (f64::from(got) - want).abs();
            assert!(
                difference <= 1e-5 + 1e-6 * want.abs(),
                "{case:?} on {device}, 2^{q} x 2^{k}: lse[{row}] {got}, want {want}"
            );
        }
    }
}

proptest! {
    #![proptest_config(drawn::config(12))]

    #[test]
    fn forward_of_exact_scores_at_any_magnitude(
        q in -40..=40_i32, k in -40..=40_i32, scale in -90..=90_i32, negative in any::<bool>(), causal in any::<bool>(),
    ) {
        // Scores up to 1e30 or so, after the scale and before.
        let scale = 2.0_f32.powi(scale.min(90 - q - k)) * if negative { -1.3 } else { 1.3 };
        check_magnitude::<f32>(q, k, scale, causal);
        check_magnitude::<bf16>(q, k, scale, causal);
        check_magnitude::<f16>(q % 10, k % 10, scale, causal);
    }
}

/// Equal keys of any score weigh the same, on any device: dV sums to dO, each key has its share of it.
fn check_equal_keys<T: Element>(device: &Device, rows: usize, keys: usize, magnitude: f32, scale: f32) {
    let case = Case::one_head(T::DTYPE, rows, keys, HEAD_DIM).with(Attention::new().softmax_scale(scale));
    let mut inputs = case.inputs::<f32>();
    let first = inputs.k[..HEAD_DIM].to_vec();
    inputs
        .k
        .chunks_mut(HEAD_DIM)
        .for_each(|key| key.copy_from_slice(&first));
    let tensor = |shape, elements: &[f32], factor: f32| {
        let elements: Vec<T> = elements.iter().map(|x| T::from_f32(x * factor)).collect();
        Tensor::from_slice(device, shape, &elements).expect("small")
    };
    let (q, k) = (
        tensor(case.q, &inputs.q, magnitude),
        tensor(case.kv, &inputs.k, magnitude),
    );
    let (v, dout) = (
        tensor(case.kv, &inputs.v, 0.0),
        tensor(case.q, &vec![1.0; inputs.q.len()], 1.0),
    );
    let output = case.attention.forward(&q, &k, &v).expect("valid");
    let gradients = case.attention.backward(&q, &k, &v, &output, &dout).expect("valid");
    let want = rows as f64 / keys as f64;
    for got in gradients.dv.to_vec().expect("read") {
        let error = (got.to_f64() / want - 1.0).abs();
        assert!(
            error < 0.01,
            "{case:?} times {magnitude:e} on {device}: {got:?}, want {want}"
        );
    }
}

proptest! {
    #![proptest_config(drawn::config(12))]

    #[test]
    fn equal_keys_weigh_the_same_at_any_magnitude(
        rows in 1..=20_usize, keys in 1..=140_usize, power in -15.0..14.0_f32, negative in any::<bool>(),
    ) {
        let scale = if negative { -1.0 } else { 1.0 };
        for device in devices().of_every_instruction_set() {
            check_equal_keys::<f32>(device, rows, keys, 10.0_f32.powf(power), scale);
            check_equal_keys::<bf16>(device, rows, keys, 10.0_f32.powf(power), scale);
            check_equal_keys::<f16>(device, rows, keys, 10.0_f32.powf(power.clamp(-3.0, 4.1)), scale);
        }
    }

    /// A mean of equal numbers is that number, whatever it is: q, k and v all hold it.
    #[test]
    fn one_number_everywhere(power in -15.0..14.0_f32, rows in 1..=9_usize, keys in 1..=140_usize) {
        fn check<T: Element>(rows: usize, keys: usize, number: f32) {
            let case = Case::one_head(T::DTYPE, rows, keys, HEAD_DIM);
            let all = |shape: [usize; 4]| vec![T::from_f32(number); shape.iter().product()];
            let inputs = Inputs { q: all(case.q), k: all(case.kv), v: all(case.kv) };
            // The f32 roundings of a sum of so many terms, which rounding to 16 bits takes away.
            let roundings = if T::DTYPE == Dtype::F32 { 4 + keys } else { 0 };
            let bound = roundings as f64 * f64::from(f32::EPSILON) / 2.0;
            let want = inputs.v[0].to_f64();
            for device in devices().of_every_instruction_set() {
                for got in case.run(device, &inputs).1.out {
                    let error = (got.to_f64() / want - 1.0).abs();
                    assert!(error <= bound, "{keys} keys of {want:e} on {device}: {got:?}");
                }
            }
        }
        check::<f32>(rows, keys, 10.0_f32.powf(power));
        check::<bf16>(rows, keys, 10.0_f32.powf(power));
        check::<f16>(rows, keys, 10.0_f32.powf(power.clamp(-3.0, 4.8)));
    }
}

/// Every key has a logit of about +120, from one column: in bf16, gradients of the queries cancel to a few units.
#[test]
fn large_logits_that_all_keys_share() {
    for seed in 1..=4 {
        let case = Case {
            deviation: 0.1,
            seed,
            ..Case::one_head(bf16::DTYPE, 9, 40, HEAD_DIM)
        };
        let mut inputs = case.inputs::<bf16>();
        inputs.q.chunks_mut(HEAD_DIM).for_each(|query| query[0] = bf16::ONE);
        inputs
            .k
            .chunks_mut(HEAD_DIM)
            .for_each(|key| key[0] = bf16::from_f32(960.0));
        case.check_of(&inputs, devices().of_every_instruction_set());
        case.check_gradients_of(&inputs, &case.dout(), devices().of_every_instruction_set());
    }
}

/// Tests that NaN and infinity hidden by a causal mask reach no result: results that are finite by the definition are
/// finite.
fn check_hidden<T: Element>(seqlen_q: usize, seqlen_k: usize, [head_dim, head_dim_v]: [usize; 2], poison: f32) {
    let case = Case::one_head(T::DTYPE, seqlen_q, seqlen_k, head_dim)
        .with_head_dim_v(head_dim_v)
        .with(Attention::new().causal());
    let clean = case.inputs::<T>();
    let hidden_queries = seqlen_q.saturating_sub(seqlen_k);
    let last_key = seqlen_k - 1;
    let poison = T::from_f32(poison);
    for which in 0..4 {
        if which == 1 && poison.to_f64().is_infinite() {
            continue; // a visible one may have a score of minus infinity, and the key's own gradient is not tested here
        }
        let (mut inputs, mut dout) = (clean.clone(), case.dout::<T>());
        match which {
            0 => inputs.v[last_key * head_dim_v + 3] = poison,
            1 => inputs.k[last_key * head_dim + 3] = poison,
            2 => inputs.q[..hidden_queries * head_dim].fill(poison),
            _ => dout[..hidden_queries * head_dim_v].fill(poison),
        }
        let (out, _) = inputs.oracle(&case.dims());
        let oracle = inputs.oracle_gradients(&case, &dout);
        for device in devices().of_every_instruction_set() {
            let tensor = |shape, elements: &[T]| Tensor::from_slice(device, shape, elements).expect("small");
            let [q, k, v] =
                [(case.q, &inputs.q), (case.kv, &inputs.k), (case.v_shape(), &inputs.v)].map(|(s, x)| tensor(s, x));
            let mut output = case.attention.forward(&q, &k, &v).expect("valid");
            // A debug build refuses the NaN in lse of queries that see a poisoned key. Their results are not tested
            // here.
            let lse: Vec<f32> = output.lse.to_vec().expect("read");
            let lse: Vec<f32> = lse
                .into_iter()
                .map(|x| if x.is_nan() { f32::INFINITY } else { x })
                .collect();
            output.lse = Tensor::from_slice(device, [1, 1, seqlen_q], &lse).expect("small");
            let dout = tensor(case.out_shape(), &dout);
            let gradients = case.attention.backward(&q, &k, &v, &output, &dout).expect("valid");
            let [out_read, dq, dk, dv] =
                [&output.out, &gradients.dq, &gradients.dk, &gradients.dv].map(|x| x.to_vec().expect("read"));
            let results = [
                ("out", &out_read, &out),
                ("dq", &dq, &oracle[0]),
                ("dk", &dk, &oracle[1]),
                ("dv", &dv, &oracle[2]),
            ];
            for (name, got, want) in results {
                let leak = got
                    .iter()
                    .zip(want)
                    .position(|(got, want)| want.is_finite() && !got.to_f64().is_finite());
                assert!(
                    leak.is_none(),
                    "{case:?} on {device}, {poison:?} in {which}: {name}[{leak:?}]"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(drawn::config(6))]

    #[test]
    fn what_a_mask_hides_reaches_nothing(
        (seqlen_q, seqlen_k) in (1..=130_usize, 1..=130_usize), eighths in (1..=24_usize, 1..=24_usize), infinite in any::<bool>(),
    ) {
        let poison = if infinite { f32::INFINITY } else { f32::NAN };
        let head_dims = [8 * eighths.0, 8 * eighths.1];
        check_hidden::<f32>(seqlen_q, seqlen_k, head_dims.map(|head_dim| head_dim.min(96)), poison);
        check_hidden::<f16>(seqlen_q, seqlen_k, head_dims, poison);
        check_hidden::<bf16>(seqlen_q, seqlen_k, [head_dims[0]; 2], poison);
    }
}

/// Cases of public bug reports (two tiles each way, one head_dim of each kernel family).
#[test]
fn what_a_mask_hides_between_tiles_reaches_nothing() {
    check_hidden::<f16>(200, 200, [HEAD_DIM; 2], f32::NAN);
    check_hidden::<bf16>(400, 30, [HEAD_DIM; 2], f32::NAN);
    check_hidden::<f16>(200, 200, [192; 2], f32::NAN);
    check_hidden::<f16>(200, 200, [192, 128], f32::NAN);
    check_hidden::<bf16>(150, 170, [256; 2], f32::INFINITY);
}

/// Tests that an average of numbers is not larger than the largest; rounding of the weights alone could make it so.
#[test]
fn the_mean_of_the_largest_number_is_finite() {
    let case = Case::one_head(f16::DTYPE, 1, 1001, HEAD_DIM).with(Attention::new().softmax_scale(1.0));
    let mut inputs = case.inputs::<f16>();
    inputs.q.fill(f16::ZERO);
    inputs.q[0] = f16::ONE;
    inputs.k.fill(f16::ZERO);
    for row in 1..1001 {
        inputs.k[row * HEAD_DIM] = f16::from_f32(0.250_134_f32.ln());
    }
    inputs.v.fill(f16::MAX);
    for device in devices().of_every_instruction_set() {
        let (_, outcome) = case.run(device, &inputs);
        assert!(
            outcome.out.iter().all(|&x| (65_440.0..=65_504.0).contains(&x.to_f64())),
            "{device}: {:?}",
            outcome.out[0]
        );
    }
}
