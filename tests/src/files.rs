//! Test numbers: drawn from a seed, or recorded from a real model.

use std::path::{Path, PathBuf};

use flash_attention::half::f16;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rand_distr::{Distribution as _, Normal};
use safetensors::{Dtype, SafeTensors};

/// Returns normally distributed numbers, the same on every run.
///
/// # Panics
/// If the deviation is not finite.
pub fn normal(len: usize, deviation: f32, seed: u64) -> Vec<f32> {
    let normal = Normal::new(0.0, deviation).expect("a finite deviation");
    normal.sample_iter(StdRng::seed_from_u64(seed)).take(len).collect()
}

/// Returns numbers with outliers, as FlashAttention-3's paper draws them: normal with deviation 1, and to one in a thousand, at
/// random, is added a normal number with deviation 10.
pub fn with_outliers(len: usize, seed: u64) -> Vec<f32> {
    let (mut numbers, outliers) = (normal(len, 1.0, seed), normal(len, 10.0, !seed));
    let mut draws = StdRng::seed_from_u64(seed ^ 1 << 63);
    for (number, outlier) in numbers.iter_mut().zip(outliers) {
        if draws.random_bool(0.001) {
            *number += outlier;
        }
    }
    numbers
}

/// One attention layer of a pretrained sentence encoder (all-MiniLM-L6-v2) on a real text: the f16 inputs of its
/// heads, and the answer computed in f64.
#[derive(Clone, Debug)]
pub struct RealLayer {
    /// Shape of q, k, v and out.
    pub shape: [usize; 4],
    /// Softmax scale of the model.
    pub softmax_scale: f32,
    /// Queries.
    pub q: Vec<f16>,
    /// Keys.
    pub k: Vec<f16>,
    /// Values.
    pub v: Vec<f16>,
    /// Correct output.
    pub out: Vec<f64>,
    /// Correct log-sum-exp.
    pub lse: Vec<f64>,
    /// Gradient of the output.
    pub dout: Vec<f16>,
    /// Correct gradients of q, k and v.
    pub gradients: [Vec<f64>; 3],
}

/// Name of the environment variable with the folder of test data on another machine. It takes the place of the
/// workspace: the tests read `examples/data`, `tests/ptx` and other files below it.
pub const DATA: &str = "FLASH_ATTENTION_DATA";

/// Returns the root of the workspace, or the folder that [`DATA`] names.
pub fn workspace() -> PathBuf {
    match std::env::var_os(DATA) {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
    }
}

/// Reads layer 0 or 5 of the model.
///
/// # Panics
/// If the file is missing or has another content.
pub fn real_layer(layer: usize) -> RealLayer {
    let path = workspace().join(format!("examples/data/minilm_layer{layer}.safetensors"));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
    let scale = header
        .metadata()
        .as_ref()
        .and_then(|fields| fields.get("softmax_scale"));
    let halves = |name: &str| -> Vec<f16> { elements(&file, name, Dtype::F16, f16::from_le_bytes) };
    let floats = |name: &str| -> Vec<f64> { elements(&file, name, Dtype::F32, |b| f32::from_le_bytes(b).into()) };
    RealLayer {
        shape: file
            .tensor("q")
            .expect("it has queries")
            .shape()
            .try_into()
            .expect("rank 4"),
        softmax_scale: scale.expect("it names the scale").parse().expect("a number"),
        q: halves("q"),
        k: halves("k"),
        v: halves("v"),
        out: floats("out"),
        lse: floats("lse"),
        dout: halves("dout"),
        gradients: ["dq", "dk", "dv"].map(floats),
    }
}

fn elements<const N: usize, T>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    from_le_bytes: impl Fn([u8; N]) -> T,
) -> Vec<T> {
    let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(tensor.dtype(), dtype, "{name}");
    let (elements, rest) = tensor.data().as_chunks::<N>();
    assert!(rest.is_empty(), "{name}");
    elements.iter().map(|&bytes| from_le_bytes(bytes)).collect()
}
