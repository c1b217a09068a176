//! Shared parts of the tests of every device.
#![allow(dead_code, reason = "a test binary uses a part of it")]

use std::io::Write as _;

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Element, Gradients, Tensor};

/// Returns pseudo-random numbers in -1 .. 1, the same on every run.
pub fn noise(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Returns a CPU device for each instruction set of this processor, the best first. Prints the names of the others.
pub fn instruction_sets() -> &'static [Device] {
    static DEVICES: std::sync::OnceLock<Vec<Device>> = std::sync::OnceLock::new();
    DEVICES.get_or_init(|| {
        let of_processor: &[&str] = match std::env::consts::ARCH {
            "x86_64" => &["cpu:amx", "cpu:avx512bf16", "cpu:avx512", "cpu:avx2"],
            "aarch64" => &["cpu:neonbf16", "cpu:neon"],
            _ => &[],
        };
        let sets = of_processor.iter().chain(&["cpu:portable"]);
        sets.filter_map(|set| match set.parse() {
            Ok(device) => Some(device),
            Err(error) => {
                // Written directly, since the test harness hides the output of passing tests.
                let _ = writeln!(std::io::stderr(), "{set}: absent, {error}");
                None
            }
        })
        .collect()
    })
}

pub fn largest_error<T: Element>(got: &[T], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).fold(0.0, |worst: f64, (got, want)| {
        // Equal infinities have error 0; NaN on one side only has an infinite error.
        let (got, want) = (got.to_f64(), *want);
        let same = got == want || (got.is_nan() && want.is_nan());
        let error = if same { 0.0 } else { (got - want).abs() };
        worst.max(if error.is_nan() { f64::INFINITY } else { error })
    })
}

/// The sizes and options of a problem, with what the tables of its program hold.
pub fn dims(attention: &Attention, q: [usize; 4], k: [usize; 4]) -> Dims {
    let program = attention.evaluator().expect("a valid program");
    Dims::with_program(attention, q, k, program)
}

/// Runs a problem on a device and holds it to twice the error of standard attention in the same dtype.
pub fn check<T: Element>(device: &Device, attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    let dims = dims(&attention, q_shape, k_shape);
    let size = |shape: [usize; 4]| shape.iter().product::<usize>();
    let draw = |len, seed| {
        noise(len, seed)
            .into_iter()
            .map(|x| T::from_f64(2.0 * x))
            .collect::<Vec<T>>()
    };
    let (q, k, v) = (draw(size(q_shape), 1), draw(size(k_shape), 2), draw(size(k_shape), 3));

    let widen = |data: &[T]| data.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let (want_out, want_lse) = reference::forward(&dims, &widen(&q), &widen(&k), &widen(&v));
    let (standard_out, standard_lse) = reference::standard(&dims, &q, &k, &v);

    let tensor = |shape: [usize; 4], data: &[T]| Tensor::from_slice(device, shape, data).expect("small");
    let output = attention
        .forward(&tensor(q_shape, &q), &tensor(k_shape, &k), &tensor(k_shape, &v))
        .unwrap_or_else(|error| panic!("{attention:?} q {q_shape:?} k {k_shape:?}: {error}"));
    let (out, lse) = (
        output.out.to_vec().expect("the device works"),
        output.lse.to_vec().expect("the device works"),
    );

    let case = format!(
        "{device}, {attention:?} q {q_shape:?} k {k_shape:?} {}",
        T::DTYPE.name()
    );
    let (error, bound) = (
        largest_error(&out, &want_out),
        2.0 * largest_error(&standard_out, &want_out) + 1e-5,
    );
    assert!(error <= bound, "{case}: out is off by {error:e}, allowed {bound:e}");
    let (error, bound) = (
        largest_error(&lse, &want_lse),
        2.0 * largest_error(&standard_lse, &want_lse) + 1e-5,
    );
    assert!(error <= bound, "{case}: lse is off by {error:e}, allowed {bound:e}");
}

