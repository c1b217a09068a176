//! `cargo xtask gpu-bundle`: one folder that runs on a machine with an NVIDIA driver and no Rust.
//!
//! It contains the test suite, the micro-kernels with the program that runs them, the program that writes the table
//! of speed, their data, and a script. Programs are stripped of debug information.

use crate::{Outcome, make_executable, workspace};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Script that runs everything on the other machine.
const RUN: &str = include_str!("bundle/run.sh");

/// Options of the bundle.
pub struct Options {
    /// Folder to write; an earlier bundle in it is replaced.
    pub output: PathBuf,
    /// Cargo profile: `release`, or `dev` to test the bundle itself with programs that are already built.
    pub profile: String,
    /// True to pack the folder into one file beside it, too.
    pub archive: bool,
}

impl Options {
    /// Parses the arguments that follow `gpu-bundle`.
    pub fn parse(arguments: &[&str]) -> Option<Self> {
        let mut options = Self {
            output: workspace().join("target/gpu-bundle"),
            profile: "release".to_owned(),
            archive: false,
        };
        let mut rest = arguments.iter();
        while let Some(&argument) = rest.next() {
            match argument {
                "--output" => options.output = PathBuf::from(rest.next()?),
                "--profile" => options.profile = (*rest.next()?).to_owned(),
                "--archive" => options.archive = true,
                _ => return None,
            }
        }
        Some(options)
    }
}

/// Builds the programs and fills the folder.
pub fn make(options: &Options) -> Outcome {
    let programs = programs(&options.profile)?;
    let folder = &options.output;
    empty(folder)?;
    for (name, path) in &programs {
        install(path, &folder.join("bin").join(name))?;
    }
    for data in ["examples/data", "tests/ptx"] {
        copy_files(&workspace().join(data), &folder.join("data").join(data))?;
    }
    copy_file(&workspace().join("benches/peers.py"), &folder.join("benches/peers.py"))?;
    write(&folder.join("run.sh"), RUN)?;
    make_executable(&folder.join("run.sh"))?;
    let readme = readme(folder, options)?;
    write(&folder.join("README.md"), &readme)?;
    print!("{readme}");
    println!("{}: {:.0} MB", folder.display(), size(folder)? as f64 / 1e6);
    if options.archive {
        archive(folder)?;
    }
    Ok(())
}

/// Moves a bundle elsewhere, hides the repository, and runs its script on the CPU device. This shows that the bundle
/// is complete.
pub fn check(bundle: &Path) -> Outcome {
    let moved = std::env::temp_dir().join(format!("flash-attention-bundle-{}", std::process::id()));
    let outcome = check_moved(bundle, &moved);
    let _ = std::fs::remove_dir_all(&moved);
    outcome
}

fn check_moved(bundle: &Path, moved: &Path) -> Outcome {
    copy_tree(bundle, moved)?;
    let hidden = hidden(&workspace());
    let script = |parts: &[&str], filter: &str| {
        let mut command = hidden.as_ref().map_or_else(|| Command::new("env"), copy_of);
        command
            .arg(moved.join("run.sh"))
            .args(parts)
            .env("FLASH_ATTENTION_DEVICES", "cpu")
            .env("SUITE_FILTER", filter)
            .env(
                "SPEED_ARGUMENTS",
                "--device cpu --tokens 40 --hidden 32 --runs 2 --head-dims 16 --seqlens 20,40 --once 0",
            )
            .env("OUT", moved.join("results"))
            .current_dir(moved);
        let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ok::<_, String>((output.status.success(), text))
    };
    let expect = |what: &str, (succeeded, text): (bool, String), success: bool, words: &[&str]| {
        let missing = words.iter().find(|&&word| !text.contains(word));
        if succeeded == success && missing.is_none() {
            Ok(())
        } else {
            Err(format!("{what}: success {succeeded}, missing {missing:?}:\n{text}"))
        }
    };
    // These parts read data.
    let suite = script(
        &["suite", "speed"],
        "f16_gradients_are_as_good_as_those_of_standard_attention",
    )?;
    expect(
        "suite and speed",
        suite,
        true,
        &["ok     minilm: 2 passed", "all passed: suite speed"],
    )?;
    let micro = script(&["micro"], "")?;
    if !has_gpu() {
        expect("micro without a GPU", micro, false, &["no NVIDIA", "failed: micro"])?;
    }
    expect(
        "a part that is none",
        script(&["sweet"], "")?,
        false,
        &["no part `sweet`"],
    )?;
    // Without its data the suite must fail test by test and name the missing path.
    std::fs::remove_dir_all(moved.join("data")).map_err(|e| format!("{}: {e}", moved.display()))?;
    let bare = script(&["suite"], "f16_gradients_are_as_good_as_those_of_standard_attention")?;
    let sought = moved.join("data/examples/data").display().to_string();
    expect(
        "suite without data",
        bare,
        false,
        &["FAILED minilm::f16_gradients", &sought, "failed: suite"],
    )?;
    let sight = if hidden.is_some() {
        "hidden"
    } else {
        "in sight, since this system hides no folder"
    };
    println!("{} runs elsewhere, the repository {sight}", bundle.display());
    Ok(())
}

