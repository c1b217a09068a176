//! Tests of the quickstart as a user sees it: its output, its exit status, and its errors for wrong input.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Sequences};
use flash_attention_examples::{AttentionFile, ragged};
use safetensors::{Dtype, tensor::TensorView};

use crate::quickstart_features::numbers;

/// Runs the built example, which lies beside the folder of this test program.
pub fn quickstart(arguments: &[&str]) -> Output {
    quickstart_with(&[], arguments)
}

/// Runs the example with environment variables.
fn quickstart_with(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.args(arguments).envs(environment.iter().copied());
    command.output().expect("a program that runs")
}

/// Returns the path of the example.
///
/// # Panics
/// If it is not built, or a source file has changed since: `cargo test --test suite` builds no example.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().expect("a running program has a path");
        let built = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
        let program = built
            .join("examples/quickstart")
            .with_extension(std::env::consts::EXE_EXTENSION);
        let (name, advice) = (program.display(), "`cargo build --example quickstart` makes it");
        let changed = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified());
        let built = changed(&program).unwrap_or_else(|error| panic!("{name}: {error}; {advice}"));
        // Cargo lists the sources beside the program: `program: source source`.
        let list = std::fs::read_to_string(program.with_extension("d")).expect("cargo's list of sources");
        let sources = list.replace("\\ ", "\0");
        for source in sources.split_whitespace().skip(1) {
            let source = PathBuf::from(source.replace('\0', " "));
            let is_newer = changed(&source).map_or(true, |time| time > built);
            assert!(!is_newer, "{name} is older than {}; {advice}", source.display());
        }
        program
    })
}

pub fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs with arguments that must be refused: status 2, nothing on standard output, and one sentence, which is
/// returned.
pub fn refused(arguments: &[&str]) -> String {
    let output = quickstart(arguments);
    let sentence = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {sentence}");
    assert_eq!(sentence.lines().count(), 1, "{arguments:?}: {sentence}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", printed(&output));
    sentence
}

