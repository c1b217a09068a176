//! Tests of the quickstart's features of scores and masks, against the oracle.

use flash_attention::program::{BlockMask, Dropout};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use crate::quickstart::{Scratch, printed, quickstart, refused};

const Q: [usize; 4] = [2, 4, 20, 16];
const K: [usize; 4] = [2, 2, 30, 16];

/// Numbers without a pattern, in -1 .. 1.
pub fn numbers(shape: &[usize], seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    (0..shape.iter().product()).map(|_| next()).collect()
}

const SLOPES: [usize; 1] = [4];
const BIAS: [usize; 4] = [1, 4, 20, 30];

/// A file with everything that an option takes.
fn file(name: &str) -> Scratch {
    let floats = [
        ("q", &Q[..], 1),
        ("k", &K[..], 2),
        ("v", &K[..], 3),
        ("dout", &Q[..], 4),
        ("alibi_slopes", &SLOPES[..], 5),
        ("bias", &BIAS[..], 6),
        ("sinks", &SLOPES[..], 7),
    ];
    let mut contents: Vec<(&str, Dtype, Vec<usize>, Vec<u8>)> = floats
        .map(|(name, shape, seed)| {
            let bytes = numbers(shape, seed).iter().flat_map(|x| x.to_le_bytes()).collect();
            (name, Dtype::F32, shape.to_vec(), bytes)
        })
        .into();
    for (name, seqlen) in [("documents_q", 20), ("documents_k", 30)] {
        let bytes = documents(seqlen).iter().flat_map(|id| id.to_le_bytes()).collect();
        contents.push((name, Dtype::I32, vec![1, seqlen], bytes));
    }
    let blocks = visible().iter().map(|&x| u8::from(x)).collect();
    contents.push(("block_mask", Dtype::U8, vec![1, 4, 3, 3], blocks));
    Scratch::holding(name, &contents)
}

fn documents(seqlen: usize) -> Vec<i32> {
    (0..seqlen).map(|i| (2 * i / seqlen) as i32).collect()
}

fn visible() -> Vec<bool> {
    (0..36).map(|i| i % 5 != 1).collect()
}

fn on_cpu(shape: &[usize], seed: u64) -> Tensor<f32> {
    Tensor::from_slice(&Device::cpu(), shape, &numbers(shape, seed)).expect("a small tensor")
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let of = |chunk: &[u8]| f32::from_le_bytes(chunk.try_into().expect("four bytes"));
    view.data().chunks_exact(4).map(of).collect()
}

fn with_ids(attention: Attention) -> Attention {
    let ids = |seqlen| Tensor::from_slice(&Device::cpu(), [1, seqlen], &documents(seqlen)).expect("a small tensor");
    attention.documents(&ids(20), &ids(30))
}

fn with_blocks(attention: Attention) -> Attention {
    let blocks = BlockMask::from_dense([1, 4], [20, 30], [8, 10], &visible()).expect("36 tiles");
    attention.block_mask(&blocks, &Device::cpu()).expect("a small tensor")
}

