//! Predicts the speed of the kernels for Hopper without a GPU, and compares measured speeds with the predictions.
//!
//! `hopper_model [--output FILE]` writes the table of predictions. `hopper_model --check FILE` reads measured rows
//! and prints them beside the predictions. A row is a line with a JSON object with `pass`, `dtype`, `mask` or
//! `causal`, `head_dim`, `seqlen` and `tflops`.

mod calibration;
mod counts;
mod hardware;
mod model;
mod peer;
mod program;
mod record;
mod replay;

use std::fmt::Write as _;

use benches::row::Pass;
use counts::Shape;
use model::Prediction;
use peer::Published;

type Failure = Box<dyn std::error::Error>;

const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];
const SEQLENS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16384];

/// Largest relative error of a prediction with which the model is kept.
const TOLERANCE: f64 = 0.15;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print!("{}", document()?),
        ["--output", path] => std::fs::write(path, document()?)?,
        ["--check", path] => print!("{}", check(&std::fs::read_to_string(path)?)?),
        _ => return Err("usage: hopper_model [--output FILE | --check FILE]".into()),
    }
    Ok(())
}

/// Writes the predictions and the data they are based on.
fn document() -> Result<String, Failure> {
    let [mut counted, mut replayed] = ["", ""].map(|_| String::from("| pass | mask | head_dim |"));
    for seqlen in SEQLENS {
        let _ = write!(counted, " {seqlen} |");
        let _ = write!(replayed, " {seqlen} |");
    }
    counted += " ceiling at 16384 | busiest, share of the time | longest block / mean | FA3, H100, published, 512 to 16384 |\n";
    counted += &format!("{}|\n", "| --- ".repeat(7 + SEQLENS.len()));
    replayed += " against the counted model at 16384 | FA3, H100, published, 512 to 16384 | against it, 4096 to 16384 | \
         FA3 by the same fit at 16384 | against it |\n";
    replayed += &format!("{}|\n", "| --- ".repeat(8 + SEQLENS.len()));
    for pass in [Pass::Forward, Pass::Backward, Pass::Deterministic] {
        for head_dim in HEAD_DIMS {
            let counts = counts::measure(pass, head_dim)?;
            for causal in [false, true] {
                let predictions: Vec<Prediction> = SEQLENS
                    .iter()
                    .map(|&seqlen| model::predict(&Shape::of_table(pass, head_dim, seqlen, causal), &counts))
                    .collect::<Result<_, _>>()?;
                let published = Published::of(pass, head_dim as u32, causal).map(|call| call.speeds);
                let name = format!("| {} | {} | {head_dim} |", pass.title(), mask(causal));
                counted += &(name.clone() + &counted_row(&predictions, published));
                let by_fit = calibration::of_peer(pass, head_dim as u32, causal);
                replayed += &(name + &replayed_row(&predictions, published, by_fit));
            }
        }
    }
    let about = include_str!("about.md").replace("CONSTANTS\n", &model::about());
    let about = about
        .replace("COUNTED\n", &counted)
        .replace("CALIBRATION\n", &calibration::about());
    Ok(about
        .replace("LOOPS\n", &calibration::loops()?)
        .replace("POLYNOMIALS\n", &calibration::polynomials()?)
        .replace("REPLAYED\n", &replayed))
}

/// Writes the cells of a row of the counted model.
fn counted_row(predictions: &[Prediction], published: Option<[u32; 6]>) -> String {
    let mut text = String::new();
    for prediction in predictions {
        let _ = write!(text, " {:.0} |", prediction.tflops);
    }
    let last = predictions[SEQLENS.len() - 1];
    let (name, share) = last.busiest;
    let _ = writeln!(
        text,
        " {:.0} | {name}, {:.0} % | {:.2} | {} |",
        last.ceiling,
        100.0 * share,
        last.imbalance,
        speeds(published)
    );
    text
}

/// Writes the cells of a row of the replay.
fn replayed_row(predictions: &[Prediction], published: Option<[u32; 6]>, by_fit: Option<f64>) -> String {
    let mut text = String::new();
    for prediction in predictions {
        let _ = write!(text, " {:.0} |", prediction.replayed);
    }
    let last = predictions[SEQLENS.len() - 1];
    let percent = |ours: f64, theirs: f64| format!("{:+.0} %", 100.0 * (ours / theirs - 1.0));
    let against = published.map(|published| {
        let rows = predictions.iter().zip(published).skip(3);
        let errors = rows.map(|(ours, theirs)| percent(ours.replayed, f64::from(theirs)));
        errors.collect::<Vec<_>>().join(", ")
    });
    let by_fit = by_fit.map_or("- | -".to_owned(), |theirs| {
        format!("{theirs:.0} | {}", percent(last.replayed, theirs))
    });
    let _ = writeln!(
        text,
        " {} | {} | {} | {by_fit} |",
        percent(last.replayed, last.tflops),
        speeds(published),
        against.as_deref().unwrap_or("-")
    );
    text
}

