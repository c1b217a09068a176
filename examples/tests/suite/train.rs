//! Tests of the training example as a user sees it: its output, its exit status, and its errors for wrong input.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the built example, which lies beside the folder of this test program.
fn train(arguments: &[&str]) -> Output {
    let test = std::env::current_exe().expect("a running program has a path");
    let built = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let program = built
        .join("examples/train")
        .with_extension(std::env::consts::EXE_EXTENSION);
    Command::new(&program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; `cargo build --example train` makes it", program.display()))
}

/// Runs with arguments that must be refused: status 2, nothing on standard output, and one sentence, which is
/// returned.
fn refused(arguments: &[&str]) -> String {
    let output = train(arguments);
    let sentence = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {sentence}");
    assert_eq!(sentence.lines().count(), 1, "{arguments:?}: {sentence}");
    assert!(output.stdout.is_empty(), "{arguments:?} printed");
    sentence
}

#[test]
fn losses_agree_and_a_text_is_written() {
    let output = train(&["--device", "cpu", "--steps", "3", "--seed", "5"]);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}");
    let check = printed.lines().find(|line| line.starts_with("check"));
    assert!(
        check.is_some_and(|line| line.contains("passed: over 3 steps")),
        "{printed}"
    );
    let sample = printed.split("first 10 characters:").nth(1).expect("a sample");
    assert!(sample.trim_start().starts_with("Four score"), "{sample}");
}

#[test]
fn one_seed_gives_one_curve() {
    let losses = |seed| {
        let output = train(&["--device", "cpu", "--steps", "1", "--seed", seed]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = printed.lines().find(|line| line.starts_with("step"));
        line.expect("the first step is printed").to_owned()
    };
    assert_eq!(losses("1"), losses("1"));
    assert_ne!(losses("1"), losses("2"));
}

#[test]
fn wrong_options_are_refused() {
    assert!(refused(&["--steps", "0"]).contains("--steps"));
    assert!(refused(&["--steps", "many"]).contains("many"));
    assert!(refused(&["--seed", "-1"]).contains("-1"));
    assert!(refused(&["--device", "abacus"]).contains("abacus"));
    assert!(refused(&["--fast"]).contains("--fast"));
}

#[test]
fn wrong_files_are_refused() {
    assert!(refused(&["--text", "no such file"]).contains("no such file"));

    let folder = std::env::temp_dir();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(format!("flash-attention-train-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).expect("a writable temporary folder");
        let sentence = refused(&["--text", path.to_str().expect("a path of letters")]);
        std::fs::remove_file(&path).expect("it was just written");
        assert!(sentence.contains(name), "{sentence}");
        sentence
    };
    assert!(file("short", &[b'a'; 128]).contains("128 characters and needs at least 129"));
    assert!(file("empty", &[]).contains("0 characters"));
    assert!(file("binary", &[0xff; 200]).contains("UTF-8"));
}

#[test]
fn help_names_every_option() {
    let output = train(&["--help"]);
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    for option in ["--steps", "--device", "--seed", "--text"] {
        assert!(printed.contains(option), "{printed}");
    }
}