/// Runs a backward problem on a device, into gradients that were not numbers before, and holds it to twice the error
/// of standard attention's gradients in the same dtype.
pub fn check_backward<T: Element>(device: &Device, attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    let size = |shape: [usize; 4]| shape.iter().product::<usize>();
    let draw = |len, seed, scale: f64| {
        noise(len, seed)
            .into_iter()
            .map(|x| T::from_f64(scale * x))
            .collect::<Vec<T>>()
    };
    let [q, k, v, dout] = [
        draw(size(q_shape), 1, 2.0),
        draw(size(k_shape), 2, 2.0),
        draw(size(k_shape), 3, 2.0),
        draw(size(q_shape), 4, 1.0),
    ];

    let dims = dims(&attention, q_shape, k_shape);
    let widen = |data: &[T]| data.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let want = reference::backward(&dims, &widen(&q), &widen(&k), &widen(&v), &widen(&dout));
    let standard = reference::standard_backward(&dims, &q, &k, &v, &dout);
    let got = gradients(device, attention.clone(), [q_shape, k_shape], [&q, &k, &v, &dout]);

    for ((name, got), (standard, want)) in ["dq", "dk", "dv"].iter().zip(&got).zip(standard.iter().zip(&want)) {
        let (error, bound) = (largest_error(got, want), 2.0 * largest_error(standard, want) + 1e-5);
        assert!(
            error <= bound,
            "{device}, {attention:?} q {q_shape:?} k {k_shape:?} {}: {name} is off by {error:e}, allowed {bound:e}",
            T::DTYPE.name()
        );
    }
}

/// Runs [`check`] with every instruction set of this CPU.
pub fn check_on_every_set<T: Element>(attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    for device in instruction_sets() {
        check::<T>(device, attention.clone(), q_shape, k_shape);
    }
}

/// Runs [`check_backward`] with every instruction set of this CPU.
pub fn check_backward_on_every_set<T: Element>(attention: Attention, q_shape: [usize; 4], k_shape: [usize; 4]) {
    for device in instruction_sets() {
        check_backward::<T>(device, attention.clone(), q_shape, k_shape);
    }
}

/// A check of a problem in one dtype, from the attention and the shapes of q and of k.
pub type Check = fn(Attention, [usize; 4], [usize; 4]);

/// Checks lengths around the edges of the CPU's tiles in f32, f16 and bf16, full and causal.
pub fn lengths_around_the_tiles([of_f32, of_f16, of_bf16]: [Check; 3]) {
    for (seqlen_q, seqlen_k) in [
        (1, 1),
        (113, 203),
        (239, 1),
        (1, 799),
        (64, 64),
        (65, 63),
        (128, 129),
        (203, 113),
        (300, 40),
    ] {
        for attention in [Attention::new(), Attention::new().causal()] {
            of_f32(attention.clone(), [1, 2, seqlen_q, 32], [1, 2, seqlen_k, 32]);
            of_f16(attention.clone(), [1, 1, seqlen_q, 64], [1, 1, seqlen_k, 64]);
            of_bf16(attention, [1, 1, seqlen_q, 64], [1, 1, seqlen_k, 64]);
        }
    }
}

/// Checks every head_dim in f32, causal, and in f16, full.
pub fn every_head_dim([of_f32, of_f16]: [Check; 2]) {
    for head_dim in (8..=256).step_by(8) {
        of_f32(Attention::new().causal(), [1, 1, 37, head_dim], [1, 1, 71, head_dim]);
        of_f16(Attention::new(), [1, 1, 37, head_dim], [1, 1, 71, head_dim]);
    }
}

/// Runs forward and backward on a device; returns dq, dk and dv, written to memory that held NaN before.
pub fn gradients<T: Element>(
    device: &Device,
    attention: Attention,
    [q_shape, k_shape]: [[usize; 4]; 2],
    [q, k, v, dout]: [&[T]; 4],
) -> [Vec<T>; 3] {
    let tensor = |shape: [usize; 4], data: &[T]| Tensor::from_slice(device, shape, data).expect("small");
    let poisoned = |shape: [usize; 4]| tensor(shape, &vec![T::from_f32(f32::NAN); shape.iter().product()]);
    let (q, k, v, dout) = (
        tensor(q_shape, q),
        tensor(k_shape, k),
        tensor(k_shape, v),
        tensor(q_shape, dout),
    );
    let output = attention.forward(&q, &k, &v).expect("valid");
    let mut gradients = Gradients::new(poisoned(q_shape), poisoned(k_shape), poisoned(k_shape));
    attention
        .backward_into(&q, &k, &v, &output, &dout, &mut gradients)
        .unwrap_or_else(|error| panic!("{attention:?} q {q_shape:?} k {k_shape:?}: {error}"));
    [gradients.dq, gradients.dk, gradients.dv].map(|gradient| gradient.to_vec().expect("the device works"))
}
