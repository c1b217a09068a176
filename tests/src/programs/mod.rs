//! Score programs for the suite: named features by name, random programs, and their checks.

mod check;
mod slopes;
mod trees;

pub use check::{Standard, check_program, check_table_gradients};
pub use slopes::check_slopes;
pub use trees::{IndexTree, ScoreTree, Trees, TruthTree, trees};

use flash_attention::program::Table;
use flash_attention::{Attention, Device, Scalar, Tensor};

use crate::{Case, files};

/// Named features that combine freely.
pub const FEATURES: [&str; 13] = [
    "causal",
    "window",
    "alibi",
    "softcap",
    "bias",
    "sinks",
    "documents",
    "prefix",
    "chunked",
    "dilated",
    "top_left",
    "dropout",
    "block_mask",
];

/// Closures like those of a user, by the names that [`with_feature`] has for them.
pub const CLOSURES: [&str; 2] = ["score", "mask"];

/// Returns an attention with one more named feature or closure, for the sizes of a case.
///
/// # Panics
/// If the device fails, or there is no such feature.
pub fn with_feature(attention: Attention, name: &str, case: &Case, device: &Device) -> Attention {
    let ([batch, heads, seqlen_q, _], seqlen_k) = (case.q, case.kv[2]);
    let floats = |shape: &[usize], salt| tensor(device, shape, &files::normal(shape.iter().product(), 0.5, salt));
    let ids = |shape: &[usize], run: usize| {
        let ids: Vec<i32> = (0..shape.iter().product())
            .map(|i| (i % shape[1] / run) as i32)
            .collect();
        tensor(device, shape, &ids)
    };
    match name {
        "causal" => attention.causal(),
        // The left edge is moved by the distance between the alignments of `top_left` and of a window, so that the two together
        // leave pairs.
        "window" => attention.window(seqlen_k / 3 + seqlen_k.saturating_sub(seqlen_q), seqlen_k / 5),
        "alibi" => attention.alibi(&floats(&[batch, heads], 21)),
        "softcap" => attention.softcap(2.5),
        "bias" => attention.bias(&floats(&[1, heads, seqlen_q, seqlen_k], 22)),
        "sinks" => attention.sinks(&floats(&[heads], 23)),
        "documents" => attention.documents(&ids(&[batch, seqlen_q], 21), &ids(&[1, seqlen_k], 25)),
        "prefix" => attention.prefix(seqlen_k / 4),
        "chunked" => attention.chunked(seqlen_k / 2 + 1),
        "dilated" => attention.dilated(2),
        "top_left" => attention.top_left(),
        "dropout" => attention.dropout(0.15, 0x0123_4567_89ab_cdef),
        "block_mask" => {
            let block = [16, 24];
            let tiles = batch * heads * seqlen_q.div_ceil(block[0]) * seqlen_k.div_ceil(block[1]);
            let visible: Vec<bool> = (0..tiles).map(|i| i * 7 % 10 < 7).collect();
            let seqlen = [seqlen_q, seqlen_k];
            let blocks = flash_attention::program::BlockMask::from_dense([batch, heads], seqlen, block, &visible);
            let blocks = blocks.expect("as many as there are tiles");
            attention.block_mask(&blocks, device).expect("a small table")
        }
        "score" => {
            let relative = Table::<f32, 2>::new(&floats(&[heads, 33], 24)).expect("two axes");
            attention.score(|s, at| {
                let near = at.distance().max(-16).min(16) + 16;
                s + (s * 0.5).tanh() + relative.at(at.head, near)
            })
        }
        "mask" => attention.mask(|at| ((at.query * 5 + at.key * 3 + at.head) % 7).differs_from(0)),
        other => panic!("no feature {other}"),
    }
}

fn tensor<T: Scalar>(device: &Device, shape: &[usize], elements: &[T]) -> Tensor<T> {
    Tensor::from_slice(device, shape, elements).expect("a small tensor")
}
