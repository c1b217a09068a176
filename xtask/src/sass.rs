//! `cargo xtask sass`: what ptxas makes of the kernels. It needs no GPU.
//!
//! A spill, a stack frame or a warning is a failure: each means that a tile no longer fits the registers it was planned
//! for. So is, on Hopper, a main loop with other products than its tiles ask for, or with more instructions beside them than
//! [`most_others`] allows.

use crate::ptx::Committed;
use crate::table::{Row, tables};
use crate::{Outcome, make_executable, workspace};
use flash_attention_kernels::entries::{Arch, Pass};
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
    entry: Row,
    target: &'static str,
    registers: u32,
    spilled: u32,
    stack: u32,
    tensor_instructions: usize,
    /// The innermost loops that multiply on the tensor cores, leanest first.
    loops: Vec<Loop>,
    warnings: Vec<String>,
}

/// Assembles the kernels with `part` in their name, prints the table, and writes it to `output` if there is one.
pub fn report(part: &str, output: Option<&Path>) -> Outcome {
    let ptxas = tool("ptxas")?;
    let nvdisasm = tool("nvdisasm")?;
    let (mut assembled, mut kernels) = (Vec::new(), 0);
    for table in tables() {
        let committed = table.committed()?;
        let work: Vec<_> = (table.rows.iter())
            .filter(|row| row.name.contains(part))
            .flat_map(|row| targets(row.arch).iter().map(move |&target| (*row, target)))
            .collect();
        kernels += work.len() / targets(table.arch).len();
        let outcomes = work
            .into_par_iter()
            .map(|(row, target)| assemble(&ptxas, &nvdisasm, &committed, row, target));
        assembled.extend(outcomes.collect::<Outcome<Vec<_>>>()?);
    }
    let table = table(&assembled);
    print!("{table}");
    if let Some(path) = output {
        std::fs::write(path, &table).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let faults: Vec<_> = assembled.iter().filter_map(fault).collect();
    if faults.is_empty() {
        println!(
            "{} kernels, {} assemblies: no warning, no stack or spill but in {} assemblies that are listed; main loops on Hopper \
             as computed from the tiles",
            kernels,
            assembled.len(),
            assembled.iter().filter(|kernel| kernel.spilled > 0).count()
        );
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

/// Kernels that may spill: name, target, and the most bytes.
///
/// Registers ran out where partly hidden tiles are cleaned of NaN and infinity, and in f32 backward, which reads two statistics a
/// query. At head_dim 64 and 96 a value is stored once before the main loop and loaded once after it. At 192 and 256 it was not
/// found yet how to do without; `hopper_forward_*_d256_causal` loads a descriptor again in every step.
const SPILLS: &[(&str, &str, u32)] = &[
    ("backward_queries_f32_d64", "sm_90", 8),
    ("backward_queries_f32_d64_causal", "sm_80", 12),
    ("backward_keys_f16_d96_causal", "sm_90", 8),
    ("backward_keys_bf16_d96_causal", "sm_90", 8),
    ("backward_keys_f16_d192_causal", "sm_90", 48),
    ("backward_keys_bf16_d192_causal", "sm_90", 48),
    ("hopper_forward_f16_d256_causal", "sm_90a", 32),
    ("hopper_forward_bf16_d256_causal", "sm_90a", 32),
    ("hopper_backward_all_f16_d64_causal", "sm_90a", 8),
    ("hopper_backward_all_bf16_d64_causal", "sm_90a", 8),
];

/// Bytes that a kernel may spill on a target.
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
    } else if kernel.entry.arch == Arch::Sm90a {
        let fault = main_loop_fault(
            &kernel.loops,
            &products_of_step(&kernel.entry),
            most_others(&kernel.entry),
        );
        fault.map(|fault| format!("{name}: {fault}"))
    } else {
        None
    }
}

/// Tensor instructions that one warpgroup's step through the main loop takes, computed from the tiles: products of 64 rows,
/// 16 deep. One number for each walk of the kernel; none if it does not multiply.
///
/// ptxas 13 neither rotates nor unrolls these loops, so each is found in the code as one loop with exactly its step.
fn products_of_step(entry: &Row) -> Vec<u32> {
    let (head_dim, queries, keys) = (entry.head_dim / 16, entry.block_m / 16, entry.block_n / 16);
    match entry.pass {
        // Q K^T along head_dim, P V along keys.
        Some(Pass::Forward) => vec![head_dim + keys],
        // Q K^T, dO V^T; dS K.
        Some(Pass::BackwardQueries) => vec![2 * head_dim + keys],
        // K Q^T, V dO^T, dS^T Q; then K Q^T again, P^T dO.
        Some(Pass::BackwardKeys) => vec![2 * head_dim + queries, head_dim + queries],
        // K Q^T, V dO^T; P^T dO, dS^T Q; a square of dS K along all keys.
        Some(Pass::BackwardAll) => vec![2 * head_dim + 2 * queries + keys],
        _ => vec![],
    }
}

/// The most instructions beside each tensor instruction that the main loop of a kernel for Hopper may have: what it has
/// with ptxas 13, the causal kernel where that has more, and some 5 % for another version.
///
/// What it must have sets the aim. Of 64 x 128 scores at head_dim 128 a forward step's warp holds 64 a lane, so 64 each of
/// maximum, multiply-add, exponential and sum, 32 conversions of pairs, and 64 multiplications that rescale the output: 352
/// for 16 products, 22 each. Ours has 28.8, 31 % more: some 65 instructions on uniform registers, which make descriptors of
/// tiles, then barriers and waits. At head_dim 64 it is 320 for 12, 26.7 each, and ours has 34.5, 29 % more.
/// FlashAttention-3 does the same arithmetic; what it has beside that was not counted.
fn most_others(entry: &Row) -> f64 {
    match (entry.pass, entry.head_dim) {
        (Some(Pass::Forward), 64) => 36.5,
        (Some(Pass::Forward), 96) => 34.0,
        (Some(Pass::Forward), 128) => 30.5,
        (Some(Pass::Forward), 192) => 26.0,
        (Some(Pass::Forward), 256) => 22.5,
        (Some(Pass::BackwardQueries), 192) => 10.5,
        (Some(Pass::BackwardQueries), 256) => 8.5,
        (Some(Pass::BackwardKeys), 192) => 15.5,
        (Some(Pass::BackwardKeys), 256) => 11.5,
        (Some(Pass::BackwardAll), 64) => 19.5,
        (Some(Pass::BackwardAll), 96) => 14.5,
        (Some(Pass::BackwardAll), 128) => 13.0,
        // A tile without a limit must get one; what does not multiply needs none.
        _ => 0.0,
    }
}

/// What is wrong with the loops of a kernel whose walks take `steps` products each, and `most_others` beside one.
fn main_loop_fault(loops: &[Loop], steps: &[u32], most_others: f64) -> Option<String> {
    if let Some(step) = steps
        .iter()
        .find(|&&step| loops.iter().all(|found| found.tensor != step))
    {
        return Some(format!(
            "no loop holds the {step} tensor instructions of a step, but {loops:?}"
        ));
    }
    let leanest = loops.first()?;
    if !steps.contains(&leanest.tensor) {
        return Some(format!(
            "the main loop has {} tensor instructions, not {steps:?}",
            leanest.tensor
        ));
    }
    let ratio = leanest.ratio();
    (ratio > most_others).then(|| format!("{ratio:.1} other instructions a tensor instruction, {most_others} allowed"))
}

/// The instructions of a loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loop {
    tensor: u32,
    others: u32,
}

