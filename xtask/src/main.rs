//! Build tasks: `cargo xtask ptx [--check | --show NAME | --only TABLE]`, `cargo xtask sass [PART]`, `cargo xtask
//! programs [PART]`, `cargo xtask results`, `cargo xtask loops`, `cargo xtask gpu-bundle`, `cargo xtask fetch NAME`.

mod assembly;
mod bundle;
mod compiler;
mod fetch;
mod limits;
mod loops;
mod machine_code;
mod module;
mod pack;
mod page;
mod peer;
mod programs;
mod ptx;
mod sass;
mod source;
mod step;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask <TASK>

  ptx                   compile kernels/ to kernels/ptx, one compressed archive for each target and for the study
  ptx --check           compile afresh and fail if a committed kernel differs
  ptx --show NAME       print the committed PTX of one kernel
  ptx --only TABLE      compile one archive alone (sm_80, sm_90a, program_sm_80, program_sm_90a, fp8_sm_90a, study), while you develop
  sass                  assemble every kernel with ptxas; print registers, spills and what main loops take; fail on a warning,
                        on a spill or a stack frame that is not listed, on a loop above its limit, and on stale results; then the
                        same of a fixed set of score programs, spliced into kernels
  sass PART             the same for the plain kernels with PART in their name, without the comparison with results
  programs PART         splice every program of that set into the kernels with PART in their name, assemble them, print what main
                        loops take; fail as `sass` does
  programs              assemble the set, write benches/results/programs.md
  results               assemble every kernel, write benches/results/sass.json and sass.md, programs.md, and hopper_model.md
  loops                 compile the CPU device for x86-64 and aarch64; print the loops that multiply, of every instruction set;
                        fail if one of them accesses the stack
  gpu-bundle [--output DIR] [--archive] [--profile PROFILE]
                        put all that a machine with a GPU and no Rust needs into DIR (target/gpu-bundle): the suite, the
                        micro-kernels, the table of speed, their data, run.sh; --archive also packs it into DIR.tar.xz
  gpu-bundle --check DIR  move a bundle elsewhere, hide the repository, and run it on the CPU
  fetch NAME            fetch what an example reads into target/fetched: minilm, shakespeare, smollm2";

/// Result of a task; the error is the sentence to print.
type Outcome<T = ()> = Result<T, String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ptx"] => ptx::write(),
        ["ptx", "--check"] => ptx::check(),
        ["ptx", "--show", name] => ptx::show(name),
        ["ptx", "--only", table] => ptx::write_one(table),
        ["sass"] => sass::check().and_then(|()| programs::check()),
        ["sass", part] => sass::show(part),
        ["programs"] => programs::write(),
        ["programs", part] => programs::show(part),
        ["results"] => sass::write().and_then(|()| programs::write()).and_then(|()| predict()),
        ["loops"] => loops::check(),
        ["gpu-bundle", "--check", folder] => bundle::check(Path::new(folder)),
        ["gpu-bundle", ref arguments @ ..] => match bundle::Options::parse(arguments) {
            Some(options) => bundle::make(&options),
            None => Err(USAGE.to_owned()),
        },
        ["fetch", name] => fetch::fetch(name),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `hopper_model`, which predicts speeds from the data of `sass`.
fn predict() -> Outcome {
    let mut cargo = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace())
        .args(["run", "--quiet", "--release", "-p", "benches", "--bin", "hopper_model"])
        .args(["--", "--output", "benches/results/hopper_model.md"]);
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("hopper_model: {status}")),
        Err(e) => Err(format!("{cargo:?}: {e}")),
    }
}

/// Returns the root of the workspace.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

/// Returns the folder of the archives of compiled kernels.
fn ptx_folder() -> PathBuf {
    workspace().join("kernels/ptx")
}

/// Reads a file; an error names it.
fn read(path: &Path) -> Outcome<String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}
/// Makes a file executable for all users.
#[cfg(unix)]
fn make_executable(path: &Path) -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, executable).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> Outcome {
    Ok(())
}
