//! `cargo xtask sass`: assembles the kernels with ptxas and checks the result. It needs no GPU.
//!
//! A spill, a stack frame or a warning is a failure: it means that a tile no longer fits in the registers it was
//! planned for. A main loop is a failure if its products differ from those that its tiles require, or if it exceeds
//! its [limit](crate::limits).

use crate::machine_code::{Listing, Loop};
use crate::table::{Row, tables};
use crate::{Outcome, limits, make_executable, page, read, workspace};
use flash_attention_kernels::entries::Arch;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the architectures that a kernel is assembled for: its own target, and Hopper, which runs portable kernels
/// too.
pub fn targets(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Sm80 => &["sm_80", "sm_90"],
        Arch::Sm90a => &["sm_90a"],
    }
}

/// A kernel assembled for one GPU architecture.
pub struct Assembled {
    pub entry: Row,
    pub target: &'static str,
    pub registers: u32,
    pub spilled: u32,
    pub stack: u32,
    pub tensor_instructions: usize,
    /// Innermost loops with tensor-core products, those with the fewest other instructions first.
    pub loops: Vec<Loop>,
    pub warnings: Vec<String>,
}

/// Assembles every kernel and prints the page. Fails if a kernel has a fault or the committed data belong to other
/// kernels.
pub fn check() -> Outcome {
    let (ptxas, assembled) = assemble_all("")?;
    print!("{}", page::markdown(&ptxas, &assembled));
    judge(&assembled)?;
    let committed = read(&results().join("sass.json"))?;
    if committed == page::json(&ptxas, &assembled) {
        return Ok(());
    }
    if committed.contains(&format!("\"ptxas\": \"{ptxas}\"")) {
        return Err(
            "benches/results/sass.json differs from the data of these kernels; run `cargo xtask results` and commit the result"
                .to_owned(),
        );
    }
    eprintln!("benches/results/sass.json was written with another ptxas than {ptxas}, so it was not compared");
    Ok(())
}

/// Assembles the kernels with `part` in their name and prints their page. Fails if one has a fault.
pub fn show(part: &str) -> Outcome {
    let (ptxas, assembled) = assemble_all(part)?;
    print!("{}", page::markdown(&ptxas, &assembled));
    judge(&assembled)
}

