//! Counts the memory traffic behind the paper's claim: standard attention moves O(N d + N^2) elements, FlashAttention
//! O(N^2 d^2 / M).
//!
//! Both run on the emulator, which counts every byte that their kernels load from and store to device memory.
//! Standard attention is three plain kernels with the scores in device memory. FlashAttention is the fused kernel
//! with 16 to 128 queries per block: a larger SRAM (M) holds more queries. One head, f32, head_dim 64, full
//! attention.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use flash_attention_examples::Failure;
use flash_attention_examples::traffic::{HEAD_DIM, Measured, QUERIES_PER_BLOCK, Study};
use plotters::prelude::*;

/// Count the device memory traffic of standard attention and of FlashAttention on the PTX emulator.
#[derive(Parser)]
struct Options {
    /// Sequence lengths, comma-separated.
    #[arg(long, value_delimiter = ',', default_value = "128,256,512,1024", value_parser = clap::value_parser!(u32).range(1..=8192))]
    seqlen: Vec<u32>,
    /// File of the plot.
    #[arg(long, default_value = "target/io_complexity.svg")]
    plot: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    println!(
        "| seqlen | M, KiB | standard, KiB | flash, KiB | ratio | standard / (N d + N^2) | flash / (N^2 d^2 / M) |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut measured = Vec::new();
    for &seqlen in &options.seqlen {
        let study = Study::new(seqlen)?;
        let standard = study.standard()?;
        for block_m in QUERIES_PER_BLOCK {
            let flash = study.flash(block_m)?;
            print_row(&standard, &flash);
            measured.push((standard, flash));
        }
    }
    plot(&measured, &options.plot).map_err(|e| Failure(format!("{}: {e}", options.plot.display())))?;
    println!("\nplot: {}", options.plot.display());
    Ok(())
}

fn print_row(standard: &Measured, flash: &Measured) {
    let (n, d) = (f64::from(flash.seqlen), f64::from(HEAD_DIM));
    let elements = |measured: &Measured| measured.bytes as f64 / 4.0;
    let m = f64::from(flash.shared_bytes) / 4.0;
    println!(
        "| {} | {} | {} | {} | {:.2} | {:.2} | {:.2} |",
        flash.seqlen,
        flash.shared_bytes / 1024,
        standard.bytes / 1024,
        flash.bytes / 1024,
        elements(standard) / elements(flash),
        elements(standard) / (n * d + n * n),
        elements(flash) / (n * n * d * d / m),
    );
}

/// Draws bytes by sequence length: one line for standard attention and one for each amount of SRAM. Both axes are
/// logarithmic.
fn plot(measured: &[(Measured, Measured)], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let all = || measured.iter().flat_map(|(standard, flash)| [standard, flash]);
    let seqlens = all().map(|m| f64::from(m.seqlen));
    let (first, last) = seqlens.fold((f64::MAX, f64::MIN), |(low, high), n| (low.min(n), high.max(n)));
    let mib = |m: &Measured| m.bytes as f64 / f64::from(1 << 20);
    let (least, most) = all()
        .map(mib)
        .fold((f64::MAX, f64::MIN), |(low, high), b| (low.min(b), high.max(b)));

    let root = SVGBackend::new(path, (760, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .caption("Device memory traffic, one head, f32, head_dim 64", ("sans-serif", 20))
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (first * 0.9..last * 1.1).log_scale(),
            (least * 0.7..most * 1.4).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("seqlen")
        .y_desc("MiB read and written")
        .draw()?;
    let mut line = |name: String, points: Vec<(f64, f64)>, color: RGBColor| -> Result<(), Box<dyn std::error::Error>> {
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        Ok(())
    };
    let point = |m: &Measured| (f64::from(m.seqlen), mib(m));
    let standard = measured.iter().map(|(standard, _)| point(standard)).collect();
    line("standard attention".to_owned(), standard, RGBColor(180, 40, 40))?;
    for (index, block_m) in (0_u8..).zip(QUERIES_PER_BLOCK) {
        let of_size = || {
            measured
                .iter()
                .map(|(_, flash)| flash)
                .filter(|flash| flash.block_m == block_m)
        };
        let kib = of_size().next().map_or(0, |flash| flash.shared_bytes / 1024);
        let color = RGBColor(30, 170 - 40 * index, 110 + 40 * index);
        line(
            format!("FlashAttention, {kib} KiB of SRAM"),
            of_size().map(point).collect(),
            color,
        )?;
    }
    chart
        .configure_series_labels()
        .border_style(BLACK)
        .background_style(WHITE)
        .position(SeriesLabelPosition::UpperLeft)
        .draw()?;
    root.present()?;
    Ok(())
}
