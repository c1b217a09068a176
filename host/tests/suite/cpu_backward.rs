//! Tests of the CPU's backward pass against the f64 oracle and stored answers: tile edges, masks, shared heads,
//! strides, threads, and NaN and infinity.

use crate::common::{self, check_backward_on_every_set as check, gradients, instruction_sets, largest_error, noise};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Element, Gradients, Tensor};
use half::{bf16, f16};
use safetensors::SafeTensors;

#[test]
fn lengths_around_the_tiles() {
    common::lengths_around_the_tiles([check::<f32>, check::<f16>, check::<bf16>]);
}

#[test]
fn every_head_dim() {
    common::every_head_dim([check::<f32>, check::<f16>]);
}

#[test]
fn gradients_of_shared_keys_are_summed_over_heads() {
    check::<f32>(Attention::new(), [3, 6, 17, 16], [3, 2, 19, 16]);
    check::<f32>(Attention::new().causal(), [2, 4, 170, 24], [2, 1, 170, 24]);
    check::<f16>(Attention::new().causal(), [2, 8, 70, 24], [2, 1, 90, 24]);
}

#[test]
fn tasks_of_every_size() {
    // With many heads a task owns all keys of one, with few a part of them.
    for heads in [1, 5, 9, 20] {
        check::<f32>(Attention::new().causal(), [1, heads, 140, 8], [1, heads, 150, 8]);
    }
}