/// Returns a command that runs another program while a folder appears empty; `None` where the system does not allow
/// that.
fn hidden(folder: &Path) -> Option<Command> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "--mount", "bash", "-c"]);
    unshare.arg(r#"mount -t tmpfs none "$0" && [[ -z $(ls -A "$0") ]] && "$@""#);
    unshare.arg(folder);
    let works = copy_of(&unshare).arg("true").output();
    works.is_ok_and(|output| output.status.success()).then_some(unshare)
}

/// Returns a command with the same program and arguments.
fn copy_of(command: &Command) -> Command {
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args());
    copy
}

fn has_gpu() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

/// Builds the programs; returns name and path of each.
fn programs(profile: &str) -> Outcome<Vec<(String, PathBuf)>> {
    let mut programs = vec![("suite".to_owned(), suite(profile)?)];
    for (package, name) in [("flash-attention-tests", "gpu_kernels"), ("benches", "gpu_speed")] {
        let built = built(cargo().args(["build", "--profile", profile, "--package", package, "--bin", name]))?;
        let program = built.into_iter().find(|(built, _)| built == name);
        programs.push(program.ok_or_else(|| format!("{name} was not built"))?);
    }
    Ok(programs)
}

/// Builds the test suite; returns its path, whose file name ends in a hash.
fn suite(profile: &str) -> Outcome<PathBuf> {
    let mut cargo = cargo();
    cargo.args([
        "test",
        "--no-run",
        "--package",
        "flash-attention-tests",
        "--test",
        "suite",
    ]);
    let built = built(cargo.args(["--profile", if profile == "dev" { "test" } else { profile }]))?;
    let suite = built.into_iter().find(|(name, _)| name.starts_with("suite-"));
    Ok(suite.ok_or("suite was not built")?.1)
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// Runs cargo and returns file name and path of each program it built, from its JSON messages.
fn built(cargo: &mut Command) -> Outcome<Vec<(String, PathBuf)>> {
    cargo.args(["--message-format", "json-render-diagnostics"]);
    cargo.stderr(std::process::Stdio::inherit());
    let output = cargo.output().map_err(|e| format!("{cargo:?}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{cargo:?} failed ({})", output.status));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let paths = messages.lines().filter_map(executable);
    let named = paths.filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), path.clone())));
    Ok(named.collect())
}

