//! `ptx-emulator`: runs one kernel of a PTX file on arrays from the command line.

mod argument;
mod cli;
mod npy;

use std::io::Write;
use std::process::ExitCode;

use argument::Argument;
use cli::{Cli, Request, StatsFormat};
use ptx_emulator::{Checks, DeviceMemory, Entry, Error, Launch, Module, Options, Report};

/// The reason why the program ends with status 2, or with status 1 if the kernel failed.
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
    let outcome = match cli::parse(std::env::args().skip(1)) {
        Ok(Request::Help) => {
            print(cli::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Request::Version) => {
            print(concat!("ptx-emulator ", env!("CARGO_PKG_VERSION"), "\n"));
            return ExitCode::SUCCESS;
        }
        Ok(Request::Launch(cli)) => run(&cli),
        Err(message) => Err(message.into()),
    };
    match outcome {
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
    print_report(cli, &report);
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

/// Builds the parameter buffer.
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

fn print_report(cli: &Cli, report: &Report) {
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
            // A script that reads the document needs the number of findings in it.
            let rest = json.trim_start_matches("{\n");
            format!("{{\n  \"findings\": {},\n{rest}\n", report.total_findings)
        }
        None => return,
    };
    print(&text);
}

/// Prints to the standard output. A closed pipe is no error: its reader has read what it needed.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
