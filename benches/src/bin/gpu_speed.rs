//! The table of speed: forward, backward and deterministic backward on a GPU, in TFLOP/s, as lines of JSON.
//!
//! All rows have the same number of tokens and of hidden elements, as in FlashAttention's own tables. A time is the
//! median of runs timed by device events. Runs are launched without waiting, on inputs that take turns and together
//! exceed L2. Results are written to existing memory, so their allocation is not timed. The scratch memory of a
//! backward pass comes from a pool and is included. After each row a few rows of its result are compared with f64; a
//! wrong one is an error.
//!
//! With `--serve` it reads rows `PASS DTYPE MASK HEAD_DIM SEQLEN` from its input and answers each, so that another
//! program can alternate its own runs with them. On other devices than GPUs, which are for testing this program,
//! times are those of the host and no TFLOP/s are printed.

use std::io::{BufRead as _, Write as _, stdin, stdout};
use std::time::Instant;

use benches::Failure;
use benches::arena::Arena;
use benches::clock::{Card, Clock};
use benches::row::{Pass, Row, Sizes, parse_dtype, parse_mask};
use benches::spot;
use clap::Parser;
use flash_attention::half::{bf16, f16};
use flash_attention::{Arch, Attention, Device, Dtype, Element};

/// Speed assumed for the estimate of the run time, in TFLOP/s.
const ASSUMED_TFLOPS: f64 = 300.0;

/// Least time that the device warms up before a row, in seconds: clocks rise slowly from idle.
const WARM_UP_SECONDS: f64 = 0.02;

/// Size of the copy that measures the memory bandwidth, in bytes.
const COPY_BYTES: usize = 4 << 30;

/// The table of speed on a GPU, as lines of JSON
#[derive(Parser)]
struct Options {
    /// Device: cuda, cuda:N; or cpu, emulator:sm_90a to test this program
    #[arg(long, default_value = "cuda")]
    device: Device,
    /// Passes to time: fwd, bwd, bwd-det
    #[arg(long, value_delimiter = ',', default_value = "fwd,bwd,bwd-det")]
    passes: Vec<Pass>,
    /// f16, bf16
    #[arg(long, value_delimiter = ',', default_value = "bf16,f16", value_parser = parse_dtype)]
    dtypes: Vec<Dtype>,
    /// Elements of a head
    #[arg(long, value_delimiter = ',', default_value = "64,128,256")]
    head_dims: Vec<usize>,
    /// full, causal
    #[arg(long, value_delimiter = ',', default_value = "full,causal", value_parser = parse_mask)]
    masks: Vec<bool>,
    /// Lengths of the sequences
    #[arg(long, value_delimiter = ',', default_value = "512,1024,2048,4096,8192,16384")]
    seqlens: Vec<usize>,
    /// Also a sequence of this length, in bf16 with the head_dim in the middle; 0 for none
    #[arg(long, default_value_t = 65_536)]
    once: usize,
    /// Number of tokens of all sequences of a row together
    #[arg(long, default_value_t = 16_384)]
    tokens: usize,
    /// Number of elements of all heads together
    #[arg(long, default_value_t = 2_048)]
    hidden: usize,
    /// Number of timed runs per row
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// Use only kernels of this architecture: sm_80 for the portable ones
    #[arg(long, value_parser = parse_arch)]
    arch: Option<Arch>,
    /// Answer rows from the input instead of running the table
    #[arg(long)]
    serve: bool,
}

fn parse_arch(text: &str) -> Result<Arch, String> {
    let arch = Arch::ALL.iter().find(|arch| arch.name() == text);
    arch.copied().ok_or_else(|| format!("no arch `{text}`: sm_80, sm_90a"))
}

fn main() -> Result<(), Failure> {
    let options = Options::parse();
    let mut bench = Bench::new(&options)?;
    if options.serve {
        for line in stdin().lock().lines() {
            let line = line?;
            let answer = match line.parse::<Row>().and_then(|row| bench.measure(&row)) {
                Ok(answer) => answer,
                Err(error) => format!(
                    r#"{{"kind": "error", "row": {line:?}, "message": {:?}}}"#,
                    error.to_string()
                ),
            };
            say(&answer)?;
        }
        return Ok(());
    }
    let rows = rows(&options);
    eprintln!("{}", estimate(&rows, &options));
    let mut wrong = 0;
    for row in &rows {
        match bench.measure(row) {
            Ok(answer) => say(&answer)?,
            Err(error) => {
                wrong += 1;
                say(&format!(
                    r#"{{"kind": "error", "row": "{row}", "message": {:?}}}"#,
                    error.to_string()
                ))?;
            }
        }
    }
    if wrong > 0 {
        return Err(format!("{wrong} of {} rows failed", rows.len()).into());
    }
    Ok(())
}

fn say(line: &str) -> Result<(), Failure> {
    println!("{line}");
    Ok(stdout().flush()?)
}

