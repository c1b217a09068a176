//! Times of calls, with a progress bar for those that take long.

use std::io::Write;
use std::time::{Duration, Instant};

use flash_attention::device::DeviceKind;
use flash_attention::plan::PassType;
use flash_attention::{Device, Error, Plan, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Failure;

/// Makes a call and prints its plan, its time and, on the emulator, its counters.
///
/// # Errors
/// The error of the call, or of printing.
pub fn measured<R>(
    device: &Device,
    plan: &Plan<impl PassType>,
    print: &mut impl Write,
    call: impl Fn(&Bar) -> Result<R, Error>,
) -> Result<R, Failure> {
    writeln!(print, "{plan}")?;
    device.reset_counters();
    let (result, times) = timed(device, call)?;
    writeln!(print, "time      {times}")?;
    if let Some(counted) = device.counters() {
        let (read, written) = (counted.global_read_bytes, counted.global_written_bytes);
        writeln!(
            print,
            "counted   {read} bytes read, {written} written; the checks found nothing"
        )?;
    }
    Ok(result)
}

/// Times of a call: the first, and the median of all.
#[derive(Debug)]
pub struct Times(Vec<Duration>);

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let milliseconds = |time: Duration| 1e3 * time.as_secs_f64();
        write!(f, "{:.3} ms", milliseconds(sorted[sorted.len() / 2]))?;
        match sorted.len() {
            1 => Ok(()),
            calls => write!(
                f,
                ", median of {calls} calls; the first took {:.3} ms",
                milliseconds(self.0[0])
            ),
        }
    }
}

/// Runs a call and returns its result and times: once on the emulator, which is slow, else for a fraction of a
/// second.
///
/// # Errors
/// The error of the call.
pub fn timed<R>(device: &Device, call: impl Fn(&Bar) -> Result<R, Error>) -> Result<(R, Times), Failure> {
    let begin = Instant::now();
    let mut times = Vec::new();
    loop {
        let bar = Bar::new();
        let result = call(&bar)?;
        device.synchronize()?;
        times.push(bar.clear());
        let enough = times.len() == 100 || begin.elapsed() > Duration::from_millis(300);
        if enough || device.kind() == DeviceKind::Emulator {
            return Ok((result, Times(times)));
        }
    }
}

/// Progress bar on standard error, shown if that is a terminal and the call takes long.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    start: Instant,
}

impl Bar {
    /// Calls shorter than this need no bar.
    const PATIENCE: Duration = Duration::from_millis(200);

    fn new() -> Self {
        let style = ProgressStyle::with_template("{bar:40} {percent} %, {eta} left");
        Self {
            bar: ProgressBar::new(1).with_style(style.expect("the template is well formed")),
            start: Instant::now(),
        }
    }

    /// Shows how much of the call is done, once it has taken 200 ms.
    pub fn show(&self, progress: Progress) {
        if self.start.elapsed() > Self::PATIENCE {
            self.bar.set_length(progress.total);
            self.bar.set_position(progress.done);
        }
    }

    /// Removes the bar; returns the time since it was made.
    fn clear(&self) -> Duration {
        let elapsed = self.start.elapsed();
        self.bar.finish_and_clear();
        elapsed
    }
}