impl Loop {
    /// Other instructions for each tensor instruction.
    fn ratio(self) -> f64 {
        f64::from(self.others) / f64::from(self.tensor)
    }
}

fn assemble(
    ptxas: &Path,
    nvdisasm: &Path,
    committed: &Committed,
    entry: Row,
    target: &'static str,
) -> Outcome<Assembled> {
    let folder = workspace().join("target/sass").join(target);
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let source = folder.join(entry.name).with_extension("ptx");
    std::fs::write(&source, committed.text(entry.name)?).map_err(|e| format!("{}: {e}", source.display()))?;
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
        loops: tensor_loops(&code),
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

/// The innermost loops that have tensor instructions, leanest first: the first is the loop over tiles that need no mask.
///
/// A loop is what lies between a label and a branch back to it. Where ptxas moves the rare part of a wait behind the end of
/// the kernel, its way back is such a branch too, and spans far more than the loop: never the leanest.
fn tensor_loops(code: &str) -> Vec<Loop> {
    let lines: Vec<&str> = code.lines().collect();
    let label = |line: &str| line.starts_with(".L_x_").then(|| line.trim_end_matches(':').to_owned());
    let labels: HashMap<String, usize> = (lines.iter().enumerate())
        .filter_map(|(at, line)| Some((label(line)?, at)))
        .collect();
    let mut loops: Vec<Range<usize>> = Vec::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains(" BRA ")) {
        if let Some(start) = branch_target(line, &labels).filter(|&start| start < at) {
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
    let mut found: Vec<Loop> = innermost
        .filter_map(|body| leanest_path(&lines, body.clone(), &labels))
        .collect();
    found.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
    found
}

/// The instructions of the leanest way through a loop that meets as many products as any: what a step costs that needs no mask
/// and holds no exceptional number. What a branch forward leaves out is left out here too.
fn leanest_path(lines: &[&str], body: Range<usize>, labels: &HashMap<String, usize>) -> Option<Loop> {
    let better = |a: Loop, b: Loop| {
        if (a.tensor, b.others) >= (b.tensor, a.others) {
            a
        } else {
            b
        }
    };
    // From each line to the branch back, last line first.
    let mut ways: Vec<Option<Loop>> = vec![None; body.len() + 1];
    ways[body.len()] = Some(Loop { tensor: 0, others: 1 });
    for at in body.clone().rev() {
        let line = lines[at];
        let is_conditional = line.contains(" @");
        let next = ways[at + 1 - body.start];
        let jump = branch_target(line, labels)
            .filter(|target| (at + 1..=body.end).contains(target))
            .and_then(|target| ways[target - body.start]);
        let way = match line.contains(" BRA ") {
            true if is_conditional => next.into_iter().chain(jump).reduce(better),
            true => jump,
            false => next,
        };
        let is_instruction = line.trim_end().ends_with(';');
        ways[at - body.start] = way.map(|way| Loop {
            tensor: way.tensor + u32::from(is_instruction && is_tensor(line)),
            others: way.others + u32::from(is_instruction && !is_tensor(line)),
        });
    }
    ways[0]
}

/// The line that a branch goes to.
fn branch_target(line: &str, labels: &HashMap<String, usize>) -> Option<usize> {
    let name = line.split('`').nth(1)?.strip_prefix('(')?.split(')').next()?;
    labels.get(name).copied()
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
            loops,
            ..
        } = kernel;
        let main_loop = loops.first();
        let others = main_loop.map_or_else(|| "-".to_owned(), |found| format!("{:.1}", found.ratio()));
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
                // Python's zipfile drops the bit that says so.
                make_executable(&path)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop of two products and three others, in one of three products and more, and a branch forward.
    const CODE: &str = "
\t.section\t.text.kernel
.L_x_0:
        /*0000*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], !UPT ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32 R24, R4, gdesc[UR8], R24 ;
                                                                                  /* 0x00000000000079f0 */
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/                   MUFU.EX2 R1, R1 ;
        /*0050*/                   HGMMA.64x128x16.F32 R24, R8, gdesc[UR8], R24 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   FADD R1, R1, R2 ;
.L_x_3:
        /*0080*/                   NOP ;
        /*0090*/               @P2 BRA `(.L_x_3) ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
";

    #[test]
    fn innermost_loops_with_products_are_counted() {
        // The branch back is past the end of its loop, as it was when the ratio was first counted.
        assert_eq!(tensor_loops(CODE), [Loop { tensor: 2, others: 3 }]);
        assert_eq!(tensor_loops("no code"), []);
    }

    #[test]
    fn loops_are_held_to_their_tiles_and_limits() {
        let [lean, fat] = [(16, 400), (16, 800)].map(|(tensor, others)| Loop { tensor, others });
        assert_eq!(main_loop_fault(&[lean, fat], &[16], 25.0), None);
        let fault = |loops: &[Loop], steps: &[u32], most| main_loop_fault(loops, steps, most).expect("a fault");
        assert!(fault(&[lean], &[16], 24.9).contains("25.0 other"));
        assert!(fault(&[lean], &[17], 25.0).contains("no loop holds the 17"));
        assert!(
            fault(&[lean], &[16, 28], 25.0).contains("no loop holds the 28"),
            "both walks are there"
        );
        let other = Loop { tensor: 8, others: 8 };
        assert!(fault(&[other, lean], &[16], 25.0).contains("has 8 tensor"));
        assert!(
            fault(&[], &[16], 25.0).contains("no loop"),
            "nor does an empty kernel pass"
        );
        assert_eq!(main_loop_fault(&[], &[], 0.0), None);
    }

    #[test]
    fn products_follow_from_tiles() {
        let steps = |name: &str| {
            let rows: Vec<_> = tables().into_iter().flat_map(|table| table.rows).collect();
            let row = rows.into_iter().find(|row| row.name == name);
            let row = Row {
                head_dim: 64,
                block_m: 64,
                block_n: 128,
                ..row.expect("in a table")
            };
            (products_of_step(&row), products_of_step(&Row { head_dim: 128, ..row }))
        };
        assert_eq!(steps("hopper_forward_f16_d64"), (vec![12], vec![16]));
        assert_eq!(steps("hopper_backward_queries_f16_d256"), (vec![16], vec![24]));
        assert_eq!(steps("hopper_backward_keys_f16_d256"), (vec![12, 8], vec![20, 12]));
        assert_eq!(steps("hopper_backward_all_f16_d64"), (vec![24], vec![32]));
    }
}
