//! Results of trainings: a table in Markdown, and a plot of the losses with a panel for each task. A plot of quantities over sizes.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

type PlotResult = std::result::Result<(), Box<dyn std::error::Error>>;

/// Results of one task.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Trained {
    /// Name of the task.
    pub task: String,
    /// Sizes of model and batch, for people.
    pub model: String,
    /// Results of each attention.
    pub runs: Vec<Run>,
}

/// Results of one attention.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Run {
    /// Who computed attention.
    pub name: String,
    /// Loss of each step, in nats.
    pub losses: Vec<f32>,
    /// Name, loss and accuracy of each held-out set.
    pub held_out: Vec<(String, f64, f64)>,
    /// Tokens a second, by the median step; none if the run went on from its last step.
    pub tokens_per_second: Option<f64>,
    /// Attention's share of a step; none where tokens a second are.
    pub attention_share: Option<f64>,
    /// Bytes that a step needed beside weights and moments, at most.
    pub peak: usize,
}

impl Trained {
    /// Largest difference of the losses of a step; none with one run.
    pub fn apart(&self) -> Option<f32> {
        let [a, b, ..] = self.runs.as_slice() else { return None };
        let differences = a.losses.iter().zip(&b.losses).map(|(a, b)| (a - b).abs());
        Some(differences.fold(0.0, f32::max))
    }

    /// Rows of the table, one an attention, and a sentence with the ratios.
    fn rows(&self) -> String {
        let mut rows = String::new();
        for run in &self.runs {
            let scores = run.held_out.iter().map(|(name, loss, accuracy)| {
                let name = if name.is_empty() {
                    String::new()
                } else {
                    format!("{name}: ")
                };
                format!("{name}{loss:.4}, {:.1} %", 100.0 * accuracy)
            });
            rows += &format!(
                "| {} | {} | {} | {:.4} | {} | {} | {} | {} |\n",
                self.task,
                run.name,
                run.losses.len(),
                run.losses.last().copied().unwrap_or(f32::NAN),
                scores.collect::<Vec<_>>().join("; "),
                run.tokens_per_second
                    .map_or("-".to_owned(), |speed| format!("{speed:.0}")),
                run.attention_share
                    .map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
                run.attention_share.map_or("-".to_owned(), |_| format!(
                    "{:.0}",
                    run.peak as f64 / f64::from(1 << 20)
                )),
            );
        }
        rows
    }

    /// Ratios of ours and plain, a row of the second table.
    fn ratios(&self) -> Option<String> {
        let [ours, plain] = self.runs.as_slice() else {
            return None;
        };
        Some(format!(
            "| {} | {} | {:.2} | {:.2} | {:.1} | {:.0e} |\n",
            self.task,
            self.model,
            ours.tokens_per_second? / plain.tokens_per_second?,
            (1.0 - plain.attention_share?).recip(),
            plain.peak as f64 / ours.peak.max(1) as f64,
            self.apart()?,
        ))
    }
}

/// The tables of these tasks.
pub fn tables(trained: &[Trained]) -> String {
    let mut text = String::from(
        "| task | attention | steps | last loss | held-out loss, accuracy | tokens a second | attention's share of a step | peak memory of a step, MiB |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    text.extend(trained.iter().map(Trained::rows));
    text.push_str(
        "\n| task | model | speed, times plain's | most that plain's share allows | memory, plain's times ours | losses apart at most |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    text.extend(trained.iter().filter_map(Trained::ratios));
    text
}

/// Draws the losses of each task, two panels a row.
///
/// # Errors
/// The file cannot be written.
pub fn plot(trained: &[Trained], path: &Path) -> PlotResult {
    let rows = trained.len().div_ceil(2).max(1);
    let columns = trained.len().clamp(1, 2);
    let root = SVGBackend::new(path, (460 * columns as u32, 320 * rows as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, trained) in root.split_evenly((rows, columns)).iter().zip(trained) {
        panel(area, trained)?;
    }
    root.present()?;
    Ok(())
}

fn panel(area: &DrawingArea<SVGBackend<'_>, Shift>, trained: &Trained) -> PlotResult {
    let losses = || trained.runs.iter().flat_map(|run| &run.losses);
    let most = losses().fold(0.0_f32, |most, &loss| most.max(loss));
    let least = losses().fold(most, |least, &loss| least.min(loss));
    let steps = trained.runs.iter().map(|run| run.losses.len()).max();
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(&trained.task, ("sans-serif", 16))
        .x_label_area_size(34)
        .y_label_area_size(44)
        .build_cartesian_2d(0..steps.unwrap_or_default().max(1), 0.9 * least..1.05 * most)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss, nats")
        .disable_mesh()
        .draw()?;
    for (run, (colour, width)) in trained.runs.iter().zip([(&BLUE, 3), (&RED, 1)]) {
        let points = run.losses.iter().copied().enumerate();
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(width)))?
            .label(&run.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(width)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    Ok(())
}

/// Curves of one quantity.
pub struct Curves {
    /// Quantity that the curves show, with its unit.
    pub quantity: &'static str,
    /// Name and points of each curve, all of them positive.
    pub curves: Vec<(&'static str, Vec<(f64, f64)>)>,
}

/// Draws panels side by side, over one x axis; all axes are logarithmic.
///
/// # Errors
/// The file cannot be written.
pub fn log_plot(panels: &[Curves], x_desc: &str, path: &Path) -> PlotResult {
    let root = SVGBackend::new(path, (460 * panels.len() as u32, 320)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((1, panels.len())).iter().zip(panels) {
        let range = |of: fn(&(f64, f64)) -> f64| {
            let all = || panel.curves.iter().flat_map(|(_, points)| points).map(of);
            all().fold(f64::INFINITY, f64::min)..1.2 * all().fold(0.0, f64::max)
        };
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .caption(panel.quantity, ("sans-serif", 16))
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d(range(|point| point.0).log_scale(), range(|point| point.1).log_scale())?;
        chart.configure_mesh().x_desc(x_desc).draw()?;
        for ((name, points), colour) in panel.curves.iter().zip([&BLUE, &RED, &BLACK]) {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()?;
    }
    root.present()?;
    Ok(())
}
