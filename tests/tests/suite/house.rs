//! Layers of the crates: a room imports from itself and from rooms below it.

use std::path::Path;

use flash_attention_tests::files::workspace;
use flash_attention_tests::house::forbidden_imports;

/// Rooms of the emulator, lowest floor first.
const EMULATOR: &[&[&str]] = &[
    &["error", "counters", "lex", "numeric", "schedule"],
    &["memory", "parse", "report", "tensor"],
    &["isa"],
    &["program"],
    &["check"],
    &["decode", "request"],
    &["exec"],
    &["launch"],
    &["module"],
];

/// Rooms of the host library, lowest floor first.
const HOST: &[&[&str]] = &[
    &["element", "progress"],
    &["error"],
    &["layout", "target", "sequences"],
    &["program"],
    &["options"],
    &["problem"],
    &["reference", "plan"],
    &["device"],
    &["tensor"],
    &["output", "trace", "features", "quantized"],
    &["call"],
    &["rotary"],
    &["batch"],
];

/// Rooms of the kernels, lowest floor first.
const KERNELS: &[&[&str]] = &[
    &["element", "mask", "program"],
    &["work"],
    &["abi"],
    &["ptx"],
    &["tile", "deal", "lists"],
    &["shape", "softmax", "nonfinite"],
    &["block", "scores", "delta", "rotary", "entries"],
    &["pipeline"],
    &["forward", "backward", "hopper", "study"],
    &["listed"],
    &["latent"],
    &["archive"],
];

#[test]
fn the_kernels_import_downwards() {
    imports_go_down("kernels/src", KERNELS);
}

#[test]
fn the_emulator_imports_downwards() {
    imports_go_down("emulator/src", EMULATOR);
}

#[test]
fn the_host_imports_downwards() {
    imports_go_down("host/src", HOST);
}

fn imports_go_down(src: &str, floors: &[&[&str]]) {
    let forbidden = forbidden_imports(&workspace().join(src), floors).expect("Rust");
    assert!(forbidden.is_empty(), "{}", forbidden.join("\n"));
}

/// Tests that every file of a suite is a module of it: one that is not is never compiled, and its tests never run.
#[test]
fn every_file_of_a_suite_is_a_module() {
    for crate_folder in [
        "tests",
        "host",
        "emulator",
        "examples",
        "integrations/candle",
        "integrations/burn",
    ] {
        let suite = workspace().join(crate_folder).join("tests/suite");
        let main = std::fs::read_to_string(suite.join("main.rs")).expect("a suite");
        for file in std::fs::read_dir(&suite).expect("a folder") {
            let path = file.expect("a file").path();
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name");
            let is_module = main.lines().any(|line| line == format!("mod {name};"));
            assert!(name == "main" || is_module, "{}: no module `{name}`", suite.display());
        }
    }
}

/// Writes the files of a small crate to a folder that is removed when the value is dropped.
fn with_crate(name: &str, files: &[(&str, &str)], check: impl FnOnce(&Path)) {
    let folder = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    for (path, text) in files {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }
    check(&folder);
    std::fs::remove_dir_all(folder).expect("the folder");
}

#[test]
fn an_upward_import_is_named_with_both_files() {
    let files = [
        ("lib.rs", "mod low; mod high; pub use high::Thing;"),
        (
            "low/mod.rs",
            "mod inner;\n#[cfg(test)]\nmod tests { use crate::high::Thing; }",
        ),
        (
            "low/inner.rs",
            "// crate::high in a comment\nuse super::{super::high::{deep::Part}};",
        ),
        (
            "high/mod.rs",
            "pub mod deep;\nuse crate::{low::inner, Thing};\nfn f() { super::low::f() }",
        ),
        ("high/deep.rs", "pub struct Part;"),
        ("stray.rs", ""),
    ];
    with_crate("house", &files, |src| {
        let found = forbidden_imports(src, &[&["low"], &["high"]]).expect("Rust");
        let places = [
            ["high/mod.rs", "crate::Thing", "lib.rs"],
            ["low/inner.rs", "crate::high::deep::Part", "high/deep.rs"],
            ["stray.rs", "no floor", "stray"],
        ];
        assert_eq!(found.len(), places.len(), "{found:?}");
        for (sentence, words) in found.iter().zip(places) {
            assert!(words.iter().all(|word| sentence.contains(word)), "{sentence}");
        }
        let found = forbidden_imports(src, &[&["low", "high"], &["stray"]]).expect("Rust");
        assert!(
            found
                .iter()
                .any(|s| s.contains("high/mod.rs") && s.contains("low/inner.rs")),
            "{found:?}"
        );
    });
}
