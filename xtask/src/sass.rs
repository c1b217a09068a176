//! `cargo xtask sass`: what ptxas makes of the kernels. It needs no GPU.
//!
//! A spill, a stack frame or a warning is a failure: each means that a tile no longer fits the registers it was planned
//! for.

use crate::{Outcome, ptx::path_of, read, workspace};
use flash_attention_kernels::entries::{Arch, ENTRIES, Entry};
use rayon::prelude::*;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The cards a kernel is assembled for: its own target, and Hopper, where portable kernels run too.
fn targets(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Sm80 => &["sm_80", "sm_90"],
        Arch::Sm90a => &["sm_90a"],
    }
}

/// One kernel, assembled for one card.
struct Assembled {
    entry: &'static Entry,
    target: &'static str,
    registers: u32,
    spilled: u32,
    stack: u32,
    tensor_instructions: usize,
    /// Other instructions for each tensor instruction in the main loop, if it has any.
    others: Option<f64>,
    warnings: Vec<String>,
}

/// Assembles every kernel, prints the table, and writes it to `output` if there is one.
pub fn report(output: Option<&Path>) -> Outcome {
    let ptxas = tool("ptxas")?;
    let nvdisasm = tool("nvdisasm")?;
    let work: Vec<_> = ENTRIES
        .iter()
        .flat_map(|e| targets(e.arch).iter().map(move |&target| (e, target)))
        .collect();
    let assembled = work
        .par_iter()
        .map(|(entry, target)| assemble(&ptxas, &nvdisasm, entry, target))
        .collect::<Outcome<Vec<_>>>()?;
    let table = table(&assembled);
    print!("{table}");
    if let Some(path) = output {
        std::fs::write(path, &table).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let faults: Vec<_> = assembled.iter().filter_map(fault).collect();
    if faults.is_empty() {
        println!(
            "{} kernels, {} assemblies: no stack, no spill, no warning",
            ENTRIES.len(),
            assembled.len()
        );
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

fn fault(kernel: &Assembled) -> Option<String> {
    let name = format!("{} for {}", kernel.entry.name, kernel.target);
    if kernel.spilled > 0 || kernel.stack > 0 {
        Some(format!(
            "{name}: {} bytes spilled, {} bytes of stack",
            kernel.spilled, kernel.stack
        ))
    } else {
        kernel.warnings.first().map(|warning| format!("{name}: {warning}"))
    }
}

fn assemble(ptxas: &Path, nvdisasm: &Path, entry: &'static Entry, target: &'static str) -> Outcome<Assembled> {
    let folder = workspace().join("target/sass").join(target);
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let source = path_of(entry);
    read(&source)?;
    let cubin = folder.join(entry.name).with_extension("cubin");
    let log = run(Command::new(ptxas)
        .args(["-v", "-arch", target])
        .arg(&source)
        .arg("-o")
        .arg(&cubin))?;
    let code = run(Command::new(nvdisasm).arg("-c").arg(&cubin))?;
    let number_before = |what: &str| -> Outcome<u32> {
        let end = log
            .find(what)
            .ok_or_else(|| format!("ptxas said nothing of '{what}' for {}:\n{log}", entry.name))?;
        let digits = log[..end]
            .trim_end()
            .rsplit(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap_or_default();
        digits
            .parse()
            .map_err(|_| format!("ptxas printed no number before '{what}' for {}:\n{log}", entry.name))
    };
    Ok(Assembled {
        entry,
        target,
        registers: number_before(" registers")?,
        spilled: number_before(" bytes spill stores")? + number_before(" bytes spill loads")?,
        stack: number_before(" bytes stack frame")?,
        tensor_instructions: code.lines().filter(|line| is_tensor(line)).count(),
        others: others_per_tensor(&code),
        warnings: log
            .lines()
            .filter(|line| line.contains("warning") || line.contains("Performance Loss"))
            .map(str::to_owned)
            .collect(),
    })
}

/// Whether a line of machine code multiplies on the tensor cores.
fn is_tensor(line: &str) -> bool {
    line.contains(" HMMA.") || line.contains(" HGMMA.")
}

/// Instructions other than tensor instructions, for each of those, in the leanest innermost loop that has any: the loop over
/// tiles that need no mask.
fn others_per_tensor(code: &str) -> Option<f64> {
    let lines: Vec<&str> = code.lines().collect();
    let label = |line: &str| line.starts_with(".L_x_").then(|| line.trim_end_matches(':').to_owned());
    let labels: HashMap<String, usize> = (lines.iter().enumerate())
        .filter_map(|(at, line)| Some((label(line)?, at)))
        .collect();
    // A loop is a branch back to a label.
    let mut loops: Vec<Range<usize>> = Vec::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(" BRA ")) {
        let target = line
            .split('`')
            .nth(1)
            .and_then(|rest| rest.strip_prefix('(')?.split(')').next());
        if let Some(&start) = target
            .and_then(|target| labels.get(target))
            .filter(|&&start| start < at)
        {
            loops.push(start..at);
        }
    }
    let tensors = |body: &Range<usize>| lines[body.clone()].iter().filter(|line| is_tensor(line)).count();
    loops.retain(|body| tensors(body) > 0);
    let encloses = |outer: &Range<usize>, inner: &Range<usize>| {
        outer != inner && outer.start <= inner.start && inner.end <= outer.end
    };
    let innermost = loops
        .iter()
        .filter(|outer| !loops.iter().any(|inner| encloses(outer, inner)));
    innermost
        .map(|body| {
            // An instruction starts with its address; what follows in its second word is a comment.
            let instructions = lines[body.clone()]
                .iter()
                .filter(|line| line.trim_end().ends_with(';'))
                .count();
            (instructions - tensors(body)) as f64 / tensors(body) as f64
        })
        .min_by(f64::total_cmp)
}

/// Runs a program to its end; its output, both streams.
fn run(command: &mut Command) -> Outcome<String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{command:?} failed ({}):\n{text}", output.status))
    }
}

fn table(assembled: &[Assembled]) -> String {
    let mut table = String::from(
        "| kernel | for | tile | threads | shared bytes | registers | stack | spilled | tensor instructions | others per tensor \
         instruction, main loop |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for kernel in assembled {
        let Assembled {
            entry,
            target,
            registers,
            spilled,
            stack,
            tensor_instructions,
            others,
            ..
        } = kernel;
        let others = others.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1}"));
        let (m, n, threads, shared) = (entry.block_m, entry.block_n, entry.threads, entry.shared_bytes);
        let _ = writeln!(
            table,
            "| {} | {target} | {m} x {n} | {threads} | {shared} | {registers} | {stack} | {spilled} | {tensor_instructions} | {others} |",
            entry.name
        );
    }
    table
}