/// Returns all rows of the table, grouped by dtype.
fn rows(options: &Options) -> Vec<Row> {
    let mut rows = Vec::new();
    for &dtype in &options.dtypes {
        for &head_dim in &options.head_dims {
            for &causal in &options.masks {
                let once = dtype == Dtype::Bf16 && head_dim == options.head_dims[options.head_dims.len() / 2];
                let long = (once && options.once > 0).then_some(options.once);
                for seqlen in options.seqlens.iter().copied().chain(long) {
                    rows.extend(options.passes.iter().map(|&pass| Row {
                        pass,
                        dtype,
                        causal,
                        head_dim,
                        seqlen,
                    }));
                }
            }
        }
    }
    rows
}

/// Estimates the time of the table at the assumed speed.
fn estimate(rows: &[Row], options: &Options) -> String {
    let sizes = options.sizes();
    let seconds = rows.iter().map(|row| {
        let once = row.flops(&sizes) / (ASSUMED_TFLOPS * 1e12);
        let forward = if row.pass == Pass::Forward { 0.0 } else { once };
        once * (options.runs + warm_up(once)) as f64 + forward + 0.1
    });
    format!(
        "{} rows; about {:.0} s if the device does {ASSUMED_TFLOPS} TFLOP/s",
        rows.len(),
        seconds.sum::<f64>() + 5.0
    )
}

/// Returns the number of warm-up runs of a call that takes about `seconds`.
fn warm_up(seconds: f64) -> usize {
    3 + (WARM_UP_SECONDS / seconds).min(50.0) as usize
}

impl Options {
    fn sizes(&self) -> Sizes {
        Sizes {
            tokens: self.tokens,
            hidden: self.hidden,
        }
    }
}

/// State kept between rows: the device, its clock, and the memory of the last dtype.
struct Bench {
    device: Device,
    clock: Clock,
    sizes: Sizes,
    attention: Attention,
    runs: usize,
    /// Least size of all input sets together, in bytes.
    rotate_bytes: usize,
    halves: Option<Arena<f16>>,
    brains: Option<Arena<bf16>>,
}

impl Bench {
    fn new(options: &Options) -> Result<Self, Failure> {
        if options.runs == 0 || options.tokens == 0 || options.hidden == 0 {
            return Err("--runs, --tokens and --hidden must be above 0".into());
        }
        let device = options.device.clone();
        let mut clock = Clock::new(&device)?;
        let card = Card::of(&device)?;
        let (l2_bytes, driver) = card.as_ref().map_or((0, String::new()), |card| {
            (card.l2_bytes, format!("{}.{}", card.driver.0, card.driver.1))
        });
        let copy_bytes = card.as_ref().map_or(0, |card| COPY_BYTES.min(card.free_bytes / 4));
        let copy = clock.time_copies(copy_bytes, 3, options.runs)?;
        let copied = copy.map_or_else(
            || "null".to_owned(),
            |seconds| format!("{:.3}", 2.0 * copy_bytes as f64 / median(seconds) / 1e12),
        );
        say(&format!(
            r#"{{"kind": "header", "device": {:?}, "name": {:?}, "clock": "{}", "l2_bytes": {l2_bytes}, "driver_cuda": "{driver}", "tokens": {}, "hidden": {}, "runs": {}, "arch": "{}", "copy_bytes": {copy_bytes}, "copy_tb_per_s": {copied}}}"#,
            device.to_string(),
            device.name(),
            clock.name(),
            options.tokens,
            options.hidden,
            options.runs,
            options.arch.map_or("best", Arch::name),
        ))?;
        Ok(Self {
            device,
            clock,
            sizes: options.sizes(),
            attention: options
                .arch
                .map_or_else(Attention::new, |arch| Attention::new().arch(arch)),
            runs: options.runs,
            rotate_bytes: 2 * l2_bytes,
            halves: None,
            brains: None,
        })
    }

    /// Times a row; returns its line of JSON.
    fn measure(&mut self, row: &Row) -> Result<String, Failure> {
        let shape = row.shape(&self.sizes);
        match row.dtype {
            Dtype::F16 => {
                self.brains = None;
                let arena = self.halves.take().filter(|arena| arena.holds(shape));
                let mut arena = arena.map_or_else(|| self.arena(shape), Ok)?;
                let answer = self.measure_in(&mut arena, row);
                self.halves = Some(arena);
                answer
            }
            _ => {
                self.halves = None;
                let arena = self.brains.take().filter(|arena| arena.holds(shape));
                let mut arena = arena.map_or_else(|| self.arena(shape), Ok)?;
                let answer = self.measure_in(&mut arena, row);
                self.brains = Some(arena);
                answer
            }
        }
    }

    /// Makes memory for a row of this shape and all others of the usual size.
    fn arena<T: Element>(&self, shape: [usize; 4]) -> Result<Arena<T>, Failure> {
        let elements = (self.sizes.tokens * self.sizes.hidden).max(shape.iter().product());
        Ok(Arena::new(&self.device, elements, self.rotate_bytes)?)
    }

