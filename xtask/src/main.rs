//! Build tasks: `cargo xtask ptx [--check | --show NAME]`, `cargo xtask sass [--output FILE]`, `cargo xtask gpu-bundle`.

mod bundle;
mod compiler;
mod module;
mod pack;
mod ptx;
mod sass;
mod source;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask <TASK>

  ptx                   compile kernels/ to kernels/ptx, one compressed archive for each target and for the study
  ptx --check           compile afresh and fail if a committed kernel differs
  ptx --show NAME       print the committed PTX of one kernel
  sass [--output FILE]  assemble every kernel with ptxas; report registers, spills, stack and tensor-core
                        instructions; fail on a warning, and on a spill or a stack frame that is not listed
  sass PART             the same for the kernels with PART in their name
  gpu-bundle [--output DIR] [--archive] [--profile PROFILE]
                        put all that a machine with a GPU and no Rust needs into DIR (target/gpu-bundle): the suite, the
                        micro-kernels, the table of speed, their data, run.sh; --archive also packs it into DIR.tar.xz
  gpu-bundle --check DIR  move a bundle elsewhere, hide the repository, and run it on the CPU";

/// What a task returns: nothing, or the sentence to print.
type Outcome<T = ()> = Result<T, String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ptx"] => ptx::write(),
        ["ptx", "--check"] => ptx::check(),
        ["ptx", "--show", name] => ptx::show(name),
        ["sass"] => sass::report("", None),
        ["sass", "--output", file] => sass::report("", Some(Path::new(file))),
        ["sass", part] => sass::report(part, None),
        ["gpu-bundle", "--check", folder] => bundle::check(Path::new(folder)),
        ["gpu-bundle", ref arguments @ ..] => match bundle::Options::parse(arguments) {
            Some(options) => bundle::make(&options),
            None => Err(USAGE.to_owned()),
        },
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

/// The root of the workspace.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

/// The folder of the archives of compiled kernels.
fn ptx_folder() -> PathBuf {
    workspace().join("kernels/ptx")
}

/// Reads a file, naming it if that fails.
fn read(path: &Path) -> Outcome<String> {
    std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}
/// Lets everybody run a file.
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