/// Writes published speeds in a cell.
fn speeds(published: Option<[u32; 6]>) -> String {
    published.map_or("-".into(), |speeds| speeds.map(|speed| speed.to_string()).join(", "))
}

/// Writes measured rows beside their predictions. Lines that are no rows of the table are counted in the summary.
fn check(lines: &str) -> Result<String, Failure> {
    let mut text =
        String::from("| pass | mask | head_dim | seqlen | measured | counted | error | | replayed | error | |\n");
    text += &format!("{}|\n", "| --- ".repeat(11));
    let (mut within, mut all, mut others) = ([0; 2], 0, 0);
    let mut known: Vec<((Pass, usize), counts::Counts)> = Vec::new();
    for line in lines.lines().filter(|line| !line.trim().is_empty()) {
        let Some((shape, measured)) = measured_row(line) else {
            others += 1;
            continue;
        };
        let key = (shape.pass, shape.head_dim);
        if known.iter().all(|(other, _)| *other != key) {
            known.push((key, counts::measure(shape.pass, shape.head_dim)?));
        }
        let counts = known.iter().find(|(other, _)| *other == key).map(|(_, counts)| counts);
        let predicted = model::predict(&shape, counts.ok_or("counted above")?)?;
        all += 1;
        let (pass, mask) = (shape.pass.title(), mask(shape.causal));
        let _ = write!(
            text,
            "| {pass} | {mask} | {} | {} | {measured:.0} |",
            shape.head_dim, shape.seqlen
        );
        for (within, predicted) in within.iter_mut().zip([predicted.tflops, predicted.replayed]) {
            let error = predicted / measured - 1.0;
            let is_within = error.abs() <= TOLERANCE;
            *within += u32::from(is_within);
            let verdict = if is_within { "within" } else { "off" };
            let _ = write!(text, " {predicted:.0} | {:+.0} % | {verdict} |", 100.0 * error);
        }
        text.push('\n');
    }
    let _ = writeln!(
        text,
        "\nOf {all} rows {} counted and {} replayed are within {:.0} %; {others} lines are not rows of ours.",
        within[0],
        within[1],
        100.0 * TOLERANCE
    );
    Ok(text)
}

/// Reads the shape and TFLOP/s of a line of the speed table. Returns `None` unless it is an f16 or bf16 row of this
/// library with a speed.
fn measured_row(line: &str) -> Option<(Shape, f64)> {
    if !matches!(field(line, "dtype")?, "f16" | "bf16") || field(line, "backend").is_some_and(|name| name != "ours") {
        return None;
    }
    let pass = field(line, "pass")?.parse().ok()?;
    let causal = matches!(
        (field(line, "mask"), field(line, "causal")),
        (Some("causal"), _) | (_, Some("true"))
    );
    let (head_dim, seqlen) = (
        field(line, "head_dim")?.parse().ok()?,
        field(line, "seqlen")?.parse().ok()?,
    );
    let tflops: f64 = field(line, "tflops")?.parse().ok()?;
    (tflops > 0.0).then(|| (Shape::of_table(pass, head_dim, seqlen, causal), tflops))
}

/// Returns the value of a field of a flat JSON object, without its quotes.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let rest = line
        .split_once(&format!("\"{name}\""))?
        .1
        .trim_start()
        .strip_prefix(':')?;
    Some(rest.split([',', '}']).next()?.trim().trim_matches('"'))
}

fn mask(causal: bool) -> &'static str {
    if causal { "causal" } else { "full" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_others_are_not() {
        let line = r#"{"kind": "row", "pass": "bwd-det", "dtype": "f16", "mask": "causal", "head_dim": 128, "seqlen": 4096, "tflops": 301.5, "error": 0.1}"#;
        let (shape, tflops) = measured_row(line).expect("a row");
        assert_eq!(shape, Shape::of_table(Pass::Deterministic, 128, 4096, true));
        assert_eq!(tflops, 301.5);
        let full = r#"{"tflops":7,"causal":false,"seqlen":512,"head_dim":64,"dtype":"bf16","pass":"forward"}"#;
        assert_eq!(
            measured_row(full),
            Some((Shape::of_table(Pass::Forward, 64, 512, false), 7.0))
        );
        assert_eq!(measured_row(&line.replace("301.5", "null")), None);
        assert_eq!(measured_row(&line.replace("f16", "f32")), None);
    }
}
