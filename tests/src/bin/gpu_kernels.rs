//! Tests of kernels on a GPU beside the library's suite. `gpu_kernels compile [PART/PARTS]` compiles every kernel of
//! the table with the driver. `gpu_kernels micro [FOLDER]` runs the micro-kernels of `tests/ptx` and compares their
//! results with the expected ones.
//!
//! A micro-kernel may hang or fail, and a failure leaves a context that refuses all later calls. So the micro-kernels
//! run in a process of their own, and after a failure a new process continues.

use std::io::{BufRead as _, BufReader, Write as _, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use flash_attention_kernels::entries::{ENTRIES, FP8_ENTRIES};
use flash_attention_tests::files::workspace;
use flash_attention_tests::gpu::{Gpu, loads, loads_arch};
use flash_attention_tests::micro::Micro;

const USAGE: &str = "\
Usage: gpu_kernels compile [PART/PARTS]   have the driver compile every kernel, or the PART-th of PARTS shares (from 0)
       gpu_kernels micro [FOLDER]         run the micro-kernels of tests/ptx, or of FOLDER";

/// Longest time of one micro-kernel, including the driver's start and its compiler.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ptx = || workspace().join("tests/ptx");
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["compile"] => compile(0, 1),
        ["compile", share] => match share.split_once('/').map(|(i, n)| (i.parse(), n.parse())) {
            Some((Ok(part), Ok(parts))) if part < parts => compile(part, parts),
            _ => Err(USAGE.to_owned()),
        },
        ["micro"] => micro(&ptx()),
        ["micro", folder] => micro(Path::new(folder)),
        ["micro-from", folder, first] => run_from(Path::new(folder), first.parse().unwrap_or(0)),
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

/// Compiles a share of the kernels with the driver. The driver caches them, so a suite that follows starts sooner.
fn compile(part: usize, parts: usize) -> Result<(), String> {
    let gpu = Gpu::open(0)?;
    let (mut compiled, mut left, mut failures, start) = (0, 0, Vec::new(), Instant::now());
    let mut slowest = (Duration::ZERO, "");
    for entry in ENTRIES.iter().chain(FP8_ENTRIES).skip(part).step_by(parts) {
        if !loads_arch(entry.arch, gpu.capability) {
            left += 1;
            continue;
        }
        let start = Instant::now();
        match gpu.compile(entry) {
            Err(error) => failures.push(format!("{}: {error}", entry.name)),
            Ok(made) if made.local_bytes > 0 || made.max_threads < entry.threads as i32 => {
                failures.push(format!(
                    "{}: {made:?}, and it has {} threads",
                    entry.name, entry.threads
                ));
            }
            Ok(_) => compiled += 1,
        }
        slowest = slowest.max((start.elapsed(), entry.name));
    }
    println!(
        "{}: {compiled} kernels compiled in {:.1} s ({}: {:.1} s), {} failed, {left} are for other cards",
        gpu.name,
        start.elapsed().as_secs_f64(),
        slowest.1,
        slowest.0.as_secs_f64(),
        failures.len()
    );
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("\n"))
    }
}

/// Runs every micro-kernel that the GPU can load and prints the result of each.
fn micro(folder: &Path) -> Result<(), String> {
    let micros = Micro::read_folder(folder)?;
    let gpu = Gpu::open(0)?;
    println!(
        "{}, compute capability {}.{}, driver for CUDA {}.{}",
        gpu.name, gpu.capability.0, gpu.capability.1, gpu.driver.0, gpu.driver.1
    );
    let program = std::env::current_exe().map_err(|e| format!("this program's path: {e}"))?;
    let folder = PathBuf::from(folder);
    let names: Vec<&str> = micros.iter().map(|micro| micro.name.as_str()).collect();
    let results = supervise(&names, PATIENCE, |first| {
        let mut command = Command::new(&program);
        command.arg("micro-from").arg(&folder).arg(first.to_string());
        command
    });
    let count = |start: &str| results.iter().filter(|result| result.starts_with(start)).count();
    let (passed, left) = (count("ok"), count("not run"));
    println!(
        "{passed} of {} kernels gave the expected words, {left} did not run",
        names.len()
    );
    if passed + left == names.len() && passed > 0 {
        Ok(())
    } else {
        Err(format!("{} kernels failed", names.len() - passed - left))
    }
}