#[test]
fn any_finite_scale() {
    for scale in [0.0, -0.0, -0.7, 3.0, 1e-20] {
        check::<f32>(Attention::new().softmax_scale(scale), [1, 1, 9, 16], [1, 1, 90, 16]);
        check::<f32>(
            Attention::new().softmax_scale(scale).causal(),
            [1, 1, 9, 16],
            [1, 1, 5, 16],
        );
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    for ([q_shape, k_shape], attention) in [
        ([[2, 3, 200, 40], [2, 3, 200, 40]], Attention::new().causal()),
        ([[1, 4, 333, 64], [1, 1, 290, 64]], Attention::new().causal()),
        ([[1, 1, 700, 32], [1, 1, 500, 32]], Attention::new()),
    ] {
        let draw = |shape: [usize; 4], seed| -> Vec<f32> {
            let data = noise(shape.iter().product(), seed);
            data.into_iter().map(|x| x as f32).collect()
        };
        let (q, k, v, dout) = (draw(q_shape, 1), draw(k_shape, 2), draw(k_shape, 3), draw(q_shape, 4));
        let run = |threads| {
            let device = Device::cpu_with_threads(threads).expect("threads");
            let results = gradients(&device, attention.clone(), [q_shape, k_shape], [&q, &k, &v, &dout]);
            results.map(|gradient| gradient.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
        };
        let one = run(1);
        for threads in [1, 2, 3, 5, 16] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}

/// Tests that in 16 bits, where the tasks of a head share the dQ accumulator, results are reproducible.
#[test]
fn tasks_that_take_turns_leave_no_trace() {
    let (q_shape, k_shape) = ([2, 1, 150, 32], [2, 1, 1700, 32]);
    let draw = |shape: [usize; 4], seed| -> Vec<bf16> {
        let data = noise(shape.iter().product(), seed);
        data.into_iter().map(bf16::from_f64).collect()
    };
    let (q, k, v, dout) = (draw(q_shape, 1), draw(k_shape, 2), draw(k_shape, 3), draw(q_shape, 4));
    for attention in [Attention::new(), Attention::new().causal()] {
        check::<bf16>(attention.clone(), q_shape, k_shape);
        let run = |threads| {
            let device = Device::cpu_with_threads(threads).expect("threads");
            let results = gradients(&device, attention.clone(), [q_shape, k_shape], [&q, &k, &v, &dout]);
            results.map(|gradient| gradient.into_iter().map(bf16::to_bits).collect::<Vec<u16>>())
        };
        let one = run(1);
        for threads in [2, 3, 4, 7].repeat(8) {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}

#[test]
fn memory_of_another_layout_is_used_in_place() {
    let device = Device::cpu();
    // Packed [batch, seqlen, 3, heads, head_dim], the layout of a fused projection and of its gradient.
    let (batch, seqlen, heads, head_dim) = (2, 133, 3, 16);
    let shape = [batch, seqlen, 3, heads, head_dim];
    let draw = |len, seed| noise(len, seed).into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    let packed = Tensor::from_slice(&device, shape, &draw(shape.iter().product(), 7)).expect("small");
    let parts = |tensor: &Tensor<f32>| {
        [0, 1, 2].map(|index| {
            let part = tensor.select(2, index).expect("in range");
            part.transpose(1, 2).expect("valid axes")
        })
    };
    let [q, k, v] = parts(&packed);
    let dout = Tensor::from_slice(
        &device,
        [batch, seqlen, heads, head_dim],
        &draw(batch * seqlen * heads * head_dim, 8),
    );
    let dout = dout.and_then(|dout| dout.transpose(1, 2)).expect("small");
    let attention = Attention::new().causal();
    let output = attention.forward(&q, &k, &v).expect("valid");
    // Each gradient is in [batch, seqlen, heads, head_dim] order, with gaps between its rows that must stay
    // unchanged.
    let targets = [0, 1, 2].map(|_| Tensor::from_slice(&device, shape, &vec![f32::NAN; shape.iter().product()]));
    let targets = targets.map(|target| target.expect("small"));
    let [dq, dk, dv] = targets.each_ref().map(|target| parts(target)[1].clone());
    let mut strided = Gradients::new(dq, dk, dv);
    attention
        .backward_into(&q, &k, &v, &output, &dout, &mut strided)
        .expect("valid");

    let copy = |tensor: &Tensor<f32>| {
        Tensor::from_slice(&device, tensor.shape(), &tensor.to_vec().expect("cpu")).expect("small")
    };
    let (q, k, v) = (copy(&q), copy(&k), copy(&v));
    let output = attention.forward(&q, &k, &v).expect("valid");
    let contiguous = attention.backward(&q, &k, &v, &output, &copy(&dout)).expect("valid");
    assert_eq!(strided.dq.to_vec().expect("cpu"), contiguous.dq.to_vec().expect("cpu"));
    assert_eq!(strided.dk.to_vec().expect("cpu"), contiguous.dk.to_vec().expect("cpu"));
    assert_eq!(strided.dv.to_vec().expect("cpu"), contiguous.dv.to_vec().expect("cpu"));
    for target in &targets {
        let [before, _, after] = parts(target).map(|part| part.to_vec().expect("cpu"));
        assert!(before.iter().chain(&after).all(|x| x.is_nan()));
    }
}

#[test]
fn queries_that_see_nothing_have_no_gradient() {
    let (q_shape, k_shape) = ([1, 2, 150, 16], [1, 2, 20, 16]);
    let draw = |len, seed| noise(len, seed).into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    let [mut q, mut dout] = [draw(2 * 150 * 16, 1), draw(2 * 150 * 16, 4)];
    let (k, v) = (draw(2 * 20 * 16, 2), draw(2 * 20 * 16, 3));
    let run = |q: &[f32], dout: &[f32]| {
        gradients(
            &Device::cpu(),
            Attention::new().causal(),
            [q_shape, k_shape],
            [q, &k, &v, dout],
        )
    };
    let before = run(&q, &dout);
    for head in 0..2 {
        let unseeing = head * 150 * 16..(head * 150 + 130) * 16;
        assert!(before[0][unseeing.clone()].iter().all(|&x| x == 0.0));
        q[unseeing.clone()].fill(f32::INFINITY); // whatever these queries are, they must add nothing to dk and dv
        dout[unseeing].fill(f32::NAN);
    }
    let [dq, dk, dv] = run(&q, &dout);
    assert!(dk == before[1] && dv == before[2]);
    let nothing = [0, 1].map(|head| head * 150 * 16..(head * 150 + 130) * 16);
    assert!(dq.iter().all(|x| !x.is_infinite()));
    for rows in nothing {
        assert!(dq[rows].iter().all(|&x| x == 0.0), "a query that sees no key has zeros");
    }
}

/// Checks that gradients for v = dout = 1 are NaN exactly where those in f64 are.
fn check_not_finite<T: Element>(attention: Attention, q: &[T], k: &[T]) {
    let shapes @ [q_shape, k_shape] = [[1, 1, q.len() / 16, 16], [1, 1, k.len() / 16, 16]];
    let ones = |len| vec![T::from_f32(1.0); len];
    let (v, dout) = (ones(k.len()), ones(q.len()));
    let widen = |data: &[T]| data.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let dims = Dims::new(&attention, q_shape, k_shape);
    let want = reference::backward(&dims, &widen(q), &widen(k), &widen(&v), &widen(&dout));
    assert!(
        want[2].iter().any(|x| x.is_nan()),
        "a case where something is not a number"
    );
    for device in instruction_sets() {
        let got = gradients(device, attention.clone(), shapes, [q, k, &v, &dout]);
        for ((name, got), want) in ["dq", "dk", "dv"].iter().zip(&got).zip(&want) {
            let wrong = got
                .iter()
                .zip(want)
                .filter(|(got, want)| got.to_f64().is_nan() != want.is_nan())
                .count();
            assert_eq!(
                wrong,
                0,
                "{device}, {attention:?} {}: {name}, of {}",
                T::DTYPE.name(),
                got.len()
            );
        }
    }
}

#[test]
fn scores_that_are_all_negative_infinity_make_gradients_nan() {
    fn cases<T: Element>() {
        let [one, minus_infinity] = [1.0, f32::NEG_INFINITY].map(T::from_f32);
        let mut one_query = vec![one; 20 * 16];
        one_query[3 * 16..4 * 16].fill(minus_infinity);
        for attention in [Attention::new(), Attention::new().causal()] {
            check_not_finite(attention.clone(), &[one; 20 * 16], &[minus_infinity; 70 * 16]);
            // Under a causal mask, keys from 54 on are hidden from that query: their dv is a number.
            check_not_finite(attention, &one_query, &[one; 70 * 16]);
        }
    }
    cases::<f32>();
    cases::<f16>();
    cases::<bf16>();
}

#[test]
fn a_probability_is_at_most_one_where_lse_is_large() {
    let (huge, one) = ([1e10_f32; 64], [1.0_f32; 64]);
    for device in instruction_sets() {
        let shape = [1, 1, 1, 64];
        let [_, _, dv] = gradients(device, Attention::new(), [shape, shape], [&huge, &huge, &one, &one]);
        assert_eq!(dv, one, "{device}: the probability of a single key is 1");
    }
}

#[test]
fn what_is_not_finite_goes_where_arithmetic_takes_it() {
    let shape = [1, 1, 150, 8];
    let base: Vec<f32> = noise(150 * 8, 11).into_iter().map(|x| x as f32).collect();
    let widen = |data: &[f32]| data.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    // Debug builds refuse an lse that holds NaN; only dout and v can hold one without it.
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for row in [0, 70, 149] {
            let mut odd = base.clone();
            odd[row * 8 + 3] = value;
            for attention in [Attention::new(), Attention::new().causal()] {
                for inputs in [[&base, &base, &odd, &base], [&base, &base, &base, &odd]] {
                    let got = gradients(
                        &Device::cpu(),
                        attention.clone(),
                        [shape, shape],
                        inputs.map(|data| data.as_slice()),
                    );
                    let [q, k, v, dout] = inputs.map(|data| widen(data));
                    let want = reference::backward(&Dims::new(&attention, shape, shape), &q, &k, &v, &dout);
                    for (got, want) in got.iter().zip(&want) {
                        // delta from the output and delta from P and dP can differ as infinity and NaN; only finite
                        // results are compared by value.
                        let got: Vec<f32> = got.iter().map(|&x| if x.is_finite() { x } else { f32::NAN }).collect();
                        let want: Vec<f64> = want.iter().map(|&x| if x.is_finite() { x } else { f64::NAN }).collect();
                        let error = largest_error(&got, &want);
                        assert!(error < 1e-5, "{value} in row {row}, {attention:?}: {error:e}");
                    }
                }
            }
        }
    }
}

/// A gradient: ours, that of standard attention, and that in f64.
struct Gradient<T> {
    name: &'static str,
    got: Vec<T>,
    standard: Vec<T>,
    want: Vec<f64>,
}

/// Computes the gradients of a layer of MiniLM in `T`.
fn minilm<T: Element>(layer: usize) -> Vec<Gradient<T>> {
    let path = format!(
        "{}/../examples/data/minilm_layer{layer}.safetensors",
        env!("CARGO_MANIFEST_DIR")
    );
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let inputs = ["q", "k", "v", "dout"].map(|name| {
        let tensor = file.tensor(name).expect("stored");
        let elements = tensor.data().chunks_exact(2);
        elements
            .map(|x| T::from_f32(f16::from_le_bytes([x[0], x[1]]).to_f32()))
            .collect::<Vec<T>>()
    });
    let shape = <[usize; 4]>::try_from(file.tensor("q").expect("stored").shape()).expect("four axes");
    let inputs = inputs.each_ref().map(Vec::as_slice);
    let got = gradients(&Device::cpu(), Attention::new(), [shape, shape], inputs);
    let [q, k, v, dout] = inputs;
    let dims = Dims::new(&Attention::new(), shape, shape);
    let standard = reference::standard_backward(&dims, q, k, v, dout);
    let answers = ["dq", "dk", "dv"].map(|name| {
        let tensor = file.tensor(name).expect("stored");
        let elements = tensor.data().chunks_exact(4);
        let answer = elements.map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]])));
        (name, answer.collect::<Vec<f64>>())
    });
    let results = got.into_iter().zip(standard).zip(answers);
    results
        .map(|((got, standard), (name, want))| Gradient {
            name,
            got,
            standard,
            want,
        })
        .collect()
}

#[test]
fn gradients_of_a_language_model() {
    for layer in [0, 5] {
        for Gradient { name, got, want, .. } in minilm::<f32>(layer) {
            let largest = want.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
            let error = largest_error(&got, &want) / largest;
            println!("layer {layer} f32 {name}: {error:.2e} of the largest gradient");
            assert!(error <= 5e-6, "layer {layer}, {name}: {error:e}");
        }
        for gradient in minilm::<f16>(layer) {
            let Gradient {
                name,
                got,
                standard,
                want,
            } = gradient;
            let (error, of_standard) = (largest_error(&got, &want), largest_error(&standard, &want));
            println!("layer {layer} f16 {name}: {error:.2e}, standard {of_standard:.2e}");
            assert!(
                error <= 2.0 * of_standard + 1e-5,
                "layer {layer}, {name}: {error:e}, standard {of_standard:e}"
            );
        }
    }
}