#[test]
fn each_feature_and_all_together_are_the_oracles() {
    let input = file("features.safetensors");
    type Feature = (&'static [&'static str], fn(Attention) -> Attention);
    let features: [Feature; 11] = [
        (&["--causal"], |a| a.causal()),
        (&["--window", "12,-"], |a| a.window(12, None)),
        (&["--softcap", "1.5"], |a| a.softcap(1.5)),
        (&["--alibi"], |a| a.alibi(&on_cpu(&SLOPES, 5))),
        (&["--bias"], |a| a.bias(&on_cpu(&BIAS, 6))),
        (&["--sinks"], |a| a.sinks(&on_cpu(&SLOPES, 7))),
        (&["--documents"], with_ids),
        (&["--prefix", "5"], |a| a.prefix(5)),
        (&["--chunk", "16"], |a| a.chunked(16)),
        (&["--dropout", "0.25", "--seed", "99"], |a| a.dropout(0.25, 99)),
        (&["--block-mask", "8,10"], with_blocks),
    ];
    let all = features
        .iter()
        .flat_map(|(options, _)| options.iter().copied())
        .collect::<Vec<_>>();
    let together = features
        .iter()
        .fold(Attention::new(), |attention, (_, add)| add(attention));
    let one_by_one = features
        .iter()
        .map(|(options, add)| (options.to_vec(), add(Attention::new())));
    for (options, attention) in one_by_one.chain([(all, together)]) {
        let output = Scratch::new("features-out.safetensors");
        let arguments = ["--device", "cpu", "--backward", "--output", output.path(), input.path()];
        let run = quickstart(&[&arguments[..], &options].concat());
        let errors = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{options:?}: {}{errors}", printed(&run));
        let bytes = std::fs::read(output.path()).expect("it was written");
        let written = SafeTensors::deserialize(&bytes).expect("a safetensors file");

        let dims = Dims::with_program(&attention, Q, K, attention.evaluator().expect("a valid program"));
        let wide = |shape: [usize; 4], seed| numbers(&shape, seed).into_iter().map(f64::from).collect::<Vec<_>>();
        let (q, k, v, dout) = (wide(Q, 1), wide(K, 2), wide(K, 3), wide(Q, 4));
        let (out, lse) = reference::forward(&dims, &q, &k, &v);
        let gradients = reference::backward_with_tables(&dims, &q, &k, &v, &dout, true);
        let close = |name: &str, want: &[f64]| {
            let got = floats(&written, name);
            assert_eq!(got.len(), want.len(), "{name}");
            let far = got
                .iter()
                .zip(want)
                .find(|(x, y)| f64::from(**x) != **y && (f64::from(**x) - **y).abs() > 2e-5);
            assert!(far.is_none(), "{options:?} {name}: {far:?}");
        };
        close("out", &out);
        close("lse", &lse);
        close("dq", &gradients.dq);
        close("dk", &gradients.dk);
        close("dv", &gradients.dv);
        let program = attention.program().expect("valid");
        let of_table = |place: Option<usize>| place.map(|place| &gradients.tables[place]);
        let tables = [
            ("dbias", program.and_then(|program| of_table(program.bias()))),
            (
                "dalibi_slopes",
                program.and_then(|program| of_table(program.alibi_slopes())),
            ),
            ("dsinks", gradients.sinks.as_ref()),
        ];
        for (name, want) in tables {
            match want {
                Some(want) => close(name, want),
                None => assert!(written.tensor(name).is_err(), "{options:?} {name}"),
            }
        }
        let dropout = Dropout {
            probability: 0.25,
            seed: 99,
        };
        match written.tensor("keep") {
            Ok(keep) => {
                assert_eq!((keep.dtype(), keep.shape()), (Dtype::U8, [2, 4, 20, 30].as_slice()));
                assert_eq!(keep.data(), dropout.keep_mask([2, 4, 20, 30]));
            }
            Err(_) => assert!(!options.contains(&"--dropout"), "{options:?}"),
        }
    }
}

#[test]
fn a_mask_has_a_picture() {
    let input = file("picture.safetensors");
    let run = quickstart(&["--device", "cpu", "--window", "3,0", "--show-mask", input.path()]);
    let text = printed(&run);
    assert!(run.status.success(), "{text}");
    assert!(text.contains("mask      20 x 30 tiles of 1 queries x 1 keys"), "{text}");
    let rows: Vec<_> = text.lines().filter(|line| line.starts_with('·')).collect();
    assert_eq!(rows.len(), 20, "{text}");
    assert_eq!(rows[0], format!("{}████{}", "·".repeat(7), "·".repeat(19)));
}

#[test]
fn wrong_features_are_refused() {
    let input = file("wrong.safetensors");
    let with = |options: &[&str]| refused(&[&["--device", "cpu", input.path()], options].concat());
    assert!(with(&["--window", "3"]).contains("LEFT,RIGHT"));
    assert!(with(&["--block-mask", "0,4"]).contains("M,N"));
    assert!(with(&["--softcap", "0"]).contains("`softcap` is 0"));
    assert!(with(&["--dropout", "1"]).contains("`dropout` is 1"));
    assert!(with(&["--block-mask", "4,4"]).contains("`block_mask` has shape [1, 4, 3, 3], expected"));
    for (option, name) in [
        ("--alibi", "alibi_slopes"),
        ("--bias", "bias"),
        ("--sinks", "sinks"),
        ("--documents", "documents_q"),
    ] {
        let sentence = refused(&["--device", "cpu", option]);
        assert!(
            sentence.contains(&format!("no tensor `{name}`, which {option} needs")),
            "{sentence}"
        );
    }
    let shape = [1, 2, 4, 8];
    let tensors = ["q", "k", "v"].map(|name| (name, Dtype::F16, &shape[..]));
    let ids = [
        ("documents_q", Dtype::I64, &[1, 4][..]),
        ("documents_k", Dtype::I64, &[1, 4]),
    ];
    let long = Scratch::with("long", &[&tensors[..], &ids].concat());
    assert!(refused(&["--device", "cpu", "--documents", long.path()]).contains("dtype I64, expected I32"));
    let short = Scratch::with(
        "short-bias",
        &[&tensors[..], &[("bias", Dtype::F16, &[1, 1, 4, 3])]].concat(),
    );
    let sentence = refused(&["--device", "cpu", "--bias", short.path()]);
    assert!(
        sentence.contains("`bias` has 3 entries on axis 3, the index reaches 0 ..= 3"),
        "{sentence}"
    );
}