    fn measure_in<T: Element>(&mut self, arena: &mut Arena<T>, row: &Row) -> Result<String, Failure> {
        let start = Instant::now();
        let shape = row.shape(&self.sizes);
        let mut bound = arena.bind(row, shape, self.attention.clone())?;
        let kernels = bound.kernels()?;
        let flops = row.flops(&self.sizes);
        let on_gpu = self.device.cuda_stream().is_some();
        let warm_up = if on_gpu {
            warm_up(flops / (ASSUMED_TFLOPS * 1e12))
        } else {
            1
        };
        let seconds = self.clock.time(warm_up, self.runs, |turn| bound.run(turn))?;
        let error = spot::error(&bound, row, warm_up + self.runs - 1)?;
        if error > spot::ALLOWED {
            return Err(format!("the result is wrong, by {error:.3} of the size of its rows").into());
        }
        let (least, most) = (
            seconds.iter().copied().fold(f64::INFINITY, f64::min),
            seconds.iter().copied().fold(0.0, f64::max),
        );
        let middle = median(seconds);
        let tflops = if on_gpu {
            format!("{:.2}", flops / middle / 1e12)
        } else {
            "null".to_owned()
        };
        Ok(format!(
            r#"{{"kind": "row", "pass": "{}", "dtype": "{}", "mask": "{}", "head_dim": {}, "seqlen": {}, "batch": {}, "heads": {}, "kernels": "{}", "clock": "{}", "runs": {}, "flops": {flops:.0}, "median_s": {middle:.9}, "min_s": {least:.9}, "max_s": {most:.9}, "tflops": {tflops}, "error": {error:.5}, "wall_s": {:.3}}}"#,
            row.pass.name(),
            row.dtype.name(),
            row.mask(),
            row.head_dim,
            row.seqlen,
            shape[0],
            shape[1],
            kernels.join("+"),
            self.clock.name(),
            self.runs,
            start.elapsed().as_secs_f64(),
        ))
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    if seconds.len() % 2 == 1 {
        seconds[middle]
    } else {
        0.5 * (seconds[middle - 1] + seconds[middle])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str], rows: &[&str]) -> Vec<String> {
        let program = ["gpu_speed", "--tokens", "40", "--hidden", "32", "--runs", "2"];
        let options = Options::parse_from(program.iter().chain(arguments));
        let mut bench = Bench::new(&options).expect("a device");
        rows.iter()
            .map(|row| bench.measure(&row.parse().expect("a row")).expect("it runs"))
            .collect()
    }

    /// Runs the program on a device that is no GPU: results are checked, and no speed is printed.
    #[test]
    fn rows_run_and_are_right_without_a_gpu() {
        for device in ["cpu", "emulator:sm_90a"] {
            let rows = [
                "fwd bf16 full 16 40",
                "bwd bf16 causal 16 20",
                "bwd-det f16 causal 32 33",
                "fwd f16 causal 16 70",
            ];
            for answer in run(&["--device", device], &rows) {
                assert!(
                    answer.contains(r#""clock": "host clock""#) && answer.contains(r#""tflops": null"#),
                    "{answer}"
                );
            }
        }
    }

    #[test]
    fn the_kernels_asked_for_run() {
        let [answer] = &run(
            &["--device", "emulator:sm_90a", "--arch", "sm_80"],
            &["fwd f16 full 64 20"],
        )[..] else {
            panic!("one row");
        };
        assert!(answer.contains(r#""kernels": "forward_f16_d64""#), "{answer}");
    }

    #[test]
    fn the_table_is_that_of_the_field() {
        let options = Options::parse_from(["gpu_speed", "--device", "cpu"]);
        let rows = rows(&options);
        assert_eq!(rows.len(), 2 * 3 * 2 * 6 * 3 + 2 * 3);
        assert_eq!(rows.iter().filter(|row| row.seqlen == 65_536).count(), 6);
        let text = estimate(&rows, &options);
        assert!(text.starts_with("222 rows; about "), "{text}");
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    /// Tests that the check finds wrong results.
    #[test]
    fn a_wrong_result_is_seen() {
        let device = Device::cpu();
        let sizes = Sizes { tokens: 40, hidden: 32 };
        let mut arena = Arena::<f16>::new(&device, 40 * 32, 0).expect("small");
        for line in ["fwd f16 causal 16 40", "bwd f16 full 16 40"] {
            let row: Row = line.parse().expect("a row");
            let mut bound = arena.bind(&row, row.shape(&sizes), Attention::new()).expect("valid");
            bound.run(0).expect("valid");
            assert!(spot::error(&bound, &row, 0).expect("read") < spot::ALLOWED);
            // Results of the other inputs.
            let right = spot::error(&bound, &row, 0).expect("read");
            let wrong = spot::error(&bound, &row, 1).expect("read");
            assert!(wrong > 10.0 * right && wrong > spot::ALLOWED, "{line}: {right} {wrong}");
        }
    }
}
