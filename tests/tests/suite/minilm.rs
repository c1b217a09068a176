//! Tests on real inputs: q, k and v of two layers of a pretrained sentence encoder for a real text, and the answer in
//! f64.

use flash_attention::half::{bf16, f16};
use flash_attention::{Attention, Device, Element};
use flash_attention_tests::{Case, Inputs, compare, devices, files, largest_error};

/// Tests every head of a layer in one dtype, within the rule, or within a tighter bound.
fn check<T: Element>(layer: usize, tight: Option<f64>) {
    let real = files::real_layer(layer);
    let case = Case::new(T::DTYPE, real.shape, real.shape).with(Attention::new().softmax_scale(real.softmax_scale));
    let cast = |data: &[f16]| data.iter().map(|x| T::from_f32(x.to_f32())).collect();
    let inputs = Inputs {
        q: cast(&real.q),
        k: cast(&real.k),
        v: cast(&real.v),
    };
    let bounds = match tight {
        Some(bound) => [bound; 2],
        None => inputs.bounds(&case.dims(), &real.out, &real.lse),
    };
    for device in devices().all() {
        let (_, outcome) = case.run(device, &inputs);
        let out = compare("out", &real.shape, &outcome.out, &real.out, bounds[0]);
        let lse = compare("lse", &real.shape[..3], &outcome.lse, &real.lse, bounds[1]);
        if let Some(mismatch) = out.err().or(lse.err()) {
            panic!("layer {layer}, {} on {device}\n{mismatch}", T::DTYPE.name());
        }
    }
}

#[test]
fn f32_is_within_two_millionths() {
    check::<f32>(5, Some(2e-6));
}

/// Tests f32. Layer 0 has scores up to 77, whose rounding to f32 changes results by 4e-6; standard attention has an
/// error of 3.6e-6.
#[test]
fn f32_is_as_good_as_standard_attention() {
    check::<f32>(0, None);
}

#[test]
fn f16_is_as_good_as_standard_attention() {
    check::<f16>(0, None);
    check::<f16>(5, None);
}

#[test]
fn bf16_is_as_good_as_standard_attention() {
    check::<bf16>(0, None);
    check::<bf16>(5, None);
}

/// Tests that the oracle agrees with the answer that another program computed in f64.
#[test]
fn the_oracle_gives_the_stored_answer() {
    let real = files::real_layer(5);
    let case = Case::new(f16::DTYPE, real.shape, real.shape).with(Attention::new().softmax_scale(real.softmax_scale));
    let inputs = Inputs {
        q: real.q,
        k: real.k,
        v: real.v,
    };
    let (out, lse) = inputs.oracle(&case.dims());
    let narrow = |data: &[f64]| data.iter().map(|&x| x as f32).collect::<Vec<_>>();
    // The answer is stored as f32: the bound is half a unit in the last place of numbers up to 16.
    compare("out", &real.shape, &narrow(&out), &real.out, 2e-7).expect("out");
    compare("lse", &real.shape[..3], &narrow(&lse), &real.lse, 1e-6).expect("lse");
}

/// Tests gradients of the first heads of a layer in one dtype against the stored ones: within the rule, or within a
/// fraction of the largest gradient.
fn check_gradients<'a, T: Element>(
    layer: usize,
    heads: usize,
    tight: Option<f64>,
    devices: impl IntoIterator<Item = &'a Device>,
) {
    let real = files::real_layer(layer);
    let [batch, _, seqlen, head_dim] = real.shape;
    assert_eq!(batch, 1, "heads come first in memory");
    let (shape, len) = ([1, heads, seqlen, head_dim], heads * seqlen * head_dim);
    let case = Case::new(T::DTYPE, shape, shape).with(Attention::new().softmax_scale(real.softmax_scale));
    let cast = |data: &[f16]| -> Vec<T> { data[..len].iter().map(|x| T::from_f32(x.to_f32())).collect() };
    let inputs = Inputs {
        q: cast(&real.q),
        k: cast(&real.k),
        v: cast(&real.v),
    };
    let dout = cast(&real.dout);
    let right = real.gradients.map(|gradient| gradient[..len].to_vec());
    let bounds = match tight {
        Some(share) => right.each_ref().map(|gradient| {
            let largest = gradient.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
            share * largest
        }),
        None => inputs.gradient_bounds(&case, &dout, &right),
    };
    for device in devices {
        let (_, outcome) = case.run_backward(device, &inputs, &dout);
        for (i, (name, gradient)) in outcome.named().into_iter().enumerate() {
            if let Err(mismatch) = compare(name, &shape, gradient, &right[i], bounds[i]) {
                panic!("layer {layer}, {} on {device}\n{mismatch}", T::DTYPE.name());
            }
        }
    }
}

#[test]
fn f32_gradients_are_within_five_millionths_of_the_largest() {
    for layer in [0, 5] {
        check_gradients::<f32>(layer, 12, Some(5e-6), devices().native());
    }
}

/// Tests f32 on one head of each layer, which takes the emulator seconds. 16-bit tests use whole layers.
#[test]
fn f32_gradients_of_a_head_on_the_emulator() {
    for layer in [0, 5] {
        check_gradients::<f32>(layer, 1, Some(5e-6), devices().emulator());
    }
}

#[test]
fn f16_gradients_are_as_good_as_those_of_standard_attention() {
    check_gradients::<f16>(0, 12, None, devices().all());
    check_gradients::<f16>(5, 12, None, devices().all());
}

#[test]
fn bf16_gradients_are_as_good_as_those_of_standard_attention() {
    check_gradients::<bf16>(0, 12, None, devices().all());
    check_gradients::<bf16>(5, 12, None, devices().all());
}

/// Tests that the oracle's gradients agree with those that another program computed in f64 and stored in f32.
#[test]
fn the_oracle_gives_the_stored_gradients() {
    for layer in [0, 5] {
        let real = files::real_layer(layer);
        let case =
            Case::new(f32::DTYPE, real.shape, real.shape).with(Attention::new().softmax_scale(real.softmax_scale));
        let inputs = Inputs {
            q: real.q,
            k: real.k,
            v: real.v,
        };
        let oracle = inputs.oracle_gradients(&case, &real.dout);
        for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let largest = oracle[i].iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
            let stored: Vec<f32> = real.gradients[i].iter().map(|&x| x as f32).collect(); // rounded as in the file
            let error = largest_error(&stored, &oracle[i]);
            assert!(
                error <= 1e-7 * largest,
                "layer {layer}, {name}: off by {error:e} of {largest:e}"
            );
        }
    }
}