/// A tool of the CUDA toolkit: on PATH, in CUDA_HOME, or fetched once into `target/`.
fn tool(name: &str) -> Outcome<PathBuf> {
    let on_path = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let installed = on_path
        .into_iter()
        .flatten()
        .chain(home)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    match installed {
        Some(path) => Ok(path),
        None => fetched_tool(name),
    }
}

fn fetched_tool(name: &str) -> Outcome<PathBuf> {
    let folder = workspace().join("target/cuda-tools");
    let find = || {
        let versions = std::fs::read_dir(folder.join("nvidia")).ok()?;
        versions
            .filter_map(Result::ok)
            .map(|version| version.path().join("bin").join(name))
            .find(|path| path.is_file())
    };
    if find().is_none() {
        fetch(&folder)?;
    }
    find().ok_or_else(|| format!("no {name} on PATH, in CUDA_HOME, or in NVIDIA's wheels"))
}

/// Downloads NVIDIA's wheels with pip and unpacks them.
fn fetch(folder: &Path) -> Outcome {
    let wheels = folder.join("wheels");
    let why = |e| format!("ptxas and nvdisasm are neither on PATH nor in CUDA_HOME, and could not be fetched:\n{e}");
    let mut download = Command::new("python3");
    download.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
    ]);
    run(download
        .arg(&wheels)
        .args(["nvidia-cuda-nvcc==13.*", "nvidia-cuda-nvdisasm==13.*"]))
    .map_err(why)?;
    let files = std::fs::read_dir(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))?;
    for wheel in files.filter_map(Result::ok) {
        run(Command::new("python3")
            .args(["-m", "zipfile", "--extract"])
            .arg(wheel.path())
            .arg(folder))?;
    }
    for name in ["ptxas", "nvdisasm"] {
        let versions = std::fs::read_dir(folder.join("nvidia")).map_err(|e| format!("{}: {e}", folder.display()))?;
        for version in versions.filter_map(Result::ok) {
            let path = version.path().join("bin").join(name);
            if path.is_file() {
                make_executable(&path)?;
            }
        }
    }
    Ok(())
}

/// Python's zipfile drops the bit that says so.
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
