//! The command line, parsed by hand: the library shares this package and should not depend on a parser.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

/// Printed by `--help`.
pub const HELP: &str = "\
Runs a PTX kernel on the CPU, checks every memory access, and counts instructions and bytes

Usage: ptx-emulator [OPTIONS] FILE [ARG]...

  FILE                    PTX text
  ARG                     kernel arguments, see below

Options:
  --entry NAME            kernel to run; may be left out if the file has one
  --grid SIZE             blocks: X, X,Y or X,Y,Z [default: 1]
  --block SIZE            threads of a block: X, X,Y or X,Y,Z [default: 1]
  --cluster SIZE          blocks of a cluster: X, X,Y or X,Y,Z [default: the kernel's required cluster, else 1]
  --smem BYTES            bytes of dynamic shared memory [default: 0]
  --stats [table|json]    print the counters [default: table]
  --no-check              turn off all checks
  --seed N                order of warps and landing of asynchronous work [default: 0]
  --max-instructions N    stop after this many thread instructions [default: 68719476736]
  --threads N             host threads [default: all cores]
  --max-findings N        findings to print; the others are counted [default: 20]
  -h, --help              print this text
  -V, --version           print the version

Arguments, one for each kernel parameter:
  i32:5 u32:5 i64:5 u64:5 f32:0.5 f64:0.5   a scalar
  null                                      a null pointer
  in:A.npy                                  A copied to device memory, its address passed
  out:B.npy                                 like in:, and written back to B.npy after the launch
  tma:in:A.npy:elem=f16,swizzle=3,dims=128x64,strides=256,box=64x64   (or tma:out:…)
                                            a tensor map over A, passed by value; dims and box innermost first,
                                            strides in bytes of the outer dims, swizzle as in CUtensorMapSwizzle

Example: y = 2 x + y on 1000 floats, under every check, with the counters:
  ptx-emulator saxpy.ptx --entry saxpy --grid 4 --block 256 in:x.npy out:y.npy f32:2 u32:1000 --stats

Exit status: 0 clean, 1 findings or a trap, 2 unusable arguments or PTX.
";

/// Output format of `--stats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatsFormat {
    Table,
    Json,
}

/// A launch described by the command line.
#[derive(Debug)]
pub struct Cli {
    pub file: PathBuf,
    pub entry: Option<String>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: Option<[u32; 3]>,
    pub smem: u32,
    pub stats: Option<StatsFormat>,
    pub no_check: bool,
    pub seed: u64,
    pub max_instructions: u64,
    pub threads: Option<usize>,
    pub max_findings: usize,
    pub arguments: Vec<String>,
}

/// A request made on the command line.
#[derive(Debug)]
pub enum Request {
    Help,
    Version,
    Launch(Box<Cli>),
}

/// Reads the words after the program's name. Options and arguments may be mixed. `--option=value` and `--option
/// value` are equivalent. After `--` every word is an argument.
///
/// # Errors
///
/// A sentence that quotes the word.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Request, String> {
    let mut words = words.into_iter().peekable();
    let mut file = None;
    let mut cli = Cli {
        file: PathBuf::new(),
        entry: None,
        grid: [1; 3],
        block: [1; 3],
        cluster: None,
        smem: 0,
        stats: None,
        no_check: false,
        seed: 0,
        max_instructions: 1 << 36,
        threads: None,
        max_findings: 20,
        arguments: Vec::new(),
    };
    let mut only_arguments = false;
    while let Some(word) = words.next() {
        if only_arguments || !word.starts_with('-') {
            match file {
                None => file = Some(PathBuf::from(word)),
                Some(_) => cli.arguments.push(word),
            }
            continue;
        }
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let takes_none = matches!(name, "--" | "-h" | "--help" | "-V" | "--version" | "--no-check");
        if takes_none && inline.is_some() {
            return Err(format!("{name} takes no value"));
        }
        // The format after `--stats` may be left out.
        if name == "--stats" {
            let format = inline.or_else(|| words.next_if(|next| next == "json" || next == "table"));
            cli.stats = Some(match format.as_deref() {
                None | Some("table") => StatsFormat::Table,
                Some("json") => StatsFormat::Json,
                Some(other) => return Err(format!("--stats is table or json, not `{other}`")),
            });
            continue;
        }
        let mut value = || {
            inline
                .clone()
                .or_else(|| words.next())
                .ok_or(format!("{name} needs a value"))
        };
        match name {
            "--" => only_arguments = true,
            "-h" | "--help" => return Ok(Request::Help),
            "-V" | "--version" => return Ok(Request::Version),
            "--no-check" => cli.no_check = true,
            "--entry" => cli.entry = Some(value()?),
            "--grid" => cli.grid = dimensions(name, &value()?)?,
            "--block" => cli.block = dimensions(name, &value()?)?,
            "--cluster" => cli.cluster = Some(dimensions(name, &value()?)?),
            "--smem" => cli.smem = number(name, &value()?)?,
            "--seed" => cli.seed = number(name, &value()?)?,
            "--max-instructions" => cli.max_instructions = number(name, &value()?)?,
            "--threads" => cli.threads = Some(number(name, &value()?)?),
            "--max-findings" => cli.max_findings = number(name, &value()?)?,
            _ => return Err(format!("unknown option `{name}`; --help lists the options")),
        }
    }
    match file {
        Some(file) => Ok(Request::Launch(Box::new(Cli { file, ..cli }))),
        None => Err("no PTX file is given; --help shows how to call the program".into()),
    }
}

fn number<T: FromStr>(option: &str, text: &str) -> Result<T, String>
where
    T::Err: Display,
{
    text.parse().map_err(|error| format!("{option} `{text}`: {error}"))
}

/// One to three sizes, separated by commas; those left out are 1.
fn dimensions(option: &str, text: &str) -> Result<[u32; 3], String> {
    let mut out = [1; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > 3 {
        return Err(format!("{option} `{text}`: at most three sizes"));
    }
    for (size, part) in out.iter_mut().zip(parts) {
        *size = number(option, part.trim())?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(line: &str) -> Result<Cli, String> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Request::Launch(cli) => Ok(*cli),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn options_and_arguments_may_be_mixed() {
        let cli =
            launch("a.ptx --grid 4,2 in:x.npy --block=256 f32:2 --stats u32:3 --seed 7 -- --stats").expect("a launch");
        assert_eq!((cli.grid, cli.block, cli.seed), ([4, 2, 1], [256, 1, 1], 7));
        assert_eq!(cli.arguments, ["in:x.npy", "f32:2", "u32:3", "--stats"]);
        assert_eq!(cli.stats, Some(StatsFormat::Table));
        assert_eq!(
            launch("--stats json a.ptx").expect("a launch").stats,
            Some(StatsFormat::Json)
        );
    }

    #[test]
    fn errors_name_the_word() {
        for (line, word) in [
            ("a.ptx --girth 4", "--girth"),
            ("a.ptx --grid 1,2,3,4", "1,2,3,4"),
            ("a.ptx --seed -1", "-1"),
            ("a.ptx --smem", "--smem"),
            ("a.ptx --no-check=1", "--no-check"),
            ("a.ptx --stats=xml", "xml"),
            ("--stats", "PTX file"),
        ] {
            let error = launch(line).expect_err(line);
            assert!(error.contains(word), "{error}");
        }
    }
}
