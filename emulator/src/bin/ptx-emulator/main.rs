//! `ptx-emulator`: runs one kernel of a PTX file on arrays from the command line.

mod argument;
mod npy;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use argument::Argument;
use clap::{Parser, ValueEnum};
use ptx_emulator::{Checks, DeviceMemory, Entry, Error, Launch, Module, Options, Report};

const EXAMPLE: &str = "\
Arguments, one for each kernel parameter:
  i32:5 u32:5 i64:5 u64:5 f32:0.5 f64:0.5   a scalar
  null                                      a null pointer
  in:A.npy                                  A copied to device memory, its address passed
  out:B.npy                                 the same, and written back to B.npy after the launch
  tma:in:A.npy:elem=f16,swizzle=3,dims=128x64,strides=256,box=64x64   (or tma:out:…)
                                            a tensor map over A, passed by value; dims and box innermost first,
                                            strides in bytes of the outer dims, swizzle as in CUtensorMapSwizzle

Example: y = 2 x + y on 1000 floats, under every check, with the counters:
  ptx-emulator saxpy.ptx --entry saxpy --grid 4 --block 256 in:x.npy out:y.npy f32:2 u32:1000 --stats

Exit status: 0 clean, 1 findings or a trap, 2 unusable arguments or PTX.";

/// Runs a PTX kernel on the CPU, checks every memory access and counts what it did
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLE)]
struct Cli {
    /// PTX text
    file: PathBuf,
    /// Kernel to run; may be left out if the file has one
    #[arg(long)]
    entry: Option<String>,
    /// Blocks: X, X,Y or X,Y,Z
    #[arg(long, default_value = "1", value_parser = dimensions)]
    grid: [u32; 3],
    /// Threads of a block: X, X,Y or X,Y,Z
    #[arg(long, default_value = "1", value_parser = dimensions)]
    block: [u32; 3],
    /// Blocks of a cluster: X, X,Y or X,Y,Z [default: what the kernel requires, else 1]
    #[arg(long, value_parser = dimensions)]
    cluster: Option<[u32; 3]>,
    /// Bytes of dynamic shared memory
    #[arg(long, default_value_t = 0)]
    smem: u32,
    /// Print the counters
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "table", require_equals = false)]
    stats: Option<StatsFormat>,
    /// Switch all checks off
    #[arg(long)]
    no_check: bool,
    /// Decides the order of warps and when asynchronous work lands
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Stop after so many thread instructions
    #[arg(long, default_value_t = 1 << 36)]
    max_instructions: u64,
    /// Host threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Findings to print; the others are counted
    #[arg(long, default_value_t = 20)]
    max_findings: usize,
    /// Kernel arguments, see below
    #[arg(value_name = "ARG", allow_hyphen_values = false)]
    arguments: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StatsFormat {
    Table,
    Json,
}

fn dimensions(text: &str) -> Result<[u32; 3], String> {
    let mut out = [1; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 3 {
        return Err("at most three sizes".into());
    }
    for (size, part) in out.iter_mut().zip(parts) {
        *size = part.trim().parse().map_err(|_| format!("`{part}` is not a size"))?;
    }
    Ok(out)
}

/// `--stats` takes its format as the next word only if that word is one.
fn words() -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut words = std::env::args().peekable();
    while let Some(word) = words.next() {
        if word == "--stats" {
            let format = words.next_if(|next| next == "json" || next == "table");
            out.push(format!("--stats={}", format.as_deref().unwrap_or("table")));
        } else {
            out.push(word);
        }
    }
    out
}

/// Why the program ends with status 2 (or 1, if the kernel is to blame).
struct Failure {
    status: u8,
    message: String,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Failure { status: 2, message }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kernels_fault = matches!(error, Error::Trap { .. } | Error::Fault { .. } | Error::Runaway { .. });
        Failure {
            status: if kernels_fault { 1 } else { 2 },
            message: error.to_string(),
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(words());
    match run(&cli) {
        Ok(report) => ExitCode::from(u8::from(!report.is_clean())),
        Err(failure) => {
            eprintln!("ptx-emulator: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn run(cli: &Cli) -> Result<Report, Failure> {
    let name = cli.file.display().to_string();
    let text = std::fs::read(&cli.file).map_err(|e| format!("cannot read {name}: {e}"))?;
    let text = String::from_utf8(text).map_err(|_| format!("{name} is not text"))?;
    let module = Module::parse(&text, &name)?;
    let entry = choose(&module, cli)?;
    let memory = DeviceMemory::new();
    let mut arguments = Vec::new();
    for text in &cli.arguments {
        arguments.push(Argument::parse(text, &memory)?);
    }
    let params = buffer(entry, &arguments)?;
    let launch = Launch {
        entry: &entry.name,
        grid: cli.grid,
        block: cli.block,
        cluster: cli.cluster.or(entry.required_cluster).unwrap_or([1; 3]),
        shared_bytes: cli.smem,
        params: &params,
    };
    let options = Options {
        seed: cli.seed,
        checks: if cli.no_check { Checks::none() } else { Checks::all() },
        max_instructions: Some(cli.max_instructions),
        threads: cli.threads,
        max_findings: cli.max_findings,
        ..Options::default()
    };
    let report = module.launch(&memory, &launch, &options)?;
    for argument in &arguments {
        argument.write_back(&memory)?;
    }
    print(cli, &report);
    Ok(report)
}

fn choose<'m>(module: &'m Module, cli: &Cli) -> Result<&'m Entry, Failure> {
    let names: Vec<&str> = module.entries().iter().map(|e| e.name.as_str()).collect();
    let name = match (&cli.entry, names.as_slice()) {
        (Some(name), _) => name.as_str(),
        (None, [only]) => only,
        (None, _) => {
            let message = format!("say which --entry: {} has {}", module.file(), names.join(", "));
            return Err(message.into());
        }
    };
    module
        .entry(name)
        .ok_or_else(|| format!("no entry `{name}` in {}; it has: {}", module.file(), names.join(", ")).into())
}

/// The parameter buffer.
fn buffer(entry: &Entry, arguments: &[Argument]) -> Result<Vec<u8>, Failure> {
    if arguments.len() != entry.params.len() {
        let message = format!(
            "`{}` takes {} arguments, {} were given",
            entry.name,
            entry.params.len(),
            arguments.len()
        );
        return Err(message.into());
    }
    let mut out = vec![0; entry.param_bytes as usize];
    for (parameter, argument) in entry.params.iter().zip(arguments) {
        let bytes = argument.bytes();
        if bytes.len() != parameter.size as usize {
            let message = format!(
                "argument `{}` is {} bytes, parameter `{}` of `{}` is {}",
                argument.text(),
                bytes.len(),
                parameter.name,
                entry.name,
                parameter.size
            );
            return Err(message.into());
        }
        out[parameter.offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    Ok(out)
}

fn print(cli: &Cli, report: &Report) {
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    let more = report.total_findings - report.findings.len() as u64;
    if report.total_findings > 0 {
        eprintln!("{} findings, {more} of them not shown", report.total_findings);
    }
    let text = match cli.stats {
        Some(StatsFormat::Table) => report.counters.to_string(),
        Some(StatsFormat::Json) => {
            let json = report.counters.to_json();
            // The findings' number belongs to the document a script reads.
            let rest = json.trim_start_matches("{\n");
            format!("{{\n  \"findings\": {},\n{rest}\n", report.total_findings)
        }
        None => return,
    };
    // Whoever closed the pipe has read what it wanted.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