/// Assembles every kernel and writes the page and its data. Fails afterwards if a kernel has a fault.
pub fn write() -> Outcome {
    let (ptxas, assembled) = assemble_all("")?;
    let files = [
        ("sass.json", page::json(&ptxas, &assembled)),
        ("sass.md", page::markdown(&ptxas, &assembled)),
    ];
    for (name, text) in files {
        let path = results().join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    judge(&assembled)
}

fn results() -> PathBuf {
    workspace().join("benches/results")
}

/// Assembles the kernels with `part` in their name; also returns the version of ptxas.
fn assemble_all(part: &str) -> Outcome<(String, Vec<Assembled>)> {
    let tools = Tools::find()?;
    let mut assembled = Vec::new();
    for table in tables() {
        let committed = table.committed()?;
        let work: Vec<_> = (table.rows.iter())
            .filter(|row| row.name.contains(part) && !row.program)
            .flat_map(|row| targets(row.arch).iter().map(move |&target| (*row, target)))
            .collect();
        let outcomes = work
            .into_par_iter()
            .map(|(row, target)| assemble(&tools, &committed.text(row.name)?, row, target, row.name));
        assembled.extend(outcomes.collect::<Outcome<Vec<_>>>()?);
    }
    if assembled.is_empty() {
        return Err(format!("no kernel has '{part}' in its name"));
    }
    Ok((tools.version, assembled))
}

/// Fails with one sentence for each kernel that has a fault.
fn judge(assembled: &[Assembled]) -> Outcome {
    let faults: Vec<_> = assembled.iter().filter_map(fault).collect();
    if !faults.is_empty() {
        return Err(faults.join("\n"));
    }
    eprintln!(
        "{} assemblies: no warning, no stack or spill but in {} assemblies that are listed; main loops on Hopper as computed \
         from the tiles, all within their limits",
        assembled.len(),
        assembled.iter().filter(|kernel| kernel.spilled > 0).count()
    );
    Ok(())
}

/// Kernels that may spill: name, target, and the most bytes.
///
/// None of them spills in a loop that multiplies. The dK and dV kernels store one or two values before a walk and load them after it. The
/// dQ kernel of f32 stores two values at its start, and loads them between the loops of a tile. Of the kernels over e4m3 inputs consumers
/// store what they need after a walk, and the producer what its first thread needs to load.
const SPILLS: &[(&str, &str, u32)] = &[
    ("backward_dkv_f16_d128_causal", "sm_90", 20),
    ("backward_dkv_bf16_d128_causal", "sm_90", 20),
    ("backward_dkv_f16_d256_causal", "sm_90", 8),
    ("backward_dkv_bf16_d256_causal", "sm_90", 8),
    ("backward_dq_f32_d64_causal", "sm_90", 20),
    ("hopper_forward_fp8_f16_d64_causal", "sm_90a", 12),
    ("hopper_forward_fp8_bf16_d64_causal", "sm_90a", 12),
    ("hopper_forward_fp8_f16_d192_causal", "sm_90a", 68),
    ("hopper_forward_fp8_bf16_d192_causal", "sm_90a", 68),
];

/// Returns the bytes that a kernel may spill on a target.
fn most_spilled(name: &str, target: &str) -> u32 {
    let listed = SPILLS.iter().find(|&&(n, t, _)| (n, t) == (name, target));
    listed.map_or(0, |&(.., bytes)| bytes)
}

fn fault(kernel: &Assembled) -> Option<String> {
    let name = format!("{} for {}", kernel.entry.name, kernel.target);
    let spills = most_spilled(kernel.entry.name, kernel.target);
    if kernel.spilled > spills || kernel.stack > spills {
        Some(format!(
            "{name}: {} bytes spilled, {} bytes of stack",
            kernel.spilled, kernel.stack
        ))
    } else if let Some(warning) = kernel.warnings.first() {
        Some(format!("{name}: {warning}"))
    } else {
        limits::fault(&kernel.entry, &kernel.loops).map(|fault| format!("{name}: {fault}"))
    }
}

/// The tools that assemble, and the version of ptxas.
pub struct Tools {
    ptxas: PathBuf,
    nvdisasm: PathBuf,
    version: String,
}

impl Tools {
    /// Returns the version of ptxas.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Finds the tools, or fetches them.
    pub fn find() -> Outcome<Self> {
        let (ptxas, nvdisasm) = (tool("ptxas")?, tool("nvdisasm")?);
        let about = run(Command::new(&ptxas).arg("--version"))?;
        let version = about.split_whitespace().find_map(|word| word.strip_prefix('V'));
        let version = version.ok_or_else(|| format!("ptxas does not say its version:\n{about}"))?;
        Ok(Self {
            ptxas,
            nvdisasm,
            version: version.to_owned(),
        })
    }
}

/// Returns what ptxas said of a kernel and the listing of its machine code, from `target/sass` if it was assembled before.
fn assemble_once(tools: &Tools, text: &str, name: &str, target: &str) -> Outcome<(String, String)> {
    let folder = workspace().join("target/sass").join(target);
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let [source, cubin, log, code] =
        ["ptx", "cubin", "log", "sass"].map(|extension| folder.join(name).with_extension(extension));
    let first_line = format!("ptxas {}\n", tools.version);
    // The log is written last, so that a run that was cut short leaves none.
    if let (Ok(source), Ok(log), Ok(code)) = (read(&source), read(&log), read(&code))
        && source == text
        && log.starts_with(&first_line)
    {
        return Ok((log, code));
    }
    let _ = std::fs::remove_file(&log);
    let write = |path: &Path, text: &str| std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()));
    write(&source, text)?;
    let said = run(Command::new(&tools.ptxas)
        .args(["-v", "-arch", target])
        .arg(&source)
        .arg("-o")
        .arg(&cubin))?;
    let listed = run(Command::new(&tools.nvdisasm).args(["-c", "-hex"]).arg(&cubin))?;
    write(&code, &listed)?;
    write(&log, &(first_line + &said))?;
    Ok((said, listed))
}

/// Assembles the text of a kernel; `stem` names its files.
pub fn assemble(tools: &Tools, text: &str, entry: Row, target: &'static str, stem: &str) -> Outcome<Assembled> {
    let (log, code) = assemble_once(tools, text, stem, target)?;
    let listing = Listing::parse(&code)?;
    let number_before = |what: &str| -> Outcome<u32> {
        let end = log
            .find(what)
            .ok_or_else(|| format!("ptxas did not report '{what}' for {}:\n{log}", entry.name))?;
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
        tensor_instructions: listing.products(),
        loops: listing.tensor_loops(),
        warnings: log
            .lines()
            .filter(|line| line.contains("warning") || line.contains("Performance Loss"))
            .map(str::to_owned)
            .collect(),
    })
}

/// Runs a program to its end; returns its output from both streams.
fn run(command: &mut Command) -> Outcome<String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{command:?} failed ({}):\n{text}", output.status))
    }
}

/// Finds a tool of the CUDA toolkit: on PATH, in CUDA_HOME, or fetched once into `target/`.
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
        .args(["nvidia-cuda-nvcc==13.5.37", "nvidia-cuda-nvdisasm==13.5.37"]))
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
                // Python's zipfile does not restore the executable bit.
                make_executable(&path)?;
            }
        }
    }
    Ok(())
}