/// A file of this test, removed when the value is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("flash-attention-{}-{name}", std::process::id())))
    }

    /// A file of tensors of zeros.
    pub fn with(name: &str, tensors: &[(&str, Dtype, &[usize])]) -> Self {
        let zeros = tensors.iter().map(|&(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, dtype, shape.to_vec(), vec![0; bytes])
        });
        Self::holding(name, &zeros.collect::<Vec<_>>())
    }

    /// A file of tensors: the name, dtype, shape and bytes of each.
    pub fn holding(name: &str, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Self {
        let scratch = Self::new(name);
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            (*name, view.expect("as many bytes as the shape has"))
        });
        let bytes = safetensors::serialize(views, None).expect("a few tensors");
        std::fs::write(&scratch.0, bytes).expect("a writable temporary folder");
        scratch
    }

    pub fn path(&self) -> &str {
        self.0.to_str().expect("a path of letters")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Returns the number that follows `error` in the line that starts with this word.
fn error_of(word: &str, text: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(word)).unwrap_or_default();
    let number = line.split_once("error ").and_then(|(_, rest)| rest.split(',').next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no error of {word} in:\n{text}"))
}

#[test]
fn the_bundled_input_gives_the_stored_answer() {
    for device in ["best", "cpu", "emulator", "emulator:sm_80"] {
        let output = quickstart(&["--device", device]);
        let text = printed(&output);
        assert!(
            output.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        for word in ["out", "lse"] {
            assert!(error_of(word, &text) <= 2e-6, "{text}");
        }
        for word in ["device ", "shape ", "tiles ", "HBM read ", "time "] {
            assert!(text.lines().any(|line| line.starts_with(word)), "no {word} in:\n{text}");
        }
    }
}

#[test]
fn halves_are_as_good_as_standard_attention_in_halves() {
    for (device, dtype) in [
        ("cpu", "f16"),
        ("cpu", "bf16"),
        ("emulator", "f16"),
        ("emulator", "bf16"),
    ] {
        let output = quickstart(&["--device", device, "--dtype", dtype]);
        let text = printed(&output);
        assert!(output.status.success(), "{text}");
        assert_eq!(text.matches("within the bound").count(), 2, "{text}");
    }
}

#[test]
fn a_causal_run_has_no_stored_answer_and_writes_what_it_found() {
    let file = Scratch::new("causal.safetensors");
    let output = quickstart(&["--device", "cpu", "--dtype", "f16", "--causal", "--output", file.path()]);
    let text = printed(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("not compared: the stored one is for full attention"),
        "{text}"
    );

    let bytes = std::fs::read(file.path()).expect("it was written");
    let written = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let (out, lse) = (written.tensor("out").expect("out"), written.tensor("lse").expect("lse"));
    assert_eq!((out.dtype(), out.shape()), (Dtype::F16, [1, 12, 331, 32].as_slice()));
    assert_eq!((lse.dtype(), lse.shape()), (Dtype::F32, [1, 12, 331].as_slice()));

    // The first query sees the first key only, so its output is the first value.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm_layer5.safetensors");
    let input = std::fs::read(data).expect("the bundled input");
    let input = safetensors::SafeTensors::deserialize(&input).expect("a safetensors file");
    assert_eq!(out.data()[..64], input.tensor("v").expect("v").data()[..64]);
}

/// Tests dq, dk and dv beside out and lse: f32 on the CPU, 16-bit also on the emulator, which would take a minute for
/// f32.
#[test]
fn backward_gives_the_stored_gradients() {
    let layer0 = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm_layer0.safetensors");
    let layer0 = layer0.to_str().expect("a path of letters");
    for arguments in [
        &["--device", "cpu"][..],
        &["--device", "cpu", layer0],
        &["--device", "cpu", "--dtype", "bf16"],
        &["--device", "emulator", "--dtype", "f16"],
    ] {
        let output = quickstart(&[arguments, &["--backward"]].concat());
        let text = printed(&output);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}{errors}");
        assert_eq!(text.matches("within the bound").count(), 5, "{text}");
        assert!(text.contains("problem   backward, full"), "{text}");
        for word in ["dq", "dk", "dv"] {
            assert!(error_of(word, &text) <= 1e-1, "{text}");
        }
    }
}

/// Tests that gradients that differ from the stored ones fail the run with status 1 and a line that says so.
#[test]
fn wrong_gradients_fail() {
    let shape = [1, 1, 4, 8];
    let ones = |name: &str, tensors: &[&str]| {
        let one = [1.0_f32; 32].map(f32::to_le_bytes).concat();
        let tensors = tensors
            .iter()
            .map(|&name| (name, Dtype::F32, shape.to_vec(), one.clone()));
        Scratch::holding(name, &tensors.collect::<Vec<_>>())
    };
    // All values are equal, so q and k have no gradient; every key has a quarter of the gradients, 1, of four
    // queries.
    let file = ones("ones", &["q", "k", "v", "dout", "dq", "dk", "dv"]);
    let output = quickstart(&["--device", "cpu", "--backward", file.path()]);
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the file stores no out and lse"), "{text}");
    assert_eq!(text.matches("BEYOND THE bound").count(), 2, "{text}");
    assert!(error_of("dv", &text) <= 1e-6, "{text}");

    let file = ones("no-gradients", &["q", "k", "v", "dout"]);
    let output = quickstart(&["--device", "cpu", "--backward", file.path()]);
    assert!(output.status.success(), "{}", printed(&output));
    assert!(printed(&output).contains("gradients not compared: the file stores no dq, dk and dv"));
    let file = ones("no-dout", &["q", "k", "v"]);
    assert!(refused(&["--backward", file.path()]).contains("no tensor `dout`"));
}

#[test]
fn gradients_are_written_too() {
    let file = Scratch::new("gradients.safetensors");
    let output = quickstart(&[
        "--device",
        "cpu",
        "--dtype",
        "f16",
        "--backward",
        "--output",
        file.path(),
    ]);
    assert!(output.status.success(), "{}", printed(&output));
    let bytes = std::fs::read(file.path()).expect("it was written");
    let written = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    for name in ["out", "dq", "dk", "dv"] {
        let tensor = written.tensor(name).expect(name);
        assert_eq!(
            (tensor.dtype(), tensor.shape()),
            (Dtype::F16, [1, 12, 331, 32].as_slice()),
            "{name}"
        );
        assert!(tensor.data().iter().any(|&byte| byte != 0), "{name}");
    }
}

#[test]
fn what_was_written_can_be_read_again() {
    let file = Scratch::new("again.safetensors");
    let output = quickstart(&["--device", "cpu", "--output", file.path()]);
    assert!(output.status.success(), "{}", printed(&output));
    let missing = refused(&[file.path()]);
    assert!(missing.contains("no tensor `q` (there is lse, out)"), "{missing}");
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm_layer5.safetensors");
    let stored = AttentionFile::read(&bundled).expect("the bundled input");
    assert_eq!(stored.softmax_scale, Some(0.176_776_69));
}

#[test]
fn wrong_files_are_refused() {
    assert!(refused(&["nowhere.safetensors"]).contains("nowhere.safetensors: "));
    let no_file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let no_file = no_file.to_str().expect("a path of letters");
    assert!(refused(&[no_file]).contains("not a safetensors file"));

    let (half, shape) = (Dtype::F16, [1, 2, 4, 8]);
    let whole = Scratch::with(
        "whole",
        &[("q", half, &shape), ("k", half, &shape), ("v", half, &shape)],
    );
    let output = quickstart(&["--device", "cpu", whole.path()]);
    assert!(output.status.success());
    assert!(printed(&output).contains("the file stores no out and lse"));

    let integers = Scratch::with(
        "integers",
        &[("q", Dtype::I32, &shape), ("k", half, &shape), ("v", half, &shape)],
    );
    assert!(refused(&[integers.path()]).contains("`q` has dtype I32, expected F32, F16 or BF16"));
    let flat = Scratch::with(
        "flat",
        &[("q", half, &[4, 8]), ("k", half, &shape), ("v", half, &shape)],
    );
    assert!(refused(&[flat.path()]).contains("`q` has rank 2"));
    let short = Scratch::with(
        "short",
        &[("q", half, &shape), ("k", half, &shape), ("v", half, &[1, 2, 3, 8])],
    );
    assert!(refused(&[short.path()]).contains("`v` has seqlen = 3, expected 4 as in `k`"));
    let answer = Scratch::with(
        "answer",
        &[
            ("q", half, &shape),
            ("k", half, &shape),
            ("v", half, &shape),
            ("out", Dtype::F32, &[4]),
        ],
    );
    assert!(refused(&[answer.path()]).contains("`out` has shape [4], expected [1, 2, 4, 8]"));
    let gradient = Scratch::with(
        "gradient",
        &[
            ("q", half, &shape),
            ("k", half, &[1, 2, 6, 8]),
            ("v", half, &[1, 2, 6, 8]),
            ("dk", Dtype::F32, &shape),
        ],
    );
    assert!(refused(&[gradient.path()]).contains("`dk` has shape [1, 2, 4, 8], expected [1, 2, 6, 8] as `k` has"));
}

#[test]
fn wrong_options_are_refused() {
    assert!(refused(&["--device", "tpu"]).contains("\"tpu\""));
    assert!(refused(&["--dtype", "f64"]).contains("f32, f16, bf16"));
    assert!(refused(&["--colour"]).contains("--colour"));
    assert!(refused(&["--output"]).contains("--output"));
    assert!(refused(&["--device", "cpu", "--output", "/nowhere/at/all"]).contains("/nowhere/at/all"));
    if Device::cuda(0).is_err() {
        assert!(refused(&["--device", "cuda"]).contains("CUDA is not available"));
    }
}

/// Tests that the environment variable chooses the CPU's instructions, and that a wrong value is an error.
#[test]
fn the_environment_chooses_instructions() {
    let run = |name| quickstart_with(&[("FLASH_ATTENTION_CPU", name)], &["--device", "cpu"]);
    let output = run("portable");
    assert!(
        output.status.success() && printed(&output).contains("portable"),
        "{}",
        printed(&output)
    );
    let output = run("mmx");
    let sentence = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{sentence}");
    assert!(
        sentence.contains("\"mmx\"") && sentence.contains("portable"),
        "{sentence}"
    );
}

#[test]
fn help_is_no_error() {
    let output = quickstart(&["--help"]);
    assert!(output.status.success());
    for option in ["--device", "--dtype", "--causal", "--backward", "--output"] {
        assert!(printed(&output).contains(option));
    }
}

/// A file of 20 queries of two heads and 30 keys that they share, with these head_dims of q and k and of v, and with the
/// oracle's answers.
fn file_of_head_dims(name: &str, [head_dim, head_dim_v]: [usize; 2]) -> Scratch {
    let (q, k, v) = ([1, 2, 20, head_dim], [1, 1, 30, head_dim], [1, 1, 30, head_dim_v]);
    let (out, lse) = ([1, 2, 20, head_dim_v], [1, 2, 20]);
    let inputs = [("q", q, 1), ("k", k, 2), ("v", v, 3), ("dout", out, 4)];
    let [wide_q, wide_k, wide_v, wide_dout] =
        inputs.map(|(_, shape, seed)| numbers(&shape, seed).into_iter().map(f64::from).collect::<Vec<f64>>());
    let dims = Dims::new(&Attention::new(), q, k).with_head_dim_v(head_dim_v);
    let (exact_out, exact_lse) = reference::forward(&dims, &wide_q, &wide_k, &wide_v);
    let [dq, dk, dv] = reference::backward(&dims, &wide_q, &wide_k, &wide_v, &wide_dout);
    let tensors = [
        ("q", &q[..], wide_q),
        ("k", &k, wide_k),
        ("v", &v, wide_v),
        ("dout", &out, wide_dout),
        ("out", &out, exact_out),
        ("lse", &lse, exact_lse),
        ("dq", &q, dq),
        ("dk", &k, dk),
        ("dv", &v, dv),
    ];
    let tensors = tensors.map(|(name, shape, elements)| {
        let bytes: Vec<u8> = elements.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
        (name, Dtype::F32, shape.to_vec(), bytes)
    });
    Scratch::holding(name, &tensors)
}

#[test]
fn values_may_have_another_head_dim() {
    for (name, head_dims) in [("mla", [192, 128]), ("narrow", [64, 32]), ("wide", [32, 64])] {
        let file = file_of_head_dims(name, head_dims);
        for (device, dtype) in [("cpu", "f32"), ("cpu", "bf16"), ("emulator:sm_90a", "f16")] {
            let output = quickstart(&[file.path(), "--device", device, "--dtype", dtype, "--backward"]);
            let text = printed(&output);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{device}, {dtype}: {text}{errors}");
            assert_eq!(text.matches("within the bound").count(), 5, "{text}");
            let printed = format!("head_dim {} (v {})", head_dims[0], head_dims[1]);
            assert_eq!(text.matches(&printed).count(), 2, "{text}");
        }
    }
}

/// The tokens of the bundled file as three packed sequences, one of them empty, of whose keys the last do not count.
fn packed_file() -> Scratch {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm_layer5.safetensors");
    let mut file = AttentionFile::read(&bundled).expect("the bundled file");
    for stored in [&mut file.q, &mut file.k, &mut file.v] {
        let [_, heads, seqlen, head_dim] = <[usize; 4]>::try_from(&stored.shape[..]).expect("four axes");
        let row = |index: usize| ((index % heads) * seqlen + index / heads) * head_dim;
        stored.elements = (0..seqlen * heads)
            .flat_map(|index| stored.elements[row(index)..][..head_dim].to_vec())
            .collect();
        stored.shape = vec![seqlen, heads, head_dim];
    }
    file.dout = Some(file.v.clone());
    let total = file.q.shape[0] as i32;
    let (offsets, used) = ([0, 100, 100, total], [100, 0, total - 103]);
    let sequences = Sequences::new(&offsets, &offsets).expect("offsets grow");
    let sequences = sequences.seqused_k(&used).expect("fewer keys");
    let answers = ragged::answers::<f32>(&Attention::new(), &file, &sequences);
    let bytes_of = |numbers: &[f64]| -> Vec<u8> { numbers.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect() };
    let integers = |numbers: &[i32]| -> Vec<u8> { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let (shape, lse_shape) = (file.q.shape.clone(), vec![file.q.shape[1], file.q.shape[0]]);
    let mut tensors = vec![
        ("cu_seqlens_q", Dtype::I32, vec![4], integers(&offsets)),
        ("cu_seqlens_k", Dtype::I32, vec![4], integers(&offsets)),
        ("seqused_k", Dtype::I32, vec![3], integers(&used)),
        ("lse", Dtype::F32, lse_shape, bytes_of(&answers.exact_lse)),
    ];
    for (name, stored) in [("q", &file.q), ("k", &file.k), ("v", &file.v), ("dout", &file.v)] {
        tensors.push((name, Dtype::F32, shape.clone(), bytes_of(&stored.widen())));
    }
    for (name, exact) in ["out", "dq", "dk", "dv"].into_iter().zip(&answers.exact) {
        tensors.push((name, Dtype::F32, shape.clone(), bytes_of(exact)));
    }
    Scratch::holding("packed", &tensors)
}

#[test]
fn packed_sequences_are_solved_one_by_one() {
    let packed = packed_file();
    let output = quickstart(&[packed.path(), "--device", "cpu", "--ragged", "--backward"]);
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(
        text.contains("ragged    3 sequences of 0 to 231 queries (331 in all)"),
        "{text}"
    );
    for name in ["out", "lse", "dq", "dk", "dv"] {
        assert!(error_of(name, &text) < 1e-4, "{text}");
    }
}

#[test]
fn ragged_files_without_sequences_are_refused() {
    let tensors = ["q", "k", "v"].map(|name| (name, Dtype::F32, &[1, 1, 8][..]));
    let file = Scratch::with("ragged-missing", &tensors);
    let sentence = refused(&[file.path(), "--device", "cpu", "--ragged"]);
    assert!(
        sentence.contains("no tensor `cu_seqlens_q`, which --ragged needs"),
        "{sentence}"
    );
    let sentence = refused(&[file.path(), "--device", "cpu"]);
    assert!(sentence.contains("rank 3"), "{sentence}");
}