/// Returns the path of a program from a message of cargo.
fn executable(message: &str) -> Option<PathBuf> {
    let (_, rest) = message.split_once(r#""executable":""#)?;
    let (path, _) = rest.split_once('"')?;
    Some(PathBuf::from(path))
}

/// Copies a program and strips it, where binutils are installed.
fn install(from: &Path, to: &Path) -> Outcome {
    copy_file(from, to)?;
    // A program that is not stripped is larger, but runs the same.
    let _ = Command::new("strip").arg(to).output();
    Ok(())
}

/// Writes the bundle's README: how to run it, its origin, and its requirements.
fn readme(folder: &Path, options: &Options) -> Outcome<String> {
    let mut libraries = BTreeSet::new();
    let mut glibc = (0, 0);
    for program in files(&folder.join("bin"))? {
        let bytes = std::fs::read(&program).map_err(|e| format!("{}: {e}", program.display()))?;
        glibc = glibc.max(newest_glibc(&bytes));
        let ldd = said(Command::new("ldd").arg(&program)).unwrap_or_default();
        libraries.extend(
            ldd.lines()
                .filter_map(|line| Some(line.split_whitespace().next()?.to_owned())),
        );
    }
    let libraries: Vec<String> = libraries
        .into_iter()
        .filter(|name| !name.starts_with("linux-vdso"))
        .collect();
    let mut git = Command::new("git");
    let commit = said(
        git.args(["describe", "--always", "--dirty", "--abbrev=40"])
            .current_dir(workspace()),
    );
    let rustc =
        said(Command::new("rustc").arg("--version").current_dir(workspace())).unwrap_or_else(|| "unknown".into());
    Ok(format!(
        "# FlashAttention in Rust, for a machine with a GPU

Needs Linux on x86-64 with an NVIDIA driver for CUDA 12.0 or newer and a GPU of compute capability 8.0 or newer; no Rust, no
CUDA toolkit. `./run.sh` runs everything and writes `results/`; its first lines list the parts and options.

- `kernels`: the driver compiles every kernel; none may spill
- `micro`: the kernels in `data/tests/ptx`, at least one per instruction family, compute their stored results
- `suite`: the test suite on the GPU, without modules about the emulator and the text of kernels
- `speed`: the table of speed, with PyTorch and FlashAttention-3 if python3 has them

Origin:

- commit: {}
- date: {}
- compiler: {rustc}
- profile: {}

The programs need glibc {}.{} or newer, and {}.
On an older system they print `GLIBC_{}.{} not found`; build the bundle there, with `cargo xtask gpu-bundle`.
",
        commit.unwrap_or_else(|| "not a checkout".into()),
        said(Command::new("date").args(["--utc", "+%F"])).unwrap_or_default(),
        options.profile,
        glibc.0,
        glibc.1,
        libraries.join(", "),
        glibc.0,
        glibc.1,
    ))
}

/// Returns the first line that a command prints (all lines of `ldd`), or `None` if it fails.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Returns the newest glibc symbol version in a program's string table.
fn newest_glibc(program: &[u8]) -> (u32, u32) {
    const MARK: &[u8] = b"\0GLIBC_";
    let versions = program
        .windows(MARK.len())
        .enumerate()
        .filter(|(_, window)| *window == MARK);
    let parse = |at: usize| {
        let text = program[at + MARK.len()..].split(|&byte| byte == 0).next()?;
        let mut numbers = std::str::from_utf8(text).ok()?.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    versions.filter_map(|(at, _)| parse(at)).max().unwrap_or((0, 0))
}

/// Packs the folder. Its programs contain the same kernels, so the compressor's window spans several programs.
fn archive(folder: &Path) -> Outcome {
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(format!("{}: not a folder to pack", folder.display()));
    };
    let path = folder.with_extension("tar.xz");
    let mut tar = Command::new("tar");
    tar.args(["--use-compress-program", "xz --threads=1 --lzma2=preset=1,dict=64MiB"]);
    tar.arg("--create")
        .arg("--file")
        .arg(&path)
        .arg("--directory")
        .arg(parent)
        .arg(name);
    let status = tar.status().map_err(|e| format!("{tar:?}: {e}"))?;
    if !status.success() {
        return Err(format!("{tar:?} failed ({status})"));
    }
    let bytes = std::fs::metadata(&path)
        .map_err(|e| format!("{}: {e}", path.display()))?
        .len();
    println!("{}: {:.0} MB", path.display(), bytes as f64 / 1e6);
    Ok(())
}

/// Makes an empty folder. An existing folder is emptied only if it is a bundle.
fn empty(folder: &Path) -> Outcome {
    if folder.exists() {
        if !folder.join("run.sh").exists() {
            return Err(format!("{}: not a bundle, so it is not overwritten", folder.display()));
        }
        std::fs::remove_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))
}

fn write(path: &Path, text: &str) -> Outcome {
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn copy_file(from: &Path, to: &Path) -> Outcome {
    let folder = to.parent().unwrap_or(to);
    std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    std::fs::copy(from, to).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))?;
    Ok(())
}

/// Lists the files of a folder, without subfolders.
fn files(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for item in std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let path = item.map_err(|e| format!("{}: {e}", folder.display()))?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn copy_files(from: &Path, to: &Path) -> Outcome {
    for path in files(from)? {
        copy_file(&path, &to.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> Outcome {
    copy_files(from, to)?;
    for item in std::fs::read_dir(from)
        .map_err(|e| format!("{}: {e}", from.display()))?
        .flatten()
    {
        if item.path().is_dir() {
            copy_tree(&item.path(), &to.join(item.file_name()))?;
        }
    }
    Ok(())
}

fn size(folder: &Path) -> Outcome<u64> {
    let mut bytes = 0;
    for item in std::fs::read_dir(folder)
        .map_err(|e| format!("{}: {e}", folder.display()))?
        .flatten()
    {
        bytes += if item.path().is_dir() {
            size(&item.path())?
        } else {
            item.metadata().map_or(0, |m| m.len())
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_options() {
        let options = Options::parse(&["--output", "x", "--profile", "dev", "--archive"]).expect("they are");
        assert_eq!(
            (options.output, options.profile.as_str(), options.archive),
            (PathBuf::from("x"), "dev", true)
        );
        assert!(Options::parse(&["--output"]).is_none() && Options::parse(&["x"]).is_none());
    }

    #[test]
    fn programs_are_found_in_what_cargo_says() {
        let message =
            r#"{"reason":"compiler-artifact","target":{"name":"a"},"executable":"/t/deps/a-0f","fresh":true}"#;
        assert_eq!(executable(message), Some(PathBuf::from("/t/deps/a-0f")));
        assert_eq!(executable(r#"{"reason":"compiler-artifact","executable":null}"#), None);
    }

    #[test]
    fn the_newest_glibc_is_the_largest_number() {
        assert_eq!(
            newest_glibc(b"x\0GLIBC_2.9\0GLIBC_2.34\0GLIBC_2.3.4\0GLIBC_PRIVATE\0"),
            (2, 34)
        );
        assert_eq!(newest_glibc(b"nothing"), (0, 0));
    }

    #[test]
    fn what_is_no_bundle_is_not_overwritten() {
        assert!(empty(&workspace().join("xtask")).is_err());
    }
}
