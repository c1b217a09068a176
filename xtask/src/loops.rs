//! `cargo xtask loops`: what the compiler makes of the CPU device's inner loops, for every instruction set. It needs no
//! processor that has them.
//!
//! A loop that multiplies and keeps a sum, or anything else, on the stack is a failure: the block was planned for the registers
//! of its instruction set. An array on the stack whose address is in a register of its own is not seen.
//!
//! A masked store of AVX2 is a failure anywhere: AMD's processors run it as microcode. The compiler makes one where a number in memory
//! is replaced or kept.

use crate::assembly::{Function, functions};
use crate::{Outcome, read, workspace};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A target, and the instruction sets that are found in its library, as modules below `device::cpu`.
const TARGETS: [(&str, &[&str]); 2] = [
    (
        "x86_64-unknown-linux-gnu",
        &[
            "kernels::isa::avx512",
            "bf16::x86",
            "kernels::isa::avx2",
            "kernels::isa::portable",
        ],
    ),
    (
        "aarch64-unknown-linux-gnu",
        &["bf16::arm", "kernels::isa::neon", "kernels::isa::portable"],
    ),
];

/// Functions that have a loop with products in every instruction set.
const MULTIPLY: [&str; 5] = ["product", "softmax", "multiply", "add_values", "backpropagate"];

/// Loops that may access the stack: few queries, the strips of a score program, and the conversion of e4m3 codes in plain Rust, which no
/// processor in use today runs by default.
const MAY_SPILL: [(&str, &str); 5] = [
    ("kernels::isa::portable", "multiply"),
    ("kernels::isa::portable", "add_values"),
    ("kernels::isa::portable", "exponentiate"),
    ("kernels::isa::portable", "strip"),
    ("kernels::isa::portable", "widen_codes"),
];

/// Compiles the library for each target and prints its loops; fails where one of them accesses the stack.
pub fn check() -> Outcome {
    let mut faults = Vec::new();
    println!("| target | function | loops | instructions, products of the largest | accesses of the stack |");
    println!("| --- | --- | --- | --- | --- |");
    for (target, sets) in TARGETS {
        let assembly = read(&compile(target)?)?;
        for set in sets {
            judge(target, set, &assembly, &mut faults);
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(faults.join("\n"))
}

/// Prints a line for each function of an instruction set that multiplies, and adds its faults.
fn judge(target: &str, set: &str, assembly: &str, faults: &mut Vec<String>) {
    let prefix = format!("device::cpu::{set}::");
    let functions = functions(assembly, &prefix);
    for function in &functions {
        if let Some(store) = function.instructions().find(|text| is_masked_store(text)) {
            faults.push(format!(
                "{target}: {set}::{} has a masked store: {store}",
                name(function)
            ));
        }
        let loops = function.loops();
        let Some(largest) = loops.iter().max_by_key(|l| l.products()) else {
            continue;
        };
        let of_stack: Vec<&str> = loops.iter().flat_map(|l| l.of_stack()).collect();
        let architecture = target.split('-').next().unwrap_or_default();
        println!(
            "| {architecture} | {set}::{} | {} | {}, {} | {} |",
            name(function),
            loops.len(),
            largest.instructions.len(),
            largest.products(),
            of_stack.len()
        );
        if let Some(first) = of_stack.first().filter(|_| !MAY_SPILL.contains(&(set, name(function)))) {
            faults.push(format!(
                "{target}: a loop of {set}::{} accesses the stack: {first}",
                name(function)
            ));
        }
    }
    // A function that is absent would pass all checks, so those that multiply have to be found.
    let expected = if set.starts_with("kernels") { &MULTIPLY[..] } else { &[] };
    let multiplies = |wanted: &&&str| {
        let mut named = functions.iter().filter(|function| name(function) == **wanted);
        named.any(|function| !function.loops().is_empty())
    };
    for missing in expected.iter().filter(|wanted| !multiplies(wanted)) {
        faults.push(format!(
            "{target}: no loop that multiplies was found in {set}::{missing}"
        ));
    }
    if expected.is_empty() && functions.iter().all(|f| f.loops().is_empty()) {
        faults.push(format!("{target}: no loop that multiplies was found in {set}"));
    }
}

/// Returns true if an instruction of AVX2 stores some lanes of a register: its last operand is in memory.
fn is_masked_store(text: &str) -> bool {
    ["vmaskmov", "vpmaskmov"].iter().any(|name| text.starts_with(name)) && text.ends_with(')')
}

/// The last part of a function's path.
fn name<'a>(function: &'a Function<'_>) -> &'a str {
    function.path.rsplit("::").next().unwrap_or_default()
}

/// Has the library compiled to assembly, as users compile it: release, no processor named.
fn compile(target: &str) -> Outcome<PathBuf> {
    let folder = workspace().join("target/loops");
    let artifacts = folder.join(target).join("release/deps");
    // Artifacts of an earlier run would be taken for those of this one.
    remove_artifacts(&artifacts);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace())
        .args(["rustc", "--quiet", "--release", "--lib", "--package", "flash-attention"])
        .args(["--no-default-features", "--target", target, "--", "--emit=asm"])
        .env("CARGO_TARGET_DIR", &folder)
        .env_remove("RUSTFLAGS")
        .status()
        .map_err(|e| format!("cargo: {e}"))?;
    if !status.success() {
        return Err(format!(
            "the library does not compile for {target} ({status}); where its std is missing: rustup target add {target}"
        ));
    }
    assembly(&artifacts)
}

fn is_of_library(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.trim_start_matches("lib").starts_with("flash_attention-")
}

fn remove_artifacts(folder: &Path) {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for file in files.filter(|file| is_of_library(&file.path())) {
        let _ = std::fs::remove_file(file.path());
    }
}

fn assembly(folder: &Path) -> Outcome<PathBuf> {
    let files = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut paths = files.filter_map(|file| Some(file.ok()?.path()));
    paths
        .find(|path| is_of_library(path) && path.extension().is_some_and(|extension| extension == "s"))
        .ok_or_else(|| format!("the compiler left no assembly in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::is_masked_store;

    #[test]
    fn masked_stores_are_told_from_loads() {
        assert!(is_masked_store("vmaskmovps\t%ymm2, %ymm4, (%r15,%r11,4)"));
        assert!(is_masked_store("vpmaskmovd\t%ymm2, %ymm4, 64(%rsi)"));
        assert!(!is_masked_store("vmaskmovps\t(%rsi), %ymm4, %ymm2"));
        assert!(!is_masked_store("vmovups\t%ymm2, (%rsi)"));
    }
}
