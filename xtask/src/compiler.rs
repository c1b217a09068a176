//! Compiles Rust to PTX: finds a compiler with the source of `core`, and runs it.
//!
//! `core` is built for `nvptx64-nvidia-cuda` too, so its source must be installed: by `rustup component add
//! rust-src`, or by Debian's packages. Both are stable compilers; `RUSTC_BOOTSTRAP` enables the few unstable features
//! that the kernels use.

use crate::table::Table;
use crate::{Outcome, workspace};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A compiler that can build the kernels.
pub struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    /// Version line: `rustc 1.96.0 (…)`.
    pub version: String,
}

impl Compiler {
    /// Returns the active toolchain if it has the source of `core`, else the system's.
    pub fn find() -> Outcome<Self> {
        [("rustc", "cargo"), ("/usr/bin/rustc", "/usr/bin/cargo")]
            .iter()
            .find_map(|(rustc, cargo)| {
                let sysroot = PathBuf::from(output(rustc, &["--print", "sysroot"])?);
                let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
                let version = output(rustc, &["--version"])?;
                source.exists().then(|| Self { rustc: rustc.into(), cargo: cargo.into(), version })
            })
            .ok_or_else(|| {
                "no compiler here has core's source, which kernels need; either\n    rustup component add rust-src\nor, on \
                 Debian,\n    apt-get install -y rustc-web cargo-web rust-web-src"
                    .to_owned()
            })
    }

    /// Compiles the kernels of a table and returns the PTX module.
    pub fn compile(&self, table: &Table) -> Outcome<String> {
        let target = workspace().join("target/kernels").join(table.name);
        let artifacts = target.join("nvptx64-nvidia-cuda/release/deps");
        // Files of an earlier run must not be taken for results of this one.
        let _ = std::fs::remove_dir_all(&artifacts);
        let status = Command::new(&self.cargo)
            .current_dir(workspace().join("kernels"))
            .args(["rustc", "--quiet", "--release", "--lib", "--crate-type", "cdylib"])
            .args(["--features", table.name])
            .args([
                "--target",
                "nvptx64-nvidia-cuda",
                "-Zbuild-std=core",
                "--",
                "--emit=asm",
            ])
            // The .s file of a cdylib with fat LTO is a complete module, so nothing has to be linked.
            .args([
                "-C",
                "linker=/bin/true",
                "-C",
                &format!("target-cpu={}", table.arch.name()),
            ])
            // Register arrays stay in registers only if every index is a constant after unrolling.
            .args(["-C", "llvm-args=-unroll-threshold=100000"])
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", &target)
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                "-Zunstable-options\x1f-Cpanic=immediate-abort",
            )
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env_remove("RUSTC_WRAPPER")
            .status()
            .map_err(|e| format!("{}: {e}", self.cargo.display()))?;
        if !status.success() {
            return Err(format!("compiling the kernels of {} failed ({status})", table.name));
        }
        let assembly = find_assembly(&artifacts)?;
        crate::read(&assembly)
    }
}

fn find_assembly(folder: &Path) -> Outcome<PathBuf> {
    let files = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    files
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("flash_attention_kernels") && name.ends_with(".s")
        })
        .ok_or_else(|| format!("the compiler left no PTX in {}", folder.display()))
}

/// Returns the output of a program, if it runs and succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