/// Collects a result for every name from processes that print one line `NAME: RESULT` each, in order, from a given
/// first name on. A process that ends or prints nothing for too long has failed at the next name.
fn supervise(names: &[&str], patience: Duration, command: impl Fn(usize) -> Command) -> Vec<String> {
    let mut results: Vec<String> = Vec::new();
    while results.len() < names.len() {
        let (mut child, lines) = match start(command(results.len())) {
            Ok(started) => started,
            Err(error) => return names.iter().map(|_| format!("FAILED: {error}")).collect(),
        };
        let first = results.len();
        let failure = loop {
            let Some(name) = names.get(results.len()) else {
                break None;
            };
            match lines.recv_timeout(patience) {
                Ok(line) => {
                    let result = line.strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
                    let result = result.map_or_else(|| format!("FAILED: it printed `{line}`"), str::to_owned);
                    println!("{name}: {result}");
                    results.push(result);
                }
                Err(RecvTimeoutError::Timeout) => break Some(format!("FAILED: silent for {patience:?}, stopped")),
                // A process that has reported a result may end because of it; the next process continues after that
                // name.
                Err(RecvTimeoutError::Disconnected) if results.len() > first => break None,
                Err(RecvTimeoutError::Disconnected) => break Some("FAILED: its process ended".to_owned()),
            }
        };
        let _ = child.kill();
        let _ = child.wait();
        if let Some(failure) = failure {
            println!("{}: {failure}", names[results.len()]);
            results.push(failure);
        }
    }
    results
}

/// Starts a process; returns it and a receiver of the lines it prints.
fn start(mut command: Command) -> Result<(Child, Receiver<String>), String> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{command:?}: {e}"))?;
    let output = child.stdout.take().ok_or("no output")?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        for line in lines {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Ok((child, receiver))
}

/// Runs the micro-kernels from number `first` on, with one line each, up to the first failure after which the context
/// is unusable.
fn run_from(folder: &Path, first: usize) -> Result<(), String> {
    let micros = Micro::read_folder(folder)?;
    let gpu = Gpu::open(0)?;
    for micro in micros.iter().skip(first) {
        let mut broken = false;
        let result = if !loads(&micro.target, gpu.capability) {
            let (major, minor) = gpu.capability;
            format!("not run, for {}, and the card is {major}.{minor}", micro.target)
        } else {
            match gpu.run(micro) {
                Err(error) => {
                    broken = true;
                    format!("FAILED: {}", error.replace('\n', " "))
                }
                Ok(got) => match micro.compare(&got) {
                    Ok(0) => "ok".to_owned(),
                    Ok(near) => format!("ok, {near} words not equal but as near as the PTX manual promises"),
                    Err(error) => format!("FAILED: {error}"),
                },
            }
        };
        println!("{}: {result}", micro.name);
        stdout().flush().map_err(|e| e.to_string())?;
        if broken {
            return Err(format!("{} failed; the rest runs in another process", micro.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that reports a and ends, fails at b, hangs at d and does the rest.
    fn script(first: usize) -> Command {
        let rest = [
            "echo a: ok",
            "exit 1",
            "echo c: ok",
            "sleep 60",
            "echo e: not run",
            "echo f: ok",
        ][first..]
            .join("; ");
        let mut command = Command::new("sh");
        command.arg("-c").arg(rest);
        command
    }

    #[test]
    fn one_that_fails_or_hangs_does_not_stop_the_rest() {
        let results = supervise(&["a", "b", "c", "d", "e", "f"], Duration::from_millis(500), script);
        let starts = [
            "ok",
            "FAILED: its process ended",
            "ok",
            "FAILED: silent",
            "not run",
            "ok",
        ];
        assert_eq!(results.len(), starts.len());
        for (result, start) in results.iter().zip(starts) {
            assert!(result.starts_with(start), "{results:?}");
        }
    }

    #[test]
    fn a_line_of_something_else_is_a_failure() {
        let results = supervise(&["x"], Duration::from_secs(5), script);
        assert!(results[0].starts_with("FAILED: it printed `a: ok`"), "{results:?}");
    }
}
